//! A tokenizer from the metadata of a GGUF file, as the `tokenizer.json` that it was made of.
//!
//! `tokenizer.ggml.model` says which kind: `gpt2`, a byte-level BPE with its merges, cut up as `tokenizer.ggml.pre` says
//! ([`pre`]), or `llama`, SentencePiece's BPE: pieces with scores, bytes for what is no piece, spaces as U+2581. Its merges
//! are not in the file. SentencePiece joins the two neighbours whose piece has the highest score, so every pair of pieces
//! that make up a piece is a merge, in the order of these scores ([`merges`]), as transformers' converter has it.
//!
//! Tokens of the types control and unknown are special; user-defined ones are found whole in a text, but are plain.

mod pre;

use std::collections::HashMap;

use serde_json::{Map, Value};
use tokenizers::{
    AddedToken, Tokenizer,
    decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip},
    models::bpe::{BPE, Merges, Vocab},
    normalizers::{Prepend, Replace, Sequence as Normalizers},
    pre_tokenizers::byte_level::ByteLevel,
    processors::{
        PostProcessorWrapper,
        sequence::Sequence as Processors,
        template::{SpecialToken, Template, TemplateProcessing},
    },
};

use super::TextError;

/// What errors call the source.
pub(super) const SOURCE: &str = "the GGUF file's tokenizer";

/// Most tokens; the largest vocabularies have 2^18.
const MAX_TOKENS: usize = 1 << 20;
/// Longest token, in bytes: a piece is looked at by all its parts.
const MAX_TOKEN_BYTES: usize = 1024;
/// Tokens that end a turn or a text, by what models call them: llama.cpp finds them by their texts, too, since many files name
/// only one of them.
const ENDS: &[&str] =
    &["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"];
/// Tokens that open a turn: nobody may write one into a message, whatever kind a file says they are.
const OPENINGS: &[&str] = &[
    "<|im_start|>",
    "<start_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
];
/// Most bytes of pieces times their lengths: each is looked at by all its parts.
const MAX_WORK: usize = 1 << 30;
/// Most merges.
const MAX_MERGES: usize = 1 << 22;

/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";

type Read<T> = Result<T, TextError>;

fn bad(reason: impl Into<String>) -> TextError {
    TextError::Invalid { file: SOURCE, reason: reason.into() }
}

fn refused(e: &(impl std::fmt::Display + ?Sized)) -> TextError {
    bad(e.to_string())
}

