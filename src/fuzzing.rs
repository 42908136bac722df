//! What fuzzers call: one function per kind of bytes that come from outside, made of the very functions that read them when
//! the server runs. Each takes any bytes and returns; a panic, a hang or memory without bound is a finding.
//!
//! `fuzz/` has a cargo-fuzz target per function, with its corpus; the tests here run each of them over its corpus and over
//! mutations of it. Not part of the library's interface.

#![allow(clippy::expect_used, reason = "what is not under test is made once, and is known to be well-formed")]

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::json;

use crate::{
    admission::params::{ChatMessage, ConstraintParams},
    delta::{DeltaFiles, Task},
    engine::{Ending, TokenSet},
    grammar::Grammars,
    grpc, interop,
    model::{
        self, Base,
        testing::{random_base, tiny_llama},
    },
    text::{ChatTemplate, DecodeStream, StopStrings, TextModel, testing},
    train::{
        dataset::Dataset,
        validate::{LabelSet, check_train},
    },
};

/// A target's entry.
pub type Entry = fn(&[u8]);

/// All targets: the name of the file in `fuzz/fuzz_targets` and of the folder in `fuzz/corpus`, and the function.
pub const TARGETS: [(&str, Entry); 11] = [
    ("safetensors_header", safetensors_header),
    ("peft_config", peft_config),
    ("adapterhub_config", adapterhub_config),
    ("dataset", dataset),
    ("proto_request", proto_request),
    ("tokenizer", tokenizer),
    ("chat_template", chat_template),
    ("stop_strings", stop_strings),
    ("grammar", grammar),
    ("gguf_header", gguf_header),
    ("pickle", pickle),
];

const CONFIG: &str = "adapter_config.json";
const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// A small base that deltas are read for.
fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| random_base(&tiny_llama(), 1).expect("a base"))
}

/// A tokenizer of bytes; 256 and 257 are special.
fn text() -> &'static Arc<TextModel> {
    static TEXT: OnceLock<Arc<TextModel>> = OnceLock::new();
    TEXT.get_or_init(|| Arc::new(testing::bytes()))
}

/// Ids from here on are special, or none at all.
const SPECIAL: u32 = 256;

