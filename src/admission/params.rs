//! What clients ask for and get, in the domain's own types: no wire format, no tensors.
//!
//! The edges (`grpc/`, later `http/`) convert to and from these; `admission` validates them once, for all edges.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;

pub use super::{
    classify_params::{Classification, ClassifyInput, ClassifyParams, ClassifyReply, LabelScore, TokenLabel},
    quota::{Quota, QuotaItem, QuotaOf, Rate, TenantLimit},
    serve_error::{ServeError, Violation},
};
use crate::{delta::Problem, ids::DeltaId};

/// How the next token is chosen. Neutral values switch a filter off.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 = greedy; otherwise logits are divided by it. Finite, 0 to 100.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 = all.
    pub top_k: u32,
    /// Keep the smallest set of tokens with at least this probability mass; in (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; > 0, 1 = off (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the output; in [-2, 2].
    pub frequency_penalty: f32,
    /// Subtracted once if the token is in the output; in [-2, 2].
    pub presence_penalty: f32,
    /// No run of so many tokens comes twice in prompt and output; 0 = off. Of an encoder-decoder, the output alone counts.
    pub no_repeat_ngram_size: u32,
    /// Seed of this request; the server draws one if absent and reports it.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            no_repeat_ngram_size: 0,
            seed: None,
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what the base's template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Plain text, tokenised with the base's special tokens.
    Text(String),
    /// A conversation, rendered with the base's chat template.
    Chat(Vec<ChatMessage>),
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
}

pub use super::beam_params::{BeamParams, EarlyStopping, MAX_BEAMS};
pub use super::choice::DeltaChoice;
pub use super::constraint_params::{ConstraintParams, MAX_REGEX_BYTES};
pub use super::speculation_params::{MAX_SPECULATIVE_TOKENS, NgramSpeculation};

/// A Generate request.
#[derive(Debug, Clone)]
pub struct GenerateParams {
    /// Which delta, or which together.
    pub delta: DeltaChoice,
    /// What to continue.
    pub prompt: Prompt,
    /// Most new tokens, at least 1.
    pub max_new_tokens: u32,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Texts that end the output; not part of it. At most 16, each 1 to 256 bytes.
    pub stop: Vec<String>,
    /// Token ids that end the output, beside the base's end-of-sequence ids. At most 64.
    pub stop_tokens: Vec<u32>,
    /// Go on past the base's end-of-sequence ids.
    pub ignore_eos: bool,
    /// Report the chosen token's log-probability and this many alternatives (0 to 20).
    pub logprobs: Option<u32>,
    /// Independent continuations, 1 to 16; continuation i has seed + i.
    pub n: u32,
    /// Search with beams; continuation i is then the i-th best output.
    pub beams: Option<BeamParams>,
    /// Guess tokens ahead; `None` = as the server does by default.
    pub speculation: Option<NgramSpeculation>,
    /// Among the tenant's own requests, higher ones begin first; -100 to 100.
    pub priority: i32,
    /// What each output must be.
    pub constraint: Option<ConstraintParams>,
    /// Give up when this much time has passed since arrival.
    pub timeout: Option<Duration>,
}

/// A token's log-probability and its strongest alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Its text, as far as it has one alone.
    pub text: String,
    /// Natural log of its probability under the model (before constraint, temperature and filters).
    pub logprob: f32,
    /// The most likely tokens at this place: (id, text, log-probability).
    pub top: Vec<(u32, String, f32)>,
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence or stop token was chosen, or nothing more could keep to the constraint.
    StopToken,
    /// A stop text appeared.
    StopText,
    /// `max_new_tokens` was reached.
    Length,
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Tokens of the prompt whose keys and values were cached.
    pub cached_tokens: u32,
    /// Tokens guessed ahead (speculative decoding).
    pub drafted_tokens: u32,
    /// Those of them that were then chosen, and gave a token more each.
    pub accepted_tokens: u32,
}

/// Where a request's time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From arrival to its first step.
    pub queue: Duration,
    /// From its first step to its first token (or result).
    pub prefill: Duration,
    /// From its first token to its last.
    pub decode: Duration,
}

/// Which delta version answered; part of every inference response.
#[derive(Debug, Clone, PartialEq)]
pub struct ServedBy {
    /// The delta's name; empty = the bare base.
    pub name: String,
    /// The version's number under that name; 0 = the bare base.
    pub number: u64,
    /// The version's digest (of several: theirs and their weights together); `None` = the bare base.
    pub id: Option<DeltaId>,
    /// If several answered together: each, with its weight.
    pub parts: Vec<ServedPart>,
}

/// One of several versions that answered together.
#[derive(Debug, Clone, PartialEq)]
pub struct ServedPart {
    /// The delta's name.
    pub name: String,
    /// The version's number under that name.
    pub number: u64,
    /// The version's digest.
    pub id: DeltaId,
    /// Its weight.
    pub weight: f64,
}

