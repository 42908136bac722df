//! `adapter_config.json`: what it says, and what it may not say. The schema is closed: an option that is set is known, or refused.

use std::sync::Arc;

use regex::Regex;
use serde_json::Value;

use super::InteropError;
use crate::{delta::Task, model::Base};

/// Options that change the function computed and that this server does not apply: anything but off is an error.
const UNSUPPORTED: &[&str] = &[
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];
/// Options that are read, or that matter to training only.
const KNOWN: &[&str] = &[
    "alora_invocation_tokens",
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "delta_type",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "feedforward_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "note",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "problem_type",
    "prompt_tuning_init",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_text",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "semantics",
    "target_modules",
    "task_type",
    "token_dim",
    "token_indices",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Kinds of configurations that are read; of another one the kind is what is refused.
pub(super) const KINDS: &[&str] =
    &["LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "BITFIT"];

fn off(v: &Value) -> bool {
    match v {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// `peft_type` (or our `delta_type`), after a look at all keys.
pub(super) fn kind(file: &str, config: &Value) -> Result<String, InteropError> {
    let map = config.as_object().ok_or_else(|| InteropError::invalid(file, "is not a JSON object"))?;
    for key in UNSUPPORTED {
        if map.get(*key).is_some_and(|v| !off(v)) {
            return Err(InteropError::invalid(file, format!("{key} is set, which this server does not apply")));
        }
    }
    if let Some(init) = map.get("init_lora_weights").and_then(Value::as_str)
        && ["pissa", "olora", "corda", "loftq"].iter().any(|p| init.starts_with(p))
    {
        return Err(InteropError::invalid(
            file,
            format!(
                "init_lora_weights is {init:?}: these weights belong to a changed base; convert them to plain LoRA \
                     (save_pretrained with path_initial_model_for_weight_conversion)"
            ),
        ));
    }
    let kind = map.get("peft_type").or_else(|| map.get("delta_type")).and_then(Value::as_str);
    let kind = kind.ok_or_else(|| InteropError::invalid(file, "peft_type is missing"))?;
    let known = |key: &str| KNOWN.contains(&key) || UNSUPPORTED.contains(&key);
    // a later PEFT writes all its options: those that are off change nothing, any other may change what is computed
    if KINDS.contains(&kind)
        && let Some((key, value)) = map.iter().find(|(key, value)| !known(key) && !off(value))
    {
        let (key, value) = (key.chars().take(100).collect::<String>(), value.to_string());
        let value: String = value.chars().take(100).collect();
        let message = format!(
            "{key:?} is {value}, an option that this server does not know; without it, or where it is null, false or empty, the \
             file is accepted"
        );
        return Err(InteropError::invalid(file, message));
    }
    Ok(kind.to_owned())
}

/// The task, if the config says one.
pub(super) fn task(file: &str, config: &Value, base: &Base) -> Result<Option<Task>, InteropError> {
    let task = match config.get("task_type") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(s)) => match s.as_str() {
            "CAUSAL_LM" => Task::CausalLm,
            "SEQ_2_SEQ_LM" => Task::Seq2Seq,
            "SEQ_CLS" => Task::SeqCls,
            "TOKEN_CLS" => Task::TokenCls,
            "FEATURE_EXTRACTION" => Task::Feature,
            other => {
                return Err(InteropError::invalid(
                    file,
                    format!(
                        "task_type {other:?} is not supported; supported are CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, \
                         TOKEN_CLS, FEATURE_EXTRACTION"
                    ),
                ));
            }
        },
        Some(_) => return Err(InteropError::invalid(file, "task_type is not a string")),
    };
    let (wanted, fits) = match task {
        Task::CausalLm => ("a causal language model", base.arch.is_causal() && !base.arch.is_encoder_decoder()),
        Task::Seq2Seq => ("an encoder-decoder", base.arch.is_encoder_decoder()),
        Task::SeqCls | Task::TokenCls => ("a base with classification heads", !base.arch.names.cls_head.is_empty()),
        Task::Feature => ("", true),
    };
    if !fits {
        return Err(InteropError::BaseMismatch(format!(
            "the delta is for {wanted}, this server's base is {}",
            base.arch.kind()
        )));
    }
    Ok(Some(task))
}

/// The tokens that call an activated LoRA (Greenewald et al. 2025), if it is one.
///
/// # Errors
/// Anything but 1 to [`MAX_INVOCATION`] token ids of the base.
pub(super) fn invocation(file: &str, config: &Value, base: &Base) -> Result<Option<Arc<[u32]>>, InteropError> {
    const KEY: &str = "alora_invocation_tokens";
    let Some(value) = config.get(KEY).filter(|value| !off(value)) else { return Ok(None) };
    let vocab = base.arch.vocab;
    let known = |id: &Value| id.as_u64().filter(|id| *id < vocab as u64).map(|id| id as u32);
    let ids: Option<Arc<[u32]>> = value.as_array().and_then(|ids| ids.iter().map(known).collect());
    match ids.filter(|ids| ids.len() <= MAX_INVOCATION) {
        Some(ids) => Ok(Some(ids)),
        None => Err(InteropError::invalid(
            file,
            format!("{KEY} is not a list of 1 to {MAX_INVOCATION} token ids below {vocab}, which this base has"),
        )),
    }
}

/// Most tokens that call an activated LoRA.
const MAX_INVOCATION: usize = 1024;

/// LoRA's numbers by module.
pub(super) struct LoraConfig {
    rank: Option<usize>,
    alpha: f64,
    rslora: bool,
    pub(super) dora: bool,
    ranks: Vec<(Regex, f64)>,
    alphas: Vec<(Regex, f64)>,
}

impl LoraConfig {
    pub(super) fn read(file: &str, config: &Value) -> Result<Self, InteropError> {
        let number = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_f64().filter(|n| n.is_finite()) {
                Some(n) => Ok(Some(n)),
                None => Err(InteropError::invalid(file, format!("{key} is not a number"))),
            },
        };
        let flag = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => Err(InteropError::invalid(file, format!("{key} is not true or false"))),
        };
        let rank = number("r")?;
        if rank.is_some_and(|r| r < 1.0 || r.fract() != 0.0 || r > 65_536.0) {
            return Err(InteropError::invalid(file, "r is not a whole number from 1 to 65536"));
        }
        Ok(Self {
            rank: rank.map(|r| r as usize),
            alpha: number("lora_alpha")?.unwrap_or(8.0),
            rslora: flag("use_rslora")?,
            dora: flag("use_dora")?,
            ranks: patterns(file, config, "rank_pattern")?,
            alphas: patterns(file, config, "alpha_pattern")?,
        })
    }

    /// The rank that the config gives a module.
    pub(super) fn rank(&self, module: &str) -> Option<usize> {
        find(&self.ranks, module).map(|r| r as usize).or(self.rank)
    }

    /// `alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Kalajdzievski 2023).
    pub(super) fn scale(&self, module: &str, rank: usize) -> f64 {
        let alpha = find(&self.alphas, module).unwrap_or(self.alpha);
        if self.rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 }
    }
}

