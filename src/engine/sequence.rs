//! A sequence: one request on its way through the engine. It knows its tokens and what was gathered so far; pages and
//! turns are the scheduler's.

use std::time::Instant;

use super::{
    branches::{Branches, Move},
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
    /// Other branches of its step are to be seen first.
    Waits,
    /// A token was appended to each of so many beams.
    Branches(usize),
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
    search: Option<Branches>,
}

impl Sequence {
    pub(super) fn new(request: Request) -> Self {
        let prompt = request.tokens.len();
        let search = match &request.work {
            Work::Generate(how) => how.beams.map(|beams| Branches::new(&request.tokens, how, &beams.search)),
            _ => None,
        };
        let (numbers, token_logits) = (vec![], vec![]);
        Self { request, prompt, started: None, first: None, last: None, numbers, token_logits, search }
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
            width: match &self.request.work {
                Work::Generate(Generate { beams: Some(beams), .. }) => beams.search.beams.max(1) as usize,
                _ => 1,
            },
        }
    }

    pub(super) fn delta_id(&self) -> Option<DeltaId> {
        self.request.delta.as_ref().map(super::HeldDelta::id)
    }

    /// Prompt and output so far of a branch; 0 of a sequence without others.
    pub(super) fn tokens(&self, branch: usize) -> &[u32] {
        self.search.as_ref().map_or(&self.request.tokens, |search| search.tokens(branch))
    }

    pub(super) fn history(&self, branch: usize) -> History<'_> {
        let tokens = self.tokens(branch);
        let (prompt, output) = tokens.split_at(self.prompt.min(tokens.len()));
        History { prompt, output }
    }

    /// How many continuations a search wants to know of each branch; `None` of a sequence that takes one token.
    pub(super) fn candidates(&self) -> Option<usize> {
        self.search.as_ref().map(Branches::candidates)
    }

    /// Keys and values that its branches go on from, and the first cache slot of what they do not share.
    pub(super) fn moves(&self) -> (Vec<Move>, usize) {
        let own = self.ahead().slots() + self.prompt;
        (self.search.as_ref().map(Branches::moves).unwrap_or_default(), own)
    }

    /// They were copied.
    pub(super) fn moved(&mut self) {
        self.search.as_mut().into_iter().for_each(Branches::moved);
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
        self.search.as_mut().into_iter().for_each(Branches::restart);
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
            Got::Candidates(found) => return self.search_on(found, now),
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

    /// Notes when a token came.
    fn tick(&mut self, now: Instant) -> Tick {
        let tick = match self.last {
            None => Tick::First(now.duration_since(self.request.arrived).as_secs_f64()),
            Some(last) => Tick::Next(now.duration_since(last).as_secs_f64()),
        };
        self.first.get_or_insert(now);
        self.last = Some(now);
        tick
    }

    /// Takes a branch's continuations; with those of the last, the next beams are chosen.
    fn search_on(&mut self, found: Vec<(u32, f32)>, now: Instant) -> Result<(Fate, Option<Tick>), EngineError> {
        let strange = || EngineError::Internal("continuations for work that searches none".into());
        let search = self.search.as_mut().ok_or_else(strange)?;
        if !search.collect(found) {
            return Ok((Fate::Waits, None));
        }
        let tick = self.tick(now);
        let Work::Generate(Generate { stop_tokens, beams: Some(beams), .. }) = &self.request.work else {
            return Err(strange());
        };
        let over = self.search.as_mut().is_some_and(|search| search.select(stop_tokens));
        if !over {
            return Ok((Fate::Branches(self.search.as_ref().map_or(1, Branches::open)), Some(tick)));
        }
        let (prompt, timings) = (self.prompt_tokens() as u32, self.timings());
        if let Some(search) = self.search.take() {
            let best = search.into_best(beams.told, stop_tokens, prompt);
            let _ = self.request.events.try_send(Event::Hypotheses(best, timings));
        }
        Ok((Fate::Ends, Some(tick)))
    }

    fn append(&mut self, token: TokenOut, now: Instant) -> Result<(Fate, Option<Tick>), EngineError> {
        let tick = self.tick(now);
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
