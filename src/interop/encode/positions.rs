//! Prompts and prefixes to the folder form of the library whose they are: PEFT's, or AdapterHub's where positions do not
//! move.

use std::collections::HashMap;

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use super::{EncodeMeta, files, plain, task_type};
use crate::{
    delta::{Delta, DeltaFiles, Patch, Prefix, PrefixForm, Prompt, PromptStage, Task},
    interop::{InteropError, keys, virtual_tokens::EMBEDDINGS},
    model::Base,
};

/// The adapter's name inside AdapterHub's keys.
const NAME: &str = "delta";

/// Whether the delta is nothing but one prompt or one prefix, with or without a head.
pub(super) fn only(delta: &Delta) -> bool {
    let prompt = |p: &Patch| matches!(p, Patch::Prompt(_));
    let prefix = |p: &Patch| matches!(p, Patch::Prefix(_));
    let patches = delta.patches();
    !patches.is_empty() && (patches.iter().all(|(_, p)| prompt(p)) || patches.iter().all(|(_, p)| prefix(p)))
}

/// Writes such a delta.
///
/// # Errors
/// A head beside a prefix or prompt of AdapterHub's form.
pub(super) fn encode(delta: &Delta, base: &Base, meta: &EncodeMeta) -> Result<DeltaFiles, InteropError> {
    let mut parts = Vec::new();
    let mut form = None;
    for (_, patch) in delta.patches() {
        match patch {
            Patch::Prompt(Prompt { rows, stage }) => {
                form = Some((false, *stage == PromptStage::Tokens));
                parts.push(plain(rows)?);
            }
            Patch::Prefix(Prefix { k, v, form: f }) => {
                form = Some((true, *f == PrefixForm::Context));
                parts.extend([plain(k)?, plain(v)?]);
            }
            other => return Err(InteropError::Tensor(format!("{other:?} adds no positions"))),
        }
    }
    let t = Tensor::cat(&parts, 1)?; // [n, hidden], or [n, layers * 2 * kv_width]
    match form {
        Some((prefix, true)) => peft(delta, base, meta, &t, prefix),
        Some((prefix, false)) => hub(delta, base, meta, &t, prefix),
        None => Err(InteropError::Tensor("no position is added".into())),
    }
}

fn peft(delta: &Delta, base: &Base, meta: &EncodeMeta, t: &Tensor, prefix: bool) -> Result<DeltaFiles, InteropError> {
    let mut tensors = HashMap::from([(EMBEDDINGS.to_owned(), t.clone())]);
    if let Some(head) = delta.head() {
        let key = keys::prompt_head_key(base.arch.names.cls_head);
        tensors.insert(format!("{key}.weight"), plain(&head.weight)?);
        if let Some(b) = &head.bias {
            tensors.insert(format!("{key}.bias"), plain(b)?);
        }
    }
    let heads = &base.arch.heads;
    let classifies = matches!(delta.spec.task, Task::SeqCls | Task::TokenCls);
    let p_tuning = delta.spec.methods.iter().any(|m| m == "p_tuning");
    let mut config: Map<String, Value> = Map::new();
    let mut put = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
    put("base_model_name_or_path", json!(meta.base_name));
    put("inference_mode", json!(true));
    put("modules_to_save", if classifies { json!(["classifier", "score"]) } else { Value::Null });
    put("num_attention_heads", json!(if prefix { heads.kv_heads } else { heads.heads }));
    put("num_layers", json!(base.arch.layers));
    put("num_transformer_submodules", json!(1));
    put("num_virtual_tokens", json!(t.dim(0)?));
    put("revision", Value::Null);
    put("task_type", json!(task_type(delta.spec.task)));
    put("token_dim", json!(if prefix { base.arch.kv_width() } else { base.arch.hidden }));
    match (prefix, p_tuning) {
        (true, _) => {
            put("peft_type", json!("PREFIX_TUNING"));
            put("encoder_hidden_size", json!(base.arch.hidden));
            // only what a network made is saved, which loads the same either way
            put("prefix_projection", json!(false));
        }
        (false, true) => {
            put("peft_type", json!("P_TUNING"));
            put("encoder_hidden_size", json!(base.arch.hidden));
            put("encoder_num_layers", json!(2));
            put("encoder_dropout", json!(0.0));
            put("encoder_reparameterization_type", json!("MLP"));
        }
        (false, false) => {
            put("peft_type", json!("PROMPT_TUNING"));
            put("prompt_tuning_init", json!("RANDOM"));
            put("prompt_tuning_init_text", Value::Null);
            put("tokenizer_name_or_path", Value::Null);
        }
    }
    config.sort_keys();
    files(delta, base, Value::Object(config), &tensors, "adapter_model.safetensors")
}

fn hub(delta: &Delta, base: &Base, meta: &EncodeMeta, t: &Tensor, prefix: bool) -> Result<DeltaFiles, InteropError> {
    if delta.head().is_some() {
        return Err(InteropError::Unapplied(vec!["the head beside positions of AdapterHub's form".into()]));
    }
    let root = base.arch.names.prefix;
    let (key, t, inner) = if prefix {
        let key = format!("{root}prefix_tuning.prefix_tunings.{NAME}.self_prefix.control_trans");
        let inner = json!({
            "architecture": "prefix_tuning", "cross_prefix": true, "dropout": 0.0, "encoder_prefix": true, "flat": true,
            "leave_out": [], "prefix_length": t.dim(0)?, "shared_gating": true, "use_gating": false,
        });
        (key, t.flatten_all()?, inner)
    } else {
        let key = format!("{root}prompt_tuning.prompt_tunings.{NAME}.prompt_embedding.weight");
        let inner = json!({ "architecture": "prompt_tuning", "combine": "prefix", "prompt_length": t.dim(0)? });
        (key, t.clone(), inner)
    };
    let config = json!({
        "config": inner, "hidden_size": base.arch.hidden, "model_name": meta.base_name,
        "model_type": base.arch.model_type, "name": NAME, "version": "adapters.1.2.0",
    });
    files(delta, base, config, &HashMap::from([(key, t)]), "adapter.safetensors")
}
