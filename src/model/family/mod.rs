//! Families as declarations: each maps a Hugging Face `config.json` to an [`Architecture`].

mod bert;
mod gpt2;
mod llama;

use serde_json::Value;

use super::{
    Architecture, ModelError,
    arch::{BaseHead, Names},
};
use crate::delta::Task;

/// Supported values of `model_type`.
pub const MODEL_TYPES: &[&str] = &["llama", "mistral", "qwen2", "gpt2", "bert"];

/// Reads a config.
///
/// # Errors
/// Unknown `model_type`, missing or contradictory fields.
pub fn from_config(config: &Value) -> Result<Architecture, ModelError> {
    let c = Config(config);
    let arch = match c.str("model_type")?.as_str() {
        "llama" | "mistral" | "qwen2" => llama::architecture(&c)?,
        "gpt2" => gpt2::architecture(&c)?,
        "bert" => bert::architecture(&c)?,
        other => {
            return Err(ModelError::Unsupported(format!(
                "config.json: model_type {other:?} is not supported; supported are {}",
                MODEL_TYPES.join(", ")
            )));
        }
    };
    check(&arch)?;
    Ok(arch)
}

fn check(a: &Architecture) -> Result<(), ModelError> {
    let h = &a.heads;
    let bad = |m: String| Err(ModelError::Config(m));
    for (name, v) in [("hidden", a.hidden), ("layers", a.layers), ("heads", h.heads), ("kv heads", h.kv_heads)] {
        if v == 0 || v > 1 << 20 {
            return bad(format!("{name} is {v}"));
        }
    }
    if !h.heads.is_multiple_of(h.kv_heads) {
        return bad(format!("{} query heads cannot share {} key heads", h.heads, h.kv_heads));
    }
    if h.head_dim == 0 || (matches!(a.positions, super::Positions::Rotary { .. }) && !h.head_dim.is_multiple_of(2)) {
        return bad(format!("head_dim is {}", h.head_dim));
    }
    if a.vocab == 0 || a.ff == 0 || a.max_positions == 0 {
        return bad(format!("vocab {}, mlp width {}, positions {}", a.vocab, a.ff, a.max_positions));
    }
    Ok(())
}

/// A config with typed access; errors name the field.
pub(crate) struct Config<'a>(&'a Value);

impl Config<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn str(&self, key: &str) -> Result<String, ModelError> {
        match self.get(key).and_then(Value::as_str) {
            Some(s) => Ok(s.to_owned()),
            None => Err(ModelError::Config(format!("{key} is missing or not a string"))),
        }
    }

    fn usize(&self, key: &str) -> Result<usize, ModelError> {
        match self.get(key).and_then(Value::as_u64) {
            Some(n) => Ok(n as usize),
            None => Err(ModelError::Config(format!("{key} is missing or not a number"))),
        }
    }

    fn usize_or(&self, key: &str, default: usize) -> usize {
        self.get(key).and_then(Value::as_u64).map_or(default, |n| n as usize)
    }

    fn f64_or(&self, key: &str, default: f64) -> f64 {
        self.get(key).and_then(Value::as_f64).unwrap_or(default)
    }

    fn bool_or(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    /// A token id, or a list of them.
    fn tokens(&self, key: &str) -> Vec<u32> {
        match self.get(key) {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).map(|n| n as u32).collect(),
            Some(v) => v.as_u64().map(|n| n as u32).into_iter().collect(),
            None => vec![],
        }
    }

    /// The head that the checkpoint's class brings, by the class's name.
    fn head(&self) -> Option<BaseHead> {
        let class = self.get("architectures")?.get(0)?.as_str()?;
        let task = if class.ends_with("ForSequenceClassification") {
            Task::SeqCls
        } else if class.ends_with("ForTokenClassification") {
            Task::TokenCls
        } else {
            return None;
        };
        let mut labels: Vec<(usize, String)> = match self.get("id2label").and_then(Value::as_object) {
            Some(map) => map.iter().filter_map(|(k, v)| Some((k.parse().ok()?, v.as_str()?.to_owned()))).collect(),
            None => (0..self.usize_or("num_labels", 2)).map(|i| (i, format!("LABEL_{i}"))).collect(),
        };
        labels.sort();
        Some(BaseHead { task, labels: labels.into_iter().map(|(_, l)| l).collect() })
    }
}
