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
};
use crate::{
    delta::{Head, LowRank, Patch, SiteId},
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
}

const SUFFIXES: &[&str] =
    &[".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector", ".base_layer.bias"];

pub(super) fn decode(file: &str, config: &Value, tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let config = LoraConfig::read(file, config)?;
    let (modules, head) = collect(tensors, base)?;
    let mut parts = Parts { head, ..Parts::default() };
    let (mut dora, mut biased, mut low_rank) = (false, false, false);
    for (site, module) in modules {
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
            (Some(Owner::Head(part)), "weight" | "bias") => head.take(part, kind, tensors.get(&name)?),
            (Some(Owner::Site(site, path)), _) if suffix.is_some() || kind == "bias" => {
                let module = modules.entry(site).or_default();
                module.path = path;
                let place = match kind {
                    ".lora_A.weight" => &mut module.a,
                    ".lora_B.weight" => &mut module.b,
                    ".lora_B.bias" => &mut module.b_bias,
                    ".lora_magnitude_vector" => &mut module.magnitude,
                    _ => &mut module.bias,
                };
                *place = Some(tensors.get(&name)?);
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

/// The patches of one module, in order of application.
fn module_patches(
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
    if let Some(bias) = &module.bias {
        out.push((site, super::bitfit::bias_patch(site, path, bias, base)?));
    }
    let (a, b) = match (module.a, module.b) {
        (Some(a), Some(b)) => (a, b),
        (None, None) if module.b_bias.is_none() && module.magnitude.is_none() => return Ok(()),
        (Some(_), None) => return Err(bad(format!("{path} has lora_A but no lora_B"))),
        _ => return Err(bad(format!("{path} has lora_B or its companions but no lora_A"))),
    };
    let entry = base.sites.get(site).ok_or_else(|| bad(format!("{path} has no site")))?;
    let rank = check_factors(path, &a, &b, (entry.in_dim, entry.out_dim), base)?;
    if let Some(want) = config.rank(path).filter(|&r| r != rank) {
        return Err(bad(format!("{path}: the config says rank {want}, the tensors have rank {rank}")));
    }
    let scale = config.scale(path, rank);
    let mut b_t = b.t()?.contiguous()?; // [rank, out]
    let mut b_bias = module.b_bias;
    if let Some(magnitude) = module.magnitude {
        let gain = dora_gain(site, path, (&a, &b_t, scale), &magnitude, base)?;
        if let Some(bias) = base.bias(site)? {
            // out = bias + g (W x + ...): the part of the bias that the scaling below takes away
            let bias = bias.to_device(&candle_core::Device::Cpu)?.to_dtype(candle_core::DType::F32)?;
            let keep = (&bias - (&bias * &gain)?)?;
            out.push((site, Patch::Scale(put(gain.clone())?)));
            out.push((site, Patch::Bias(put(keep)?)));
        } else {
            out.push((site, Patch::Scale(put(gain.clone())?)));
        }
        b_t = b_t.broadcast_mul(&gain)?;
        b_bias = b_bias.map(|b| b * &gain).transpose()?;
    }
    out.push((site, Patch::LowRank(LowRank { a: put(a)?, b: put(b_t)?, scale })));
    if let Some(b) = b_bias {
        if b.dims() != [entry.out_dim] {
            return Err(bad(format!(
                "{path}: lora_B.bias is {:?}, the module has {} outputs",
                b.dims(),
                entry.out_dim
            )));
        }
        out.push((site, Patch::Bias(put((b * scale)?)?)));
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

/// DoRA's gain per output: `m / ||W + s B A||`, the norm over each output's inputs.
fn dora_gain(
    site: SiteId,
    path: &str,
    (a, b_t, scale): (&Tensor, &Tensor, f64),
    magnitude: &Tensor,
    base: &Base,
) -> Result<Tensor, InteropError> {
    let bad = |m: String| InteropError::invalid(super::WEIGHTS[0], m);
    let Some((w, _)) = base.linear(site)? else { return Err(bad(format!("{path} is not a linear"))) };
    let w = w.to_device(&candle_core::Device::Cpu)?.to_dtype(candle_core::DType::F32)?; // [in, out]
    if magnitude.elem_count() != w.dim(1)? {
        return Err(bad(format!("{path}: magnitude vector of {} for {} outputs", magnitude.elem_count(), w.dim(1)?)));
    }
    let merged = (w + (a.t()?.contiguous()?.matmul(b_t)? * scale)?)?;
    let norm = merged.sqr()?.sum(0)?.sqrt()?; // [out]
    if norm.to_vec1::<f32>()?.contains(&0.0) {
        return Err(bad(format!("{path}: a merged weight row is zero, DoRA's direction is undefined")));
    }
    Ok((magnitude.flatten_all()? / norm)?)
}
