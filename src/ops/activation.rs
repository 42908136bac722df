//! Activations of an MLP: plain and gated, with their derivatives.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};

use super::{cpu_result, f32_slice, is_cpu_f32, math, par_rows, vectorized, with_f32};

/// Which nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `x * sigmoid(x)` (Llama).
    Silu,
    /// GELU, tanh approximation (GPT-2's `gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// GELU, exact (BERT).
    Gelu,
    /// `max(x, 0)`.
    Relu,
    /// `tanh(x)` (BERT's pooler).
    Tanh,
    /// `x` where positive, else `0.01 x`.
    LeakyRelu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `max(x, 0)^2`.
    Relu2,
    /// `x`.
    Identity,
}

const LEAK: f32 = 0.01;
const QUICK: f32 = 1.702;

impl Act {
    /// Reads a Hugging Face activation name.
    pub fn from_hf(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "gelu" | "gelu_python" => Self::Gelu,
            "relu" => Self::Relu,
            "tanh" => Self::Tanh,
            "leakyrelu" | "leaky_relu" => Self::LeakyRelu,
            "sigmoid" => Self::Sigmoid,
            "quick_gelu" => Self::QuickGelu,
            "relu6" => Self::Relu6,
            "relu2" => Self::Relu2,
            "linear" => Self::Identity,
            _ => return None,
        })
    }

    /// Its name in Hugging Face configurations.
    pub fn hf_name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu_new",
            Self::Gelu => "gelu",
            Self::Relu => "relu",
            Self::Tanh => "tanh",
            Self::LeakyRelu => "leaky_relu",
            Self::Sigmoid => "sigmoid",
            Self::QuickGelu => "quick_gelu",
            Self::Relu6 => "relu6",
            Self::Relu2 => "relu2",
            Self::Identity => "linear",
        }
    }

    /// The names that [`Self::from_hf`] knows.
    pub const NAMES: [&str; 11] =
        ["relu", "gelu", "gelu_new", "silu", "swish", "tanh", "leaky_relu", "sigmoid", "quick_gelu", "relu6", "relu2"];

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::GeluTanh => x.gelu(),
            Self::Gelu => x.gelu_erf(),
            Self::Relu => x.relu(),
            Self::Tanh => x.tanh(),
            Self::LeakyRelu => x.relu()? - (x.neg()?.relu()? * f64::from(LEAK))?,
            Self::Sigmoid => (x.neg()?.exp()? + 1.0)?.recip(),
            Self::QuickGelu => x * ((x * -f64::from(QUICK))?.exp()? + 1.0)?.recip()?,
            Self::Relu6 => x.relu()? - (x - 6.0)?.relu()?,
            Self::Relu2 => x.relu()?.sqr(),
            Self::Identity => Ok(x.clone()),
        }
    }

    /// `out = f(x)`.
    pub(super) fn map(self, x: &[f32], out: &mut [f32]) {
        #[inline(always)]
        fn go(x: &[f32], out: &mut [f32], f: impl Fn(f32) -> f32) {
            vectorized(
                #[inline(always)]
                || {
                    for (x, o) in x.iter().zip(out) {
                        *o = f(*x);
                    }
                },
            );
        }
        match self {
            Self::Silu => go(x, out, math::silu),
            Self::GeluTanh => go(x, out, math::gelu_tanh),
            Self::Gelu => go(x, out, math::gelu_erf),
            Self::Relu => go(x, out, |v| v.max(0.0)),
            Self::Tanh => go(x, out, math::tanh),
            Self::LeakyRelu => go(x, out, |v| if v > 0.0 { v } else { LEAK * v }),
            Self::Sigmoid => go(x, out, math::sigmoid),
            Self::QuickGelu => go(x, out, |v| v * math::sigmoid(QUICK * v)),
            Self::Relu6 => go(x, out, |v| v.clamp(0.0, 6.0)),
            Self::Relu2 => go(x, out, |v| v.max(0.0) * v.max(0.0)),
            Self::Identity => go(x, out, |v| v),
        }
    }

    /// `out *= f'(x)`.
    fn mul_grad(self, x: &[f32], out: &mut [f32]) {
        #[inline(always)]
        fn go(x: &[f32], out: &mut [f32], f: impl Fn(f32) -> f32) {
            vectorized(
                #[inline(always)]
                || {
                    for (x, o) in x.iter().zip(out) {
                        *o *= f(*x);
                    }
                },
            );
        }
        match self {
            Self::Silu => go(x, out, math::silu_grad),
            Self::GeluTanh => go(x, out, math::gelu_tanh_grad),
            Self::Gelu => go(x, out, math::gelu_erf_grad),
            Self::Relu => go(x, out, |v| f32::from(v > 0.0)),
            Self::Tanh => go(x, out, |v| {
                let t = math::tanh(v);
                1.0 - t * t
            }),
            Self::LeakyRelu => go(x, out, |v| if v > 0.0 { 1.0 } else { LEAK }),
            Self::Sigmoid => go(x, out, |v| {
                let s = math::sigmoid(v);
                s * (1.0 - s)
            }),
            Self::QuickGelu => go(x, out, |v| {
                let s = math::sigmoid(QUICK * v);
                s * (QUICK * v).mul_add(1.0 - s, 1.0)
            }),
            Self::Relu6 => go(x, out, |v| f32::from(v > 0.0 && v < 6.0)),
            Self::Relu2 => go(x, out, |v| 2.0 * v.max(0.0)),
            Self::Identity => {}
        }
    }
}

