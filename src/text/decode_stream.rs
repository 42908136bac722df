//! Detokenisation of a growing sequence: emits whole characters as soon as later tokens cannot change them.
//!
//! What a token looks like depends on its neighbours (leading spaces, bytes of one character in several tokens), so a
//! window of ids is decoded anew for each token: the ids of the last emitted piece, whose text is known, and the ids
//! after it. The pieces put together equal the decoded whole. One exception is on purpose: in a run of byte tokens that
//! turns out to be no UTF-8, `tokenizers` gives up the whole run, while characters that were emitted before stay.

use std::sync::Arc;

use super::{TextError, TextModel};

/// An incomplete UTF-8 sequence has at most three bytes, and each may show as one replacement character.
const MAX_HELD: usize = 3;

/// Tokens that may wait for a character to become complete. A run of byte tokens shows as nothing but replacement
/// characters while its last character is incomplete, so the whole run waits; garbage is sent on after this many.
const MAX_PENDING: usize = 32;

/// Tokens of a prompt that give the first new token its neighbours.
const CONTEXT: usize = 6;

/// Streamed detokenisation of one sequence.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    text: Arc<TextModel>,
    /// The window; `window[..known]` are the ids behind an earlier piece.
    window: Vec<u32>,
    known: usize,
    /// The part of the window's text that was emitted.
    emitted: String,
}

impl DecodeStream {
    /// A stream with nothing decoded yet.
    pub fn new(text: Arc<TextModel>) -> Self {
        Self { text, window: Vec::new(), known: 0, emitted: String::new() }
    }

    /// A stream that goes on after a prompt, whose text it does not emit: so the first word keeps its space. Only the
    /// prompt's last tokens are looked at.
    ///
    /// # Errors
    /// Ids that the tokenizer's decoder refuses.
    pub fn after(text: Arc<TextModel>, prompt: &[u32]) -> Result<Self, TextError> {
        let mut window: Vec<u32> =
            prompt.iter().rev().filter(|id| !text.is_silent(**id)).take(CONTEXT).copied().collect();
        window.reverse();
        let emitted = text.decode(&window)?;
        if emitted.is_empty() || emitted.ends_with(char::REPLACEMENT_CHARACTER) {
            // nothing to lean on, or a character that the prompt leaves open
            return Ok(Self::new(text));
        }
        Ok(Self { text, known: window.len(), window, emitted })
    }

    /// Whether the next token has no neighbours: a decoder may then take a space away from it.
    pub fn is_fresh(&self) -> bool {
        self.window.is_empty()
    }

    /// Takes the next token; returns new text, if there is any that later tokens cannot change.
    ///
    /// # Errors
    /// An id that the tokenizer's decoder refuses.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TextError> {
        if self.text.is_silent(id) {
            return Ok(None);
        }
        self.window.push(id);
        let whole = self.text.decode(&self.window)?;
        let overdue = self.window.len() - self.known > MAX_PENDING;
        let stable = if overdue { stable(&whole) } else { whole.trim_end_matches(char::REPLACEMENT_CHARACTER) };
        let new = match stable.strip_prefix(self.emitted.as_str()) {
            Some(new) => {
                let new = new.to_owned();
                self.emitted.push_str(&new);
                if whole.len() == self.emitted.len() || overdue {
                    self.slide()?;
                }
                new
            }
            // the run of bytes may still become whole
            None if whole.ends_with(char::REPLACEMENT_CHARACTER) && !overdue => String::new(),
            None => self.restart()?,
        };
        Ok(Some(new).filter(|n| !n.is_empty()))
    }

    /// Emits what was held back.
    ///
    /// # Errors
    /// An id that the tokenizer's decoder refuses.
    pub fn finish(mut self) -> Result<Option<String>, TextError> {
        let whole = self.text.decode(&self.window)?;
        let rest = match whole.strip_prefix(self.emitted.as_str()) {
            Some(rest) => rest.to_owned(),
            None => self.restart()?,
        };
        Ok(Some(rest).filter(|n| !n.is_empty()))
    }

    /// Forgets the ids before the last piece. Keeps them where the remaining ones alone have no text: the next token
    /// would then be taken for the first and lose its space.
    fn slide(&mut self) -> Result<(), TextError> {
        let whole = self.text.decode(&self.window)?;
        let tail = self.text.decode(&self.window[self.known..])?;
        let held = whole.len() - self.emitted.len();
        if tail.len() > held && tail.is_char_boundary(tail.len() - held) {
            self.window.drain(..self.known);
            self.known = self.window.len();
            self.emitted.clear();
            self.emitted.push_str(&tail[..tail.len() - held]);
        }
        Ok(())
    }

    /// Emitted text is no prefix any more (a run of bytes went bad): goes on with the pending ids alone.
    fn restart(&mut self) -> Result<String, TextError> {
        self.window.drain(..self.known);
        self.known = self.window.len();
        self.emitted = self.text.decode(&self.window)?;
        Ok(self.emitted.clone())
    }
}

