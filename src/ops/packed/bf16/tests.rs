//! Products with bf16 panels: with f32 activations those of the rounded matrix in f32, bit for bit; with rounded ones, sums
//! in f64 of rounded factors.

use super::{
    super::{Halves, halves, pack, permitting, product, product_t, tests::numbers as random, with_activations},
    *,
};
use proptest::prelude::*;
use pulp::Simd;

fn rounded(numbers: &[f32]) -> Vec<f32> {
    numbers.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

/// The product with rounded activations.
fn rounding(x: &[f32], w: &Bf16, bias: Option<&[f32]>, shape: (usize, usize, usize)) -> Vec<f32> {
    with_activations(Activations::AsWeights, || product(x, w, bias, shape))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// For shapes on and off every border: rows, depth (odd, too), columns.
    #[test]
    fn a_product_is_that_of_the_rounded_matrix(m in 0usize..140, k in 1usize..200, n in 1usize..210, deep: bool, seed: u64) {
        let k = if deep { 10 * DEPTH + k } else { k };
        let (x, w, g, b) = (random(m * k, seed), random(k * n, seed ^ 5), random(m * n, seed ^ 9), random(n, seed ^ 3));
        let at = |r: usize, c: usize| w[r * n + c];
        let (packed, numbers) = (Bf16::pack((k, n), at), rounded(&w));
        let plain = pack(k, n, |r, c| numbers[r * n + c]);
        prop_assert_eq!(packed.unpack(), numbers.clone());
        prop_assert_eq!(packed.bytes(), 4 * k.div_ceil(2) * n.next_multiple_of(PANEL));
        let shape = (m, k, n);
        prop_assert_eq!(product(&x, &packed, Some(&b), shape), product(&x, &plain[..], Some(&b), shape));
        prop_assert_eq!(product(&x, &packed, None, shape), product(&x, &plain[..], None, shape));
        prop_assert_eq!(product_t(&g, &packed, shape), product_t(&g, &plain[..], shape));
        let ids: Vec<u32> = (0..m as u32).map(|i| (i * 31 + 7) % n as u32).collect();
        for (id, row) in ids.iter().zip(packed.columns(&ids).chunks(k)) {
            prop_assert!(row.iter().enumerate().all(|(p, v)| *v == numbers[p * n + *id as usize]));
        }
    }

    #[test]
    fn rounded_activations_give_sums_of_rounded_factors(m in 1usize..140, k in 1usize..300, n in 1usize..130, seed: u64) {
        let (x, w, b) = (random(m * k, seed), random(k * n, seed ^ 5), random(n, seed ^ 3));
        let packed = Bf16::pack((k, n), |r, c| w[r * n + c]);
        let all = rounding(&x, &packed, Some(&b), (m, k, n));
        let (near, w) = (if dot::available() { rounded(&x) } else { x.clone() }, rounded(&w));
        for i in 0..m {
            for j in 0..n {
                let products = (0..k).map(|p| f64::from(near[i * k + p]) * f64::from(w[p * n + j]));
                let (sum, size) = products.fold((f64::from(b[j]), 1.0), |(sum, size), p| (sum + p, size + p.abs()));
                prop_assert!((f64::from(all[i * n + j]) - sum).abs() < 1e-6 * size);
            }
            // a row says alone what it says in company
            let alone = rounding(&x[i * k..(i + 1) * k], &packed, Some(&b), (1, k, n));
            prop_assert_eq!(&alone[..], &all[i * n..(i + 1) * n]);
        }
    }
}

/// Machines with wider vectors never take the ways of 8 lanes otherwise.
#[cfg(target_arch = "x86_64")]
#[test]
#[allow(unsafe_code, reason = "an output is read after it was written")]
fn in_8_lanes_a_product_has_the_same_bits() {
    let Some(simd) = pulp::x86::V3::try_new() else { return };
    for (k, n) in [(3 * DEPTH, 2 * PANEL), (77, 101), (2 * DEPTH + 31, 5)] {
        let (w, b) = (random(k * n, 5), random(n, 3));
        let (packed, numbers) = (Bf16::pack((k, n), |r, c| w[r * n + c]), rounded(&w));
        let plain = pack(k, n, |r, c| numbers[r * n + c]);
        // few rows, every rest of a tile of 4, and rows for which a block is expanded
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 40] {
            let x = random(m * k, m as u64);
            let mut all = vec![MaybeUninit::new(f32::NAN); m * n];
            let out = Output { n, panels: 0..n.div_ceil(PANEL), rows: all.chunks_mut(n).collect() };
            Simd::vectorize(simd, Exact { x: &blocked(&x, k), w: &packed, bias: Some(&b), out });
            // SAFETY: all of them were made with a number
            let got: Vec<f32> = all.iter().map(|number| unsafe { number.assume_init() }).collect();
            assert_eq!(got, product(&x, &packed, Some(&b), (m, k, n)), "{m} {k} {n}");
            assert_eq!(got, product(&x, &plain[..], Some(&b), (m, k, n)), "{m} {k} {n}");
        }
    }
}