/// The metadata; errors name the key.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn key(name: &str) -> String {
        format!("tokenizer.ggml.{name}")
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(&Self::key(name))
    }

    fn text(&self, name: &str, accepted: &str) -> Read<&'a str> {
        match self.get(name) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(bad(format!("{} is {other}; accepted are {accepted}", Self::key(name)))),
            None => Err(bad(format!("{} is missing; accepted are {accepted}", Self::key(name)))),
        }
    }

    fn flag(&self, name: &str, default: bool) -> Read<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(bad(format!("{} is {other}; true or false is accepted", Self::key(name)))),
        }
    }

    /// The elements of an array that must be there, each read by `one`.
    fn array<T>(&self, name: &str, what: &str, most: usize, one: impl Fn(&'a Value) -> Option<T>) -> Read<Vec<T>> {
        let key = Self::key(name);
        let Some(value) = self.get(name) else { return Err(bad(format!("{key} is missing"))) };
        let list = value.as_array().ok_or_else(|| bad(format!("{key} is no array")))?;
        if list.len() > most {
            return Err(bad(format!("{key} has {} elements; at most {most} are accepted", list.len())));
        }
        let read = |(i, v)| one(v).ok_or_else(|| bad(format!("{key}[{i}] is {v}; {what} is accepted")));
        list.iter().enumerate().map(read).collect()
    }
}

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    fn read(value: &Value) -> Option<Self> {
        Some(match value.as_i64()? {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether a text's neighbouring pieces may come together to this one.
    fn joins(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined)
    }
}

/// The tokens, by id and by text.
struct Tokens<'a> {
    texts: Vec<&'a str>,
    kinds: Vec<Kind>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Tokens<'a> {
    fn read(fields: &Fields<'a>) -> Read<Self> {
        let texts = fields.array("tokens", "a text", MAX_TOKENS, Value::as_str)?;
        let kinds = fields.array("token_type", "a number from 1 to 6", MAX_TOKENS, Kind::read)?;
        same_length("token_type", kinds.len(), texts.len())?;
        if texts.is_empty() {
            return Err(bad("tokenizer.ggml.tokens is empty"));
        }
        let mut ids = HashMap::with_capacity(texts.len());
        for (id, text) in (0u32..).zip(&texts) {
            if text.len() > MAX_TOKEN_BYTES {
                return Err(bad(format!(
                    "tokenizer.ggml.tokens[{id}] has {} bytes; at most {MAX_TOKEN_BYTES} are accepted",
                    text.len()
                )));
            }
            // a token without a text is never made, and stands for nothing
            if text.is_empty() {
                continue;
            }
            if let Some(other) = ids.insert(*text, id) {
                return Err(bad(format!("tokenizer.ggml.tokens has {text:?} twice, as {other} and {id}")));
            }
        }
        Ok(Self { texts, kinds, ids })
    }

    /// The token that `{name}_token_id` names.
    fn special(&self, fields: &Fields<'_>, name: &str) -> Read<Option<u32>> {
        let key = format!("{name}_token_id");
        let Some(value) = fields.get(&key) else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < self.texts.len());
        match id {
            Some(id) => Ok(Some(id)),
            None => Err(bad(format!("{} is {value}; the file has {} tokens", Fields::key(&key), self.texts.len()))),
        }
    }

    fn text(&self, id: u32) -> &'a str {
        self.texts.get(id as usize).copied().unwrap_or_default()
    }

    fn vocab(&self) -> Vocab {
        self.ids.iter().map(|(text, id)| ((*text).to_owned(), *id)).collect()
    }

    /// Tokens that are found whole in a text, in order of their ids.
    fn added(&self) -> impl Iterator<Item = AddedToken> + '_ {
        let all = self.texts.iter().zip(&self.kinds).filter(|(text, _)| !text.is_empty());
        all.filter_map(|(text, kind)| match kind {
            Kind::Control | Kind::Unknown => Some(AddedToken::from(*text, true)),
            Kind::UserDefined if ENDS.contains(text) || OPENINGS.contains(text) => {
                Some(AddedToken::from(*text, true).normalized(false))
            }
            Kind::UserDefined => Some(AddedToken::from(*text, false).normalized(false)),
            Kind::Normal | Kind::Unused | Kind::Byte => None,
        })
    }
}

fn same_length(name: &str, found: usize, tokens: usize) -> Read<()> {
    if found == tokens {
        return Ok(());
    }
    Err(bad(format!("tokenizer.ggml.{name} has {found} elements, tokenizer.ggml.tokens has {tokens}")))
}

/// Special tokens by what transformers calls them, and what the file calls their ids.
const SPECIAL: &[(&str, &str)] = &[
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("sep_token", "seperator"), // llama.cpp's spelling
    ("pad_token", "padding"),
    ("cls_token", "cls"),
    ("mask_token", "mask"),
];

/// The ids that llama.cpp takes where a file of SentencePiece's names none.
const USUAL_PIECES: &[(&str, u32)] = &[("unknown", 0), ("bos", 1), ("eos", 2)];

/// The tokenizer, and what the model's `tokenizer_config.json` says: special tokens and the chat template.
///
/// # Errors
/// A kind of tokenizer that is not read; arrays that are missing, too long or do not fit each other; ids out of range.
pub(super) fn build(metadata: &Map<String, Value>) -> Read<(Tokenizer, Value)> {
    let fields = Fields(metadata);
    let model = fields.text("model", "gpt2, llama")?;
    let pieces = match model {
        "gpt2" => false,
        "llama" => true,
        other => {
            return Err(bad(format!("tokenizer.ggml.model {other:?} is not supported; supported are gpt2, llama")));
        }
    };
    let tokens = Tokens::read(&fields)?;
    let mut special: HashMap<&str, u32> = HashMap::new();
    if pieces {
        special.extend(USUAL_PIECES.iter().copied().filter(|(_, id)| (*id as usize) < tokens.texts.len()));
    }
    let mut config = Map::new();
    for (name, stored) in SPECIAL {
        if let Some(id) = tokens.special(&fields, stored)? {
            special.insert(stored, id);
        }
        if let Some(id) = special.get(stored) {
            config.insert((*name).to_owned(), tokens.text(*id).into());
        }
    }
    match metadata.get("tokenizer.chat_template") {
        None => {}
        Some(template @ Value::String(_)) => drop(config.insert("chat_template".into(), template.clone())),
        Some(_) => return Err(bad("tokenizer.chat_template is no text")),
    }
    let (mut tokenizer, bos_by_default) = if pieces {
        (sentence_piece(&fields, &tokens, special.get("unknown").copied())?, true)
    } else {
        byte_level(&fields, &tokens)?
    };
    let ends =
        Ends { bos: wanted(&fields, "bos", bos_by_default, &special)?, eos: wanted(&fields, "eos", false, &special)? };
    let post = processor(&tokens, &ends, !pieces)?;
    if post.is_some() {
        tokenizer.with_post_processor(post);
    }
    tokenizer.add_tokens(tokens.added()).map_err(|e| refused(&e))?;
    Ok((tokenizer, Value::Object(config)))
}

