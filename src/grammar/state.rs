//! The library's state of one output: as its own `Matcher`, and it also tells how many bytes it has come to.

use std::panic::AssertUnwindSafe;

use llguidance::{TokenParser, api::StopReason, panic_utils::catch_unwind, toktrie::SimpleVob};

/// What a state takes beside its automaton: rows of the parser, the tables of a lexer that has seen nothing.
const FIXED: u64 = 64 << 10;

/// A parser that goes through one output. After an error it answers with that error only.
pub(super) struct State {
    parser: TokenParser,
    broken: Option<String>,
}

impl State {
    /// At the beginning of an output.
    pub(super) fn new(mut parser: TokenParser) -> Self {
        if parser.is_fresh() {
            parser.start_without_prompt();
        }
        Self { parser, broken: None }
    }

    /// A copy that shares nothing that changes.
    pub(super) fn copy(&self) -> Self {
        Self { parser: self.parser.deep_clone(), broken: self.broken.clone() }
    }

    /// About how many bytes of memory it takes now: the library counts elements of its tables, which have room for up to twice as
    /// many.
    pub(super) fn bytes(&self) -> u64 {
        match self.broken {
            None => FIXED + 2 * self.parser.parser.lexer_stats().num_bytes as u64,
            // a panic may have poisoned the lock that the figure is behind; its sequence ends now anyway
            Some(_) => FIXED,
        }
    }

    /// The tokens that may come next.
    pub(super) fn mask(&mut self) -> Result<SimpleVob, String> {
        self.guarded(|parser| parser.compute_mask().map_err(|e| e.to_string()))
    }

    /// Whether the output may end here.
    pub(super) fn is_accepting(&mut self) -> Result<bool, String> {
        self.guarded(|parser| Ok(parser.is_accepting()))
    }

    /// Goes on behind a token.
    pub(super) fn consume(&mut self, token: u32) -> Result<(), String> {
        self.guarded(|parser| {
            if parser.consume_token(token).map_err(|e| e.to_string())? > 0 {
                return Err("unexpected backtracking".into());
            }
            parser.check_stop().map(drop).map_err(|e| e.to_string())
        })
    }

    /// Why it has stopped, if it has.
    pub(super) fn stop_reason(&self) -> StopReason {
        if self.broken.is_some() { StopReason::InternalError } else { self.parser.stop_reason() }
    }

    /// The library says it is the caller's fault, or panics: both are errors of this output.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut TokenParser) -> Result<T, String>) -> Result<T, String> {
        if let Some(why) = &self.broken {
            return Err(why.clone());
        }
        let parser = &mut self.parser;
        let outcome = catch_unwind(AssertUnwindSafe(|| Ok(work(parser)))).map_err(|e| e.to_string());
        outcome.flatten().inspect_err(|why| self.broken = Some(why.clone()))
    }
}
