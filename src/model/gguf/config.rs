//! A file's metadata as the `config.json` that it was made of.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::{
    header::{Header, Value},
    names::Layout,
};
use crate::model::ModelError;

type Read<T> = Result<T, ModelError>;

/// Layers from which on a config is refused anyway, so that no list is made for them.
const MAX_LAYERS: u64 = 1 << 13;

/// The architecture of a file, and its config.
///
/// # Errors
/// An architecture that is not read; a field that is missing or has a value that is not supported.
pub(super) fn read(header: &Header) -> Read<(&'static Layout, Json)> {
    let Some(Value::Text(arch)) = header.metadata.get("general.architecture") else {
        return Err(ModelError::Checkpoint("general.architecture is missing or not a text".into()));
    };
    let layout = Layout::of(arch).ok_or_else(|| unsupported(arch))?;
    let fields = Fields { metadata: &header.metadata, arch };
    let rows = header.tensors.get("token_embd.weight").and_then(|t| t.shape.first().copied());
    let rows = rows.ok_or_else(|| ModelError::Checkpoint("no tensor token_embd.weight".into()))?;
    let mut config = match arch.as_str() {
        "gpt2" => gpt2(&fields)?,
        _ => rotary(&fields)?,
    };
    match arch.as_str() {
        "gemma2" | "gemma3" => config.extend(gemma(&fields)?),
        "phi3" => config.extend(phi3(&fields, header)?),
        _ => {}
    }
    config.insert("model_type".into(), json!(layout.model_type));
    config.insert("vocab_size".into(), json!(rows));
    config.insert("tie_word_embeddings".into(), json!(!header.tensors.contains_key("output.weight")));
    config.extend(special(header)?);
    Ok((layout, Json::Object(config)))
}

fn unsupported(arch: &str) -> ModelError {
    let why = match arch {
        "mistral3" | "mistral4" => " (Ministral 3 and later have YaRN and scaled queries, which are not)",
        "mistral" => " (files of Mistral say llama)",
        "gemma" | "gemma3n" | "gemma4" => " (of Gemma the second and third generation)",
        _ => "",
    };
    ModelError::Unsupported(format!(
        "general.architecture {arch:?} is not supported; supported are {}{why}",
        Layout::known()
    ))
}

/// The metadata, by keys that begin with the architecture; errors name them in full.
struct Fields<'a> {
    metadata: &'a BTreeMap<String, Value>,
    arch: &'a str,
}

impl Fields<'_> {
    fn own(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&self.own(key))
    }

    fn missing(&self, key: &str) -> ModelError {
        ModelError::Checkpoint(format!("{} is missing", self.own(key)))
    }

    fn maybe(&self, key: &str) -> Read<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(n.unsigned_abs())),
            Some(other) => Err(ModelError::Checkpoint(format!("{} is {other:?}; a number is accepted", self.own(key)))),
        }
    }

    fn need(&self, key: &str) -> Read<u64> {
        self.maybe(key)?.ok_or_else(|| self.missing(key))
    }

    fn real(&self, key: &str) -> Read<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(n)) if n.is_finite() => Ok(Some(*n)),
            Some(other) => {
                Err(ModelError::Checkpoint(format!("{} is {other:?}; a finite float is accepted", self.own(key))))
            }
        }
    }

    fn need_real(&self, key: &str) -> Read<f64> {
        self.real(key)?.ok_or_else(|| self.missing(key))
    }

    /// Refuses a number that is there and another one.
    fn only(&self, key: &str, want: u64) -> Read<()> {
        match self.maybe(key)?.filter(|found| *found != want) {
            Some(found) => Err(ModelError::Unsupported(format!("{} is {found}; {want} is supported", self.own(key)))),
            None => Ok(()),
        }
    }

    fn head_dim(&self) -> Read<u64> {
        let usual = self.need("embedding_length")? / self.need("attention.head_count")?.max(1);
        Ok(self.maybe("attention.key_length")?.unwrap_or(usual))
    }
}

/// An object's entries.
fn object(value: Json) -> Map<String, Json> {
    match value {
        Json::Object(map) => map,
        _ => Map::new(),
    }
}

