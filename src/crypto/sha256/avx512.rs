//! Sixteen messages in the lanes of AVX-512: see [`vector`](super::vector).

// Since Rust 1.87 most intrinsics are safe to call here; the oldest compiler that we
// build with disagrees.
#![allow(unused_unsafe)]
// `build.rs` has asked the compiler.
#![allow(clippy::incompatible_msrv)]

use super::{
    Block, K, State,
    vector::{compression, each_round},
};
use std::{
    arch::x86_64::{
        __m512i, _mm512_add_epi32, _mm512_loadu_si512, _mm512_ror_epi32, _mm512_set1_epi32, _mm512_shuffle_i32x4,
        _mm512_srli_epi32, _mm512_storeu_si512, _mm512_ternarylogic_epi32, _mm512_unpackhi_epi32,
        _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    },
    array::from_fn,
};

compression!(Avx512, "avx512f", __m512i, 16);

/// A block is one register, so this is a square of words with rows and columns exchanged: first of
/// two rows, then of four, within each quarter of the registers, then the quarters.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_words(blocks: &[&Block; LANES]) -> [__m512i; 16] {
    // SAFETY: the feature is the caller's word; each load is of the 64 bytes of a block.
    unsafe {
        let mut rows = [splat(0); 16];
        for (row, block) in rows.iter_mut().zip(blocks) {
            *row = big_endian(_mm512_loadu_si512(block.as_ptr().cast()));
        }
        let mut twos = [splat(0); 16];
        for i in (0..16).step_by(2) {
            twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        let mut fours = [splat(0); 16];
        for i in (0..16).step_by(4) {
            fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
        }
        let mut words = [splat(0); 16];
        for i in 0..4 {
            // Of each register the quarters 0 and 2, or 1 and 3.
            let even = _mm512_shuffle_i32x4::<0x88>(fours[i], fours[i + 4]);
            let odd = _mm512_shuffle_i32x4::<0xdd>(fours[i], fours[i + 4]);
            let more_even = _mm512_shuffle_i32x4::<0x88>(fours[i + 8], fours[i + 12]);
            let more_odd = _mm512_shuffle_i32x4::<0xdd>(fours[i + 8], fours[i + 12]);
            words[i] = _mm512_shuffle_i32x4::<0x88>(even, more_even);
            words[i + 4] = _mm512_shuffle_i32x4::<0x88>(odd, more_odd);
            words[i + 8] = _mm512_shuffle_i32x4::<0xdd>(even, more_even);
            words[i + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, more_odd);
        }
        words
    }
}

/// The bytes of each word the other way round. The instruction that does it at once is of another
/// set.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn big_endian(words: __m512i) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { choose(splat(0xff00_ff00), rotate::<8, 24>(words), rotate::<24, 8>(words)) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(words: &Words) -> __m512i {
    // SAFETY: the feature is the caller's word; 64 bytes of 64.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(vector: __m512i) -> Words {
    let mut words = [0; LANES];
    // SAFETY: the feature is the caller's word; 64 bytes of 64.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), vector) };
    words
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn splat(word: u32) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm512_set1_epi32(word as i32) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm512_add_epi32(a, b) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn xor(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm512_ternarylogic_epi32::<0x96>(a, b, c) }
}

/// Bits of `f` where `e` has ones, of `g` elsewhere.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn choose(e: __m512i, f: __m512i, g: __m512i) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm512_ternarylogic_epi32::<0xca>(e, f, g) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn majority(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm512_ternarylogic_epi32::<0xe8>(a, b, c) }
}

/// To the right by `R` = 32 − `L` bits.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn rotate<const R: i32, const L: i32>(word: __m512i) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm512_ror_epi32::<R>(word) }
}

/// To the right.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn shift<const R: u32>(word: __m512i) -> __m512i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm512_srli_epi32::<R>(word) }
}
