//! The matrix unit itself, and what its tiles are made with. Where the machine has none, plain code that does the same, so that
//! the tiles' layout is tested everywhere.

use std::marker::PhantomData;

use super::{PAIR, SIDE, SPAN, STEP, TILE};
use crate::ops::packed::PANEL;

/// Whether this process may use the unit.
pub(in crate::ops::packed) fn available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        static AVAILABLE: std::sync::LazyLock<bool> = std::sync::LazyLock::new(amx::request);
        *AVAILABLE
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// The unit, set up for this thread until it is dropped.
pub(super) struct Unit(PhantomData<*const ()>);

impl Unit {
    pub(super) fn enter() -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if available() {
            amx::configure();
        }
        Self(PhantomData)
    }

    /// `sums [SPAN, SPAN]` grow by the product of two pairs of tiles over all steps, or begin with it.
    pub(super) fn multiply(&self, left: &[u16], right: &[u16], sums: &mut [f32], begin: bool) {
        let steps = left.len() / PAIR;
        assert!(steps > 0 && left.len() == steps * PAIR && right.len() == left.len() && sums.len() == SPAN * SPAN);
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if available() {
            return amx::multiply(left, right, sums, begin);
        }
        plain::multiply(left, right, sums, begin);
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if available() {
            amx::release();
        }
    }
}

/// The halves of up to [`STEP`] numbers, then zeros.
pub(super) fn split(x: &[f32], high: &mut [u16], low: &mut [u16]) {
    assert!(x.len() <= STEP && high.len() == STEP && low.len() == STEP);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if available() {
        return amx::split(x, high, low);
    }
    plain::split(x, high, low);
}

/// The halves of [`SIDE`] numbers of two rows, which take turns.
pub(super) fn split_pairs(x: &[f32], y: &[f32], high: &mut [u16], low: &mut [u16]) {
    assert!(x.len() == SIDE && y.len() == SIDE && high.len() == STEP && low.len() == STEP);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if available() {
        return amx::split_pairs(x, y, high, low);
    }
    plain::split_pairs(x, y, high, low);
}

/// The halves of [`SIDE`] numbers from `from` on of at most [`SIDE`] rows of [`PANEL`], as lines in which pairs of each row's
/// numbers are side by side: half of a tile.
pub(super) fn turn(rows: &[f32], from: usize, high: &mut [u16], low: &mut [u16]) {
    let count = rows.len() / PANEL;
    assert!(count <= SIDE && rows.len() == count * PANEL && from + SIDE <= PANEL);
    assert!(high.len() == TILE / 2 && low.len() == TILE / 2);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if available() {
        return amx::turn(rows, from, high, low);
    }
    plain::turn(rows, from, high, low);
}

pub(super) mod plain {
    use super::{PAIR, PANEL, SIDE, SPAN, STEP, TILE};

    /// To the nearest, ties to even; what is not a number stays one.
    fn rounded(x: f32) -> u16 {
        let bits = x.to_bits();
        if x.is_nan() {
            return (bits >> 16) as u16 | 0x40;
        }
        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
    }

    fn widened(x: u16) -> f32 {
        f32::from_bits(u32::from(x) << 16)
    }

    fn halves(x: f32) -> (u16, u16) {
        let high = rounded(x);
        // what is infinite, or becomes it, has nothing left
        let rest = if widened(high).is_finite() { x - widened(high) } else { 0.0 };
        (high, rounded(rest))
    }

    pub(in super::super) fn multiply(left: &[u16], right: &[u16], sums: &mut [f32], begin: bool) {
        if begin {
            sums.fill(0.0);
        }
        for (left, right) in left.chunks_exact(PAIR).zip(right.chunks_exact(PAIR)) {
            for (l, r) in [(0, 0), (2, 0), (0, 2)] {
                for (row, sums) in sums.chunks_exact_mut(SPAN).enumerate() {
                    let a = &left[l * TILE + row * STEP..][..STEP];
                    for (column, sum) in sums.iter_mut().enumerate() {
                        let b = &right[(r + column / SIDE) * TILE + column % SIDE * 2..];
                        for (d, a) in a.iter().enumerate() {
                            *sum += widened(*a) * widened(b[d / 2 * STEP + d % 2]);
                        }
                    }
                }
            }
        }
    }

