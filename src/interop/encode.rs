//! A trained delta to files that PEFT loads (BitFit alone: our own form).

mod positions;

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::{InteropError, container, keys};
use crate::{
    delta::{Delta, DeltaFiles, Patch, Site, SiteId, Task},
    model::Base,
};

/// What the tensors do not say.
#[derive(Debug, Clone, Default)]
pub struct EncodeMeta {
    /// Name of the base, for PEFT's `base_model_name_or_path`.
    pub base_name: String,
    /// Whether scales are `alpha / sqrt(r)`.
    pub rslora: bool,
    /// LoRA dropout of the training, for the record.
    pub dropout: f64,
}

/// Low-rank patches as PEFT's numbers.
struct LoraEntry {
    path: String,
    rank: usize,
    alpha: f64,
}

/// Writes a delta as `adapter_config.json`, `adapter_model.safetensors` and, with a head, `labels.json`; a combination that
/// has no folder form of its own as one folder form per part.
///
/// # Errors
/// A patch that has no place in these formats.
pub fn encode(delta: &Delta, base: &Base, meta: &EncodeMeta) -> Result<DeltaFiles, InteropError> {
    match container::split(delta).as_slice() {
        [] | [_] => single(delta, base, meta),
        parts => container::encode(parts, base, meta, single),
    }
}

/// Writes a delta that has a folder form of its own.
fn single(delta: &Delta, base: &Base, meta: &EncodeMeta) -> Result<DeltaFiles, InteropError> {
    if positions::only(delta) {
        return positions::encode(delta, base, meta);
    }
    let bare = delta.spec.task == Task::Feature;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    let mut low_rank = Vec::new();
    let patched: Vec<SiteId> =
        delta.patches().iter().filter(|(_, p)| matches!(p, Patch::LowRank(_))).map(|(s, _)| *s).collect();
    let mut biases = false;
    for (site, patch) in delta.patches() {
        let entry = base.sites.get(*site).ok_or_else(|| InteropError::Tensor(format!("no site {site}")))?;
        let path = keys::peft_path(&entry.module, base, bare);
        let key = keys::key(&path);
        match patch {
            Patch::LowRank(l) => {
                let rank = l.a.dims()[0];
                tensors.insert(format!("{key}.lora_A.weight"), plain(&l.a)?);
                tensors.insert(format!("{key}.lora_B.weight"), plain(&l.b.t()?)?);
                let alpha = l.scale * if meta.rslora { (rank as f64).sqrt() } else { rank as f64 };
                low_rank.push(LoraEntry { path, rank, alpha });
            }
            Patch::Bias(b) => {
                biases = true;
                let absolute = match base.bias(*site)? {
                    Some(own) => (plain(b)? + plain(&own)?)?,
                    None => plain(b)?,
                };
                let infix = if patched.contains(site) { ".base_layer" } else { "" };
                tensors.insert(format!("{key}{infix}.bias"), absolute);
            }
            Patch::Scale(_) => return Err(InteropError::Unapplied(vec![format!("{path} (scale)")])),
            Patch::Prompt(_) | Patch::Prefix(_) => {
                return Err(InteropError::Unapplied(vec![format!("site {site} (positions)")]));
            }
        }
    }
    if let Some(head) = delta.head() {
        let key = keys::key(base.arch.names.cls_head);
        tensors.insert(format!("{key}.weight"), plain(&head.weight)?);
        if let Some(b) = &head.bias {
            tensors.insert(format!("{key}.bias"), plain(b)?);
        }
    }
    let bitfit = low_rank.is_empty();
    let config = if bitfit { bitfit_config(delta, meta) } else { lora_config(delta, base, meta, &low_rank, biases) };
    files(delta, base, config, &tensors, "adapter_model.safetensors")
}

/// f32 on the CPU, contiguous, detached.
fn plain(t: &Tensor) -> Result<Tensor, InteropError> {
    Ok(t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?)
}

fn files(
    delta: &Delta,
    base: &Base,
    config: Value,
    tensors: &HashMap<String, Tensor>,
    weights_name: &str,
) -> Result<DeltaFiles, InteropError> {
    let mut info: HashMap<String, String> = HashMap::new();
    info.insert("format".into(), "pt".into());
    info.insert("deltaserve.base_fingerprint".into(), base.fingerprint.to_string());
    // sorted, so that the same delta always gives the same bytes
    let sorted: BTreeMap<&String, &Tensor> = tensors.iter().collect();
    let mut weights = safetensors::serialize(sorted, Some(info))
        .map_err(|e| InteropError::Tensor(format!("cannot write safetensors: {e}")))?;
    sort_metadata(&mut weights)?;
    let text = serde_json::to_vec_pretty(&config).map_err(|e| InteropError::Tensor(e.to_string()))?;
    let mut out = DeltaFiles::default();
    out.files.insert("adapter_config.json".into(), text.into());
    out.files.insert(weights_name.into(), weights.into());
    if delta.head().is_some() {
        let labels = serde_json::to_vec(&delta.spec.labels).map_err(|e| InteropError::Tensor(e.to_string()))?;
        out.files.insert("labels.json".into(), labels.into());
    }
    Ok(out)
}

