//! How a sequence's tokens come: drafts of those that follow, and what a step says of them.
//!
//! A draft is a token that is computed ahead of being chosen: one that was guessed, or one that has to come, since the constraint
//! allows no other (a forced token). Both are taken only where they are what was chosen, by the same code; a forced one always
//! is. So an output with forced tokens is that without them, numbers included; it takes fewer steps. Usage counts guesses only.

use std::time::Instant;

use super::{Fate, Sequence, Tick};
use crate::{
    admission::params::FinishReason,
    engine::{
        constraint::Constrained,
        drafts::{Drafts, Guess},
        guard::caught,
        request::{Began, EngineError, Event, Generate, TokenOut, Work},
        scheduler::Chance,
        step::{Chosen, choose},
    },
};

impl Sequence {
    /// What is to be computed behind its tokens.
    pub(in crate::engine) fn drafts(&self) -> &[u32] {
        match self.forced.as_slice() {
            [] => self.drafts.as_ref().map(Drafts::tokens).unwrap_or_default(),
            forced => forced,
        }
    }

    /// Whether its drafts are tokens that have to come.
    pub(in crate::engine) fn is_forced(&self) -> bool {
        !self.forced.is_empty()
    }

    /// Whether there may be drafts of its tokens at all.
    pub(in crate::engine) fn speculates(&self) -> bool {
        self.drafts.is_some() || self.constraint.is_some()
    }

    /// Finds out or guesses what follows its tokens: how many drafts there are, and how likely each is right. Nothing is guessed that
    /// is known not to be allowed.
    pub(in crate::engine) fn draft(&mut self, guess: Guess) -> (usize, Chance) {
        self.forced.clear();
        self.forced.extend(self.constraint.iter().flat_map(Constrained::forced));
        if self.is_forced() {
            self.drafts.iter_mut().for_each(Drafts::clear);
            return (self.forced.len(), Chance::CERTAIN);
        }
        let Some(drafts) = &mut self.drafts else { return (0, Chance::EVEN) };
        drafts.guess(guess, &self.request.source, &self.request.tokens);
        let first = drafts.tokens().first();
        let allows = |c: &Constrained| c.allowed().is_some_and(|all| first.is_some_and(|first| all.contains(*first)));
        if !self.constraint.as_ref().is_none_or(allows) {
            drafts.clear();
        }
        (drafts.tokens().len(), drafts.chance())
    }

    /// Takes the token that was due and those that follow it. A panic among them is a failure, and tokens told before one count.
    pub(super) fn take_tokens(&mut self, chosen: Chosen, now: Instant) -> (Fate, Option<Tick>) {
        let tick = self.tick(now);
        let (before, drafted) = (self.request.tokens.len(), chosen.drafted);
        let appended = caught(|| self.append_all(chosen)).map_err(EngineError::Internal);
        let fate = match appended.flatten() {
            Ok(true) => Fate::GoesOn { grew: true },
            Ok(false) => Fate::Ends,
            Err(error) => Fate::Fails(error),
        };
        let said = self.request.tokens.get(before..).unwrap_or_default();
        self.drafts.iter_mut().for_each(|drafts| drafts.learn(drafted, said));
        let tokens = said.len();
        (fate, (tokens > 0).then_some(Tick { tokens, ..tick }))
    }

    /// Takes them one by one; whether more may follow.
    fn append_all(&mut self, chosen: Chosen) -> Result<bool, EngineError> {
        let Chosen { drafted, tokens, rest, non_finite } = chosen;
        if let Some(drafts) = self.guesses() {
            drafts.drafted += drafted as u32;
        }
        for (i, token) in tokens.into_iter().enumerate() {
            if i > 0 {
                self.accepts();
            }
            if !self.append(token)? {
                return Ok(false);
            }
        }
        if non_finite {
            return Err(EngineError::NonFinite);
        }
        let Some(rest) = rest else { return Ok(true) };
        rest.read(|rows| self.append_allowed(rows)).map_err(EngineError::Internal)?
    }

    /// Takes what a constraint allows of drafts' rows, as long as drafts are right: it is known only when it was told of the token
    /// before.
    fn append_allowed<'a>(&mut self, rows: impl Iterator<Item = &'a [f32]>) -> Result<bool, EngineError> {
        for (i, logits) in rows.enumerate() {
            if self.request.tokens.last() != self.drafts().get(i) {
                break;
            }
            if !self.look()? {
                self.finish(FinishReason::StopToken);
                return Ok(false);
            }
            let token = choose(logits, self, self.history(0)).ok_or(EngineError::NonFinite)?;
            self.accepts();
            if !self.append(token)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes the next token; whether more may follow.
    fn append(&mut self, token: TokenOut) -> Result<bool, EngineError> {
        let Work::Generate(Generate { max_new_tokens, stop_tokens, .. }) = &self.request.work else {
            return Err(EngineError::Internal("a token for work that generates none".into()));
        };
        let stops = stop_tokens.contains(&token.id);
        let complete = match &mut self.constraint {
            Some(constraint) if !stops => constraint.accept(token.id).map_err(EngineError::Constraint)?,
            _ => false,
        };
        self.request.tokens.push(token.id);
        let full = self.request.tokens.len() - self.prompt >= *max_new_tokens;
        // fails only if the receiver is gone: the channel holds all events of the request
        let (drafted, accepted) = self.drafted();
        let began = Began { queue: self.timings().queue, cached: self.cached, drafted, accepted };
        let mut heard = stops || self.request.events.try_send(Event::Token(token, began)).is_ok();
        if stops || complete || full {
            let reason = if stops || complete { FinishReason::StopToken } else { FinishReason::Length };
            heard = heard && self.finish(reason);
        }
        Ok(heard && !stops && !complete && !full)
    }

    /// The guesses of this step, if its drafts are any.
    fn guesses(&mut self) -> Option<&mut Drafts> {
        self.drafts.as_mut().filter(|_| self.forced.is_empty())
    }

    /// A draft gave a token more.
    fn accepts(&mut self) {
        if let Some(drafts) = self.guesses() {
            drafts.accepted += 1;
        }
    }

    /// Guesses that were computed, and those of them that were chosen.
    pub(super) fn drafted(&self) -> (u32, u32) {
        self.drafts.as_ref().map_or((0, 0), |drafts| (drafts.drafted, drafts.accepted))
    }
}
