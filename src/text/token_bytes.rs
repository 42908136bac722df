//! The bytes that each token adds to a text. A character may be spread over several tokens, so decoded text alone does not
//! tell them; they follow from the kind of the tokenizer's decoder, and are compared with decoded text wherever a token is whole
//! characters.

use serde_json::Value;

use super::{TextError, TextModel};

/// What every token of a vocabulary stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBytes {
    /// By id. Empty: a special token, no token, or one whose text depends on more than itself.
    pub words: Vec<Vec<u8>>,
    /// Whether the decoder takes the space away that the first token of a text begins with.
    pub drops_space: bool,
}

/// How entries of the vocabulary are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writing {
    /// Each byte is a printable character (GPT-2).
    ByteLevel,
    /// Spaces are written as U+2581 (sentencepiece); with `bytes`, `<0x0A>` is a byte.
    Pieces { bytes: bool },
}

impl TextModel {
    /// What every token stands for. Takes a moment: all of them are decoded.
    ///
    /// # Errors
    /// A decoder of another kind than byte-level or sentencepiece's, or no token whose text is known.
    pub fn token_bytes(&self) -> Result<TokenBytes, TextError> {
        let tokenizer = self.tokenizer();
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| TextError::Decode(e.to_string()))?;
        let writing =
            writing(&decoder).ok_or(TextError::NoBytes("its decoder is neither byte-level nor sentencepiece's"))?;
        let special = self.special();
        let named = [special.bos, special.eos, special.pad, special.unk, special.cls, special.sep, special.mask];
        let vocab = tokenizer.get_vocab(true);
        let size = vocab.values().max().map_or(0, |last| *last as usize + 1);
        let mut words = vec![Vec::new(); size];
        for (token, id) in vocab {
            if !named.contains(&Some(id)) && !self.is_silent(id) {
                words[id as usize] = writing.bytes(&token);
            }
        }
        let letter = |word: &Vec<u8>| matches!(word[..], [c] if c.is_ascii_alphabetic());
        let anchor = words.iter().position(letter).ok_or(TextError::NoBytes("it has no token of one letter"))?;
        let before = self.decode(&[anchor as u32])?;
        let mut drops_space = None;
        for (id, word) in (0u32..).zip(&mut words) {
            let Ok(text) = std::str::from_utf8(word) else { continue };
            let whole = self.decode(&[anchor as u32, id])?;
            if whole.strip_prefix(&before) != Some(text) {
                word.clear();
            } else if drops_space.is_none() && text.len() > 1 && text.starts_with(' ') {
                drops_space = Some(self.decode(&[id])? != text);
            }
        }
        Ok(TokenBytes { words, drops_space: drops_space.unwrap_or(false) })
    }
}

/// How a decoder, as `tokenizer.json` has it, wants tokens to be written.
fn writing(decoder: &Value) -> Option<Writing> {
    let mut steps = vec![decoder];
    let (mut byte_level, mut pieces, mut bytes) = (false, false, false);
    while let Some(step) = steps.pop() {
        steps.extend(step.get("decoders").and_then(Value::as_array).into_iter().flatten());
        match step.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => byte_level = true,
            Some("Metaspace") => pieces = true,
            Some("ByteFallback") => bytes = true,
            Some("Replace") => pieces |= step["content"] == " ",
            _ => {}
        }
    }
    match (byte_level, pieces || bytes) {
        (true, false) => Some(Writing::ByteLevel),
        (false, true) => Some(Writing::Pieces { bytes }),
        _ => None,
    }
}

impl Writing {
    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            // as the library: a token with any other character is its own text
            Self::ByteLevel => token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into()),
            Self::Pieces { bytes } => match token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
                Some(hex) if bytes && hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok() => {
                    u8::from_str_radix(hex, 16).into_iter().collect()
                }
                _ => token.replace('\u{2581}', " ").into(),
            },
        }
    }
}

