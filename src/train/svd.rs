//! The largest singular directions of a matrix, in f64: randomised range finding (Halko et al. 2011, algorithm 4.4), then
//! one-sided Jacobi rotations (Hestenes 1958) on what is left. For PiSSA's initial factors.

use candle_core::{DType, Device, Result, Tensor};
use rand::{Rng, rngs::StdRng};

use crate::ops::{dot, rotate};

/// Directions beyond those asked for, which make the range accurate.
const OVERSAMPLE: usize = 10;
/// Power iterations.
const POWER: usize = 4;

/// PiSSA (Meng et al. 2024): `A = sqrt(S) U^T / sqrt(scale)` `[rank, in]` and `B = sqrt(S) V^T / sqrt(scale)` `[rank, out]` of
/// `W = U S V^T` `[in, out]`, so that `scale * A^T B` is W's best approximation of this rank. f32, on W's device.
///
/// # Errors
/// Those of candle; a rank above the matrix's.
pub(super) fn principal_pair(weight: &Tensor, rank: usize, scale: f64, rng: &mut StdRng) -> Result<(Tensor, Tensor)> {
    let w = weight.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.contiguous()?;
    let (rows, columns) = w.dims2()?;
    if rank > rows.min(columns) {
        candle_core::bail!("rank {rank} of a {rows} x {columns} matrix");
    }
    let (u, s, v) = top(&w, rank, rng)?;
    let part = |vectors: &[Vec<f64>]| -> Result<Tensor> {
        let n = vectors.first().map_or(0, Vec::len);
        let roots = s.iter().map(|s| (s / scale).sqrt());
        let data: Vec<f32> =
            vectors.iter().zip(roots).flat_map(|(v, r)| v.iter().map(move |x| (x * r) as f32)).collect();
        Tensor::from_vec(data, (rank, n), weight.device())
    };
    Ok((part(&u)?, part(&v)?))
}

/// Left vectors, singular values (falling) and right vectors.
type Directions = (Vec<Vec<f64>>, Vec<f64>, Vec<Vec<f64>>);

fn top(w: &Tensor, rank: usize, rng: &mut StdRng) -> Result<Directions> {
    let (rows, columns) = w.dims2()?;
    let k = (rank + OVERSAMPLE).min(rows).min(columns);
    let draws: Vec<f64> = (0..columns * k).map(|_| rng.random_range(-1.0..=1.0)).collect();
    let wt = w.t()?.contiguous()?;
    let mut q = orthonormal(&w.matmul(&Tensor::from_vec(draws, (columns, k), &Device::Cpu)?)?)?; // [rows, k]
    for _ in 0..POWER {
        q = orthonormal(&w.matmul(&orthonormal(&wt.matmul(&q)?)?)?)?;
    }
    // the rows of Q^T W, rotated until they are orthogonal: their lengths are the singular values
    let mut b = q.t()?.contiguous()?.matmul(w)?.to_vec2::<f64>()?; // k rows of [columns]
    let mut left = q.t()?.contiguous()?.to_vec2::<f64>()?; // k rows of [rows], rotated alike
    // small and for setting up: nobody stops it
    let _whole = rotate(&mut b, &mut left, &|| false);
    let mut order: Vec<(f64, usize)> = b.iter().map(|r| dot(r, r).sqrt()).zip(0..).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    order.truncate(rank);
    let unit = |r: &[f64], n: f64| r.iter().map(|x| if n > 0.0 { x / n } else { 0.0 }).collect();
    let v = order.iter().map(|(n, i)| unit(&b[*i], *n)).collect();
    let u = order.iter().map(|(_, i)| left[*i].clone()).collect();
    Ok((u, order.into_iter().map(|(n, _)| n).collect(), v))
}

/// Orthonormal columns with the same span (modified Gram-Schmidt, twice).
fn orthonormal(m: &Tensor) -> Result<Tensor> {
    let mut columns = m.t()?.contiguous()?.to_vec2::<f64>()?;
    for i in 0..columns.len() {
        let (done, rest) = columns.split_at_mut(i);
        let own = &mut rest[0];
        for _ in 0..2 {
            for d in done.iter() {
                let along = dot(d, own);
                own.iter_mut().zip(d).for_each(|(o, d)| *o -= along * d);
            }
        }
        let norm = dot(own, own).sqrt();
        own.iter_mut().for_each(|o| *o = if norm > 1e-300 { *o / norm } else { 0.0 });
    }
    let (k, n) = (columns.len(), columns.first().map_or(0, Vec::len));
    Tensor::from_vec(columns.concat(), (k, n), &Device::Cpu)?.t()?.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    /// A matrix with known singular values: random orthonormal factors around a diagonal.
    fn known(rows: usize, columns: usize, values: &[f64], rng: &mut StdRng) -> Tensor {
        let mut factor = |n: usize| {
            let draws: Vec<f64> = (0..n * values.len()).map(|_| rng.random_range(-1.0..=1.0)).collect();
            orthonormal(&Tensor::from_vec(draws, (n, values.len()), &Device::Cpu).unwrap()).unwrap()
        };
        let (u, v) = (factor(rows), factor(columns));
        let s = Tensor::new(values, &Device::Cpu).unwrap();
        u.broadcast_mul(&s).unwrap().matmul(&v.t().unwrap()).unwrap()
    }

    #[test]
    fn singular_values_and_the_best_approximation_are_found() {
        let mut rng = StdRng::seed_from_u64(5);
        for (rows, columns) in [(40, 24), (16, 60), (12, 12)] {
            let values: Vec<f64> = (0..12).map(|i| 10.0 * 0.7f64.powi(i)).collect();
            let w = known(rows, columns, &values, &mut rng);
            let (u, s, v) = top(&w, 4, &mut rng).unwrap();
            for (got, want) in s.iter().zip(&values) {
                assert!((got - want).abs() < 1e-9, "{s:?}");
            }
            for (i, a) in u.iter().enumerate() {
                for (j, b) in u.iter().enumerate() {
                    assert!((dot(a, b) - f64::from(u8::from(i == j))).abs() < 1e-10);
                }
                assert!((dot(&v[i], &v[i]) - 1.0).abs() < 1e-10);
            }
            // what is left has exactly the other singular values (Eckart and Young 1936)
            let (a, b) = principal_pair(&w, 4, 0.5, &mut rng).unwrap();
            let near = (a.t().unwrap().matmul(&b).unwrap() * 0.5).unwrap().to_dtype(DType::F64).unwrap();
            let left = (&w - near).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let want: f64 = values[4..].iter().map(|s| s * s).sum();
            assert!((left - want).abs() < 1e-4 * want, "{left} {want}");
        }
        let w = known(8, 6, &[1.0, 0.5], &mut rng);
        assert!(principal_pair(&w, 7, 1.0, &mut rng).is_err());
    }
}
