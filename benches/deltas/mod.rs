//! Random deltas of a base, of every kind, for benchmarks.

#![allow(dead_code, reason = "each benchmark takes what it needs")]

use std::sync::Arc;

use candle_core::{Device, Tensor};
use deltaserve::{
    delta::{
        Act, Bottleneck, Delta, DeltaSpec, Head, LowRank, Patch, Prefix, PrefixForm, Proj, Prompt, PromptStage,
        Scaling, Site, Stack, Task, Wiring,
    },
    model::{Base, testing::Rng},
};

/// Virtual tokens of a prompt, and keys of a prefix.
const VIRTUAL: usize = 16;
/// Width of the base over that of an adapter.
const REDUCTION: usize = 16;

/// A method, as deltas of one batch may each have another.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// Of this rank, on all linears of the layers or on queries and values (where they lie in one matrix: on that).
    Lora { rank: usize, all: bool },
    /// Pfeiffer's, behind the MLP of each layer.
    Adapter,
    /// Keys and values in each layer.
    Prefix,
    /// Virtual tokens.
    Prompt,
    /// Biases of the layers' linears.
    BitFit,
    /// None: the bare base.
    Bare,
}

/// Deltas of all kinds, one after the other.
pub(crate) fn mixed(rank: usize) -> [Kind; 5] {
    [Kind::Lora { rank, all: true }, Kind::Adapter, Kind::Prefix, Kind::Prompt, Kind::BitFit]
}

struct Make(Rng);

impl Make {
    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| 0.02 * self.0.normal()).collect();
        Tensor::from_vec(data, shape, &Device::Cpu).expect("as many numbers as the shape has")
    }

    fn patch(&mut self, kind: Kind, base: &Base, site: Site, (i, o): (usize, usize)) -> Option<Patch> {
        let hidden = base.arch.hidden;
        Some(match (kind, site) {
            (Kind::Lora { rank, all }, Site::Linear { proj, .. })
                if all || matches!(proj, Proj::Q | Proj::V | Proj::Qkv) =>
            {
                Patch::LowRank(LowRank { a: self.tensor(&[rank, i]), b: self.tensor(&[rank, o]), scale: 2.0 })
            }
            (Kind::BitFit, Site::Linear { .. }) => Patch::Bias(self.tensor(&[o])),
            (Kind::Adapter, Site::Sublayer { half: deltaserve::delta::Half::Mlp, .. }) => {
                let d = hidden / REDUCTION;
                Patch::Bottleneck(Box::new(Bottleneck {
                    down: self.tensor(&[d, hidden]),
                    down_bias: self.tensor(&[d]),
                    up: self.tensor(&[d, hidden]),
                    up_bias: self.tensor(&[hidden]),
                    act: Act::Relu,
                    scaling: Scaling::Fixed(1.0),
                    norm_before: None,
                    norm_after: None,
                    wiring: Wiring::AFTER_NORM,
                }))
            }
            (Kind::Prefix, Site::KeyValue { stack: Stack::Main, .. }) => {
                let width = base.arch.kv_width();
                let (k, v) = (self.tensor(&[VIRTUAL, width]), self.tensor(&[VIRTUAL, width]));
                Patch::Prefix(Prefix { k, v, form: PrefixForm::Context, stack: Stack::Main })
            }
            (Kind::Prompt, Site::Embedding) => Patch::Prompt(Prompt {
                rows: self.tensor(&[VIRTUAL, hidden]),
                stage: PromptStage::Tokens,
                stack: Stack::Main,
            }),
            _ => return None,
        })
    }
}

/// A random delta of a kind, with a head of so many labels of its own, or for generation where that is 0.
pub(crate) fn random(base: &Base, kind: Kind, labels: usize, seed: u64) -> Arc<Delta> {
    let mut make = Make(Rng(seed * 2 + 1));
    let mut patches = Vec::new();
    for (id, entry) in base.sites.iter() {
        patches.extend(make.patch(kind, base, entry.site, (entry.in_dim, entry.out_dim)).map(|patch| (id, patch)));
    }
    let head =
        (labels > 0).then(|| Head::linear(make.tensor(&[labels, base.arch.hidden]), Some(make.tensor(&[labels]))));
    let spec = DeltaSpec {
        methods: vec!["random".into()],
        task: if labels > 0 { Task::SeqCls } else { Task::CausalLm },
        labels: (0..labels).map(|i| format!("LABEL_{i}")).collect(),
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    Arc::new(Delta::new(spec, patches, head))
}

/// The middle one.
pub(crate) fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(f64::NAN)
}
