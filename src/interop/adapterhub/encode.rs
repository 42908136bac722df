//! Bottleneck adapters to AdapterHub's folder, which the library loads.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{
    super::{
        InteropError,
        encode::{Named, Part, Patches, Writer, plain, pretty, serialize},
    },
    HEAD_CONFIG, HEAD_WEIGHTS, WEIGHTS, places,
};
use crate::{
    delta::{
        Act, AdapterInput, AdapterResidual, Bottleneck, DeltaFiles, Half, HeadPool, Patch, Problem, Scaling, Task,
    },
    model::Base,
};

/// The adapter's name in the files.
pub(in crate::interop) const NAME: &str = "delta";
/// The form of the library that is written.
const VERSION: &str = "adapters.1.3.0";

/// A whole folder: adapter, head, label names.
///
/// # Errors
/// Adapters that no single configuration describes.
pub(in crate::interop) fn encode(w: &Writer<'_>, patches: &Patches<'_>) -> Result<DeltaFiles, InteropError> {
    folder(w, &encode_part(w, patches)?)
}

/// The folder of an adapter's configuration and tensors, with the delta's head and label names.
///
/// # Errors
/// A head that no configuration describes.
pub(in crate::interop) fn folder(w: &Writer<'_>, part: &Part) -> Result<DeltaFiles, InteropError> {
    let mut out = DeltaFiles::default();
    out.files.insert("adapter_config.json".into(), pretty(&part.config)?.into());
    out.files.insert(WEIGHTS.into(), serialize(&part.tensors, &w.info())?.into());
    if w.delta.head().is_some() {
        let (config, tensors) = head(w)?;
        out.files.insert(HEAD_CONFIG.into(), pretty(&config)?.into());
        out.files.insert(HEAD_WEIGHTS.into(), serialize(&tensors, &[])?.into());
    }
    w.labels(&mut out)?;
    Ok(out)
}

/// Configuration and tensors of the adapter alone.
///
/// # Errors
/// Adapters that no single configuration describes.
fn encode_part(w: &Writer<'_>, patches: &Patches<'_>) -> Result<Part, InteropError> {
    let places: BTreeMap<_, _> = places::all(w.base).into_iter().map(|(id, l, h, path)| (id, (l, h, path))).collect();
    let mut tensors = Named::new();
    let mut found: Vec<(usize, Half, &Bottleneck)> = Vec::new();
    for (site, patch) in patches {
        let (Patch::Bottleneck(b), Some((layer, half, path))) = (patch, places.get(site)) else {
            return Err(InteropError::Unapplied(vec![format!("site {site}: no adapter")]));
        };
        write(&format!("{}{path}.{NAME}", w.base.arch.names.prefix), b, &mut tensors)?;
        found.push((*layer, *half, b));
    }
    let config = config(w.base, &found)?;
    Ok(Part { config: about(w.base, config), tensors })
}

/// What every configuration file of the library says.
pub(in crate::interop) fn about(base: &Base, config: Value) -> Value {
    json!({
        "config": config,
        "hidden_size": base.arch.hidden,
        "model_class": model_class(&base.arch.model_type),
        "model_name": Value::Null,
        "model_type": base.arch.model_type,
        "name": NAME,
        "version": VERSION,
    })
}

/// The library's class with flexible heads.
fn model_class(model_type: &str) -> String {
    let known = match model_type {
        "bert" => "Bert",
        "roberta" => "Roberta",
        "xlm-roberta" => "XLMRoberta",
        "distilbert" => "DistilBert",
        "gpt2" => "GPT2",
        "llama" => "Llama",
        "mistral" => "Mistral",
        "t5" => "T5",
        other => other,
    };
    format!("{known}AdapterModel")
}

fn write(key: &str, b: &Bottleneck, out: &mut Named) -> Result<(), InteropError> {
    let first = usize::from(b.norm_before.is_some());
    out.insert(format!("{key}.adapter_down.{first}.weight"), plain(&b.down)?);
    out.insert(format!("{key}.adapter_down.{first}.bias"), plain(&b.down_bias)?);
    out.insert(format!("{key}.adapter_up.weight"), plain(&b.up.t()?)?);
    out.insert(format!("{key}.adapter_up.bias"), plain(&b.up_bias)?);
    if let Scaling::Learned(t) = &b.scaling {
        out.insert(format!("{key}.scaling"), plain(t)?);
    }
    let before = b.norm_before.iter().flat_map(|n| [("adapter_norm_before", n), ("adapter_down.0", n)]);
    for (name, norm) in before.chain(b.norm_after.iter().map(|n| ("adapter_norm_after", n))) {
        out.insert(format!("{key}.{name}.weight"), plain(&norm.gain)?);
        if let Some(bias) = &norm.bias {
            out.insert(format!("{key}.{name}.bias"), plain(bias)?);
        }
    }
    Ok(())
}

