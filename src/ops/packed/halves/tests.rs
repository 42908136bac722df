//! Products in halves against f64 and against the f32 kernels; the machine's instructions against plain code.

use std::mem::MaybeUninit;

use candle_core::{Device, Tensor};

use super::{super::pack, *};
use crate::ops::quantized::{QuantKind, Quantized, quantize};

struct Rng(u32);

impl Rng {
    fn numbers(&mut self, count: usize) -> Vec<f32> {
        let one = |_| {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.0 >> 9) as f32 / 4_194_304.0 - 1.0
        };
        (0..count).map(one).collect()
    }
}

#[allow(unsafe_code, reason = "what is claimed to be written is read")]
fn run<W: Panels>(x: &[f32], w: (W, Factor), bias: Option<&[f32]>, sizes: (usize, usize), columns: usize) -> Vec<f32> {
    let depth = if w.1 == Factor::Straight { sizes.0 } else { sizes.1 };
    // what is not written is seen
    let mut out = vec![MaybeUninit::new(f32::NAN); x.len() / depth * columns];
    product(x, w, bias, sizes, &mut out);
    // SAFETY: every one was made from a number
    out.into_iter().map(|o| unsafe { o.assume_init() }).collect()
}

/// The largest error against f64, relative to the sum of the products' magnitudes.
fn error(
    got: &[f32],
    x: &[f32],
    at: impl Fn(usize, usize) -> f32,
    bias: &[f32],
    (depth, columns): (usize, usize),
) -> f64 {
    let mut worst = 0f64;
    for (x, got) in x.chunks_exact(depth).zip(got.chunks_exact(columns)) {
        for (c, got) in got.iter().enumerate() {
            let (mut sum, mut size) = (f64::from(bias.get(c).copied().unwrap_or(0.0)), 1e-9);
            for (d, x) in x.iter().enumerate() {
                let product = f64::from(*x) * f64::from(at(d, c));
                sum += product;
                size += product.abs();
            }
            let error = (f64::from(*got) - sum).abs() / size;
            assert!(error.is_finite(), "column {c}");
            worst = worst.max(error);
        }
    }
    worst
}

/// Below what three roundings of halves can make of every product.
const BOUND: f64 = 3.0 / 65_536.0;

#[test]
fn products_are_those_of_f64_up_to_halves_of_both() {
    let sizes = [(1, 1, 1), (5, 7, 3), (33, 100, 50), (64, 192, 48), (40, 97, 31), (70, 200, 300), (600, 33, 97)];
    for (seed, (m, k, n)) in sizes.into_iter().enumerate() {
        let mut rng = Rng(seed as u32 + 1);
        let (w, x, g, bias) = (rng.numbers(k * n), rng.numbers(m * k), rng.numbers(m * n), rng.numbers(n));
        let packed = pack(k, n, |row, column| w[row * n + column]);
        let got = run(&x, (&packed[..], Factor::Straight), Some(&bias), (k, n), n);
        let forward = error(&got, &x, |d, c| w[d * n + c], &bias, (k, n));
        let got = run(&g, (&packed[..], Factor::Turned), None, (k, n), k);
        let backward = error(&got, &g, |d, c| w[c * n + d], &[], (n, k));
        assert!(forward < BOUND && backward < BOUND, "{m} x {k} x {n}: {forward:.1e}, {backward:.1e}");
    }
}

#[test]
fn panels_of_fewer_bits_are_expanded() {
    let (m, k, n) = (34, 320, 112);
    let mut rng = Rng(9);
    let (w, x, g) = (rng.numbers(k * n), rng.numbers(m * k), rng.numbers(m * n));
    let w = Tensor::from_vec(w, (n, k), &Device::Cpu).expect("a matrix");
    let bytes = quantize(&w, QuantKind::Q8_0).expect("a multiple of the block");
    let q = Quantized::from_blocks(QuantKind::Q8_0, &bytes, (n, k)).expect("its blocks");
    let exact = super::super::product(&x, &q, None, (m, k, n));
    let got = run(&x, (&q, Factor::Straight), None, (k, n), n);
    let back = super::super::product_t(&g, &q, (m, k, n));
    let got_back = run(&g, (&q, Factor::Turned), None, (k, n), k);
    for (got, want) in got.iter().chain(&got_back).zip(exact.iter().chain(&back)) {
        assert!((got - want).abs() < 1e-3, "{got} is not {want}");
    }
}

