//! PEFT's LoRA: low-rank pairs (Hu et al. 2021), rsLoRA, DoRA (Liu et al. 2024), trained biases, saved heads.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::Value;

use super::{
    InteropError, Parts,
    config::LoraConfig,
    head::HeadTensors,
    keys::{self, Owner},
    tensors::TensorFile,
    tokens,
};
use crate::{
    delta::{Dora, DoraBase, Head, LowRank, Matrix, Patch, Site, SiteId},
    model::Base,
};

/// What the file has for one module.
#[derive(Default)]
struct Module {
    path: String,
    a: Option<Tensor>,
    b: Option<Tensor>,
    b_bias: Option<Tensor>,
    magnitude: Option<Tensor>,
    bias: Option<Tensor>,
    /// The module's own matrix, saved whole.
    weight: Option<Tensor>,
    /// Replaced rows, for embeddings.
    rows: Option<Tensor>,
}

const SUFFIXES: &[&str] = &[
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".base_layer.bias",
    ".base_layer.weight",
    ".token_adapter.trainable_tokens_delta",
];

pub(super) fn decode(file: &str, config: &Value, tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let indices = config.get("trainable_token_indices");
    let config = LoraConfig::read(file, config)?;
    let (modules, head) = collect(tensors, base)?;
    let mut parts = Parts { head, ..Parts::default() };
    let (mut dora, mut biased, mut low_rank, mut replaced) = (false, false, false, false);
    for (site, mut module) in modules {
        if let Some(rows) = module.rows.take() {
            let ids = tokens::indices(file, "trainable_token_indices", indices, &module.path, base)?;
            parts.patches.extend(tokens::patches(file, site, &module.path, ids, rows, base)?);
            replaced = true;
        }
        dora |= module.magnitude.is_some();
        biased |= module.bias.is_some();
        low_rank |= module.a.is_some();
        module_patches(&config, site, module, base, &mut parts.patches)?;
    }
    if dora != config.dora {
        return Err(InteropError::invalid(
            file,
            format!(
                "use_dora is {}, but magnitude vectors are {}",
                config.dora,
                if dora { "there" } else { "missing" }
            ),
        ));
    }
    if low_rank {
        parts.methods.push(if dora { "dora" } else { "lora" }.into());
    }
    if biased {
        parts.methods.push("bias".into());
    }
    if replaced {
        parts.methods.push("tokens".into());
    }
    Ok(parts)
}

