//! Sixteen messages in the lanes of AVX-512: see [`vector`](super::vector).

// Since Rust 1.87 most intrinsics are safe to call here; the oldest compiler that we build with disagrees.
#![allow(unused_unsafe)]
// `build.rs` has asked the compiler.
#![allow(clippy::incompatible_msrv)]

use super::{
    Block, K, State,
    vector::{compression, each_round},
};
use std::{
    arch::x86_64::{
        __m512i, _mm512_add_epi32, _mm512_loadu_si512, _mm512_ror_epi32, _mm512_set1_epi32, _mm512_srli_epi32,
        _mm512_storeu_si512, _mm512_ternarylogic_epi32,
    },
    array::from_fn,
};

compression!(Avx512, "avx512f", __m512i, 16);

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
