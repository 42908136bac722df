//! The variables of a job and the delta that is built of them.
//!
//! The delta's tensors *are* the variables, so an optimizer step changes what the next forward uses without rebuilding
//! anything. Base weights never appear here. Evaluation and publishing get plain tensors ([`Trainable::detached`]).

mod full;
mod init;
mod mixed;
mod positions;

use std::{collections::HashMap, sync::Arc};

use candle_core::{Device, Result, Tensor, TensorId, Var};
use rand::rngs::StdRng;

use positions::{Encoder, Positions, Source, prefix_name};

use crate::{
    delta::{Delta, DeltaSpec, Head, LowRank, Patch, SiteId, SiteTable},
    model::Base,
    rows::Ahead,
    train::{
        batches::dropout_mask,
        spec::{PatchPlan, TrainSpec},
    },
};

/// A trained tensor.
#[derive(Debug, Clone)]
pub struct NamedVar {
    /// `<module>.<tensor>`, the tensor's name as in [`Patch::tensors`] (`lora_A`, `lora_B` (transposed, as in [`LowRank`]),
    /// `bias`, ...); `head.weight`, `head.bias`, `head.0.weight`, `head.0.bias` (a layer before); `prompt`,
    /// `prefix.<site>.k`, `prefix.<site>.v`, `prompt.encoder...`, `prefix.encoder...`; of a private copy, the stored name.
    pub name: String,
    /// The variable, f32.
    pub var: Var,
    /// Whether weight decay applies (matrices, not biases, gains or scales).
    pub decays: bool,
    /// Multiplies the learning rate (LoRA+).
    pub rate: f64,
}

/// What the variables form.
#[derive(Debug, Clone)]
enum Part {
    LowRank {
        a: usize,
        b: usize,
        scale: f64,
        dropout: f64,
        /// Subtracted while training: what the factors started from (PiSSA).
        start: Option<LowRank>,
    },
    /// Virtual tokens.
    Positions(Positions),
    /// Deltas that stay as they are, under weights that are trained.
    Mixed(mixed::Mixed),
    /// Any other patch: its form, and the variables in the order of its tensors.
    Other { form: Patch, vars: Vec<usize> },
}

/// Copies of all variables at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot(Vec<Tensor>);

impl Snapshot {
    /// Of values in the order of the variables.
    pub(super) fn of(values: Vec<Tensor>) -> Self {
        Self(values)
    }

    /// Values in the order of the variables.
    pub(super) fn tensors(&self) -> &[Tensor] {
        &self.0
    }
}

/// A delta under training.
#[derive(Debug)]
pub struct Trainable {
    spec: DeltaSpec,
    vars: Vec<NamedVar>,
    parts: Vec<(SiteId, Part)>,
    /// Networks that make virtual tokens.
    encoders: Vec<Encoder>,
    /// The head's form, and its variables in the order of its tensors.
    head: Option<(Head, Vec<usize>)>,
    live: Option<Arc<Delta>>,
    /// All weights of the base in a copy, which are the first variables.
    full: Option<full::Copied>,
}

impl Trainable {
    /// Fresh variables: LoRA's A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5) and B zero, biases zero, head weights
    /// from N(0, 0.02); so before the first step the delta changes nothing but the head. Virtual tokens are random here.
    /// Always f32, whatever the base's type. For methods that need nothing of the base's weights; others:
    /// [`Self::init_on`].
    ///
    /// # Errors
    /// The device, a site that the table does not have, a method that starts from the base's weights.
    pub fn init(spec: &TrainSpec, sites: &SiteTable, seed: u64, device: &Device) -> Result<Self> {
        init::build(spec, sites, None, seed, device)
    }

    /// As [`Self::init`], for every method: scales start at one, norms and token rows at the base's values, DoRA's
    /// magnitudes at the base's column norms, adapters at N(0, 0.02) down and zero up, PiSSA at the largest singular
    /// directions of the base's matrices.
    ///
    /// # Errors
    /// The device.
    pub fn init_on(spec: &TrainSpec, base: &Base, seed: u64) -> Result<Self> {
        init::build(spec, &base.sites, Some(base), seed, &base.device)
    }