/// The text without trailing replacement characters that may be an incomplete character.
fn stable(whole: &str) -> &str {
    let mut stable = whole;
    for _ in 0..MAX_HELD {
        match stable.strip_suffix(char::REPLACEMENT_CHARACTER) {
            Some(shorter) => stable = shorter,
            None => break,
        }
    }
    stable
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testing::{FOLDERS, bytes, shared};
    use proptest::prelude::*;

    fn stream(model: &Arc<TextModel>, ids: &[u32]) -> String {
        let mut stream = DecodeStream::new(Arc::clone(model));
        let mut out = String::new();
        for &id in ids {
            out.extend(stream.push(id).expect("decodes"));
            assert!(stream.window.len() <= ids.len().min(128), "the window stays small");
        }
        out.extend(stream.finish().expect("decodes"));
        out
    }

    fn models() -> Vec<Arc<TextModel>> {
        std::iter::once(Arc::new(bytes())).chain(FOLDERS.iter().filter_map(|f| shared(f))).collect()
    }

    fn run(cases: u32, law: impl Fn(&mut proptest::test_runner::TestRunner)) {
        law(&mut proptest::test_runner::TestRunner::new(ProptestConfig { cases, ..ProptestConfig::default() }));
    }

    #[test]
    fn pieces_put_together_are_the_decoded_whole_for_encoded_text() {
        for model in models() {
            run(150, |runner| {
                let texts = prop_oneof![
                    "\\PC{0,40}",
                    "[ a-zA-Z.,'\n]{0,60}",
                    "( |\u{e9}|\u{20ac}|\u{1F600}|\u{4e2d}|\u{FFFD}|a|\u{301}| do not | n't|\t){0,10}"
                ];
                let checked = runner.run(&texts, |text| {
                    let ids = model.encode_user(&text, true).expect("encodes");
                    prop_assert_eq!(stream(&model, &ids), model.decode(&ids).expect("decodes"));
                    Ok(())
                });
                checked.expect("law holds");
            });
        }
    }

    #[test]
    fn pieces_put_together_are_the_decoded_whole_for_any_ids() {
        for model in models() {
            let byte_fallback = model.token_id("<0x00>").is_some();
            let vocab = model.vocab_size() as u32;
            run(300, |runner| {
                let checked = runner.run(&proptest::collection::vec(0..vocab + 2, 0..24), |ids| {
                    let whole = model.decode(&ids).expect("decodes");
                    let streamed = stream(&model, &ids);
                    if !byte_fallback || !whole.contains('\u{FFFD}') {
                        prop_assert_eq!(streamed, whole);
                    }
                    Ok(())
                });
                checked.expect("law holds");
            });
        }
    }

    #[test]
    fn a_stream_after_a_prompt_emits_what_follows_it() {
        for model in models() {
            run(100, |runner| {
                let checked = runner.run(&("[a-z]{1,6}( [a-zA-Zé€.,']{1,9}){0,12}", 0.0f64..1.0), |(text, at)| {
                    let ids = model.encode_user(&text, true).expect("encodes");
                    let (prompt, rest) = ids.split_at((ids.len() as f64 * at) as usize);
                    let before = model.decode(prompt).expect("decodes");
                    let whole = model.decode(&ids).expect("decodes");
                    let Some(expected) = whole.strip_prefix(&before) else { return Ok(()) };
                    let mut stream = DecodeStream::after(Arc::clone(&model), prompt).expect("decodes");
                    let mut out = String::new();
                    for &id in rest {
                        out.extend(stream.push(id).expect("decodes"));
                    }
                    out.extend(stream.finish().expect("decodes"));
                    prop_assert_eq!(out, expected);
                    Ok(())
                });
                checked.expect("law holds");
            });
        }
    }

    #[test]
    fn a_character_appears_when_its_last_byte_does() {
        let mut stream = DecodeStream::new(Arc::new(bytes()));
        let pieces: Vec<_> = "a€b".bytes().map(|b| stream.push(u32::from(b)).expect("decodes")).collect();
        assert_eq!(pieces, vec![Some("a".into()), None, None, Some("€".into()), Some("b".into())]);
        stream.push(0xE2).expect("decodes");
        assert_eq!(stream.finish().expect("decodes"), Some("\u{FFFD}".into()));
    }

    #[test]
    fn endless_invalid_bytes_neither_stall_nor_grow_the_window() {
        let model = Arc::new(bytes());
        let mut stream = DecodeStream::new(Arc::clone(&model));
        let mut out = String::new();
        for _ in 0..500 {
            out.extend(stream.push(0xFF).expect("decodes"));
            assert!(stream.window.len() < 128);
        }
        assert!(out.len() > 400 * 3);
        out.extend(stream.finish().expect("decodes"));
        assert_eq!(out, model.decode(&[0xFF; 500]).expect("decodes"));
    }

    #[test]
    fn characters_before_a_byte_run_that_goes_bad_are_kept() {
        let Some(model) = shared("tokenizers/llama2-32k") else { return };
        let byte = |b: u8| model.token_id(&format!("<0x{b:02X}>")).expect("byte token");
        let word = model.encode_user("hello", false).expect("encodes");
        let ids = [vec![byte(0xC3), byte(0xA9), byte(0xE2)], word].concat();
        let out = stream(&model, &ids);
        assert!(out.starts_with('é') && out.ends_with("hello"), "{out:?}");
    }
}
