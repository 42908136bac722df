//! Variables that are the weights of deltas, which themselves stay as they are ([`crate::train::mixing`]).

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor, Var};

use super::{NamedVar, Part, Snapshot, Trainable, init};
use crate::{
    admission::train_params::MixRow,
    delta::{DeltaSpec, Head, LowRank, Patch, SiteId},
    model::Base,
    train::{mixing::Mix, spec::TrainSpec},
};

/// A fresh head's share of the learning rate: weights of deltas are moved by tenths, a head's by hundredths.
const HEAD_RATE: f64 = 0.05;

/// What is weighted at a site.
#[derive(Debug, Clone)]
pub(super) struct Mixed {
    /// The variable, `[deltas]`.
    weights: usize,
    /// Low-rank updates side by side: A `[ranks, in]`, B times its scale `[ranks, out]`, and whose each rank is, `[ranks]`.
    pairs: Option<(Tensor, Tensor, Tensor)>,
    /// Biases, `[n, out]`, and whose each is, `[n]`.
    biases: Option<(Tensor, Tensor)>,
}

impl Mixed {
    /// The weighted sum, with the weights from `get`.
    ///
    /// # Errors
    /// The device.
    pub(super) fn patches(&self, get: impl Fn(usize) -> Result<Tensor>) -> Result<Vec<Patch>> {
        let weights = get(self.weights)?;
        let column = |of: &Tensor| weights.index_select(of, 0)?.unsqueeze(1);
        let mut out = Vec::new();
        if let Some((a, b, of)) = &self.pairs {
            let b = b.broadcast_mul(&column(of)?)?; // [ranks, out]
            out.push(Patch::LowRank(LowRank { a: a.clone(), b, scale: 1.0 }));
        }
        if let Some((biases, of)) = &self.biases {
            out.push(Patch::Bias(biases.broadcast_mul(&column(of)?)?.sum(0)?));
        }
        Ok(out)
    }
}

/// What a layer's weights are called; `None`: all that has no weights of its own.
fn name(layer: Option<usize>) -> String {
    layer.map_or_else(|| "mix".to_owned(), |layer| format!("mix.{layer}"))
}

impl Trainable {
    /// Variables that are the weights of deltas, equal and adding up to 1, and a fresh head where the task wants one.
    ///
    /// # Errors
    /// The device, or a site that the table does not have.
    pub(in crate::train) fn mixing(mix: &Mix, spec: &TrainSpec, base: &Base, seed: u64) -> Result<Self> {
        let n = mix.deltas.len();
        let mut at: BTreeMap<SiteId, Vec<(u32, &Patch)>> = BTreeMap::new();
        for (i, delta) in mix.deltas.iter().enumerate() {
            delta.patches().iter().for_each(|(site, p)| at.entry(*site).or_default().push((i as u32, p)));
        }
        let layers: Vec<Option<usize>> = mix.layers(&base.sites).into_iter().collect();
        let mut vars: Vec<NamedVar> = Vec::with_capacity(layers.len());
        for layer in &layers {
            let var = Var::from_tensor(&Tensor::full(1.0 / n as f32, n, &base.device)?)?;
            vars.push(NamedVar { name: name(*layer), var, decays: false, rate: 1.0 });
        }
        let mut parts = Vec::with_capacity(at.len());
        for (site, patches) in &at {
            let layer = mix.layer(*site, &base.sites);
            let found = layers.iter().position(|l| *l == layer);
            let weights = found.ok_or_else(|| candle_core::Error::msg(format!("no site {site}")))?;
            parts.push((*site, Part::Mixed(mixed(weights, patches, base)?)));
        }
        let mut head = None;
        if let Some(plan) = spec.head {
            let (form, fresh): (Head, Vec<NamedVar>) = init::fresh_head(plan, seed, &base.device)?;
            let first = vars.len();
            head = Some((form, (first..first + fresh.len()).collect()));
            vars.extend(fresh.into_iter().map(|v| NamedVar { rate: HEAD_RATE, ..v }));
        }
        let taken: u64 = mix.deltas.iter().map(|d| d.spec.parameters).sum();
        let own: usize = vars[layers.len()..].iter().map(|v| v.var.elem_count()).sum();
        let first = mix.deltas.first().ok_or_else(|| candle_core::Error::msg("nothing to mix"))?;
        let spec = DeltaSpec {
            methods: spec.methods.clone(),
            task: spec.task,
            problem: spec.problem,
            labels: spec.labels.clone(),
            parameters: taken + own as u64,
            ..first.spec.clone()
        };
        Self { spec, vars, parts, encoders: Vec::new(), head, live: None, full: None }.with_live()
    }

    /// The learned weights of a snapshot, in the order of the layers; empty if no deltas are mixed.
    ///
    /// # Errors
    /// The device.
    pub(in crate::train) fn mix_rows(&self, snapshot: &Snapshot) -> Result<Vec<MixRow>> {
        if !self.is_mixing() {
            return Ok(Vec::new());
        }
        let mut rows = Vec::new();
        for (v, value) in self.vars.iter().zip(snapshot.tensors()) {
            let layer = match v.name.strip_prefix("mix") {
                Some("") => None,
                Some(rest) => rest.strip_prefix('.').and_then(|n| n.parse().ok()),
                None => continue,
            };
            let weights = value.to_dtype(DType::F64)?.to_vec1()?;
            rows.push(MixRow { layer, weights });
        }
        Ok(rows)
    }

    /// Whether the variables are the weights of deltas.
    pub(super) fn is_mixing(&self) -> bool {
        self.parts.iter().any(|(_, p)| matches!(p, Part::Mixed(_)))
    }
}

/// Everything at one site, side by side, in f32.
fn mixed(weights: usize, patches: &[(u32, &Patch)], base: &Base) -> Result<Mixed> {
    let (mut a, mut b, mut of_rank) = (Vec::new(), Vec::new(), Vec::new());
    let (mut biases, mut of_bias) = (Vec::new(), Vec::new());
    for (i, patch) in patches {
        match patch {
            Patch::LowRank(low) => {
                of_rank.extend(std::iter::repeat_n(*i, low.a.dim(0)?));
                a.push(low.a.to_dtype(DType::F32)?);
                b.push((low.b.to_dtype(DType::F32)? * low.scale)?);
            }
            Patch::Bias(bias) => {
                of_bias.push(*i);
                biases.push(bias.to_dtype(DType::F32)?);
            }
            _ => candle_core::bail!("mixed are low-rank updates and biases"),
        }
    }
    let index = |of: Vec<u32>| Tensor::new(of, &base.device);
    let pairs = match a.is_empty() {
        true => None,
        false => Some((Tensor::cat(&a, 0)?.detach(), Tensor::cat(&b, 0)?.detach(), index(of_rank)?)),
    };
    let biases = match biases.is_empty() {
        true => None,
        false => Some((Tensor::stack(&biases, 0)?.detach(), index(of_bias)?)),
    };
    Ok(Mixed { weights, pairs, biases })
}
