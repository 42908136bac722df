//! Bottleneck adapters: AdapterHub's tensors to patches of sublayers.

use std::{cell::Cell, collections::BTreeMap};

use candle_core::Tensor;

use super::{
    super::{InteropError, Parts, keys, tensors::TensorFile},
    config::{BottleneckConfig, ScalingKind},
    phm::PhmRule,
    places,
};
use crate::{
    delta::{Affine, Bottleneck, Half, Patch, Scaling, SiteId},
    model::Base,
};

/// Epsilon of the library's own norms (torch's default).
const NORM_EPS: f64 = 1e-5;

/// Most numbers that the factors of a file may be multiplied out to: 1 GiB.
const MAX_MADE: usize = 1 << 28;

/// Tensors of one adapter by what follows the adapter's name.
type Found = BTreeMap<String, Tensor>;

pub(super) fn decode(
    config: &BottleneckConfig,
    name: &str,
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<Parts, InteropError> {
    let (mut sites, rule) = collect(config, name, tensors, base)?;
    let made = Cell::new(0);
    let mut parts = Parts::default();
    for (site, layer, half, path) in places::all(base) {
        let wanted = if half == Half::Attn { config.attention } else { config.output };
        let wanted = wanted && !config.leave_out.contains(&layer);
        match (sites.remove(&site), wanted) {
            (Some(found), true) => {
                let one = One { config, path: &path, layer, tensors, base, rule: rule.as_ref(), made: &made };
                parts.patches.push((site, Patch::Bottleneck(Box::new(one.build(found)?))));
            }
            (None, true) => {
                return Err(InteropError::invalid(
                    tensors.file(),
                    format!("has no tensors of {path}.{name}, which the configuration names"),
                ));
            }
            (Some(_), false) => {
                return Err(InteropError::invalid(
                    &config.file,
                    format!("puts no adapter at {path}, but the weights have one"),
                ));
            }
            (None, false) => {}
        }
    }
    parts.methods.push(if config.phm { "compacter" } else { "adapter" }.into());
    Ok(parts)
}

fn collect(
    config: &BottleneckConfig,
    name: &str,
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<(BTreeMap<SiteId, Found>, Option<PhmRule>), InteropError> {
    let places = places::all(base);
    let prefix = base.arch.names.prefix;
    let mut sites: BTreeMap<SiteId, Found> = BTreeMap::new();
    let (mut left, mut applied, mut rule) = (Vec::new(), 0, None);
    for key in tensors.names() {
        let bare = key.strip_prefix(prefix).unwrap_or(&key);
        let place = places.iter().find_map(|(site, _, _, path)| {
            let rest = bare.strip_prefix(path.as_str())?.strip_prefix('.')?;
            Some((*site, rest.strip_prefix(name)?.strip_prefix('.')?))
        });
        let shared = bare.strip_prefix("shared_parameters.").and_then(|r| r.strip_prefix(name));
        match (place, shared) {
            (Some((site, suffix)), _) => {
                if sites.entry(site).or_default().insert(suffix.to_owned(), tensors.get(&key)?).is_some() {
                    return Err(InteropError::invalid(
                        tensors.file(),
                        format!("{key} is there under another name, too"),
                    ));
                }
            }
            (None, Some(".phm_rule")) if config.phm => rule = Some(phm_rule(tensors.get(&key)?, tensors.file())?),
            _ => {
                left.push(key);
                continue;
            }
        }
        applied += 1;
    }
    if !left.is_empty() {
        return Err(keys::unapplied(left, applied, base));
    }
    Ok((sites, rule))
}

fn phm_rule(rule: Tensor, file: &str) -> Result<PhmRule, InteropError> {
    PhmRule::new(rule).map_err(|m| InteropError::invalid(file, m))
}

/// One adapter under construction.
struct One<'a> {
    config: &'a BottleneckConfig,
    path: &'a str,
    layer: usize,
    tensors: &'a TensorFile<'a>,
    base: &'a Base,
    rule: Option<&'a PhmRule>,
    /// Numbers that factors of this file were multiplied out to so far.
    made: &'a Cell<usize>,
}

impl One<'_> {
    fn build(&self, mut found: Found) -> Result<Bottleneck, InteropError> {
        let (hidden, c) = (self.base.arch.hidden, self.config);
        let norm_before = if c.ln_before { Some(self.norm(&mut found, "adapter_norm_before")?) } else { None };
        if c.ln_before {
            // the same module under its second name
            found.remove("adapter_down.0.weight");
            found.remove("adapter_down.0.bias");
        }
        let down = format!("adapter_down.{}", usize::from(c.ln_before));
        let (down_weight, down_bias) = self.linear(&mut found, &down)?;
        let (up_weight, up_bias) = self.linear(&mut found, "adapter_up")?;
        let norm_after = if c.ln_after { Some(self.norm(&mut found, "adapter_norm_after")?) } else { None };
        let scaling = match c.scaling {
            ScalingKind::Fixed(s) => Scaling::Fixed(s),
            kind => {
                let n = if kind == ScalingKind::Learned { 1 } else { hidden };
                Scaling::Learned(self.put(self.take(&mut found, "scaling", &[n])?)?)
            }
        };
        if let Some(extra) = found.keys().next() {
            return Err(InteropError::Unapplied(vec![format!("{}: {extra}", self.path)]));
        }
        let width = down_weight.dims().first().copied().unwrap_or(0);
        if let Some(want) = c.width(self.layer, hidden).filter(|w| *w != width) {
            return Err(InteropError::invalid(
                &c.file,
                format!("reduction_factor asks for a bottleneck of {want} at {}, the tensors have {width}", self.path),
            ));
        }
        let fits = |t: &Tensor, dims: [usize; 2]| t.dims() == dims;
        for (key, bias, n) in [(down.as_str(), &down_bias, width), ("adapter_up", &up_bias, hidden)] {
            if bias.dims() != [n] {
                let message = format!("{}: the bias of {key} is {:?}; [{n}] is accepted", self.path, bias.dims());
                return Err(InteropError::invalid(self.tensors.file(), message));
            }
        }
        if !fits(&down_weight, [width, hidden]) || !fits(&up_weight, [hidden, width]) {
            return Err(InteropError::BaseMismatch(format!(
                "{}: the adapter maps {:?} and {:?}, this server's base {} has hidden size {hidden}",
                self.path,
                down_weight.dims(),
                up_weight.dims(),
                self.base.fingerprint.short()
            )));
        }
        Ok(Bottleneck {
            down: self.put(down_weight)?,
            down_bias: self.put(down_bias)?,
            up: self.put(up_weight.t()?.contiguous()?)?,
            up_bias: self.put(up_bias)?,
            act: c.act,
            scaling,
            norm_before,
            norm_after,
            wiring: c.wiring,
        })
    }

    fn put(&self, t: Tensor) -> Result<Tensor, InteropError> {
        Ok(t.to_device(&self.base.device)?.to_dtype(self.base.dtype)?)
    }

    fn take(&self, found: &mut Found, key: &str, dims: &[usize]) -> Result<Tensor, InteropError> {
        let t = self.any(found, key)?;
        if t.dims() == dims {
            return Ok(t);
        }
        Err(InteropError::invalid(
            self.tensors.file(),
            format!("{}: {key} is {:?}; {dims:?} is accepted", self.path, t.dims()),
        ))
    }

    fn any(&self, found: &mut Found, key: &str) -> Result<Tensor, InteropError> {
        let missing = || InteropError::invalid(self.tensors.file(), format!("{}: {key} is missing", self.path));
        found.remove(key).ok_or_else(missing)
    }

    /// `[out, in]` and `[out]`; of a compacter, made from its factors.
    fn linear(&self, found: &mut Found, key: &str) -> Result<(Tensor, Tensor), InteropError> {
        if !self.config.phm {
            return Ok((self.any(found, &format!("{key}.weight"))?, self.any(found, &format!("{key}.bias"))?));
        }
        let own = found.remove(&format!("{key}.phm_rule")).map(|t| phm_rule(t, self.tensors.file())).transpose()?;
        let rule = own.as_ref().or(self.rule);
        let rule = rule.ok_or_else(|| InteropError::invalid(self.tensors.file(), "phm_rule is missing"))?;
        let left = self.any(found, &format!("{key}.W_left"))?;
        let right = self.any(found, &format!("{key}.W_right"))?;
        let bad = |m: String| InteropError::invalid(self.tensors.file(), format!("{}: {key} {m}", self.path));
        let (input, out) = rule.shape(&left, &right).map_err(bad)?;
        let hidden = self.base.arch.hidden;
        let (own, width) = if key == "adapter_up" { (out, input) } else { (input, out) };
        let made = self.made.get().saturating_add(input.saturating_mul(out));
        if own != hidden || width > super::config::MAX_WIDTH || made > MAX_MADE {
            return Err(bad(format!(
                "makes a matrix of {input} x {out} and {made} numbers in all; hidden size {hidden}, widths to {} and \
                 {MAX_MADE} numbers are accepted",
                super::config::MAX_WIDTH
            )));
        }
        self.made.set(made);
        let weight = rule.matrix(&left, &right)?; // [in, out]
        let bias = match found.remove(&format!("{key}.b")) {
            Some(b) => b,
            None => Tensor::zeros(weight.dim(1)?, weight.dtype(), weight.device())?,
        };
        Ok((weight.t()?.contiguous()?, bias))
    }

    fn norm(&self, found: &mut Found, key: &str) -> Result<Affine, InteropError> {
        let hidden = self.base.arch.hidden;
        let gain = self.put(self.take(found, &format!("{key}.weight"), &[hidden])?)?;
        let bias = Some(self.put(self.take(found, &format!("{key}.bias"), &[hidden])?)?);
        Ok(Affine { gain, bias, center: true, eps: NORM_EPS })
    }
}
