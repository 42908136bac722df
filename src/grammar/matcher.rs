//! A grammar on its way through one output.

use std::{fmt, sync::Arc};

use llguidance::api::StopReason;

use super::{Grammar, clean, state::State, vocabulary::Vocabulary};
use crate::engine::{Constraint, ConstraintFactory, Ending, TokenSet};

/// Outputs that a grammar bounds; `fresh`: no text precedes them.
pub(super) struct Outputs {
    pub(super) grammar: Arc<Grammar>,
    pub(super) fresh: bool,
}

impl fmt::Debug for Outputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outputs").field("fresh", &self.fresh).finish_non_exhaustive()
    }
}

impl ConstraintFactory for Outputs {
    fn bytes(&self) -> u64 {
        self.grammar.state_bytes
    }

    fn begin(&self) -> Box<dyn Constraint> {
        self.grammar.start(self.fresh)
    }
}

/// The state after the tokens so far.
pub(super) struct Rule {
    matcher: State,
    vocabulary: Arc<Vocabulary>,
    /// Whether the decoder will drop the space that the next token begins with.
    drops: bool,
}

impl Rule {
    /// At the beginning of an output; `fresh`: its first token has no neighbours.
    pub(super) fn new(matcher: State, vocabulary: Arc<Vocabulary>, fresh: bool) -> Self {
        let drops = fresh && vocabulary.blanks.is_some();
        Self { matcher, vocabulary, drops }
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rule").field("stopped", &self.matcher.stop_reason()).finish_non_exhaustive()
    }
}

impl Constraint for Rule {
    fn allowed(&mut self, allowed: &mut TokenSet) -> Result<Ending, String> {
        if matches!(self.matcher.stop_reason(), StopReason::NoExtension | StopReason::EndOfSentence) {
            return Ok(Ending::Must);
        }
        let mask = self.matcher.mask().map_err(|e| clean(&e))?;
        let may_end = self.matcher.is_accepting().map_err(|e| clean(&e))?;
        let words = (self.vocabulary.size / 32) as usize;
        let of =
            |from: usize| mask.as_slice().iter().skip(from).zip(&self.vocabulary.text).map(|(bits, text)| bits & text);
        if self.drops {
            allowed.assign(of(words));
            // a space that is dropped says nothing yet: something else has to follow it
            if of(0).any(|bits| bits != 0) {
                self.vocabulary.blanks.iter().flatten().for_each(|id| allowed.insert(*id));
            }
        } else {
            allowed.assign(of(0));
        }
        match (allowed.is_empty(), may_end) {
            (true, true) => Ok(Ending::Must),
            (true, false) => Err(super::DEAD_END.into()),
            (false, true) => Ok(Ending::May),
            (false, false) => Ok(Ending::No),
        }
    }

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        let drops = std::mem::take(&mut self.drops);
        if drops && self.vocabulary.blanks.as_ref().is_some_and(|blanks| blanks.contains(&token)) {
            return Ok(false);
        }
        let id = if drops { self.vocabulary.size + token } else { token };
        self.matcher.consume(id).map_err(|e| clean(&e))?;
        Ok(self.matcher.stop_reason() != StopReason::NotStopped)
    }

    fn bytes(&self) -> u64 {
        self.matcher.bytes()
    }
}
