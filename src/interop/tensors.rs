//! A safetensors file of a stranger: its header is checked before any tensor is made.

use std::collections::HashMap;

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use super::InteropError;

/// Largest accepted header; a delta of 100 layers has some hundred kilobytes.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Most tensors in one file.
const MAX_TENSORS: usize = 50_000;

/// A checked file.
pub(super) struct TensorFile<'a> {
    name: &'a str,
    inner: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> TensorFile<'a> {
    pub(super) fn read(name: &'a str, data: &'a Bytes) -> Result<Self, InteropError> {
        let bad = |m: String| InteropError::invalid(name, m);
        let header = match data.first_chunk::<8>() {
            Some(n) => u64::from_le_bytes(*n),
            None => return Err(bad(format!("is {} bytes long, too short for a safetensors header", data.len()))),
        };
        if header > MAX_HEADER_BYTES || header > data.len() as u64 - 8 {
            return Err(bad(format!(
                "says its header is {header} bytes long; the file has {} and at most {MAX_HEADER_BYTES} are accepted",
                data.len()
            )));
        }
        let (_, meta) = SafeTensors::read_metadata(data).map_err(|e| bad(format!("is not valid safetensors: {e}")))?;
        let metadata = meta.metadata().clone().unwrap_or_default();
        let inner = SafeTensors::deserialize(data).map_err(|e| bad(format!("is not valid safetensors: {e}")))?;
        if inner.len() > MAX_TENSORS {
            return Err(bad(format!("has {} tensors; at most {MAX_TENSORS} are accepted", inner.len())));
        }
        if inner.is_empty() {
            return Err(bad("has no tensors".into()));
        }
        Ok(Self { name, inner, metadata })
    }

    /// The file's name.
    pub(super) fn file(&self) -> &'a str {
        self.name
    }

    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Names, sorted.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.inner.names().into_iter().map(str::to_owned).collect();
        names.sort_unstable();
        names
    }

    /// Numbers in all tensors.
    pub(super) fn elements(&self) -> u64 {
        self.inner.iter().map(|(_, v)| v.shape().iter().product::<usize>() as u64).sum()
    }

    /// One tensor as f32 on the CPU; every number must be finite.
    pub(super) fn get(&self, key: &str) -> Result<Tensor, InteropError> {
        let bad = |m: String| InteropError::invalid(self.name, m);
        let view = self.inner.tensor(key).map_err(|e| bad(format!("{key}: {e}")))?;
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(bad(format!("{key} is {other:?}; F32, F16 and BF16 are accepted"))),
        };
        if view.shape().contains(&0) || view.shape().is_empty() {
            return Err(bad(format!("{key} has the shape {:?}", view.shape())));
        }
        let t = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?.to_dtype(DType::F32)?;
        let finite = t.flatten_all()?.to_vec1::<f32>()?.iter().all(|v| v.is_finite());
        if finite { Ok(t) } else { Err(bad(format!("{key} has numbers that are not finite"))) }
    }
}
