//! The variables of a job and the delta that is built of them.
//!
//! The delta's tensors *are* the variables, so an optimizer step changes what the next forward uses without rebuilding
//! anything. Base weights never appear here. Evaluation and publishing get plain tensors ([`Trainable::detached`]).

mod positions;

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, rngs::StdRng};

use positions::{Encoder, Positions, Source, prefix_name};

use crate::{
    delta::{Delta, DeltaSpec, Head, LowRank, Patch, SiteId, SiteTable},
    rows::Ahead,
    train::{
        batches::{self, Stream, dropout_mask},
        spec::{HeadPlan, PatchPlan, TrainSpec},
    },
};

/// A trained tensor.
#[derive(Debug, Clone)]
pub struct NamedVar {
    /// `<module>.lora_A`, `<module>.lora_B` (transposed, as in [`LowRank`]), `<module>.bias`, `head.weight`, `head.bias`,
    /// `prompt`, `prefix.<site>.k`, `prefix.<site>.v`, `prompt.encoder...`, `prefix.encoder...`.
    pub name: String,
    /// The variable, f32.
    pub var: Var,
    /// Whether weight decay applies (matrices, not biases).
    pub decays: bool,
}

/// What the variables form.
#[derive(Debug, Clone, Copy)]
enum Part {
    LowRank { a: usize, b: usize, scale: f64, dropout: f64 },
    Bias(usize),
    Scale(usize),
    Positions(Positions),
}

/// Copies of all variables at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot(Vec<Tensor>);

/// A delta under training.
#[derive(Debug)]
pub struct Trainable {
    spec: DeltaSpec,
    vars: Vec<NamedVar>,
    parts: Vec<(SiteId, Part)>,
    /// Networks that make virtual tokens.
    encoders: Vec<Encoder>,
    head: Option<(usize, Option<usize>)>,
    live: Option<Arc<Delta>>,
}

impl Trainable {
    /// Fresh variables: LoRA's A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5) and B zero, biases zero, head weights
    /// from N(0, 0.02); so before the first step the delta changes nothing but the head. Virtual tokens are random here.
    /// Always f32, whatever the base's type.
    ///
    /// # Errors
    /// The device, or a site that the table does not have.
    pub fn init(spec: &TrainSpec, sites: &SiteTable, seed: u64, device: &Device) -> Result<Self> {
        let mut b = Builder { vars: Vec::new(), rng: batches::rng(seed, Stream::Init), device };
        let mut networks = b.networks(spec)?;
        let mut parts = Vec::with_capacity(spec.patches.len());
        for (site, plan) in &spec.patches {
            let entry = sites.get(*site).ok_or_else(|| candle_core::Error::msg(format!("no site {site}")))?;
            let (module, inputs, outputs) = (&entry.module, entry.in_dim, entry.out_dim);
            let part = match *plan {
                PatchPlan::LowRank { rank, scale, dropout, .. } => {
                    let bound = 1.0 / (inputs.max(1) as f32).sqrt();
                    let a = b.uniform(format!("{module}.lora_A"), (rank, inputs), bound)?;
                    let b = b.zeros(format!("{module}.lora_B"), &[rank, outputs], true)?;
                    Part::LowRank { a, b, scale, dropout }
                }
                PatchPlan::Bias => Part::Bias(b.zeros(format!("{module}.bias"), &[outputs], false)?),
                PatchPlan::Prompt { .. } | PatchPlan::Prefix { .. } => {
                    Part::Positions(b.positions(*site, plan, outputs, &mut networks)?)
                }
            };
            parts.push((*site, part));
        }
        let head = spec.head.map(|h| b.head(h)).transpose()?;
        let delta_spec = DeltaSpec {
            methods: spec.methods.clone(),
            task: spec.task,
            labels: spec.labels.clone(),
            num_virtual_tokens: 0,
            parameters: b.vars.iter().map(|v| v.var.elem_count() as u64).sum(),
            resident_bytes: 0,
        };
        let encoders = networks.encoders;
        Self { spec: delta_spec, vars: b.vars, parts, encoders, head, live: None }.with_live()
    }

