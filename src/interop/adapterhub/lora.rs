//! AdapterHub's LoRA and (IA)3: `<module>.loras.<name>.lora_A` and `lora_B`.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{
    super::{
        InteropError, Parts,
        keys::{self, Owner},
        tensors::TensorFile,
    },
    config::LoraConfig,
};
use crate::{
    delta::{LowRank, Patch, Proj, Site, SiteId},
    model::Base,
};

/// What the file has for one module.
#[derive(Default)]
struct Found {
    path: String,
    a: Option<Tensor>,
    b: Option<Tensor>,
}

pub(super) fn decode(
    config: &LoraConfig,
    name: &str,
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<Parts, InteropError> {
    let infix = format!(".loras.{name}.");
    let mut modules: BTreeMap<SiteId, Found> = BTreeMap::new();
    let (mut left, mut applied) = (Vec::new(), 0);
    for key in tensors.names() {
        let hit = key.split_once(&infix).and_then(|(module, kind)| match keys::owner(module, base) {
            Some(Owner::Site(site, path)) if matches!(kind, "lora_A" | "lora_B") => Some((site, path, kind)),
            _ => None,
        });
        let Some((site, path, kind)) = hit else {
            left.push(key);
            continue;
        };
        let found = modules.entry(site).or_default();
        found.path = path;
        let place = if kind == "lora_A" { &mut found.a } else { &mut found.b };
        keys::once(place, tensors.get(&key)?, &key, tensors.file())?;
        applied += 1;
    }
    if !left.is_empty() {
        return Err(keys::unapplied(left, applied, base));
    }
    let mut parts = Parts::default();
    for (site, found) in modules {
        let patch = if config.scales { scale(config, site, found, base) } else { add(config, site, found, base) }?;
        parts.patches.push((site, patch));
    }
    parts.methods.push(if config.scales { "ia3" } else { "lora" }.into());
    Ok(parts)
}

/// Where a fused projection's thirds are: (start, is changed) each, and their width; one "third" where nothing is fused.
fn thirds(config: &LoraConfig, site: SiteId, base: &Base) -> (Vec<usize>, usize) {
    let entry = base.sites.get(site);
    let out = entry.map_or(0, |e| e.out_dim);
    match entry.map(|e| e.site) {
        Some(Site::Linear { proj: Proj::Qkv, .. }) => {
            let width = out / 3;
            ((0..3).filter(|i| config.thirds[*i]).map(|i| i * width).collect(), width)
        }
        _ => (vec![0], out),
    }
}

/// `out += alpha / r * B A x`. A fused projection has a pair per changed third, stacked.
fn add(config: &LoraConfig, site: SiteId, found: Found, base: &Base) -> Result<Patch, InteropError> {
    let Found { path, a: Some(a), b: Some(b) } = found else {
        return Err(InteropError::invalid(&config.file, "lora_A or lora_B of a module is missing in the weights"));
    };
    let (starts, width) = thirds(config, site, base);
    let (in_dim, out_dim) = base.sites.get(site).map_or((0, 0), |e| (e.in_dim, e.out_dim));
    let (n, r) = (starts.len(), config.rank);
    if a.dims() != [n * r, in_dim] || b.dims() != [n * width, r] {
        return Err(InteropError::BaseMismatch(format!(
            "{path}: lora_A is {:?} and lora_B is {:?}; {:?} and {:?} are accepted",
            a.dims(),
            b.dims(),
            [n * r, in_dim],
            [n * width, r]
        )));
    }
    let b = b.t()?.contiguous()?; // [r, n * width]
    let mut rows = Vec::with_capacity(n);
    for (i, start) in starts.iter().enumerate() {
        let own = b.narrow(1, i * width, width)?.contiguous()?;
        rows.push(own.pad_with_zeros(1, *start, out_dim - start - width)?); // [r, out]
    }
    let put = |t: Tensor| t.contiguous()?.to_device(&base.device)?.to_dtype(base.dtype);
    let b = put(Tensor::cat(&rows, 0)?)?; // [n * r, out]
    Ok(Patch::LowRank(LowRank { a: put(a)?, b, scale: config.alpha / r as f64 }))
}

/// `out *= alpha * B`, ones where a fused projection is not changed.
fn scale(config: &LoraConfig, site: SiteId, found: Found, base: &Base) -> Result<Patch, InteropError> {
    let Found { path, a: None, b: Some(b) } = found else {
        return Err(InteropError::invalid(&config.file, "composition_mode is scale, which has a lora_B and no lora_A"));
    };
    let (starts, width) = thirds(config, site, base);
    let out_dim = base.sites.get(site).map_or(0, |e| e.out_dim);
    if b.dims() != [starts.len() * width, 1] {
        return Err(InteropError::BaseMismatch(format!(
            "{path}: lora_B is {:?}; [{}, 1] is accepted",
            b.dims(),
            starts.len() * width
        )));
    }
    let b = (b.flatten_all()? * config.alpha)?.to_vec1::<f32>()?;
    let mut all = vec![1f32; out_dim];
    for (own, start) in b.chunks(width.max(1)).zip(starts) {
        all[start..start + own.len()].copy_from_slice(own);
    }
    Ok(Patch::Scale(Tensor::new(all, &base.device)?.to_dtype(base.dtype)?))
}
