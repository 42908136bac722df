//! A checkpoint: a Hugging Face folder's safetensors, single or sharded, read through a memory map, a GGUF file, or tensors
//! in memory.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, safetensors::MmapedSafetensors};
use safetensors::View;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{ModelError, gguf::GgufFile};
use crate::{ids::BaseFingerprint, ops::QuantKind};

/// Config keys that say nothing about the function computed.
const VOLATILE: &[&str] = &["transformers_version", "_name_or_path", "torch_dtype", "dtype"];

/// Where tensors are.
enum Tensors {
    /// On disk.
    Files(MmapedSafetensors),
    /// In one file, possibly quantised.
    Gguf(GgufFile),
    /// In memory, by stored name.
    Given(HashMap<String, Tensor>),
}

impl Tensors {
    fn load(&self, name: &str) -> Result<Tensor, ModelError> {
        match self {
            Self::Files(files) => Ok(files.load(name, &Device::Cpu)?),
            Self::Gguf(file) => file.load(name),
            Self::Given(map) => {
                map.get(name).cloned().ok_or_else(|| ModelError::Checkpoint(format!("no tensor {name}")))
            }
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Self::Files(files) => files.get(name).ok().map(|v| v.shape().to_vec()),
            Self::Gguf(file) => file.shape(name).map(<[usize]>::to_vec),
            Self::Given(map) => map.get(name).map(|t| t.dims().to_vec()),
        }
    }
}

/// An open checkpoint.
pub(super) struct Checkpoint {
    tensors: Tensors,
    names: HashSet<String>,
    prefix: &'static str,
    dtype: DType,
    device: Device,
}

/// SHA-256 over the config's lasting fields and all tensors (name, type, shape, bytes) in order of name, independent of
/// sharding.
pub(super) fn fingerprint<'t, V: View + 't>(
    config: &Value,
    tensors: impl Iterator<Item = (&'t str, &'t V)>,
) -> BaseFingerprint {
    digest(config, tensors.map(|(name, view)| (name, format!("{:?}{:?}", view.dtype(), view.shape()), view.data())))
}

/// The same of tensors' names, types with shapes, and bytes.
fn digest<'t>(config: &Value, tensors: impl Iterator<Item = (&'t str, String, Cow<'t, [u8]>)>) -> BaseFingerprint {
    let mut h = Sha256::new();
    h.update(b"deltaserve/base/v1\0");
    let mut lasting = config.clone();
    if let Some(map) = lasting.as_object_mut() {
        VOLATILE.iter().for_each(|key| {
            map.remove(*key);
        });
    }
    h.update(canonical(&lasting));
    for (name, form, bytes) in tensors {
        h.update((name.len() as u64).to_le_bytes());
        h.update(name.as_bytes());
        h.update(form);
        h.update(bytes);
    }
    BaseFingerprint::from_bytes(h.finalize().into())
}

/// Reads a file of the folder.
pub(super) fn read(dir: &Path, name: &str) -> Result<Vec<u8>, ModelError> {
    let path = dir.join(name);
    std::fs::read(&path).map_err(|source| ModelError::Io { path, source })
}

/// The safetensors files of a folder, by its index or its single file.
fn files(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if index.is_file() {
        let json: Value = serde_json::from_slice(&read(dir, "model.safetensors.index.json")?)
            .map_err(|e| ModelError::Checkpoint(format!("model.safetensors.index.json: {e}")))?;
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| ModelError::Checkpoint("model.safetensors.index.json has no weight_map".into()))?;
        let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
        names.sort_unstable();
        names.dedup();
        if let Some(bad) = names.iter().find(|n| n.contains('/') || n.contains('\\') || n.starts_with('.')) {
            return Err(ModelError::Checkpoint(format!("index names the file {bad:?} outside the folder")));
        }
        return Ok(names.into_iter().map(|n| dir.join(n)).collect());
    }
    if single.is_file() {
        return Ok(vec![single]);
    }
    let pickles = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    if pickles.iter().any(|f| dir.join(f).is_file()) {
        return Err(ModelError::Unsupported(format!(
            "{} holds only pickle files (pytorch_model.bin), which run code when they are read; save the model as \
             safetensors",
            dir.display()
        )));
    }
    Err(ModelError::Checkpoint(format!("{} has neither model.safetensors nor its index", dir.display())))
}

