//! A GGUF file as a checkpoint of the Llama family: its metadata as the `config.json` that it was made of, its tensors under
//! their Hugging Face names and in their order of rows.
//!
//! llama.cpp turns neighbouring numbers of a head, transformers the two halves, so its converter permutes the rows of
//! queries and keys of the architecture `llama` (not of Qwen's). Quantised blocks lie within rows: here the rows are put
//! back as they are, without quantising anything anew.

mod header;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use serde_json::{Map, Value as Json, json};

use self::header::{Header, Info, Kind, Value};
use super::ModelError;
use crate::ops::{QuantKind, Quantized, Weight};

/// Values of `general.architecture` that are read.
const ARCHITECTURES: &[&str] = &["llama", "qwen2", "qwen3"];

/// A layer's tensors: in the file, and by their Hugging Face names.
const LAYER: &[(&str, &str)] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
];

/// The others.
const GLOBAL: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head"), (FACTORS, FACTORS)];

/// Divisors of the rotary frequencies (Llama 3.1), which the file has in place of the config's figures.
pub(super) const FACTORS: &str = "rope_freqs";

/// A tensor under its Hugging Face name.
struct Entry {
    /// Its name in the file.
    stored: String,
    info: Info,
    /// Of a matrix or bias whose rows were permuted: its heads.
    permuted: Option<usize>,
}

/// An open file.
pub(super) struct GgufFile {
    map: memmap2::Mmap,
    entries: BTreeMap<String, Entry>,
    config: Json,
}

/// The file that a base is: the path itself, or a folder's only `*.gguf` where it has no safetensors.
///
/// # Errors
/// A folder with several of them.
pub(super) fn find(path: &Path) -> Result<Option<PathBuf>, ModelError> {
    if path.is_file() {
        return Ok(Some(path.to_path_buf()));
    }
    let io = |source| ModelError::Io { path: path.to_path_buf(), source };
    if ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| path.join(f).is_file()) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && file.is_file() {
            found.push(file);
        }
    }
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        many => {
            let names: Vec<_> = many.iter().filter_map(|f| Some(f.file_name()?.to_string_lossy())).collect();
            let dir = path.display();
            Err(ModelError::Checkpoint(format!(
                "{dir} has several GGUF files ({}); name one of them",
                names.join(", ")
            )))
        }
    }
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_path_buf(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        // SAFETY: as at the checkpoint's: the operator's own file, mapped read-only while it is loaded
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        let bad = |e: String| ModelError::Checkpoint(format!("{}: {e}", path.display()));
        let header = Header::read(&map).map_err(bad)?;
        let config = config(&header).map_err(|e| match e {
            ModelError::Checkpoint(e) => bad(e),
            other => other,
        })?;
        let entries = entries(header, &config).map_err(bad)?;
        Ok(Self { map, entries, config })
    }

    /// The metadata as a `config.json`.
    pub(super) fn config(&self) -> &Json {
        &self.config
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.entries.get(name)?.info.shape)
    }

    /// Name, type and shape, and bytes as they lie in the file, in order of name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, String, &[u8])> {
        let form = |info: &Info| format!("{}{:?}", info.kind.name(), info.shape);
        self.entries.iter().map(move |(name, e)| (name.as_str(), form(&e.info), &self.map[e.info.bytes.clone()]))
    }

    fn entry(&self, name: &str) -> Result<&Entry, ModelError> {
        self.entries.get(name).ok_or_else(|| ModelError::Checkpoint(format!("no tensor {name}")))
    }

    /// A tensor's bytes, in Hugging Face's order of rows.
    fn bytes(&self, entry: &Entry) -> Cow<'_, [u8]> {
        let bytes = &self.map[entry.info.bytes.clone()];
        let rows = entry.info.shape.first().copied().unwrap_or(1);
        match entry.permuted {
            Some(heads) => Cow::Owned(unpermuted(bytes, rows, heads)),
            None => Cow::Borrowed(bytes),
        }
    }

    /// The blocks of a matrix that is quantised.
    pub(super) fn blocks(&self, name: &str) -> Option<(QuantKind, Cow<'_, [u8]>)> {
        let entry = self.entries.get(name)?;
        match entry.info.kind {
            Kind::Quant(kind) => Some((kind, self.bytes(entry))),
            Kind::F32 | Kind::F16 | Kind::Bf16 => None,
        }
    }

    /// A tensor as f32 on the CPU, dequantised where it must be.
    pub(super) fn load(&self, name: &str) -> Result<Tensor, ModelError> {
        let entry = self.entry(name)?;
        let (bytes, shape) = (self.bytes(entry), entry.info.shape.as_slice());
        let numbers: Vec<f32> = match (entry.info.kind, shape) {
            (Kind::F32, _) => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            (Kind::F16, _) => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            (Kind::Bf16, _) => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            (Kind::Quant(kind), [rows, width]) => {
                let w = Weight::from(Quantized::from_blocks(kind, &bytes, (*rows, *width))?);
                return Ok(w.as_in_out()?.t()?.contiguous()?);
            }
            (Kind::Quant(kind), _) => {
                let (stored, kind) = (&entry.stored, kind.name());
                let problem = format!("{stored} of {kind} has the shape {shape:?}; a matrix is accepted, or f32");
                return Err(ModelError::Checkpoint(problem));
            }
        };
        Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?)
    }
}

