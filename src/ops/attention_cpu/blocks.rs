//! Attention of a run of queries at once: the products of a head as small matrix products whose sums stay in registers.
//!
//! Row by row, every score is a sum across a vector and every gradient of a key is read and written once per query; in
//! blocks of [`QUERIES`] rows, neither is.

use pulp::{Arch, Simd, WithSimd};

use super::{HeadGrads, Heads, Qkv, Shaping, normalise};
use crate::ops::{
    LINE,
    attention::{AttnPlan, AttnSpan, Seen},
};

/// Queries of a block: their probabilities of some hundred keys stay in the second level.
const QUERIES: usize = 32;
/// From this many queries on a span is worth its keys' copies.
const WORTH_A_BLOCK: usize = 8;

/// Whether a span is computed in blocks.
pub(super) fn takes(span: &AttnSpan) -> bool {
    span.q_len >= WORTH_A_BLOCK && span.pinned == 0
}

/// What the queries of a key head give: `[q_len, group * head_dim]`.
pub(super) fn forward(plan: &AttnPlan, span: &AttnSpan, kv_head: usize, qkv: Qkv<'_>) -> Vec<f32> {
    Arch::new().dispatch(Forward(Head { plan, span, kv_head, qkv }))
}

/// Gradients of a span and key head, as [`super::head_backward`] has them.
pub(super) fn backward(plan: &AttnPlan, span: &AttnSpan, kv_head: usize, qkv: Qkv<'_>, grad: Heads<'_>) -> HeadGrads {
    Arch::new().dispatch(Backward(Head { plan, span, kv_head, qkv }, grad))
}

#[derive(Clone, Copy)]
struct Head<'a> {
    plan: &'a AttnPlan,
    span: &'a AttnSpan,
    kv_head: usize,
    qkv: Qkv<'a>,
}

struct Forward<'a>(Head<'a>);

struct Backward<'a>(Head<'a>, Heads<'a>);

/// A matrix by its strides.
#[derive(Clone, Copy)]
struct Strided<'a> {
    data: &'a [f32],
    row: usize,
    column: usize,
}

/// `c [m, w] = a [m, k] b [k, w]`, or grows by it; `w` is a multiple of [`LINE`].
#[inline(always)]
fn product<S: Simd>(simd: S, (m, w, k): (usize, usize, usize), a: Strided<'_>, b: &[f32], c: &mut [f32], grows: bool) {
    let mut column = 0;
    while column < w {
        let left = (w - column) / S::F32_LANES;
        let at = (column, w, k, grows);
        column += S::F32_LANES
            * match left {
                4.. => strip::<S, 4>(simd, m, at, a, b, c),
                2.. => strip::<S, 2>(simd, m, at, a, b, c),
                _ => strip::<S, 1>(simd, m, at, a, b, c),
            };
    }
}

/// All rows of `V` vectors of columns; gives `V`.
#[inline(always)]
fn strip<S: Simd, const V: usize>(
    simd: S,
    m: usize,
    at: (usize, usize, usize, bool),
    a: Strided<'_>,
    b: &[f32],
    c: &mut [f32],
) -> usize {
    let mut row = 0;
    while row + 4 <= m {
        tile::<S, 4, V>(simd, row, at, a, b, c);
        row += 4;
    }
    while row < m {
        tile::<S, 1, V>(simd, row, at, a, b, c);
        row += 1;
    }
    V
}