/// Ids of the tokens that end a turn or a text by the names that they usually have, where the tokenizer knows them whole.
pub(super) fn ends(tokenizer: &Tokenizer) -> Vec<u32> {
    let added = tokenizer.get_added_tokens_decoder();
    let special = |id: &u32| added.get(id).is_some_and(|token| token.special);
    ENDS.iter().filter_map(|text| tokenizer.token_to_id(text)).filter(special).collect()
}

/// The token at an end of every text, if `add_{name}_token` says that there is one.
fn wanted(fields: &Fields<'_>, name: &str, default: bool, special: &HashMap<&str, u32>) -> Read<Option<u32>> {
    if !fields.flag(&format!("add_{name}_token"), default)? {
        return Ok(None);
    }
    match special.get(name) {
        Some(id) => Ok(Some(*id)),
        None => Err(bad(format!("every text has a {name} token, but tokenizer.ggml.{name}_token_id is missing"))),
    }
}

/// What stands around every text.
struct Ends {
    bos: Option<u32>,
    eos: Option<u32>,
}

fn processor(tokens: &Tokens<'_>, ends: &Ends, bytes: bool) -> Read<Option<PostProcessorWrapper>> {
    // offsets are those of the text, also where a token begins with a space
    let level = || ByteLevel::new(true, false, true);
    let present: Vec<(&str, u32)> =
        [("bos", ends.bos), ("eos", ends.eos)].into_iter().filter_map(|(name, id)| Some((name, id?))).collect();
    if present.is_empty() {
        return Ok(bytes.then(|| level().into()));
    }
    let around = |text: &str, kind: u32| -> Vec<String> {
        let own = |name: &'static str, id: Option<u32>| id.map(|_| format!("{name}:{kind}"));
        [own("bos", ends.bos), Some(format!("${text}:{kind}")), own("eos", ends.eos)].into_iter().flatten().collect()
    };
    let template = |pieces: Vec<String>| Template::try_from(pieces).map_err(|e| refused(&e));
    let named = |(name, id): &(&str, u32)| SpecialToken::new((*name).into(), vec![*id], vec![tokens.text(*id).into()]);
    let named = present.iter().map(named).collect::<Result<Vec<_>, _>>().map_err(|e| refused(&e))?;
    let single = template(around("A", 0))?;
    let pair = template([around("A", 0), around("B", 1)].concat())?;
    let template = TemplateProcessing::builder().single(single).pair(pair).special_tokens(named).build();
    let template = template.map_err(|e| refused(&e))?;
    Ok(Some(if bytes { Processors::new(vec![level().into(), template.into()]).into() } else { template.into() }))
}