fn collect(tensors: &TensorFile<'_>, base: &Base) -> Result<(BTreeMap<SiteId, Module>, Option<Head>), InteropError> {
    let mut modules: BTreeMap<SiteId, Module> = BTreeMap::new();
    let mut head = HeadTensors::default();
    let (mut left, mut applied) = (Vec::new(), 0);
    for name in tensors.names() {
        let suffix = SUFFIXES.iter().find(|s| name.ends_with(**s)).copied();
        let (path, kind) = match suffix {
            Some(s) => (&name[..name.len() - s.len()], s),
            None => keys::split(&name),
        };
        match (keys::owner(path, base), kind) {
            (Some(Owner::Head(part)), "weight" | "bias") => head.take(part, &name, tensors.get(&name)?)?,
            (Some(Owner::Site(site, path)), _)
                if suffix.is_some() || kind == "bias" || (kind == "weight" && has_matrix(site, base)) =>
            {
                let module = modules.entry(site).or_default();
                module.path = path;
                let place = match kind {
                    ".lora_A.weight" | ".lora_embedding_A" => &mut module.a,
                    ".lora_B.weight" | ".lora_embedding_B" => &mut module.b,
                    ".lora_B.bias" => &mut module.b_bias,
                    ".lora_magnitude_vector" => &mut module.magnitude,
                    ".base_layer.weight" | "weight" => &mut module.weight,
                    ".token_adapter.trainable_tokens_delta" => &mut module.rows,
                    _ => &mut module.bias,
                };
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
    Ok((modules, head.build(base)?))
}

/// Whether a module's matrix may be saved whole: a linear, or the embedding.
fn has_matrix(site: SiteId, base: &Base) -> bool {
    keys::is_linear(site, base) || base.sites.get(site).is_some_and(|e| e.site == Site::Embedding)
}

/// The patches of one module, in order of application.
fn module_patches(
    config: &LoraConfig,
    site: SiteId,
    mut module: Module,
    base: &Base,
    out: &mut Vec<(SiteId, Patch)>,
) -> Result<(), InteropError> {
    let path = module.path.clone();
    if let Some(matrix) = own_matrix(site, &mut module, base)? {
        out.push((site, Patch::Matrix(matrix)));
    }
    let bias = module.bias.take();
    if module.a.is_some() || module.b.is_some() || module.b_bias.is_some() || module.magnitude.is_some() {
        low_rank(config, site, module, base, out)?;
    }
    // after DoRA's gain, which the library puts to the frozen weight only
    if let Some(bias) = bias {
        out.push((site, super::bitfit::bias_patch(site, &path, &bias, base)?));
    }
    Ok(())
}

/// A matrix saved whole; `None` if there is none or it is the base's own. Takes the bias that was saved with it.
fn own_matrix(site: SiteId, module: &mut Module, base: &Base) -> Result<Option<Matrix>, InteropError> {
    let Some(weight) = module.weight.take() else { return Ok(None) };
    let name = format!("{}.weight", module.path);
    let &[rows, columns] = weight.dims() else {
        let message = format!("{name} is {:?}; two dimensions are accepted", weight.dims());
        return Err(InteropError::invalid(super::WEIGHTS[0], message));
    };
    let Some(entry) = base.sites.get(site).filter(|_| has_matrix(site, base)) else {
        return Err(InteropError::Unapplied(vec![name]));
    };
    let embedding = entry.site == Site::Embedding;
    let (out, input) = if embedding { (base.arch.vocab, entry.out_dim) } else { (entry.out_dim, entry.in_dim) };
    let conv1d = keys::is_conv1d(site, base);
    // a head beside Conv1Ds was once written as they are
    let once = base.arch.conv1d && !embedding && (rows, columns) == (input, out) && input != out;
    let weight = if conv1d || once { weight.t()? } else { weight }; // [out, in]
    if weight.dims() != [out, input] {
        return Err(InteropError::BaseMismatch(format!(
            "{name} holds {:?} numbers, this server's base {} has {:?} there",
            [rows, columns],
            base.fingerprint.short(),
            if conv1d { [input, out] } else { [out, input] }
        )));
    }
    if base.holds(site, &weight)? {
        return Ok(None);
    }
    // linears are applied as [in, out], tables as they are
    let weight = if embedding { weight } else { weight.t()?.contiguous()? };
    let put = |t: &Tensor| t.to_device(&base.device)?.to_dtype(base.dtype);
    let bias = match module.bias.take() {
        Some(_) if embedding => return Err(InteropError::Unapplied(vec![format!("{}.bias", module.path)])),
        Some(b) => {
            keys::vector(&format!("{}.bias", module.path), &b, out, base)?;
            Some(put(&b)?)
        }
        None => base.bias(site)?,
    };
    Ok(Some(Matrix { weight: put(&weight)?, bias }))
}

fn low_rank(
    config: &LoraConfig,
    site: SiteId,
    module: Module,
    base: &Base,
    out: &mut Vec<(SiteId, Patch)>,
) -> Result<(), InteropError> {
    let path = &module.path;
    let bad = |m: String| InteropError::invalid(super::WEIGHTS[0], m);
    let put = |t: Tensor| -> Result<Tensor, InteropError> {
        Ok(t.contiguous()?.to_device(&base.device)?.to_dtype(base.dtype)?)
    };
    let (a, b) = match (module.a, module.b) {
        (Some(a), Some(b)) => (a, b),
        (Some(_), None) => return Err(bad(format!("{path} has lora_A but no lora_B"))),
        _ => return Err(bad(format!("{path} has lora_B or its companions but no lora_A"))),
    };
    let entry = base.sites.get(site).ok_or_else(|| bad(format!("{path} has no site")))?;
    let in_dim = if entry.site == Site::Embedding { base.arch.vocab } else { entry.in_dim };
    let rank = check_factors(path, &a, &b, (in_dim, entry.out_dim), base)?;
    if let Some(want) = config.rank(path).filter(|&r| r != rank) {
        return Err(bad(format!("{path}: the config says rank {want}, the tensors have rank {rank}")));
    }
    let scale = config.scale(path, rank);
    let low = LowRank { a: put(a)?, b: put(b.t()?)?, scale }; // b: [rank, out]
    let mut b_bias = module.b_bias.map(put).transpose()?;
    if let Some(b) = b_bias.as_ref().filter(|b| b.dims() != [entry.out_dim]) {
        return Err(bad(format!("{path}: lora_B.bias is {:?}, the module has {} outputs", b.dims(), entry.out_dim)));
    }
    match module.magnitude {
        Some(magnitude) => {
            let dora = dora(site, path, low, put(magnitude)?, base)?;
            if let (Some(b), Some(folded)) = (&b_bias, dora.folded()) {
                b_bias = Some((b * &folded.gain)?);
            }
            out.push((site, Patch::Dora(Box::new(dora))));
        }
        None => out.push((site, Patch::LowRank(low))),
    }
    if let Some(b) = b_bias {
        out.push((site, Patch::Bias((b * scale)?)));
    }
    Ok(())
}

/// Ranks must agree with each other, widths with the base.
fn check_factors(
    path: &str,
    a: &Tensor,
    b: &Tensor,
    (in_dim, out_dim): (usize, usize),
    base: &Base,
) -> Result<usize, InteropError> {
    let bad = |m: String| InteropError::invalid(super::WEIGHTS[0], m);
    let (&[rank, ain], &[bout, brank]) = (a.dims(), b.dims()) else {
        return Err(bad(format!("{path}: lora_A is {:?}, lora_B is {:?}; two dimensions each", a.dims(), b.dims())));
    };
    if rank != brank {
        return Err(bad(format!("{path}: lora_A has rank {rank}, lora_B has rank {brank}")));
    }
    if in_dim == 0 {
        return Err(InteropError::Unapplied(vec![format!("{path}.lora_A.weight")]));
    }
    if (ain, bout) != (in_dim, out_dim) {
        return Err(InteropError::BaseMismatch(format!(
            "{path}: the delta maps {ain} -> {bout}, this server's base {} ({}) has {in_dim} -> {out_dim}",
            base.fingerprint.short(),
            base.arch.model_type
        )));
    }
    Ok(rank)
}

/// DoRA's update over this base's matrix.
fn dora(site: SiteId, path: &str, low: LowRank, magnitude: Tensor, base: &Base) -> Result<Dora, InteropError> {
    let bad = |m: String| InteropError::invalid(super::WEIGHTS[0], m);
    let Some((w, bias)) = base.linear(site)? else { return Err(bad(format!("{path} is not a linear"))) };
    if magnitude.dims() != [w.dim(1)?] {
        return Err(bad(format!("{path}: magnitude vector of {:?} for {} outputs", magnitude.dims(), w.dim(1)?)));
    }
    Dora::served(low, magnitude, DoraBase::new(w, bias)?).map_err(|e| bad(format!("{path}: {e}")))
}
