//! BitFit (Ben Zaken et al. 2021): biases as absolute values on disk, as differences to the base in memory, so that rows
//! of one batch can differ by an addition.

use candle_core::{DType, Device, Tensor};

use super::{
    InteropError, Parts,
    keys::{self, Owner},
    tensors::TensorFile,
};
use crate::{
    delta::{Head, Patch, SiteId},
    model::Base,
};

pub(super) fn decode(tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let mut parts = Parts::default();
    let mut head: (Option<Tensor>, Option<Tensor>) = (None, None);
    let (mut left, mut applied) = (Vec::new(), 0);
    for name in tensors.names() {
        let (module, kind) = keys::split(&name);
        match (keys::owner(module, base), kind) {
            (Some(Owner::Head), "weight") => head.0 = Some(tensors.get(&name)?),
            (Some(Owner::Head), "bias") => head.1 = Some(tensors.get(&name)?),
            (Some(Owner::Site(site, path)), "bias") => {
                parts.patches.push((site, bias_patch(site, &path, &tensors.get(&name)?, base)?));
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
    if !parts.patches.is_empty() {
        parts.methods.push("bitfit".into());
    }
    parts.head = self::head(head, base)?;
    Ok(parts)
}

/// An absolute bias as a difference to the base's (which counts as zero where it has none).
pub(super) fn bias_patch(site: SiteId, path: &str, value: &Tensor, base: &Base) -> Result<Patch, InteropError> {
    let out_dim = base.sites.get(site).map_or(0, |e| e.out_dim);
    if value.dims() != [out_dim] {
        return Err(InteropError::BaseMismatch(format!(
            "{path}.bias has shape {:?}, this server's base {} has {out_dim} outputs there",
            value.dims(),
            base.fingerprint.short()
        )));
    }
    let difference = match base.bias(site)? {
        Some(own) => (value - own.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)?,
        None => value.clone(),
    };
    Ok(Patch::Bias(difference.to_device(&base.device)?.to_dtype(base.dtype)?))
}

/// Checks a saved head against the base.
pub(super) fn head(
    (weight, bias): (Option<Tensor>, Option<Tensor>),
    base: &Base,
) -> Result<Option<Head>, InteropError> {
    let name = base.arch.names.cls_head;
    let bad = |m: String| InteropError::invalid(super::WEIGHTS[0], m);
    let weight = match (weight, &bias) {
        (Some(w), _) => w,
        (None, None) => return Ok(None),
        (None, Some(_)) => return Err(bad(format!("{name}.bias is there, {name}.weight is missing"))),
    };
    let &[labels, hidden] = weight.dims() else {
        return Err(bad(format!("{name}.weight is {:?}; [labels, hidden] is accepted", weight.dims())));
    };
    if hidden != base.arch.hidden {
        return Err(InteropError::BaseMismatch(format!(
            "{name}.weight takes hidden size {hidden}, this server's base {} has {}",
            base.fingerprint.short(),
            base.arch.hidden
        )));
    }
    if labels > super::MAX_LABELS {
        return Err(bad(format!("{name} has {labels} labels; at most {} are accepted", super::MAX_LABELS)));
    }
    if bias.as_ref().is_some_and(|b| b.dims() != [labels]) {
        return Err(bad(format!("{name}.bias does not have {labels} numbers")));
    }
    let put = |t: Tensor| t.to_device(&base.device)?.to_dtype(base.dtype);
    Ok(Some(Head::linear(put(weight)?, bias.map(put).transpose()?)))
}