    pub(in super::super) fn split(x: &[f32], high: &mut [u16], low: &mut [u16]) {
        let numbers = x.iter().copied().chain(std::iter::repeat(0.0));
        for ((x, high), low) in numbers.zip(high).zip(low) {
            (*high, *low) = halves(x);
        }
    }

    pub(in super::super) fn split_pairs(x: &[f32], y: &[f32], high: &mut [u16], low: &mut [u16]) {
        let numbers = x.iter().zip(y).flat_map(|(x, y)| [*x, *y]);
        for ((x, high), low) in numbers.zip(high).zip(low) {
            (*high, *low) = halves(x);
        }
    }

    pub(in super::super) fn turn(rows: &[f32], from: usize, high: &mut [u16], low: &mut [u16]) {
        for r in 0..SIDE {
            for d in 0..SIDE {
                let x = rows.get(r * PANEL + from + d).copied().unwrap_or(0.0);
                let at = d / 2 * STEP + r * 2 + d % 2;
                (high[at], low[at]) = halves(x);
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code, reason = "instructions that the compiler has no safe names for; every length is checked above")]
mod amx {
    use std::arch::{asm, x86_64::*};

    use super::{PANEL, SIDE, STEP};

    /// Asks the processor whether it has the unit, and the system for the room that its state takes in each thread.
    pub(super) fn request() -> bool {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        let vectors = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        // leaf 7 is there where AVX-512 is
        if !vectors || __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) != AMX_BF16 | AMX_TILE {
            return false;
        }
        // SAFETY: a request that changes no memory of ours; old kernels answer with an error
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    /// As the processor reads it: palette 1, each of the eight tiles 16 lines of 64 bytes.
    #[repr(C, align(64))]
    struct Config([u8; 64]);

    pub(super) fn configure() {
        static CONFIG: Config = {
            let mut bytes = [0; 64];
            bytes[0] = 1;
            let mut tile = 0;
            while tile < 8 {
                bytes[16 + 2 * tile] = 64;
                bytes[48 + tile] = 16;
                tile += 1;
            }
            Config(bytes)
        };
        // SAFETY: the unit is there and permitted; it reads 64 bytes
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
    }

    pub(super) fn release() {
        // SAFETY: the unit is there
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// Sums in tiles 0 to 3, rows' factors in 4 and 5, columns' in 6 and 7.
    pub(super) fn multiply(left: &[u16], right: &[u16], sums: &mut [f32], begin: bool) {
        let steps = left.len() / super::PAIR;
        // SAFETY: the caller has checked the lengths: a step reads 4096 bytes of either side, and sums are 32 lines of 128 bytes.
        // The unit is set up, and no other code of this thread touches its tiles.
        unsafe {
            asm!(
                "test {begin:e}, {begin:e}",
                "jnz 3f",
                "tileloadd tmm0, [{c} + {sums}*1]",
                "tileloadd tmm1, [{c} + {sums}*1 + 64]",
                "tileloadd tmm2, [{c} + {sums}*1 + 2048]",
                "tileloadd tmm3, [{c} + {sums}*1 + 2112]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {line}*1]",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{a} + {line}*1 + 2048]",
                "tileloadd tmm5, [{a} + {line}*1 + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{a} + {line}*1]",
                "tileloadd tmm6, [{b} + {line}*1 + 2048]",
                "tileloadd tmm7, [{b} + {line}*1 + 3072]",
                "tileloadd tmm5, [{a} + {line}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 4096",
                "add {b}, 4096",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {sums}*1], tmm0",
                "tilestored [{c} + {sums}*1 + 64], tmm1",
                "tilestored [{c} + {sums}*1 + 2048], tmm2",
                "tilestored [{c} + {sums}*1 + 2112], tmm3",
                a = inout(reg) left.as_ptr() => _,
                b = inout(reg) right.as_ptr() => _,
                steps = inout(reg) steps => _,
                begin = in(reg) u32::from(begin),
                c = in(reg) sums.as_mut_ptr(),
                line = in(reg) 64usize,
                sums = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn halves(x: __m512) -> (__m256i, __m256i) {
        // SAFETY: vectors of the same size, both plain bits
        let bits = |v: __m256bh| unsafe { std::mem::transmute::<__m256bh, __m256i>(v) };
        let high = bits(_mm512_cvtneps_pbh(x));
        let widened = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)));
        // what is infinite, or becomes it, has nothing left
        let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(widened), _mm512_set1_ps(f32::INFINITY));
        (high, bits(_mm512_cvtneps_pbh(_mm512_maskz_sub_ps(finite, x, widened))))
    }

