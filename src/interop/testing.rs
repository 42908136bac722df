//! What tests of folders share: random tensors, folders of a configuration and tensors, and deltas written and read again.

use std::collections::HashMap;

use candle_core::{Device, Shape, Tensor};
use serde_json::Value;

use super::{EncodeMeta, decode, encode};
use crate::{
    delta::{Delta, DeltaFiles},
    model::Base,
};

/// Normal numbers of this spread.
pub(crate) fn random(shape: impl Into<Shape>, spread: f32) -> Tensor {
    Tensor::randn(0f32, spread, shape, &Device::Cpu).unwrap()
}

/// A folder with its tensors in the file `weights`.
pub(crate) fn folder(config: &Value, weights: &str, tensors: &HashMap<String, Tensor>) -> DeltaFiles {
    let mut files = DeltaFiles::default();
    files.files.insert("adapter_config.json".into(), config.to_string().into());
    files.files.insert(weights.into(), safetensors::serialize(tensors, None).unwrap().into());
    files
}

/// A delta as files.
#[track_caller]
pub(crate) fn written(delta: &Delta, base: &Base) -> DeltaFiles {
    encode(delta, base, &EncodeMeta::default()).unwrap()
}

/// A delta as it is read again.
#[track_caller]
pub(crate) fn reread(delta: &Delta, base: &Base) -> Delta {
    decode(&written(delta, base), base).unwrap()
}
