//! Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021; parallel: He et al. 2022), wired as AdapterHub does.
//!
//! With `h` the sublayer's output and `x` its residual input, the half ends as `norm(h' + x)` (or `h' + x` in a pre-norm
//! block), `h' = residual + scaling * (up(act(down(input))))`. What `input` and `residual` are is the [`Wiring`].

use candle_core::{Result, Tensor, bail};

use super::Affine;
use crate::ops::{self, Act};

/// What the adapter reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterInput {
    /// `h` (Houlsby).
    Output,
    /// `norm(h + x)` by the block's own norm, `h + x` in a pre-norm block (Pfeiffer: `original_ln_before`).
    Sum,
    /// `x` (parallel).
    Residual,
}

/// What the adapter's result is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterResidual {
    /// `h` (`residual_before_ln`; always in parallel adapters).
    Output,
    /// `h + x` before the block's norm (`residual_before_ln: "post_add"`).
    Sum,
    /// What the adapter read.
    Input,
}

/// How an adapter is put into its half block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wiring {
    /// What it reads.
    pub input: AdapterInput,
    /// What its result is added to.
    pub residual: AdapterResidual,
    /// The residual joins before the adapter's own closing norm (`adapter_residual_before_ln`).
    pub residual_first: bool,
    /// `h' + x` and the block's norm follow (`original_ln_after`); otherwise `h'` is the half's result.
    pub closes: bool,
}

impl Wiring {
    /// Houlsby's: reads and adds to the sublayer's output.
    pub const SEQUENTIAL: Self =
        Self { input: AdapterInput::Output, residual: AdapterResidual::Output, residual_first: false, closes: true };
    /// Pfeiffer's: reads the block's normalised sum, adds to the sublayer's output.
    pub const AFTER_NORM: Self = Self { input: AdapterInput::Sum, ..Self::SEQUENTIAL };
    /// He's: reads the sublayer's residual input.
    pub const PARALLEL: Self = Self { input: AdapterInput::Residual, ..Self::SEQUENTIAL };
}

/// The factor of an adapter's result.
#[derive(Debug, Clone)]
pub enum Scaling {
    /// A number of the configuration.
    Fixed(f64),
    /// Trained: `[1]`, or one per channel `[hidden]`.
    Learned(Tensor),
}

/// An adapter of one half block.
#[derive(Debug, Clone)]
pub struct Bottleneck {
    /// `[d, hidden]`.
    pub down: Tensor,
    /// `[d]`.
    pub down_bias: Tensor,
    /// `[d, hidden]`: the file's `adapter_up.weight` transposed, so that each unit's row is contiguous.
    pub up: Tensor,
    /// `[hidden]`.
    pub up_bias: Tensor,
    /// Its nonlinearity.
    pub act: Act,
    /// Its factor.
    pub scaling: Scaling,
    /// A norm of its own ahead of `down`.
    pub norm_before: Option<Affine>,
    /// A norm of its own after the factor.
    pub norm_after: Option<Affine>,
    /// Where it sits.
    pub wiring: Wiring,
}

/// Rows that an adapter may read, beside the sublayer's output: `[rows, hidden]` each.
#[derive(Debug, Clone)]
pub(crate) struct AdapterIo {
    /// `x`.
    pub(crate) residual: Tensor,
    /// `h + x`, if anyone asked for it.
    pub(crate) sum: Option<Tensor>,
    /// `norm(h + x)`, or `h + x`, if anyone asked for it.
    pub(crate) normed: Option<Tensor>,
}

impl AdapterIo {
    /// The same for some rows, picked by `f`.
    pub(crate) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            residual: f(&self.residual)?,
            sum: self.sum.as_ref().map(&f).transpose()?,
            normed: self.normed.as_ref().map(&f).transpose()?,
        })
    }
}

