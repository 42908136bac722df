//! The product with activations in bf16, by the instruction that multiplies two pairs of bf16 and adds both to a sum in f32
//! (AVX512-BF16): twice the arithmetic of f32 in the same time.

use super::{
    super::{DEPTH, PANEL, rows::Output},
    Bf16, PAIRS,
};

/// Whether the machine has the instruction.
pub(super) fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `x [m, k]` in pairs of bf16, rounded to the nearest, ties to even: `[blocks of PAIRS, m, PAIRS]`, padded with zeros.
pub(super) fn rounded(x: &[f32], k: usize) -> Vec<u32> {
    let m = x.len() / k.max(1);
    let mut out = vec![[0u32; PAIRS]; k.div_ceil(DEPTH) * m];
    for (block, out) in out.chunks_exact_mut(m.max(1)).enumerate() {
        let from = block * DEPTH;
        for (row, out) in x.chunks_exact(k).zip(out) {
            round(&row[from..k.min(from + DEPTH)], out);
        }
    }
    out.into_flattened()
}

/// Up to [`DEPTH`] numbers of a row; the rest stays as it is.
fn round(x: &[f32], out: &mut [u32; PAIRS]) {
    #[cfg(target_arch = "x86_64")]
    if available() {
        return unit::round(x, out);
    }
    for (x, out) in x.chunks(2).zip(out) {
        let half = |i: usize| x.get(i).map_or(0, |x| u32::from(half::bf16::from_f32(*x).to_bits()));
        *out = half(0) | half(1) << 16;
    }
}

/// Columns of some panels for all rows of `x`.
pub(super) struct Dot<'a> {
    /// As [`rounded`] makes it.
    pub(super) x: &'a [u32],
    pub(super) w: &'a Bf16,
    pub(super) bias: Option<&'a [f32]>,
}

impl Dot<'_> {
    /// Writes all of `out`. Only where the instruction is [`available`].
    pub(super) fn compute(&self, mut out: Output<'_>) {
        assert!(available(), "the instruction is there");
        let (depth, rows) = (self.w.in_dim.div_ceil(2), out.rows.len());
        let mut sums = vec![[0f32; PANEL]; rows];
        for (i, panel) in out.panels.clone().enumerate() {
            for from in (0..depth).step_by(PAIRS) {
                let w = &self.w.rows(panel, from)[..PAIRS.min(depth - from)];
                let x = self.x[from * rows..(from + PAIRS) * rows].as_chunks().0;
                #[cfg(target_arch = "x86_64")]
                unit::multiply(x, w, &mut sums, from == 0);
                #[cfg(not(target_arch = "x86_64"))]
                let _: (&[[u32; PAIRS]], _) = (x, w);
            }
            out.write(i, sums.as_flattened(), self.bias);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vectors are read and written through pointers; every length is a type's or checked")]
mod unit {
    use std::arch::x86_64::*;

    use super::{
        super::{PAIRS, ask},
        PANEL,
    };
    use crate::ops::LINE;

    /// Vectors of a panel's row.
    const VECTORS: usize = PANEL / LINE;

    pub(super) fn round(x: &[f32], out: &mut [u32; PAIRS]) {
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn run(x: &[f32], out: &mut [u32; PAIRS]) {
            for (x, out) in x.chunks(LINE).zip(out.as_chunks_mut::<{ LINE / 2 }>().0) {
                let mask = ((1u32 << x.len()) - 1) as u16;
                // SAFETY: what the mask leaves out is not read; eight pairs are written
                unsafe {
                    let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.as_ptr()));
                    out.as_mut_ptr().cast::<__m256bh>().write_unaligned(rounded);
                }
            }
        }
        // SAFETY: the caller has seen that the instructions are there
        unsafe { run(x, out) }
    }

    /// `sums [rows, PANEL]` grow by a block's product for all rows of `x`, or begin with it.
    pub(super) fn multiply(x: &[[u32; PAIRS]], w: &[[u32; PANEL]], sums: &mut [[f32; PANEL]], begin: bool) {
        assert!(x.len() == sums.len() && w.len() <= PAIRS);
        // SAFETY: the caller has seen that the instructions are there
        unsafe { rows(x, w, sums, begin) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn rows(mut x: &[[u32; PAIRS]], w: &[[u32; PANEL]], mut sums: &mut [[f32; PANEL]], begin: bool) {
        // the first tile of a block asks memory for what comes
        let mut asks = true;
        macro_rules! tiles {
            ($($rows:literal)*) => {$(
                while let (Some((tile, others)), Some(own)) =
                    (x.split_first_chunk::<$rows>(), sums.first_chunk_mut::<$rows>())
                {
                    // SAFETY: as here; the block has at most PAIRS rows
                    unsafe {
                        if asks {
                            one::<$rows, true>(tile, w, own, begin);
                        } else {
                            one::<$rows, false>(tile, w, own, begin);
                        }
                    }
                    asks = false;
                    x = others;
                    sums = &mut std::mem::take(&mut sums)[$rows..];
                }
            )*};
        }
        tiles!(8 4 2 1);
    }

    /// `R` rows, accumulated in registers in one order, whatever `R` is.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn one<const R: usize, const ASK: bool>(
        x: &[[u32; PAIRS]; R],
        w: &[[u32; PANEL]],
        sums: &mut [[f32; PANEL]; R],
        begin: bool,
    ) {
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; R];
        for (p, row) in w.iter().enumerate() {
            if ASK {
                ask(row);
            }
            let mut pairs = [_mm512_setzero_si512(); VECTORS];
            for (v, pairs) in pairs.iter_mut().enumerate() {
                // SAFETY: a row has so many vectors
                *pairs = unsafe { _mm512_loadu_si512(row.as_ptr().add(v * LINE).cast()) };
            }
            for r in 0..R {
                // SAFETY: the block has at most PAIRS rows
                let own = _mm512_set1_epi32(unsafe { *x[r].get_unchecked(p) }.cast_signed());
                for v in 0..VECTORS {
                    // SAFETY: vectors of the same size, both plain bits
                    let bits = |v: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) };
                    acc[r][v] = _mm512_dpbf16_ps(acc[r][v], bits(pairs[v]), bits(own));
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(&acc) {
            for (sums, acc) in sums.as_chunks_mut::<LINE>().0.iter_mut().zip(acc) {
                // SAFETY: a vector of numbers is read and written
                unsafe {
                    let sum = if begin { *acc } else { _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), *acc) };
                    _mm512_storeu_ps(sums.as_mut_ptr(), sum);
                }
            }
        }
    }
}
