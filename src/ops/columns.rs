//! A bias or a factor of each column, trained: sums over rows that go with the memory.
//!
//! candle's backward of a broadcast sums over rows with one index computation per element, which on a CPU costs more than
//! the matrix products around it.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{cpu_result, each, f32_slice, is_cpu_f32, par_rows, team, vectorized, with_f32};

/// What is done to each column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Add,
    Scale,
}

struct Columns(Kind);

/// `x + b`: `x` `[rows, n]`, `b` `[n]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn add_bias(x: &Tensor, b: &Tensor) -> Result<Tensor> {
    if takes(x, b) { x.contiguous()?.apply_op2(&b.contiguous()?, Columns(Kind::Add)) } else { x.broadcast_add(b) }
}

/// `x * s`: `x` `[rows, n]`, `s` `[n]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn scale_columns(x: &Tensor, s: &Tensor) -> Result<Tensor> {
    if takes(x, s) { x.contiguous()?.apply_op2(&s.contiguous()?, Columns(Kind::Scale)) } else { x.broadcast_mul(s) }
}

fn takes(x: &Tensor, by: &Tensor) -> bool {
    let shapes = x.dims2().is_ok_and(|(_, n)| by.dims1().is_ok_and(|m| m == n));
    shapes && is_cpu_f32(x) && is_cpu_f32(by)
}

/// Sums over rows: `[rows, n]` -> `[n]`, without a graph.
///
/// # Errors
/// A tensor that is no matrix.
pub(super) fn column_sums(g: &Tensor) -> Result<Tensor> {
    let (_, n) = g.dims2()?;
    let g = g.detach();
    if !is_cpu_f32(&g) {
        return g.sum(0);
    }
    let sums = with_f32(&g.contiguous()?, |g| Ok(sums(g, None, n)))?;
    Tensor::from_vec(sums, n, &candle_core::Device::Cpu)
}

/// Sums over the rows of `g`, or of `g * x`.
fn sums(g: &[f32], x: Option<&[f32]>, n: usize) -> Vec<f32> {
    let all = 0..g.len() / n.max(1);
    sums_of_groups(g, x, n, &[vec![all]])
}

/// Sums over the rows of each group, which are ranges of the rows of a plain matrix `[rows, n]`: `[groups, n]`.
pub(super) fn column_sums_of(g: &[f32], n: usize, groups: &[Vec<Range<usize>>]) -> Vec<f32> {
    sums_of_groups(g, None, n, groups)
}

/// Rows are summed in runs, whose sums are added in order: the same on any number of threads and beside any other groups, and
/// closer than one long sum.
fn sums_of_groups(g: &[f32], x: Option<&[f32]>, n: usize, groups: &[Vec<Range<usize>>]) -> Vec<f32> {
    const RUN: usize = 64;
    let mut out = vec![0f32; groups.len() * n];
    if n == 0 {
        return out;
    }
    let mut runs: Vec<(usize, Range<usize>)> = Vec::new(); // of which group, and its rows
    for (i, ranges) in groups.iter().enumerate() {
        for rows in ranges {
            runs.extend(rows.clone().step_by(RUN).map(|from| (i, from..(from + RUN).min(rows.end))));
        }
    }
    let numbers = n * runs.iter().map(|(_, rows)| rows.len()).sum::<usize>();
    let mut parts = vec![0f32; runs.len() * n];
    let one = |((_, rows), part): (&(usize, Range<usize>), &mut [f32])| {
        let all = rows.start * n..rows.end * n;
        let g = &g[all.clone()];
        vectorized(
            #[inline(always)]
            || match x {
                Some(x) => {
                    for (g, x) in g.chunks_exact(n).zip(x[all].chunks_exact(n)) {
                        for ((p, g), x) in part.iter_mut().zip(g).zip(x) {
                            *p = g.mul_add(*x, *p);
                        }
                    }
                }
                None => {
                    for g in g.chunks_exact(n) {
                        for (p, g) in part.iter_mut().zip(g) {
                            *p += g;
                        }
                    }
                }
            },
        );
    };
    let items = runs.iter().zip(parts.chunks_mut(n));
    if numbers < 64 * 1024 || team::threads() < 2 {
        items.for_each(one);
    } else {
        each(items.collect(), one);
    }
    for ((group, _), part) in runs.iter().zip(parts.chunks_exact(n)) {
        out[group * n..(group + 1) * n].iter_mut().zip(part).for_each(|(o, p)| *o += p);
    }
    out
}

