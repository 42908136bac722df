//! A sequence: one request on its way through the engine. It knows its tokens and what was gathered so far; pages and
//! turns are the scheduler's. How tokens come, one or several in a step, is in `tokens`.

mod tokens;

use std::time::Instant;

use super::{
    branches::{Branches, Move},
    constraint::{Constrained, TokenSet},
    drafts::Drafts,
    request::{EngineError, Event, Finished, Generate, HeldDelta, Output, Request, Work},
    sampler::History,
    scheduler::{Claim, Demand, Names},
    step::Got,
};
use crate::{
    admission::params::{FinishReason, Pooling, Timings, Usage},
    delta::SiteTable,
    ids::DeltaId,
    kv::{PageKey, PageKeys},
    rows::Ahead,
};

/// Whether a sequence goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// It has to be told that it failed; tokens may have been told before.
    Fails(EngineError),
}

/// What became of a sequence with a step: whether it goes on and when tokens came. An error: nothing came of it.
pub(super) type Taken = Result<(Fate, Option<Tick>), EngineError>;

/// Tokens of a sequence that begins, or begins anew because it lost its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Begin {
    /// Whether it never began before.
    pub(super) first: bool,
    /// Whether it may find keys and values of others.
    pub(super) shares: bool,
    /// Tokens whose keys and values were there.
    pub(super) found: usize,
    /// Tokens that are to be computed.
    pub(super) missing: usize,
}

/// When tokens came, for metrics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tick {
    /// Whether they are the first: then the time is that since arrival, else that since the last ones.
    pub(super) first: bool,
    pub(super) seconds: f64,
    /// How many came together: with drafts there may be several.
    pub(super) tokens: usize,
}

/// One request in the engine.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) request: Request,
    prompt: usize,
    /// The first of its tokens that its delta acts on; `None`: it acts on none.
    acts_from: Option<usize>,
    /// Names its pages; `None`: they are its own alone.
    keys: Option<PageKeys>,
    /// Whether rows are shared, and not only what its delta puts ahead of them.
    shares: bool,
    /// Whether it has begun since it got its pages.
    begun: bool,
    /// Tokens of its prompt whose keys and values were there when it first began.
    cached: u32,
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// Scores, or the sum of hidden rows, or pooled rows so far.
    numbers: Vec<f32>,
    token_logits: Vec<Vec<f32>>,
    search: Option<Branches>,
    constraint: Option<Constrained>,
    drafts: Option<Drafts>,
    /// Tokens that have to follow its own: drafts of the next step ahead of any guess.
    forced: Vec<u32>,
}

impl Sequence {
    /// `shares`: whether this engine shares rows of prompts at all.
    pub(super) fn new(mut request: Request, sites: &SiteTable, shares: bool) -> Self {
        let prompt = request.tokens.len();
        let acts_from = request.delta.as_ref().map_or(Some(0), |held| held.delta().acts_from(&request.tokens));
        let keys = request.tenant.as_ref().map(|tenant| {
            // a delta that acts behind all keys shares those of the bare base
            let delta = request.delta.as_ref().filter(|held| !held.delta().keeps_keys(sites));
            match (delta.filter(|held| held.delta().invocation().is_some()), acts_from) {
                (None, _) => PageKeys::new(tenant, delta.map(HeldDelta::id), request.ahead()),
                (Some(held), Some(from)) => PageKeys::acting_from(tenant, from, held.id()),
                (Some(_), None) => PageKeys::new(tenant, None, request.ahead()),
            }
        });
        // who wants numbers of all rows has to compute them; what a decoder has read with an encoder is not in its tokens
        let plain = request.source.is_empty() && request.token_types.is_none();
        let shares = shares && keys.is_some() && plain && matches!(request.work, Work::Generate(_));
        let search = match &request.work {
            Work::Generate(how) => how.beams.map(|beams| Branches::new(&request.tokens, how, &beams.search)),
            _ => None,
        };
        let constraint = request.constraint.take().map(Constrained::new);
        let drafts = match &request.work {
            Work::Generate(how) if how.beams.is_none() => how.speculation.map(Drafts::new),
            _ => None,
        };
        let (numbers, token_logits) = (vec![], vec![]);
        let (begun, cached) = (false, 0);
        Self {
            request,
            prompt,
            acts_from,
            keys,
            shares,
            begun,
            cached,
            started: None,
            first: None,
            last: None,
            numbers,
            token_logits,
            search,
            constraint,
            drafts,
            forced: vec![],
        }
    }

    /// What its delta puts ahead of its tokens.
    pub(super) fn ahead(&self) -> Ahead {
        self.request.ahead()
    }

    /// What it asks of the scheduler. The last token of a text that is only scored predicts nothing, and the last
    /// generated one is never computed.
    pub(super) fn demand(&mut self) -> Demand {
        let ahead = self.ahead();
        let known = match self.request.work {
            Work::Score { .. } => (self.prompt - 1).max(1),
            _ => self.prompt,
        };
        let most = match &self.request.work {
            Work::Generate(g) => self.prompt + g.max_new_tokens - 1,
            _ => known,
        };
        let names = Names {
            ahead: self.keys.as_ref().map(PageKeys::ahead).unwrap_or_default(),
            rows: self.next_keys(ahead.rows + known),
        };
        Demand {
            names,
            total: ahead.rows + known,
            most: ahead.rows + most,
            reserved: ahead.keys,
            source: self.request.source_rows(),
            source_reserved: self.request.source_keys(),
            width: match &self.request.work {
                Work::Generate(Generate { beams: Some(beams), .. }) => beams.search.beams.max(1) as usize,
                _ => 1,
            },
            generates: matches!(self.request.work, Work::Generate(_)),
            constraint_bytes: self.constraint_bytes(),
            claim: Claim {
                tenant: self.request.tenant.clone(),
                weight: self.request.weight,
                priority: self.request.priority,
            },
        }
    }

