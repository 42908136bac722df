//! A delta: a finite map from sites of the model to patches, and the head that travels with it.

use std::collections::BTreeMap;

use bytes::Bytes;
use candle_core::Tensor;

mod batch;
mod head;
pub(crate) mod patch;
mod site;

pub use crate::ops::Act;
pub use batch::{DeltaBatch, Part};
pub use head::{Head, HeadLayer, HeadPool};
pub(crate) use patch::AdapterIo;
pub use patch::{
    AdapterInput, AdapterResidual, Affine, Bottleneck, Dora, DoraBase, LowRank, Matrix, Patch, Scaling, TokenRows,
    Wiring,
};
pub use site::{Half, NormAt, Proj, Site, SiteEntry, SiteId, SiteTable};

/// What a delta was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Generate and score text.
    CausalLm,
    /// One label (or several) per text.
    SeqCls,
    /// One label per token.
    TokenCls,
    /// Hidden states for embeddings.
    Feature,
}

impl Task {
    /// The name used on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CausalLm => "causal_lm",
            Self::SeqCls => "seq_cls",
            Self::TokenCls => "token_cls",
            Self::Feature => "feature",
        }
    }
}

/// What is known of a delta without its tensors: stored with each version.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DeltaSpec {
    /// Methods in it: `lora`, `bitfit`, `head` ...
    pub methods: Vec<String>,
    /// What it was made for.
    pub task: Task,
    /// Label names of its head, in index order; `LABEL_i` where the files had none.
    pub labels: Vec<String>,
    /// Virtual positions ahead of the tokens (prompt and prefix methods).
    pub num_virtual_tokens: usize,
    /// Numbers in all its tensors.
    pub parameters: u64,
    /// Bytes when resident.
    pub resident_bytes: u64,
}

/// One delta, ready to be applied. Its tensors never change once it is built; under training they are `Var`s, whose
/// identity the clones here keep.
#[derive(Debug, Clone)]
pub struct Delta {
    /// What it is.
    pub spec: DeltaSpec,
    patches: Vec<(SiteId, Patch)>,
    head: Option<Head>,
}

impl Delta {
    /// Puts a delta together; patches at the same site are applied in the given order.
    pub fn new(spec: DeltaSpec, mut patches: Vec<(SiteId, Patch)>, head: Option<Head>) -> Self {
        patches.sort_by_key(|(site, _)| *site);
        let mut delta = Self { spec, patches, head };
        delta.spec.resident_bytes = delta.bytes();
        delta
    }

    /// Patches, ordered by site.
    pub fn patches(&self) -> &[(SiteId, Patch)] {
        &self.patches
    }

    /// The head, if the delta brings one.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// The same delta with each tensor of its patches ([`Patch::tensors`]) and of its head put through `f`.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn map(&self, f: &mut dyn FnMut(&str, &Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Self> {
        let patches = self.patches.iter().map(|(site, p)| Ok((*site, p.map(&mut |name, t| f(name, t))?)));
        let patches = patches.collect::<candle_core::Result<_>>()?;
        let head = self.head.as_ref().map(|h| h.map(f)).transpose()?;
        Ok(Self::new(self.spec.clone(), patches, head))
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        let patches: usize = self.patches.iter().map(|(_, p)| p.bytes()).sum();
        let head: usize = self.head.iter().flat_map(Head::tensors).map(|(_, t)| bytes_of(t)).sum();
        (patches + head) as u64
    }
}

/// Bytes of a tensor's elements.
pub(crate) fn bytes_of(t: &Tensor) -> usize {
    t.elem_count() * t.dtype().size_in_bytes()
}

/// A version's files, as stored and exchanged: a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`,
/// optionally `labels.json`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeltaFiles {
    /// File name -> bytes.
    pub files: BTreeMap<String, Bytes>,
}
