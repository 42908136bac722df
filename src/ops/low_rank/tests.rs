//! The kernels against plain sums: near those in f64, and the same bits as sums in the order that is promised, for vectors of
//! every width and rows in any company.

use pulp::Scalar;

use super::*;

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

/// Whether a product and a sum are rounded once here, and so alike by vectors and by plain code.
fn fuses() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    cfg!(target_arch = "aarch64")
}

/// `scale * a . b` in the order that is promised.
fn product(a: &[f32], b: &[f32], scale: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane = a.mul_add(*b, *lane);
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    scale * lanes[0]
}

/// A factor's rows added to a row in the order that is promised.
fn added(low: &[f32], b: &[f32], out: &mut [f32]) {
    for (l, b) in low.iter().zip(b.chunks_exact(out.len())) {
        out.iter_mut().zip(b).for_each(|(o, b)| *o = b.mul_add(*l, *o));
    }
}

const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (16, 4, 16),
    (24, 3, 40),
    (33, 8, 65),
    (96, 13, 130),
    (7, 16, 15),
    (64, 70, 48),
    (200, 9, 31),
    (5, 2, 3),
];

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Rows of both kernels with the vectors that `run` has, from rows and columns that begin somewhere.
struct Case {
    k: usize,
    rank: usize,
    n: usize,
    x: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    out: Vec<f32>,
}

/// Rows of the case.
const ROWS: usize = 75;
/// Columns ahead of those that are meant, in all matrices of rows.
const AHEAD: usize = 3;

impl Case {
    fn new((k, rank, n): (usize, usize, usize)) -> Self {
        let (x, out) = (numbers(ROWS * (k + AHEAD), 1), numbers(ROWS * (n + 2 * AHEAD), 2));
        Self { k, rank, n, x, a: numbers(rank * k, 3), b: numbers(rank * n, 4), out }
    }

    fn x(&self) -> Rows<'_> {
        Rows::of(&self.x, self.k + AHEAD).within(AHEAD..self.k + AHEAD)
    }

    /// The small sides and the output of some rows, by the best vectors of the machine.
    fn run(&self, rows: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let (ranks, width, stride) = (1..1 + self.rank, self.rank + 2, self.n + 2 * AHEAD);
        let mut low = vec![0f32; rows.len() * width];
        let mut out = self.out[rows.start * stride..rows.end * stride].to_vec();
        shrink((self.x(), rows.start), (&self.a, &self.b), 0.7, (&mut low, width, ranks.clone()));
        expand((&low, width, ranks), (&self.b, &[]), (&mut out, stride, AHEAD..AHEAD + self.n));
        (low, out)
    }

    /// All rows, by the vectors of `simd`.
    fn run_by<S: Simd>(&self, simd: S) -> (Vec<f32>, Vec<f32>) {
        let (ranks, width, stride) = (1..1 + self.rank, self.rank + 2, self.n + 2 * AHEAD);
        let (mut low, mut out) = (vec![0f32; ROWS * width], self.out.clone());
        let (x, a, ahead) = (self.x(), &self.a[..], &[][..]);
        simd.vectorize(Shrink {
            x,
            first: 0,
            a,
            ahead,
            scale: 0.7,
            out: &mut low,
            stride: width,
            ranks: ranks.clone(),
        });
        let (b, columns) = (&self.b[..], AHEAD..AHEAD + self.n);
        simd.vectorize(Expand { low: &low, width, ranks, b, ahead, out: &mut out, stride, columns });
        (low, out)
    }

    /// By plain sums.
    fn plain(&self) -> (Vec<f32>, Vec<f32>) {
        let (width, stride) = (self.rank + 2, self.n + 2 * AHEAD);
        let (mut low, mut out) = (vec![0f32; ROWS * width], self.out.clone());
        for (row, (low, out)) in low.chunks_exact_mut(width).zip(out.chunks_exact_mut(stride)).enumerate() {
            for (low, a) in low[1..].iter_mut().zip(self.a.chunks_exact(self.k)) {
                *low = product(self.x().row(row), a, 0.7);
            }
            added(&low[1..1 + self.rank], &self.b, &mut out[AHEAD..AHEAD + self.n]);
        }
        (low, out)
    }
}

#[test]
fn sums_are_near_those_in_f64_and_nothing_else_is_touched() {
    for shape @ (k, rank, n) in SHAPES {
        let case = Case::new(shape);
        let (width, stride) = (rank + 2, n + 2 * AHEAD);
        for (low, out) in [case.run(0..ROWS), case.run_by(Scalar::new())] {
            for row in 0..ROWS {
                let (x, low) = (case.x().row(row), &low[row * width..(row + 1) * width]);
                assert_eq!((low[0], low[rank + 1]), (0.0, 0.0), "other ranks");
                for (j, low) in low[1..=rank].iter().enumerate() {
                    let terms = x.iter().zip(&case.a[j * k..]).map(|(x, a)| f64::from(*x) * f64::from(*a));
                    let want = 0.7 * terms.sum::<f64>();
                    assert!((f64::from(*low) - want).abs() < 2e-5, "{shape:?} row {row} rank {j}: {low} {want}");
                }
                let (out, before) = (&out[row * stride..][..stride], &case.out[row * stride..][..stride]);
                for (c, (out, before)) in out.iter().zip(before).enumerate() {
                    let Some(c) = c.checked_sub(AHEAD).filter(|c| *c < n) else {
                        assert_eq!(out, before, "other columns");
                        continue;
                    };
                    let terms =
                        low[1..=rank].iter().enumerate().map(|(j, l)| f64::from(*l) * f64::from(case.b[j * n + c]));
                    let want = f64::from(*before) + terms.sum::<f64>();
                    assert!((f64::from(*out) - want).abs() < 1e-4, "{shape:?} row {row} column {c}: {out} {want}");
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_in_any_company() {
    for shape @ (_, rank, n) in SHAPES {
        let case = Case::new(shape);
        let (low, out) = case.run(0..ROWS);
        let (width, stride) = (rank + 2, n + 2 * AHEAD);
        let some = (0..ROWS).map(|row| row..row + 1).chain([0..2, 1..4, 2..6, 5..12, 3..36, 0..74, 33..75]);
        for rows in some {
            let (own_low, own_out) = case.run(rows.clone());
            assert!(same(&own_low, &low[rows.start * width..rows.end * width]), "{shape:?} {rows:?}");
            assert!(same(&own_out, &out[rows.start * stride..rows.end * stride]), "{shape:?} {rows:?}");
        }
    }
}

#[test]
fn sums_have_the_order_that_is_promised_by_vectors_of_any_width() {
    if !fuses() {
        return;
    }
    for shape in SHAPES {
        let case = Case::new(shape);
        let want = case.plain();
        let best = [("best", case.run(0..ROWS))].into_iter();
        #[cfg(target_arch = "x86_64")]
        let all = best
            .chain(pulp::x86::V3::try_new().map(|simd| ("256 bits", case.run_by(simd))))
            .chain(pulp::x86::V4::try_new().map(|simd| ("512 bits", case.run_by(simd))));
        #[cfg(not(target_arch = "x86_64"))]
        let all = best;
        for (name, got) in all {
            assert!(same(&got.0, &want.0) && same(&got.1, &want.1), "{shape:?} by {name}");
        }
    }
}
