//! What is trained at one site, with every number resolved.

use crate::delta::{Act, PrefixForm, SiteEntry, SiteId, Stack, Wiring};

/// A low-rank pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankPlan {
    /// Rank.
    pub rank: usize,
    /// Multiplies `B A x`.
    pub scale: f64,
    /// Alpha that the scale was made of, for the exported config.
    pub alpha: f64,
    /// Dropout on the input while training.
    pub dropout: f64,
    /// Learning rate of B over that of A (LoRA+; Hayou et al. 2024).
    pub b_rate: f64,
    /// Starts from the largest singular directions of the base's matrix, whose part is subtracted (PiSSA).
    pub pissa: bool,
}

/// The factor of an adapter's result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ScalingPlan {
    /// A number.
    Fixed(f64),
    /// One trained number.
    Learned,
    /// One trained number per channel.
    Channel,
}

/// A bottleneck adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterPlan {
    /// Width of the bottleneck.
    pub width: usize,
    /// Its nonlinearity.
    pub act: Act,
    /// Where it sits.
    pub wiring: Wiring,
    /// Its factor.
    pub scaling: ScalingPlan,
    /// A norm of its own ahead.
    pub norm_before: bool,
    /// A norm of its own behind.
    pub norm_after: bool,
}

/// What is trained at one site.
#[derive(Debug, Clone, PartialEq)]
pub enum PatchPlan {
    /// A low-rank pair.
    LowRank(LowRankPlan),
    /// A low-rank pair and a magnitude per output.
    Dora(LowRankPlan),
    /// A difference to the bias.
    Bias,
    /// A scale of the output.
    Scale,
    /// A scale of the input.
    InScale,
    /// A norm's gain and bias.
    Affine,
    /// A bottleneck adapter.
    Adapter(AdapterPlan),
    /// Rows of the embedding, by token.
    TokenRows(Vec<u32>),
    /// The whole matrix (and its bias).
    Matrix,
    /// Rows ahead of the tokens.
    Prompt {
        /// How many.
        n: usize,
        /// Whether a network makes them.
        made: bool,
        /// Whose tokens they precede.
        stack: Stack,
    },
    /// Keys and values ahead of the layer's own.
    Prefix {
        /// How many.
        n: usize,
        /// Whether a network makes them.
        made: bool,
        /// An earlier site, whose keys and values they are (PEFT's form lets layers of encoder-decoders share them).
        like: Option<SiteId>,
        /// How they count.
        form: PrefixForm,
        /// Whose keys they precede.
        stack: Stack,
    },
}

impl PatchPlan {
    /// What it is called in messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::LowRank(_) => "a low-rank pair",
            Self::Dora(_) => "a low-rank pair with a magnitude (DoRA)",
            Self::Bias => "a bias",
            Self::Scale => "a scale of the output",
            Self::InScale => "a scale of the input",
            Self::Affine => "a norm",
            Self::Adapter(_) => "a bottleneck adapter",
            Self::TokenRows(_) => "token rows",
            Self::Matrix => "a whole matrix",
            Self::Prompt { .. } => "a prompt",
            Self::Prefix { .. } => "a prefix",
        }
    }

    /// Whether it adds positions instead of changing rows.
    pub(super) fn adds_positions(&self) -> bool {
        matches!(self, Self::Prompt { .. } | Self::Prefix { .. })
    }

    /// Numbers that are trained; `vocab` for patches of the embedding.
    pub(super) fn parameters(&self, e: &SiteEntry, vocab: usize) -> usize {
        let inputs = if e.in_dim == 0 { vocab } else { e.in_dim };
        match self {
            Self::LowRank(p) => p.rank * (inputs + e.out_dim),
            Self::Dora(p) => p.rank * (inputs + e.out_dim) + e.out_dim,
            Self::Bias | Self::Scale => e.out_dim,
            Self::InScale => e.in_dim,
            Self::Affine => e.out_dim * if e.has_bias { 2 } else { 1 },
            Self::Adapter(p) => p.parameters(e.out_dim),
            Self::TokenRows(ids) => ids.len() * e.out_dim,
            Self::Prompt { made: true, .. } | Self::Prefix { made: true, .. } => 0, // counted with the network
            Self::Prompt { n, .. } => n * e.out_dim,
            Self::Prefix { like: Some(_), .. } => 0,
            Self::Prefix { n, .. } => 2 * n * e.out_dim,
            Self::Matrix => inputs * e.out_dim + if e.has_bias { e.out_dim } else { 0 },
        }
    }
}

impl AdapterPlan {
    fn parameters(&self, hidden: usize) -> usize {
        let scaling = match self.scaling {
            ScalingPlan::Fixed(_) => 0,
            ScalingPlan::Learned => 1,
            ScalingPlan::Channel => hidden,
        };
        let norms = 2 * hidden * (usize::from(self.norm_before) + usize::from(self.norm_after));
        2 * self.width * hidden + self.width + hidden + scaling + norms
    }
}