#[test]
fn numbers_of_any_size_and_what_is_none_come_through() {
    let (m, k, n) = (32, 96, 96);
    let mut x = vec![0f32; m * k];
    let mut w = vec![0f32; k * n];
    // one product each: exact to 2^-16 at any size
    for (i, size) in [1e-30f32, 1e-10, 1.0, 12_345.678, 1e20, 3e38].into_iter().enumerate() {
        (x[i * k + i], w[i * n + i]) = (size, 0.25);
    }
    (x[10 * k + 10], w[10 * n + 10]) = (f32::NAN, 1.0);
    (x[11 * k + 11], w[11 * n + 11]) = (1.0, f32::INFINITY);
    (x[12 * k + 12], w[12 * n + 12]) = (f32::MAX, 0.5);
    let packed = pack(k, n, |row, column| w[row * n + column]);
    let got = run(&x, (&packed[..], Factor::Straight), None, (k, n), n);
    for i in 0..6 {
        let (got, want) = (got[i * n + i], x[i * k + i] * 0.25);
        assert!((got - want).abs() <= want * 2e-5, "{got} is not {want}");
    }
    // what is no number, or infinite, or rounds to it in bf16, is seen to be
    assert!((10..13).all(|i| !got[i * n + i].is_finite()));
}

/// What the unit and the vectors do is what the plain code says.
#[test]
fn the_machine_does_as_the_plain_code() {
    if !unit::available() {
        println!("skipped: this machine has no matrix unit");
        return;
    }
    let mut rng = Rng(3);
    for len in [32, 31, 17, 16, 5, 0] {
        let x = rng.numbers(len);
        let (mut got, mut want) = ([[1u16; STEP]; 2], [[2u16; STEP]; 2]);
        let ([high, low], [high2, low2]) = (&mut got, &mut want);
        unit::split(&x, high, low);
        unit::plain::split(&x, high2, low2);
        assert_eq!(got, want);
    }
    let (x, y) = (rng.numbers(SIDE), rng.numbers(SIDE));
    let (mut got, mut want) = ([[1u16; STEP]; 2], [[2u16; STEP]; 2]);
    let ([high, low], [high2, low2]) = (&mut got, &mut want);
    unit::split_pairs(&x, &y, high, low);
    unit::plain::split_pairs(&x, &y, high2, low2);
    assert_eq!(got, want);
    for (rows, from) in [(16, 0), (16, 32), (9, 16), (1, 0)] {
        let x = rng.numbers(rows * PANEL);
        let (mut got, mut want) =
            ([vec![1u16; TILE / 2], vec![1u16; TILE / 2]], [vec![2; TILE / 2], vec![2; TILE / 2]]);
        let ([high, low], [high2, low2]) = (&mut got, &mut want);
        unit::turn(&x, from, high, low);
        unit::plain::turn(&x, from, high2, low2);
        assert_eq!(got, want, "{rows} rows from {from}");
    }
    let (steps, mut sums) = (3, Aligned::<f32>::new(SPAN * SPAN));
    let (mut left, mut right) = (vec![0u16; steps * PAIR], vec![0u16; steps * PAIR]);
    for tiles in [&mut left, &mut right] {
        let bits = rng.numbers(steps * PAIR).into_iter().map(|x| (x.to_bits() >> 16) as u16);
        tiles.iter_mut().zip(bits).for_each(|(t, b)| *t = b);
    }
    let sums = &mut sums.get_mut()[..SPAN * SPAN];
    let mut want = vec![0f32; SPAN * SPAN];
    let unit = unit::Unit::enter();
    for begin in [true, false] {
        unit.multiply(&left, &right, sums, begin);
        unit::plain::multiply(&left, &right, &mut want, begin);
        for (got, want) in sums.iter().zip(&want) {
            assert!((got - want).abs() < 1e-3, "{got} is not {want}");
        }
    }
}

#[test]
fn only_what_is_permitted_and_pays_is_taken() {
    let (big, depth) = (512, 768);
    let takes = |halves, rows| {
        std::thread::spawn(move || {
            let takes = || takes(rows, depth, depth);
            assert!(!takes() && !in_step(takes), "nothing is permitted by itself");
            permitting(halves, || (takes(), in_step(takes), takes()))
        })
        .join()
        .expect("no panic")
    };
    let there = unit::available();
    assert_eq!(takes(Halves::Never, big), (false, false, false));
    assert_eq!(takes(Halves::Training, big), (false, there, false));
    assert_eq!(takes(Halves::Always, big), (there, there, there));
    assert_eq!(takes(Halves::Always, FEWEST_ROWS - 1), (false, false, false));
    assert_eq!("training".parse(), Ok(Halves::Training));
    assert!("on".parse::<Halves>().is_err_and(|e| e.contains("\"on\"") && e.contains("training")));
}
