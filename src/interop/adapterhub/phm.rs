//! Compacter (Karimi Mahabadi et al. 2021): matrices as sums of Kronecker products, `H = sum_i A_i (x) (L_i R_i)`.

use candle_core::{Result, Tensor};

/// The small matrices `A`, `[n, n, n]`, shared by all adapters of a delta or an adapter's own.
#[derive(Debug)]
pub(super) struct PhmRule(Tensor);

/// Most matrices in a rule; the library's default is 4, the paper's largest 12.
const MAX_TERMS: usize = 32;

impl PhmRule {
    /// # Errors
    /// Anything but `[n, n, n]` with a small `n`.
    pub(super) fn new(rule: Tensor) -> std::result::Result<Self, String> {
        match rule.dims() {
            &[n, rows, columns] if n == rows && n == columns && n <= MAX_TERMS => Ok(Self(rule)),
            dims => Err(format!("phm_rule is {dims:?}; [n, n, n] with n from 1 to {MAX_TERMS} is accepted")),
        }
    }

    /// `(in, out)` of the matrix that [`Self::matrix`] makes; nothing is multiplied.
    ///
    /// # Errors
    /// Factors that do not fit the rule or each other.
    pub(super) fn shape(&self, left: &Tensor, right: &Tensor) -> std::result::Result<(usize, usize), String> {
        let n = self.0.dims()[0];
        match (left.dims(), right.dims()) {
            (&[l, p, rank], &[r, rank_r, q]) if l == n && r == n && rank == rank_r && rank <= n * p.max(q) => {
                Ok((n * p, n * q))
            }
            (l, r) => Err(format!(
                "does not fit its phm_rule of {n} matrices: W_left is {l:?}, W_right is {r:?}; [{n}, in / {n}, rank] and \
                 [{n}, rank, out / {n}] are accepted"
            )),
        }
    }

    /// `[in, out]` from `left` `[n, in / n, rank]` and `right` `[n, rank, out / n]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(super) fn matrix(&self, left: &Tensor, right: &Tensor) -> Result<Tensor> {
        let n = self.0.dim(0)?;
        let w = left.matmul(right)?; // [n, in / n, out / n]
        let (_, p, q) = w.dims3()?;
        let mut sum = Tensor::zeros((n, p, n, q), w.dtype(), w.device())?;
        for i in 0..n {
            // one term at a time: all at once would take n times the room
            let a = self.0.get(i)?.reshape((n, 1, n, 1))?;
            sum = (sum + a.broadcast_mul(&w.get(i)?.reshape((1, p, 1, q))?)?)?;
        }
        sum.reshape((n * p, n * q)) // [in, out]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_sum_of_kronecker_products() {
        let dev = Device::Cpu;
        let rule = Tensor::new(&[[[1f32, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]], &dev).unwrap();
        let left = Tensor::new(&[[[1f32], [2.0]], [[3.0], [4.0]]], &dev).unwrap(); // [2, 2, 1]
        let right = Tensor::new(&[[[5f32]], [[7.0]]], &dev).unwrap(); // [2, 1, 1]
        let h = PhmRule::new(rule).unwrap().matrix(&left, &right).unwrap().to_vec2::<f32>().unwrap();
        // W_0 = [5, 10], W_1 = [21, 28] as columns
        assert_eq!(h, [[5.0, 31.0], [10.0, 48.0], [36.0, 20.0], [58.0, 40.0]]);
    }
}