impl CustomOp2 for Columns {
    fn name(&self) -> &'static str {
        match self.0 {
            Kind::Add => "add-bias",
            Kind::Scale => "scale-columns",
        }
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, by: &CpuStorage, by_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, by) = (f32_slice(x, x_l)?, f32_slice(by, by_l)?);
        let n = by.len();
        let mut out = x.to_vec();
        par_rows(&mut out, n, n, |_, out| {
            vectorized(
                #[inline(always)]
                || {
                    for row in out.chunks_exact_mut(n.max(1)) {
                        match self.0 {
                            Kind::Add => row.iter_mut().zip(by).for_each(|(o, b)| *o += b),
                            Kind::Scale => row.iter_mut().zip(by).for_each(|(o, b)| *o *= b),
                        }
                    }
                },
            );
        });
        cpu_result(out, x_l.shape())
    }

    fn bwd(&self, x: &Tensor, by: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        let wants = |t: &Tensor| t.track_op();
        match self.0 {
            Kind::Add => {
                let gb = if wants(by) { Some(column_sums(&grad)?) } else { None };
                Ok((wants(x).then_some(grad), gb))
            }
            Kind::Scale => {
                let gs = if wants(by) {
                    let n = by.dim(0)?;
                    let x = x.detach().contiguous()?;
                    let sums = with_f32(&grad, |g| with_f32(&x, |x| Ok(sums(g, Some(x), n))))?;
                    Some(Tensor::from_vec(sums, n, &candle_core::Device::Cpu)?)
                } else {
                    None
                };
                let gx = if wants(x) { Some(scale_columns(&grad, &by.detach())?) } else { None };
                Ok((gx, gs))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn diff(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn results_and_gradients_equal_those_of_broadcasts() {
        let dev = Device::Cpu;
        for (rows, n) in [(1, 1), (3, 5), (200, 24), (513, 300)] {
            let var = |shape: Shape| Var::randn(0f32, 1.0, shape, &dev).unwrap();
            let (x, by) = (var((rows, n).into()), var(n.into()));
            let g = Tensor::randn(0f32, 1.0, (rows, n), &dev).unwrap();
            type Op = fn(&Tensor, &Tensor) -> Result<Tensor>;
            let pairs: [(Op, Op); 2] =
                [(add_bias, |x, b| x.broadcast_add(b)), (scale_columns, |x, s| x.broadcast_mul(s))];
            for (own, plain) in pairs {
                let run = |f: Op, x: &Tensor| {
                    let y = f(x, &by).unwrap();
                    let grads = (&y * &g).unwrap().sum_all().unwrap().backward().unwrap();
                    (y, grads.get(&x.clone()).cloned(), grads.get(&by).unwrap().clone())
                };
                let ((y, gx, gb), (want, want_x, want_b)) = (run(own, &x), run(plain, &x));
                assert!(diff(&y, &want) < 1e-6 && diff(&gx.unwrap(), &want_x.unwrap()) < 1e-6);
                assert!(diff(&gb, &want_b) < 1e-3, "{rows}x{n}: {}", diff(&gb, &want_b));
                let (_, none, gb) = run(own, &x.as_detached_tensor());
                assert!(none.is_none() && diff(&gb, &want_b) < 1e-3);
            }
            assert!(diff(&column_sums(&g).unwrap(), &g.sum(0).unwrap()) < 1e-3);
        }
        let (x, b) =
            (Tensor::zeros((2, 3), candle_core::DType::F32, &dev), Tensor::zeros(4, candle_core::DType::F32, &dev));
        assert!(add_bias(&x.unwrap(), &b.unwrap()).is_err());
    }

    /// Whatever lies beside a group, its sums are those of its rows alone, bit for bit.
    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "a group of one range is meant")]
    fn groups_of_rows_are_summed_apart() {
        let n = 300;
        let g = Tensor::randn(0f32, 1.0, (500, n), &Device::Cpu).unwrap();
        let numbers = g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let groups = [vec![0..130], vec![140..141, 300..500], vec![], vec![130..140, 141..300]];
        let got = column_sums_of(&numbers, n, &groups);
        for (group, got) in groups.iter().zip(got.chunks_exact(n)) {
            let pieces = group.iter().map(|rows| g.narrow(0, rows.start, rows.len()).unwrap().sum(0).unwrap());
            let zeros = Tensor::zeros(n, candle_core::DType::F32, &Device::Cpu).unwrap();
            let want = pieces.fold(zeros, |all, piece| (all + piece).unwrap());
            assert!(diff(&Tensor::new(got, &Device::Cpu).unwrap(), &want) < 1e-3);
        }
        let alone = g.narrow(0, 0, 130).unwrap();
        assert_eq!(column_sums(&alone).unwrap().to_vec1::<f32>().unwrap(), got[..n]);
        assert_eq!(got[2 * n..3 * n], vec![0.0; n]);
    }
}