/// What decoders with rotary positions have in common.
fn rotary(f: &Fields<'_>) -> Read<Map<String, Json>> {
    let heads = f.need("attention.head_count")?;
    let head_dim = f.head_dim()?;
    f.only("attention.value_length", head_dim)?;
    if f.arch != "phi3" {
        f.only("rope.dimension_count", head_dim)?;
    }
    f.only("expert_count", 0)?;
    let usual_theta = if f.arch == "gemma3" { 1e6 } else { 10_000.0 };
    let mut config = object(json!({
        "hidden_size": f.need("embedding_length")?,
        "num_hidden_layers": f.need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": f.maybe("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "intermediate_size": f.need("feed_forward_length")?,
        "max_position_embeddings": f.need("context_length")?,
        "rms_norm_eps": f.need_real("attention.layer_norm_rms_epsilon")?,
        "rope_theta": f.real("rope.freq_base")?.unwrap_or(usual_theta),
    }));
    match f.get("rope.scaling.type") {
        None => {}
        Some(Value::Text(kind)) if kind == "none" => {}
        Some(Value::Text(kind)) => {
            let scaling = json!({"rope_type": kind, "factor": f.real("rope.scaling.factor")?});
            config.insert("rope_scaling".into(), scaling);
        }
        Some(other) => {
            return Err(ModelError::Checkpoint(format!("{} is {other:?}", f.own("rope.scaling.type"))));
        }
    }
    Ok(config)
}

/// Gemma 2 and 3. A file does not say `query_pre_attn_scalar`: it is the width of a head, but for the largest model of each
/// generation, where it is the model's width by heads (llama.cpp tells them by their layers, too).
fn gemma(f: &Fields<'_>) -> Read<Map<String, Json>> {
    let three = f.arch == "gemma3";
    let layers = f.need("block_count")?;
    let largest = layers == if three { 62 } else { 46 };
    let scalar = if largest {
        f.need("embedding_length")? as f64 / f.need("attention.head_count")?.max(1) as f64
    } else {
        f.head_dim()? as f64
    };
    let mut config = object(json!({ "query_pre_attn_scalar": scalar }));
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        config.extend(f.real(key)?.map(|cap| (key.to_owned(), json!(cap))));
    }
    match f.maybe("attention.sliding_window")? {
        Some(window) => drop(config.insert("sliding_window".into(), json!(window))),
        // without one, no layer of Gemma 3 slides; Gemma 2 has its usual one then
        None if three => {
            let full = vec!["full_attention"; layers.min(MAX_LAYERS) as usize];
            config.insert("layer_types".into(), json!(full));
        }
        None => {}
    }
    if three {
        let pattern = f.maybe("attention.sliding_window_pattern")?;
        config.extend(pattern.map(|n| ("sliding_window_pattern".to_owned(), json!(n))));
        let local = f.real("rope.freq_base_swa")?;
        config.extend(local.map(|theta| ("rope_local_base_freq".to_owned(), json!(theta))));
    }
    Ok(config)
}

/// Phi-3: part of a head may turn, and a window of 0 is none. The frequencies of its long contexts come as two tensors of
/// factors.
fn phi3(f: &Fields<'_>, header: &Header) -> Read<Map<String, Json>> {
    for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        if header.tensors.contains_key(name) {
            return Err(ModelError::Unsupported(format!(
                "the file has {name}: rope type \"longrope\" is not supported; supported are default, linear"
            )));
        }
    }
    let head_dim = f.head_dim()?;
    let turns = f.maybe("rope.dimension_count")?.unwrap_or(head_dim);
    let mut config = Map::new();
    if turns != head_dim {
        // rounded up, so that the product with the width is not less than the number it was made of
        let part = (turns as f64 / head_dim.max(1) as f64).next_up();
        config.insert("partial_rotary_factor".into(), json!(part));
    }
    let window = f.need("attention.sliding_window")?;
    if window > 0 {
        config.insert("sliding_window".into(), json!(window));
    }
    Ok(config)
}

fn gpt2(f: &Fields<'_>) -> Read<Map<String, Json>> {
    let heads = f.need("attention.head_count")?;
    f.only("attention.head_count_kv", heads)?;
    Ok(object(json!({
        "n_embd": f.need("embedding_length")?,
        "n_layer": f.need("block_count")?,
        "n_head": heads,
        "n_inner": f.need("feed_forward_length")?,
        "n_positions": f.need("context_length")?,
        "layer_norm_epsilon": f.need_real("attention.layer_norm_epsilon")?,
    })))
}

/// The tokens that the metadata names.
fn special(header: &Header) -> Read<Map<String, Json>> {
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