#[inline(always)]
fn tile<S: Simd, const R: usize, const V: usize>(
    simd: S,
    row: usize,
    (column, w, k, grows): (usize, usize, usize, bool),
    a: Strided<'_>,
    b: &[f32],
    c: &mut [f32],
) {
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    let rows: [&[f32]; R] = std::array::from_fn(|r| &a.data[(row + r) * a.row..]);
    for (i, b) in b.chunks_exact(w).enumerate().take(k) {
        let (b, _) = S::as_simd_f32s(&b[column..column + V * S::F32_LANES]);
        let b: [S::f32s; V] = std::array::from_fn(|v| b[v]);
        for r in 0..R {
            let x = simd.splat_f32s(rows[r][i * a.column]);
            for v in 0..V {
                acc[r][v] = simd.mul_add_e_f32s(b[v], x, acc[r][v]);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        let from = (row + r) * w + column;
        let (c, _) = S::as_mut_simd_f32s(&mut c[from..from + V * S::F32_LANES]);
        for (c, sum) in c.iter_mut().zip(acc) {
            *c = if grows { simd.add_f32s(*c, *sum) } else { *sum };
        }
    }
}

/// Rows `[rows, d]` with zeros behind them up to `width`.
fn padded<'a>(rows: usize, width: usize, row: impl Fn(usize) -> &'a [f32]) -> Vec<f32> {
    let mut out = vec![0f32; rows * width];
    for (i, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
        let row = row(i);
        out[..row.len()].copy_from_slice(row);
    }
    out
}

/// Rows `[rows, width]` as `[width, to]`.
fn turned(rows: &[f32], width: usize, to: usize) -> Vec<f32> {
    let mut out = vec![0f32; width * to];
    for (i, row) in rows.chunks_exact(width.max(1)).enumerate() {
        for (c, v) in row.iter().enumerate() {
            out[c * to + i] = *v;
        }
    }
    out
}

impl<'a> Head<'a> {
    fn dim(&self) -> usize {
        self.plan.head_dim
    }

    fn group(&self) -> usize {
        self.plan.heads / self.plan.kv_heads
    }

    /// Width of a head's rows, padded.
    fn width(&self) -> usize {
        self.dim().next_multiple_of(LINE)
    }

    fn keys(&self) -> Vec<f32> {
        let (_, k, _) = self.qkv;
        let column = self.kv_head * self.dim();
        padded(self.span.keys_len, self.width(), |j| k.at(self.span.key_row(j), column, self.dim()))
    }

    fn values(&self) -> Vec<f32> {
        let (_, _, v) = self.qkv;
        let column = self.kv_head * self.dim();
        padded(self.span.keys_len, self.width(), |j| v.at(self.span.key_row(j), column, self.dim()))
    }

    /// Rows of the step's queries, or of what is laid out like them, for query head `g` of the group.
    fn rows(&self, of: Heads<'a>, (first, count): (usize, usize), g: usize) -> Vec<f32> {
        let column = (self.kv_head * self.group() + g) * self.dim();
        padded(count, self.width(), |i| of.at(self.span.q_start + first + i, column, self.dim()))
    }

    fn seen(&self, i: usize) -> Seen {
        self.plan.mask.seen(self.span.context_len + i, self.span.keys_len, 0)
    }

    /// Blocks of queries.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let len = self.span.q_len;
        (0..len).step_by(QUERIES).map(move |first| (first, QUERIES.min(len - first)))
    }

    /// Probabilities of a block's queries, `[count, stride]`, zeros where nothing is seen; `slope` as
    /// [`Shaping::apply`] leaves it.
    #[inline(always)]
    fn probabilities<S: Simd>(
        &self,
        simd: S,
        (first, count): (usize, usize),
        g: usize,
        (q, turned_keys): (&[f32], &[f32]),
        (probs, slope): (&mut [f32], &mut [f32]),
    ) {
        let (plan, span) = (self.plan, self.span);
        let stride = span.keys_len.next_multiple_of(LINE);
        let a = Strided { data: q, row: self.width(), column: 1 };
        product(simd, (count, stride, self.dim()), a, turned_keys, probs, false);
        for i in 0..count {
            let row = &mut probs[i * stride..(i + 1) * stride];
            let seen = self.seen(first + i);
            let range = seen.range();
            row[..range.start].fill(0.0);
            row[range.end..].fill(0.0);
            let own = &mut row[range.clone()];
            own.iter_mut().for_each(|s| *s *= plan.scale);
            let shaping = Shaping::of(plan, self.kv_head * self.group() + g, span.position + first + i);
            let slope = if slope.is_empty() { &mut [][..] } else { &mut slope[i * stride..][range] };
            normalise(own, shaping, seen, slope);
        }
    }
}

