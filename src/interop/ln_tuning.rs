//! PEFT's LN tuning: full replacement copies of norms' gains and biases.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{
    InteropError, Parts,
    head::HeadTensors,
    keys::{self, Owner},
    tensors::TensorFile,
};
use crate::{
    delta::{Affine, Patch, SiteId},
    model::Base,
};

/// What the file has for one norm.
#[derive(Default)]
struct Found {
    path: String,
    gain: Option<Tensor>,
    bias: Option<Tensor>,
}

pub(super) fn decode(tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let mut parts = Parts::default();
    let mut head = HeadTensors::default();
    let mut norms: BTreeMap<SiteId, Found> = BTreeMap::new();
    let (mut left, mut applied) = (Vec::new(), 0);
    for name in tensors.names() {
        let (path, kind) = keys::split(&name);
        let (module, infix) = match path.strip_suffix(".ln_tuning_layers") {
            Some(module) => (module, true),
            None => (path, false),
        };
        match (keys::owner(module, base), kind, infix) {
            (Some(Owner::Head(part)), "weight" | "bias", false) => head.take(part, &name, tensors.get(&name)?)?,
            (Some(Owner::Site(site, path)), "weight" | "bias", true) if base.norm(site).is_some() => {
                let found = norms.entry(site).or_default();
                found.path = path;
                let place = if kind == "weight" { &mut found.gain } else { &mut found.bias };
                keys::once(place, tensors.get(&name)?, &name, tensors.file())?;
            }
            _ => {
                left.push(name);
                continue;
            }
        }
        applied += 1;
    }
    if !left.is_empty() {
        return Err(keys::unapplied(left, applied, base));
    }
    for (site, found) in norms {
        parts.patches.push((site, affine(tensors.file(), site, found, base)?));
    }
    if !parts.patches.is_empty() {
        parts.methods.push("ln".into());
    }
    parts.head = head.build(base)?;
    Ok(parts)
}

fn affine(file: &str, site: SiteId, found: Found, base: &Base) -> Result<Patch, InteropError> {
    let Found { path, gain, bias } = found;
    let own = base.norm(site).ok_or_else(|| InteropError::Unapplied(vec![path.clone()]))?;
    let gain = gain.ok_or_else(|| InteropError::invalid(file, format!("{path} has a bias but no weight")))?;
    if bias.is_some() && own.bias.is_none() {
        return Err(InteropError::Unapplied(vec![format!("{path}.ln_tuning_layers.bias")]));
    }
    for t in [Some(&gain), bias.as_ref()].into_iter().flatten() {
        if t.dims() != own.gain.dims() {
            return Err(InteropError::BaseMismatch(format!(
                "{path}: the delta's norm has {:?} numbers, this server's base {} has {:?}",
                t.dims(),
                base.fingerprint.short(),
                own.gain.dims()
            )));
        }
    }
    let put = |t: Tensor| t.to_device(&base.device)?.to_dtype(base.dtype);
    let bias = bias.map(put).transpose()?.or_else(|| own.bias.clone());
    let offset = base.arch.norm_offset;
    let gain = put(if offset == 0.0 { gain } else { (gain + offset)? })?;
    Ok(Patch::Affine(Affine { gain, bias, center: own.center, eps: own.eps }))
}