/// The one `config` that describes all adapters of the delta.
fn config(base: &Base, found: &[(usize, Half, &Bottleneck)]) -> Result<Value, InteropError> {
    let unlike = |what: &str| InteropError::Unapplied(vec![format!("adapters that differ in {what}")]);
    let (_, _, first) = found.first().ok_or_else(|| unlike("number: there is none"))?;
    let scaling = |b: &Bottleneck| match &b.scaling {
        Scaling::Fixed(s) => json!(s),
        Scaling::Learned(t) if t.elem_count() == 1 => json!("learned"),
        Scaling::Learned(_) => json!("channel"),
    };
    for (_, _, b) in found {
        if b.wiring != first.wiring || b.act != first.act || scaling(b) != scaling(first) {
            return Err(unlike("wiring, activation or scaling"));
        }
        if (b.norm_before.is_some(), b.norm_after.is_some())
            != (first.norm_before.is_some(), first.norm_after.is_some())
        {
            return Err(unlike("their norms"));
        }
    }
    let has = |half: Half| found.iter().any(|(_, h, _)| *h == half);
    let layers = base.arch.encoder_layers + base.arch.layers;
    let left: Vec<usize> = (0..layers).filter(|l| found.iter().all(|(layer, _, _)| layer != l)).collect();
    let halves = usize::from(has(Half::Attn)) + usize::from(has(Half::Mlp));
    if found.len() != halves * (layers - left.len()) {
        return Err(unlike("the halves of their layers"));
    }
    let wiring = first.wiring;
    let residual = match (wiring.input, wiring.residual) {
        (AdapterInput::Residual, _) | (_, AdapterResidual::Output) => json!(true),
        (_, AdapterResidual::Input) => json!(false),
        (_, AdapterResidual::Sum) => json!("post_add"),
    };
    let mut config = defaults();
    let own = [
        ("adapter_residual_before_ln", json!(wiring.residual_first)),
        ("is_parallel", json!(wiring.input == AdapterInput::Residual)),
        ("leave_out", json!(left)),
        ("ln_after", json!(first.norm_after.is_some())),
        ("ln_before", json!(first.norm_before.is_some())),
        ("mh_adapter", json!(has(Half::Attn))),
        ("non_linearity", json!(first.act.hf_name())),
        ("original_ln_after", json!(wiring.closes)),
        ("original_ln_before", json!(wiring.input == AdapterInput::Sum)),
        ("output_adapter", json!(has(Half::Mlp))),
        ("reduction_factor", reduction(base.arch.hidden, found)?),
        ("residual_before_ln", residual),
        ("scaling", scaling(first)),
    ];
    config.extend(own.into_iter().map(|(k, v)| (k.to_owned(), v)));
    Ok(Value::Object(config))
}

/// Options that this server does not set, as the library writes them.
fn defaults() -> Map<String, Value> {
    let all = [
        ("cross_adapter", json!(false)),
        ("dropout", json!(0.0)),
        ("init_weights", json!("bert")),
        ("inv_adapter", Value::Null),
        ("inv_adapter_reduction_factor", Value::Null),
        ("phm_layer", json!(false)),
        ("stochastic_depth", json!(0.0)),
        ("use_gating", json!(false)),
    ];
    all.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// One factor, or one per layer, so that `hidden // factor` is each layer's width.
fn reduction(hidden: usize, found: &[(usize, Half, &Bottleneck)]) -> Result<Value, InteropError> {
    let factor = |d: usize| match hidden / d.max(1) {
        whole if hidden / whole.max(1) == d => json!(whole),
        _ => json!(hidden as f64 / (d as f64 + 0.5)), // between the factors of d and d + 1
    };
    let mut widths: BTreeMap<usize, usize> = BTreeMap::new();
    for (layer, _, b) in found {
        let d = b.down.dims()[0];
        if *widths.entry(*layer).or_insert(d) != d {
            return Err(InteropError::Unapplied(vec![format!("adapters of two widths in layer {layer}")]));
        }
    }
    let first = widths.values().next().copied().unwrap_or(1);
    if widths.values().all(|d| *d == first) {
        return Ok(factor(first));
    }
    let mut map: Map<String, Value> = widths.iter().map(|(l, d)| (l.to_string(), factor(*d))).collect();
    map.insert("default".into(), factor(first));
    Ok(Value::Object(map))
}

/// The head's configuration and tensors.
fn head(w: &Writer<'_>) -> Result<(Value, Named), InteropError> {
    let head = w.delta.head().ok_or_else(|| InteropError::Tensor("no head".into()))?;
    let act = head.layers.first().and_then(|l| l.act);
    if head.layers.iter().any(|l| l.act != act) {
        return Err(InteropError::Unapplied(vec!["a head with different activations".into()]));
    }
    // the library's chain: dropout, linear, activation for each layer, then dropout, linear
    let step = if act.is_some() { 3 } else { 2 };
    let mut tensors = Named::new();
    let linears = head.layers.iter().map(|l| (&l.weight, &l.bias)).chain([(&head.weight, &head.bias)]);
    for (i, (weight, bias)) in linears.enumerate() {
        let key = format!("heads.{NAME}.{}", i * step + 1);
        tensors.insert(format!("{key}.weight"), plain(weight)?);
        if let Some(b) = bias {
            tensors.insert(format!("{key}.bias"), plain(b)?);
        }
    }
    let labels: Map<String, Value> =
        w.delta.spec.labels.iter().enumerate().map(|(i, name)| (name.clone(), json!(i))).collect();
    let tags = w.delta.spec.task == Task::TokenCls;
    let pooled = head.pool == HeadPool::Base && !w.base.arch.names.pooler.is_empty() && !tags;
    let mut config = json!({
        "activation_function": act.map(Act::hf_name),
        "bias": head.bias.is_some(),
        "dropout_prob": Value::Null,
        "head_type": match (tags, w.delta.spec.problem) {
            (true, _) => "tagging",
            (false, Problem::MultiLabel) => "multilabel_classification",
            (false, _) => "classification", // of one output: a number
        },
        "label2id": labels,
        "layers": head.layers.len() + 1,
        "num_labels": head.weight.dims()[0],
    });
    if let (Value::Object(map), false) = (&mut config, tags) {
        map.insert("use_pooler".into(), json!(pooled));
    }
    Ok((about(w.base, config), tensors))
}
