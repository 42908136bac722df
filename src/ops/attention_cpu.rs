//! Attention on the CPU in f32: one row and head at a time, scores in L1; backward by recomputation (Dao et al. 2022), so
//! nothing of `[rows, keys]` is ever kept. A row's output is the same bits alone, in a run of queries ([`blocks`]) and beside any
//! other rows.

mod blocks;

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::attention::{AttnPlan, AttnSpan, RelativeBias, Seen};
use super::{cpu_result, each, f32_slice, math, par_rows, team, vectorized, with_f32};

struct Attention(Arc<AttnPlan>);

/// Query, key and value side by side in one matrix, all of the step's own rows.
struct Joined(Arc<AttnPlan>);

/// With keys over values in one matrix, so that the bias, which is trained, may be an argument.
struct BiasTrained(Arc<AttnPlan>);

pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    trained: Option<&Tensor>,
    plan: &Arc<AttnPlan>,
) -> Result<Tensor> {
    if let Some(bias) = trained {
        return q.apply_op3(&Tensor::cat(&[k, v], 0)?, bias, BiasTrained(Arc::clone(plan)));
    }
    let op = Attention(Arc::clone(plan));
    if q.track_op() || k.track_op() || v.track_op() { q.apply_op3(k, v, op) } else { q.apply_op3_no_bwd(k, v, &op) }
}

/// As [`attention`] of the three parts of `qkv` `[rows, (heads + 2 kv_heads) * head_dim]`: none of them is copied out, nor
/// are gradients put together.
pub(super) fn joined(qkv: &Tensor, plan: &Arc<AttnPlan>) -> Result<Tensor> {
    let op = Joined(Arc::clone(plan));
    if qkv.track_op() { qkv.apply_op1(op) } else { qkv.apply_op1_no_bwd(&op) }
}

/// Heads side by side in the rows of a matrix.
#[derive(Clone, Copy)]
struct Heads<'a> {
    data: &'a [f32],
    /// Numbers from one row to the next.
    stride: usize,
    /// The first head's first column.
    from: usize,
}

impl<'a> Heads<'a> {
    fn of(data: &'a [f32], width: usize) -> Self {
        Self { data, stride: width, from: 0 }
    }

    /// So many numbers of a row, from a column of the heads on.
    #[inline(always)]
    fn at(self, row: usize, column: usize, len: usize) -> &'a [f32] {
        let at = row * self.stride + self.from + column;
        &self.data[at..at + len]
    }
}

/// Query, key and value.
type Qkv<'a> = (Heads<'a>, Heads<'a>, Heads<'a>);

fn apart<'a>(plan: &AttnPlan, (q, k, v): (&'a [f32], &'a [f32], &'a [f32])) -> Qkv<'a> {
    let (width, kv_width) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    (Heads::of(q, width), Heads::of(k, kv_width), Heads::of(v, kv_width))
}

fn side_by_side<'a>(plan: &AttnPlan, data: &'a [f32]) -> Qkv<'a> {
    let (width, kv_width) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    let at = |from| Heads { data, stride: width + 2 * kv_width, from };
    (at(0), at(width), at(width + kv_width))
}

/// `out += s * x`.
#[inline(always)]
fn axpy(s: f32, x: &[f32], out: &mut [f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = x.mul_add(s, *o);
    }
}

/// What happens to the scores of one query and head between the products and the softmax.
#[derive(Clone, Copy)]
struct Shaping<'a> {
    scale: f32,
    cap: Option<f32>,
    /// The bias, the head's values, the query's position.
    bias: Option<(&'a RelativeBias, &'a [f32], usize)>,
}

impl<'a> Shaping<'a> {
    fn of(plan: &'a AttnPlan, head: usize, position: usize) -> Self {
        let bias = plan.bias.as_ref().map(|b| (b, b.head(head), position));
        Self { scale: plan.scale, cap: plan.cap, bias }
    }

