//! The `config` object of an AdapterHub adapter: which options, and what they mean here.

use std::collections::BTreeMap;

use serde_json::Value;

use super::super::InteropError;
use crate::{
    delta::{Act, AdapterInput, AdapterResidual, Wiring},
    model::{Base, Placement},
};

/// Options that change the function computed and that this server does not apply: anything but off is an error.
const UNSUPPORTED: &[&str] = &[
    "inv_adapter",
    "use_gating",
    "cross_adapter",
    "shared_W_phm",
    "factorized_phm_rule",
    "use_dora",
    "vera_b",
    "vera_d",
];

/// Widest bottleneck.
pub(super) const MAX_WIDTH: usize = 65_536;
/// Largest reduction factor.
const MAX_FACTOR: f64 = 65_536.0;

/// Access to the object with errors that name the field.
struct Fields<'a> {
    file: &'a str,
    map: &'a Value,
}

impl Fields<'_> {
    fn bad(&self, key: &str, message: impl std::fmt::Display) -> InteropError {
        InteropError::invalid(self.file, format!("config.{key} {message}"))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, InteropError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => Err(self.bad(key, "is not true or false")),
        }
    }

    fn refuse_unsupported(&self) -> Result<(), InteropError> {
        for key in UNSUPPORTED {
            if self.get(key).is_some_and(|v| *v != Value::Bool(false)) {
                return Err(self.bad(key, "is set, which this server does not apply; false or null is accepted"));
            }
        }
        Ok(())
    }

    fn layers(&self, key: &str) -> Result<Vec<usize>, InteropError> {
        let Some(value) = self.get(key) else { return Ok(vec![]) };
        let list = value.as_array().ok_or_else(|| self.bad(key, "is not a list of layers"))?;
        list.iter()
            .map(|v| v.as_u64().map(|n| n as usize).ok_or_else(|| self.bad(key, "is not a list of layers")))
            .collect()
    }
}

/// How an adapter's result is scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum ScalingKind {
    /// By a number.
    Fixed(f64),
    /// By one trained number.
    Learned,
    /// By one trained number per channel.
    Channel,
}

/// A bottleneck adapter's options.
#[derive(Debug)]
pub(super) struct BottleneckConfig {
    /// The configuration's file.
    pub(super) file: String,
    /// After attention.
    pub(super) attention: bool,
    /// After the MLP.
    pub(super) output: bool,
    /// Layers without adapters.
    pub(super) leave_out: Vec<usize>,
    /// Width divided by that of the bottleneck, by layer; `None` = the default.
    reduction: BTreeMap<Option<usize>, f64>,
    /// The nonlinearity.
    pub(super) act: Act,
    /// The factor.
    pub(super) scaling: ScalingKind,
    /// A norm ahead of the down-projection.
    pub(super) ln_before: bool,
    /// A norm after the factor.
    pub(super) ln_after: bool,
    /// Compacter's parametrised hypercomplex matrices.
    pub(super) phm: bool,
    /// Where it sits.
    pub(super) wiring: Wiring,
}

impl BottleneckConfig {
    /// `old`: written before the library's configurations had a version, when `gelu` meant the approximation.
    pub(super) fn read(file: &str, map: &Value, old: bool, base: &Base) -> Result<Self, InteropError> {
        let f = Fields { file, map };
        f.refuse_unsupported()?;
        let act = f.get("non_linearity").and_then(Value::as_str).unwrap_or("relu").to_lowercase();
        let act = match (act.as_str(), old) {
            ("gelu", true) => "gelu_new",
            ("gelu_orig", true) => "gelu",
            (name, _) => name,
        };
        let phm = f.flag("phm_layer", false)?;
        if phm && !f.flag("factorized_phm_W", true)? {
            return Err(f.bad("factorized_phm_W", "is false, which this server does not apply; true is accepted"));
        }
        Ok(Self {
            attention: f.flag("mh_adapter", false)?,
            output: f.flag("output_adapter", true)?,
            leave_out: f.layers("leave_out")?,
            reduction: reduction(&f, base.arch.hidden)?,
            act: Act::from_hf(act)
                .ok_or_else(|| f.bad("non_linearity", format!("is {act:?}; accepted are {}", Act::NAMES.join(", "))))?,
            scaling: scaling(&f)?,
            ln_before: f.flag("ln_before", false)?,
            ln_after: f.flag("ln_after", false)?,
            phm,
            wiring: wiring(&f, base)?,
            file: file.to_owned(),
        })
    }

    /// Width of the bottleneck of a layer, `hidden // reduction_factor`; `None` if the configuration does not say.
    pub(super) fn width(&self, layer: usize, hidden: usize) -> Option<usize> {
        let factor = self.reduction.get(&Some(layer)).or_else(|| self.reduction.get(&None))?;
        Some(((hidden as f64 / factor).floor() as usize).max(1))
    }
}

