//! Products against plain sums in f64.

use super::*;
use proptest::prelude::*;

pub(super) fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Both against sums in f64, for shapes on and off every border: rows, depth, columns.
    #[test]
    fn products_equal_plain_sums(m in 0usize..140, k in 1usize..200, n in 1usize..210, deep: bool, seed: u64) {
        let k = if deep { 10 * DEPTH + k } else { k };
        let m = if deep { m % 4 * 20 + 1 } else { m };
        let (x, w, g, b) = (numbers(m * k, seed), numbers(k * n, seed ^ 5), numbers(m * n, seed ^ 9), numbers(n, seed ^ 3));
        let packed = pack(k, n, |r, c| w[r * n + c]);
        prop_assert_eq!(&unpack(&packed, k, n), &w);
        let y = product(&x, &packed[..], Some(&b), (m, k, n));
        let bare = product(&x, &packed[..], None, (m, k, n));
        let d = product_t(&g, &packed[..], (m, k, n));
        let ids: Vec<u32> = (0..m as u32).map(|i| (i * 31 + 7) % n as u32).collect();
        for (id, row) in ids.iter().zip(columns(&packed, k, &ids).chunks(k)) {
            prop_assert!(row.iter().enumerate().all(|(p, v)| *v == w[p * n + *id as usize]));
        }
        let tolerance = 1e-5 * (k.max(n) as f64).sqrt();
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|p| f64::from(x[i * k + p]) * f64::from(w[p * n + j])).sum();
                prop_assert!((f64::from(bare[i * n + j]) - sum).abs() < tolerance);
                prop_assert!((f64::from(y[i * n + j]) - sum - f64::from(b[j])).abs() < tolerance);
            }
            for p in (0..k).step_by(if deep { 97 } else { 1 }) {
                let sum: f64 = (0..n).map(|j| f64::from(g[i * n + j]) * f64::from(w[p * n + j])).sum();
                prop_assert!((f64::from(d[i * k + p]) - sum).abs() < tolerance);
            }
        }
    }
}

/// More rows than are summed at a time, more columns than are turned at a time.
#[test]
fn gradients_of_many_rows_and_columns_equal_plain_sums() {
    for (m, k, n) in [(500, 100, 60), (17, 100, 3_500), (300, 9, 3_100)] {
        let (w, g) = (numbers(k * n, 3), numbers(m * n, 4));
        let packed = pack(k, n, |r, c| w[r * n + c]);
        let d = product_t(&g, &packed[..], (m, k, n));
        for i in (0..m).step_by(7) {
            for p in 0..k {
                let sum: f64 = (0..n).map(|j| f64::from(g[i * n + j]) * f64::from(w[p * n + j])).sum();
                let apart = (f64::from(d[i * k + p]) - sum).abs();
                assert!(apart < 1e-5 * (n as f64).sqrt(), "{m} x {k} x {n}: {apart} at {i}, {p}");
            }
        }
    }
}