    /// Names of whole pages within its first `rows` rows that were not named before; of a search, whose beams part ways
    /// there, within its prompt.
    pub(super) fn next_keys(&mut self, rows: usize) -> Vec<PageKey> {
        match self.keys.as_mut().filter(|_| self.shares) {
            Some(keys) => keys.next(&self.request.tokens, rows),
            None => vec![],
        }
    }

    /// Its delta, if that acts on any of its tokens.
    pub(super) fn delta(&self) -> Option<&HeldDelta> {
        self.request.delta.as_ref().filter(|_| self.acts_from.is_some())
    }

    pub(super) fn delta_id(&self) -> Option<DeltaId> {
        self.delta().map(HeldDelta::id)
    }

    /// How many of `len` rows behind `context` ones, from the first, its delta leaves as they are. One that has to be called puts
    /// nothing ahead of the tokens, so that these are the rows.
    pub(super) fn spared(&self, context: usize, len: usize) -> usize {
        self.acts_from.map_or(len, |from| from.saturating_sub(context).min(len))
    }

    /// Prompt and output so far of a branch; 0 of a sequence without others.
    pub(super) fn tokens(&self, branch: usize) -> &[u32] {
        self.search.as_ref().map_or(&self.request.tokens, |search| search.tokens(branch))
    }

    pub(super) fn history(&self, branch: usize) -> History<'_> {
        self.split(self.tokens(branch))
    }

    /// Its tokens, and maybe more behind them, as prompt and output.
    pub(super) fn split<'a>(&self, tokens: &'a [u32]) -> History<'a> {
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

    /// Rows behind `context` ones are about to be computed. Says how it begins, if it does.
    pub(super) fn begin(&mut self, context: usize, now: Instant) -> Option<Begin> {
        if std::mem::replace(&mut self.begun, true) {
            return None;
        }
        let first = self.started.is_none();
        self.started.get_or_insert(now);
        let found = context.saturating_sub(self.ahead().rows);
        if first {
            self.cached = u32::try_from(found.min(self.prompt)).unwrap_or(u32::MAX);
        }
        let missing = self.tokens(0).len().saturating_sub(found);
        Some(Begin { first, shares: self.shares, found, missing })
    }

    /// Tokens that it was given: the source's, where it has one.
    pub(super) fn prompt_tokens(&self) -> usize {
        if self.request.source.is_empty() { self.prompt } else { self.request.source.len() }
    }

    /// Its pages were taken: everything is computed again, what was generated stays.
    pub(super) fn restart(&mut self) {
        self.begun = false;
        self.numbers.clear();
        self.token_logits.clear();
        self.search.as_mut().into_iter().for_each(Branches::restart);
    }

    /// What its next token may be; `None`: anything.
    pub(super) fn allowed(&self) -> Option<&TokenSet> {
        self.constraint.as_ref().and_then(Constrained::allowed)
    }

    /// Whether [`Self::look`] has to be called before its next token is chosen. `begun`: of one that has begun, or has not.
    pub(super) fn is_due(&self, begun: bool) -> bool {
        self.constraint.as_ref().is_some_and(|c| c.is_due() && c.has_begun() == begun)
    }

    /// About how many bytes of memory its constraint's state takes, or will take; 0 without one.
    pub(super) fn constraint_bytes(&self) -> u64 {
        self.constraint.as_ref().map_or(0, Constrained::bytes)
    }

    /// Finds out what its next token may be. `false`: nothing is left to say.
    pub(super) fn look(&mut self) -> Result<bool, EngineError> {
        let (Some(constraint), Work::Generate(how)) = (&mut self.constraint, &self.request.work) else {
            return Ok(true);
        };
        constraint.look(&how.stop_tokens).map_err(EngineError::Constraint)
    }

    /// Sends its end, where nothing is left to say. Nobody may listen, which is fine.
    pub(super) fn end(self) {
        self.finish(FinishReason::StopToken);
    }

    /// Whether somebody listens.
    fn finish(&self, reason: FinishReason) -> bool {
        let end = Finished { reason, usage: self.usage(), timings: self.timings() };
        self.request.events.try_send(Event::Finished(end)).is_ok()
    }

    /// Sends the last event. Nobody may listen, which is fine.
    pub(super) fn fail(self, error: EngineError) {
        let _ = self.request.events.try_send(Event::Failed(error));
    }

    /// Takes what a step computed.
    pub(super) fn take(&mut self, got: Got, completes: bool, now: Instant) -> Taken {
        match got {
            Got::Nothing => {}
            Got::Tokens(chosen) => return Ok(self.take_tokens(chosen, now)),
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
        let since = now.duration_since(self.last.unwrap_or(self.request.arrived));
        let tick = Tick { first: self.last.is_none(), seconds: since.as_secs_f64(), tokens: 1 };
        self.first.get_or_insert(now);
        self.last = Some(now);
        tick
    }

    /// Takes a branch's continuations; with those of the last, the next beams are chosen.
    fn search_on(&mut self, found: Vec<(u32, f32)>, now: Instant) -> Taken {
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
        let (usage, timings) = (Usage { completion_tokens: 0, ..self.usage() }, self.timings());
        if let Some(search) = self.search.take() {
            let best = search.into_best(beams.told, stop_tokens, usage);
            let _ = self.request.events.try_send(Event::Hypotheses(best, timings));
        }
        Ok((Fate::Ends, Some(tick)))
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
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens() as u32, completion as u32);
        let (drafted_tokens, accepted_tokens) = self.drafted();
        Usage { prompt_tokens, completion_tokens, cached_tokens: self.cached, drafted_tokens, accepted_tokens }
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