    /// Variables with the values of an existing delta, to train it further.
    ///
    /// # Errors
    /// The device, or a site that the table does not have.
    pub fn from_delta(delta: &Delta, sites: &SiteTable) -> Result<Self> {
        let mut vars = Vec::new();
        let mut add = |name: String, t: &Tensor, decays: bool| -> Result<usize> {
            vars.push(NamedVar { name, var: Var::from_tensor(&t.to_dtype(DType::F32)?.copy()?)?, decays });
            Ok(vars.len() - 1)
        };
        let mut parts = Vec::with_capacity(delta.patches().len());
        for (site, patch) in delta.patches() {
            let module = &sites.get(*site).ok_or_else(|| candle_core::Error::msg(format!("no site {site}")))?.module;
            let part = match patch {
                Patch::LowRank(l) => Part::LowRank {
                    a: add(format!("{module}.lora_A"), &l.a, true)?,
                    b: add(format!("{module}.lora_B"), &l.b, true)?,
                    scale: l.scale,
                    dropout: 0.0,
                },
                Patch::Bias(t) => Part::Bias(add(format!("{module}.bias"), t, false)?),
                Patch::Scale(t) => Part::Scale(add(format!("{module}.scale"), t, false)?),
                Patch::Prompt(p) => {
                    let rows = Source::Var(add("prompt".into(), &p.rows, true)?);
                    Part::Positions(Positions::Prompt { rows, stage: p.stage })
                }
                Patch::Prefix(p) => {
                    let k = Source::Var(add(prefix_name(*site, "k"), &p.k, true)?);
                    let v = Source::Var(add(prefix_name(*site, "v"), &p.v, true)?);
                    Part::Positions(Positions::Prefix { k, v, form: p.form })
                }
            };
            parts.push((*site, part));
        }
        let head = match delta.head() {
            Some(h) => {
                let weight = add("head.weight".into(), &h.weight, true)?;
                Some((weight, h.bias.as_ref().map(|t| add("head.bias".into(), t, false)).transpose()?))
            }
            None => None,
        };
        Self { spec: delta.spec.clone(), vars, parts, encoders: Vec::new(), head, live: None }.with_live()
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

    /// The delta for a training forward: gradients reach the variables.
    ///
    /// LoRA's dropout is drawn per input column and micro-batch (one mask for all rows), as a factor on A: its columns
    /// are what the dropped inputs would have met, and no other part of the forward needs to know of it.
    ///
    /// # Errors
    /// The device.
    pub fn delta(&self, dropout: &mut StdRng) -> Result<Arc<Delta>> {
        match &self.live {
            // what a network makes changes with its variables
            Some(delta) if !self.has_dropout() && self.encoders.is_empty() => Ok(Arc::clone(delta)),
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

    /// The delta of a snapshot, independent of the variables, in f32: what is published.
    ///
    /// # Errors
    /// The device.
    pub fn publishable(&self, snapshot: &Snapshot) -> Result<Delta> {
        self.build(|i, var| Ok(snapshot.0.get(i).map_or_else(|| var.as_detached_tensor(), Tensor::clone)), None)
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
        self.vars.iter().zip(&snapshot.0).try_for_each(|(v, t)| v.var.set(t))
    }

    /// A snapshot as safetensors bytes, named as [`NamedVar::name`]: the form of kept checkpoints.
    ///
    /// # Errors
    /// The device or the encoding.
    pub fn checkpoint_bytes(&self, snapshot: &Snapshot) -> Result<Vec<u8>> {
        let on_host = |t: &Tensor| t.to_device(&Device::Cpu);
        let named: HashMap<String, Tensor> = (self.vars.iter().zip(&snapshot.0))
            .map(|(v, t)| Ok((v.name.clone(), on_host(t)?)))
            .collect::<Result<_>>()?;
        safetensors::serialize(&named, None).map_err(candle_core::Error::wrap)
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
            let patch = match *part {
                Part::LowRank { a, b, scale, dropout: p } => {
                    let mut a = get(a)?;
                    if let (Some(rng), true) = (dropout.as_deref_mut(), p > 0.0) {
                        let n = a.dim(1)?;
                        let mask = Tensor::from_vec(dropout_mask(n, p, rng), (1, n), a.device())?;
                        a = a.broadcast_mul(&mask.to_dtype(a.dtype())?)?; // [rank, in]
                    }
                    Patch::LowRank(LowRank { a, b: get(b)?, scale })
                }
                Part::Bias(i) => Patch::Bias(get(i)?),
                Part::Scale(i) => Patch::Scale(get(i)?),
                Part::Positions(positions) => positions.patch(source)?,
            };
            patches.push((*site, patch));
        }
        let head = match self.head {
            Some((weight, bias)) => Some(Head { weight: get(weight)?, bias: bias.map(get).transpose()? }),
            None => None,
        };
        Ok(Delta::new(self.spec.clone(), patches, head))
    }
}

struct Builder<'a> {
    vars: Vec<NamedVar>,
    rng: StdRng,
    device: &'a Device,
}

impl Builder<'_> {
    fn add(&mut self, name: String, t: &Tensor, decays: bool) -> Result<usize> {
        self.vars.push(NamedVar { name, var: Var::from_tensor(t)?, decays });
        Ok(self.vars.len() - 1)
    }

    fn zeros(&mut self, name: String, shape: &[usize], decays: bool) -> Result<usize> {
        let t = Tensor::zeros(shape, DType::F32, self.device)?;
        self.add(name, &t, decays)
    }

