//! Every path against plain code, plain code against sums in f64, and a row against itself in other company.

use candle_core::{Tensor, Var};

use super::*;
use crate::ops::{Ending, Weight, head_nll, linear, quantized::quantize, updated_linear, with_activations};

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn tensor(data: Vec<f32>, shape: (usize, usize)) -> Tensor {
    Tensor::from_vec(data, shape, &candle_core::Device::Cpu).unwrap()
}

fn matrix(kind: QuantKind, (n, k): (usize, usize), seed: u64) -> Quantized {
    let blocks = quantize(&tensor(numbers(n * k, seed), (n, k)), kind).unwrap();
    Quantized::from_blocks(kind, &blocks, (n, k)).unwrap()
}

/// Codes and scales as they are given: `[out, in / 32]` of both.
fn matrix_of(scales: impl Fn(usize) -> half::f16, code: impl Fn(usize) -> i8, (n, k): (usize, usize)) -> Quantized {
    let mut blocks = Vec::new();
    for block in 0..n * k / GROUP {
        blocks.extend(scales(block).to_le_bytes());
        blocks.extend((0..GROUP).map(|i| code(block * GROUP + i) as u8));
    }
    Quantized::from_blocks(QuantKind::Q8_0, &blocks, (n, k)).unwrap()
}

/// By every path of this machine, each the same bits.
fn product(w: &Quantized, x: &[f32], bias: Option<&[f32]>, rows: usize) -> Vec<f32> {
    let out = w.product_in_8_bits(x, bias, rows, &tile::portable());
    let mut others = vec![("the best", *BEST)];
    #[cfg(target_arch = "x86_64")]
    others.extend([("vnni", x86::vnni()), ("avx2", x86::avx2())].into_iter().filter_map(|(n, t)| Some((n, t?))));
    for (name, tiles) in others {
        let other = w.product_in_8_bits(x, bias, rows, &tiles);
        // an undefined number is one, whatever its bits
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(out.len() == other.len() && out.iter().zip(&other).all(same), "{name}: {rows} rows, {w:?}");
    }
    out
}

/// What a row is rounded to.
fn rounded(x: &[f32]) -> Vec<f64> {
    let value = |x: &[f32; GROUP]| {
        let group = Group::of(x);
        group.codes.map(|code| f64::from(code) * f64::from(group.scale))
    };
    x.as_chunks().0.iter().flat_map(value).collect()
}

/// Each product's sum and the sum of its terms' sizes, of rows of numbers with the matrix `[k, n]`.
fn sums(x: &[f64], w: &[f32], (k, n): (usize, usize)) -> Vec<(f64, f64)> {
    let rows = x.chunks_exact(k);
    let at = |row: &[f64], j: usize| {
        let terms = row.iter().enumerate().map(|(p, x)| x * f64::from(w[p * n + j]));
        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    };
    rows.flat_map(|row| (0..n).map(move |j| at(row, j))).collect()
}

#[test]
fn products_are_those_of_rounded_rows_and_near_those_of_the_rows() {
    let shapes = [(32, 1), (64, 48), (96, 50), (288, 131), (544, 97)];
    for (at, (k, n)) in shapes.into_iter().enumerate() {
        for kind in [QuantKind::Q8_0, QuantKind::Q5_0] {
            let (w, bias) = (matrix(kind, (n, k), at as u64), numbers(n, 77));
            let values = w.unpack();
            for rows in [0, 1, 2, 3, 4, 5, 8, 31, 70, 300] {
                if rows > 70 && at != 3 {
                    continue;
                }
                let x = numbers(rows * k, 1000 + rows as u64);
                let (bare, biased) = (product(&w, &x, None, rows), product(&w, &x, Some(&bias), rows));
                let in_f32 = packed::product(&x, &w, None, (rows, k, n));
                let (exact, groups) = (sums(&rounded(&x), &values, (k, n)), x.iter().map(|x| f64::from(*x)));
                let near = sums(&groups.collect::<Vec<_>>(), &values, (k, n));
                for i in 0..rows * n {
                    let what = format!("{kind:?} {rows}x{k}x{n} [{i}]");
                    let got = f64::from(bare[i]);
                    assert!((got - exact[i].0).abs() <= 2e-6 * exact[i].1 + 1e-9, "{what}: {got} {:?}", exact[i]);
                    assert_eq!(biased[i], bare[i] + bias[i % n], "{what}");
                    assert!((bare[i] - in_f32[i]).abs() <= 0.01 * near[i].1 as f32, "{what}: {got} {}", in_f32[i]);
                }
                if rows > 0 && k > 32 {
                    assert_ne!(bare, in_f32, "a product that rounds nothing");
                }
            }
        }
    }
}

#[test]
fn a_row_says_the_same_in_any_company() {
    // both ways to share the work, and more than one share of rows
    let (k, n) = (320, 500);
    let w = matrix(QuantKind::Q8_0, (n, k), 3);
    let x = numbers(300 * k, 4);
    let alone: Vec<f32> = x.chunks_exact(k).flat_map(|row| product(&w, row, None, 1)).collect();
    for (from, to) in [(0, 2), (1, 4), (5, 12), (3, 71), (0, 129), (40, 300)] {
        assert_eq!(product(&w, &x[from * k..to * k], None, to - from), alone[from * n..to * n], "rows {from}..{to}");
    }
}

