//! A GGUF file as a checkpoint: its metadata as the `config.json` that it was made of ([`config`]), its tensors under their
//! Hugging Face names ([`names`]) and in their order of rows; and what it says of its tokenizer, which others build.
//!
//! llama.cpp's converter changes some tensors. It turns neighbouring numbers of a head where transformers turns the two
//! halves, so it permutes the rows of queries and keys of the architecture `llama` (not of the others). Quantised blocks lie
//! within rows: here the rows are put back as they are, without quantising anything anew. Gemma's gains are stored whole,
//! not less one, and GPT-2's matrices `[out, in]`: the loader takes both as they are
//! ([`Checkpoint`](super::weights::Checkpoint)).

mod config;
mod header;
mod names;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use serde_json::{Map, Value as Json};

pub(super) use self::names::{FACTORS, Layout};
use self::{
    header::{Header, Info, Kind},
    names::Placed,
};
use super::ModelError;
use crate::ops::{QuantKind, Quantized, Weight};

/// A tensor under its Hugging Face name.
struct Entry {
    /// Its name in the file.
    stored: String,
    info: Info,
    /// Of a matrix or bias whose rows were permuted: its heads.
    permuted: Option<usize>,
}

/// An open file.
pub(super) struct GgufFile {
    map: memmap2::Mmap,
    entries: BTreeMap<String, Entry>,
    config: Json,
}

/// The file that a base is: the path itself, or a folder's only `*.gguf` where it has no safetensors.
///
/// # Errors
/// A folder with several of them.
pub(super) fn find(path: &Path) -> Result<Option<PathBuf>, ModelError> {
    if path.is_file() {
        return Ok(Some(path.to_path_buf()));
    }
    let io = |source| ModelError::Io { path: path.to_path_buf(), source };
    if ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| path.join(f).is_file()) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && file.is_file() {
            found.push(file);
        }
    }
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        many => {
            let names: Vec<_> = many.iter().filter_map(|f| Some(f.file_name()?.to_string_lossy())).collect();
            let dir = path.display();
            Err(ModelError::Checkpoint(format!(
                "{dir} has several GGUF files ({}); name one of them",
                names.join(", ")
            )))
        }
    }
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let map = map(path)?;
        let bad = |e: String| ModelError::Checkpoint(format!("{}: {e}", path.display()));
        let header = Header::read(&map).map_err(bad)?;
        let (layout, config) = config::read(&header).map_err(|e| match e {
            ModelError::Checkpoint(e) => bad(e),
            other => other,
        })?;
        let entries = entries(header, layout, &config).map_err(bad)?;
        Ok(Self { map, entries, config })
    }

    /// The metadata as a `config.json`.
    pub(super) fn config(&self) -> &Json {
        &self.config
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.entries.get(name)?.info.shape)
    }

    /// Name, type and shape, and bytes as they lie in the file, in order of name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, String, &[u8])> {
        let form = |info: &Info| format!("{}{:?}", info.kind.name(), info.shape);
        self.entries.iter().map(move |(name, e)| (name.as_str(), form(&e.info), &self.map[e.info.bytes.clone()]))
    }

    fn entry(&self, name: &str) -> Result<&Entry, ModelError> {
        self.entries.get(name).ok_or_else(|| ModelError::Checkpoint(format!("no tensor {name}")))
    }

    /// A tensor's bytes, in Hugging Face's order of rows.
    fn bytes(&self, entry: &Entry) -> Cow<'_, [u8]> {
        let bytes = &self.map[entry.info.bytes.clone()];
        let rows = entry.info.shape.first().copied().unwrap_or(1);
        match entry.permuted {
            Some(heads) => Cow::Owned(unpermuted(bytes, rows, heads)),
            None => Cow::Borrowed(bytes),
        }
    }

    /// The blocks of a matrix that is quantised.
    pub(super) fn blocks(&self, name: &str) -> Option<(QuantKind, Cow<'_, [u8]>)> {
        let entry = self.entries.get(name)?;
        match entry.info.kind {
            Kind::Quant(kind) => Some((kind, self.bytes(entry))),
            Kind::F32 | Kind::F16 | Kind::Bf16 => None,
        }
    }

    /// A tensor as f32 on the CPU, dequantised where it must be.
    pub(super) fn load(&self, name: &str) -> Result<Tensor, ModelError> {
        let entry = self.entry(name)?;
        let (bytes, shape) = (self.bytes(entry), entry.info.shape.as_slice());
        let numbers: Vec<f32> = match (entry.info.kind, shape) {
            (Kind::F32, _) => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            (Kind::F16, _) => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            (Kind::Bf16, _) => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            (Kind::Quant(kind), [rows, width]) => {
                let w = Weight::from(Quantized::from_blocks(kind, &bytes, (*rows, *width))?);
                return Ok(w.as_in_out()?.t()?.contiguous()?);
            }
            (Kind::Quant(kind), _) => {
                let (stored, kind) = (&entry.stored, kind.name());
                let problem = format!("{stored} of {kind} has the shape {shape:?}; a matrix is accepted, or f32");
                return Err(ModelError::Checkpoint(problem));
            }
        };
        Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?)
    }
}

