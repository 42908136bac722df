//! What a request says of speculative decoding by n-gram lookup.

use super::{check::Problems, params::GenerateParams};

/// Most tokens that are drafted for a step.
pub const MAX_SPECULATIVE_TOKENS: u32 = 16;
/// Longest run of tokens that is looked up.
const MAX_LOOKUP: u32 = 16;

/// Speculative decoding by n-gram lookup (prompt lookup decoding, Saxena 2023): what followed the last tokens where they were
/// said before is guessed to follow again. It changes how fast an output comes, not what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NgramSpeculation {
    /// Most tokens that are guessed for a step, up to [`MAX_SPECULATIVE_TOKENS`]; 0 = none.
    pub tokens: u32,
    /// Longest run of last tokens that is looked up, 1 to 16.
    pub longest: u32,
    /// Shortest run, 1 to `longest`.
    pub shortest: u32,
}

impl Default for NgramSpeculation {
    fn default() -> Self {
        Self { tokens: 4, longest: 4, shortest: 1 }
    }
}

impl NgramSpeculation {
    /// With so many tokens per step and all else as it is by default; `None` of no token.
    pub fn of(tokens: u32) -> Option<Self> {
        (tokens > 0).then(|| Self { tokens, ..Self::default() })
    }
}

impl GenerateParams {
    pub(super) fn check_speculation(&self, problems: &mut Problems) {
        let Some(NgramSpeculation { tokens, longest, shortest }) = self.speculation else { return };
        let field = |name: &str| format!("options.speculative_ngram.{name}");
        problems.integer(&field("num_speculative_tokens"), tokens, 0, MAX_SPECULATIVE_TOKENS);
        problems.integer(&field("prompt_lookup_max"), longest, 1, MAX_LOOKUP);
        // a maximum that is wrong itself bounds nothing
        problems.integer(&field("prompt_lookup_min"), shortest, 1, longest.clamp(1, MAX_LOOKUP));
    }

    /// How its tokens are guessed, where it does not say so itself by `default`; `None` = not at all. Beams are not.
    pub(super) fn speculates(&self, default: Option<NgramSpeculation>) -> Option<NgramSpeculation> {
        self.speculation.or(default).filter(|how| how.tokens > 0 && self.beams.is_none())
    }
}
