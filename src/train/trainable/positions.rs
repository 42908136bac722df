//! Variables of methods that add positions: virtual tokens themselves, or a network that makes them while training
//! (only what it makes is saved and served).

use std::collections::HashMap;

use candle_core::{Result, Tensor, bail};

use super::{Part, Trainable, init::Builder};
use crate::{
    delta::{Patch, Prefix, PrefixForm, Prompt, PromptStage, SiteId, Stack},
    ops::{self, Act},
    train::spec::{EncoderPlan, PatchPlan, TrainSpec},
};

/// Where a patch's tensor comes from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// A variable.
    Var(usize),
    /// Columns `from .. from + len` of what a network makes.
    Made { encoder: usize, from: usize, len: usize },
}

/// What the variables of added positions form.
#[derive(Debug, Clone, Copy)]
pub(super) enum Positions {
    Prompt { rows: Source, stage: PromptStage, stack: Stack },
    Prefix { k: Source, v: Source, form: PrefixForm, stack: Stack },
}

impl Positions {
    /// The patch, with tensors from `get`.
    pub(super) fn patch(self, get: impl Fn(Source) -> Result<Tensor>) -> Result<Patch> {
        Ok(match self {
            Self::Prompt { rows, stage, stack } => Patch::Prompt(Prompt { rows: get(rows)?, stage, stack }),
            Self::Prefix { k, v, form, stack } => Patch::Prefix(Prefix { k: get(k)?, v: get(v)?, form, stack }),
        })
    }
}

/// A table and linears, as indices of variables.
#[derive(Debug)]
pub(super) struct Encoder {
    table: usize,
    /// Weight `[out, in]` and bias `[out]`.
    linears: Vec<(usize, usize)>,
    act: Act,
}

impl Encoder {
    /// What it makes: `[n, outputs]`.
    ///
    /// # Errors
    /// The device.
    pub(super) fn run(&self, get: impl Fn(usize) -> Result<Tensor>) -> Result<Tensor> {
        let mut x = get(self.table)?;
        for (i, &(weight, bias)) in self.linears.iter().enumerate() {
            if i > 0 {
                x = ops::activate(&x, self.act)?;
            }
            x = x.matmul(&get(weight)?.t()?)?.broadcast_add(&get(bias)?)?;
        }
        Ok(x)
    }
}

/// The networks of a specification: that of the prompt first.
pub(super) struct Networks {
    pub(super) encoders: Vec<Encoder>,
    prompt: Option<usize>,
    prefix: Option<usize>,
    /// Columns of the prefix's network that are handed out.
    taken: usize,
    /// Keys and values by site, for layers that share them.
    made: HashMap<SiteId, (Source, Source)>,
}

