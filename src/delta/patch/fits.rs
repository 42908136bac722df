//! Where a patch may be, and the shapes that it must have there: what the forward applies.

use super::{Patch, Scaling};
use crate::delta::{Site, SiteEntry};

impl Patch {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LowRank(_) => "low-rank update",
            Self::Bias(_) => "bias",
            Self::Scale(_) => "scale of the output",
            Self::InScale(_) => "scale of the input",
            Self::Affine(_) => "norm's gain and bias",
            Self::Dora(_) => "DoRA update",
            Self::Bottleneck(_) => "bottleneck adapter",
            Self::TokenRows(_) => "replaced rows of tokens",
            Self::Matrix(_) => "whole matrix",
            Self::Prompt(_) => "prompt",
            Self::Prefix(_) => "prefix",
        }
    }

    /// Whether the forward applies it at such a site: the one list of pairs, which decoding goes by.
    pub fn acts_at(&self, site: Site) -> bool {
        let matrix = matches!(site, Site::Linear { .. } | Site::Pooler | Site::LmHead);
        let norm = matches!(site, Site::EmbeddingNorm | Site::Norm { .. } | Site::EncoderNorm | Site::FinalNorm);
        let embedding = site == Site::Embedding;
        match self {
            Self::LowRank(_) | Self::Matrix(_) => matrix || embedding,
            Self::Bias(_) | Self::Scale(_) => matrix || norm,
            Self::InScale(_) | Self::Dora(_) => matrix,
            Self::Affine(_) => norm,
            Self::TokenRows(_) => embedding || site == Site::LmHead,
            Self::Bottleneck(_) => matches!(site, Site::Sublayer { .. }),
            Self::Prompt(_) => embedding,
            Self::Prefix(p) => matches!(site, Site::KeyValue { stack, .. } if stack == p.stack),
        }
    }

    /// Whether it takes the place of what the base computes at its site, and with it of what came before.
    pub fn replaces(&self) -> bool {
        matches!(self, Self::Affine(_) | Self::Matrix(_))
    }

    /// Why the forward cannot apply it at this site of a base with so many tokens; `None` if it can.
    pub fn misfit(&self, entry: &SiteEntry, vocab: usize) -> Option<String> {
        if !self.acts_at(entry.site) {
            return Some(format!("a {}, which this server does not apply there", self.kind()));
        }
        if let (Self::Matrix(m), Site::Embedding) = (self, entry.site)
            && m.bias.is_some()
        {
            return Some("a bias of the embedding, which has none".into());
        }
        if let Self::TokenRows(t) = self
            && (t.base.dims() != t.rows.dims() || t.ids.iter().any(|id| *id as usize >= vocab))
        {
            return Some(format!("rows of tokens outside a vocabulary of {vocab}"));
        }
        let wrong = self.tensors().into_iter().find_map(|(name, t)| {
            let wanted = self.dims(name, entry, vocab);
            (t.dims() != wanted).then(|| (name, t.dims().to_vec(), wanted))
        });
        wrong.map(|(name, got, wanted)| format!("{name} of a {} is {got:?}, {wanted:?} is accepted", self.kind()))
    }

    /// The shape that the tensor of this name must have, given the first dimension of the first.
    fn dims(&self, name: &str, entry: &SiteEntry, vocab: usize) -> Vec<usize> {
        let out = entry.out_dim;
        let input = if entry.site == Site::Embedding { vocab } else { entry.in_dim };
        let first = self.tensors().first().and_then(|(_, t)| t.dims().first().copied()).unwrap_or(0);
        match (self, name) {
            (Self::TokenRows(t), _) => vec![t.ids.len(), if entry.site == Site::Embedding { out } else { input }],
            (Self::Bottleneck(b), "scaling") => match &b.scaling {
                Scaling::Learned(t) if t.dims() == [1] => vec![1],
                _ => vec![out],
            },
            (_, "lora_A") => vec![first, input],
            (_, "lora_B" | "adapter_down.weight" | "adapter_up.weight" | "prompt" | "prefix_k" | "prefix_v") => {
                vec![first, out]
            }
            (_, "adapter_down.bias") => vec![first],
            (_, "in_scale") => vec![input],
            (_, "own_weight") => vec![input, out],
            _ => vec![out],
        }
    }
}
