//! The base's tokenizer: text to ids with offsets, ids to text, and which ids are special.
//!
//! Wraps `tokenizers`. It comes from `tokenizer.json`, or from a GGUF file ([`gguf`]). Truncation and padding of `tokenizer.json` are taken out: a text is refused when it is too long,
//! never cut. A second copy reads special tokens as plain text, for text that comes from users.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::{Encoding, Tokenizer};

use super::gguf;

/// Longest accepted text in bytes, unless [`TextModel::with_max_bytes`] sets another limit.
pub const MAX_TEXT_BYTES: usize = 4 << 20;

/// Why text or tokenizer files were refused.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{file} is not valid: {reason}")]
    Invalid {
        /// The file's name.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The text is longer than accepted.
    #[error("the text is {bytes} bytes long; at most {limit} are accepted")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The tokenizer could not encode a text.
    #[error("the tokenizer cannot encode this text: {0}")]
    Encode(String),
    /// What its tokens stand for, byte by byte, does not follow from the tokenizer.
    #[error("the bytes of this tokenizer's tokens are not known: {0}")]
    NoBytes(&'static str),
    /// The tokenizer could not decode ids.
    #[error("the tokenizer cannot decode these ids: {0}")]
    Decode(String),
}

/// Ids of the special tokens that `tokenizer_config.json` or `special_tokens_map.json` names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Beginning of a sequence.
    pub bos: Option<u32>,
    /// End of a sequence.
    pub eos: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Unknown.
    pub unk: Option<u32>,
    /// Classification (BERT's first token).
    pub cls: Option<u32>,
    /// Separator.
    pub sep: Option<u32>,
    /// Mask.
    pub mask: Option<u32>,
}

/// An encoded text or pair of texts; all vectors have the same length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// 0 for the first text, 1 for the second (as the tokenizer's template says).
    pub type_ids: Vec<u32>,
    /// Byte range of each token in its own text; `(0, 0)` for added special tokens.
    pub offsets: Vec<(usize, usize)>,
    /// Which text a token comes from (0 or 1); `None` for added special tokens.
    pub sources: Vec<Option<usize>>,
    /// Index of the word within its text; `None` for added special tokens.
    pub words: Vec<Option<u32>>,
}

/// A tokenizer with the names of its special tokens.
#[derive(Debug)]
pub struct TextModel {
    tokenizer: Tokenizer,
    /// The same tokenizer, but text that looks like a special token is plain text.
    plain: Tokenizer,
    special: SpecialIds,
    /// Finds the special texts; the longest of those that begin at one place.
    finder: AhoCorasick,
    special_set: HashSet<u32>,
    config: Value,
    max_bytes: usize,
}

