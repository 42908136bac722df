//! PEFT's (IA)3 (Liu et al. 2022): one vector per module, on its output `[out, 1]` or its input `[1, in]`.

use candle_core::Tensor;

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
            (Some(Owner::Site(site, path)), "ia3_l") if keys::is_linear(site, base) => {
                let patch = scale(site, &path, &tensors.get(&name)?, base)?;
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
        parts.methods.push("ia3".into());
    }
    parts.head = head.build(base)?;
    Ok(parts)
}

/// The shape says whether it is the output's or the input's.
fn scale(site: SiteId, path: &str, vector: &Tensor, base: &Base) -> Result<Patch, InteropError> {
    let (in_dim, out_dim) = base.sites.get(site).map_or((0, 0), |e| (e.in_dim, e.out_dim));
    let flat =
        || -> Result<Tensor, InteropError> { Ok(vector.flatten_all()?.to_device(&base.device)?.to_dtype(base.dtype)?) };
    match *vector.dims() {
        [o, 1] if o == out_dim => Ok(Patch::Scale(flat()?)),
        [1, i] if i == in_dim => Ok(Patch::InScale(flat()?)),
        _ => Err(InteropError::BaseMismatch(format!(
            "{path}.ia3_l has shape {:?}, this server's base {} has {in_dim} -> {out_dim} there: [{out_dim}, 1] or \
             [1, {in_dim}] is accepted",
            vector.dims(),
            base.fingerprint.short()
        ))),
    }
}
