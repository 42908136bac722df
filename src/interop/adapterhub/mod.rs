//! AdapterHub's folders: `adapter_config.json` with a `config` object, `adapter.safetensors`, and for encoders
//! `head_config.json` with `model_head.safetensors`. The adapter's name is part of every tensor's name.

mod bottleneck;
mod config;
mod encode;
mod head;
mod lora;
mod phm;
mod places;
#[cfg(test)]
mod tests;

pub(super) use encode::{NAME, about, encode, folder};

use serde_json::Value;

use super::{InteropError, Parts, json_file, tensors::TensorFile, virtual_tokens};
use crate::{
    delta::{DeltaFiles, Task},
    model::Base,
};

/// Name of the weights file.
pub(super) const WEIGHTS: &str = "adapter.safetensors";
/// Name of the head's configuration.
pub(super) const HEAD_CONFIG: &str = "head_config.json";
/// Name of the head's weights file.
pub(super) const HEAD_WEIGHTS: &str = "model_head.safetensors";

/// Whether a configuration is AdapterHub's.
pub(super) fn is_config(config: &Value) -> bool {
    config.get("peft_type").is_none() && config.get("delta_type").is_none() && config.get("config").is_some()
}

/// Whether these are the files of an adapter alone: they say no task.
pub(super) fn is_without_head(files: &DeltaFiles) -> bool {
    files.files.contains_key(WEIGHTS) && !files.files.contains_key(HEAD_CONFIG)
}

/// The adapter of a configuration.
///
/// # Errors
/// An architecture or option that this server does not apply; tensors that do not fit.
pub(super) fn decode(file: &str, config: &Value, tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let own = match config.get("config") {
        Some(own @ Value::Object(_)) => own,
        Some(Value::String(id)) => {
            return Err(InteropError::invalid(file, format!("config is only a name, {id:?}; an object is accepted")));
        }
        _ => return Err(InteropError::invalid(file, "config is not an object")),
    };
    let name = config.get("name").and_then(Value::as_str);
    let name = name.ok_or_else(|| InteropError::invalid(file, "name is missing or not a string"))?;
    check_base(file, config, base)?;
    match own.get("architecture").unwrap_or(&Value::Null) {
        Value::Null => {
            let old = config.get("version").is_none();
            bottleneck::decode(&config::BottleneckConfig::read(file, own, old, base)?, name, tensors, base)
        }
        Value::String(a) if a == "prefix_tuning" || a == "prompt_tuning" => {
            virtual_tokens::adapterhub(file, own, tensors, base)
        }
        Value::String(a) if a == "lora" => lora::decode(&config::LoraConfig::read(file, own)?, name, tensors, base),
        other => Err(InteropError::invalid(
            file,
            format!(
                "config.architecture {other} is not supported; supported are null (bottleneck adapters), \"lora\" (also \
                 (IA)3), \"prefix_tuning\", \"prompt_tuning\"{}",
                why(other)
            ),
        )),
    }
}

/// What a known architecture that is refused is, or what to do about it.
fn why(architecture: &Value) -> &'static str {
    match architecture.as_str() {
        Some("union") => " (upload the parts of a ConfigUnion as a combination, with a delta.json)",
        Some("reft") => " (interventions on hidden states have no place in this server's forward)",
        Some("mtl_lora") => " (MTL-LoRA's tasks share matrices; LoRA has them of its own)",
        _ => "",
    }
}

/// The head beside an adapter, and the task that it is for.
///
/// # Errors
/// A kind of head that this server does not apply; tensors that do not fit.
pub(super) fn decode_head(files: &DeltaFiles, parts: &mut Parts, base: &Base) -> Result<Option<Task>, InteropError> {
    let Some(data) = files.files.get(HEAD_WEIGHTS) else {
        return match files.files.contains_key(HEAD_CONFIG) {
            true => Err(super::missing(files, HEAD_WEIGHTS)),
            false => Ok(None),
        };
    };
    let config = files.files.get(HEAD_CONFIG).ok_or_else(|| InteropError::invalid(HEAD_CONFIG, "is missing"))?;
    let config = json_file(HEAD_CONFIG, config)?;
    let tensors = TensorFile::read(HEAD_WEIGHTS, data)?;
    let task = head::decode(&config, &tensors, parts, base)?;
    parts.more_elements += tensors.elements();
    Ok(Some(task))
}

/// The configuration names the base's type and width.
fn check_base(file: &str, config: &Value, base: &Base) -> Result<(), InteropError> {
    let kind = config.get("model_type").and_then(Value::as_str);
    let width = config.get("hidden_size").and_then(Value::as_u64);
    let other_kind = kind.is_some_and(|k| k != base.arch.model_type);
    if other_kind || width.is_some_and(|w| w != base.arch.hidden as u64) {
        return Err(InteropError::BaseMismatch(format!(
            "{file} is for a {} of hidden size {}, this server's base {} is a {} of hidden size {}",
            kind.unwrap_or("model"),
            width.map_or("unknown".into(), |w| w.to_string()),
            base.fingerprint.short(),
            base.arch.model_type,
            base.arch.hidden
        )));
    }
    Ok(())
}