impl Checkpoint {
    pub(super) fn open(dir: &Path, prefix: &'static str, dtype: DType, device: &Device) -> Result<Self, ModelError> {
        let paths = files(dir)?;
        for path in &paths {
            std::fs::metadata(path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        }
        // SAFETY: the operator's own files, mapped read-only while they are loaded; changing them under a starting
        // server is outside what any loader can defend against.
        #[allow(unsafe_code)]
        let files = unsafe { MmapedSafetensors::multi(&paths)? };
        let names = files.tensors().into_iter().map(|(n, _)| n).collect();
        Ok(Self { tensors: Tensors::Files(files), names, prefix, dtype, device: device.clone() })
    }

    /// A file that is open.
    pub(super) fn of_gguf(file: GgufFile, prefix: &'static str, dtype: DType, device: &Device) -> Self {
        let names = file.names().map(str::to_owned).collect();
        Self { tensors: Tensors::Gguf(file), names, prefix, dtype, device: device.clone() }
    }

    /// Tensors in memory under their stored names; they are used as they are where type and device fit, so that gradients
    /// reach them.
    pub(super) fn given(tensors: HashMap<String, Tensor>, prefix: &'static str, dtype: DType, device: &Device) -> Self {
        let names = tensors.keys().cloned().collect();
        Self { tensors: Tensors::Given(tensors), names, prefix, dtype, device: device.clone() }
    }

    /// The [`fingerprint`] of what is on disk.
    pub(super) fn fingerprint(&self, config: &Value) -> Result<BaseFingerprint, ModelError> {
        let files = match &self.tensors {
            Tensors::Files(files) => files,
            Tensors::Gguf(file) => {
                return Ok(digest(config, file.tensors().map(|(name, form, bytes)| (name, form, bytes.into()))));
            }
            Tensors::Given(_) => {
                return Err(ModelError::Unsupported("a checkpoint in memory is not asked for a fingerprint".into()));
            }
        };
        let mut tensors = files.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(fingerprint(config, tensors.iter().map(|(name, view)| (name.as_str(), view))))
    }

    /// The stored name of a module's tensor: with the family's prefix, or bare.
    pub(super) fn name(&self, module: &str, suffix: &str) -> Option<String> {
        let bare = format!("{module}.{suffix}");
        let prefixed = format!("{}{bare}", self.prefix);
        [prefixed, bare].into_iter().find(|n| self.names.contains(n))
    }

    pub(super) fn has(&self, module: &str, suffix: &str) -> bool {
        self.name(module, suffix).is_some()
    }

    /// The stored name of a tensor that must be there, of this shape.
    fn fitting(&self, module: &str, suffix: &str, shape: &[usize]) -> Result<String, ModelError> {
        let name = self
            .name(module, suffix)
            .ok_or_else(|| ModelError::Checkpoint(format!("no tensor {}{module}.{suffix}", self.prefix)))?;
        match self.tensors.shape(&name) {
            Some(found) if found == shape => Ok(name),
            found => Err(ModelError::Checkpoint(format!(
                "{name} is {:?}; the config asks for {shape:?}",
                found.unwrap_or_default()
            ))),
        }
    }

    /// A tensor that must be there, of this shape.
    pub(super) fn get(&self, module: &str, suffix: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let name = self.fitting(module, suffix, shape)?;
        let t = self.tensors.load(&name)?;
        if !matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
            return Err(ModelError::Checkpoint(format!("{name} is {:?}; f32, f16, bf16 are accepted", t.dtype())));
        }
        Ok(t.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    /// Whether this is what llama.cpp's converter made of a checkpoint: matrices may be in blocks and are `[out, in]` in every
    /// family, gains are those that are multiplied with, rotary frequencies may come with divisors.
    pub(super) fn is_converted(&self) -> bool {
        matches!(self.tensors, Tensors::Gguf(_))
    }

    /// The blocks of a weight `[out, in]` that is stored in them.
    pub(super) fn blocks(&self, module: &str, shape: [usize; 2]) -> Result<Option<Blocks<'_>>, ModelError> {
        let Tensors::Gguf(file) = &self.tensors else { return Ok(None) };
        Ok(file.blocks(&self.fitting(module, "weight", &shape)?))
    }

    /// A tensor by its stored name, in this checkpoint's type and on its device.
    pub(super) fn stored(&self, name: &str) -> Result<Tensor, ModelError> {
        Ok(self.tensors.load(name)?.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    /// The first dimension of a tensor.
    pub(super) fn rows(&self, module: &str, suffix: &str) -> Option<usize> {
        let name = self.name(module, suffix)?;
        self.tensors.shape(&name)?.first().copied()
    }

    /// A tensor that may be absent.
    pub(super) fn find(&self, module: &str, suffix: &str, shape: &[usize]) -> Result<Option<Tensor>, ModelError> {
        if self.has(module, suffix) { self.get(module, suffix, shape).map(Some) } else { Ok(None) }
    }
}

/// A matrix in blocks: their format, and their bytes.
pub(super) type Blocks<'a> = (QuantKind, Cow<'a, [u8]>);

/// JSON with sorted keys.
fn canonical(v: &Value) -> Vec<u8> {
    fn sorted(v: &Value) -> Value {
        match v {
            Value::Object(map) => {
                let mut keys: Vec<_> = map.keys().collect();
                keys.sort();
                Value::Object(keys.into_iter().map(|k| (k.clone(), sorted(&map[k]))).collect())
            }
            Value::Array(list) => Value::Array(list.iter().map(sorted).collect()),
            other => other.clone(),
        }
    }
    sorted(v).to_string().into_bytes()
}
