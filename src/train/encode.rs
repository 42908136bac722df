//! Examples to tokens: what is read and which positions carry loss.
//!
//! Completions and assistant turns carry loss, prompts do not; plain text carries loss everywhere. Texts are cut as
//! serving would cut them, so that a delta is trained on the same tokens that it will see. No tensors here.

mod answers;
mod questions;

use std::sync::Arc;

pub use answers::{Answer, add_mismatched};

use crate::{
    admission::params::ChatMessage,
    delta::Problem,
    train::{
        dataset::{Dataset, Example, Row},
        issue::{Code, Report},
        validate::LabelSet,
        worst::Decoder,
    },
};

/// Text -> ids, in which nothing but the tokenizer's own additions is special; the flag asks for those.
pub type EncodeFn = Arc<dyn Fn(&str, bool) -> Result<Vec<u32>, String> + Send + Sync>;
/// Words -> ids without special tokens, and for each id the index of its word.
pub type EncodeWordsFn = Arc<dyn Fn(&[String]) -> Result<Vec<(u32, usize)>, String> + Send + Sync>;
/// Conversation -> text; the flag asks for the opening of the assistant's next turn.
pub type RenderFn = Arc<dyn Fn(&[ChatMessage], bool) -> Result<String, String> + Send + Sync>;
/// Conversation -> the same with marks where a message reads like a special token, and what the marks stand for.
pub type GuardFn = Arc<dyn Fn(&[ChatMessage]) -> (Vec<ChatMessage>, Vec<String>) + Send + Sync>;
/// Rendered text and what its marks stand for -> ids; the template's special tokens are special, marked ones are text.
pub type MarkedFn = Arc<dyn Fn(&str, &[String]) -> Result<Vec<u32>, String> + Send + Sync>;

/// What training needs of a chat template: the steps that serving takes, one by one.
#[derive(Clone)]
pub struct ChatCodec {
    /// Marks what must not be read as a turn.
    pub guard: GuardFn,
    /// Renders the marked messages.
    pub render: RenderFn,
    /// Encodes what was rendered.
    pub encode: MarkedFn,
}

/// What training needs to know of the base's text side.
#[derive(Clone)]
pub struct TextCodec {
    /// Text to ids.
    pub encode: EncodeFn,
    /// Words to ids.
    pub encode_words: EncodeWordsFn,
    /// The chat template, if the base has one.
    pub chat: Option<ChatCodec>,
    /// Ids that end a text; the first is appended to completions.
    pub eos: Vec<u32>,
    /// Ids to text, for people.
    pub decoder: Decoder,
    /// First token of an encoder-decoder's output.
    decoder_start: Option<u32>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl std::fmt::Debug for TextCodec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let chat = self.chat.is_some();
        write!(
            f,
            "TextCodec {{ eos: {:?}, prefix: {:?}, suffix: {:?}, chat: {chat} }}",
            self.eos, self.prefix, self.suffix
        )
    }
}

impl TextCodec {
    /// Finds out which special tokens the tokenizer puts around a text.
    ///
    /// # Errors
    /// The tokenizer's message when it cannot encode at all.
    pub fn new(
        encode: EncodeFn,
        encode_words: EncodeWordsFn,
        chat: Option<ChatCodec>,
        eos: Vec<u32>,
    ) -> Result<Self, String> {
        let (plain, full) = (encode("a", false)?, encode("a", true)?);
        let at = (0..=full.len().saturating_sub(plain.len())).find(|at| full[*at..].starts_with(&plain));
        let at = at.ok_or("special tokens do not surround the text")?;
        let (prefix, suffix) = (full[..at].to_vec(), full[at + plain.len()..].to_vec());
        let decoder = Decoder::default();
        Ok(Self { encode, encode_words, chat, eos, decoder, decoder_start: None, prefix, suffix })
    }

    /// For an encoder-decoder, whose outputs start with this token.
    #[must_use]
    pub fn with_decoder_start(mut self, token: Option<u32>) -> Self {
        self.decoder_start = token;
        self
    }

    /// The codec of a tokenizer. As in serving, text that looks like a special token is plain text.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn from_tokenizer(
        mut tokenizer: tokenizers::Tokenizer,
        chat: Option<ChatCodec>,
        eos: Vec<u32>,
    ) -> Result<Self, String> {
        tokenizer.set_encode_special_tokens(true);
        let tokenizer = Arc::new(tokenizer);
        let (words, reader) = (Arc::clone(&tokenizer), Arc::clone(&tokenizer));
        let encode: EncodeFn = Arc::new(move |text, special| {
            tokenizer.encode_fast(text, special).map(|e| e.get_ids().to_vec()).map_err(|e| e.to_string())
        });
        let encode_words: EncodeWordsFn = Arc::new(move |list| {
            let list: Vec<&str> = list.iter().map(String::as_str).collect();
            let encoding = words.encode(list, false).map_err(|e| e.to_string())?;
            let ids = encoding.get_ids().iter().zip(encoding.get_word_ids());
            Ok(ids.filter_map(|(id, word)| word.map(|w| (*id, w as usize))).collect())
        });
        let decoder = Decoder::new(move |ids| reader.decode(ids, true).unwrap_or_default());
        Ok(Self { decoder, ..Self::new(encode, encode_words, chat, eos)? })
    }

    /// Ids without special tokens.
    fn plain(&self, text: &str) -> Result<Vec<u32>, String> {
        (self.encode)(text, false)
    }
}