    /// Variables with the values of an existing delta, to train it further. (The norm of a DoRA patch that is served is that
    /// of its values: right for gradients there; to change them, put it over its matrix first, [`Delta::over`].)
    ///
    /// # Errors
    /// The device, or a site that the table does not have.
    pub fn from_delta(delta: &Delta, sites: &SiteTable) -> Result<Self> {
        let mut vars = Vec::new();
        // a tensor that two patches share (token rows under a tied head) is one variable
        let mut seen: HashMap<TensorId, usize> = HashMap::new();
        let mut add = |name: String, t: &Tensor| -> Result<usize> {
            if let Some(i) = seen.get(&t.id()) {
                return Ok(*i);
            }
            let var = init::own_var(t)?;
            vars.push(NamedVar { name, var, decays: t.rank() > 1, rate: 1.0 });
            seen.insert(t.id(), vars.len() - 1);
            Ok(vars.len() - 1)
        };
        let mut parts = Vec::with_capacity(delta.patches().len());
        for (site, patch) in delta.patches() {
            let entry = sites.get(*site).ok_or_else(|| candle_core::Error::msg(format!("no site {site}")))?;
            let module = entry.label();
            let part = match patch {
                Patch::LowRank(l) => Part::LowRank {
                    a: add(format!("{module}.lora_A"), &l.a)?,
                    b: add(format!("{module}.lora_B"), &l.b)?,
                    scale: l.scale,
                    dropout: 0.0,
                    start: None,
                },
                Patch::Prompt(p) => {
                    let rows = Source::Var(add("prompt".into(), &p.rows)?);
                    Part::Positions(Positions::Prompt { rows, stage: p.stage, stack: p.stack })
                }
                Patch::Prefix(p) => {
                    let k = Source::Var(add(prefix_name(*site, "k"), &p.k)?);
                    let v = Source::Var(add(prefix_name(*site, "v"), &p.v)?);
                    Part::Positions(Positions::Prefix { k, v, form: p.form, stack: p.stack })
                }
                other => {
                    let vars = other.tensors().into_iter().map(|(name, t)| add(format!("{module}.{name}"), t));
                    Part::Other { vars: vars.collect::<Result<_>>()?, form: other.clone() }
                }
            };
            parts.push((*site, part));
        }
        let head = match delta.head() {
            Some(h) => {
                let vars = h.tensors().into_iter().map(|(name, t)| add(name, t)).collect::<Result<_>>()?;
                Some((h.clone(), vars))
            }
            None => None,
        };
        Self { spec: delta.spec.clone(), vars, parts, encoders: Vec::new(), head, live: None, full: None }.with_live()
    }

    /// As [`Self::from_delta`], for a job: with the specification's dropout and learning rates, and a fresh head where the
    /// delta has none and the task wants one.
    ///
    /// # Errors
    /// As [`Self::from_delta`].
    pub fn continuing(delta: &Delta, spec: &TrainSpec, sites: &SiteTable, seed: u64, device: &Device) -> Result<Self> {
        let mut own = Self::from_delta(delta, sites)?;
        for (site, plan) in &spec.patches {
            let (PatchPlan::LowRank(p) | PatchPlan::Dora(p)) = plan else { continue };
            for (_, part) in own.parts.iter_mut().filter(|(s, _)| s == site) {
                match part {
                    Part::LowRank { b, dropout, .. } => {
                        *dropout = p.dropout;
                        own.vars[*b].rate = p.b_rate;
                    }
                    Part::Other { form: Patch::Dora(_), vars } => {
                        for i in vars.iter() {
                            if own.vars[*i].name.ends_with(".lora_B") {
                                own.vars[*i].rate = p.b_rate;
                            }
                        }
                    }
                    Part::Positions(_) | Part::Mixed(_) | Part::Other { .. } => {}
                }
            }
        }
        if let (None, Some(plan)) = (&own.head, spec.head) {
            let (head, vars) = init::fresh_head(plan, seed, device)?;
            let first = own.vars.len();
            own.head = Some((head, (first..first + vars.len()).collect()));
            own.vars.extend(vars);
        }
        own.spec = DeltaSpec {
            methods: spec.methods.clone(),
            task: spec.task,
            problem: spec.problem,
            labels: spec.labels.clone(),
            parameters: own.vars.iter().map(|v| v.var.elem_count() as u64).sum(),
            ..own.spec
        };
        own.with_live()
    }

    /// The variables, in a fixed order.
    pub fn vars(&self) -> &[NamedVar] {
        &self.vars
    }

    /// What the delta puts ahead of the tokens.
    pub fn ahead(&self) -> Ahead {
        self.live.as_ref().map(|d| d.ahead()).unwrap_or_default()
    }

    /// Whether any part asks for dropout.
    pub fn has_dropout(&self) -> bool {
        self.parts.iter().any(|(_, p)| matches!(p, Part::LowRank { dropout, .. } if *dropout > 0.0))
    }

    /// Whether nothing but a head is trained: no gradient goes into the base's layers.
    pub fn is_head_alone(&self) -> bool {
        self.parts.is_empty() && !self.is_full()
    }

    /// The delta for a training forward: gradients reach the variables.
    ///
    /// LoRA's dropout is drawn per input column and micro-batch (one mask for all rows), as a factor on A: its columns
    /// are what the dropped inputs would have met, and no other part of the forward needs to know of it.
    ///
    /// # Errors
    /// The device.
    pub fn delta(&self, dropout: &mut StdRng) -> Result<Arc<Delta>> {
        match &self.live {
            // what a network makes changes with its variables, and so does a weighted sum
            Some(delta) if !self.has_dropout() && self.encoders.is_empty() && !self.is_mixing() => {
                Ok(Arc::clone(delta))
            }
            _ => Ok(Arc::new(self.build(|_, var| Ok(var.as_tensor().clone()), Some(dropout))?)),
        }
    }