/// Rows as transformers orders them: of each head, the first halves of the pairs and then the second ones. `bytes` are so
/// many `rows`.
fn unpermuted(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (width, half) = (bytes.len() / rows, rows / heads / 2);
    let source = |row: usize| {
        let (head, at) = (row / (2 * half), row % (2 * half));
        head * 2 * half + at % half * 2 + at / half
    };
    (0..rows).flat_map(|row| &bytes[source(row) * width..(source(row) + 1) * width]).copied().collect()
}

/// What a whole file says, without its numbers: as [`GgufFile::open`] reads it, and [`tokenizer_metadata`].
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn look(file: &[u8]) -> Result<(Json, Map<String, Json>), String> {
    let header = Header::read(file)?;
    let tokenizer = header.tokenizer(file)?;
    let (layout, config) = config::read(&header).map_err(|e| e.to_string())?;
    entries(header, layout, &config)?;
    Ok((config, tokenizer))
}

/// Tensors under their Hugging Face names.
fn entries(header: Header, layout: &Layout, config: &Json) -> Result<BTreeMap<String, Entry>, String> {
    let number = |key: &str| config.get(key).and_then(Json::as_u64).and_then(|n| usize::try_from(n).ok());
    let mut out = BTreeMap::new();
    for (stored, info) in header.tensors {
        let Some(Placed { name, part }) = layout.place(&stored) else {
            return Err(format!("the tensor {stored} is none of a model of the architecture {}", layout.arch));
        };
        let heads = match part {
            Some("attn_q") => number("num_attention_heads"),
            Some("attn_k") => number("num_key_value_heads"),
            _ => None,
        };
        let permuted = heads.filter(|_| layout.permutes);
        let rows = info.shape.first().copied().unwrap_or(0);
        if let Some(heads) = permuted.filter(|heads| *heads == 0 || !rows.is_multiple_of(2 * heads)) {
            return Err(format!("{stored} has {rows} rows, which are no pairs of {heads} heads"));
        }
        out.insert(name, Entry { stored, info, permuted });
    }
    Ok(out)
}

/// Maps a file.
fn map(path: &Path) -> Result<memmap2::Mmap, ModelError> {
    let io = |source| ModelError::Io { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    // SAFETY: as at the checkpoint's: the operator's own file, mapped read-only while it is loaded
    #[allow(unsafe_code)]
    unsafe { memmap2::Mmap::map(&file) }.map_err(io)
}

/// What a file's metadata says of its tokenizer, under the file's own keys (`tokenizer.ggml.tokens`, ...).
///
/// # Errors
/// A file that cannot be read.
pub fn tokenizer_metadata(path: &Path) -> Result<Map<String, Json>, ModelError> {
    let file = map(path)?;
    let found = Header::read(&file).and_then(|header| header.tokenizer(&file));
    found.map_err(|e| ModelError::Checkpoint(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod family_tests;
#[cfg(test)]
mod tests;
