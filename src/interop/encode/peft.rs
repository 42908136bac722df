//! A delta as PEFT can hold it.

use candle_core::{DType, Tensor};

use super::{EncodeMeta, encode};
use crate::{
    delta::{Delta, DeltaFiles, LowRank, Patch, Site},
    interop::{InteropError, adapterhub, container, decode},
    model::Base,
};

/// A version's files in a form that PEFT loads: as they are where they are PEFT's already. Biases, for which PEFT has no
/// method, are written as its LORA with `bias="all"` beside a pair of rank 1 whose B is zero.
///
/// # Errors
/// Forms that PEFT has nothing for, by name; files that cannot be read.
pub fn for_peft(files: DeltaFiles, base: &Base, meta: &EncodeMeta) -> Result<DeltaFiles, InteropError> {
    let none = |what: &str| Err(InteropError::Unapplied(vec![format!("{what}, for which PEFT has no form")]));
    if files.files.contains_key(container::INDEX) {
        return none("a combination of methods");
    }
    if files.files.contains_key(adapterhub::WEIGHTS) {
        return none("an AdapterHub folder");
    }
    let delta = decode(&files, base)?;
    if delta.patches().is_empty() || !delta.patches().iter().all(|(_, p)| matches!(p, Patch::Bias(_))) {
        return Ok(files);
    }
    let mut patches = delta.patches().to_vec();
    let mut linear = None;
    for (site, _) in &patches {
        let Some(entry) = base.sites.get(*site) else { continue };
        if base.bias(*site)?.is_none() {
            return none(&format!("{}.bias, which the base lacks", entry.label()));
        }
        if matches!(entry.site, Site::Linear { .. }) && linear.is_none() {
            linear = Some((*site, entry.in_dim, entry.out_dim));
        }
    }
    let Some((site, width, out)) = linear else { return none("biases of norms alone") };
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &base.device);
    patches.push((site, Patch::LowRank(LowRank { a: zeros((1, width))?, b: zeros((1, out))?, scale: 1.0 })));
    encode(&Delta::new(delta.spec.clone(), patches, delta.head().cloned()), base, meta)
}