/// A byte-level BPE, and whether its texts begin with a token where the file does not say.
fn byte_level(fields: &Fields<'_>, tokens: &Tokens<'_>) -> Read<(Tokenizer, bool)> {
    let known = pre::names();
    let name = fields.text("pre", &known)?;
    let rules = pre::Rules::of(name)
        .ok_or_else(|| bad(format!("tokenizer.ggml.pre {name:?} is not supported; supported are {known}")))?;
    if fields.flag("add_space_prefix", false)? {
        return Err(bad("tokenizer.ggml.add_space_prefix is true; of a byte-level BPE false is supported"));
    }
    let lines = fields.array("merges", "a text", MAX_MERGES, Value::as_str)?;
    let merge = |(i, line): (usize, &str)| {
        // the first character may be a space itself
        let first = line.chars().next().map_or(0, char::len_utf8);
        let pair = line.get(first..).and_then(|rest| rest.find(' ')).map(|at| line.split_at(first + at));
        let (left, right) = pair.map(|(left, right)| (left, &right[1..])).unwrap_or_default();
        let known = |text: &str| tokens.ids.contains_key(text);
        if known(left) && known(right) && known(&format!("{left}{right}")) {
            return Ok((left.to_owned(), right.to_owned()));
        }
        Err(bad(format!("tokenizer.ggml.merges[{i}] is {line:?}, which is no pair of tokens that make up a token")))
    };
    let merges: Merges = lines.into_iter().enumerate().map(merge).collect::<Read<_>>()?;
    let model = BPE::builder().vocab_and_merges(tokens.vocab(), merges).ignore_merges(rules.ignore_merges).build();
    let mut tokenizer = Tokenizer::new(model.map_err(|e| refused(&e))?);
    tokenizer.with_normalizer(rules.normalizer()).map_err(|e| refused(&e))?;
    tokenizer.with_pre_tokenizer(Some(rules.pre_tokenizer().map_err(|e| refused(&e))?));
    tokenizer.with_decoder(Some(ByteLevel::new(true, true, true)));
    Ok((tokenizer, rules.bos))
}

/// SentencePiece's BPE.
fn sentence_piece(fields: &Fields<'_>, tokens: &Tokens<'_>, unknown: Option<u32>) -> Read<Tokenizer> {
    let scores = fields.array("scores", "a number", MAX_TOKENS, |v| v.as_f64().map(|s| s as f32))?;
    same_length("scores", scores.len(), tokens.texts.len())?;
    let prefix = fields.flag("add_space_prefix", true)?;
    let mut model = BPE::builder().vocab_and_merges(tokens.vocab(), merges(tokens, &scores)?);
    model = model.byte_fallback(true).fuse_unk(true);
    if let Some(id) = unknown {
        model = model.unk_token(tokens.text(id).to_owned());
    }
    let mut tokenizer = Tokenizer::new(model.build().map_err(|e| refused(&e))?);
    let spaces = |from: &str, to: &str| Replace::new(from, to).map_err(|e| refused(&e));
    let mut steps = vec![spaces(" ", SPACE)?.into()];
    if prefix {
        steps.insert(0, Prepend::new(SPACE.into()).into());
    }
    tokenizer.with_normalizer(Some(Normalizers::new(steps))).map_err(|e| refused(&e))?;
    let mut steps = vec![spaces(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(steps)));
    Ok(tokenizer)
}

/// Every pair of pieces that make up a piece: the highest score first; of one score, in the order of the vocabulary.
fn merges(tokens: &Tokens<'_>, scores: &[f32]) -> Read<Merges> {
    let piece = |text: &str| {
        let id = *tokens.ids.get(text)?;
        tokens.kinds.get(id as usize).filter(|kind| kind.joins()).map(|_| id)
    };
    let work = tokens.texts.iter().fold(0usize, |sum, text| sum.saturating_add(text.len().pow(2)));
    if work > MAX_WORK {
        return Err(bad("its pieces are too long and too many to be taken apart"));
    }
    let mut found: Vec<(f32, u32, u32)> = Vec::new();
    for ((text, kind), score) in tokens.texts.iter().zip(&tokens.kinds).zip(scores) {
        if !kind.joins() {
            continue;
        }
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let mut own: Vec<(u32, u32)> = cuts.filter_map(|(left, right)| Some((piece(left)?, piece(right)?))).collect();
        own.sort_unstable();
        // -0.0 is the first piece's score in SentencePiece's files
        found.extend(own.into_iter().map(|(left, right)| (*score + 0.0, left, right)));
        if found.len() > MAX_MERGES {
            return Err(bad(format!("its pieces have more than {MAX_MERGES} merges")));
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0)); // stable
    Ok(found
        .into_iter()
        .map(|(_, left, right)| (tokens.text(left).to_owned(), tokens.text(right).to_owned()))
        .collect())
}

#[cfg(test)]
mod tests;