/// The byte that a byte-level tokenizer writes as this character: printable ones as themselves, the others from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| (b'!'..=b'~').contains(&b) || (0xA1..=0xAC).contains(&b) || b >= 0xAE;
    match u32::from(c) {
        code @ 0..=0xFF => Some(code as u8).filter(|b| printable(*b)),
        code => (0..=0xFFu8).filter(|b| !printable(*b)).nth((code - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use super::*;
    use crate::text::testing::{FOLDERS, bytes, shared};

    fn models() -> Vec<(String, Arc<TextModel>)> {
        let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/base/tiny-stories");
        let generators = FOLDERS.iter().filter(|f| !f.contains("bert"));
        let mut all: Vec<_> = generators.filter_map(|f| Some(((*f).to_owned(), shared(f)?))).collect();
        all.push(("bytes".into(), Arc::new(bytes())));
        all.push(("bundled".into(), Arc::new(TextModel::open(&bundled).expect("the bundled tokenizer"))));
        all
    }

    #[test]
    fn bytes_of_a_texts_tokens_are_the_texts() {
        for (name, model) in models() {
            let known = model.token_bytes().expect("known");
            let known_share = known.words.iter().filter(|w| !w.is_empty()).count() as f64 / known.words.len() as f64;
            assert!(known_share > 0.9, "{name}: {known_share}");
            for text in
                ["a b", "Once upon a time, there was a dog.", "naïve café €5", "tab\tand\nline", "\u{1F600} {}[]\\\"x"]
            {
                let ids = model.encode_user(text, false).expect("encodes");
                let joined: Vec<u8> = ids.iter().flat_map(|id| known.words[*id as usize].clone()).collect();
                // with a decoder that drops the first space, `decode` does what a fresh text gets
                let decoded = model.decode(&ids).expect("decodes");
                let rest = if known.drops_space { joined.strip_prefix(b" ").unwrap_or(&joined) } else { &joined };
                if ids.iter().all(|id| !known.words[*id as usize].is_empty()) {
                    assert_eq!(String::from_utf8_lossy(rest), decoded, "{name}");
                } else {
                    assert!(name.contains("t5"), "{name}: a token of {text:?} is not known");
                }
            }
        }
    }

    #[test]
    fn special_tokens_stand_for_nothing() {
        for (name, model) in models() {
            let known = model.token_bytes().expect("known");
            let special = model.special();
            for id in [special.bos, special.eos, special.pad, special.unk].into_iter().flatten() {
                assert!(known.words[id as usize].is_empty(), "{name}: {id}");
            }
        }
    }

    #[test]
    fn only_decoders_of_sentencepiece_drop_a_space() {
        for (name, model) in models() {
            let drops = model.token_bytes().expect("known").drops_space;
            assert_eq!(drops, ["llama", "t5"].iter().any(|kind| name.contains(kind)), "{name}");
        }
    }

    #[test]
    fn every_byte_has_its_character() {
        let chars: Vec<char> = (0..0x200).filter_map(char::from_u32).filter(|c| byte_of(*c).is_some()).collect();
        let mut bytes: Vec<u8> = chars.iter().filter_map(|c| byte_of(*c)).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=0xFF).collect::<Vec<u8>>());
        assert_eq!(
            [byte_of('Ġ'), byte_of('Ċ'), byte_of('a'), byte_of('é')],
            [Some(b' '), Some(b'\n'), Some(b'a'), Some(0xE9)]
        );
    }

    #[test]
    fn another_kind_of_decoder_is_an_error() {
        let Some(bert) = shared("all-minilm-l6-v2-bert") else { return };
        assert!(matches!(bert.token_bytes(), Err(TextError::NoBytes(_))));
        let kinds = |json: &str| writing(&serde_json::from_str(json).expect("json"));
        assert_eq!(kinds("null"), None);
        assert_eq!(kinds(r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###), None);
        let llama = r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
            {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#;
        assert_eq!(kinds(llama), Some(Writing::Pieces { bytes: true }));
        assert_eq!(kinds(r#"{"type":"Metaspace","replacement":"▁"}"#), Some(Writing::Pieces { bytes: false }));
        assert_eq!(kinds(r#"{"type":"ByteLevel"}"#), Some(Writing::ByteLevel));
    }
}