/// Most patterns of a kind; each is tried on every module.
const MAX_PATTERNS: usize = 1024;
/// Longest pattern; PEFT writes module paths.
const MAX_PATTERN_BYTES: usize = 1024;
/// Most memory that a compiled pattern takes: repetitions of repetitions are short to write.
const MAX_COMPILED_BYTES: usize = 1 << 18;

fn find(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(re, _)| re.is_match(module)).map(|(_, v)| *v)
}

/// PEFT matches a pattern against the end of a module's path: `(.*\.)?(pattern)$`.
fn patterns(file: &str, config: &Value, key: &str) -> Result<Vec<(Regex, f64)>, InteropError> {
    let map = match config.get(key) {
        None | Some(Value::Null) => return Ok(vec![]),
        Some(Value::Object(map)) => map,
        Some(_) => return Err(InteropError::invalid(file, format!("{key} is not an object"))),
    };
    if map.len() > MAX_PATTERNS {
        return Err(InteropError::invalid(file, format!("{key} has {} patterns; at most {MAX_PATTERNS}", map.len())));
    }
    map.iter()
        .map(|(pattern, value)| {
            if pattern.len() > MAX_PATTERN_BYTES {
                let start: String = pattern.chars().take(40).collect();
                let message = format!("{key}[\"{start}...\"] has {} bytes; at most {MAX_PATTERN_BYTES}", pattern.len());
                return Err(InteropError::invalid(file, message));
            }
            let value = value
                .as_f64()
                .filter(|v| v.is_finite())
                .ok_or_else(|| InteropError::invalid(file, format!("{key}[{pattern:?}] is not a number")))?;
            let re = regex::RegexBuilder::new(&format!(r"^(.*\.)?({pattern})$"))
                .size_limit(MAX_COMPILED_BYTES)
                .build()
                .map_err(|e| InteropError::invalid(file, format!("{key}[{pattern:?}]: {e}")))?;
            Ok((re, value))
        })
        .collect()
}
