//! AdapterHub's flexible heads: `heads.<name>.<i>.{weight,bias}` of a chain of linears with an activation between.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::Value;

use super::{
    super::{InteropError, Parts, keys, tensors::TensorFile},
    HEAD_CONFIG,
};
use crate::{
    delta::{Act, Head, HeadLayer, HeadPool, Problem, Task},
    interop::MAX_LABELS,
    model::Base,
};

/// Weight and bias of one linear.
type Linear = (Option<Tensor>, Option<Tensor>);

pub(super) fn decode(
    config: &Value,
    tensors: &TensorFile<'_>,
    parts: &mut Parts,
    base: &Base,
) -> Result<Task, InteropError> {
    let bad = |m: String| InteropError::invalid(HEAD_CONFIG, m);
    if parts.head.is_some() {
        return Err(bad("brings a second head: the weights beside it have one already".into()));
    }
    let own = config.get("config").filter(|c| c.is_object()).ok_or_else(|| bad("config is not an object".into()))?;
    let text = |key: &str| own.get(key).and_then(Value::as_str);
    let task = match text("head_type") {
        Some("classification" | "multilabel_classification") => Task::SeqCls,
        Some("tagging") => Task::TokenCls,
        other => {
            return Err(bad(format!(
                "config.head_type is {}; supported are \"classification\", \"multilabel_classification\", \"tagging\"",
                other.map_or("missing".to_owned(), |o| format!("{o:?}"))
            )));
        }
    };
    let name = config.get("name").and_then(Value::as_str);
    let name = name.ok_or_else(|| bad("name is missing or not a string".into()))?;
    let act = match text("activation_function") {
        None => None,
        Some(a) => Some(
            Act::from_hf(&a.to_lowercase())
                .ok_or_else(|| bad(format!("config.activation_function {a:?} is not known")))?,
        ),
    };
    let mut linears = collect(name, tensors)?;
    let last = linears.pop().ok_or_else(|| InteropError::invalid(tensors.file(), "has no layer"))?;
    let put = |t: Tensor| t.to_device(&base.device)?.to_dtype(base.dtype);
    let (weight, bias) = checked(last, None, tensors, base)?;
    let mut layers = Vec::new();
    for linear in linears {
        let (weight, bias) = checked(linear, Some(base.arch.hidden), tensors, base)?;
        layers.push(HeadLayer { weight: put(weight)?, bias: bias.map(put).transpose()?, act });
    }
    let pooled = own.get("use_pooler").and_then(Value::as_bool).unwrap_or(false);
    let pool = if pooled || base.arch.is_causal() { HeadPool::Base } else { HeadPool::First };
    parts.problem = (text("head_type") == Some("multilabel_classification")).then_some(Problem::MultiLabel);
    parts.labels = labels(own, weight.dim(0)?)?;
    parts.head = Some(Head { weight: put(weight)?, bias: bias.map(put).transpose()?, layers, pool });
    Ok(task)
}

/// The linears in order.
fn collect(name: &str, tensors: &TensorFile<'_>) -> Result<Vec<Linear>, InteropError> {
    let prefix = format!("heads.{name}.");
    let mut linears: BTreeMap<usize, Linear> = BTreeMap::new();
    let mut left = Vec::new();
    for key in tensors.names() {
        let place = key.strip_prefix(&prefix).and_then(|r| r.split_once('.'));
        let place = place.and_then(|(i, kind)| Some((i.parse::<usize>().ok()?, kind)));
        let place = match place {
            Some((i, "weight")) => &mut linears.entry(i).or_default().0,
            Some((i, "bias")) => &mut linears.entry(i).or_default().1,
            _ => {
                left.push(key);
                continue;
            }
        };
        keys::once(place, tensors.get(&key)?, &key, tensors.file())?;
    }
    if left.is_empty() { Ok(linears.into_values().collect()) } else { Err(InteropError::Unapplied(left)) }
}

/// A linear of the right shape: `[out, hidden]`.
fn checked(
    (weight, bias): Linear,
    out: Option<usize>,
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<(Tensor, Option<Tensor>), InteropError> {
    let weight = weight.ok_or_else(|| InteropError::invalid(tensors.file(), "a layer has a bias but no weight"))?;
    let hidden = base.arch.hidden;
    let fits = weight.rank() == 2 && weight.dims()[1] == hidden && out.is_none_or(|o| weight.dims()[0] == o);
    if !fits {
        return Err(InteropError::BaseMismatch(format!(
            "{}: a layer of the head is {:?}, this server's base {} has hidden size {hidden}",
            tensors.file(),
            weight.dims(),
            base.fingerprint.short()
        )));
    }
    let n = weight.dims()[0];
    if n > MAX_LABELS.max(hidden) || bias.as_ref().is_some_and(|b| b.dims() != [n]) {
        return Err(InteropError::invalid(
            tensors.file(),
            format!("a layer of the head has {n} outputs (at most {MAX_LABELS} are accepted) or another bias"),
        ));
    }
    Ok((weight, bias))
}

/// Label names by index, where the configuration has them all.
fn labels(config: &Value, n: usize) -> Result<Option<Vec<String>>, InteropError> {
    let Some(map) = config.get("label2id").and_then(Value::as_object) else { return Ok(None) };
    let mut names: Vec<Option<String>> = vec![None; n];
    for (label, id) in map {
        let place = id.as_u64().and_then(|id| names.get_mut(id as usize));
        let place = place.ok_or_else(|| {
            InteropError::invalid(HEAD_CONFIG, format!("config.label2id: {label:?} is {id}, the head has {n} labels"))
        })?;
        *place = Some(label.clone());
    }
    Ok(names.into_iter().collect())
}