impl Bottleneck {
    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = vec![
            ("adapter_down.weight", &self.down),
            ("adapter_down.bias", &self.down_bias),
            ("adapter_up.weight", &self.up),
            ("adapter_up.bias", &self.up_bias),
        ];
        if let Scaling::Learned(t) = &self.scaling {
            all.push(("scaling", t));
        }
        for (norm, names) in [
            (&self.norm_before, ["adapter_norm_before.weight", "adapter_norm_before.bias"]),
            (&self.norm_after, ["adapter_norm_after.weight", "adapter_norm_after.bias"]),
        ] {
            if let Some(n) = norm {
                all.push((names[0], &n.gain));
                all.extend(n.bias.iter().map(|b| (names[1], b)));
            }
        }
        all
    }

    pub(super) fn map(&self, f: &mut dyn FnMut(&'static str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            down: f("adapter_down.weight", &self.down)?,
            down_bias: f("adapter_down.bias", &self.down_bias)?,
            up: f("adapter_up.weight", &self.up)?,
            up_bias: f("adapter_up.bias", &self.up_bias)?,
            scaling: match &self.scaling {
                Scaling::Fixed(v) => Scaling::Fixed(*v),
                Scaling::Learned(t) => Scaling::Learned(f("scaling", t)?),
            },
            norm_before: (self.norm_before.as_ref())
                .map(|n| n.map_as(["adapter_norm_before.weight", "adapter_norm_before.bias"], f))
                .transpose()?,
            norm_after: (self.norm_after.as_ref())
                .map(|n| n.map_as(["adapter_norm_after.weight", "adapter_norm_after.bias"], f))
                .transpose()?,
            act: self.act,
            wiring: self.wiring,
        })
    }

    /// What it reads of the rows at hand; `None` = the sublayer's output itself.
    pub(crate) fn input<'a>(&self, io: &'a AdapterIo) -> Result<Option<&'a Tensor>> {
        match self.wiring.input {
            AdapterInput::Output => Ok(None),
            AdapterInput::Residual => Ok(Some(&io.residual)),
            AdapterInput::Sum => match &io.normed {
                Some(t) => Ok(Some(t)),
                None => bail!("an adapter that reads the normalised sum was not given it"),
            },
        }
    }

    /// What its result is added to; `None` = the sublayer's output itself.
    pub(crate) fn residual<'a>(&self, io: &'a AdapterIo) -> Result<Option<&'a Tensor>> {
        match self.wiring.residual {
            AdapterResidual::Output => Ok(None),
            AdapterResidual::Input => self.input(io),
            AdapterResidual::Sum => match &io.sum {
                Some(t) => Ok(Some(t)),
                None => bail!("an adapter that adds to the sum was not given it"),
            },
        }
    }

    /// The reference: `h'` of rows that all belong to its delta, `h` `[rows, hidden]`. Differentiable.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn apply(&self, h: &Tensor, io: &AdapterIo) -> Result<Tensor> {
        let input = self.input(io)?.unwrap_or(h);
        let residual = self.residual(io)?.unwrap_or(h);
        let mut y = self.core(input)?;
        if self.wiring.residual_first {
            y = (y + residual)?;
        }
        if let Some(norm) = &self.norm_after {
            y = norm.apply(&y)?;
        }
        if self.wiring.residual_first { Ok(y) } else { residual + y }
    }

    /// `scaling * (up(act(down(norm(input)))) + bias)`, `[rows, hidden]`.
    fn core(&self, input: &Tensor) -> Result<Tensor> {
        let dtype = input.dtype();
        let of = |t: &Tensor| t.to_dtype(dtype);
        let input = match &self.norm_before {
            Some(norm) => norm.apply(input)?,
            None => input.clone(),
        };
        let low = ops::times_turned(&input.contiguous()?, &of(&self.down)?)?;
        let low = ops::add_bias(&low, &of(&self.down_bias)?)?; // [rows, d]
        let y = ops::times(&ops::activate(&low, self.act)?, &of(&self.up)?)?;
        let y = ops::add_bias(&y, &of(&self.up_bias)?)?;
        match &self.scaling {
            Scaling::Fixed(1.0) => Ok(y),
            Scaling::Fixed(s) => y * *s,
            Scaling::Learned(s) => y.broadcast_mul(&of(s)?),
        }
    }

    /// Whether the row kernel covers it: no norms of its own.
    pub(crate) fn is_plain(&self) -> bool {
        self.norm_before.is_none() && self.norm_after.is_none()
    }
}