impl Builder<'_> {
    fn uniform_var(&mut self, name: String, shape: (usize, usize), bound: f32) -> Result<usize> {
        let t = self.uniform(shape, bound)?;
        self.add(name, &t, true, 1.0)
    }

    fn normal_var(&mut self, name: String, shape: (usize, usize), std: f32) -> Result<usize> {
        let t = self.gaussian(shape, std)?;
        self.add(name, &t, true, 1.0)
    }

    /// Variables of all networks.
    pub(super) fn networks(&mut self, spec: &TrainSpec) -> Result<Networks> {
        let mut out = Networks { encoders: Vec::new(), prompt: None, prefix: None, taken: 0, made: HashMap::new() };
        let plans = [("prompt", &spec.positions.prompt), ("prefix", &spec.positions.prefix)];
        for (name, plan) in plans {
            let Some(plan) = plan.as_ref().and_then(|p| p.encoder.as_ref()) else { continue };
            let index = Some(out.encoders.len());
            if name == "prompt" {
                out.prompt = index;
            } else {
                out.prefix = index;
            }
            out.encoders.push(self.encoder(name, plan)?);
        }
        Ok(out)
    }

    /// As torch makes it: the table from N(0, 1), linears uniform in +-1/sqrt(in).
    fn encoder(&mut self, name: &str, plan: &EncoderPlan) -> Result<Encoder> {
        let width = plan.widths.first().copied().unwrap_or(0);
        let table = self.normal_var(format!("{name}.encoder.table"), (plan.n, width), 1.0)?;
        let mut linears = Vec::new();
        for (i, w) in plan.widths.windows(2).enumerate() {
            let bound = 1.0 / (w[0].max(1) as f32).sqrt();
            let weight = self.uniform_var(format!("{name}.encoder.{i}.weight"), (w[1], w[0]), bound)?;
            let row = self.uniform_var(format!("{name}.encoder.{i}.bias"), (1, w[1]), bound)?; // [1, out]
            linears.push((weight, row));
        }
        Ok(Encoder { table, linears, act: plan.act })
    }

    /// The part of a plan at its site, which is `width` wide. Values that the base decides are set later.
    pub(super) fn positions(
        &mut self,
        site: SiteId,
        plan: &PatchPlan,
        width: usize,
        networks: &mut Networks,
    ) -> Result<Positions> {
        const PREFIX_STD: f32 = 0.02;
        const PROMPT_BOUND: f32 = 0.5;
        let stage = PromptStage::Tokens;
        let (k, v) = match (plan, networks.prompt, networks.prefix) {
            (&PatchPlan::Prompt { made: true, stack, .. }, Some(encoder), _) => {
                let rows = Source::Made { encoder, from: 0, len: width };
                return Ok(Positions::Prompt { rows, stage, stack });
            }
            (&PatchPlan::Prompt { n, made: false, stack }, ..) => {
                let rows = Source::Var(self.uniform_var("prompt".into(), (n, width), PROMPT_BOUND)?);
                return Ok(Positions::Prompt { rows, stage, stack });
            }
            (PatchPlan::Prefix { like: Some(like), .. }, ..) => match networks.made.get(like) {
                Some(shared) => *shared,
                None => bail!("site {site} shares the keys of site {like}, which has none"),
            },
            (&PatchPlan::Prefix { made: true, .. }, _, Some(encoder)) => {
                let from = networks.taken;
                networks.taken += 2 * width;
                let made = |from| Source::Made { encoder, from, len: width };
                (made(from), made(from + width))
            }
            (&PatchPlan::Prefix { n, made: false, .. }, ..) => {
                let k = Source::Var(self.normal_var(prefix_name(site, "k"), (n, width), PREFIX_STD)?);
                let v = Source::Var(self.normal_var(prefix_name(site, "v"), (n, width), PREFIX_STD)?);
                (k, v)
            }
            _ => bail!("no network makes {plan:?}"),
        };
        networks.made.insert(site, (k, v));
        let &PatchPlan::Prefix { form, stack, .. } = plan else { bail!("{plan:?} is no prefix") };
        Ok(Positions::Prefix { k, v, form, stack })
    }
}

/// The name of a prefix's variable: its site's index tells the layers apart.
pub(super) fn prefix_name(site: SiteId, which: &str) -> String {
    format!("prefix.{site}.{which}")
}

impl Trainable {
    /// Sets the rows of a prompt that is trained itself, `[n, hidden]`.
    ///
    /// # Errors
    /// Another shape, or no such prompt.
    pub fn set_prompt(&self, rows: &Tensor) -> Result<()> {
        for (_, part) in &self.parts {
            if let Part::Positions(Positions::Prompt { rows: Source::Var(at), .. }) = part {
                return self.set(*at, rows);
            }
        }
        bail!("no prompt is trained")
    }

    /// Sets a layer's keys and values of a prefix that is trained itself, `[n, kv_width]` each.
    ///
    /// # Errors
    /// Another shape, or no such prefix.
    pub fn set_prefix(&self, site: SiteId, keys: &Tensor, values: &Tensor) -> Result<()> {
        for (_, part) in self.parts.iter().filter(|(s, _)| *s == site) {
            if let Part::Positions(Positions::Prefix { k: Source::Var(k), v: Source::Var(v), .. }) = part {
                self.set(*k, keys)?;
                return self.set(*v, values);
            }
        }
        bail!("no prefix is trained at site {site}")
    }

    fn set(&self, at: usize, value: &Tensor) -> Result<()> {
        let var = &self.vars[at].var;
        var.set(&value.detach().to_dtype(var.dtype())?.to_device(var.device())?.contiguous()?)
    }
}
