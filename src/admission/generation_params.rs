//! Evaluation by generation: the prompts of validation examples are answered while training, and the answers scored.

use serde::{Deserialize, Serialize};

use super::check::Problems;

/// Most validation examples that an evaluation answers.
const MAX_EXAMPLES: u32 = 100_000;

/// What is asked for; `None` = the default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationParams {
    /// Answer also where another figure decides.
    #[serde(default)]
    pub wanted: bool,
    /// Most new tokens of an answer.
    #[serde(default)]
    pub new_tokens: Option<u32>,
    /// How many of the validation examples are answered.
    #[serde(default)]
    pub examples: Option<u32>,
}

impl GenerationParams {
    /// Whether nothing is asked for.
    pub fn is_unset(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self, at: &str, problems: &mut Problems) {
        let bounds = [("eval_new_tokens", self.new_tokens, u32::MAX), ("eval_examples", self.examples, MAX_EXAMPLES)];
        for (name, value, most) in bounds {
            if let Some(value) = value {
                problems.integer(&format!("{at}.{name}"), value, 1, most);
            }
        }
    }
}

/// What is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedGeneration {
    /// Most new tokens of an answer.
    pub new_tokens: u32,
    /// How many of the validation examples are answered.
    pub examples: u32,
}
