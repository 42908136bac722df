//! What the engine is asked and what it answers. The async side builds requests; the engine thread sends events.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::constraint::ConstraintFactory;
use crate::{
    admission::params::{BeamParams, FinishReason, NgramSpeculation, Pooling, Sampling, Timings, Usage},
    delta::{Delta, Stack},
    ids::{DeltaId, TenantId},
    kv::pages_for,
    rows::Ahead,
};

/// A delta that a request uses, with the lease that keeps it resident; released with the request, on every exit.
pub struct HeldDelta {
    id: DeltaId,
    delta: Arc<Delta>,
    _lease: Box<dyn Any + Send + Sync>,
}

impl HeldDelta {
    /// `lease` is kept as long as the request runs.
    pub fn new(id: DeltaId, delta: Arc<Delta>, lease: impl Any + Send + Sync) -> Self {
        Self { id, delta, _lease: Box::new(lease) }
    }

    /// Which version.
    pub fn id(&self) -> DeltaId {
        self.id
    }

    /// Its patches.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }
}

impl std::fmt::Debug for HeldDelta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HeldDelta").field(&self.id).finish()
    }
}

/// A place in admission's queue: only has to live as long as the request does.
pub struct Permit(#[allow(dead_code, reason = "held, never read")] Box<dyn Any + Send + Sync>);

impl Permit {
    /// Keeps `held` until the request ends.
    pub fn new(held: impl Any + Send + Sync) -> Self {
        Self(Box::new(held))
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Permit")
    }
}

/// One sequence for the engine.
#[derive(Debug)]
pub struct Request {
    /// The caller's number, for logs only.
    pub id: u64,
    /// Whose it is: keys and values are shared between requests of one tenant, and with `None` with nobody. Tenants take
    /// turns by what they were served; requests without one take them together.
    pub tenant: Option<TenantId>,
    /// The tenant's share of the service beside other tenants; 0 counts as 1.
    pub weight: u32,
    /// Requests of one tenant begin in this order, higher ones first.
    pub priority: i32,
    /// What an encoder-decoder's encoder reads; empty for all other bases.
    pub source: Vec<u32>,
    /// The prompt; of an encoder-decoder, how the decoder's output starts.
    pub tokens: Vec<u32>,
    /// Segment ids, one per token; all 0 if absent.
    pub token_types: Option<Vec<u32>>,
    /// Its delta; `None` = the bare base.
    pub delta: Option<HeldDelta>,
    /// What to do.
    pub work: Work,
    /// Bounds what it may generate.
    pub constraint: Option<Arc<dyn ConstraintFactory>>,
    /// Not started, or failed, after this.
    pub deadline: Option<Instant>,
    /// Where answers go. Its capacity must be at least [`Work::events`]; the engine never waits for it, and a closed
    /// channel ends the request at the next step.
    pub events: mpsc::Sender<Event>,
    /// The admission permit, released with the request.
    pub permit: Option<Permit>,
    /// When it came, for the queue time.
    pub arrived: Instant,
}

impl Request {
    /// What its delta puts ahead of its tokens.
    pub fn ahead(&self) -> Ahead {
        self.delta.as_ref().map(|held| held.delta.ahead()).unwrap_or_default()
    }

    /// What its delta puts ahead of its source.
    pub fn source_ahead(&self) -> Ahead {
        self.delta.as_ref().map(|held| held.delta.source_ahead()).unwrap_or_default()
    }

    /// Rows that its encoder computes: those of its source and what its delta puts ahead of them; 0 without a source.
    pub fn source_rows(&self) -> usize {
        source_positions(self.bare_delta(), self.source.len()).0
    }

    /// Keys and values that its delta puts ahead of those that cross-attention reads of its source; 0 without a source.
    pub fn source_keys(&self) -> usize {
        source_positions(self.bare_delta(), self.source.len()).1
    }

    /// The cache that it takes with `new` tokens more.
    pub(super) fn footprint(&self, new: usize) -> Footprint {
        Footprint::of(self.bare_delta(), self.source.len(), self.tokens.len().saturating_add(new))
    }

    fn bare_delta(&self) -> Option<&Delta> {
        self.delta.as_ref().map(|held| &*held.delta)
    }
}

/// Of a source of so many tokens: the rows that the encoder computes, and the keys that a delta puts ahead of those that
/// cross-attention reads; nothing without a source.
fn source_positions(delta: Option<&Delta>, source: usize) -> (usize, usize) {
    match (source, delta) {
        (0, _) => (0, 0),
        (_, None) => (source, 0),
        (_, Some(delta)) => (delta.source_ahead().rows + source, delta.ahead_of(Stack::Memory).keys),
    }
}

/// The positions of the cache that a sequence takes in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// What cross-attention reads, which all branches share.
    pub memory: usize,
    /// Keys that a delta puts ahead of all rows, which all branches share.
    pub keys: usize,
    /// A branch's own rows, those that a delta puts ahead of its tokens included.
    pub branch: usize,
}

