//! Grammars: what an output must be, compiled to what its next token may be.
//!
//! Wraps `llguidance`. A JSON schema, a regular expression, texts to choose from or a Lark grammar comes from a client, so all
//! that is done with it is bounded: its size, the work of compiling it and of every step, and what is kept of it. A step's bounds
//! are counted by the library, not timed.

mod cache;
mod matcher;
mod room;
mod schema;
mod state;
mod vocabulary;

use std::{
    sync::{Arc, OnceLock},
    thread,
};

use llguidance::{
    Logger,
    api::{GrammarInit, ParserLimits, TopLevelGrammar},
    toktrie::InferenceCapabilities,
};
use parking_lot::Mutex;

use self::{
    cache::Cache,
    matcher::{Outputs, Rule},
    room::{Room, Taken},
    state::State,
    vocabulary::Vocabulary,
};
use crate::{
    admission::params::{ConstraintParams, Violation},
    engine::{Constraint, ConstraintFactory},
    text::TextModel,
};

/// Stack of the thread that compiles: schemas that name each other thousands deep need some 10 MiB.
const STACK: usize = 128 << 20;

/// Longest message of the library that is told.
const MESSAGE: usize = 1000;

/// A text that cannot be gone on with.
const DEAD_END: &str = "no token of the base's vocabulary goes on from here";

/// Why a constraint was not compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// What is wrong with it.
    #[error("the constraint is refused: {0:?}")]
    Refused(Vec<Violation>),
    /// It is larger than all of them may be.
    #[error("the compiled constraint takes {bytes} bytes; {limit} are there for all of this server")]
    TooLarge {
        /// What it takes.
        bytes: u64,
        /// What there is.
        limit: u64,
    },
    /// Those that other requests hold leave it no room now.
    #[error("the compiled constraint takes {bytes} bytes; those of other requests leave less of {limit} bytes")]
    NoRoom {
        /// What it takes.
        bytes: u64,
        /// What there is for all.
        limit: u64,
    },
    /// Not the request's fault.
    #[error("cannot compile grammars: {0}")]
    Broken(String),
}

/// Compiles constraints for a base's vocabulary, and keeps those that were used last.
pub struct Grammars {
    text: Arc<TextModel>,
    /// Tokens that end outputs.
    ends: Vec<u32>,
    /// Made when the first constraint comes.
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
    cache: Mutex<Cache>,
    room: Arc<Room>,
}

/// A compiled constraint.
pub struct Grammar {
    /// At the beginning of an output; only ever copied.
    begin: Mutex<State>,
    vocabulary: Arc<Vocabulary>,
    /// About how many bytes a copy of it takes.
    state_bytes: u64,
    /// What it takes itself.
    taken: Taken,
}

impl Grammars {
    /// For the outputs of a base, which `ends` end. Compiled grammars that are kept or in use take at most `limit` bytes; those
    /// that are being compiled come beside them.
    pub fn new(text: Arc<TextModel>, ends: Vec<u32>, limit: u64) -> Self {
        Self { text, ends, vocabulary: OnceLock::new(), cache: Mutex::default(), room: Room::new(limit) }
    }

    /// What was compiled of a constraint before, if it is still here.
    pub fn kept(&self, constraint: &ConstraintParams) -> Option<Arc<Grammar>> {
        self.cache.lock().get(&cache::key(constraint))
    }

    /// Compiles a constraint, or finds it. May take seconds, with the first one of a process some more.
    ///
    /// # Errors
    /// A constraint that is not understood, that bounds nothing or that no output can keep to, or that takes too much work; no
    /// room for it.
    pub fn compile(&self, constraint: &ConstraintParams) -> Result<Arc<Grammar>, GrammarError> {
        if let Some(kept) = self.kept(constraint) {
            return Ok(kept);
        }
        let compiled = thread::scope(|scope| {
            let thread = thread::Builder::new().name("grammar".into()).stack_size(STACK);
            let compiling = thread.spawn_scoped(scope, || self.compile_now(constraint));
            let compiling = compiling.map_err(|e| GrammarError::Broken(e.to_string()))?;
            compiling.join().map_err(|_| GrammarError::Broken("a panic".into()))?
        });
        let grammar = Arc::new(compiled?);
        let bytes = grammar.bytes();
        self.cache.lock().put(cache::key(constraint), Arc::clone(&grammar), bytes);
        Ok(grammar)
    }

    /// Takes room for a compiled grammar, if need be that of those that are only kept.
    fn take(&self, bytes: u64) -> Result<Taken, GrammarError> {
        let limit = self.room.limit;
        if bytes > limit {
            return Err(GrammarError::TooLarge { bytes, limit });
        }
        let taken = self.room.take(bytes).or_else(|| {
            self.cache.lock().free();
            self.room.take(bytes)
        });
        taken.ok_or(GrammarError::NoRoom { bytes, limit })
    }

