//! Attention of a run of queries at once: the products of a head as small matrix products whose sums stay in registers.
//!
//! Row by row, every score is a sum across a vector and every gradient of a key is read and written once per query; in
//! blocks of [`QUERIES`] rows, neither is. A query's sums have the order that they have row by row, so that its output is the same
//! bits wherever a sequence is cut.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::{HeadGrads, Heads, Qkv, Shaping, normalise};
use crate::ops::{
    LINE,
    attention::{AttnPlan, AttnSpan, Seen},
    math::LANES,
};

/// Queries of a block: their probabilities of some hundred keys stay in the second level.
const QUERIES: usize = 32;
/// From this many queries on a span is worth its keys' copies.
const WORTH_A_BLOCK: usize = 8;

/// Whether a span is computed in blocks.
pub(super) fn takes(span: &AttnSpan) -> bool {
    span.q_len >= WORTH_A_BLOCK && span.pinned == 0
}

/// What these of a span's queries give with a key head: `[queries, group * head_dim]`.
pub(super) fn forward(
    plan: &AttnPlan,
    span: &AttnSpan,
    kv_head: usize,
    qkv: Qkv<'_>,
    queries: Range<usize>,
) -> Vec<f32> {
    Arch::new().dispatch(Forward(Head::new(plan, span, kv_head, qkv, queries)))
}

/// So many queries of a span to a part, so that `parts` parts have about as much to do.
pub(super) fn share(span: &AttnSpan, parts: usize) -> usize {
    span.q_len.div_ceil(parts.max(1)).next_multiple_of(QUERIES)
}

/// Gradients of a span and key head, as [`super::head_backward`] has them, from that of the span's rows of the output.
pub(super) fn backward(plan: &AttnPlan, span: &AttnSpan, kv_head: usize, qkv: Qkv<'_>, grad: Heads<'_>) -> HeadGrads {
    Arch::new().dispatch(Backward(Head::new(plan, span, kv_head, qkv, 0..span.q_len), grad))
}

struct Head<'a> {
    plan: &'a AttnPlan,
    span: &'a AttnSpan,
    kv_head: usize,
    qkv: Qkv<'a>,
    /// Those of the span that are computed.
    queries: Range<usize>,
    /// Keys that any of them sees; the first is a multiple of [`LINE`].
    keys: Range<usize>,
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

/// Which part of a product is computed: columns of `b` `[k, width]` and `c` `[m, width]`, multiples of [`LINE`].
#[derive(Clone)]
struct Columns {
    range: Range<usize>,
    width: usize,
}

impl Columns {
    fn all(width: usize) -> Self {
        Self { range: 0..width, width }
    }
}