fn reduction(f: &Fields<'_>, hidden: usize) -> Result<BTreeMap<Option<usize>, f64>, InteropError> {
    // the library takes factors below 1 (a layer wider than its input); the width is bounded instead
    let fits = |n: &f64| *n > 0.0 && *n <= MAX_FACTOR && hidden as f64 / n <= MAX_WIDTH as f64;
    let number = |v: &Value| v.as_f64().filter(fits);
    let bad = || {
        let text = format!(
            "is not a number, nor an object of them by layer, above 0 and at most {MAX_FACTOR} that gives a width of at \
             most {MAX_WIDTH}"
        );
        f.bad("reduction_factor", text)
    };
    let mut out = BTreeMap::new();
    match f.get("reduction_factor") {
        None => {}
        Some(Value::Object(map)) => {
            for (key, v) in map {
                let layer = if key == "default" { None } else { Some(key.parse().map_err(|_| bad())?) };
                out.insert(layer, number(v).ok_or_else(bad)?);
            }
        }
        Some(v) => {
            out.insert(None, number(v).ok_or_else(bad)?);
        }
    }
    Ok(out)
}

fn scaling(f: &Fields<'_>) -> Result<ScalingKind, InteropError> {
    match f.get("scaling") {
        None => Ok(ScalingKind::Fixed(1.0)),
        Some(Value::String(s)) if s == "learned" => Ok(ScalingKind::Learned),
        Some(Value::String(s)) if s == "channel" => Ok(ScalingKind::Channel),
        Some(v) => match v.as_f64().filter(|n| n.is_finite()) {
            Some(n) => Ok(ScalingKind::Fixed(n)),
            None => Err(f.bad("scaling", format!("is {v}; accepted are a number, \"learned\", \"channel\""))),
        },
    }
}

/// AdapterHub's flags as one wiring: see `Adapter.pre_forward`, `forward` and `post_forward` of the library.
fn wiring(f: &Fields<'_>, base: &Base) -> Result<Wiring, InteropError> {
    let closes = f.flag("original_ln_after", true)?;
    if f.flag("is_parallel", false)? {
        return Ok(Wiring { closes, ..Wiring::PARALLEL });
    }
    let sum = f.flag("original_ln_before", false)?;
    let input = if sum { AdapterInput::Sum } else { AdapterInput::Output };
    let residual = match f.get("residual_before_ln") {
        None | Some(Value::Bool(true)) => AdapterResidual::Output,
        Some(Value::Bool(false)) => AdapterResidual::Input,
        Some(Value::String(s)) if s == "post_add" && sum && base.arch.placement == Placement::Post => {
            AdapterResidual::Sum
        }
        Some(v) => {
            return Err(f.bad(
                "residual_before_ln",
                format!(
                    "is {v}; accepted are true, false, and \"post_add\" with original_ln_before in a post-norm base"
                ),
            ));
        }
    };
    Ok(Wiring { input, residual, residual_first: f.flag("adapter_residual_before_ln", false)?, closes })
}

/// AdapterHub's LoRA and (IA)3.
#[derive(Debug)]
pub(super) struct LoraConfig {
    /// The configuration's file.
    pub(super) file: String,
    /// Rank.
    pub(super) rank: usize,
    /// Alpha.
    pub(super) alpha: f64,
    /// Outputs are multiplied ((IA)3) instead of added to.
    pub(super) scales: bool,
    /// Which of query, key, value (in this order) of a fused projection.
    pub(super) thirds: [bool; 3],
}

impl LoraConfig {
    pub(super) fn read(file: &str, map: &Value) -> Result<Self, InteropError> {
        let f = Fields { file, map };
        f.refuse_unsupported()?;
        let rank = f.get("r").and_then(Value::as_u64).filter(|r| (1..=65_536).contains(r));
        let alpha = f.get("alpha").and_then(Value::as_f64).filter(|a| a.is_finite());
        let mode = f.get("composition_mode").and_then(Value::as_str).unwrap_or("add");
        let names: Vec<&str> = match f.get("attn_matrices") {
            None => vec!["q", "v"],
            Some(v) => v.as_array().into_iter().flatten().filter_map(Value::as_str).collect(),
        };
        if let Some(other) = names.iter().find(|n| !["q", "k", "v"].contains(n)) {
            return Err(f.bad("attn_matrices", format!("has {other:?}; accepted are q, k, v")));
        }
        Ok(Self {
            rank: rank.ok_or_else(|| f.bad("r", "is not a whole number from 1 to 65536"))? as usize,
            alpha: alpha.ok_or_else(|| f.bad("alpha", "is not a number"))?,
            scales: match mode {
                "add" => false,
                "scale" => true,
                other => return Err(f.bad("composition_mode", format!("is {other:?}; accepted are add, scale"))),
            },
            thirds: ["q", "k", "v"].map(|n| names.contains(&n)),
            file: file.to_owned(),
        })
    }
}
