//! Parts of a training request by method, beside LoRA and BitFit. Plain data.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::train_params::Targets;

/// (IA)3: scales of activations (Liu et al. 2022).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3Part {
    /// Which linears; `None` = PEFT's for the family: keys, values, and the MLP's second matrix.
    pub targets: Option<Targets>,
    /// Which of the targets have their input scaled instead of their output; `None` = the MLP's second matrices.
    pub feedforward: Option<Vec<String>>,
}

/// LN tuning: gains and biases of norms (Zhao et al. 2023).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LnPart {
    /// Which norms, by name as for linears; empty = all.
    pub targets: Vec<String>,
}

/// Which bottleneck adapter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterVariant {
    /// After attention and MLP (Houlsby et al. 2019).
    #[default]
    Houlsby,
    /// After the MLP, reading the normalised sum (Pfeiffer et al. 2021).
    Pfeiffer,
    /// Beside the MLP (He et al. 2022).
    Parallel,
}

/// The factor of an adapter's result.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterScaling {
    /// A number.
    Fixed(f64),
    /// One trained number.
    Learned,
    /// One trained number per channel.
    Channel,
}

/// A bottleneck adapter.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterPart {
    /// Which.
    pub variant: AdapterVariant,
    /// Hidden size over the bottleneck's width; default 16, parallel 2.
    pub reduction_factor: Option<f64>,
    /// The same by layer.
    pub reduction_by_layer: BTreeMap<u32, f64>,
    /// The nonlinearity's name; default swish (Houlsby), else relu.
    pub activation: Option<String>,
    /// The factor; default 1, parallel 4.
    pub scaling: Option<AdapterScaling>,
    /// Layers without adapters.
    pub leave_out: Vec<u32>,
    /// Train all norms, too (as Houlsby et al. do).
    pub train_norms: bool,
}

/// Rows of the embedding for some tokens, and of a head that is tied to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokensPart {
    /// Token ids.
    pub ids: Vec<u32>,
}

/// Which biases LoRA trains beside its pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraBias {
    /// None.
    #[default]
    None,
    /// Those of the targets.
    LoraOnly,
    /// All that the base has.
    All,
}

/// What LoRA's pairs start from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    /// A uniform, B zero.
    #[default]
    Zero,
    /// The largest singular directions of the base's matrix (PiSSA; Meng et al. 2024). Saved as plain LoRA of twice the
    /// rank.
    Pissa,
}
