//! Tiles in instructions of x86: AVX-512 VNNI, which multiplies and adds four pairs of bytes in each lane, and AVX2.

use std::arch::x86_64::*;

use super::{
    Group, HEAD, Tiles,
    tile::{QUAD, QUADS, Step, Tile},
};
use crate::ops::packed::PANEL;

/// Vectors of 512 bits that hold a panel's columns, and of 256 bits.
const WIDE: usize = PANEL / 16;
const NARROW: usize = PANEL / 8;

/// The tiles with AVX-512 VNNI, where this machine has it.
#[allow(unsafe_code, reason = "instructions that not every machine has")]
pub(super) fn vnni() -> Option<Tiles> {
    let there = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni");
    // SAFETY: it has them
    let tile = |compute| unsafe { Tile::new(compute) };
    there.then(|| [tile(by_vnni::<1>), tile(by_vnni::<2>), tile(by_vnni::<3>), tile(by_vnni::<4>)])
}

/// The tiles with AVX2, where this machine has it.
#[allow(unsafe_code, reason = "instructions that not every machine has")]
pub(super) fn avx2() -> Option<Tiles> {
    let there = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    // SAFETY: it has them
    let tile = |compute| unsafe { Tile::new(compute) };
    there.then(|| [tile(by_avx2::<1>), tile(by_avx2::<2>), tile(by_avx2::<3>), tile(by_avx2::<4>)])
}

#[allow(unsafe_code, reason = "vectors are loaded from and stored to slices of their length")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn by_vnni<const R: usize>(step: &Step<'_>, sums: &mut [[f32; PANEL]]) {
    let (groups, Some(sums)) = (step.blocks.len(), sums.first_chunk_mut::<R>()) else { return };
    let mut acc = [[_mm512_setzero_ps(); WIDE]; R];
    if !step.first {
        for (acc, sums) in acc.iter_mut().zip(&*sums) {
            for (acc, sums) in acc.iter_mut().zip(sums.as_chunks::<16>().0) {
                // SAFETY: 16 numbers
                *acc = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
            }
        }
    }
    for (g, block) in step.blocks.iter().enumerate() {
        step.ask(g);
        let x: [&Group; R] = std::array::from_fn(|r| &step.x[r * groups + g]);
        let (halves, codes) = block.split_at(HEAD);
        let mut dots: [[__m512i; WIDE]; R] = std::array::from_fn(|r| [_mm512_set1_epi32(x[r].start); WIDE]);
        for q in 0..QUADS {
            let w: [__m512i; WIDE] = std::array::from_fn(|v| {
                let codes = &codes[q * QUAD + v * 64..][..64];
                // SAFETY: 64 bytes
                unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
            });
            for r in 0..R {
                let four = _mm512_set1_epi32(x[r].four(q));
                for v in 0..WIDE {
                    dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], w[v], four);
                }
            }
        }
        let scales: [__m512; WIDE] = std::array::from_fn(|v| {
            let halves = &halves[v * 32..][..32];
            // SAFETY: 32 bytes
            _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) })
        });
        for r in 0..R {
            let own = _mm512_set1_ps(x[r].scale);
            for v in 0..WIDE {
                let dot = _mm512_cvtepi32_ps(dots[r][v]);
                acc[r][v] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scales[v], own), acc[r][v]);
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        for (acc, sums) in acc.iter().zip(sums.as_chunks_mut::<16>().0) {
            // SAFETY: 16 numbers
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *acc) };
        }
    }
}

/// Pairs of products are summed in 16 bits, which hold them: a code is -128 at least, an activation -127.
#[allow(unsafe_code, reason = "vectors are loaded from and stored to slices of their length")]
#[target_feature(enable = "avx2,fma,f16c")]
fn by_avx2<const R: usize>(step: &Step<'_>, sums: &mut [[f32; PANEL]]) {
    /// Vectors of a strip, whose sums stay in registers.
    const V: usize = 2;
    let (groups, Some(sums)) = (step.blocks.len(), sums.first_chunk_mut::<R>()) else { return };
    if step.first {
        *sums = [[0.0; PANEL]; R];
    }
    let (ones, middle) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
    for (g, block) in step.blocks.iter().enumerate() {
        step.ask(g);
        let x: [&Group; R] = std::array::from_fn(|r| &step.x[r * groups + g]);
        let (halves, codes) = block.split_at(HEAD);
        for strip in 0..NARROW / V {
            let mut dots = [[_mm256_setzero_si256(); V]; R];
            for q in 0..QUADS {
                for v in 0..V {
                    let codes = &codes[q * QUAD + (strip * V + v) * 32..][..32];
                    // SAFETY: 32 bytes
                    let w = _mm256_xor_si256(unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }, middle);
                    let size = _mm256_abs_epi8(w);
                    for r in 0..R {
                        let signed = _mm256_sign_epi8(_mm256_set1_epi32(x[r].four(q)), w);
                        let sums = _mm256_madd_epi16(_mm256_maddubs_epi16(size, signed), ones);
                        dots[r][v] = _mm256_add_epi32(dots[r][v], sums);
                    }
                }
            }
            let scales: [__m256; V] = std::array::from_fn(|v| {
                let halves = &halves[(strip * V + v) * 16..][..16];
                // SAFETY: 16 bytes
                _mm256_cvtph_ps(unsafe { _mm_loadu_si128(halves.as_ptr().cast()) })
            });
            for r in 0..R {
                let own = _mm256_set1_ps(x[r].scale);
                for v in 0..V {
                    let sums = &mut sums[r].as_chunks_mut::<8>().0[strip * V + v];
                    let (dot, scale) = (_mm256_cvtepi32_ps(dots[r][v]), _mm256_mul_ps(scales[v], own));
                    // SAFETY: 8 numbers each
                    unsafe {
                        let sum = _mm256_fmadd_ps(dot, scale, _mm256_loadu_ps(sums.as_ptr()));
                        _mm256_storeu_ps(sums.as_mut_ptr(), sum);
                    }
                }
            }
        }
    }
}