/// Ids of `text + piece`, given those of `text`. Encoded together where that leaves the first part as it is (the tokens
/// that a model would have produced), else apart.
fn extend(
    encode: impl Fn(&str) -> Result<Vec<u32>, String>,
    ids: &[u32],
    text: &str,
    piece: &str,
) -> Result<Vec<u32>, String> {
    let whole = encode(&format!("{text}{piece}"))?;
    if whole.len() > ids.len() && whole.starts_with(ids) {
        return Ok(whole);
    }
    let mut out = ids.to_vec();
    out.extend(encode(piece)?);
    Ok(out)
}

/// What an example teaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Per token, whether predicting it carries loss; never the first.
    Tokens(Vec<bool>),
    /// The label of the whole text.
    Label(u32),
    /// The labels that apply to the whole text.
    Labels(Vec<u32>),
    /// The number of the whole text (bits of an f32).
    Value(u32),
    /// (position, label) of every word's first piece.
    Tags(Vec<(u32, u32)>),
    /// By token, whether it is of the answer; and another answer to the same prompt, which is worse.
    Preferred(Vec<bool>, Box<Answer>),
    /// By token, whether it is of the answer; whether that is good; and an answer to another prompt after this one.
    Rated(Vec<bool>, bool, Option<Box<Answer>>),
}

/// One example as the model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids, at least one; for an encoder-decoder, the decoder's.
    pub tokens: Vec<u32>,
    /// What it teaches.
    pub target: Target,
    /// For an encoder-decoder: what the encoder reads. Else empty.
    pub source: Vec<u32>,
    /// The line that it came from, counting from 1; a long text makes several examples. 0 = unknown.
    pub line: u64,
}

impl Encoded {
    /// An example without an encoder's side.
    pub fn new(tokens: Vec<u32>, target: Target) -> Self {
        Self { tokens, target, source: Vec::new(), line: 0 }
    }

    /// Rows that it takes in a forward, with its other answer.
    pub fn rows(&self) -> usize {
        self.tokens.len() + self.source.len() + self.other().map_or(0, |o| o.tokens.len() + self.source.len())
    }

    /// Rows of the longer of its sequences.
    pub fn longest(&self) -> usize {
        self.source.len() + self.tokens.len().max(self.other().map_or(0, |o| o.tokens.len()))
    }

    /// Sequences in a forward: one, or two with another answer.
    pub fn sequences(&self) -> usize {
        1 + usize::from(self.other().is_some())
    }

    /// The answer beside its own.
    pub fn other(&self) -> Option<&Answer> {
        match &self.target {
            Target::Preferred(_, other) | Target::Rated(_, _, Some(other)) => Some(other),
            _ => None,
        }
    }

    /// By token, whether it is learned; empty where labels are.
    pub fn learned(&self) -> &[bool] {
        match &self.target {
            Target::Tokens(mask) | Target::Preferred(mask, _) | Target::Rated(mask, _, _) => mask,
            _ => &[],
        }
    }

    /// How many losses it contributes: supervised tokens, labelled words, or one.
    pub fn weight(&self) -> usize {
        match &self.target {
            Target::Tokens(mask) => count(mask),
            Target::Tags(tags) => tags.len(),
            _ => 1,
        }
    }

    /// Tokens, words or labels that its losses are of.
    pub fn supervised(&self) -> usize {
        match &self.target {
            Target::Preferred(mask, other) => count(mask) + count(&other.learn),
            Target::Rated(mask, _, _) => count(mask),
            _ => self.weight(),
        }
    }
}

fn count(mask: &[bool]) -> usize {
    mask.iter().filter(|m| **m).count()
}

/// Encodes a data set; examples with problems are reported and left out.
pub fn encode(
    data: &Dataset,
    codec: &TextCodec,
    labels: &LabelSet,
    max_length: usize,
    report: &mut Report,
) -> Vec<Encoded> {
    let mut encoder = Encoder { codec, labels, max_length, report, out: Vec::with_capacity(data.rows.len()) };
    for row in &data.rows {
        let before = encoder.out.len();
        if let Err((code, message)) = encoder.row(row) {
            encoder.report.error(code, row.line, "", message);
        }
        encoder.out[before..].iter_mut().for_each(|example| example.line = row.line);
    }
    encoder.out
}