impl TextModel {
    /// Opens `tokenizer.json` and, where present, `tokenizer_config.json` and `special_tokens_map.json`.
    ///
    /// # Errors
    /// A missing `tokenizer.json`, an unreadable or invalid file.
    pub fn open(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TextError::Read { path, source })?;
        let config = read_json(dir, "tokenizer_config.json")?;
        let map = read_json(dir, "special_tokens_map.json")?;
        Self::from_json(&bytes, config.as_ref(), map.as_ref())
    }

    /// Builds from the bytes of `tokenizer.json` and the parsed `tokenizer_config.json` and `special_tokens_map.json`.
    ///
    /// # Errors
    /// Bytes that are not a tokenizer.
    pub fn from_json(bytes: &[u8], config: Option<&Value>, map: Option<&Value>) -> Result<Self, TextError> {
        let file = "tokenizer.json";
        let tokenizer = Tokenizer::from_bytes(bytes);
        let tokenizer = tokenizer.map_err(|e| TextError::Invalid { file, reason: e.to_string() })?;
        Self::new(tokenizer, config, map, file)
    }

    /// Builds from the metadata of a GGUF file, under its own keys (`tokenizer.ggml.tokens`, ...).
    ///
    /// # Errors
    /// A kind of tokenizer that is not read; arrays that are missing or do not fit each other; ids out of range.
    pub fn from_gguf(metadata: &serde_json::Map<String, Value>) -> Result<Self, TextError> {
        let (tokenizer, config) = gguf::build(metadata)?;
        Self::new(tokenizer, Some(&config), None, gguf::SOURCE)
    }

    /// Special tokens that end a turn or a text by the names that they usually have (`<|im_end|>`, `<end_of_turn>`, ...): a GGUF file
    /// often names only one of its model's.
    pub fn usual_ends(&self) -> Vec<u32> {
        gguf::ends(&self.tokenizer)
    }

    fn new(
        mut tokenizer: Tokenizer,
        config: Option<&Value>,
        map: Option<&Value>,
        file: &'static str,
    ) -> Result<Self, TextError> {
        let invalid = |e: &dyn std::fmt::Display| TextError::Invalid { file, reason: e.to_string() };
        tokenizer.with_truncation(None).map_err(|e| invalid(&e))?;
        tokenizer.with_padding(None);
        let mut plain = tokenizer.clone();
        plain.set_encode_special_tokens(true);
        let id = |name: &str| {
            let text = [config, map].into_iter().flatten().find_map(|c| token_text(c.get(name)?))?;
            tokenizer.token_to_id(&text)
        };
        let special = SpecialIds {
            bos: id("bos_token"),
            eos: id("eos_token"),
            pad: id("pad_token"),
            unk: id("unk_token"),
            cls: id("cls_token"),
            sep: id("sep_token"),
            mask: id("mask_token"),
        };
        let added = tokenizer.get_added_tokens_decoder();
        let mut special_texts: Vec<_> = added
            .into_iter()
            .filter(|(_, t)| t.special && !t.content.is_empty())
            .map(|(i, t)| (t.content, i))
            .collect();
        special_texts.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(special_texts.iter().map(|(text, _)| text))
            .map_err(|e| invalid(&e))?;
        let special_set = special_texts.iter().map(|(_, id)| *id).collect();
        let config = config.cloned().unwrap_or(Value::Null);
        Ok(Self { tokenizer, plain, special, finder, special_set, config, max_bytes: MAX_TEXT_BYTES })
    }

    /// Sets the longest accepted text.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    /// The special ids.
    pub fn special(&self) -> SpecialIds {
        self.special
    }

    /// The library's own, in which text that looks like a special token becomes one.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// `tokenizer_config.json`, or null.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Ids of a text in which special tokens are recognised (for text that we made, such as a rendered chat).
    ///
    /// # Errors
    /// A text over the limit, or one that the tokenizer refuses.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.check(text.len())?;
        let encoding = self.tokenizer.encode_fast(text, add_special).map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of a text from a user: text that looks like a special token stays text. `add_special` still adds what the
    /// tokenizer's template adds.
    ///
    /// # Errors
    /// A text over the limit, or one that the tokenizer refuses.
    pub fn encode_user(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.check(text.len())?;
        let encoding = self.plain.encode_fast(text, add_special).map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A user's text, or pair of texts, with byte offsets, types and words; special tokens are added.
    ///
    /// # Errors
    /// Texts over the limit, or that the tokenizer refuses.
    pub fn encode_pair(&self, text: &str, second: Option<&str>) -> Result<Encoded, TextError> {
        self.check(text.len() + second.map_or(0, str::len))?;
        let encoding = match second {
            None => self.plain.encode(text, true),
            Some(second) => self.plain.encode((text, second), true),
        };
        Ok(encoded(&encoding.map_err(|e| TextError::Encode(e.to_string()))?))
    }

    /// A user's text as words, with the word of each token; special tokens are added. Offsets are within the word.
    ///
    /// # Errors
    /// Words over the limit, or that the tokenizer refuses.
    pub fn encode_words(&self, words: &[String]) -> Result<Encoded, TextError> {
        self.check(words.iter().map(String::len).sum())?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let encoding = self.plain.encode(words, true).map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoded(&encoding))
    }

    /// Text of ids, special tokens left out.
    ///
    /// # Errors
    /// Ids that the decoder refuses.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        self.tokenizer.decode(ids, true).map_err(|e| TextError::Decode(e.to_string()))
    }

    /// An id's form in the vocabulary (`Ġthe`, `▁the`, `##ing`); `None` for an id that is not in it.
    pub fn token_str(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// An id's text alone, special tokens included; an incomplete character shows as U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        self.tokenizer.decode(&[id], false).unwrap_or_default()
    }

    /// The id of a vocabulary entry.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Whether an id never shows in decoded text: a special token, or no entry of the vocabulary.
    pub fn is_silent(&self, id: u32) -> bool {
        self.special_set.contains(&id) || self.tokenizer.id_to_token(id).is_none()
    }

    /// The special tokens that a text contains, in order, as byte ranges; in time linear in the text.
    pub fn specials<'a>(&'a self, text: &'a str) -> impl Iterator<Item = std::ops::Range<usize>> + 'a {
        self.finder.find_iter(text).map(|found| found.range())
    }

    /// Whether so many bytes may be a text.
    ///
    /// # Errors
    /// They are too many.
    pub(super) fn check(&self, bytes: usize) -> Result<(), TextError> {
        if bytes > self.max_bytes { Err(TextError::TooLong { bytes, limit: self.max_bytes }) } else { Ok(()) }
    }
}

