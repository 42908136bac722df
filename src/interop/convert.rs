//! Pickled folders to safetensors, on the client's side: the reader of pickles runs nothing.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor};

use super::{
    InteropError,
    encode::serialize,
    folder,
    pickle::{self, Kind},
};
use crate::delta::DeltaFiles;

/// Pickles that libraries write, and what the same tensors are called as safetensors.
const RENAMES: &[(&str, &str)] = &[
    ("adapter_model.bin", "adapter_model.safetensors"),
    ("pytorch_adapter.bin", "adapter.safetensors"),
    ("pytorch_model_head.bin", "model_head.safetensors"),
];

/// Reads a folder of PEFT or AdapterHub, or a combination of them; tensors in pickles come out as safetensors files, under
/// the names that `decode` and the libraries know.
///
/// # Errors
/// A file that cannot be read, or whose pickle is more than a map of tensors; a folder without anything to convert.
pub fn convert(folder: &Path) -> Result<DeltaFiles, InteropError> {
    let mut out = DeltaFiles::default();
    for (name, path) in folder::files_of(folder)? {
        let data = folder::read(&path, &name)?;
        out.files.insert(name, data.into());
    }
    for place in folder::places(folder)? {
        for (from, to) in RENAMES {
            let (path, to) = (place.path(from), format!("{}{to}", place.sent));
            if path.is_file() && !out.files.contains_key(&to) {
                out.files.insert(to, tensors(from, &path)?.into());
            }
        }
    }
    if out.files.keys().any(|n| n.ends_with(".safetensors")) {
        return Ok(out);
    }
    let known: Vec<&str> = RENAMES.iter().map(|(from, _)| *from).collect();
    Err(InteropError::invalid("folder", format!("has none of {}", known.join(", "))))
}

fn tensors(name: &str, path: &Path) -> Result<Vec<u8>, InteropError> {
    let file = folder::read(path, name)?;
    let all = pickle::read(&file).map_err(|e| InteropError::invalid(name, format!("is no map of tensors: {e}")))?;
    let mut map: BTreeMap<String, Tensor> = BTreeMap::new();
    for (key, numbers) in all {
        let kind = match numbers.kind {
            Kind::F16 => DType::F16,
            Kind::Bf16 => DType::BF16,
            Kind::F32 => DType::F32,
            Kind::F64 => DType::F64,
        };
        let tensor = Tensor::from_raw_buffer(&numbers.bytes, kind, &numbers.shape, &Device::Cpu)?;
        let tensor = if kind == DType::F64 { tensor.to_dtype(DType::F32)? } else { tensor };
        if map.insert(key.clone(), tensor).is_some() {
            return Err(InteropError::invalid(name, format!("{key} is there twice")));
        }
    }
    if map.is_empty() {
        return Err(InteropError::invalid(name, "holds no tensors"));
    }
    serialize(&map, &[])
}

#[cfg(test)]
mod tests;