    pub(super) fn split(x: &[f32], high: &mut [u16], low: &mut [u16]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn run(x: &[f32], high: &mut [u16], low: &mut [u16]) {
            for at in [0, SIDE] {
                let mask = ((1u32 << x.len().saturating_sub(at).min(SIDE)) - 1) as u16;
                // SAFETY: what the mask leaves out is not read; either output has STEP numbers
                unsafe {
                    let (h, l) = halves(_mm512_maskz_loadu_ps(mask, x.as_ptr().wrapping_add(at)));
                    _mm256_storeu_si256(high.as_mut_ptr().add(at).cast(), h);
                    _mm256_storeu_si256(low.as_mut_ptr().add(at).cast(), l);
                }
            }
        }
        // SAFETY: `request` has seen these vectors; the caller has checked the lengths
        unsafe { run(x, high, low) }
    }

    pub(super) fn split_pairs(x: &[f32], y: &[f32], high: &mut [u16], low: &mut [u16]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn run(x: &[f32], y: &[f32], high: &mut [u16], low: &mut [u16]) {
            // SAFETY: SIDE numbers are read of either row, STEP written to either output
            unsafe {
                let (xh, xl) = halves(_mm512_loadu_ps(x.as_ptr()));
                let (yh, yl) = halves(_mm512_loadu_ps(y.as_ptr()));
                let both = |x, y| {
                    let y = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(y));
                    _mm512_or_si512(_mm512_cvtepu16_epi32(x), y)
                };
                _mm512_storeu_si512(high.as_mut_ptr().cast(), both(xh, yh));
                _mm512_storeu_si512(low.as_mut_ptr().cast(), both(xl, yl));
            }
        }
        // SAFETY: as in `split`
        unsafe { run(x, y, high, low) }
    }

    pub(super) fn turn(rows: &[f32], from: usize, high: &mut [u16], low: &mut [u16]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn run(rows: &[f32], from: usize, high: &mut [u16], low: &mut [u16]) {
            let (mut h, mut l) = ([_mm256_setzero_si256(); SIDE], [_mm256_setzero_si256(); SIDE]);
            for ((row, h), l) in rows.chunks_exact(PANEL).zip(&mut h).zip(&mut l) {
                // SAFETY: `from + SIDE` is at most PANEL
                (*h, *l) = halves(unsafe { _mm512_loadu_ps(row.as_ptr().add(from)) });
            }
            // SAFETY: half a tile is written to either
            unsafe {
                transposed(&h, high.as_mut_ptr());
                transposed(&l, low.as_mut_ptr());
            }
        }
        // SAFETY: as in `split`
        unsafe { run(rows, from, high, low) }
    }

    /// 16 rows of 8 pairs as 8 lines of 16 pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn transposed(rows: &[__m256i; SIDE], out: *mut u16) {
        // rows r and r + 8 share a vector; each half is turned as 8 x 8 pairs
        let v: [__m512i; 8] =
            std::array::from_fn(|r| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(rows[r]), rows[r + 8]));
        let two: [__m512i; 8] = std::array::from_fn(|i| match i % 2 {
            0 => _mm512_unpacklo_epi32(v[i], v[i + 1]),
            _ => _mm512_unpackhi_epi32(v[i - 1], v[i]),
        });
        // of rows 4q to 4q + 3, columns c (in the first 128 bits of each half) and c + 4
        let four: [__m512i; 8] = std::array::from_fn(|i| {
            let (q, c) = (i / 4, i % 4);
            let (a, b) = (two[4 * q + c / 2], two[4 * q + 2 + c / 2]);
            if c % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
        });
        let first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
        let second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        for c in 0..4 {
            // SAFETY: 8 lines of STEP numbers
            unsafe {
                let line = |l: usize| out.add(l * STEP).cast();
                _mm512_storeu_si512(line(c), _mm512_permutex2var_epi64(four[c], first, four[c + 4]));
                _mm512_storeu_si512(line(c + 4), _mm512_permutex2var_epi64(four[c], second, four[c + 4]));
            }
        }
    }
}