/// The matrix unit would have nearly all of f32 from some number of rows on.
#[test]
fn rounded_rows_are_the_same_in_any_company_where_halves_are_permitted() {
    let (m, k, n) = (130, 256, 600);
    let (x, w) = (random(m * k, 1), random(k * n, 2));
    let packed = Bf16::pack((k, n), |r, c| w[r * n + c]);
    let plain = pack(k, n, |r, c| w[r * n + c]);
    permitting(Halves::Always, || {
        let all = rounding(&x, &packed, None, (m, k, n));
        // where nothing is rounded, many rows are in halves and few are not
        let apart = !dot::available() && halves::unit::available();
        for rows in [0..1, 5..40, 3..67, 0..100] {
            let own = rounding(&x[rows.start * k..rows.end * k], &packed, None, (rows.len(), k, n));
            assert!(apart || own == all[rows.start * n..rows.end * n], "{rows:?}");
        }
    });
    with_activations(Activations::AsWeights, || {
        assert_eq!(packed.rounds(), dot::available());
        assert!(!plain[..].rounds(), "f32 has nothing to round to");
    });
    assert!(!packed.rounds(), "only where it is permitted");
}

/// Enough columns and rows for every way of sharing out.
#[test]
fn rows_are_the_same_in_any_company_and_gradients_are_never_of_rounded_numbers() {
    let (k, n) = (200, 1_000);
    let (x, w, g) = (random(130 * k, 1), random(k * n, 2), random(130 * n, 3));
    let packed = Bf16::pack((k, n), |r, c| w[r * n + c]);
    for activations in [Activations::F32, Activations::AsWeights] {
        with_activations(activations, || {
            let all = product(&x, &packed, None, (130, k, n));
            for rows in [0..1, 3..5, 7..16, 20..44, 64..128, 127..130] {
                let own = product(&x[rows.start * k..rows.end * k], &packed, None, (rows.len(), k, n));
                assert!(own == all[rows.start * n..rows.end * n], "{rows:?}");
            }
        });
    }
    let shape = (130, k, n);
    assert_eq!(
        with_activations(Activations::AsWeights, || product_t(&g, &packed, shape)),
        product_t(&g, &packed, shape)
    );
    let (near, exact) = (rounding(&x, &packed, None, shape), product(&x, &packed, None, shape));
    assert_eq!(near != exact, dot::available(), "only where the machine has the instruction");
    assert_eq!(activations(), Activations::F32, "it is over");
}

#[test]
fn the_machine_rounds_as_plain_code_does() {
    let mut x = random(2 * DEPTH + 31, 9);
    x[..6].copy_from_slice(&[f32::INFINITY, -0.0, 3.4e38, -1.003_906_3, 1.003_906_3, 1.011_718_8]);
    for k in [x.len(), 77, 1] {
        let x = &x[..x.len() / k * k];
        let got = super::dot::rounded(x, k);
        let m = x.len() / k;
        for (row, own) in x.chunks_exact(k).enumerate() {
            for p in 0..k.next_multiple_of(DEPTH) {
                let want = own.get(p).map_or(0.0, |x| bf16::from_f32(*x).to_f32());
                let pair = got[(p / DEPTH * m + row) * PAIRS + p % DEPTH / 2];
                assert_eq!(numbers(pair)[p % 2].to_bits(), want.to_bits(), "{p} of row {row} of {k}");
            }
        }
    }
}