    /// Caps and biases the scores of the seen keys; leaves the cap's derivative in `slope` if that is wanted. Returns the
    /// largest score.
    #[inline(always)]
    fn apply(self, scores: &mut [f32], seen: Seen, slope: &mut [f32]) -> f32 {
        if let Some(cap) = self.cap {
            for s in scores.iter_mut() {
                *s = math::tanh(*s / cap);
            }
            for (d, s) in slope.iter_mut().zip(scores.iter()) {
                *d = 1.0 - s * s;
            }
            for s in scores.iter_mut() {
                *s *= cap;
            }
        }
        if let Some((bias, values, query)) = self.bias {
            for (i, s) in scores.iter_mut().enumerate() {
                *s += values[bias.place(query, seen.at(i))];
            }
        }
        scores.iter().fold(f32::NEG_INFINITY, |max, s| max.max(*s))
    }
}

/// The scores of one query and head turned into probabilities of the seen keys, in `probs`.
#[inline(always)]
fn probabilities<'a>(
    q: &[f32],
    shaping: Shaping<'_>,
    key: impl Fn(usize) -> &'a [f32],
    seen: Seen,
    (probs, slope): (&mut [f32], &mut [f32]),
) {
    let probs = &mut probs[..seen.len()];
    for (i, p) in probs.iter_mut().enumerate() {
        *p = math::dot(q, key(seen.at(i))) * shaping.scale;
    }
    normalise(probs, shaping, seen, slope);
}

/// Scaled products of one query and head with the seen keys, shaped and turned into probabilities.
#[inline(always)]
fn normalise(probs: &mut [f32], shaping: Shaping<'_>, seen: Seen, slope: &mut [f32]) {
    let max = shaping.apply(probs, seen, slope);
    let mut sum = 0.0;
    for p in probs.iter_mut() {
        *p = math::exp(*p - max);
    }
    for p in probs.iter() {
        sum += *p;
    }
    let inv = 1.0 / sum;
    for p in probs.iter_mut() {
        *p *= inv;
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let qkv = (f32_slice(q, ql)?, f32_slice(k, kl)?, f32_slice(v, vl)?);
        output(&self.0, apart(&self.0, qkv))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grads = with_f32(q, |q| with_f32(k, |k| with_f32(v, |v| backward(&self.0, (q, k, v), grad))))?;
        let make = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device()).map(Some);
        Ok((make(grads.q, q)?, make(grads.k, k)?, make(grads.v, v)?))
    }
}

impl CustomOp3 for BiasTrained {
    fn name(&self) -> &'static str {
        "attention-with-a-trained-bias"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        kv: &CpuStorage,
        kvl: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let kv = f32_slice(kv, kvl)?;
        let (k, v) = kv.split_at(kv.len() / 2);
        output(&self.0, apart(&self.0, (f32_slice(q, ql)?, k, v)))
    }

    fn bwd(
        &self,
        q: &Tensor,
        kv: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grads = with_f32(q, |q| {
            with_f32(kv, |kv| {
                let (k, v) = kv.split_at(kv.len() / 2);
                backward(&self.0, (q, k, v), grad)
            })
        })?;
        let make = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device()).map(Some);
        Ok((make(grads.q, q)?, make([grads.k, grads.v].concat(), kv)?, make(grads.bias, bias)?))
    }
}

impl CustomOp1 for Joined {
    fn name(&self) -> &'static str {
        "attention-of-joined-rows"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        output(&self.0, side_by_side(&self.0, f32_slice(qkv, l)?))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let plan = &self.0;
        let grad = grad.contiguous()?;
        let out = with_f32(qkv, |qkv| {
            with_f32(&grad, |grad| {
                let parts = head_gradients(plan, side_by_side(plan, qkv), grad);
                Ok(rows_of_gradients(plan, &parts, qkv.len()))
            })
        })?;
        Tensor::from_vec(out, qkv.shape(), qkv.device()).map(Some)
    }
}

/// `[queries, heads * head_dim]`.
fn output(plan: &AttnPlan, qkv: Qkv<'_>) -> Result<(CpuStorage, Shape)> {
    cpu_result(forward(plan, qkv), (plan.queries(), plan.heads * plan.head_dim))
}