/// Rows as transformers orders them: of each head, the first halves of the pairs and then the second ones. `bytes` are so
/// many `rows`.
fn unpermuted(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (width, half) = (bytes.len() / rows, rows / heads / 2);
    let source = |row: usize| {
        let (head, at) = (row / (2 * half), row % (2 * half));
        head * 2 * half + at % half * 2 + at / half
    };
    (0..rows).flat_map(|row| &bytes[source(row) * width..(source(row) + 1) * width]).copied().collect()
}

/// The name in a file of a tensor by its Hugging Face name.
pub(super) fn stored_name(name: &str) -> Option<String> {
    let (module, suffix) = name.rsplit_once('.')?;
    let known = |list: &[(&'static str, &str)], part: &str| list.iter().find(|(_, hf)| *hf == part).map(|(n, _)| *n);
    match module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((n, part)) => Some(format!("blk.{n}.{}.{suffix}", known(LAYER, part)?)),
        None => Some(format!("{}.{suffix}", known(GLOBAL, module)?)),
    }
}

/// Tensors under their Hugging Face names.
fn entries(header: Header, config: &Json) -> Result<BTreeMap<String, Entry>, String> {
    let number = |key: &str| config.get(key).and_then(Json::as_u64).and_then(|n| usize::try_from(n).ok());
    let permutes = config.get("model_type").and_then(Json::as_str) == Some("llama");
    let mut out = BTreeMap::new();
    for (stored, info) in header.tensors {
        let (module, suffix) = stored.rsplit_once('.').unwrap_or((&stored, ""));
        let layer = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let layer = layer.and_then(|(n, part)| Some((n.parse::<usize>().ok()?, part)));
        let known =
            |list: &[(&str, &'static str)], part: &str| list.iter().find(|(n, _)| *n == part).map(|(_, hf)| *hf);
        let name = match layer {
            Some((n, part)) => known(LAYER, part).map(|hf| format!("model.layers.{n}.{hf}")),
            None => known(GLOBAL, module).map(str::to_owned),
        };
        let Some(name) = name.filter(|_| matches!(suffix, "weight" | "bias")) else {
            return Err(format!("the tensor {stored} is none of a model of these: {}", ARCHITECTURES.join(", ")));
        };
        let heads = match layer {
            Some((_, "attn_q")) => number("num_attention_heads"),
            Some((_, "attn_k")) => number("num_key_value_heads"),
            _ => None,
        };
        let permuted = heads.filter(|_| permutes);
        let rows = info.shape.first().copied().unwrap_or(0);
        if let Some(heads) = permuted.filter(|heads| *heads == 0 || !rows.is_multiple_of(2 * heads)) {
            return Err(format!("{stored} has {rows} rows, which are no pairs of {heads} heads"));
        }
        out.insert(format!("{name}.{suffix}"), Entry { stored, info, permuted });
    }
    Ok(out)
}

/// The `config.json` that the metadata was made of.
fn config(header: &Header) -> Result<Json, ModelError> {
    let get = |key: &str| header.metadata.get(key);
    let Some(Value::Text(arch)) = get("general.architecture") else {
        return Err(ModelError::Checkpoint("general.architecture is missing or not a text".into()));
    };
    if !ARCHITECTURES.contains(&arch.as_str()) {
        return Err(ModelError::Unsupported(format!(
            "general.architecture {arch:?} is not supported; supported are {} (files of Mistral say llama)",
            ARCHITECTURES.join(", ")
        )));
    }
    let own = |key: &str| format!("{arch}.{key}");
    let need = |key: &str| match get(&own(key)) {
        Some(Value::Unsigned(n)) => Ok(*n),
        Some(Value::Signed(n)) if *n >= 0 => Ok(n.unsigned_abs()),
        Some(other) => Err(ModelError::Checkpoint(format!("{} is {other:?}; a number is accepted", own(key)))),
        None => Err(ModelError::Checkpoint(format!("{} is missing", own(key)))),
    };
    let maybe = |key: &str| get(&own(key)).map(|_| need(key)).transpose();
    let real = |key: &str| match get(&own(key)) {
        Some(Value::Float(n)) if n.is_finite() => Ok(Some(*n)),
        Some(other) => Err(ModelError::Checkpoint(format!("{} is {other:?}; a finite float is accepted", own(key)))),
        None => Ok(None),
    };
    let (hidden, heads) = (need("embedding_length")?, need("attention.head_count")?);
    let head_dim = maybe("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    for (key, want) in [("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)] {
        if let Some(found) = maybe(key)?.filter(|found| *found != want) {
            return Err(ModelError::Unsupported(format!("{} is {found}; {want} is supported", own(key))));
        }
    }
    let rows = header.tensors.get("token_embd.weight").and_then(|t| t.shape.first().copied());
    let rows = rows.ok_or_else(|| ModelError::Checkpoint("no tensor token_embd.weight".into()))?;
    let eps = real("attention.layer_norm_rms_epsilon")?;
    let eps =
        eps.ok_or_else(|| ModelError::Checkpoint(format!("{} is missing", own("attention.layer_norm_rms_epsilon"))))?;
    let mut config = json!({
        "model_type": arch,
        "hidden_size": hidden,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": maybe("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length")?,
        "vocab_size": rows,
        "max_position_embeddings": need("context_length")?,
        "rms_norm_eps": eps,
        "rope_theta": real("rope.freq_base")?.unwrap_or(10_000.0),
        "tie_word_embeddings": !header.tensors.contains_key("output.weight"),
    });
    let scaling = match get(&own("rope.scaling.type")) {
        None => None,
        Some(Value::Text(kind)) if kind == "none" => None,
        Some(Value::Text(kind)) => Some(json!({"rope_type": kind, "factor": real("rope.scaling.factor")?})),
        Some(other) => return Err(ModelError::Checkpoint(format!("{} is {other:?}", own("rope.scaling.type")))),
    };
    if let Some(map) = config.as_object_mut() {
        map.extend(scaling.map(|s| ("rope_scaling".to_owned(), s)));
        map.extend(special(header)?);
    }
    Ok(config)
}

/// The tokens that the metadata names.
fn special(header: &Header) -> Result<Map<String, Json>, ModelError> {
    let id = |name: &str| match header.metadata.get(&format!("tokenizer.ggml.{name}_token_id")) {
        None => Ok(None),
        Some(Value::Unsigned(n)) if u32::try_from(*n).is_ok() => Ok(Some(*n)),
        Some(other) => Err(ModelError::Checkpoint(format!("tokenizer.ggml.{name}_token_id is {other:?}"))),
    };
    let mut out = Map::new();
    let mut ends = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ends.extend(id(name)?);
    }
    ends.dedup();
    out.insert("eos_token_id".into(), json!(ends));
    for (key, name) in [("bos_token_id", "bos"), ("pad_token_id", "padding")] {
        out.extend(id(name)?.map(|n| (key.to_owned(), json!(n))));
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