/// One piece of a streamed generation.
#[derive(Debug, Clone)]
pub enum GenerateChunk {
    /// New text of continuation `index`.
    Delta {
        /// Which continuation.
        index: u32,
        /// New text, whole characters only.
        text: String,
        /// The tokens behind it.
        token_ids: Vec<u32>,
        /// Their log-probabilities, if asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// Continuation `index` is complete.
    Finished {
        /// Which continuation.
        index: u32,
        /// Why it ended.
        reason: FinishReason,
        /// Tokens of this continuation.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
        /// Which version served it.
        served_by: ServedBy,
        /// The seed that reproduces it.
        seed: u64,
        /// Of a beam search: its sum of log-probabilities over its length to the power of the length penalty.
        score: Option<f32>,
    },
}

/// How a text becomes one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pooling {
    /// What the base says (`pooling.json` / sentence-transformers), else mean for encoders and last token for decoders.
    #[default]
    Default,
    /// Mean over the tokens.
    Mean,
    /// The first token.
    Cls,
    /// The last token.
    Last,
}

/// An embed request.
#[derive(Debug, Clone)]
pub struct EmbedParams {
    /// Which delta, or which together.
    pub delta: DeltaChoice,
    /// Texts, 1 to 1024.
    pub inputs: Vec<String>,
    /// How to pool.
    pub pooling: Pooling,
    /// Scale to unit length.
    pub normalize: bool,
    /// Among the tenant's own requests, higher ones begin first; -100 to 100.
    pub priority: i32,
    /// Give up when this much time has passed since arrival.
    pub timeout: Option<Duration>,
}

/// An embed reply.
#[derive(Debug, Clone)]
pub struct EmbedReply {
    /// One vector of the base's hidden size per input.
    pub embeddings: Vec<Vec<f32>>,
    /// Which version served it.
    pub served_by: ServedBy,
    /// Tokens read.
    pub usage: Usage,
    /// Slowest input's times.
    pub timings: Timings,
}

/// A score request: log-likelihood of a completion after a prompt (or of a whole text, with an empty prompt).
#[derive(Debug, Clone)]
pub struct ScoreParams {
    /// Which delta, or which together.
    pub delta: DeltaChoice,
    /// (prompt, completion) pairs, 1 to 256. Without a prompt, the completion's first token is scored only behind a start token.
    pub inputs: Vec<(String, String)>,
    /// Among the tenant's own requests, higher ones begin first; -100 to 100.
    pub priority: i32,
    /// Give up when this much time has passed since arrival.
    pub timeout: Option<Duration>,
}

/// One scored text.
#[derive(Debug, Clone)]
pub struct Scored {
    /// Sum of the natural-log probabilities of the scored tokens.
    pub log_likelihood: f64,
    /// The scored tokens with their log-probabilities.
    pub tokens: Vec<TokenLogprob>,
}

/// A score reply.
#[derive(Debug, Clone)]
pub struct ScoreReply {
    /// One per input, in order.
    pub results: Vec<Scored>,
    /// Which version served it.
    pub served_by: ServedBy,
    /// Tokens read.
    pub usage: Usage,
    /// Slowest input's times.
    pub timings: Timings,
}

/// A tokenize reply.
#[derive(Debug, Clone)]
pub struct TokenizeReply {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Each id's text form in the vocabulary.
    pub tokens: Vec<String>,
}

/// What a publish may do to an existing name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PublishPolicy {
    /// The name must be new (or have no live version).
    Create,
    /// Make or replace.
    #[default]
    Upsert,
    /// Replace exactly this version.
    CompareAndSwap(#[serde(with = "crate::ids::as_hex")] DeltaId),
}

/// An upload: a PEFT folder's files.
#[derive(Debug, Clone)]
pub struct UploadParams {
    /// The name to publish under.
    pub name: String,
    /// What may happen to an existing name.
    pub policy: PublishPolicy,
    /// Label names in index order, for heads (overrides `labels.json` / the config's).
    pub labels: Vec<String>,
    /// File name -> bytes: `adapter_config.json` and `adapter_model.safetensors` at least.
    pub files: BTreeMap<String, Bytes>,
}

/// A stored version, as clients see it.
#[derive(Debug, Clone)]
pub struct DeltaInfo {
    /// Name.
    pub name: String,
    /// Number under that name, counting from 1.
    pub number: u64,
    /// Digest.
    pub id: DeltaId,
    /// Whether the name points at this version.
    pub current: bool,
    /// Methods in it: `lora`, `bitfit`, `head` ...
    pub methods: Vec<String>,
    /// `causal_lm`, `seq2seq`, `seq_cls`, `token_cls`, `feature`.
    pub task: String,
    /// How its head's outputs are read; `None` unless it labels whole texts.
    pub problem: Option<Problem>,
    /// Label names of its head.
    pub labels: Vec<String>,
    /// Trained numbers.
    pub parameters: u64,
    /// Bytes stored.
    pub stored_bytes: u64,
    /// Bytes resident if loaded now, else 0.
    pub resident_bytes: u64,
    /// Requests holding it now.
    pub leases: u64,
    /// Kept resident.
    pub pinned: bool,
    /// `upload`, `job:<id>`, `sample`.
    pub origin: String,
    /// Unix milliseconds.
    pub created_ms: i64,
    /// Its stored bytes were found missing or changed.
    pub corrupt: bool,
}
