//! A delta: a finite map from sites of the model to patches, and the head that travels with it.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use candle_core::Tensor;

use crate::rows::Ahead;

mod ahead;
mod batch;
mod head;
pub(crate) mod patch;
mod site;

pub use crate::ops::Act;
pub(crate) use ahead::{Keys, Prefixes, prefix_keys};
pub use batch::{DeltaBatch, Part};
pub use head::{Head, HeadLayer, HeadPool};
pub(crate) use patch::AdapterIo;
pub use patch::{
    AdapterInput, AdapterResidual, Affine, Bottleneck, Dora, DoraBase, LowRank, Matrix, Patch, Prefix, PrefixForm,
    Prompt, PromptStage, Scaling, Stack, TokenRows, Wiring, seq2seq_pair,
};
pub use site::{Half, NormAt, Proj, Site, SiteEntry, SiteId, SiteTable};

/// What a delta was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Generate and score text.
    CausalLm,
    /// Generate a text from another: encoder-decoders.
    #[serde(rename = "seq2seq")]
    Seq2Seq,
    /// One label (or several) per text.
    SeqCls,
    /// One label per token.
    TokenCls,
    /// Hidden states for embeddings.
    Feature,
}

impl Task {
    /// Whether its loss is that of the next token.
    pub fn generates(self) -> bool {
        matches!(self, Self::CausalLm | Self::Seq2Seq)
    }

    /// The name used on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CausalLm => "causal_lm",
            Self::Seq2Seq => "seq2seq",
            Self::SeqCls => "seq_cls",
            Self::TokenCls => "token_cls",
            Self::Feature => "feature",
        }
    }
}

/// How the outputs of a sequence-classification head are read and trained (`problem_type` of Hugging Face).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// One label of several: softmax, cross-entropy.
    #[default]
    SingleLabel,
    /// Any of the labels: sigmoid of each, binary cross-entropy.
    MultiLabel,
    /// One number: the output itself, squared error.
    Regression,
}

impl Problem {
    /// The name that Hugging Face's configurations have for it.
    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    /// All names.
    pub const NAMES: [&'static str; 3] = ["single_label_classification", "multi_label_classification", "regression"];

    /// The problem of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::SingleLabel, Self::MultiLabel, Self::Regression].into_iter().find(|p| p.as_str() == name)
    }
}

/// What is known of a delta without its tensors: stored with each version.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DeltaSpec {
    /// Methods in it: `lora`, `bitfit`, `head` ...
    pub methods: Vec<String>,
    /// What it was made for.
    pub task: Task,
    /// How its head's outputs are read; `SingleLabel` without such a head.
    #[serde(default)]
    pub problem: Problem,
    /// Label names of its head, in index order; `LABEL_i` where the files had none.
    pub labels: Vec<String>,
    /// Virtual positions ahead of the tokens (prompt and prefix methods); [`Delta::new`] counts them.
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
    /// By [`Stack`].
    ahead: [Ahead; 3],
    /// Tokens that call it; `None`: it needs no call.
    invocation: Option<Arc<[u32]>>,
}

impl Delta {
    /// Puts a delta together; row-wise patches at the same site are applied in the given order.
    pub fn new(spec: DeltaSpec, mut patches: Vec<(SiteId, Patch)>, head: Option<Head>) -> Self {
        // stable: row-wise patches keep their order, those that add positions come after them
        patches.sort_by_key(|(site, patch)| (*site, patch.adds_positions()));
        let ahead = [Stack::Main, Stack::Encoder, Stack::Memory].map(|stack| ahead::of(&patches, stack));
        let mut delta = Self { spec, patches, head, ahead, invocation: None };
        delta.spec.resident_bytes = delta.bytes();
        // a prefix of several attentions is one
        let keys = ahead.iter().map(|a| a.keys).max().unwrap_or(0);
        delta.spec.num_virtual_tokens = keys + ahead.iter().map(|a| a.rows).sum::<usize>();
        delta
    }