impl Encoded {
    /// Leaves out tokens at the end of the text so that `most` are left, and keeps the special tokens around it; tells
    /// whether it did. Special tokens alone are never cut.
    pub fn cut(&mut self, most: usize) -> bool {
        let body: Vec<usize> = (0..self.ids.len()).filter(|i| self.sources[*i].is_some()).collect();
        let over = self.ids.len().saturating_sub(most).min(body.len());
        if over == 0 {
            return false;
        }
        let drop: HashSet<usize> = body[body.len() - over..].iter().copied().collect();
        fn keep<T: Clone>(all: &mut Vec<T>, drop: &HashSet<usize>) {
            let mut at = 0..;
            all.retain(|_| at.next().is_some_and(|i: usize| !drop.contains(&i)));
        }
        keep(&mut self.ids, &drop);
        keep(&mut self.type_ids, &drop);
        keep(&mut self.offsets, &drop);
        keep(&mut self.sources, &drop);
        keep(&mut self.words, &drop);
        true
    }
}

fn encoded(e: &Encoding) -> Encoded {
    let sources = (0..e.len()).map(|i| e.token_to_sequence(i)).collect::<Vec<_>>();
    let special = e.get_special_tokens_mask();
    Encoded {
        ids: e.get_ids().to_vec(),
        type_ids: e.get_type_ids().to_vec(),
        offsets: e.get_offsets().to_vec(),
        sources: sources.into_iter().zip(special).map(|(s, m)| if *m == 1 { None } else { s }).collect(),
        words: e.get_word_ids().to_vec(),
    }
}

/// A special token is written as a string or as an object with `content`.
pub(super) fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// Reads a JSON file of the folder; `None` where it is absent.
pub(super) fn read_json(dir: &Path, file: &'static str) -> Result<Option<Value>, TextError> {
    let path = dir.join(file);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TextError::Read { path, source }),
    };
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|e| TextError::Invalid { file, reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testing::{FOLDERS, bytes, shared};

    #[test]
    fn special_ids_come_from_strings_and_objects() {
        let model = bytes();
        assert_eq!(model.special(), SpecialIds { bos: Some(256), eos: Some(257), ..SpecialIds::default() });
        assert_eq!(model.vocab_size(), 258);
    }

    #[test]
    fn a_text_is_never_truncated_even_if_the_file_says_so() {
        let ids = bytes().encode("longer than four", true).expect("encodes");
        assert_eq!(ids.len(), 17);
        assert_eq!(ids[0], 256);
    }

    #[test]
    fn special_tokens_in_user_text_stay_text() {
        let model = bytes();
        assert_eq!(model.encode("a<eos>", false).expect("encodes"), vec![97, 257]);
        let user = model.encode_user("a<eos>", true).expect("encodes");
        assert_eq!(user, [256, 97].into_iter().chain("<eos>".bytes().map(u32::from)).collect::<Vec<_>>());
        assert_eq!(model.specials("a<eos><bos>").collect::<Vec<_>>(), [1..6, 6..11]);
        assert_eq!(model.specials("<eo s>").count(), 0);
        // T5's Unigram vocabulary lists `<extra_id_*>` among its plain pieces too, so there text can still become one
        for folder in FOLDERS.into_iter().filter(|f| !f.contains("t5")) {
            let Some(model) = shared(folder) else { continue };
            for (text, id) in model.special_set.iter().map(|id| (model.token_text(*id), id)) {
                let text = &text;
                let ids = model.encode_user(&format!("x {text} y"), false).expect("encodes");
                assert!(!ids.contains(id), "{folder}: {text}");
            }
        }
    }

    #[test]
    fn a_text_over_the_limit_is_refused_with_the_numbers() {
        let model = bytes().with_max_bytes(3);
        let error = model.encode("four", true).expect_err("too long").to_string();
        assert_eq!(error, "the text is 4 bytes long; at most 3 are accepted");
        assert!(model.encode_pair("ab", Some("cd")).is_err());
    }

    #[test]
    fn offsets_are_bytes_of_each_text_and_pairs_know_their_source() {
        let e = bytes().encode_pair("é", Some("b")).expect("encodes");
        assert_eq!(e.ids, vec![0xC3, 0xA9, 257, 98]);
        assert_eq!(e.type_ids, vec![0, 0, 0, 1]);
        assert_eq!(e.sources, vec![Some(0), Some(0), None, Some(1)]);
        let Some(bert) = shared("all-minilm-l6-v2-bert") else { return };
        let text = "Émile naïvely\twalks";
        let e = bert.encode_pair(text, None).expect("encodes");
        let words: Vec<&str> = e.offsets.iter().map(|&(a, b)| &text[a..b]).collect();
        assert_eq!(words.first(), Some(&""));
        assert_eq!(words[1], "Émile");
        assert_eq!(e.sources.last(), Some(&None));
        assert_eq!(bert.special().cls, Some(101));
        assert_eq!(e.words[1], Some(0));
    }

    #[test]
    fn broken_files_are_errors_that_name_the_file() {
        let error = TextModel::from_json(b"{}", None, None).expect_err("no tokenizer").to_string();
        assert!(error.starts_with("tokenizer.json is not valid"), "{error}");
        let error = TextModel::open(Path::new("/nonexistent")).expect_err("no folder").to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
