//! A Hugging Face folder as llama.cpp's converter writes it, for tests.

use std::{collections::HashMap, io::BufWriter, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use serde_json::Value as Json;

use crate::model::{ModelError, gguf::Layout, weights};

/// Entries of a file's metadata, in order.
pub type Metadata = Vec<(String, Value)>;

fn read(folder: &Path, name: &str) -> Result<Json, ModelError> {
    serde_json::from_slice(&weights::read(folder, name)?).map_err(|e| ModelError::Config(format!("{name}: {e}")))
}

/// `general.architecture` of a config.
fn architecture(config: &Json) -> &str {
    match config["model_type"].as_str() {
        Some("mistral") => "llama",
        Some("gemma3_text") => "gemma3",
        other => other.unwrap_or_default(),
    }
}

/// Metadata of a file in this folder's place, tensors left out. Of the tokenizer there are the special tokens and a
/// vocabulary of two; [`tokenizer`] has the folder's own.
///
/// # Errors
/// A folder without a config.
pub fn metadata(folder: &Path) -> Result<Metadata, ModelError> {
    let config = read(folder, "config.json")?;
    let arch = architecture(&config);
    let number = |key: &str| config[key].as_u64().unwrap_or_default() as u32;
    let mut out = vec![
        ("general.architecture".to_owned(), Value::String(arch.to_owned())),
        ("general.dtype".to_owned(), Value::U32(0)),
        ("tokenizer.ggml.bos_token_id".to_owned(), Value::U32(number("bos_token_id"))),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(number("eos_token_id"))),
        ("tokenizer.ggml.tokens".to_owned(), Value::Array(vec![Value::String("a".into()), Value::String("b".into())])),
        ("tokenizer.ggml.scores".to_owned(), Value::Array(vec![Value::F32(0.0), Value::F32(-1.0)])),
    ];
    let own = if arch == "gpt2" { of_gpt2(&config) } else { of_rotary(&config, arch) };
    out.extend(own.into_iter().map(|(key, value)| (format!("{arch}.{key}"), value)));
    Ok(out)
}