impl WithSimd for Forward<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let head = self.0;
        let (d, width, group, n) = (head.dim(), head.width(), head.group(), head.span.keys_len);
        let stride = n.next_multiple_of(LINE);
        let values = head.values();
        let turned_keys = turned(&head.keys(), width, stride);
        let mut out = vec![0f32; head.span.q_len * group * d];
        let (mut probs, mut sums) = (vec![0f32; QUERIES * stride], vec![0f32; QUERIES * width]);
        for (first, count) in head.blocks() {
            for g in 0..group {
                let q = head.rows(head.qkv.0, (first, count), g);
                head.probabilities(simd, (first, count), g, (&q, &turned_keys), (&mut probs, &mut []));
                let a = Strided { data: &probs, row: stride, column: 1 };
                product(simd, (count, width, n), a, &values, &mut sums, false);
                for (i, sums) in sums.chunks_exact(width).enumerate().take(count) {
                    let at = ((first + i) * group + g) * d;
                    out[at..at + d].copy_from_slice(&sums[..d]);
                }
            }
        }
        out
    }
}

impl WithSimd for Backward<'_> {
    type Output = HeadGrads;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> HeadGrads {
        let Self(head, grad) = self;
        let (plan, span) = (head.plan, head.span);
        let (d, width, group, n) = (head.dim(), head.width(), head.group(), span.keys_len);
        let stride = n.next_multiple_of(LINE);
        let (keys, values) = (head.keys(), head.values());
        let (turned_keys, turned_values) = (turned(&keys, width, stride), turned(&values, width, stride));
        let trained = plan.trained_bias();
        let biases = trained.map_or(0, |b| 2 * b.reach + 1);
        let mut out = HeadGrads {
            dq: vec![0f32; span.q_len * group * d],
            dk: vec![0f32; n * d],
            dv: vec![0f32; n * d],
            dbias: vec![0f32; group * biases],
        };
        let zeros = |rows: usize, width: usize| vec![0f32; rows * width];
        let (mut probs, mut dprobs) = (zeros(QUERIES, stride), zeros(QUERIES, stride));
        let mut slope = vec![1f32; QUERIES * stride]; // of the cap; 1 without one
        let (mut dq, mut dk, mut dv) = (zeros(QUERIES, width), zeros(n, width), zeros(n, width));
        for (first, count) in head.blocks() {
            for g in 0..group {
                let (q, grad) = (head.rows(head.qkv.0, (first, count), g), head.rows(grad, (first, count), g));
                head.probabilities(simd, (first, count), g, (&q, &turned_keys), (&mut probs, &mut slope));
                let a = Strided { data: &grad, row: width, column: 1 };
                product(simd, (count, stride, d), a, &turned_values, &mut dprobs, false);
                for i in 0..count {
                    let row = i * stride..(i + 1) * stride;
                    let (probs, dprobs, slope) = (&probs[row.clone()], &mut dprobs[row.clone()], &slope[row]);
                    let mut delta = 0.0;
                    for (p, dp) in probs.iter().zip(dprobs.iter()) {
                        delta += p * dp;
                    }
                    for (p, dp) in probs.iter().zip(dprobs.iter_mut()) {
                        *dp = p * (*dp - delta);
                    }
                    if let Some(bias) = trained {
                        for j in head.seen(first + i).range() {
                            out.dbias[g * biases + bias.place(span.position + first + i, j)] += dprobs[j];
                        }
                    }
                    for (dp, slope) in dprobs.iter_mut().zip(slope) {
                        *dp *= slope * plan.scale;
                    }
                }
                let across = |data| Strided { data, row: stride, column: 1 };
                let down = |data| Strided { data, row: 1, column: stride };
                product(simd, (count, width, n), across(&dprobs), &keys, &mut dq, false);
                product(simd, (n, width, count), down(&dprobs), &q, &mut dk, true);
                product(simd, (n, width, count), down(&probs), &grad, &mut dv, true);
                for (i, dq) in dq.chunks_exact(width).enumerate().take(count) {
                    let at = ((first + i) * group + g) * d;
                    out.dq[at..at + d].copy_from_slice(&dq[..d]);
                }
            }
        }
        for (to, from) in [(&mut out.dk, &dk), (&mut out.dv, &dv)] {
            let rows = to.chunks_exact_mut(d).zip(from.chunks_exact(width));
            rows.for_each(|(to, from)| to.copy_from_slice(&from[..d]));
        }
        out
    }
}
