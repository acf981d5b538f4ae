//! The compression function in the SHA instructions of x86, several messages interleaved.
//!
//! `sha256rnds2` does two rounds on a state kept in two registers, {a, b, e, f} and {c, d, g, h};
//! two rounds later what was {a, b, e, f} has moved down to {c, d, g, h}, so the registers just
//! change places. `sha256msg1` and `sha256msg2` are the two halves of the message schedule.
//!
//! Everything is written once for any number of messages; with the number known, the compiler unrolls
//! the loops over lanes and keeps all of them in registers.

// Since Rust 1.87 most intrinsics are safe to call here; the oldest compiler that we
// build with disagrees.
#![allow(unused_unsafe)]
// A lane is a place in several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::{Block, K, State};
use std::arch::{
    asm,
    x86_64::{
        __m128i, _MM_HINT_T0, _mm_add_epi32, _mm_alignr_epi8, _mm_loadu_si128, _mm_prefetch, _mm_set_epi8,
        _mm_set_epi32, _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32,
        _mm_shuffle_epi8, _mm_shuffle_epi32, _mm_storeu_si128,
    },
};

/// Proof that this processor has the instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShaNi(());

impl ShaNi {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("sha") && is_x86_feature_detected!("ssse3");
        found.then_some(Self(()))
    }

    /// See [`Engine::compress`](super::Engine::compress).
    pub(super) fn compress<const N: usize>(self, states: &mut [State; N], messages: [&[Block]; N], last: &[Block; N]) {
        let blocks = messages[0].len();
        assert!(messages.iter().all(|m| m.len() == blocks), "messages of one length");
        // SAFETY: there is a `ShaNi` only where `detect` has found both features.
        unsafe { compress(states, messages, last) }
    }
}

/// One register of each message.
type Lanes<const N: usize> = [__m128i; N];

/// # Safety
/// The processor has the features.
#[target_feature(enable = "sha,ssse3")]
unsafe fn compress<const N: usize>(states: &mut [State; N], messages: [&[Block]; N], last: &[Block; N]) {
    // SAFETY: the features are the caller's word; the only pointer is that of a prefetch, which
    // reads nothing.
    unsafe {
        let (mut abef, mut cdgh) = load_states(states);
        for block in 0..=messages[0].len() {
            let (abef_before, cdgh_before) = (abef, cdgh);
            let mut w = [[_mm_setzero_si128(); N]; 4];
            for lane in 0..N {
                // What is hashed next usually follows these messages. The processor's own
                // prefetching ends at each page, and begins anew only after a few misses. Any
                // address will do: this is a hint.
                let next = messages[lane].as_ptr().wrapping_add(N * messages[lane].len() + block);
                _mm_prefetch::<_MM_HINT_T0>(next.cast());
                let words = load_words(messages[lane].get(block).unwrap_or(&last[lane]));
                for quad in 0..4 {
                    w[quad][lane] = words[quad];
                }
            }
            // Four times in the code: as a loop it would move words from register to register.
            sixteen_rounds::<N, 0>(&mut abef, &mut cdgh, &mut w);
            sixteen_rounds::<N, 1>(&mut abef, &mut cdgh, &mut w);
            sixteen_rounds::<N, 2>(&mut abef, &mut cdgh, &mut w);
            sixteen_rounds::<N, 3>(&mut abef, &mut cdgh, &mut w);
            for lane in 0..N {
                abef[lane] = _mm_add_epi32(abef[lane], abef_before[lane]);
                cdgh[lane] = _mm_add_epi32(cdgh[lane], cdgh_before[lane]);
            }
        }
        store_states(states, &abef, &cdgh);
    }
}

/// Sixteen rounds of every message on the words given, which are then those that follow; the last
/// sixteen have none.
///
/// # Safety
/// The processor has the features.
#[inline]
#[target_feature(enable = "sha,ssse3")]
unsafe fn sixteen_rounds<const N: usize, const WHICH: usize>(
    abef: &mut Lanes<N>,
    cdgh: &mut Lanes<N>,
    w: &mut [Lanes<N>; 4],
) {
    // SAFETY: the features are the caller's word.
    unsafe {
        for quad in 0..4 {
            four_rounds(abef, cdgh, &w[quad], &K[4 * WHICH + quad]);
            side_by_side(abef);
            if WHICH < 3 {
                w[quad] = next_words(&w[quad], &w[(quad + 1) % 4], &w[(quad + 2) % 4], &w[(quad + 3) % 4]);
            }
        }
    }
}