struct Encoder<'a> {
    codec: &'a TextCodec,
    labels: &'a LabelSet,
    max_length: usize,
    report: &'a mut Report,
    out: Vec<Encoded>,
}

type RowResult = Result<(), (Code, String)>;

fn tokenizer(e: String) -> (Code, String) {
    (Code::Tokenizer, format!("could not be tokenised: {e}"))
}

impl Encoder<'_> {
    fn row(&mut self, row: &Row) -> RowResult {
        match &row.example {
            Example::Text(text) => self.text(text),
            Example::PromptCompletion { prompt, completion } => {
                let source = self.source(row.line, prompt)?;
                let answer = self.completion(prompt, completion)?;
                self.supervised(row.line, source, answer)
            }
            Example::Messages(messages) => {
                let answer = self.messages(messages, 0)?;
                self.supervised(row.line, Vec::new(), answer)
            }
            Example::Pair { prompt, chosen, rejected } => self.pair(row.line, prompt, chosen, rejected),
            Example::Rated { prompt, completion, good } => self.rated(row.line, prompt, completion, *good),
            Example::TextLabel { text, label } => match (self.labels.problem(), self.labels.get(label), label.number())
            {
                (Problem::Regression, _, Some(x)) => self.label(row.line, text, Target::Value((x as f32).to_bits())),
                (Problem::SingleLabel, Some(label), _) => self.label(row.line, text, Target::Label(label)),
                _ => Ok(()), // reported by validate
            },
            Example::TextLabels { text, labels } => {
                let all: Option<Vec<u32>> = labels.iter().map(|l| self.labels.get(l)).collect();
                all.map_or(Ok(()), |all| self.label(row.line, text, Target::Labels(all)))
            }
            Example::TokenLabels { tokens, labels } => {
                let tags: Option<Vec<u32>> = labels.iter().map(|l| self.labels.get(l)).collect();
                tags.map_or(Ok(()), |tags| self.tags(row.line, tokens, &tags))
            }
        }
    }

    /// A text, in pieces of `max_length` if it is longer; the end carries an end-of-text token.
    fn text(&mut self, text: &str) -> RowResult {
        let mut ids = self.codec.prefix.clone();
        ids.extend(self.codec.plain(text).map_err(tokenizer)?);
        if let Some(eos) = self.codec.eos.first() {
            ids.push(*eos);
        }
        let before = self.out.len();
        for piece in ids.chunks(self.max_length.max(2)) {
            if piece.len() > 1 {
                let mask = (0..piece.len()).map(|i| i > 0).collect();
                self.out.push(Encoded::new(piece.to_vec(), Target::Tokens(mask)));
            }
        }
        if self.out.len() == before {
            return Err((Code::NoSupervisedToken, "has one token only: there is nothing to predict".to_owned()));
        }
        Ok(())
    }

    /// What an encoder-decoder's encoder reads: the prompt with its special tokens. Empty for others.
    fn source(&mut self, line: u64, prompt: &str) -> Result<Vec<u32>, (Code, String)> {
        if self.codec.decoder_start.is_none() {
            return Ok(Vec::new());
        }
        let body = self.codec.plain(prompt).map_err(tokenizer)?;
        match self.surround(line, body).0 {
            source if source.is_empty() => Err((Code::EmptyText, "has a prompt without tokens".to_owned())),
            source => Ok(source),
        }
    }

    /// A prompt with its completion and the end of the text; of an encoder-decoder, what its decoder writes.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Answer, (Code, String)> {
        let (mut ids, learn_from) = match self.codec.decoder_start {
            Some(start) => {
                let mut ids = vec![start];
                ids.extend(self.codec.plain(completion).map_err(tokenizer)?);
                (ids, 1)
            }
            None => {
                let head = self.codec.plain(prompt).map_err(tokenizer)?;
                let mut ids = self.codec.prefix.clone();
                let learn_from = ids.len() + head.len();
                ids.extend(extend(|text| self.codec.plain(text), &head, prompt, completion).map_err(tokenizer)?);
                (ids, learn_from.max(1))
            }
        };
        ids.extend(self.codec.eos.first());
        let learn = (0..ids.len()).map(|i| i >= learn_from).collect();
        Ok(Answer { tokens: ids, learn })
    }

    /// A conversation; what the assistant says from message `from` on is learned.
    fn messages(&self, messages: &[ChatMessage], from: usize) -> Result<Answer, (Code, String)> {
        let Some(ChatCodec { guard, render, encode }) = &self.codec.chat else {
            let message = "needs a chat template, which this base does not have; use prompt and completion";
            return Err((Code::ChatTemplate, message.to_owned()));
        };
        let bad = |e: String| (Code::ChatTemplate, format!("was refused by the chat template: {e}"));
        let (messages, marked) = guard(messages);
        let (mut text, mut ids, mut mask) = (String::new(), Vec::new(), Vec::new());
        let turns = messages.iter().enumerate().filter(|(_, m)| m.role == "assistant").map(|(i, _)| i);
        for turn in turns {
            // what follows will be cut, and every turn renders and reads what is before it
            if ids.len() >= self.max_length {
                break;
            }
            let opening = render(&messages[..turn], true).map_err(bad)?;
            let closed = render(&messages[..=turn], false).map_err(bad)?;
            for (upto, learn) in [(&opening, false), (&closed, turn >= from)] {
                let Some(piece) = upto.strip_prefix(text.as_str()) else {
                    return Err(bad("it renders earlier turns differently once later ones follow".to_owned()));
                };
                ids = extend(|text| encode(text, &marked), &ids, &text, piece).map_err(tokenizer)?;
                mask.resize(ids.len(), learn);
                text.clone_from(upto);
            }
        }
        let tail_ends = ids.iter().zip(&mask).rev().take_while(|(_, m)| **m).any(|(id, _)| self.codec.eos.contains(id));
        if let (false, Some(eos)) = (tail_ends, self.codec.eos.first()) {
            ids.push(*eos);
            mask.push(true);
        }
        if let Some(first) = mask.first_mut() {
            *first = false;
        }
        Ok(Answer { tokens: ids, learn: mask })
    }

    fn supervised(&mut self, line: u64, source: Vec<u32>, answer: Answer) -> RowResult {
        let Answer { tokens, learn } = self.cut(line, "", answer)?;
        self.out.push(Encoded { source, ..Encoded::new(tokens, Target::Tokens(learn)) });
        Ok(())
    }

    /// Cuts the end of what is too long; an example of which no supervised token is left is an error.
    fn cut(&mut self, line: u64, pointer: &str, mut answer: Answer) -> Result<Answer, (Code, String)> {
        let total = answer.tokens.len();
        answer.tokens.truncate(self.max_length);
        answer.learn.truncate(self.max_length);
        let kept = answer.tokens.len();
        if !answer.learn.contains(&true) {
            let longest = self.max_length;
            let message =
                format!("has {total} tokens of which the first {kept} carry no loss; max_length is {longest}");
            return Err((Code::NoSupervisedToken, message));
        }
        self.warn_cut(line, pointer, total, kept);
        Ok(answer)
    }

    fn label(&mut self, line: u64, text: &str, target: Target) -> RowResult {
        let body = self.codec.plain(text).map_err(tokenizer)?;
        if body.is_empty() {
            return Err((Code::EmptyText, "has no tokens".to_owned()));
        }
        let (tokens, _) = self.surround(line, body);
        self.out.push(Encoded::new(tokens, target));
        Ok(())
    }

    fn tags(&mut self, line: u64, words: &[String], tags: &[u32]) -> RowResult {
        let pieces = (self.codec.encode_words)(words).map_err(tokenizer)?;
        let mut firsts = Vec::with_capacity(words.len());
        let mut last = None;
        for (at, (_, word)) in pieces.iter().enumerate() {
            if last != Some(*word) {
                firsts.push((at, *word));
                last = Some(*word);
            }
        }
        let (tokens, kept) = self.surround(line, pieces.into_iter().map(|(id, _)| id).collect());
        let offset = self.codec.prefix.len();
        let tags: Vec<_> = firsts
            .into_iter()
            .filter(|(at, _)| *at < kept)
            .filter_map(|(at, word)| tags.get(word).map(|tag| ((offset + at) as u32, *tag)))
            .collect();
        if tags.is_empty() {
            return Err((Code::NoSupervisedToken, "has no word that the tokenizer knows".to_owned()));
        }
        self.out.push(Encoded::new(tokens, Target::Tags(tags)));
        Ok(())
    }

    /// Special tokens around a body that is cut to fit; also how much of the body is kept.
    fn surround(&mut self, line: u64, mut body: Vec<u32>) -> (Vec<u32>, usize) {
        let codec = self.codec;
        let room = self.max_length.saturating_sub(codec.prefix.len() + codec.suffix.len()).max(1);
        self.warn_cut(line, "", body.len(), body.len().min(room));
        body.truncate(room);
        let kept = body.len();
        let mut tokens = codec.prefix.clone();
        tokens.extend(body);
        tokens.extend(&codec.suffix);
        (tokens, kept)
    }

    fn warn_cut(&mut self, line: u64, pointer: &str, total: usize, kept: usize) {
        if kept < total {
            let message = format!("has {total} tokens; it was cut to {kept} (max_length {})", self.max_length);
            self.report.warn(Code::TooLong, line, pointer, message);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
