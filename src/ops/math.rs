//! Elementary functions written so that loops over them become vector code (candle calls scalar libm, 10x slower).
//!
//! Each is branch-free and `inline(always)`, to be called inside [`super::vectorized`]. Errors against f64 are asserted
//! below.

/// `e^x`, relative error below 2e-7; 0 below -87, clamped at 88. Cody-Waite reduction and a degree-6 polynomial.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * LOG2E).round_ties_even();
    let r = (-n).mul_add(LN2_LO, (-n).mul_add(LN2_HI, clamped));
    // Taylor coefficients of e^r, enough for |r| <= ln(2)/2
    let p = r.mul_add(1.0 / 720.0, 1.0 / 120.0);
    let p = p.mul_add(r, 1.0 / 24.0);
    let p = p.mul_add(r, 1.0 / 6.0);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    let two_n = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { p * two_n }
}

/// Hyperbolic tangent by [`exp`], absolute error below 3e-7.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let e = exp(2.0 * x.clamp(-15.0, 15.0));
    (e - 1.0) / (e + 1.0)
}

/// Error function, absolute error below 4e-7: an odd rational minimax approximation on [-4, 4].
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let x2 = x * x;
    let p = x2.mul_add(-2.726_142_3e-10, 2.770_681_4e-8);
    let p = p.mul_add(x2, -2.101_024e-6);
    let p = p.mul_add(x2, -5.692_506_5e-5);
    let p = p.mul_add(x2, -7.349_906_3e-4);
    let p = p.mul_add(x2, -2.954_600_1e-3);
    let p = p.mul_add(x2, -1.609_603_3e-2);
    let q = x2.mul_add(-1.456_607_2e-5, -2.133_740_6e-4);
    let q = q.mul_add(x2, -1.682_827e-3);
    let q = q.mul_add(x2, -7.373_329e-3);
    let q = q.mul_add(x2, -1.426_473_9e-2);
    x * p / q
}

/// Logistic function.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// GELU, tanh form (GPT-2's `gelu_new`; Hendrycks & Gimpel 2016).
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    let inner = SQRT_2_OVER_PI * (GELU_CUBIC * x * x).mul_add(x, x);
    0.5 * x * (1.0 + tanh(inner))
}

/// Derivative of [`gelu_tanh`].
#[inline(always)]
pub(super) fn gelu_tanh_grad(x: f32) -> f32 {
    let t = tanh(SQRT_2_OVER_PI * (GELU_CUBIC * x * x).mul_add(x, x));
    let inner_grad = SQRT_2_OVER_PI * (3.0 * GELU_CUBIC * x).mul_add(x, 1.0);
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner_grad
}

/// GELU, exact form (BERT's `gelu`).
#[inline(always)]
pub(super) fn gelu_erf(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Derivative of [`gelu_erf`].
#[inline(always)]
pub(super) fn gelu_erf_grad(x: f32) -> f32 {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * INV_SQRT_2PI * exp(-0.5 * x * x)
}

/// SiLU.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Derivative of [`silu`].
#[inline(always)]
pub(super) fn silu_grad(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (x * (1.0 - s)).mul_add(1.0, 1.0)
}

/// Lanes of [`dot`].
pub(super) const LANES: usize = 8;

/// `a . b` in [`LANES`] lanes, each from front to back, which are folded in halves: the order that attention's scores have however
/// many queries are computed together.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    let (ac, bc) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (x, y) in ac.0.iter().zip(bc.0) {
        for i in 0..LANES {
            acc[i] = x[i].mul_add(y[i], acc[i]);
        }
    }
    for (s, (x, y)) in acc.iter_mut().zip(ac.1.iter().zip(bc.1)) {
        *s = x.mul_add(*y, *s);
    }
    let half: [f32; 4] = std::array::from_fn(|i| acc[i] + acc[i + 4]);
    (half[0] + half[2]) + (half[1] + half[3])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> impl Iterator<Item = f32> {
        (-90_000..=90_000).map(|i| i as f32 * 1e-3)
    }

    /// erf in f64 by its Taylor series (small) or complementary continued fraction (large): independent of the code above.
    fn erf64(x: f64) -> f64 {
        let a = x.abs();
        let v = if a < 3.0 {
            let (mut term, mut sum) = (a, a);
            for n in 1..200 {
                term *= -a * a / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * 2.0 / std::f64::consts::PI.sqrt()
        } else {
            let mut f = 0.0;
            for k in (1..60).rev() {
                f = f64::from(k) / 2.0 / (a + f);
            }
            1.0 - (-a * a).exp() / std::f64::consts::PI.sqrt() / (a + f)
        };
        v.copysign(x)
    }

    #[test]
    fn elementary_functions_are_close_to_f64() {
        for x in grid() {
            let d = f64::from(x);
            let e = d.exp();
            if (-87.0..88.0).contains(&x) {
                assert!((f64::from(exp(x)) - e).abs() <= 2.5e-7 * e, "exp {x}: {} {e}", exp(x));
            }
            assert!((f64::from(tanh(x)) - d.tanh()).abs() < 3e-7, "tanh {x}");
            assert!((f64::from(erf(x)) - erf64(d)).abs() < 4e-7, "erf {x}: {} {}", erf(x), erf64(d));
        }
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn derivatives_match_central_differences() {
        type Scalar = fn(f32) -> f32;
        let pairs: [(Scalar, Scalar); 3] = [(gelu_tanh, gelu_tanh_grad), (gelu_erf, gelu_erf_grad), (silu, silu_grad)];
        for (f, g) in pairs {
            for i in -60..60 {
                let x = i as f32 * 0.1;
                let h = 1e-2;
                let numeric = (f(x + h) - f(x - h)) / (2.0 * h);
                assert!((numeric - g(x)).abs() < 2e-4, "{x}: {numeric} {}", g(x));
            }
        }
    }
}
