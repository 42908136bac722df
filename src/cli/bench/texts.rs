//! Texts of requests: rows of a file, or made-up ones of a given number of tokens.

use std::path::Path;

use anyhow::{Context as _, bail};
use rand::{Rng, seq::IndexedRandom as _};
use serde_json::{Map, Value};

use super::workload::{Stream, generator};
use crate::cli::files;

/// A text of a file, and the completion to score, if it has one.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) prompt: String,
    pub(super) completion: Option<String>,
}

/// Reads the rows of a file: JSON Lines if its name ends in `.jsonl`, else a text per line; blank lines are skipped.
///
/// # Errors
/// A file that cannot be read; every bad line, by number; no rows.
pub(super) async fn read(path: &Path) -> anyhow::Result<Vec<Row>> {
    let bytes = files::read(path).await.context("--prompts")?;
    let json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
    rows(&bytes, json).with_context(|| format!("--prompts {}", path.display()))
}

fn rows(bytes: &[u8], json: bool) -> anyhow::Result<Vec<Row>> {
    let rows = match json {
        true => files::rows(bytes, |_, fields| row(&fields))?,
        false => {
            let text = std::str::from_utf8(bytes).context("is not UTF-8")?;
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines.map(|line| Row { prompt: line.to_owned(), completion: None }).collect()
        }
    };
    if rows.is_empty() {
        bail!("has no texts");
    }
    Ok(rows)
}

fn row(fields: &Map<String, Value>) -> Result<Row, String> {
    let text = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Err(format!("{name} is empty")),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("{name} is not a string")),
    };
    let prompt = match (text("prompt")?, text("text")?) {
        (Some(_), Some(_)) => return Err("has both prompt and text".to_owned()),
        (Some(prompt), None) | (None, Some(prompt)) => prompt,
        (None, None) => return Err("has neither prompt nor text".to_owned()),
    };
    Ok(Row { prompt, completion: text("completion")? })
}

/// Pieces of text that are a token each wherever they stand, as the server's tokenizer said when they were tried.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pieces {
    head: &'static str,
    /// Tokens of the head alone, special ones included.
    head_tokens: usize,
    pieces: Vec<&'static str>,
    /// Whether texts made of them were as long as they were to be.
    pub(super) exact: bool,
}

/// Words that most vocabularies have whole, with the space before them.
const WORDS: [&str; 40] = [
    " the", " a", " and", " of", " to", " in", " is", " was", " he", " she", " it", " on", " for", " with", " as",
    " at", " by", " from", " they", " we", " you", " that", " this", " not", " but", " had", " have", " were", " are",
    " his", " her", " all", " one", " there", " be", " or", " an", " out", " up", " so",
];
/// For vocabularies of letters.
const LETTERS: [&str; 26] = [
    "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t", "u", "v", "w",
    "x", "y", "z",
];
/// Lengths of the texts that are tried.
const TRIED: [usize; 3] = [5, 33, 100];

impl Pieces {
    /// Finds pieces. `count` gives a text's tokens, special ones included.
    ///
    /// # Errors
    /// Those of `count`.
    pub(super) async fn find(count: impl AsyncFn(String) -> anyhow::Result<usize>) -> anyhow::Result<Self> {
        let mut rng = generator(0, Stream::Trial, 0);
        for (head, candidates) in [("the", &WORDS[..]), ("a", &LETTERS[..])] {
            let head_tokens = count(head.to_owned()).await?;
            let mut pieces = Vec::new();
            for piece in candidates {
                if count(format!("{head}{piece}")).await? == head_tokens + 1 {
                    pieces.push(*piece);
                }
            }
            let found = Self { head, head_tokens, pieces, exact: true };
            let mut holds = !found.pieces.is_empty();
            for tokens in TRIED {
                let tokens = head_tokens + tokens;
                holds = holds && count(found.text(tokens, &mut rng)).await? == tokens;
            }
            if holds {
                return Ok(found);
            }
        }
        // a tokenizer that does not go by words or letters: about one token a word
        let head_tokens = count("the".to_owned()).await?;
        Ok(Self { head: "the", head_tokens, pieces: WORDS.to_vec(), exact: false })
    }

    /// A text of so many tokens, special ones included; at least the head's.
    pub(super) fn text(&self, tokens: usize, rng: &mut impl Rng) -> String {
        let mut text = self.head.to_owned();
        self.extend(&mut text, tokens.saturating_sub(self.head_tokens), rng);
        text
    }

    /// A text of so many tokens that follows on another one.
    pub(super) fn continuation(&self, tokens: usize, rng: &mut impl Rng) -> String {
        let mut text = String::new();
        self.extend(&mut text, tokens.max(1), rng);
        text
    }

    fn extend(&self, text: &mut String, tokens: usize, rng: &mut impl Rng) {
        (0..tokens).filter_map(|_| self.pieces.choose(rng)).for_each(|piece| text.push_str(piece));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finds pieces for a tokenizer and checks what they are of.
    async fn found(count: impl Fn(&str) -> usize) -> Pieces {
        let pieces = Pieces::find(async |text: String| anyhow::Ok(count(&text))).await.expect("pieces");
        let mut rng = generator(9, Stream::Trial, 1);
        for tokens in [1, 2, 7, 64, 500] {
            let text = pieces.text(tokens, &mut rng);
            let more = pieces.continuation(tokens, &mut rng);
            if pieces.exact {
                assert_eq!(count(&text), tokens.max(pieces.head_tokens), "{text:?}");
                assert_eq!(count(&format!("{text}{more}")), count(&text) + tokens, "{more:?}");
            }
        }
        pieces
    }

    #[tokio::test]
    async fn made_up_texts_have_the_tokens_asked_for() {
        // by words, with a start and an end
        let words = found(|text| text.split_whitespace().count() + 2).await;
        assert!(words.exact && words.head_tokens == 3 && words.pieces.len() == WORDS.len());
        // only some words are whole
        let short = found(|text| text.split_whitespace().map(|w| w.len().div_ceil(3)).sum()).await;
        assert!(short.exact && short.pieces.contains(&" the") && !short.pieces.contains(&" with"));
        // by characters
        let letters = found(|text| text.chars().count()).await;
        assert!(letters.exact && letters.pieces.len() == LETTERS.len());
        // by nothing that pieces could follow: pairs of characters
        let pairs = found(|text| text.chars().count().div_ceil(2)).await;
        assert!(!pairs.exact);
    }

    #[test]
    fn files_are_read_in_both_forms_and_bad_lines_are_named() {
        let row = |prompt: &str, completion: Option<&str>| Row {
            prompt: prompt.into(),
            completion: completion.map(str::to_owned),
        };
        assert_eq!(rows(b"one\n\n  two \n", false).expect("rows"), [row("one", None), row("  two ", None)]);
        let json = b"{\"prompt\": \"a\", \"completion\": \" b\"}\n{\"text\": \"c\", \"label\": 3}\n";
        assert_eq!(rows(json, true).expect("rows"), [row("a", Some(" b")), row("c", None)]);
        let bad: [(&[u8], &str); 5] = [
            (b"{\"prompt\": \"a\"}\n{\"label\": 1}", "line 2: has neither prompt nor text"),
            (b"{\"prompt\": \"\"}", "line 1: prompt is empty"),
            (b"{\"text\": 3}", "line 1: text is not a string"),
            (b"{\"text\": \"a\", \"prompt\": \"b\"}", "line 1: has both"),
            (b"\n\n", "has no texts"),
        ];
        for (bytes, expected) in bad {
            let error = rows(bytes, true).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(rows(b"\xff\xfe", false).is_err() && rows(b"", false).is_err());
    }
}