type Own = Vec<(&'static str, Value)>;

fn of_gpt2(config: &Json) -> Own {
    let number = |key: &str| config[key].as_u64().unwrap_or_default() as u32;
    let ff = if config.get("n_inner").is_some() { number("n_inner") } else { 4 * number("n_embd") };
    vec![
        ("block_count", Value::U32(number("n_layer"))),
        ("context_length", Value::U32(number("n_positions"))),
        ("embedding_length", Value::U32(number("n_embd"))),
        ("feed_forward_length", Value::U32(ff)),
        ("attention.head_count", Value::U32(number("n_head"))),
        ("attention.layer_norm_epsilon", Value::F32(config["layer_norm_epsilon"].as_f64().unwrap_or(1e-5) as f32)),
    ]
}

fn of_rotary(config: &Json, arch: &str) -> Own {
    let number = |key: &str| config[key].as_u64().unwrap_or_default() as u32;
    let real = |key: &str, default: f64| config[key].as_f64().unwrap_or(default) as f32;
    let head_dim = match number("head_dim") {
        0 => number("hidden_size") / number("num_attention_heads").max(1),
        n => n,
    };
    let turns = (f64::from(head_dim) * config["partial_rotary_factor"].as_f64().unwrap_or(1.0)) as u32;
    let usual_theta = if arch == "gemma3" { 1e6 } else { 10_000.0 };
    let mut out = vec![
        ("block_count", Value::U32(number("num_hidden_layers"))),
        ("context_length", Value::U32(number("max_position_embeddings"))),
        ("embedding_length", Value::U32(number("hidden_size"))),
        ("feed_forward_length", Value::U32(number("intermediate_size"))),
        ("attention.head_count", Value::U32(number("num_attention_heads"))),
        ("attention.head_count_kv", Value::U32(number("num_key_value_heads"))),
        ("attention.key_length", Value::U32(head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(real("rms_norm_eps", 1e-6))),
        ("rope.dimension_count", Value::U32(turns)),
        ("rope.freq_base", Value::F32(real("rope_theta", usual_theta))),
    ];
    if matches!(arch, "gemma2" | "gemma3" | "phi3") {
        out.push(("attention.sliding_window", Value::U32(number("sliding_window"))));
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        out.extend(config[key].as_f64().map(|cap| (key, Value::F32(cap as f32))));
    }
    // the first layer that sees all ends the pattern
    let types = config["layer_types"].as_array().filter(|_| arch == "gemma3");
    let full = types.and_then(|types| types.iter().position(|t| t == "full_attention"));
    out.extend(full.map(|at| ("attention.sliding_window_pattern", Value::U32(at as u32 + 1))));
    out
}

/// The tensors of a folder under their names in a file, changed as the converter changes them; matrices of the format that
/// `format` gives them by name, the rest in f32.
///
/// # Errors
/// A folder that cannot be read; a shape that does not fit a format.
pub fn tensors(folder: &Path, format: impl Fn(&str) -> GgmlDType) -> Result<HashMap<String, QTensor>, ModelError> {
    let config = read(folder, "config.json")?;
    let arch = architecture(&config);
    let layout = Layout::of(arch).ok_or_else(|| ModelError::Unsupported(format!("no layout of {arch}")))?;
    let heads = |key: &str| config[key].as_u64().filter(|_| arch == "llama").map(|n| n as usize);
    let mut out = HashMap::new();
    for (name, w) in candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)? {
        let stored = layout.stored_name(&name).ok_or_else(|| ModelError::Checkpoint(format!("{name} has no place")))?;
        let part = stored.split('.').nth(2).unwrap_or_default();
        let w = match (arch, part) {
            ("llama", "attn_q") => permuted(&w, heads("num_attention_heads").unwrap_or(1))?,
            ("llama", "attn_k") => permuted(&w, heads("num_key_value_heads").unwrap_or(1))?,
            // Conv1D, but not the tables
            ("gpt2", _) if w.rank() == 2 && !part.is_empty() && stored.starts_with("blk.") => w.t()?.contiguous()?,
            ("gemma2" | "gemma3", _) if name.ends_with("norm.weight") => (w + 1.0)?,
            _ => w,
        };
        let format = if w.rank() == 2 { format(&stored) } else { GgmlDType::F32 };
        out.insert(stored, QTensor::quantize(&w, format)?);
    }
    Ok(out)
}

/// `LlamaModel.permute` of llama.cpp's converter.
fn permuted(w: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let (rows, width) = (w.dim(0)?, w.elem_count() / w.dim(0)?);
    w.reshape((heads, 2, rows / heads / 2, width))?.transpose(1, 2)?.contiguous()?.reshape(w.shape())
}

/// Numbers of `tokenizer.ggml.token_type`.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const BYTE: i32 = 6;
}