#[test]
fn extremes_are_exact() {
    let one = half::f16::from_f32(1.0);
    // the largest sums there are: 32 times -128 times 127, of both signs
    let w = matrix_of(|_| one, |at| [i8::MIN, i8::MAX, -127][at / 64 % 3], (50, 64));
    let x = [vec![127.0; 64], vec![-127.0; 64]].concat();
    let got = product(&w, &x, None, 2);
    for column in 0..50 {
        let want = [-128.0, 127.0, -127.0][column % 3] * 127.0 * 64.0;
        assert_eq!((got[column], got[50 + column]), (want, -want), "column {column}");
    }
    // scales from the smallest half to the largest, of both signs; a matrix of zeros
    let scales = [1, 0x0400, 0x7bff, 0x8001, 0xfbff, 0].map(half::f16::from_bits);
    let w = matrix_of(|block| scales[block % 6], |at| (at % 255) as i8, (6, 32));
    for size in [1e-25f32, 1.0, 1e25] {
        let x: Vec<f32> = numbers(32, 9).iter().map(|x| x * size).collect();
        let want = sums(&rounded(&x), &w.unpack(), (32, 6));
        for (got, (want, size_of_terms)) in product(&w, &x, None, 1).into_iter().zip(want) {
            assert!((f64::from(got) - want).abs() <= 1e-6 * size_of_terms + 1e-44, "{size}: {got} {want}");
        }
    }
    assert_eq!(product(&w, &[0.0; 32], None, 1), [0.0; 6]);
}

#[test]
fn what_is_not_finite_is_in_its_row_and_in_no_other() {
    let (k, n) = (96, 50);
    let w = matrix(QuantKind::Q8_0, (n, k), 5);
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(7 * k, 6);
        let clean = product(&w, &x, None, 7);
        x[4 * k + 40] = bad;
        let got = product(&w, &x, None, 7);
        assert!(got[4 * n..5 * n].iter().all(|y| y.is_nan()), "{bad}");
        assert_eq!((&got[..4 * n], &got[5 * n..]), (&clean[..4 * n], &clean[5 * n..]), "{bad}");
    }
}

#[test]
fn groups_are_rounded_to_the_nearest() {
    let of = |x: &[f32]| Group::of(&std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0)));
    let group = of(&[127.0, -127.0, 0.5, 1.5, -2.5, 3.49, -0.0]);
    assert_eq!((&group.codes[..7], group.scale, group.start), (&[127, -127, 0, 2, -2, 3, 0][..], 1.0, -128 * 3));
    assert_eq!(of(&[]), Group { codes: [0; GROUP], scale: 0.0, start: 0 });
    // no quotient is infinite
    for size in [f32::MAX, 1e-30, 3e-36] {
        let group = of(&[size, -size / 2.0]);
        assert_eq!((group.codes[0], group.codes[1]), (127, -64), "{size}");
    }
    for tiny in [f32::from_bits(1), 1e-40, 1e-37] {
        assert_eq!(of(&[tiny, -tiny]).scale, 0.0, "{tiny}");
    }
    assert!(numbers(3200, 8).as_chunks::<GROUP>().0.iter().all(|x| {
        let (group, step) = (Group::of(x), x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0);
        x.iter().zip(group.codes).all(|(x, code)| (x - f32::from(code) * group.scale).abs() <= step * 0.5001)
    }));
}

/// Only where it is permitted, only where codes have 8 bits, and never where a gradient is wanted.
#[test]
fn rows_are_rounded_where_it_is_permitted_and_nothing_is_differentiated() {
    let (k, n, rows) = (256, 60, 3);
    let x = tensor(numbers(rows * k, 1), (rows, k));
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (kind, rounds) in [(QuantKind::Q8_0, true), (QuantKind::Q5_0, true), (QuantKind::Q4K, false)] {
        let own = matrix(kind, (n, k), 2);
        let want = rounds.then(|| product(&own, &flat(x.clone()), None, rows));
        let weight = Weight::from(own);
        let updated = |x: &Tensor| updated_linear(x, &weight, None, &[], Ending::default()).unwrap();
        let both = |x: &Tensor| [flat(linear(x, &weight, None).unwrap()), flat(updated(x))];
        let in_f32 = both(&x);
        let in_8_bits = with_activations(Activations::AsWeights, || both(&x));
        let want = want.unwrap_or_else(|| in_f32[0].clone());
        assert_eq!(in_8_bits, [want.clone(), want], "{kind:?}");
        assert_eq!(in_8_bits != in_f32, rounds, "{kind:?}");
        let var = Var::from_tensor(&x).unwrap();
        assert_eq!(with_activations(Activations::AsWeights, || both(var.as_tensor())), in_f32, "{kind:?}");
        // as it was before
        assert_eq!(both(&x), in_f32);
        let nll = |h: &Tensor| flat(head_nll(h, &weight, &[1, 2, 3], None, 0.0).unwrap());
        let plain = nll(&x);
        let (served, trained) = with_activations(Activations::AsWeights, || (nll(&x), nll(var.as_tensor())));
        assert_eq!(served != plain, rounds, "{kind:?}");
        assert_eq!(trained, plain, "{kind:?}");
    }
}

#[test]
fn a_joined_weight_s_parts_take_their_own_ways() {
    let (k, rows) = (256, 5);
    let x = numbers(rows * k, 1);
    let (eight, four) = (matrix(QuantKind::Q8_0, (50, k), 2), matrix(QuantKind::Q4K, (40, k), 3));
    let want = [product(&eight, &x, None, rows), packed::product(&x, &four, None, (rows, k, 40))];
    let joined = Weight::joined(vec![eight.into(), four.into()]).unwrap();
    let x = tensor(x, (rows, k));
    let got = with_activations(Activations::AsWeights, || linear(&x, &joined, None)).unwrap().to_vec2::<f32>().unwrap();
    for (row, got) in got.iter().enumerate() {
        assert_eq!((&got[..50], &got[50..]), (&want[0][row * 50..][..50], &want[1][row * 40..][..40]));
    }
}