/// Four rounds of every message on the next four words of each.
///
/// # Safety
/// The processor has the features.
#[inline]
#[target_feature(enable = "sha,ssse3")]
unsafe fn four_rounds<const N: usize>(abef: &mut Lanes<N>, cdgh: &mut Lanes<N>, w: &Lanes<N>, k: &[u32; 4]) {
    // SAFETY: the features are the caller's word; the load is of 16 bytes out of 16.
    unsafe {
        let k = _mm_loadu_si128(k.as_ptr().cast());
        for lane in 0..N {
            let wk = _mm_add_epi32(w[lane], k);
            cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], wk);
            // The upper two words: the next two rounds.
            abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], _mm_shuffle_epi32::<0b1110>(wk));
        }
    }
}

/// Makes the compiler put the next rounds of either of two messages after the last ones of
/// both. Left alone it puts all rounds of one before those of the other, and a processor that
/// looks ahead less than a block, as one does whose core runs another thread beside, then finds
/// one message's alone.
///
/// # Safety
/// The processor has the features.
#[inline]
#[target_feature(enable = "sha,ssse3")]
unsafe fn side_by_side<const N: usize>(abef: &mut Lanes<N>) {
    if N == 2 {
        // SAFETY: a comment with the registers in it is all there is.
        unsafe {
            asm!("/* {} {} */", inout(xmm_reg) abef[0], inout(xmm_reg) abef[1], options(pure, nomem, nostack, preserves_flags));
        }
    }
}

/// The four words of the schedule that follow the sixteen given.
///
/// # Safety
/// The processor has the features.
#[inline]
#[target_feature(enable = "sha,ssse3")]
unsafe fn next_words<const N: usize>(w0: &Lanes<N>, w4: &Lanes<N>, w8: &Lanes<N>, w12: &Lanes<N>) -> Lanes<N> {
    let mut next = *w0;
    for lane in 0..N {
        // SAFETY: the features are the caller's word; no pointer is used here.
        unsafe {
            let w9 = _mm_alignr_epi8::<4>(w12[lane], w8[lane]);
            let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0[lane], w4[lane]), w9);
            next[lane] = _mm_sha256msg2_epu32(sum, w12[lane]);
        }
    }
    next
}

/// The sixteen words of a block.
///
/// # Safety
/// The processor has the features.
#[inline]
#[target_feature(enable = "sha,ssse3")]
unsafe fn load_words(block: &Block) -> [__m128i; 4] {
    // SAFETY: the features are the caller's word; the loads are of 4 × 16 bytes out of 64.
    unsafe {
        let big_endian = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
        let mut words = [_mm_setzero_si128(); 4];
        for (quad, words) in words.iter_mut().enumerate() {
            *words = _mm_shuffle_epi8(_mm_loadu_si128(block.as_ptr().add(16 * quad).cast()), big_endian);
        }
        words
    }
}

/// The states as the instructions want them: {a, b, e, f} and {c, d, g, h}, the first word highest.
///
/// # Safety
/// The processor has the features.
#[inline]
#[target_feature(enable = "sha,ssse3")]
unsafe fn load_states<const N: usize>(states: &[State; N]) -> (Lanes<N>, Lanes<N>) {
    // SAFETY: the features are the caller's word; no pointer is used here.
    unsafe {
        let (mut abef, mut cdgh) = ([_mm_setzero_si128(); N], [_mm_setzero_si128(); N]);
        for lane in 0..N {
            let [a, b, c, d, e, f, g, h] = states[lane].map(|word| word as i32);
            abef[lane] = _mm_set_epi32(a, b, e, f);
            cdgh[lane] = _mm_set_epi32(c, d, g, h);
        }
        (abef, cdgh)
    }
}

/// The reverse of [`load_states`].
///
/// # Safety
/// The processor has the features.
#[inline]
#[target_feature(enable = "sha,ssse3")]
unsafe fn store_states<const N: usize>(states: &mut [State; N], abef: &Lanes<N>, cdgh: &Lanes<N>) {
    let (mut feba, mut hgdc) = ([0; 4], [0; 4]);
    for lane in 0..N {
        // SAFETY: the features are the caller's word; the stores are of 16 bytes into 16.
        unsafe {
            _mm_storeu_si128(feba.as_mut_ptr().cast(), abef[lane]);
            _mm_storeu_si128(hgdc.as_mut_ptr().cast(), cdgh[lane]);
        }
        let ([f, e, b, a], [h, g, d, c]) = (feba, hgdc);
        states[lane] = [a, b, c, d, e, f, g, h];
    }
}
