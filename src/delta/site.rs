//! Sites: where a delta may attach. The model declares them; a dense index makes plans arrays, not hash maps.

use std::collections::HashMap;

use super::Stack;

/// Index of a site in its [`SiteTable`].
pub type SiteId = usize;

/// A projection of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proj {
    /// Query.
    Q,
    /// Key.
    K,
    /// Value.
    V,
    /// Query, key and value in one matrix (GPT-2's `c_attn`).
    Qkv,
    /// Attention output.
    O,
    /// Gate of a gated MLP.
    Gate,
    /// MLP up (first) projection.
    Up,
    /// Gate and up in one matrix (Phi-3's `gate_up_proj`).
    GateUp,
    /// MLP down (second) projection.
    Down,
    /// Cross-attention's query.
    CrossQ,
    /// Cross-attention's key.
    CrossK,
    /// Cross-attention's value.
    CrossV,
    /// Cross-attention's output.
    CrossO,
}

/// A normalisation of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NormAt {
    /// Before (pre-norm) or after (post-norm) attention.
    Attn,
    /// Before or after the MLP.
    Mlp,
    /// Of each head's query.
    Query,
    /// Of each head's key.
    Key,
    /// Before cross-attention.
    Cross,
    /// Of attention's output, before the residual sum.
    AttnOut,
    /// Of the MLP's output, before the residual sum.
    MlpOut,
}

/// A half of a block, where bottleneck adapters attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Half {
    /// The attention sublayer's output.
    Attn,
    /// The MLP sublayer's output.
    Mlp,
}

/// Where a patch attaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// The input embeddings (virtual rows of prompt tuning).
    Embedding,
    /// The norm right after the embeddings (BERT).
    EmbeddingNorm,
    /// A projection.
    Linear {
        /// Layer.
        layer: usize,
        /// Which.
        proj: Proj,
    },
    /// A norm.
    Norm {
        /// Layer.
        layer: usize,
        /// Which.
        at: NormAt,
    },
    /// A sublayer's output.
    Sublayer {
        /// Layer.
        layer: usize,
        /// Which half.
        half: Half,
    },
    /// Keys and values of a layer (prefix tuning).
    KeyValue {
        /// Layer.
        layer: usize,
        /// Which of its attentions': its own, or cross-attention's ([`Stack::Memory`]).
        stack: Stack,
    },
    /// The final norm of an encoder-decoder's encoder.
    EncoderNorm,
    /// The final norm of a pre-norm stack.
    FinalNorm,
    /// BERT's pooler.
    Pooler,
    /// The language-model head.
    LmHead,
}

impl Site {
    /// The layer that it is in, counting from 0 through all stacks; `None` for what is outside of the layers.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Linear { layer, .. }
            | Self::Norm { layer, .. }
            | Self::Sublayer { layer, .. }
            | Self::KeyValue { layer, .. } => Some(layer),
            Self::Embedding
            | Self::EmbeddingNorm
            | Self::EncoderNorm
            | Self::FinalNorm
            | Self::Pooler
            | Self::LmHead => None,
        }
    }
}

/// What a site looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteEntry {
    /// Where.
    pub site: Site,
    /// Hugging Face module path within the bare model class, e.g. `layers.0.self_attn.q_proj`; empty where there is none.
    pub module: String,
    /// Input width (0 for norms and embeddings).
    pub in_dim: usize,
    /// Output width.
    pub out_dim: usize,
    /// Whether the base has a bias here.
    pub has_bias: bool,
}

impl SiteEntry {
    /// A name for people and variables: the module path, or the layer and half of a sublayer, or whose keys.
    pub fn label(&self) -> String {
        match self.site {
            Site::Sublayer { layer, half: Half::Attn } => format!("layers.{layer}.attention_adapter"),
            Site::Sublayer { layer, half: Half::Mlp } => format!("layers.{layer}.output_adapter"),
            Site::KeyValue { layer, stack: Stack::Memory } => format!("layers.{layer}.cross_keys"),
            Site::KeyValue { layer, .. } => format!("layers.{layer}.keys"),
            _ => self.module.clone(),
        }
    }
}

/// All sites of a base, in forward order.
#[derive(Debug, Clone, Default)]
pub struct SiteTable {
    entries: Vec<SiteEntry>,
    by_module: HashMap<String, SiteId>,
    by_site: HashMap<Site, SiteId>,
}

impl SiteTable {
    /// Adds a site and returns its index.
    pub fn push(&mut self, entry: SiteEntry) -> SiteId {
        let id = self.entries.len();
        if !entry.module.is_empty() {
            self.by_module.insert(entry.module.clone(), id);
        }
        self.by_site.insert(entry.site, id);
        self.entries.push(entry);
        id
    }

    /// Number of sites.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry at an index that this table gave out.
    pub fn get(&self, id: SiteId) -> Option<&SiteEntry> {
        self.entries.get(id)
    }

    /// The site of a Hugging Face module path.
    pub fn by_module(&self, module: &str) -> Option<SiteId> {
        self.by_module.get(module).copied()
    }

    /// The index of a site.
    pub fn id(&self, site: Site) -> Option<SiteId> {
        self.by_site.get(&site).copied()
    }

    /// All entries with their indices.
    pub fn iter(&self) -> impl Iterator<Item = (SiteId, &SiteEntry)> {
        self.entries.iter().enumerate()
    }

    /// The sites that a prefix of this kind joins, with the widths of its keys, in order of the layers.
    pub fn prefix_sites(&self, of: Stack) -> Vec<(SiteId, usize)> {
        let joins = |site| matches!(site, Site::KeyValue { stack, .. } if stack == of);
        self.iter().filter(|(_, e)| joins(e.site)).map(|(id, e)| (id, e.out_dim)).collect()
    }

    /// The site behind which nothing changes keys or values of self-attention: those of its last layer. `None` without one.
    pub fn last_keys(&self) -> Option<SiteId> {
        self.prefix_sites(Stack::Main).last().map(|(id, _)| *id)
    }

    /// Entries that are linears of blocks (what `all-linear` means).
    pub fn linears(&self) -> impl Iterator<Item = (SiteId, &SiteEntry)> {
        self.iter().filter(|(_, e)| matches!(e.site, Site::Linear { .. }))
    }
}
