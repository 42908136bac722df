//! Rotary position embedding (Su et al. 2021), half-split pairs as Hugging Face's Llama lays them out.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{cpu_result, f32_slice, is_cpu_f32, par_rows, vectorized, with_f32};

/// Cosines and sines of the rows of one step, `[rows, rotated / 2]` each: the first `rotated` numbers of each head turn,
/// all of them as a rule.
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// `cos(position * frequency)`.
    pub cos: Tensor,
    /// `sin(position * frequency)`.
    pub sin: Tensor,
    /// Width of a head.
    pub head_dim: usize,
}

struct Rope {
    table: RopeTable,
    /// -1 rotates back: the gradient of a rotation is its inverse.
    sign: f32,
    /// Columns with heads that turn; the others stay.
    columns: usize,
}

impl Rope {
    fn run(&self, x: &[f32], rows: usize, width: usize) -> Result<Vec<f32>> {
        let (half, head) = (self.table.cos.dim(1)?, self.table.head_dim);
        let mut out = vec![0f32; rows * width];
        with_f32(&self.table.cos, |cos| {
            with_f32(&self.table.sin, |sin| {
                par_rows(&mut out, width, 2 * width, |first, out| {
                    vectorized(
                        #[inline(always)]
                        || {
                            for (i, o) in out.chunks_mut(width).enumerate() {
                                let row = first + i;
                                let (cos, sin) =
                                    (&cos[row * half..(row + 1) * half], &sin[row * half..(row + 1) * half]);
                                let x = &x[row * width..(row + 1) * width];
                                let (x, stay) = x.split_at(self.columns);
                                let (o, same) = o.split_at_mut(self.columns);
                                same.copy_from_slice(stay);
                                for (o, x) in o.chunks_exact_mut(head).zip(x.chunks_exact(head)) {
                                    o[2 * half..].copy_from_slice(&x[2 * half..]);
                                    let (o1, o2) = o.split_at_mut(half);
                                    let (x1, x2) = x.split_at(half);
                                    for j in 0..half {
                                        let (c, s) = (cos[j], sin[j] * self.sign);
                                        o1[j] = x1[j] * c - x2[j] * s;
                                        o2[j] = x2[j] * c + x1[j] * s;
                                    }
                                }
                            }
                        },
                    );
                });
                Ok(())
            })
        })?;
        Ok(out)
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        cpu_result(self.run(f32_slice(storage, layout)?, rows, width)?, (rows, width))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, width) = x.dims2()?;
        let back = Rope { table: self.table.clone(), sign: -self.sign, columns: self.columns };
        let out = with_f32(&grad.contiguous()?, |g| back.run(g, rows, width))?;
        Ok(Some(Tensor::from_vec(out, (rows, width), x.device())?))
    }
}

fn reference(x: &Tensor, table: &RopeTable) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let half = table.cos.dim(1)?;
    let head = table.head_dim;
    let x3 = x.reshape((rows, width / head, head))?;
    let (x1, x2) = (x3.narrow(2, 0, half)?, x3.narrow(2, half, half)?); // [rows, heads, half]
    let cos = table.cos.to_dtype(x.dtype())?.reshape((rows, 1, half))?;
    let sin = table.sin.to_dtype(x.dtype())?.reshape((rows, 1, half))?;
    let o1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let o2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    let parts = if head > 2 * half { vec![o1, o2, x3.narrow(2, 2 * half, head - 2 * half)?] } else { vec![o1, o2] };
    Tensor::cat(&parts, 2)?.reshape((rows, width))
}

/// Rotates every head of every row: `x` is `[rows, heads * head_dim]`, the table has the rows' positions.
///
/// # Errors
/// Those of candle.
pub fn rope(x: &Tensor, table: &RopeTable) -> Result<Tensor> {
    rope_leading(x, table, x.dim(1)?)
}

/// As [`rope`], of the heads in the first so many columns; the others stay as they are.
///
/// # Errors
/// Columns that `x` does not have or that are no whole heads; those of candle.
pub fn rope_leading(x: &Tensor, table: &RopeTable, columns: usize) -> Result<Tensor> {
    let width = x.dim(1)?;
    if columns > width || !columns.is_multiple_of(table.head_dim) {
        bail!("rope: {columns} of {width} columns with heads of {}", table.head_dim);
    }
    if !is_cpu_f32(x) {
        if columns == width {
            return reference(x, table);
        }
        let turned = reference(&x.narrow(1, 0, columns)?, table)?;
        return Tensor::cat(&[&turned, &x.narrow(1, columns, width - columns)?], 1);
    }
    let x = x.contiguous()?;
    let op = Rope { table: table.clone(), sign: 1.0, columns };
    if x.track_op() { x.apply_op1(op) } else { x.apply_op1_no_bwd(&op) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn fast_and_reference_agree_forward_and_backward() {
        let dev = Device::Cpu;
        for head_dim in [8, 12] {
            agree(head_dim, &dev);
        }
    }

    fn agree(head_dim: usize, dev: &Device) {
        let angle = Tensor::randn(0f32, 3.0, (6, 4), dev).unwrap();
        let table = RopeTable { cos: angle.cos().unwrap(), sin: angle.sin().unwrap(), head_dim };
        let x = Var::randn(0f32, 1.0, (6, 24), dev).unwrap();
        let w = Tensor::randn(0f32, 1.0, (6, 24), dev).unwrap();
        let grad = |y: &Tensor| {
            let store = (y * &w).unwrap().sum_all().unwrap().backward().unwrap();
            store.get(&x).unwrap().clone()
        };
        let (fast, slow) = (rope(&x, &table).unwrap(), reference(&x, &table).unwrap());
        let diff = |a: &Tensor, b: &Tensor| {
            (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!(diff(&fast, &slow) < 1e-6);
        assert!(diff(&grad(&fast), &grad(&slow)) < 1e-6);
        // the first heads turn, the rest stays
        for columns in (0..=24 / head_dim).map(|heads| heads * head_dim) {
            let fast = rope_leading(&x, &table, columns).unwrap();
            let stay = x.narrow(1, columns, 24 - columns).unwrap();
            let slow = match columns {
                0 => stay,
                _ => Tensor::cat(&[reference(&x.narrow(1, 0, columns).unwrap(), &table).unwrap(), stay], 1).unwrap(),
            };
            assert!(diff(&fast, &slow) < 1e-6 && diff(&grad(&fast), &grad(&slow)) < 1e-6, "{columns}");
        }
        assert!(rope_leading(&x, &table, head_dim + 1).is_err() && rope_leading(&x, &table, 48).is_err());
    }
}
