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

use crate::model::{ModelError, gguf::stored_name, weights};

/// Metadata of a file in this folder's place, tensors left out.
///
/// # Errors
/// A folder without a config.
pub fn metadata(folder: &Path) -> Result<Vec<(String, Value)>, ModelError> {
    let config: Json = serde_json::from_slice(&weights::read(folder, "config.json")?)
        .map_err(|e| ModelError::Config(e.to_string()))?;
    let arch = match config["model_type"].as_str() {
        Some("mistral") => "llama",
        other => other.unwrap_or_default(),
    };
    let number = |key: &str| config[key].as_u64().unwrap_or_default() as u32;
    let real = |key: &str, default: f64| config[key].as_f64().unwrap_or(default) as f32;
    let head_dim = match number("head_dim") {
        0 => number("hidden_size") / number("num_attention_heads").max(1),
        n => n,
    };
    let mut out = vec![
        ("general.architecture".to_owned(), Value::String(arch.to_owned())),
        ("general.dtype".to_owned(), Value::U32(0)),
        ("tokenizer.ggml.bos_token_id".to_owned(), Value::U32(number("bos_token_id"))),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(number("eos_token_id"))),
        ("tokenizer.ggml.tokens".to_owned(), Value::Array(vec![Value::String("a".into()), Value::String("b".into())])),
        ("tokenizer.ggml.scores".to_owned(), Value::Array(vec![Value::F32(0.0), Value::F32(-1.0)])),
    ];
    let own = [
        ("block_count", Value::U32(number("num_hidden_layers"))),
        ("context_length", Value::U32(number("max_position_embeddings"))),
        ("embedding_length", Value::U32(number("hidden_size"))),
        ("feed_forward_length", Value::U32(number("intermediate_size"))),
        ("attention.head_count", Value::U32(number("num_attention_heads"))),
        ("attention.head_count_kv", Value::U32(number("num_key_value_heads"))),
        ("attention.key_length", Value::U32(head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(real("rms_norm_eps", 1e-6))),
        ("rope.dimension_count", Value::U32(head_dim)),
        ("rope.freq_base", Value::F32(real("rope_theta", 10_000.0))),
    ];
    out.extend(own.into_iter().map(|(key, value)| (format!("{arch}.{key}"), value)));
    Ok(out)
}

/// The tensors of a folder under their names in a file, queries and keys permuted as its architecture has them; matrices of
/// the format that `format` gives them by name, the rest in f32.
///
/// # Errors
/// A folder that cannot be read; a shape that does not fit a format.
pub fn tensors(folder: &Path, format: impl Fn(&str) -> GgmlDType) -> Result<HashMap<String, QTensor>, ModelError> {
    let config: Json = serde_json::from_slice(&weights::read(folder, "config.json")?)
        .map_err(|e| ModelError::Config(e.to_string()))?;
    let permutes = matches!(config["model_type"].as_str(), Some("llama" | "mistral"));
    let heads = |key: &str| config[key].as_u64().filter(|_| permutes).map(|n| n as usize);
    let mut out = HashMap::new();
    for (name, w) in candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)? {
        let stored = stored_name(&name).ok_or_else(|| ModelError::Checkpoint(format!("{name} has no place")))?;
        let heads = match stored.split('.').nth(2) {
            Some("attn_q") => heads("num_attention_heads"),
            Some("attn_k") => heads("num_key_value_heads"),
            _ => None,
        };
        let w = match heads {
            Some(heads) => permuted(&w, heads)?,
            None => w,
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