    fn compile_now(&self, constraint: &ConstraintParams) -> Result<Grammar, GrammarError> {
        let refused = |message: String| {
            let field = constraint.field().to_owned();
            GrammarError::Refused(vec![Violation { field, code: String::new(), message }])
        };
        let vocabulary = self.vocabulary.get_or_init(|| Vocabulary::new(&self.text, &self.ends).map(Arc::new));
        let vocabulary = vocabulary.as_ref().map_err(|e| refused(format!("cannot be kept to by this base: {e}")))?;
        let (source, grammar) = match constraint {
            ConstraintParams::JsonObject => (0, TopLevelGrammar::from_json_schema(schema::object())),
            ConstraintParams::JsonSchema(text) => {
                (text.len(), TopLevelGrammar::from_json_schema(schema::parse(text).map_err(GrammarError::Refused)?))
            }
            ConstraintParams::Regex(text) => {
                // the library would leave it out
                if text.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1 {
                    return Err(refused("ends with a backslash that escapes nothing".into()));
                }
                (text.len(), TopLevelGrammar::from_regex(text))
            }
            ConstraintParams::Choice(texts) => (texts.iter().map(String::len).sum(), choice(texts)),
            ConstraintParams::Lark(text) => {
                if sets_temperature(text) {
                    return Err(refused("the attribute \"temperature\" is not supported".into()));
                }
                (text.len(), TopLevelGrammar::from_lark(text.clone()))
            }
        };
        let parser = vocabulary.factory.create_parser_from_init_ext(
            GrammarInit::Serialized(grammar),
            Logger::new(0, 0),
            InferenceCapabilities::default(),
            limits(constraint),
        );
        let parser = parser.map_err(|e| refused(clean(&e.to_string())))?;
        let mut begin = State::new(parser);
        // the first look takes longest: its work is in every copy. It also tells whether there is anything to say
        let mask = begin.mask().map_err(|e| refused(clean(&e)))?;
        if (0..mask.len() as u32 - 1).all(|id| !mask.is_allowed(id)) {
            return Err(refused("no output but the empty one keeps to it".into()));
        }
        let state_bytes = begin.bytes();
        let taken = self.take(state_bytes + 64 * source as u64)?;
        Ok(Grammar { begin: Mutex::new(begin), vocabulary: Arc::clone(vocabulary), state_bytes, taken })
    }
}

impl Grammar {
    /// Bounds one output; `fresh`: no text precedes it, so that a decoder may take its first space away.
    pub fn start(&self, fresh: bool) -> Box<dyn Constraint> {
        // a copy of its own: nobody waits for another's step, and nobody's mishap is another's
        let state = self.begin.lock().copy();
        Box::new(Rule::new(state, Arc::clone(&self.vocabulary), fresh))
    }

    /// Bounds outputs, each from when it begins; `fresh` as in [`Self::start`].
    pub fn outputs(self: Arc<Self>, fresh: bool) -> Arc<dyn ConstraintFactory> {
        Arc::new(Outputs { grammar: self, fresh })
    }

    /// About how many bytes of memory it takes.
    pub fn bytes(&self) -> u64 {
        self.taken.bytes
    }
}

/// What the library may do for a constraint, in its own units.
fn limits(constraint: &ConstraintParams) -> ParserLimits {
    let json = matches!(constraint, ConstraintParams::JsonSchema(_) | ConstraintParams::JsonObject);
    // ambiguous grammars cost the square of this; an object has a few items for every property that may be left out
    let (max_items_in_row, step_max_items) = if json { (2000, 20_000) } else { (500, 10_000) };
    ParserLimits {
        max_items_in_row,
        step_max_items,
        initial_lexer_fuel: 400_000,
        step_lexer_fuel: 100_000,
        max_lexer_states: 16_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// One of some texts.
fn choice(texts: &[String]) -> TopLevelGrammar {
    let quoted: Vec<String> = texts.iter().map(|text| serde_json::Value::from(text.as_str()).to_string()).collect();
    // one terminal, so that it is one automaton
    TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {}", quoted.join(" | ")))
}

/// Whether a rule of a Lark grammar wants a temperature of its own: `name[temperature=0.5]: ...`.
fn sets_temperature(grammar: &str) -> bool {
    let head = |line: &str| {
        line.split(':').next().and_then(|head| head.split_once('[')).is_some_and(|(name, attributes)| {
            let named = name.trim().chars().all(|c| c.is_alphanumeric() || "_!?{},.".contains(c));
            named && attributes.contains("temperature")
        })
    };
    grammar.lines().any(head)
}

/// The library's message without what it adds for its developers.
fn clean(message: &str) -> String {
    let marks = ["\n<backtrace>", "\n<state>", "\n<non-verbose/>", "\n\nStack backtrace"];
    let end = marks.iter().filter_map(|mark| message.find(mark)).min().unwrap_or(message.len());
    let text = message[..end].trim();
    if text.starts_with("NoExtension") {
        return DEAD_END.into();
    }
    if text.contains("removal index") || text.contains("missing special token prefix") {
        return "names a special token; outputs are text".into();
    }
    if text.starts_with("panic: ") {
        return "is more than the grammar library can handle".into();
    }
    if text.starts_with("oneOf constraints") {
        return "oneOf is only supported where at most one of its options can hold; anyOf may do".into();
    }
    let mut short: String = text.chars().take(MESSAGE).collect();
    if short.len() < text.len() {
        short += " ...";
    }
    short
}

#[cfg(test)]
mod tests;