/// Puts the header's metadata in order: the library writes it in a hash map's, and an id is a digest of the bytes.
fn sort_metadata(file: &mut [u8]) -> Result<(), InteropError> {
    let bad = |m: &str| InteropError::Tensor(format!("cannot write safetensors: {m}"));
    let (len, rest) = file.split_first_chunk_mut::<8>().ok_or_else(|| bad("no header"))?;
    let header = rest.get_mut(..u64::from_le_bytes(*len) as usize).ok_or_else(|| bad("short header"))?;
    let mut json: Map<String, Value> = serde_json::from_slice(header).map_err(|e| bad(&e.to_string()))?;
    if let Some(Value::Object(meta)) = json.get_mut("__metadata__") {
        meta.sort_keys();
    }
    let mut text = serde_json::to_vec(&json).map_err(|e| bad(&e.to_string()))?;
    if text.len() > header.len() {
        return Err(bad("the header grew"));
    }
    text.resize(header.len(), b' '); // safetensors pads headers with spaces
    header.copy_from_slice(&text);
    Ok(())
}

fn task_type(task: Task) -> &'static str {
    match task {
        Task::CausalLm => "CAUSAL_LM",
        Task::SeqCls => "SEQ_CLS",
        Task::TokenCls => "TOKEN_CLS",
        Task::Feature => "FEATURE_EXTRACTION",
    }
}

fn bitfit_config(delta: &Delta, meta: &EncodeMeta) -> Value {
    json!({
        "base_model_name_or_path": meta.base_name,
        "inference_mode": true,
        "peft_type": "BITFIT",
        "semantics": "replace",
        "task_type": task_type(delta.spec.task),
    })
}

fn lora_config(delta: &Delta, base: &Base, meta: &EncodeMeta, entries: &[LoraEntry], biases: bool) -> Value {
    let (rank, alpha) = most_common(entries);
    let pattern = |value: &dyn Fn(&LoraEntry) -> Option<Value>| -> Value {
        Value::Object(entries.iter().filter_map(|e| Some((e.path.clone(), value(e)?))).collect::<Map<_, _>>())
    };
    let modules_to_save = match delta.spec.task {
        Task::SeqCls | Task::TokenCls => json!(["classifier", "score"]),
        _ => Value::Null,
    };
    json!({
        "alpha_pattern": pattern(&|e| (e.alpha != alpha).then(|| number(e.alpha))),
        "base_model_name_or_path": meta.base_name,
        "bias": if biases { "all" } else { "none" },
        "fan_in_fan_out": base.arch.conv1d,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": number(alpha),
        "lora_bias": false,
        "lora_dropout": meta.dropout,
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern(&|e| (e.rank != rank).then(|| json!(e.rank))),
        "revision": null,
        "target_modules": targets(base, entries, delta.spec.task == Task::Feature),
        "task_type": task_type(delta.spec.task),
        "use_dora": false,
        "use_rslora": meta.rslora,
    })
}

/// Whole numbers without a fraction, as PEFT writes them.
fn number(v: f64) -> Value {
    // scales were divided by the rank: undo rounding below f32's precision
    let rounded = (v * 1e6).round() / 1e6;
    if rounded.fract() == 0.0 { json!(rounded as i64) } else { json!(rounded) }
}

fn most_common(entries: &[LoraEntry]) -> (usize, f64) {
    let mut counts: Vec<((usize, f64), usize)> = Vec::new();
    for e in entries {
        match counts.iter_mut().find(|(k, _)| *k == (e.rank, e.alpha)) {
            Some((_, n)) => *n += 1,
            None => counts.push(((e.rank, e.alpha), 1)),
        }
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map_or((8, 8.0), |(k, _)| k)
}

/// The shortest list of path endings that names exactly the patched modules; full paths where none does.
fn targets(base: &Base, entries: &[LoraEntry], bare: bool) -> Vec<String> {
    let all: Vec<String> = base
        .sites
        .iter()
        .filter(|(_, e)| matches!(e.site, Site::Linear { .. } | Site::LmHead | Site::Pooler))
        .map(|(_, e)| keys::peft_path(&e.module, base, bare))
        .collect();
    let wanted: Vec<&str> = entries.iter().map(|e| e.path.as_str()).collect();
    for parts in 1..=3 {
        let ending = |path: &str| -> String {
            let pieces: Vec<&str> = path.split('.').collect();
            pieces[pieces.len().saturating_sub(parts)..].join(".")
        };
        let mut endings: Vec<String> = wanted.iter().map(|p| ending(p)).collect();
        endings.sort_unstable();
        endings.dedup();
        let matches = |path: &String| endings.iter().any(|e| path == e || path.ends_with(&format!(".{e}")));
        if all.iter().filter(|p| matches(p)).count() == wanted.len() {
            return endings;
        }
    }
    wanted.into_iter().map(str::to_owned).collect()
}