    fn uniform(&mut self, name: String, shape: (usize, usize), bound: f32) -> Result<usize> {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| self.rng.random_range(-bound..=bound)).collect();
        let t = Tensor::from_vec(values, shape, self.device)?;
        self.add(name, &t, true)
    }

    fn normal(&mut self, name: String, shape: (usize, usize), std: f32) -> Result<usize> {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| std * normal(&mut self.rng)).collect();
        let t = Tensor::from_vec(values, shape, self.device)?;
        self.add(name, &t, true)
    }

    fn head(&mut self, plan: HeadPlan) -> Result<(usize, Option<usize>)> {
        const STD: f32 = 0.02;
        let values: Vec<f32> = (0..plan.labels * plan.hidden).map(|_| STD * normal(&mut self.rng)).collect();
        let t = Tensor::from_vec(values, (plan.labels, plan.hidden), self.device)?;
        let weight = self.add("head.weight".into(), &t, true)?;
        let bias = if plan.bias { Some(self.zeros("head.bias".into(), &[plan.labels], false)?) } else { None };
        Ok((weight, bias))
    }
}

/// A standard normal draw (Box and Muller 1958).
fn normal(rng: &mut StdRng) -> f32 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::train_params::{BitfitPart, LoraPart, MethodPart},
        delta::Task,
        train::spec::{BaseShape, tests::table},
    };

    fn make(seed: u64, dropout: f64) -> (SiteTable, Trainable) {
        let sites = table(true);
        let methods = [
            MethodPart::Lora(LoraPart { rank: Some(4), dropout: Some(dropout), ..LoraPart::default() }),
            MethodPart::Bitfit(BitfitPart::default()),
        ];
        let base = BaseShape { sites: &sites, hidden: 8, vocab: 32, causal: false };
        let spec = TrainSpec::resolve(&methods, Task::SeqCls, &["a".into(), "b".into()], base).unwrap();
        let t = Trainable::init(&spec, &sites, seed, &Device::Cpu).unwrap();
        assert_eq!(t.spec.parameters, spec.parameters(&sites));
        (sites, t)
    }

    fn values(t: &Trainable) -> Vec<Vec<f32>> {
        t.vars().iter().map(|v| v.var.flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    #[test]
    fn a_fresh_delta_changes_nothing_but_the_head_and_the_seed_decides() {
        let (_, t) = make(3, 0.0);
        for v in t.vars() {
            let max = v.var.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let zero = v.name.ends_with("lora_B") || v.name.ends_with("bias");
            assert_eq!(max == 0.0, zero, "{}", v.name);
            assert!(!v.name.ends_with("lora_A") || max <= 1.0 / 8f32.sqrt());
            assert_eq!(v.decays, !v.name.ends_with("bias"));
        }
        assert_eq!(values(&t), values(&make(3, 0.0).1));
        assert_ne!(values(&t), values(&make(4, 0.0).1));
    }

    #[test]
    fn the_deltas_tensors_are_the_variables() {
        let (_, t) = make(0, 0.0);
        let delta = t.delta(&mut batches::rng(0, Stream::Dropout)).unwrap();
        let loss = match &delta.patches()[0].1 {
            Patch::LowRank(l) => l.b.sum_all().unwrap(),
            other => panic!("{other:?}"),
        };
        let grads = loss.backward().unwrap();
        let b = t.vars().iter().find(|v| v.name.ends_with("lora_B")).unwrap();
        assert!(grads.get(&b.var).is_some());
        assert!(!t.detached().unwrap().patches().iter().any(|(_, p)| matches!(p, Patch::Bias(x) if x.is_variable())));
    }

    #[test]
    fn a_snapshot_keeps_its_values_and_comes_back() {
        let (_, t) = make(0, 0.0);
        let (before, snap) = (values(&t), t.snapshot().unwrap());
        for v in t.vars() {
            v.var.set(&v.var.ones_like().unwrap()).unwrap();
        }
        let kept = t.publishable(&snap).unwrap();
        assert_eq!(
            kept.head().unwrap().weight.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            before[before.len() - 2]
        );
        t.restore(&snap).unwrap();
        assert_eq!(values(&t), before);
        let bytes = t.checkpoint_bytes(&snap).unwrap();
        assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), t.vars().len());
    }

    #[test]
    fn an_existing_delta_is_trained_on_from_its_values() {
        let (sites, t) = make(5, 0.0);
        let again = Trainable::from_delta(&t.detached().unwrap(), &sites).unwrap();
        let sorted = |t: &Trainable| {
            let mut v: Vec<_> = t.vars().iter().map(|v| v.name.clone()).zip(values(t)).collect();
            v.sort_by(|a, b| a.0.cmp(&b.0));
            v
        };
        assert_eq!(sorted(&t), sorted(&again));
    }

    #[test]
    fn dropout_drops_columns_of_a_while_training_only() {
        let (_, t) = make(0, 0.5);
        let delta = t.delta(&mut batches::rng(1, Stream::Dropout)).unwrap();
        let zeros = |d: &Delta| match &d.patches()[0].1 {
            Patch::LowRank(l) => l.a.to_vec2::<f32>().unwrap()[0].iter().filter(|x| **x == 0.0).count(),
            other => panic!("{other:?}"),
        };
        assert!((1..8).contains(&zeros(&delta)));
        assert_eq!(zeros(&t.detached().unwrap()), 0);
    }
}
