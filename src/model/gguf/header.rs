//! The header of a GGUF file, from its bytes: metadata, and what each tensor is and where.
//!
//! Every length and offset is held against the bytes that are there before it is used: files come from strangers. candle's
//! reader is not used: it keeps every array of a tokenizer, divides by the file's own alignment, multiplies its dimensions
//! unchecked, and its errors name no tensor.

use std::{collections::BTreeMap, ops::Range};

use serde_json::{Map, Value as Json};

use crate::ops::QuantKind;

type Read<T> = Result<T, String>;

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 4;
/// Deepest nesting of arrays.
const MAX_DEPTH: usize = 8;
/// Largest alignment of tensors.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Arrays of a tokenizer that are read.
const ARRAYS: &[&str] =
    &["tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"];
/// Most elements of one of them. The largest vocabularies have 2^18 tokens, and 2^19 merges.
const MAX_ELEMENTS: u64 = 1 << 22;
/// Types of tensors that are read, as the errors list them.
const ACCEPTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K";

/// What a tensor's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    Quant(QuantKind),
}

impl Kind {
    /// By ggml's number of the type.
    fn read(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => Self::F32,
            1 => Self::F16,
            30 => Self::Bf16,
            2 => Self::Quant(QuantKind::Q4_0),
            3 => Self::Quant(QuantKind::Q4_1),
            6 => Self::Quant(QuantKind::Q5_0),
            7 => Self::Quant(QuantKind::Q5_1),
            8 => Self::Quant(QuantKind::Q8_0),
            12 => Self::Quant(QuantKind::Q4K),
            13 => Self::Quant(QuantKind::Q5K),
            14 => Self::Quant(QuantKind::Q6K),
            other => return Err(unread(other)),
        })
    }

    /// Bytes of so many numbers; `None` where they are no whole number of blocks, or too many to count.
    pub(super) fn bytes_of(self, count: usize) -> Option<usize> {
        match self {
            Self::F32 => count.checked_mul(4),
            Self::F16 | Self::Bf16 => count.checked_mul(2),
            Self::Quant(kind) => kind.bytes_of(count),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Quant(kind) => kind.name(),
        }
    }
}

/// A type that is not read, by ggml's name where it has one.
fn unread(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16..=23 | 29 => "an IQ type",
        24..=28 => "an integer or F64",
        34 | 35 => "a TQ type",
        39 => "MXFP4",
        _ => "unknown",
    };
    format!("is of type {id} ({name}); accepted are {ACCEPTED}")
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) kind: Kind,
    /// Outermost dimension first, as `safetensors` counts.
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(super) bytes: Range<usize>,
}

/// A value of the metadata. Arrays are walked over, and read where they are asked for ([`Header::tokenizer`]): a vocabulary
/// is no part of what a base is loaded by.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Elements),
}

/// Where an array's elements are.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Elements {
    /// ggml's number of their type.
    kind: u32,
    count: u64,
    /// The first one's place in the file.
    start: usize,
}

/// All of a header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Info>,
}

impl Header {
    /// Reads the header of a whole file.
    ///
    /// # Errors
    /// What is wrong, and with which key or tensor.
    pub(super) fn read(file: &[u8]) -> Read<Self> {
        let mut r = Reader { file, at: 0 };
        if r.take(4, "the magic")? != b"GGUF" {
            return Err("it does not begin with GGUF".into());
        }
        let version = r.u32("the version")?;
        if !matches!(version, 2 | 3) {
            return Err(format!("it is of version {version}; accepted are 2 and 3, little-endian"));
        }
        let tensor_count = r.u64("the number of tensors")?;
        let metadata_count = r.u64("the number of metadata entries")?;
        let mut metadata = BTreeMap::new();
        for i in 0..metadata_count {
            let key = r.text(&format!("the key of metadata entry {i}"))?;
            let kind = r.u32(&key)?;
            let value = r.value(kind, &key, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("{key} is there twice"));
            }
        }
        let mut entries = Vec::new();
        for i in 0..tensor_count {
            let name = r.text(&format!("the name of tensor {i}"))?;
            let dims = r.u32(&name)? as usize;
            if dims == 0 || dims > MAX_DIMS {
                return Err(format!("{name} has {dims} dimensions; accepted is 1 to {MAX_DIMS}"));
            }
            let mut shape = (0..dims).map(|_| r.u64(&name)).collect::<Read<Vec<u64>>>()?;
            shape.reverse();
            let kind = Kind::read(r.u32(&name)?).map_err(|e| format!("{name} {e}"))?;
            entries.push((name.clone(), shape, kind, r.u64(&name)?));
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(n)) if (1..=MAX_ALIGNMENT).contains(n) => *n,
            Some(other) => {
                return Err(format!("general.alignment is {other:?}; accepted is 1 to {MAX_ALIGNMENT}"));
            }
        };
        let start = (r.at as u64).next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, shape, kind, offset) in entries {
            let info =
                placed(&shape, kind, start.checked_add(offset), file.len()).map_err(|e| format!("{name} {e}"))?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("{name} is there twice"));
            }
        }
        Ok(Self { metadata, tensors })
    }

    /// What the metadata says of the tokenizer, under its own keys: numbers, texts, and the arrays of a vocabulary. `file` is
    /// the file that the header was read of.
    ///
    /// # Errors
    /// An array that is too long or nested.
    pub(super) fn tokenizer(&self, file: &[u8]) -> Read<Map<String, Json>> {
        let mut out = Map::new();
        for (key, value) in self.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
            let value = match value {
                Value::Array(elements) if ARRAYS.contains(&key.as_str()) => elements.read(file, key)?,
                Value::Array(_) => continue,
                other => json(other),
            };
            out.insert(key.clone(), value);
        }
        Ok(out)
    }
}