fn forward(plan: &AttnPlan, qkv: Qkv<'_>) -> Vec<f32> {
    let (rows, width) = (plan.queries(), plan.heads * plan.head_dim);
    let mut out = vec![0f32; rows * width];
    let mut tasks: Vec<(&AttnSpan, usize, &mut [f32])> = Vec::with_capacity(rows);
    let mut runs: Vec<(&AttnSpan, &mut [f32])> = Vec::new();
    let mut rest = out.as_mut_slice();
    let mut work = 0;
    for span in plan.spans.iter() {
        let (own, tail) = rest.split_at_mut(span.q_len * width);
        rest = tail;
        if blocks::takes(span) {
            runs.push((span, own));
            continue;
        }
        tasks.extend(own.chunks_exact_mut(width).enumerate().map(|(i, row)| (span, i, row)));
        work += span.q_len * span.keys_len * width;
    }
    in_blocks(plan, qkv, runs);
    let run = |(span, i, out): (&AttnSpan, usize, &mut [f32])| {
        vectorized(
            #[inline(always)]
            || row_forward(plan, span, i, qkv, out),
        );
    };
    if work < 64 * 1024 {
        tasks.into_iter().for_each(run);
    } else {
        let least = (32 * 1024 / (work / rows.max(1)).max(1)).max(1);
        let mut parts = Vec::with_capacity(tasks.len() / least + 1);
        while !tasks.is_empty() {
            parts.push(tasks.split_off(tasks.len().saturating_sub(least)));
        }
        each(parts, |part: Vec<_>| part.into_iter().for_each(run));
    }
    out
}

/// Runs of queries, `[rows, heads * head_dim]` each: head by head, then put side by side.
fn in_blocks(plan: &AttnPlan, qkv: Qkv<'_>, runs: Vec<(&AttnSpan, &mut [f32])>) {
    let (width, kv_heads) = (plan.heads * plan.head_dim, plan.kv_heads);
    // where there are fewer heads than threads, their queries are shared out, too
    let pieces = team::threads().div_ceil((runs.len() * kv_heads).max(1));
    let mut jobs: Vec<(&AttnSpan, usize, Range<usize>, Vec<f32>)> = Vec::new();
    for (span, _) in &runs {
        let size = blocks::share(span, pieces);
        for first in (0..span.q_len).step_by(size) {
            jobs.extend((0..kv_heads).map(|h| (*span, h, first..span.q_len.min(first + size), Vec::new())));
        }
    }
    each(jobs.iter_mut().collect(), |(span, h, queries, out): &mut _| {
        *out = blocks::forward(plan, span, *h, qkv, queries.clone());
    });
    let own = width / kv_heads;
    let mut jobs = jobs.chunks_exact(kv_heads);
    for (span, out) in runs {
        let size = blocks::share(span, pieces);
        for (out, parts) in out.chunks_mut(size * width).zip(&mut jobs) {
            par_rows(out, width, width, |first, out| {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    for (out, (_, _, _, part)) in out.chunks_exact_mut(own).zip(parts) {
                        out.copy_from_slice(&part[(first + i) * own..(first + i + 1) * own]);
                    }
                }
            });
        }
    }
}

/// Gradients of all arguments; that of the bias `[heads, 2 reach + 1]` is empty where it is not trained.
struct Grads {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Vec<f32>,
}