/// A safetensors file of zeros.
fn weights(tensors: &[(&str, &[usize])]) -> Bytes {
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let end = at + 4 * shape.iter().product::<usize>();
        header.insert((*name).to_owned(), json!({"dtype": "F32", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let header = serde_json::Value::from(header).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.into_bytes());
    out.resize(out.len() + at, 0);
    out.into()
}

fn decode(files: &[(&str, &Bytes)]) {
    let files = files.iter().map(|(name, data)| ((*name).to_owned(), (*data).clone())).collect();
    drop(interop::decode(&DeltaFiles { files }, base()));
}

/// A weights file: its header and all tensors that it names, alone and as those of a LoRA.
pub fn safetensors_header(data: &[u8]) {
    let data = Bytes::copy_from_slice(data);
    drop(interop::fuzz::tensors(&data));
    let config = Bytes::from_static(br#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8}"#);
    decode(&[(CONFIG, &config), ("adapter_model.safetensors", &data)]);
}

/// PEFT's configuration beside a well-formed weights file.
pub fn peft_config(data: &[u8]) {
    static WEIGHTS: OnceLock<Bytes> = OnceLock::new();
    let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
    let weights = WEIGHTS.get_or_init(|| weights(&[(&a, &[4, 32]), (&b, &[32, 4])]));
    decode(&[(CONFIG, &Bytes::copy_from_slice(data)), ("adapter_model.safetensors", weights)]);
}

/// AdapterHub's configuration beside a well-formed weights file; the same bytes as its head's configuration.
pub fn adapterhub_config(data: &[u8]) {
    static WEIGHTS: OnceLock<Bytes> = OnceLock::new();
    let at = |end: &str| format!("model.layers.0.output_adapters.adapters.x.adapter_{end}");
    let names = [at("down.0.weight"), at("down.0.bias"), at("up.weight"), at("up.bias")];
    let weights = WEIGHTS.get_or_init(|| {
        weights(&[(&names[0], &[8, 32]), (&names[1], &[8]), (&names[2], &[32, 8]), (&names[3], &[32])])
    });
    let data = Bytes::copy_from_slice(data);
    decode(&[(CONFIG, &data), ("adapter.safetensors", weights)]);
    decode(&[(CONFIG, &data), ("adapter.safetensors", weights), ("head_config.json", &data)]);
    decode(&[("delta.json", &data), ("part0.adapter_config.json", &data), ("part0.adapter.safetensors", weights)]);
}

/// Lines of examples, read and judged for each task.
pub fn dataset(data: &[u8]) {
    let (data, report) = Dataset::parse(data);
    assert!(report.is_ok() || !report.violations("data").is_empty(), "a refusal says why");
    for task in [Task::CausalLm, Task::SeqCls, Task::TokenCls] {
        let mut report = report.clone();
        let labels = LabelSet::resolve(&[], &data, &mut report);
        check_train(&data, task, &labels, &mut report);
    }
}

/// A request: the first byte chooses its message, the others are it. Decoded, converted, and held against all limits that
/// need no base.
pub fn proto_request(data: &[u8]) {
    if let Some((kind, message)) = data.split_first() {
        grpc::fuzz::request(*kind, message);
    }
}

/// A text to ids and back, and the same bytes as ids, which come out of a stream as they do at once.
pub fn tokenizer(data: &[u8]) {
    let (model, said) = (text(), String::from_utf8_lossy(data));
    let ids = model.encode_user(&said, false).expect("any text of this length");
    assert!(ids.iter().all(|id| *id < SPECIAL), "a user's text is no special token");
    assert_eq!(model.decode(&ids).expect("its own ids"), said);
    drop(model.encode(&said, true));
    drop(model.encode_pair(&said, Some(&said)));
    let words: Vec<String> = said.split(' ').map(str::to_owned).collect();
    drop(model.encode_words(&words));

    let ids = data.as_chunks::<2>().0.iter().map(|two| u32::from(u16::from_le_bytes(*two)) % (SPECIAL + 4));
    let ids: Vec<u32> = ids.chain(data.iter().map(|byte| u32::from(*byte))).collect();
    let (mut stream, mut streamed) = (DecodeStream::new(Arc::clone(model)), String::new());
    for id in &ids {
        streamed.extend(stream.push(*id).expect("any id"));
    }
    streamed.extend(stream.finish().expect("any ids"));
    assert_eq!(streamed, model.decode(&ids).expect("any ids"));
}

/// A template and a conversation, with a zero byte between. The conversation also goes through a plain template, out of
/// which no special token may come.
pub fn chat_template(data: &[u8]) {
    static PLAIN: OnceLock<ChatTemplate> = OnceLock::new();
    let said = String::from_utf8_lossy(data);
    let (source, said) = said.split_once('\0').unwrap_or((&said, "hello\n<eos><|im_start|>"));
    let roles = ["user", "assistant"].into_iter().cycle();
    let turns = said.split('\n').zip(roles).take(64);
    let turns: Vec<_> =
        turns.map(|(content, role)| ChatMessage { role: role.into(), content: content.into() }).collect();
    let config = json!({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}});
    if let Ok(template) = ChatTemplate::new(source, &config) {
        drop(template.encode(&turns, true, text()));
    }
    let plain = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}";
    let plain = PLAIN.get_or_init(|| ChatTemplate::new(plain, &config).expect("a template"));
    let ids = plain.encode(&turns, true, text()).expect("any messages");
    assert!(ids.iter().all(|id| *id < SPECIAL), "no message makes a special token");
}

/// Stop texts by lines and, behind a zero byte, a text. How it is cut into pieces changes nothing.
pub fn stop_strings(data: &[u8]) {
    let all = String::from_utf8_lossy(data);
    let (stops, said) = all.split_once('\0').unwrap_or(("", &all));
    let stops: Vec<String> = stops.split('\n').take(16).map(|s| s.chars().take(256).collect()).collect();
    let run = |pieces: &mut dyn Iterator<Item = &str>| {
        let (mut watch, mut out) = (StopStrings::new(stops.clone()), String::new());
        for piece in pieces {
            let found = watch.push(piece);
            out.push_str(&found.text);
            if found.matched.is_some() {
                return (out, found.matched);
            }
        }
        out.push_str(&watch.finish());
        (out, None)
    };
    let mut letters = said.split_inclusive(|_: char| true);
    let mut words = said.split_inclusive(' ');
    let by_letters = run(&mut letters);
    assert_eq!(run(&mut words), by_letters);
    if let (kept, Some(found)) = &by_letters {
        assert!(said.starts_with(&format!("{kept}{}", stops[*found])));
    }
}

/// A constraint: the first byte chooses its kind, the others are it. Compiled, and kept to for some tokens.
pub fn grammar(data: &[u8]) {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    let Some((kind, source)) = data.split_first() else { return };
    let source: String = String::from_utf8_lossy(source).chars().take(1024).collect();
    let constraint = match kind % 4 {
        0 => ConstraintParams::JsonSchema(source),
        1 => ConstraintParams::Regex(source),
        2 => ConstraintParams::Lark(source),
        _ => ConstraintParams::Choice(source.split('\n').map(str::to_owned).collect()),
    };
    let grammars = GRAMMARS.get_or_init(|| Grammars::new(Arc::clone(text()), vec![SPECIAL + 1], 64 << 20));
    let Ok(grammar) = grammars.compile(&constraint) else { return };
    let mut rule = grammar.start(true);
    for choice in data.iter().chain(&[0; 8]).take(32) {
        let mut allowed = TokenSet::default();
        let Ok(ending) = rule.allowed(&mut allowed) else { return };
        let count = allowed.iter().count();
        assert!(ending != Ending::No || count > 0, "an output that may not end can go on");
        let Some(token) = allowed.iter().nth(usize::from(*choice) % count.max(1)) else { return };
        if !rule.accept(token).is_ok_and(|over| !over) {
            return;
        }
    }
}

/// A GGUF file: its header, the configuration and tokenizer in it.
pub fn gguf_header(data: &[u8]) {
    if let Ok(metadata) = model::fuzz::gguf(data) {
        drop(TextModel::from_gguf(&metadata));
    }
}

/// What `torch.save` wrote, as a whole file, and the pickle in it alone.
pub fn pickle(data: &[u8]) {
    drop(interop::fuzz::pickle(data));
}

#[cfg(test)]
mod smoke_tests;