/// `grad * f'(x)`.
pub(super) fn mul_grad(act: Act, x: &[f32], grad: &[f32]) -> Vec<f32> {
    let mut out = grad.to_vec();
    par_rows(&mut out, 1, 8, |at, o| act.mul_grad(&x[at..at + o.len()], o));
    out
}

struct Activate(Act);

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(storage, layout)?;
        let mut out = vec![0f32; x.len()];
        par_rows(&mut out, 1, 8, |at, o| self.0.map(&x[at..at + o.len()], o));
        cpu_result(out, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let out = with_f32(&grad.contiguous()?, |g| with_f32(x, |x| Ok(mul_grad(self.0, x, g))))?;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

/// `f(x)`, any shape.
///
/// # Errors
/// Those of candle.
pub fn activate(x: &Tensor, act: Act) -> Result<Tensor> {
    if !is_cpu_f32(x) {
        return act.reference(x);
    }
    let x = x.contiguous()?;
    if x.track_op() { x.apply_op1(Activate(act)) } else { x.apply_op1_no_bwd(&Activate(act)) }
}

struct Gate(Act);

impl CustomOp1 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let half = width / 2;
        let x = f32_slice(storage, layout)?;
        let mut out = vec![0f32; rows * half];
        par_rows(&mut out, half, 8 * half, |first, o| {
            for (i, o) in o.chunks_mut(half).enumerate() {
                let (g, u) = x[(first + i) * width..(first + i + 1) * width].split_at(half);
                self.0.map(g, o);
                vectorized(
                    #[inline(always)]
                    || {
                        for (o, u) in o.iter_mut().zip(u) {
                            *o *= u;
                        }
                    },
                );
            }
        });
        cpu_result(out, (rows, half))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, width) = x.dims2()?;
        let half = width / 2;
        let mut out = vec![0f32; rows * width];
        let grad = grad.contiguous()?;
        with_f32(&grad, |grad| {
            with_f32(x, |x| {
                par_rows(&mut out, width, 20 * half, |first, o| {
                    for (i, o) in o.chunks_mut(width).enumerate() {
                        let row = first + i;
                        let (g, u) = x[row * width..(row + 1) * width].split_at(half);
                        let d = &grad[row * half..(row + 1) * half];
                        let (dg, du) = o.split_at_mut(half);
                        self.0.map(g, du);
                        vectorized(
                            #[inline(always)]
                            || {
                                for j in 0..half {
                                    du[j] *= d[j];
                                    dg[j] = d[j] * u[j];
                                }
                            },
                        );
                        self.0.mul_grad(g, dg);
                    }
                });
                Ok(())
            })
        })?;
        Ok(Some(Tensor::from_vec(out, (rows, width), x.device())?))
    }
}

/// Gated activation (Shazeer 2020): `x = [gate | up]`, `[rows, 2 f]` -> `act(gate) * up`, `[rows, f]`.
///
/// # Errors
/// Those of candle.
pub fn gate(x: &Tensor, act: Act) -> Result<Tensor> {
    if !is_cpu_f32(x) {
        let half = x.dim(D::Minus1)? / 2;
        let g = act.reference(&x.narrow(D::Minus1, 0, half)?.contiguous()?)?;
        return g * x.narrow(D::Minus1, half, half)?;
    }
    let x = x.contiguous()?;
    if x.track_op() { x.apply_op1(Gate(act)) } else { x.apply_op1_no_bwd(&Gate(act)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn close(a: &Tensor, b: &Tensor, tol: f32) {
        let d = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(d <= tol, "differ by {d}");
    }

    #[test]
    fn fast_and_reference_agree_forward_and_backward() {
        for act in Act::NAMES.map(|n| Act::from_hf(n).unwrap()).into_iter().chain([Act::Identity]) {
            assert_eq!(Act::from_hf(act.hf_name()), Some(act));
            let x = Var::randn(0f32, 2.0, (7, 38), &Device::Cpu).unwrap();
            let w = Tensor::randn(0f32, 1.0, (7, 38), &Device::Cpu).unwrap();
            let grad = |y: Tensor, w: &Tensor| {
                let store = (y * w).unwrap().sum_all().unwrap().backward().unwrap();
                store.get(&x).unwrap().clone()
            };
            let fast = activate(&x, act).unwrap();
            let slow = act.reference(&x).unwrap();
            close(&fast, &slow, 3e-6);
            close(&grad(fast, &w), &grad(slow, &w), 3e-5);

            let w = w.narrow(1, 0, 19).unwrap();
            let fast = gate(&x, act).unwrap();
            let slow = (act.reference(&x.narrow(1, 0, 19).unwrap().contiguous().unwrap()).unwrap()
                * x.narrow(1, 19, 19).unwrap())
            .unwrap();
            close(&fast, &slow, 2e-5);
            close(&grad(fast, &w), &grad(slow, &w), 5e-5);
        }
    }
}