impl Footprint {
    /// Of a `source` of so many tokens (0 but for encoder-decoders), and of so many `tokens` given and to come.
    pub fn of(delta: Option<&Delta>, source: usize, tokens: usize) -> Self {
        let (rows, keys) = source_positions(delta, source);
        let ahead = delta.map(|d| d.ahead()).unwrap_or_default();
        Self { memory: rows + keys, keys: ahead.keys, branch: ahead.rows.saturating_add(tokens) }
    }

    /// Pages of so many branches.
    pub fn pages(self, branches: usize) -> usize {
        let shared = pages_for(self.memory) + pages_for(self.keys);
        branches.saturating_mul(pages_for(self.branch)).saturating_add(shared)
    }
}

/// What to do with a sequence.
#[derive(Debug, Clone)]
pub enum Work {
    /// Continue it.
    Generate(Generate),
    /// One vector of label logits: the delta's head, else the base's own.
    Classify,
    /// Label logits of every token.
    ClassifyTokens,
    /// One vector of the hidden size.
    Embed {
        /// How to pool; `Default`: mean for encoders, the last token for decoders.
        pooling: Pooling,
        /// Scale to unit length.
        normalize: bool,
    },
    /// Log-probabilities of its own tokens.
    Score {
        /// First position scored, at least 1.
        from: usize,
    },
}

/// How to continue a sequence.
#[derive(Debug, Clone)]
pub struct Generate {
    /// How tokens are chosen. An absent seed counts as 0: admission draws one.
    pub sampling: Sampling,
    /// Most new tokens, at least 1.
    pub max_new_tokens: usize,
    /// Tokens that end the output (the base's end-of-sequence ids among them, unless they are to be ignored).
    pub stop_tokens: Vec<u32>,
    /// Report log-probabilities, with this many alternatives.
    pub logprobs: Option<usize>,
    /// Search with beams instead of choosing tokens one by one: the penalties of `sampling` apply, its filters do not.
    pub beams: Option<Beams>,
    /// Guess tokens ahead, up to so many for a step; not with beams.
    pub speculation: Option<NgramSpeculation>,
}

/// A beam search and what is told of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Beams {
    /// How to search.
    pub search: BeamParams,
    /// How many of the outputs are told, the best ones; at most as many as beams.
    pub told: usize,
}

impl Work {
    /// Most events that this work sends.
    pub fn events(&self) -> usize {
        match self {
            Self::Generate(g) if g.beams.is_none() => g.max_new_tokens.saturating_add(2),
            _ => 2,
        }
    }
}

/// What the engine tells about a request. Exactly one of `Finished`, `Hypotheses`, `Output` and `Failed` comes last; a channel that
/// closes without one means that the engine has stopped.
#[derive(Debug, Clone)]
pub enum Event {
    /// A new token (never the stop token).
    Token(TokenOut, Began),
    /// The continuation is complete.
    Finished(Finished),
    /// The best outputs of a beam search, best first.
    Hypotheses(Vec<Hypothesis>, Timings),
    /// The result of work other than `Generate`.
    Output(Output, Timings),
    /// The request failed; its events before this one stay valid.
    Failed(EngineError),
}

