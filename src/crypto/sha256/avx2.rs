//! Eight messages in the lanes of AVX2: see [`vector`](super::vector).

// Since Rust 1.87 most intrinsics are safe to call here; the oldest compiler that we
// build with disagrees.
#![allow(unused_unsafe)]

use super::{
    Block, K, State,
    vector::{compression, each_round},
};
use std::{
    arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_and_si256, _mm256_loadu_si256, _mm256_or_si256, _mm256_set1_epi32,
        _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_si256, _mm256_xor_si256,
    },
    array::from_fn,
};

compression!(Avx2, "avx2", __m256i, 8);

/// The sixteen words of a block of each message.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_words(blocks: &[&Block; LANES]) -> [__m256i; 16] {
    let mut words: [Words; 16] = [[0; LANES]; 16];
    for (lane, block) in blocks.iter().enumerate() {
        for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
            word[lane] = u32::from_be_bytes(bytes.try_into().expect("four bytes"));
        }
    }
    // SAFETY: the feature is the caller's word.
    unsafe {
        let mut w = [splat(0); 16];
        for (vector, words) in w.iter_mut().zip(&words) {
            *vector = load(words);
        }
        w
    }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(words: &Words) -> __m256i {
    // SAFETY: the feature is the caller's word; 32 bytes of 32.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store(vector: __m256i) -> Words {
    let mut words = [0; LANES];
    // SAFETY: the feature is the caller's word; 32 bytes of 32.
    unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), vector) };
    words
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn splat(word: u32) -> __m256i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm256_set1_epi32(word as i32) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm256_add_epi32(a, b) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn xor(a: __m256i, b: __m256i, c: __m256i) -> __m256i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm256_xor_si256(_mm256_xor_si256(a, b), c) }
}

/// Bits of `f` where `e` has ones, of `g` elsewhere.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn choose(e: __m256i, f: __m256i, g: __m256i) -> __m256i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm256_xor_si256(g, _mm256_and_si256(e, _mm256_xor_si256(f, g))) }
}

/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn majority(a: __m256i, b: __m256i, c: __m256i) -> __m256i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b))) }
}

/// To the right by `R` = 32 − `L` bits.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn rotate<const R: i32, const L: i32>(word: __m256i) -> __m256i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm256_or_si256(_mm256_srli_epi32::<R>(word), _mm256_slli_epi32::<L>(word)) }
}

/// To the right.
///
/// # Safety
/// The processor has the feature.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn shift<const R: i32>(word: __m256i) -> __m256i {
    // SAFETY: the feature is the caller's word; no pointer is used here.
    unsafe { _mm256_srli_epi32::<R>(word) }
}
