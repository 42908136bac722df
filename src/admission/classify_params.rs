//! Classification requests and replies in the domain's own types; part of [`super::params`].

use std::time::Duration;

use crate::delta::Problem;

use super::params::{DeltaChoice, ServedBy, Timings, Usage};

/// One input to classify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClassifyInput {
    /// A text, or a pair of texts.
    Text {
        /// The (first) text; not empty.
        text: String,
        /// The second text of a pair.
        pair: Option<String>,
    },
    /// Words, each of which gets a label; at least one.
    Words(Vec<String>),
}

impl ClassifyInput {
    /// A single text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), pair: None }
    }
}

/// A classify request: sequence or token classification, as the delta's head says.
#[derive(Debug, Clone)]
pub struct ClassifyParams {
    /// Which delta, or which together; none = the base's own head, if it has one.
    pub delta: DeltaChoice,
    /// 1 to 1024 inputs.
    pub inputs: Vec<ClassifyInput>,
    /// Cut inputs that exceed the context instead of refusing them.
    pub truncate: bool,
    /// Heads for whole texts: only labels of at least this probability are told, [0, 1]; 0 = all.
    pub threshold: f32,
    /// Among the tenant's own requests, higher ones begin first; -100 to 100.
    pub priority: i32,
    /// Give up when this much time has passed since arrival.
    pub timeout: Option<Duration>,
}

/// One label with its probability.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelScore {
    /// The label's name, or `LABEL_i` where the delta has no names.
    pub label: String,
    /// Its index.
    pub index: u32,
    /// Softmax probability (sigmoid for multi-label heads).
    pub probability: f32,
}

/// A token's label.
#[derive(Debug, Clone)]
pub struct TokenLabel {
    /// Byte offsets in the input text.
    pub start: u32,
    /// End offset (exclusive).
    pub end: u32,
    /// The text between them.
    pub text: String,
    /// The best label; `None` for a word without a token.
    pub label: Option<LabelScore>,
}

/// One classified text.
#[derive(Debug, Clone)]
pub struct Classification {
    /// Labels, best first; empty for token classification and regression.
    pub labels: Vec<LabelScore>,
    /// Token classification: one entry per word piece, or per word of words (byte range in the text, best label).
    pub tokens: Vec<TokenLabel>,
    /// Of a head for regression: its output.
    pub value: Option<f32>,
    /// Tokens read.
    pub tokens_read: u32,
    /// Whether the input was cut to fit.
    pub cut: bool,
}

/// A classify reply.
#[derive(Debug, Clone)]
pub struct ClassifyReply {
    /// How the head's outputs are read; `None` where it labels tokens.
    pub problem: Option<Problem>,
    /// One per input, in order.
    pub results: Vec<Classification>,
    /// Which version served it.
    pub served_by: ServedBy,
    /// Tokens read.
    pub usage: Usage,
    /// Slowest input's times.
    pub timings: Timings,
}