/// What a file says of a folder's tokenizer: `tokenizer.json` is a BPE, byte-level with the pre-tokenizer `pre`, or
/// SentencePiece's with byte fallback, whose scores are the places of a piece's first merge.
///
/// # Errors
/// A folder whose `tokenizer.json` is not there or another model.
pub fn tokenizer(folder: &Path, pre: &str) -> Result<Metadata, ModelError> {
    let file = read(folder, "tokenizer.json")?;
    let config = if folder.join("tokenizer_config.json").is_file() {
        read(folder, "tokenizer_config.json")?
    } else {
        Json::Null
    };
    let model = &file["model"];
    let vocab = model["vocab"].as_object().ok_or_else(|| ModelError::Config("tokenizer.json: no BPE".into()))?;
    let pieces = model["byte_fallback"] == true;
    let added: Vec<(u64, &str, bool)> = (file["added_tokens"].as_array().into_iter().flatten())
        .filter_map(|t| Some((t["id"].as_u64()?, t["content"].as_str()?, t["special"] == true)))
        .collect();
    let mut tokens: Vec<(u64, &str, i32)> = (vocab.iter())
        .filter_map(|(text, id)| {
            let byte = pieces && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
            Some((id.as_u64()?, text.as_str(), if byte { kind::BYTE } else { kind::NORMAL }))
        })
        .collect();
    for (id, text, special) in added {
        let kind = match special {
            true if model["unk_token"] == text => kind::UNKNOWN,
            true => kind::CONTROL,
            false => kind::USER_DEFINED,
        };
        tokens.retain(|(other, ..)| *other != id);
        tokens.push((id, text, kind));
    }
    tokens.sort_unstable();
    let merges: Vec<String> = (model["merges"].as_array().into_iter().flatten())
        .filter_map(|m| match m {
            Json::String(pair) => Some(pair.clone()),
            pair => Some(format!("{} {}", pair.get(0)?.as_str()?, pair.get(1)?.as_str()?)),
        })
        .collect();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let texts = |all: Vec<String>| Value::Array(all.into_iter().map(Value::String).collect());
    let mut out = vec![
        (key("model"), Value::String(if pieces { "llama" } else { "gpt2" }.into())),
        (key("pre"), Value::String(pre.into())),
        (key("tokens"), texts(tokens.iter().map(|(_, text, _)| (*text).to_owned()).collect())),
        (key("token_type"), Value::Array(tokens.iter().map(|(.., kind)| Value::I32(*kind)).collect())),
    ];
    if pieces {
        let mut scores: HashMap<String, f32> = HashMap::new();
        for (rank, merge) in merges.iter().enumerate() {
            scores.entry(merge.replace(' ', "")).or_insert(-(rank as f32));
        }
        let score = |text: &str| scores.get(text).copied().unwrap_or(-1e9);
        out.push((key("scores"), Value::Array(tokens.iter().map(|(_, t, _)| Value::F32(score(t))).collect())));
    } else {
        out.push((key("merges"), texts(merges)));
    }
    let (first, last) = around(&file["post_processor"]);
    let id = |name: &str| tokens.iter().find(|(_, text, _)| config[name] == *text).map(|(id, ..)| *id);
    for (name, found) in [
        ("bos_token_id", first.or_else(|| id("bos_token"))),
        ("eos_token_id", last.or_else(|| id("eos_token"))),
        ("unknown_token_id", id("unk_token")),
        ("padding_token_id", id("pad_token")),
    ] {
        out.extend(found.map(|id| (key(name), Value::U32(id as u32))));
    }
    out.push((key("add_bos_token"), Value::Bool(first.is_some())));
    out.push((key("add_eos_token"), Value::Bool(last.is_some())));
    let template = config["chat_template"].as_str().map(|t| Value::String(t.into()));
    out.extend(template.map(|t| ("tokenizer.chat_template".to_owned(), t)));
    Ok(out)
}

/// The tokens that a template puts before and behind a text.
fn around(processor: &Json) -> (Option<u64>, Option<u64>) {
    let list = processor["processors"].as_array();
    let all = list.map_or_else(|| vec![processor], |list| list.iter().collect());
    let Some(template) = all.into_iter().find(|p| p["type"] == "TemplateProcessing") else { return (None, None) };
    let id = |piece: Option<&Json>| {
        let name = piece?["SpecialToken"]["id"].as_str()?;
        template["special_tokens"][name]["ids"][0].as_u64()
    };
    let single = template["single"].as_array();
    (id(single.and_then(|s| s.first())), id(single.and_then(|s| s.last())))
}

/// Writes a file.
///
/// # Errors
/// A disk that cannot be written.
pub fn write(path: &Path, metadata: &[(String, Value)], tensors: &HashMap<String, QTensor>) -> Result<(), ModelError> {
    let io = |source| ModelError::Io { path: path.to_path_buf(), source };
    let mut file = BufWriter::new(std::fs::File::create(path).map_err(io)?);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let mut tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    tensors.sort_by_key(|(name, _)| *name);
    Ok(gguf_file::write(&mut file, &metadata, &tensors)?)
}

/// Writes a folder's model as a file with all matrices of one format.
///
/// # Errors
/// Those of [`metadata`], [`tensors`] and [`write()`].
pub fn convert(folder: &Path, path: &Path, format: GgmlDType) -> Result<(), ModelError> {
    write(path, &metadata(folder)?, &tensors(folder, |_| format)?)
}

/// [`convert`], with the folder's tokenizer in the file.
///
/// # Errors
/// Those of [`convert`] and [`tokenizer`].
pub fn convert_whole(folder: &Path, path: &Path, format: GgmlDType, pre: &str) -> Result<(), ModelError> {
    let own = tokenizer(folder, pre)?;
    let mut all = metadata(folder)?;
    all.retain(|(key, _)| own.iter().all(|(other, _)| other != key) && key != "tokenizer.ggml.scores");
    all.extend(own);
    write(path, &all, &tensors(folder, |_| format)?)
}
