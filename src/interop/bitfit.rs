//! BitFit (Ben Zaken et al. 2021): biases as absolute values on disk, as differences to the base in memory, so that rows
//! of one batch can differ by an addition.

use candle_core::{DType, Device, Tensor};

use super::{
    InteropError, Parts,
    head::HeadTensors,
    keys::{self, Owner},
    tensors::TensorFile,
};
use crate::{
    delta::{Patch, SiteId},
    model::Base,
};

pub(super) fn decode(tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let mut parts = Parts::default();
    let mut head = HeadTensors::default();
    let (mut left, mut applied) = (Vec::new(), 0);
    for name in tensors.names() {
        let (module, kind) = keys::split(&name);
        match (keys::owner(module, base), kind) {
            (Some(Owner::Head(part)), "weight" | "bias") => head.take(part, &name, tensors.get(&name)?)?,
            (Some(Owner::Site(site, path)), "bias") => {
                let patch = bias_patch(site, &path, &tensors.get(&name)?, base)?;
                parts.add(site, patch, &name, tensors)?;
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
    parts.head = head.build(base)?;
    Ok(parts)
}

/// An absolute bias as a difference to the base's (which counts as zero where it has none).
pub(super) fn bias_patch(site: SiteId, path: &str, value: &Tensor, base: &Base) -> Result<Patch, InteropError> {
    let out_dim = base.sites.get(site).map_or(0, |e| e.out_dim);
    keys::vector(&format!("{path}.bias"), value, out_dim, base)?;
    let difference = match base.bias(site)? {
        Some(own) => (value - own.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)?,
        None => value.clone(),
    };
    Ok(Patch::Bias(difference.to_device(&base.device)?.to_dtype(base.dtype)?))
}
