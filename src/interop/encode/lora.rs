//! PEFT's LORA form: LoRA and DoRA, with trained biases, token rows and whole modules beside them.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Part, Patches, Writer, is_matrix, plain};
use crate::{
    delta::{LowRank, Patch, Site, SiteId},
    interop::{InteropError, keys},
};

/// Low-rank patches as PEFT's numbers.
struct Entry {
    path: String,
    rank: usize,
    alpha: f64,
}

/// What is gathered while the patches are gone through.
#[derive(Default)]
struct Gathered {
    entries: Vec<Entry>,
    biases: bool,
    /// The bias is B's own (the base has none to train).
    b_biases: bool,
    dora: bool,
    tokens: Map<String, Value>,
    saved: Vec<String>,
}

pub(super) fn lora(w: &Writer<'_>, patches: &Patches<'_>) -> Result<Part, InteropError> {
    let low: BTreeMap<SiteId, &LowRank> = (patches.iter())
        .filter_map(|(site, p)| match p {
            Patch::LowRank(l) => Some((*site, l)),
            Patch::Dora(d) => Some((*site, &d.low)),
            _ => None,
        })
        .collect();
    let whole: Vec<SiteId> =
        patches.iter().filter(|(_, p)| matches!(p, Patch::Matrix(_))).map(|(site, _)| *site).collect();
    let mut part = Part { config: Value::Null, tensors: super::Named::new() };
    let mut g = Gathered::default();
    for (site, patch) in patches {
        let path = w.path(*site)?;
        let key = keys::key(&path);
        let embedding = w.base.sites.get(*site).is_some_and(|e| e.site == Site::Embedding);
        let tensors = &mut part.tensors;
        match patch {
            Patch::LowRank(l) => pair(&key, l, embedding, tensors)?,
            Patch::Dora(d) => {
                g.dora = true;
                pair(&key, &d.low, embedding, tensors)?;
                tensors.insert(format!("{key}.lora_magnitude_vector"), plain(&d.magnitude)?);
            }
            Patch::Bias(b) => match (w.base.bias(*site)?, low.get(site)) {
                (Some(own), patched) => {
                    g.biases = true;
                    let infix = if patched.is_some() { ".base_layer" } else { "" };
                    tensors.insert(format!("{key}{infix}.bias"), (plain(b)? + plain(&own)?)?);
                }
                (None, Some(l)) if !g.dora => {
                    g.b_biases = true;
                    tensors.insert(format!("{key}.lora_B.bias"), (plain(b)? / l.scale)?);
                }
                (None, _) => {
                    return Err(InteropError::Unapplied(vec![format!("{path}.bias, which this base does not have")]));
                }
            },
            Patch::TokenRows(t) => {
                tensors.insert(format!("{key}.token_adapter.trainable_tokens_delta"), plain(&t.rows)?);
                g.tokens.insert(last(&path), json!(t.ids));
            }
            Patch::Matrix(m) => {
                let as_it_is = embedding || keys::is_conv1d(*site, w.base);
                let weight = if as_it_is { plain(&m.weight)? } else { plain(&m.weight.t()?)? };
                tensors.insert(format!("{key}.weight"), weight);
                if let Some(b) = &m.bias {
                    tensors.insert(format!("{key}.bias"), plain(b)?);
                }
                g.saved.push(last(&path));
            }
            _ => return Err(InteropError::Unapplied(vec![path])),
        }
    }
    for (site, l) in &low {
        let (rank, path) = (l.a.dims()[0], w.path(*site)?);
        let alpha = l.scale * if w.meta.rslora { (rank as f64).sqrt() } else { rank as f64 };
        // the library gives every B a bias, or none
        if g.b_biases && !whole.contains(site) {
            let zeros = plain(&l.b)?.narrow(0, 0, 1)?.zeros_like()?.flatten_all()?;
            part.tensors.entry(format!("{}.lora_B.bias", keys::key(&path))).or_insert(zeros);
        }
        g.entries.push(Entry { path, rank, alpha });
    }
    part.config = config(w, &g)?;
    Ok(part)
}

fn pair(key: &str, l: &LowRank, embedding: bool, out: &mut super::Named) -> Result<(), InteropError> {
    let (a, b) = if embedding { ("lora_embedding_A", "lora_embedding_B") } else { ("lora_A.weight", "lora_B.weight") };
    out.insert(format!("{key}.{a}"), plain(&l.a)?);
    out.insert(format!("{key}.{b}"), plain(&l.b.t()?)?);
    Ok(())
}

fn last(path: &str) -> String {
    path.rsplit('.').next().unwrap_or(path).to_owned()
}

fn config(w: &Writer<'_>, g: &Gathered) -> Result<Value, InteropError> {
    let (rank, alpha) = most_common(&g.entries);
    let pattern = |value: &dyn Fn(&Entry) -> Option<Value>| -> Value {
        Value::Object(g.entries.iter().filter_map(|e| Some((e.path.clone(), value(e)?))).collect::<Map<_, _>>())
    };
    let wanted: Vec<String> = g.entries.iter().map(|e| e.path.clone()).collect();
    let targets = w.endings(&wanted, |s| is_matrix(s) || s == Site::Embedding)?;
    let own = [
        ("alpha_pattern", pattern(&|e| (e.alpha != alpha).then(|| number(e.alpha)))),
        ("bias", json!(if g.biases { "all" } else { "none" })),
        ("fan_in_fan_out", json!(w.base.arch.conv1d)),
        ("init_lora_weights", json!(true)),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", Value::Null),
        ("lora_alpha", number(alpha)),
        ("lora_bias", json!(g.b_biases)),
        ("lora_dropout", json!(w.meta.dropout)),
        ("r", json!(rank)),
        ("rank_pattern", pattern(&|e| (e.rank != rank).then(|| json!(e.rank)))),
        ("revision", Value::Null),
        ("target_modules", json!(targets)),
        ("use_dora", json!(g.dora)),
        ("use_rslora", json!(w.meta.rslora)),
    ];
    let mut config = w.config("LORA");
    config.extend(own.into_iter().map(|(k, v)| (k.to_owned(), v)));
    if !g.tokens.is_empty() {
        config.insert("trainable_token_indices".into(), Value::Object(g.tokens.clone()));
    }
    if !g.saved.is_empty() {
        let heads = config.get("modules_to_save").and_then(Value::as_array).cloned().unwrap_or_default();
        let all: Vec<Value> = heads.into_iter().chain(g.saved.iter().map(|s| json!(s))).collect();
        config.insert("modules_to_save".into(), Value::Array(all));
    }
    Ok(Value::Object(config))
}

/// Whole numbers without a fraction, as PEFT writes them.
fn number(v: f64) -> Value {
    // scales were divided by the rank: undo rounding below f32's precision
    let rounded = format!("{v:.8e}").parse().unwrap_or(v);
    if rounded.fract() == 0.0 { json!(rounded as i64) } else { json!(rounded) }
}

fn most_common(entries: &[Entry]) -> (usize, f64) {
    let mut counts: Vec<((usize, f64), usize)> = Vec::new();
    for e in entries {
        match counts.iter_mut().find(|(k, _)| *k == (e.rank, e.alpha)) {
            Some((_, n)) => *n += 1,
            None => counts.push(((e.rank, e.alpha), 1)),
        }
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map_or((8, 8.0), |(k, _)| k)
}