impl Elements {
    fn read(&self, file: &[u8], key: &str) -> Read<Json> {
        if self.count > MAX_ELEMENTS {
            return Err(format!("{key} has {} elements; at most {MAX_ELEMENTS} are accepted", self.count));
        }
        let mut r = Reader { file, at: self.start };
        let mut out = Vec::new();
        for _ in 0..self.count {
            out.push(match self.kind {
                8 => Json::String(r.text(key)?),
                9 => return Err(format!("{key} is an array of arrays")),
                kind => json(&r.value(kind, key, 1)?),
            });
        }
        Ok(Json::Array(out))
    }
}

/// A number that JSON has none for (NaN, infinity) is null. Arrays are read by [`Elements::read`].
fn json(value: &Value) -> Json {
    match value {
        Value::Unsigned(n) => (*n).into(),
        Value::Signed(n) => (*n).into(),
        Value::Float(n) => (*n).into(),
        Value::Bool(b) => (*b).into(),
        Value::Text(text) => text.as_str().into(),
        Value::Array(_) => Json::Null,
    }
}

fn placed(shape: &[u64], kind: Kind, start: Option<u64>, length: usize) -> Read<Info> {
    let sizes = shape.iter().map(|d| usize::try_from(*d).ok().filter(|d| *d > 0)).collect::<Option<Vec<usize>>>();
    let count = sizes.as_ref().and_then(|s| s.iter().try_fold(1usize, |n, d| n.checked_mul(*d)));
    let (Some(shape), Some(count)) = (sizes, count) else {
        return Err(format!("has the shape {shape:?}"));
    };
    // blocks lie along the innermost dimension
    let whole = shape.last().is_some_and(|row| kind.bytes_of(*row).is_some());
    let Some(bytes) = kind.bytes_of(count).filter(|_| whole) else {
        return Err(format!("of {} has the shape {shape:?}, whose rows are no whole blocks", kind.name()));
    };
    let start = start.and_then(|s| usize::try_from(s).ok());
    match start.and_then(|s| Some(s..s.checked_add(bytes)?)).filter(|range| range.end <= length) {
        Some(bytes) => Ok(Info { kind, shape, bytes }),
        None => Err(format!("ends beyond the file's {length} bytes: the file is cut off or damaged")),
    }
}

/// What is left of the file.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize, what: &str) -> Read<&'a [u8]> {
        let taken = self.at.checked_add(n).and_then(|end| self.file.get(self.at..end));
        let taken = taken.ok_or_else(|| format!("the file ends within {what}, after {} bytes", self.file.len()))?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Read<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Read<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Read<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn text(&mut self, what: &str) -> Read<String> {
        let n = usize::try_from(self.u64(what)?).unwrap_or(usize::MAX);
        let bytes = self.take(n, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Read<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 if depth == 0 => Value::Text(self.text(key)?),
            8 => {
                let n = usize::try_from(self.u64(key)?).unwrap_or(usize::MAX);
                self.take(n, key)?;
                Value::Text(String::new()) // of an array: it is walked over
            }
            9 if depth < MAX_DEPTH => {
                let kind = self.u32(key)?;
                let n = self.u64(key)?;
                let elements = Elements { kind, count: n, start: self.at };
                match width(kind) {
                    // at once: an array may have as many elements as the file has bytes
                    Some(width) => {
                        let bytes = usize::try_from(n).ok().and_then(|n| n.checked_mul(width));
                        self.take(bytes.unwrap_or(usize::MAX), key)?;
                    }
                    None => {
                        for _ in 0..n {
                            self.value(kind, key, depth + 1)?;
                        }
                    }
                }
                Value::Array(elements)
            }
            9 => return Err(format!("{key} nests arrays deeper than {MAX_DEPTH}")),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(format!("{key} is of value type {other}; accepted is 0 to 12")),
        })
    }
}

/// Bytes of a value type that is always as wide.
fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
