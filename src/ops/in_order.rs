//! Products of rows with a delta's small matrices: a row's numbers are the same in any company.
//!
//! candle's product takes another kernel, which sums in another order, for another number of rows.

use candle_core::{Result, Tensor, bail};

use super::{
    is_cpu_f32,
    low_rank::{Rows, expand, shrink},
    runs::share_rows,
    with_f32,
};

/// Whether the kernels take these: f32 on the CPU, no gradient wanted.
fn takes(x: &Tensor, w: &Tensor) -> bool {
    [x, w].into_iter().all(|t| is_cpu_f32(t) && !t.track_op() && t.elem_count() > 0)
}

/// `x W`: `x` `[rows, k]`, `w` `[k, n]` -> `[rows, n]`. Where a gradient is wanted, and on other devices and types, candle's.
///
/// # Errors
/// Shapes that do not fit.
pub fn times(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((rows, k), (depth, n)) = (x.dims2()?, w.dims2()?);
    if k != depth {
        bail!("product: rows {:?} with a matrix {:?}", x.shape(), w.shape());
    }
    if !takes(x, w) {
        return x.matmul(w);
    }
    computed(x, w, (rows, n), |x, w, first, out| {
        let low = &x[first * k..][..out.len() / n * k];
        expand((low, k, 0..k), (w, &[]), (out, n, 0..n));
    })
}

/// `x W^T`: `x` `[rows, k]`, `w` `[n, k]` -> `[rows, n]`, as [`times`].
///
/// # Errors
/// Shapes that do not fit.
pub fn times_turned(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((rows, k), (n, depth)) = (x.dims2()?, w.dims2()?);
    if k != depth {
        bail!("product: rows {:?} with the transpose of {:?}", x.shape(), w.shape());
    }
    if !takes(x, w) {
        return x.matmul(&w.t()?);
    }
    computed(x, w, (rows, n), |x, w, first, out| shrink((Rows::of(x, k), first), (w, &[]), 1.0, (out, n, 0..n)))
}

/// An output of zeros that `f` gets some rows of, from the first one's number on.
fn computed(
    x: &Tensor,
    w: &Tensor,
    (rows, n): (usize, usize),
    f: impl Fn(&[f32], &[f32], usize, &mut [f32]) + Sync,
) -> Result<Tensor> {
    let (x, w, all) = (x.contiguous()?, w.contiguous()?, 0..rows);
    let mut out = vec![0f32; rows * n];
    let owners = std::iter::once((std::slice::from_ref(&all), w.elem_count()));
    with_f32(&x, |x| {
        with_f32(&w, |w| {
            share_rows(&mut out, n, owners, |pieces| {
                pieces.into_iter().for_each(|piece| f(x, w, piece.rows.start, piece.out));
            })
        })
    })?;
    Tensor::from_vec(out, (rows, n), x.device())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn bits(t: &Tensor) -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn products_are_candles_and_a_row_is_the_same_in_any_company() {
        let rand = |shape: (usize, usize)| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        for (k, n) in [(5, 3), (64, 40), (200, 17)] {
            let (x, w) = (rand((75, k)), rand((k, n)));
            let turned = w.t().unwrap(); // strided, too
            let want = x.matmul(&w).unwrap();
            type Product = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;
            let both: [Product; 2] = [|x, w, _| times(x, w), |x, _, turned| times_turned(x, turned)];
            for product in both {
                let all = product(&x, &w, &turned).unwrap();
                let apart = (&all - &want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(apart < 1e-4, "{k} {n}: {apart}");
                for (from, len) in [(0, 1), (74, 1), (3, 4), (10, 7), (0, 33), (40, 35)] {
                    let some = product(&x.narrow(0, from, len).unwrap(), &w, &turned).unwrap();
                    assert_eq!(
                        bits(&some),
                        bits(&all.narrow(0, from, len).unwrap()),
                        "{k} {n} from {from}, {len} rows"
                    );
                }
            }
            assert!(times(&x, &rand((k + 1, n))).is_err() && times_turned(&x, &rand((n, k + 1))).is_err());
        }
    }

    #[test]
    fn gradients_are_candles() {
        let var = |shape: (usize, usize)| Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        let (x, w) = (var((4, 6)), var((6, 5)));
        let grads = times(&x, &w).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&w).is_some());
        let grads = times_turned(&x, &w.t().unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&w).is_some());
    }
}
