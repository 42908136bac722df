//! A sequence: one request on its way through the engine. It knows its tokens and what was gathered so far; pages and
//! turns are the scheduler's.

use std::time::Instant;

use super::{
    request::{EngineError, Event, Finished, Generate, Output, Request, TokenOut, Work},
    sampler::History,
    scheduler::Demand,
    step::Got,
};
use crate::{
    admission::params::{FinishReason, Pooling, Timings, Usage},
    ids::DeltaId,
    rows::Ahead,
};

/// Whether a sequence goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// More rows are to be computed.
    GoesOn {
        /// A token was appended.
        grew: bool,
    },
    /// The last event was sent, or nobody listens any more.
    Ends,
}

/// Times of the tokens, for metrics.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tick {
    /// The first token, so long after arrival.
    First(f64),
    /// A later one, so long after the one before.
    Next(f64),
}

/// One request in the engine.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) request: Request,
    prompt: usize,
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// Scores, or the sum of hidden rows, or pooled rows so far.
    numbers: Vec<f32>,
    token_logits: Vec<Vec<f32>>,
}

impl Sequence {
    pub(super) fn new(request: Request) -> Self {
        let prompt = request.tokens.len();
        Self { request, prompt, started: None, first: None, last: None, numbers: vec![], token_logits: vec![] }
    }

    /// What its delta puts ahead of its tokens.
    pub(super) fn ahead(&self) -> Ahead {
        self.request.ahead()
    }

    /// What it asks of the scheduler. The last token of a text that is only scored predicts nothing, and the last
    /// generated one is never computed.
    pub(super) fn demand(&self) -> Demand {
        let ahead = self.ahead();
        let known = match self.request.work {
            Work::Score { .. } => (self.prompt - 1).max(1),
            _ => self.prompt,
        };
        let most = match &self.request.work {
            Work::Generate(g) => self.prompt + g.max_new_tokens - 1,
            _ => known,
        };
        Demand {
            total: ahead.rows + known,
            most: ahead.rows + most,
            reserved: ahead.keys,
            source: self.request.source_rows(),
            source_reserved: self.request.source_keys(),
        }
    }

    pub(super) fn delta_id(&self) -> Option<DeltaId> {
        self.request.delta.as_ref().map(super::HeldDelta::id)
    }

    pub(super) fn tokens(&self) -> &[u32] {
        &self.request.tokens
    }

    pub(super) fn history(&self) -> History<'_> {
        let (prompt, output) = self.request.tokens.split_at(self.prompt);
        History { prompt, output }
    }

    /// Its first rows are about to be computed. Returns whether this is the first time.
    pub(super) fn start(&mut self, now: Instant) -> bool {
        let first = self.started.is_none();
        self.started.get_or_insert(now);
        first
    }

    /// Tokens that it was given: the source's, where it has one.
    pub(super) fn prompt_tokens(&self) -> usize {
        if self.request.source.is_empty() { self.prompt } else { self.request.source.len() }
    }

    /// Its pages were taken: everything is computed again, what was generated stays.
    pub(super) fn restart(&mut self) {
        self.numbers.clear();
        self.token_logits.clear();
    }

    /// Sends the last event. Nobody may listen, which is fine.
    pub(super) fn fail(self, error: EngineError) {
        let _ = self.request.events.try_send(Event::Failed(error));
    }

    /// Takes what a step computed.
    pub(super) fn take(
        &mut self,
        got: Got,
        completes: bool,
        now: Instant,
    ) -> Result<(Fate, Option<Tick>), EngineError> {
        match got {
            Got::Nothing => {}
            Got::Token(token) => return self.append(token, now),
            Got::NonFinite => return Err(EngineError::NonFinite),
            Got::NoHead => return Err(EngineError::NoHead),
            Got::Numbers(numbers) => self.numbers.extend(numbers),
            Got::Sum(numbers) => {
                if self.numbers.is_empty() {
                    self.numbers = numbers;
                } else {
                    self.numbers.iter_mut().zip(numbers).for_each(|(a, b)| *a += b);
                }
            }
            Got::Rows(rows) => self.token_logits.extend(rows),
        }
        if !completes {
            return Ok((Fate::GoesOn { grew: false }, None));
        }
        let output = self.output();
        let finite = match &output {
            Output::TokenLogits(rows) => rows.iter().flatten().all(|x| x.is_finite()),
            Output::Logits(x) | Output::Embedding(x) | Output::Scores(x) => x.iter().all(|x| x.is_finite()),
        };
        if !finite {
            return Err(EngineError::NonFinite);
        }
        self.first = Some(now);
        self.last = Some(now);
        let _ = self.request.events.try_send(Event::Output(output, self.timings()));
        Ok((Fate::Ends, None))
    }

    fn append(&mut self, token: TokenOut, now: Instant) -> Result<(Fate, Option<Tick>), EngineError> {
        let tick = match self.last {
            None => Tick::First(now.duration_since(self.request.arrived).as_secs_f64()),
            Some(last) => Tick::Next(now.duration_since(last).as_secs_f64()),
        };
        self.first.get_or_insert(now);
        self.last = Some(now);
        let Work::Generate(Generate { max_new_tokens, stop_tokens, .. }) = &self.request.work else {
            return Err(EngineError::Internal("a token for work that generates none".into()));
        };
        let stops = stop_tokens.contains(&token.id);
        self.request.tokens.push(token.id);
        let full = self.request.tokens.len() - self.prompt >= *max_new_tokens;
        // fails only if the receiver is gone: the channel holds all events of the request
        let mut heard = stops || self.request.events.try_send(Event::Token(token, self.timings().queue)).is_ok();
        if stops || full {
            let reason = if stops { FinishReason::StopToken } else { FinishReason::Length };
            let end = Finished { reason, usage: self.usage(), timings: self.timings() };
            heard = heard && self.request.events.try_send(Event::Finished(end)).is_ok();
        }
        let ends = stops || full || !heard;
        Ok((if ends { Fate::Ends } else { Fate::GoesOn { grew: true } }, Some(tick)))
    }

    fn output(&mut self) -> Output {
        let mut numbers = std::mem::take(&mut self.numbers);
        match self.request.work {
            Work::ClassifyTokens => Output::TokenLogits(std::mem::take(&mut self.token_logits)),
            Work::Embed { pooling, normalize } => {
                if pooling == Pooling::Mean {
                    let read = self.prompt_tokens() as f32;
                    numbers.iter_mut().for_each(|x| *x /= read);
                }
                if normalize {
                    let norm = numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12);
                    numbers.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
                }
                Output::Embedding(numbers)
            }
            Work::Score { .. } => Output::Scores(numbers),
            Work::Classify | Work::Generate(_) => Output::Logits(numbers),
        }
    }

    fn usage(&self) -> Usage {
        let completion = self.request.tokens.len() - self.prompt;
        Usage { prompt_tokens: self.prompt_tokens() as u32, completion_tokens: completion as u32 }
    }

    fn timings(&self) -> Timings {
        let between = |a: Option<Instant>, b: Option<Instant>| match (a, b) {
            (Some(a), Some(b)) => b.saturating_duration_since(a),
            _ => std::time::Duration::ZERO,
        };
        Timings {
            queue: between(Some(self.request.arrived), self.started),
            prefill: between(self.started, self.first),
            decode: between(self.first, self.last),
        }
    }
}