/// `c [m, width] = a [m, k] b [k, width]`, or grows by it, in these columns.
#[inline(always)]
fn product<S: Simd>(
    simd: S,
    (m, columns, k): (usize, Columns, usize),
    a: Strided<'_>,
    b: &[f32],
    c: &mut [f32],
    grows: bool,
) {
    let Columns { range, width } = columns;
    let mut column = range.start;
    while column < range.end {
        let left = (range.end - column) / S::F32_LANES;
        let at = (column, width, k, grows);
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
    (column, width, k, grows): (usize, usize, usize, bool),
    a: Strided<'_>,
    b: &[f32],
    c: &mut [f32],
) {
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    let rows: [&[f32]; R] = std::array::from_fn(|r| &a.data[(row + r) * a.row..]);
    for (i, b) in b.chunks_exact(width).enumerate().take(k) {
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
        let from = (row + r) * width + column;
        let (c, _) = S::as_mut_simd_f32s(&mut c[from..from + V * S::F32_LANES]);
        for (c, sum) in c.iter_mut().zip(acc) {
            *c = if grows { simd.add_f32s(*c, *sum) } else { *sum };
        }
    }
}

/// Products of rows of `a` `[m, row]`, `d` wide, with keys `[tiles, row, LINE]` as [`in_tiles`] lays them: `c` `[m, width]` in
/// these columns, each sum in the order of [`dot`](crate::ops::math::dot). Behind `d`, rows and keys have zeros up to a multiple
/// of [`LANES`].
#[inline(always)]
fn scores<S: Simd>(
    simd: S,
    (m, columns, d): (usize, Columns, usize),
    (a, row): (&[f32], usize),
    keys: &[f32],
    c: &mut [f32],
) {
    for column in columns.range.step_by(S::F32_LANES) {
        let tile = &keys[column / LINE * LINE * row..][..d.next_multiple_of(LANES) * LINE];
        let (tile, at) = ((tile, column % LINE), (column, columns.width));
        let mut first = 0;
        while first + 4 <= m {
            scores_of::<S, 4>(simd, first, (a, row), tile, (&mut *c, at));
            first += 4;
        }
        while first < m {
            scores_of::<S, 1>(simd, first, (a, row), tile, (&mut *c, at));
            first += 1;
        }
    }
}

/// `R` rows and a vector of keys.
#[inline(always)]
fn scores_of<S: Simd, const R: usize>(
    simd: S,
    first: usize,
    (a, row): (&[f32], usize),
    tile: (&[f32], usize),
    (c, (column, width)): (&mut [f32], (usize, usize)),
) {
    let rows: [&[f32]; R] = std::array::from_fn(|r| &a[(first + r) * row..][..tile.0.len() / LINE]);
    let even = sum::<S, R>(simd, pair(simd, 0, rows, tile), pair(simd, 2, rows, tile));
    let odd = sum::<S, R>(simd, pair(simd, 1, rows, tile), pair(simd, 3, rows, tile));
    for (r, sum) in sum::<S, R>(simd, even, odd).into_iter().enumerate() {
        S::as_mut_simd_f32s(&mut c[(first + r) * width + column..][..S::F32_LANES]).0[0] = sum;
    }
}

/// The lanes of scores that are added up first: this one and the one half of the lanes behind it.
#[inline(always)]
fn pair<S: Simd, const R: usize>(
    simd: S,
    lane: usize,
    rows: [&[f32]; R],
    (tile, from): (&[f32], usize),
) -> [S::f32s; R] {
    let (mut one, mut other) = ([simd.splat_f32s(0.0); R], [simd.splat_f32s(0.0); R]);
    let rows = rows.map(|row| row.as_chunks::<LANES>().0);
    for (step, keys) in tile.as_chunks::<{ LANES * LINE }>().0.iter().enumerate() {
        let key = S::as_simd_f32s(&keys[lane * LINE + from..][..S::F32_LANES]).0[0];
        let behind = S::as_simd_f32s(&keys[(lane + LANES / 2) * LINE + from..][..S::F32_LANES]).0[0];
        for r in 0..R {
            one[r] = simd.mul_add_e_f32s(simd.splat_f32s(rows[r][step][lane]), key, one[r]);
            other[r] = simd.mul_add_e_f32s(simd.splat_f32s(rows[r][step][lane + LANES / 2]), behind, other[r]);
        }
    }
    sum(simd, one, other)
}

#[inline(always)]
fn sum<S: Simd, const R: usize>(simd: S, a: [S::f32s; R], b: [S::f32s; R]) -> [S::f32s; R] {
    let mut out = a;
    for r in 0..R {
        out[r] = simd.add_f32s(a[r], b[r]);
    }
    out
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

/// Rows `[rows, width]` as `[to / LINE, width, LINE]`: columns of [`turned`] ones, as wide as a vector at most.
fn in_tiles(rows: &[f32], width: usize, to: usize) -> Vec<f32> {
    let mut out = vec![0f32; width * to];
    for (i, row) in rows.chunks_exact(width.max(1)).enumerate() {
        let tile = &mut out[i / LINE * LINE * width..][..LINE * width];
        for (out, v) in tile.as_chunks_mut::<LINE>().0.iter_mut().zip(row) {
            out[i % LINE] = *v;
        }
    }
    out
}

impl<'a> Head<'a> {
    fn new(plan: &'a AttnPlan, span: &'a AttnSpan, kv_head: usize, qkv: Qkv<'a>, queries: Range<usize>) -> Self {
        let mut head = Self { plan, span, kv_head, qkv, queries, keys: 0..0 };
        head.keys = head.seen_by(&head.queries);
        head
    }

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

    /// Width of a row of scores, padded.
    fn stride(&self) -> usize {
        self.keys.len().next_multiple_of(LINE)
    }

    /// Rows of the keys' matrix or of the values'.
    fn key_rows(&self, of: Heads<'a>) -> Vec<f32> {
        let column = self.kv_head * self.dim();
        let row = |j: usize| of.at(self.span.key_row(self.keys.start + j), column, self.dim());
        padded(self.keys.len(), self.width(), row)
    }

    /// Rows of queries, or of what is laid out like them, for query head `g` of the group; the span's first is row `first`.
    fn rows(&self, (of, first): (Heads<'a>, usize), queries: &Range<usize>, g: usize) -> Vec<f32> {
        let column = (self.kv_head * self.group() + g) * self.dim();
        let row = |i: usize| of.at(first + queries.start + i, column, self.dim());
        padded(queries.len(), self.width(), row)
    }

    fn seen(&self, i: usize) -> Seen {
        self.plan.mask.seen(self.span.context_len + i, self.span.keys_len, 0)
    }

    /// Keys that any of these queries sees, from a multiple of [`LINE`] on: a mask moves only forward.
    fn seen_by(&self, queries: &Range<usize>) -> Range<usize> {
        let (first, last) = (self.seen(queries.start), self.seen(queries.end.saturating_sub(1)));
        first.range().start / LINE * LINE..last.range().end
    }

    /// Blocks of queries.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let Range { start, end } = self.queries;
        (start..end).step_by(QUERIES).map(move |first| first..end.min(first + QUERIES))
    }

    /// The keys of a block among [`Self::keys`], and as columns of a row of scores.
    fn block_keys(&self, queries: &Range<usize>) -> (Range<usize>, Columns) {
        let seen = self.seen_by(queries);
        let own = seen.start - self.keys.start..seen.end - self.keys.start;
        let range = own.start..own.end.next_multiple_of(LINE);
        (own, Columns { range, width: self.stride() })
    }

    /// Probabilities of a block's queries, `[queries, stride]` in the block's columns, zeros where nothing is seen; `slope` as
    /// [`Shaping::apply`] leaves it.
    #[inline(always)]
    fn probabilities<S: Simd>(
        &self,
        simd: S,
        (queries, columns): (&Range<usize>, &Columns),
        g: usize,
        (q, keys): (&[f32], &[f32]),
        (probs, slope): (&mut [f32], &mut [f32]),
    ) {
        let (plan, span, stride) = (self.plan, self.span, self.stride());
        scores(simd, (queries.len(), columns.clone(), self.dim()), (q, self.width()), keys, probs);
        for (i, query) in queries.clone().enumerate() {
            let row = &mut probs[i * stride..(i + 1) * stride];
            let seen = self.seen(query);
            let range = seen.range().start - self.keys.start..seen.range().end - self.keys.start;
            row[columns.range.start..range.start].fill(0.0);
            row[range.end..columns.range.end].fill(0.0);
            let own = &mut row[range.clone()];
            own.iter_mut().for_each(|s| *s *= plan.scale);
            let shaping = Shaping::of(plan, self.kv_head * self.group() + g, span.position + query);
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
        let (d, width, group, stride) = (head.dim(), head.width(), head.group(), head.stride());
        let values = head.key_rows(head.qkv.2);
        let keys = in_tiles(&head.key_rows(head.qkv.1), width, stride);
        let mut out = vec![0f32; head.queries.len() * group * d];
        let (mut probs, mut sums) = (vec![0f32; QUERIES * stride], vec![0f32; QUERIES * width]);
        for queries in head.blocks() {
            let (own, columns) = head.block_keys(&queries);
            for g in 0..group {
                let q = head.rows((head.qkv.0, head.span.q_start), &queries, g);
                head.probabilities(simd, (&queries, &columns), g, (&q, &keys), (&mut probs, &mut []));
                let a = Strided { data: &probs[own.start..], row: stride, column: 1 };
                let shape = (queries.len(), Columns::all(width), own.len());
                product(simd, shape, a, &values[own.start * width..], &mut sums, false);
                for (query, sums) in queries.clone().zip(sums.chunks_exact(width)) {
                    let at = ((query - head.queries.start) * group + g) * d;
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
        let (d, width, group, stride) = (head.dim(), head.width(), head.group(), head.stride());
        let (keys, values) = (head.key_rows(head.qkv.1), head.key_rows(head.qkv.2));
        let (key_tiles, turned_values) = (in_tiles(&keys, width, stride), turned(&values, width, stride));
        let trained = plan.trained_bias();
        let biases = trained.map_or(0, |b| 2 * b.reach + 1);
        let zeros = |rows: usize, width: usize| vec![0f32; rows * width];
        let mut out = HeadGrads {
            dq: zeros(span.q_len * group, d),
            dk: zeros(span.keys_len, d),
            dv: zeros(span.keys_len, d),
            dbias: zeros(group, biases),
        };
        let (mut probs, mut dprobs) = (zeros(QUERIES, stride), zeros(QUERIES, stride));
        let mut slope = vec![1f32; QUERIES * stride]; // of the cap; 1 without one
        let n = head.keys.len();
        let (mut dq, mut dk, mut dv) = (zeros(QUERIES, width), zeros(n, width), zeros(n, width));
        for queries in head.blocks() {
            let (own, columns) = head.block_keys(&queries);
            let count = queries.len();
            for g in 0..group {
                let q = head.rows((head.qkv.0, span.q_start), &queries, g);
                let grad = head.rows((grad, 0), &queries, g);
                head.probabilities(simd, (&queries, &columns), g, (&q, &key_tiles), (&mut probs, &mut slope));
                let a = Strided { data: &grad, row: width, column: 1 };
                product(simd, (count, columns.clone(), d), a, &turned_values, &mut dprobs, false);
                for (i, query) in queries.clone().enumerate() {
                    let row = i * stride + columns.range.start..i * stride + columns.range.end;
                    let (probs, dprobs, slope) = (&probs[row.clone()], &mut dprobs[row.clone()], &slope[row]);
                    let mut delta = 0.0;
                    for (p, dp) in probs.iter().zip(dprobs.iter()) {
                        delta += p * dp;
                    }
                    for (p, dp) in probs.iter().zip(dprobs.iter_mut()) {
                        *dp = p * (*dp - delta);
                    }
                    if let Some(bias) = trained {
                        for j in head.seen(query).range() {
                            let score = dprobs[j - head.keys.start - columns.range.start];
                            out.dbias[g * biases + bias.place(span.position + query, j)] += score;
                        }
                    }
                    for (dp, slope) in dprobs.iter_mut().zip(slope) {
                        *dp *= slope * plan.scale;
                    }
                }
                let all = || Columns::all(width);
                let at = own.start * width..own.end * width;
                let across = |data| Strided { data, row: stride, column: 1 };
                let down = |data| Strided { data, row: 1, column: stride };
                let (ds, ps) = (&dprobs[own.start..], &probs[own.start..]);
                product(simd, (count, all(), own.len()), across(ds), &keys[at.clone()], &mut dq, false);
                product(simd, (own.len(), all(), count), down(ds), &q, &mut dk[at.clone()], true);
                product(simd, (own.len(), all(), count), down(ps), &grad, &mut dv[at], true);
                for (query, dq) in queries.clone().zip(dq.chunks_exact(width)) {
                    let at = (query * group + g) * d;
                    out.dq[at..at + d].copy_from_slice(&dq[..d]);
                }
            }
        }
        for (to, from) in [(&mut out.dk, &dk), (&mut out.dv, &dv)] {
            let rows = to[head.keys.start * d..].chunks_exact_mut(d).zip(from.chunks_exact(width));
            rows.for_each(|(to, from)| to.copy_from_slice(&from[..d]));
        }
        out
    }
}