/// How a request began, and what came of guesses so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Began {
    /// Its wait from arrival to its first step.
    pub queue: Duration,
    /// Tokens of its prompt whose keys and values were there.
    pub cached: u32,
    /// Tokens that were guessed ahead.
    pub drafted: u32,
    /// Those of them that gave a token more, up to the one that this comes with.
    pub accepted: u32,
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOut {
    /// The token.
    pub id: u32,
    /// Natural log of its probability under the raw logits; 0 if not asked for.
    pub logprob: f32,
    /// The likeliest tokens; empty if not asked for.
    pub top: Vec<(u32, f32)>,
}

/// The end of a continuation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// `StopToken`, also where a constraint leaves nothing to say, or `Length`.
    pub reason: FinishReason,
    /// Tokens; a stop token counts, though it is not sent.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// An output of a beam search.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// The sum of its tokens' log-probabilities over their number to the power of the length penalty.
    pub score: f32,
    /// `StopToken` or `Length`.
    pub reason: FinishReason,
    /// Tokens; a stop token counts.
    pub usage: Usage,
}

/// The result of work other than `Generate`.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// `[labels]`.
    Logits(Vec<f32>),
    /// Per token, `[labels]`.
    TokenLogits(Vec<Vec<f32>>),
    /// `[hidden]`.
    Embedding(Vec<f32>),
    /// Natural-log probabilities of the tokens from the first scored position on.
    Scores(Vec<f32>),
}

/// Why a request that was taken failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A step failed; only its own sequences did. The text is for logs.
    #[error("a step failed: {0}")]
    Internal(String),
    /// The model's numbers for this request are not finite (a broken delta).
    #[error("the model's output is not finite")]
    NonFinite,
    /// What bounds the output of this request cannot be kept, or not with bounded work.
    #[error("the constraint cannot be kept: {0}")]
    Constraint(String),
    /// Its constraint's state has grown to the largest of all, which together exceed what they may take.
    #[error(
        "the state of this output's constraint has come to {bytes} bytes, the largest of those in use, which may take {limit} bytes \
         together"
    )]
    ConstraintMemory {
        /// What it takes.
        bytes: u64,
        /// What all may take.
        limit: u64,
    },
    /// Neither the delta nor the base has a classification head.
    #[error("neither the delta nor the base has a head for this")]
    NoHead,
    /// The deadline passed.
    #[error("the deadline passed after {0:?}")]
    DeadlineExceeded(Duration),
    /// The engine stops.
    #[error("the engine is shutting down")]
    Draining,
    /// Its tenant is being deleted.
    #[error("the tenant is being deleted")]
    TenantEnded,
}

/// Why a request was not taken. Nothing was sent on its channel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// A request that this base or this cache can never serve; admission checks these first, for better messages.
    #[error("{0}")]
    Invalid(String),
    /// Its constraint's state would not even fit alone.
    #[error(
        "the state of an output's constraint takes {bytes} bytes; {limit} are there for all outputs of this server"
    )]
    ConstraintTooLarge {
        /// What it takes.
        bytes: u64,
        /// What there is for all.
        limit: u64,
    },
    /// The engine's queue is full.
    #[error("the engine's queue of {0} requests is full")]
    Overloaded(usize),
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Draining,
    /// The engine thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::PAGE_SIZE;

    #[test]
    fn branches_share_what_cross_attention_reads_and_a_prefix() {
        let whole = Footprint::of(None, PAGE_SIZE + 1, PAGE_SIZE);
        assert_eq!((whole.memory, whole.keys, whole.branch), (PAGE_SIZE + 1, 0, PAGE_SIZE));
        assert_eq!([1, 4].map(|n| whole.pages(n)), [2 + 1, 2 + 4]);
        assert_eq!(Footprint::of(None, 0, PAGE_SIZE + 1).pages(3), 3 * 2, "without a source there is no memory");
        let keys = Footprint { memory: 0, keys: PAGE_SIZE + 1, branch: PAGE_SIZE };
        assert_eq!([keys.pages(1), keys.pages(4), keys.pages(usize::MAX)], [2 + 1, 2 + 4, usize::MAX]);
    }
}