fn backward(plan: &AttnPlan, (q, k, v): (&[f32], &[f32], &[f32]), grad: &Tensor) -> Result<Grads> {
    let (width, kv_width) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    let bias = plan.trained_bias().map_or(0, |b| b.values.len());
    let mut out =
        Grads { q: vec![0f32; q.len()], k: vec![0f32; k.len()], v: vec![0f32; v.len()], bias: vec![0f32; bias] };
    let grad = grad.contiguous()?;
    let parts = with_f32(&grad, |g| Ok(head_gradients(plan, apart(plan, (q, k, v)), g)))?;
    let (d, group) = (plan.head_dim, plan.heads / plan.kv_heads);
    for (part, (span, head)) in parts.iter().zip(jobs(plan)) {
        for (i, row) in part.dq.chunks_exact(group * d).enumerate() {
            let at = (span.q_start + i) * width + head * group * d;
            out.q[at..at + group * d].copy_from_slice(row);
        }
        for (j, (rk, rv)) in part.dk.chunks_exact(d).zip(part.dv.chunks_exact(d)).enumerate() {
            let at = span.key_row(j) * kv_width + head * d;
            axpy(1.0, rk, &mut out.k[at..at + d]);
            axpy(1.0, rv, &mut out.v[at..at + d]);
        }
        let own = head * part.dbias.len();
        axpy(1.0, &part.dbias, &mut out.bias[own..own + part.dbias.len()]);
    }
    Ok(out)
}

/// Spans and key heads.
fn jobs(plan: &AttnPlan) -> impl Iterator<Item = (&AttnSpan, usize)> {
    plan.spans.iter().flat_map(|s| (0..plan.kv_heads).map(move |h| (s, h)))
}

/// Gradients of each span and key head, in order; `grad` is that of the output, `[queries, heads * head_dim]`.
fn head_gradients(plan: &AttnPlan, qkv: Qkv<'_>, grad: &[f32]) -> Vec<HeadGrads> {
    let mut rest = grad;
    let mut own = |span: &AttnSpan| {
        let (own, others) = rest.split_at(span.q_len * plan.heads * plan.head_dim);
        rest = others;
        own
    };
    let grads: Vec<&[f32]> = plan.spans.iter().map(&mut own).collect();
    let mut parts: Vec<Option<HeadGrads>> = jobs(plan).map(|_| None).collect();
    each(jobs(plan).zip(&mut parts).enumerate().collect(), |(i, ((s, h), part))| {
        *part = Some(head_backward(plan, s, h, qkv, grads[i / plan.kv_heads]));
    });
    parts.into_iter().flatten().collect()
}

/// Those of rows whose keys are the span's own, laid side by side as the rows are: `len` numbers, zeros of rows that are in no
/// span.
fn rows_of_gradients(plan: &AttnPlan, parts: &[HeadGrads], len: usize) -> Vec<f32> {
    let (d, group) = (plan.head_dim, plan.heads / plan.kv_heads);
    let (width, kv_width) = (plan.heads * d, plan.kv_heads * d);
    let row = width + 2 * kv_width;
    // by row: which span's key it has, and which of its keys
    let mut places: Vec<Option<(usize, usize)>> = vec![None; len / row];
    for (i, span) in plan.spans.iter().enumerate() {
        (0..span.keys_len).for_each(|j| places[span.key_row(j)] = Some((i, j)));
    }
    let mut out = vec![0f32; len];
    par_rows(&mut out, row, row, |first, out| {
        for (out, place) in out.chunks_exact_mut(row).zip(&places[first..]) {
            let Some((i, j)) = *place else { continue };
            let span = &plan.spans[i];
            let query = j.checked_sub(span.context_len).filter(|query| *query < span.q_len);
            let (q, kv) = out.split_at_mut(width);
            let (k, v) = kv.split_at_mut(kv_width);
            let heads = q.chunks_exact_mut(group * d).zip(k.chunks_exact_mut(d).zip(v.chunks_exact_mut(d)));
            for ((q, (k, v)), part) in heads.zip(&parts[i * plan.kv_heads..]) {
                if let Some(query) = query {
                    q.copy_from_slice(&part.dq[query * group * d..(query + 1) * group * d]);
                }
                k.copy_from_slice(&part.dk[j * d..(j + 1) * d]);
                v.copy_from_slice(&part.dv[j * d..(j + 1) * d]);
            }
        }
    });
    out
}