    /// The same delta with plain tensors, for evaluation: shares the variables' storage, so it is good until the next
    /// step only.
    ///
    /// # Errors
    /// The device.
    pub fn detached(&self) -> Result<Delta> {
        self.build(|_, var| Ok(var.as_detached_tensor()), None)
    }

    /// The delta of a snapshot, independent of the variables, in f32: what is published. A pair that is trained beside
    /// its start becomes one pair of twice the rank, so that the base stays as it is.
    ///
    /// # Errors
    /// The device.
    pub fn publishable(&self, snapshot: &Snapshot) -> Result<Delta> {
        let get = |i: usize, var: &Var| Ok(snapshot.0.get(i).map_or_else(|| var.as_detached_tensor(), Tensor::clone));
        let delta = self.build(get, None)?;
        let mut patches: Vec<(SiteId, Patch)> = Vec::new();
        for (site, patch) in delta.patches() {
            match (patches.last_mut(), patch) {
                (Some((last, Patch::LowRank(own))), Patch::LowRank(start)) if last == site => {
                    own.a = Tensor::cat(&[&own.a, &start.a], 0)?; // [2 rank, in]
                    own.b = Tensor::cat(&[&own.b, &start.b], 0)?;
                }
                _ => patches.push((*site, patch.clone())),
            }
        }
        Ok(Delta::new(delta.spec.clone(), patches, delta.head().cloned()))
    }

    /// Copies of all variables.
    ///
    /// # Errors
    /// The device.
    pub fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot(self.vars.iter().map(|v| v.var.as_detached_tensor().copy()).collect::<Result<_>>()?))
    }

    /// Puts a snapshot's values back.
    ///
    /// # Errors
    /// The device.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        self.full.iter().for_each(|full| full.changes());
        self.vars.iter().zip(&snapshot.0).try_for_each(|(v, t)| v.var.set(t))
    }

    /// A snapshot as safetensors bytes, named as [`NamedVar::name`]: the form of kept checkpoints. `None` of a whole model,
    /// which is too large to be kept in memory and as a blob.
    ///
    /// # Errors
    /// The device or the encoding.
    pub fn checkpoint_bytes(&self, snapshot: &Snapshot) -> Result<Option<Vec<u8>>> {
        if self.is_full() {
            return Ok(None);
        }
        let on_host = |t: &Tensor| t.to_device(&Device::Cpu);
        let named: HashMap<String, Tensor> = (self.vars.iter().zip(&snapshot.0))
            .map(|(v, t)| Ok((v.name.clone(), on_host(t)?)))
            .collect::<Result<_>>()?;
        safetensors::serialize(&named, None).map(Some).map_err(candle_core::Error::wrap)
    }

    fn with_live(mut self) -> Result<Self> {
        self.live = Some(Arc::new(self.build(|_, var| Ok(var.as_tensor().clone()), None)?));
        Ok(self)
    }

    fn build(&self, tensor: impl Fn(usize, &Var) -> Result<Tensor>, mut dropout: Option<&mut StdRng>) -> Result<Delta> {
        let get = |i: usize| tensor(i, &self.vars[i].var);
        let made: Vec<Tensor> = self.encoders.iter().map(|e| e.run(get)).collect::<Result<_>>()?;
        let source = |s: Source| match s {
            Source::Var(i) => get(i),
            Source::Made { encoder, from, len } => made[encoder].narrow(1, from, len)?.contiguous(),
        };
        let mut patches = Vec::with_capacity(self.parts.len());
        for (site, part) in &self.parts {
            match part {
                Part::LowRank { a, b, scale, dropout: p, start } => {
                    let mut a = get(*a)?;
                    if let (Some(rng), true) = (dropout.as_deref_mut(), *p > 0.0) {
                        let n = a.dim(1)?;
                        let mask = Tensor::from_vec(dropout_mask(n, *p, rng), (1, n), a.device())?;
                        a = a.broadcast_mul(&mask.to_dtype(a.dtype())?)?; // [rank, in]
                    }
                    patches.push((*site, Patch::LowRank(LowRank { a, b: get(*b)?, scale: *scale })));
                    patches.extend(start.iter().map(|s| (*site, Patch::LowRank(s.clone()))));
                }
                Part::Mixed(mixed) => patches.extend(mixed.patches(get)?.into_iter().map(|p| (*site, p))),
                Part::Positions(positions) => patches.push((*site, positions.patch(source)?)),
                Part::Other { form, vars } => {
                    let mut vars = vars.iter();
                    let patch = form.map(&mut |_, t| vars.next().map_or_else(|| Ok(t.clone()), |i| get(*i)))?;
                    patches.push((*site, patch));
                }
            }
        }
        let head = match &self.head {
            Some((form, vars)) => {
                let mut vars = vars.iter();
                Some(form.map(&mut |_, t| vars.next().map_or_else(|| Ok(t.clone()), |i| get(*i)))?)
            }
            None => None,
        };
        Ok(Delta::new(self.spec.clone(), patches, head))
    }
}

#[cfg(test)]
mod tests;