    /// The same delta as an activated one (aLoRA, Greenewald et al. 2025), if `tokens` are given: it acts on the tokens of a sequence
    /// from where these come last in its prompt, so that keys and values ahead of them are the bare base's; where they do not come,
    /// it does not act at all. Only for a delta whose patches are row-wise, without a head.
    #[must_use]
    pub fn invoked_by(self, tokens: Option<Arc<[u32]>>) -> Self {
        Self { invocation: tokens.filter(|tokens| !tokens.is_empty()), ..self }
    }

    /// The tokens that call it, at least one; `None`: it acts on all tokens.
    pub fn invocation(&self) -> Option<&Arc<[u32]>> {
        self.invocation.as_ref()
    }

    /// The first of a sequence's tokens that it acts on, by the sequence's prompt: 0 where nothing has to call it. `None`: it acts
    /// on none.
    pub fn acts_from(&self, prompt: &[u32]) -> Option<usize> {
        match &self.invocation {
            None => Some(0),
            Some(tokens) => prompt.windows(tokens.len().max(1)).rposition(|run| *run == **tokens),
        }
    }

    /// Patches, ordered by site.
    pub fn patches(&self) -> &[(SiteId, Patch)] {
        &self.patches
    }

    /// The head, if the delta brings one.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// What it puts ahead of the tokens of each of its sequences: the one answer that admission, scheduler, row layouts
    /// and attention use.
    pub fn ahead(&self) -> Ahead {
        self.ahead_of(Stack::Main)
    }

    /// As [`Self::ahead`], of the source that an encoder-decoder's encoder reads.
    pub fn source_ahead(&self) -> Ahead {
        self.ahead_of(Stack::Encoder)
    }

    /// As [`Self::ahead`], of any stack; of [`Stack::Memory`] only the keys count.
    pub fn ahead_of(&self, stack: Stack) -> Ahead {
        self.ahead[stack as usize]
    }

    /// Whether tokens have the keys and values of the bare base under it, in all layers: it acts behind the last of them
    /// only (the last layer's output projection or MLP, the final norm, a head).
    pub fn keeps_keys(&self, sites: &SiteTable) -> bool {
        let last = sites.last_keys();
        self.patches.iter().all(|(site, _)| last.is_some_and(|last| *site > last))
    }

    /// The same delta with each tensor of its patches ([`Patch::tensors`]) and of its head put through `f`.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn map(&self, f: &mut dyn FnMut(&str, &Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Self> {
        let patches = self.patches.iter().map(|(site, p)| Ok((*site, p.map(&mut |name, t| f(name, t))?)));
        let patches = patches.collect::<candle_core::Result<_>>()?;
        let head = self.head.as_ref().map(|h| h.map(f)).transpose()?;
        Ok(Self::new(self.spec.clone(), patches, head).invoked_by(self.invocation.clone()))
    }

    /// The same delta, its DoRA patches over the base's matrices again, which a served one has let go of.
    ///
    /// # Errors
    /// Those of `of`, and shapes that do not fit.
    pub fn over(&self, of: impl Fn(SiteId) -> candle_core::Result<DoraBase>) -> candle_core::Result<Self> {
        let one = |(site, patch): &(SiteId, Patch)| match patch {
            Patch::Dora(dora) => Ok((*site, Patch::Dora(Box::new(dora.over(of(*site)?)?)))),
            other => Ok((*site, other.clone())),
        };
        let patches = self.patches.iter().map(one).collect::<candle_core::Result<_>>()?;
        Ok(Self::new(self.spec.clone(), patches, self.head.clone()).invoked_by(self.invocation.clone()))
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

/// A version's files, as stored and exchanged: a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`), an
/// AdapterHub folder (`adapter_config.json`, `adapter.safetensors`, with a head `head_config.json` and
/// `model_head.safetensors`), our BitFit form (`bitfit_config.json`, `bitfit.safetensors`), each with `labels.json` and
/// `README.md` if there are any; or a combination: `delta.json`, and the parts' files as `<part>.<file>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeltaFiles {
    /// File name -> bytes.
    pub files: BTreeMap<String, Bytes>,
}
