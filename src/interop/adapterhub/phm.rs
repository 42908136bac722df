//! Compacter (Karimi Mahabadi et al. 2021): matrices as sums of Kronecker products, `H = sum_i A_i (x) (L_i R_i)`.

use candle_core::{Result, Tensor};

/// The small matrices `A`, `[n, n, n]`, shared by all adapters of a delta or an adapter's own.
#[derive(Debug)]
pub(super) struct PhmRule(Tensor);

impl PhmRule {
    pub(super) fn new(rule: Tensor) -> Self {
        Self(rule)
    }

    /// `[in, out]` from `left` `[n, in / n, rank]` and `right` `[n, rank, out / n]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(super) fn matrix(&self, left: &Tensor, right: &Tensor) -> Result<Tensor> {
        let (n, rows, columns) = self.0.dims3()?;
        let w = left.matmul(right)?; // [n, in / n, out / n]
        let (wn, p, q) = w.dims3()?;
        if wn != n {
            candle_core::bail!("{n} matrices in the rule, {wn} factors");
        }
        let a = self.0.reshape((n, rows, 1, columns, 1))?;
        let w = w.reshape((n, 1, p, 1, q))?;
        a.broadcast_mul(&w)?.sum(0)?.reshape((rows * p, columns * q)) // [in, out]
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
        let h = PhmRule::new(rule).matrix(&left, &right).unwrap().to_vec2::<f32>().unwrap();
        // W_0 = [5, 10], W_1 = [21, 28] as columns
        assert_eq!(h, [[5.0, 31.0], [10.0, 48.0], [36.0, 20.0], [58.0, 40.0]]);
    }
}
