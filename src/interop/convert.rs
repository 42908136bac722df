//! Pickled folders to safetensors, on the client's side: candle's pickle reader builds tensors and runs nothing.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Tensor, pickle};

use super::{InteropError, encode::serialize, folder};
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
    let all = pickle::read_all(path).map_err(|e| InteropError::invalid(name, format!("is no map of tensors: {e}")))?;
    let mut map: BTreeMap<String, Tensor> = BTreeMap::new();
    for (key, tensor) in all {
        let tensor = match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => tensor,
            DType::F64 => tensor.to_dtype(DType::F32)?,
            other => return Err(InteropError::invalid(name, format!("{key} is {other:?}; floats are accepted"))),
        };
        map.insert(key, tensor.contiguous()?);
    }
    if map.is_empty() {
        return Err(InteropError::invalid(name, "holds no tensors"));
    }
    serialize(&map, &[])
}

#[cfg(test)]
mod tests;