/// One row, all heads. A key's heads lie side by side and are read together, so that memory is read in order.
#[inline(always)]
fn row_forward(plan: &AttnPlan, span: &AttnSpan, i: usize, (q, k, v): Qkv<'_>, out: &mut [f32]) {
    let (d, kv_width, group) = (plan.head_dim, plan.kv_heads * plan.head_dim, plan.heads / plan.kv_heads);
    let q = q.at(span.q_start + i, 0, plan.heads * d);
    let seen = plan.mask.seen(span.context_len + i, span.keys_len, span.pinned);
    let n = seen.len();
    let mut probs = vec![0f32; plan.heads * n]; // [heads, seen keys]
    for s in 0..n {
        let k = k.at(span.key_row(seen.at(s)), 0, kv_width);
        for (h, q) in q.chunks_exact(d).enumerate() {
            let column = (h / group) * d;
            probs[h * n + s] = math::dot(q, &k[column..column + d]) * plan.scale;
        }
    }
    for (h, probs) in probs.chunks_exact_mut(n.max(1)).enumerate() {
        normalise(probs, Shaping::of(plan, h, span.position + i), seen, &mut []);
    }
    for s in 0..n {
        let v = v.at(span.key_row(seen.at(s)), 0, kv_width);
        for (h, out) in out.chunks_exact_mut(d).enumerate() {
            let column = (h / group) * d;
            axpy(probs[h * n + s], &v[column..column + d], out);
        }
    }
}

/// Gradients of one span and key head.
struct HeadGrads {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// `[group, 2 reach + 1]`; empty where the bias is not trained.
    dbias: Vec<f32>,
}

/// `grad` is that of the span's rows of the output.
fn head_backward(plan: &AttnPlan, span: &AttnSpan, kv_head: usize, (q, k, v): Qkv<'_>, grad: &[f32]) -> HeadGrads {
    let (d, group) = (plan.head_dim, plan.heads / plan.kv_heads);
    let (grad, n) = (Heads::of(grad, plan.heads * d), span.keys_len);
    if blocks::takes(span) {
        return blocks::backward(plan, span, kv_head, (q, k, v), grad);
    }
    let trained = plan.trained_bias();
    let values = trained.map_or(0, |b| 2 * b.reach + 1);
    let mut out = HeadGrads {
        dq: vec![0f32; span.q_len * group * d],
        dk: vec![0f32; n * d],
        dv: vec![0f32; n * d],
        dbias: vec![0f32; group * values],
    };
    let (mut probs, mut dprobs) = (vec![0f32; n], vec![0f32; n]);
    let mut slope = vec![1f32; n]; // of the cap; 1 without one
    vectorized(
        #[inline(always)]
        || {
            for i in 0..span.q_len {
                let seen = plan.mask.seen(span.context_len + i, n, span.pinned);
                for g in 0..group {
                    let column = (kv_head * group + g) * d;
                    let (q, grad) = (q.at(span.q_start + i, column, d), grad.at(i, column, d));
                    let key = |j: usize| k.at(span.key_row(j), kv_head * d, d);
                    let shaping = Shaping::of(plan, kv_head * group + g, span.position + i);
                    probabilities(q, shaping, key, seen, (&mut probs, &mut slope));
                    let mut delta = 0.0;
                    for s in 0..seen.len() {
                        let dp = math::dot(grad, v.at(span.key_row(seen.at(s)), kv_head * d, d));
                        dprobs[s] = dp;
                        delta += probs[s] * dp;
                    }
                    let dq = &mut out.dq[(i * group + g) * d..(i * group + g + 1) * d];
                    for s in 0..seen.len() {
                        let j = seen.at(s);
                        let p = probs[s];
                        let score = p * (dprobs[s] - delta);
                        if let Some(bias) = trained {
                            out.dbias[g * values + bias.place(span.position + i, j)] += score;
                        }
                        let ds = score * slope[s] * plan.scale;
                        axpy(ds, key(j), dq);
                        axpy(ds, q, &mut out.dk[j * d..(j + 1) * d]);
                        axpy(p, grad, &mut out.dv[j * d..(j + 1) * d]);
                    }
                }
            }
        },
    );
    out
}
