//! The library's state of one output: as its own `Matcher`, and it also tells how many bytes it has come to.

use std::panic::AssertUnwindSafe;

use llguidance::{TokenParser, api::StopReason, panic_utils::catch_unwind, toktrie::SimpleVob};

/// What a state takes beside all that is counted: the tables of a lexer that has seen nothing, rows that a look tries.
const FIXED: u64 = 64 << 10;
/// What the library keeps of an item of its Earley table, in a table that has room for up to twice as many; as much again where
/// items have a parameter.
const ITEM: u64 = 16;
/// What it keeps of a row of them: where it begins, its lexeme with its text.
const ROW: u64 = 192;
/// What it keeps of a byte of the output: the byte in two texts, its token, the lexer's state behind it.
const BYTE: u64 = 40;
/// What it keeps of a text that a rule captures, beside the text and its name.
const CAPTURE: u64 = 96;

/// What one output has left in the parser's tables: the library never takes any of it away.
#[derive(Debug, Clone, Copy, Default)]
struct Kept {
    items: u64,
    rows: u64,
    /// Texts that rules captured.
    captures: usize,
    /// Bytes of these.
    captured: u64,
}

impl Kept {
    fn bytes(&self, parametric: bool) -> u64 {
        let item = if parametric { 2 * ITEM } else { ITEM };
        self.items * item + self.rows * ROW + self.captured
    }

    /// Counts the captured texts that are new.
    fn note_captures(&mut self, all: &[(String, Vec<u8>)]) {
        for (name, text) in all.iter().skip(self.captures) {
            self.captured += CAPTURE + (name.len() + text.len()) as u64;
        }
        self.captures = all.len();
    }
}

/// A parser that goes through one output. After an error it answers with that error only.
pub(super) struct State {
    parser: TokenParser,
    kept: Kept,
    broken: Option<String>,
}

impl State {
    /// At the beginning of an output.
    pub(super) fn new(mut parser: TokenParser) -> Self {
        if parser.is_fresh() {
            parser.start_without_prompt();
        }
        let stats = parser.parser_stats();
        let mut kept = Kept { items: stats.all_items as u64, rows: stats.rows as u64, ..Kept::default() };
        kept.note_captures(parser.captures());
        Self { parser, kept, broken: None }
    }

    /// A copy that shares nothing that changes.
    pub(super) fn copy(&self) -> Self {
        Self { parser: self.parser.deep_clone(), kept: self.kept, broken: self.broken.clone() }
    }

    /// About how many bytes of memory it takes now, rather too many than too few. The library counts elements of its lexer's tables,
    /// which have room for up to twice as many. Its Earley table has the rows of the whole output and grows with every lexeme.
    pub(super) fn bytes(&self) -> u64 {
        match self.broken {
            None => {
                let parser = &self.parser.parser;
                let text = BYTE * parser.get_bytes().len() as u64;
                FIXED
                    + 2 * parser.lexer_stats().num_bytes as u64
                    + text
                    + self.kept.bytes(parser.grammar().parametric())
            }
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
        // nothing else leaves rows behind: looks and questions take theirs back. A row that is tried here counts, too
        let added = self.guarded(|parser| {
            let before = parser.parser_stats().clone();
            if parser.consume_token(token).map_err(|e| e.to_string())? > 0 {
                return Err("unexpected backtracking".into());
            }
            let added = parser.parser_stats().delta(&before);
            parser.check_stop().map_err(|e| e.to_string())?;
            Ok(added)
        })?;
        self.kept.items += added.all_items as u64;
        self.kept.rows += added.rows as u64;
        self.kept.note_captures(self.parser.captures());
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::params::ConstraintParams,
        engine::TokenSet,
        grammar::{GrammarError, tests::grammars},
        text::TextModel,
    };

    /// What an output of so many `a` comes to, token by token, from before the first one on.
    fn bytes_of(grammar: &str, count: usize) -> Result<Vec<u64>, GrammarError> {
        let grammars = grammars();
        let model: &TextModel = &grammars.text;
        let id = model.encode_user("a", false).expect("encodes")[0];
        let grammar = grammars.compile(&ConstraintParams::Lark(grammar.into()))?;
        let mut rule = grammar.start(true);
        let mut bytes = vec![rule.bytes()];
        for _ in 0..count {
            rule.allowed(&mut TokenSet::default()).expect("it goes on");
            rule.accept(id).expect("it was allowed");
            bytes.push(rule.bytes());
        }
        assert_eq!(grammar.start(true).bytes(), bytes[0], "what one output comes to is its own");
        Ok(bytes)
    }

    #[test]
    fn a_state_counts_the_rows_that_the_parser_keeps() -> Result<(), GrammarError> {
        // with every letter, each of them is in the row twice: as what began with it, and as what may come next
        let many: Vec<String> = (0..180).map(|i| format!("A \"{i}b\"")).collect();
        let bytes = bytes_of(&format!("start: x+\nx: A | {}\nA: \"a\"", many.join(" | ")), 60)?;
        let grown = bytes[60] - bytes[10];
        let least = 50 * 2 * 180 * 8;
        assert!((least..8 * least).contains(&grown), "{grown}, {least}");
        // a text that is one lexeme is one row
        let one = bytes_of("start: A\nA: /[ab]*c/", 60)?;
        assert!(one[60] - one[10] < 50 * 200, "{one:?}");
        // rows of few items take memory, too
        let rows = bytes_of("start: A+\nA: \"a\"", 60)?;
        assert!(rows[60] - rows[10] >= 50 * ROW, "{rows:?}");
        Ok(())
    }

    #[test]
    fn a_state_counts_the_texts_that_rules_capture() -> Result<(), GrammarError> {
        // each letter captures all of the output so far
        let with = bytes_of("start: s\ns[capture=\"c\"]: s A | A\nA: \"a\"", 60)?;
        let without = bytes_of("start: s\ns: s A | A\nA: \"a\"", 60)?;
        let more = (with[60] - with[10]).saturating_sub(without[60] - without[10]);
        assert!(more >= 50 * CAPTURE + (11..=60).sum::<u64>(), "{more}");
        let mut kept = Kept::default();
        let texts: Vec<(String, Vec<u8>)> = (1..=100).map(|n| ("name".to_owned(), vec![0; n])).collect();
        (1..=100).for_each(|n| kept.note_captures(&texts[..n]));
        assert_eq!(kept.bytes(false), 100 * (CAPTURE + 4) + 5050);
        assert_eq!(Kept { items: 3, rows: 2, ..kept }.bytes(true) - kept.bytes(true), 6 * ITEM + 2 * ROW);
        Ok(())
    }
}
