//! Prompts and prefixes to the folder form of the library whose they are: PEFT's, or AdapterHub's where positions do not
//! move.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::{Value, json};

use super::{Named, Part, Writer, plain};
use crate::{
    delta::{DeltaFiles, Patch, PrefixForm, PromptStage, Stack, seq2seq_pair},
    interop::{
        InteropError,
        adapterhub::{self, NAME},
        keys,
        virtual_tokens::{EMBEDDINGS, Group},
    },
};

/// Writes a delta that is one prompt or one prefix, with or without a head.
///
/// # Errors
/// A head that has no place in the library's form.
pub(super) fn encode(w: &Writer<'_>) -> Result<DeltaFiles, InteropError> {
    // a prefix's tensors by whose keys they precede, in order of the layers: key, value, key, value, ...
    let mut parts: BTreeMap<Stack, Vec<Tensor>> = BTreeMap::new();
    let mut form = None;
    for (_, patch) in w.delta.patches() {
        let (own, stack, tensors) = match patch {
            Patch::Prompt(p) => ((false, p.stage == PromptStage::Tokens), p.stack, vec![plain(&p.rows)?]),
            Patch::Prefix(p) => ((true, p.form == PrefixForm::Context), p.stack, vec![plain(&p.k)?, plain(&p.v)?]),
            other => return Err(InteropError::Tensor(format!("{other:?} adds no positions"))),
        };
        form = Some(own);
        parts.entry(stack).or_default().extend(tensors);
    }
    let two = w.base.arch.is_encoder_decoder();
    match form {
        Some((prefix, true)) => {
            let mut parts: Vec<Tensor> = parts.into_values().flatten().collect();
            if two {
                parts = two_stacks(parts, prefix)?;
            }
            peft(w, Tensor::cat(&parts, 1)?, prefix) // [n, hidden], or [n, layers * 2 * kv_width]
        }
        Some((true, false)) => hub_prefix(w, &parts),
        Some((false, false)) => hub_prompt(w, &parts.into_values().flatten().collect::<Vec<_>>()),
        None => Err(InteropError::Tensor("no position is added".into())),
    }
}

/// The tensors side by side as PEFT has them for encoder-decoders: a prompt's rows for both stacks (the decoder's are not
/// used), a prefix's pairs where [`seq2seq_pair`] finds them.
fn two_stacks(parts: Vec<Tensor>, prefix: bool) -> Result<Vec<Tensor>, InteropError> {
    if !prefix {
        return parts.iter().map(|rows| Ok(Tensor::cat(&[rows, &rows.zeros_like()?], 0)?)).collect(); // [2 n, hidden]
    }
    let layers = parts.len() / 2;
    let mut out = parts.iter().map(Tensor::zeros_like).collect::<candle_core::Result<Vec<_>>>()?;
    let mut taken = vec![None; layers];
    for layer in 0..layers {
        let pair = seq2seq_pair(layer, layers);
        let own = [&parts[2 * layer], &parts[2 * layer + 1]];
        let earlier = taken[pair].replace(layer);
        for (i, t) in own.into_iter().enumerate() {
            let differs = |l: usize| {
                Ok::<_, candle_core::Error>((t - &parts[2 * l + i])?.abs()?.max_all()?.to_scalar::<f32>()? > 0.0)
            };
            if let Some(l) = earlier
                && differs(l)?
            {
                return Err(InteropError::Tensor(format!(
                    "decoder layers {l} and {layer} share a prefix in PEFT's form, and these differ"
                )));
            }
            out[2 * pair + i] = t.clone();
        }
    }
    Ok(out)
}

fn peft(w: &Writer<'_>, t: Tensor, prefix: bool) -> Result<DeltaFiles, InteropError> {
    let arch = &w.base.arch;
    let p_tuning = w.delta.spec.methods.iter().any(|m| m == "p_tuning");
    let kind = match (prefix, p_tuning) {
        (true, _) => "PREFIX_TUNING",
        (false, true) => "P_TUNING",
        (false, false) => "PROMPT_TUNING",
    };
    let mut config = w.config(kind);
    let mut put = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
    put("num_attention_heads", json!(if prefix { arch.heads.kv_heads } else { arch.heads.heads }));
    put("num_layers", json!(arch.layers));
    let stacks = if arch.is_encoder_decoder() { 2 } else { 1 };
    put("num_transformer_submodules", json!(stacks));
    put("num_virtual_tokens", json!(if prefix { t.dim(0)? } else { t.dim(0)? / stacks }));
    put("revision", Value::Null);
    put("token_dim", json!(if prefix { arch.kv_width() } else { arch.hidden }));
    match (prefix, p_tuning) {
        (true, _) => {
            put("encoder_hidden_size", json!(arch.hidden));
            // only what a network made is saved, which loads the same either way
            put("prefix_projection", json!(false));
        }
        (false, true) => {
            put("encoder_hidden_size", json!(arch.hidden));
            put("encoder_num_layers", json!(2));
            put("encoder_dropout", json!(0.0));
            put("encoder_reparameterization_type", json!("MLP"));
        }
        (false, false) => {
            put("prompt_tuning_init", json!("RANDOM"));
            put("prompt_tuning_init_text", Value::Null);
            put("tokenizer_name_or_path", Value::Null);
        }
    }
    let mut tensors = w.head(keys::prompt_head_key)?;
    tensors.insert(EMBEDDINGS.to_owned(), t);
    w.folder(&Part { config: Value::Object(config), tensors })
}

/// The values of each of the library's prefixes.
fn hub_prefix(w: &Writer<'_>, parts: &BTreeMap<Stack, Vec<Tensor>>) -> Result<DeltaFiles, InteropError> {
    let mut tensors = Named::new();
    let mut config = json!({
        "architecture": "prefix_tuning", "cross_prefix": true, "dropout": 0.0, "encoder_prefix": true, "flat": true,
        "leave_out": [], "shared_gating": true, "use_gating": false,
    });
    for group in &Group::ALL {
        match (parts.get(&group.stack), group.switch) {
            (Some(parts), _) => {
                let t = Tensor::cat(parts, 1)?; // [n, layers * 2 * kv_width]
                config["prefix_length"] = json!(t.dim(0)?);
                let root = w.base.arch.names.prefix;
                let key = format!("{root}prefix_tuning.prefix_tunings.{NAME}.{}.control_trans", group.name);
                tensors.insert(key, t.flatten_all()?);
            }
            (None, Some(switch)) if w.base.arch.is_encoder_decoder() => config[switch] = json!(false),
            (None, _) => {}
        }
    }
    adapterhub::folder(w, &Part { config: adapterhub::about(w.base, config), tensors })
}

fn hub_prompt(w: &Writer<'_>, parts: &[Tensor]) -> Result<DeltaFiles, InteropError> {
    let t = Tensor::cat(parts, 1)?; // [n, hidden]
    let key = format!("{}prompt_tuning.prompt_tunings.{NAME}.prompt_embedding.weight", w.base.arch.names.prefix);
    let inner = json!({ "architecture": "prompt_tuning", "combine": "prefix", "prompt_length": t.dim(0)? });
    let part = Part { config: adapterhub::about(w.base, inner), tensors: Named::from([(key, t)]) };
    adapterhub::folder(w, &part)
}
