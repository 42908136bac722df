//! A safetensors file of a stranger: its header is checked before any tensor is made.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::de::{Deserializer as _, Error as _, IgnoredAny, MapAccess, Visitor};

use super::InteropError;

/// Largest accepted header; a delta of 100 layers has some hundred kilobytes.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Most tensors in one file.
const MAX_TENSORS: usize = 50_000;
/// Longest name of a tensor.
const MAX_NAME_BYTES: usize = 1024;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;
/// Key of a header that is no tensor.
const METADATA: &str = "__metadata__";

/// An entry of a header.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    #[serde(rename = "dtype")]
    _dtype: IgnoredAny,
    shape: Vec<u64>,
    #[serde(rename = "data_offsets")]
    _offsets: [u64; 2],
}

/// Looks at a header's entries one after the other: reading ends at the first that is one too many or that no delta has,
/// before a table of them is made. The library keeps one of two entries of the same name; here there are none. What
/// lies where and whether it covers the file is the library's to check.
struct Entries;

impl Entries {
    fn check(header: &[u8]) -> Result<(), serde_json::Error> {
        let mut json = serde_json::Deserializer::from_slice(header);
        (&mut json).deserialize_map(Self)?;
        json.end()
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tensors by their names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut names, mut tensors) = (HashSet::new(), 0);
        while let Some(name) = map.next_key::<String>()? {
            let is_tensor = name != METADATA;
            tensors += usize::from(is_tensor);
            if name.len() > MAX_NAME_BYTES {
                return Err(A::Error::custom(format!("has a name of over {MAX_NAME_BYTES} bytes")));
            }
            if names.contains(&name) {
                return Err(A::Error::custom(format!("has {name} twice")));
            }
            if tensors > MAX_TENSORS {
                return Err(A::Error::custom(format!("has over {MAX_TENSORS} tensors")));
            }
            if is_tensor {
                let entry: Entry = map.next_value()?;
                if entry.shape.len() > MAX_DIMS {
                    let dims = entry.shape.len();
                    return Err(A::Error::custom(format!("has {name} of {dims} dimensions; at most {MAX_DIMS}")));
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
            names.insert(name);
        }
        Ok(())
    }
}

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
        Entries::check(data.get(8..8 + header as usize).unwrap_or_default()).map_err(|e| bad(e.to_string()))?;
        let (_, meta) = SafeTensors::read_metadata(data).map_err(|e| bad(format!("is not valid safetensors: {e}")))?;
        let metadata = meta.metadata().clone().unwrap_or_default();
        let inner = SafeTensors::deserialize(data).map_err(|e| bad(format!("is not valid safetensors: {e}")))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of a header as written, and so many bytes behind it.
    fn file(header: &str, bytes: usize) -> Bytes {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend_from_slice(header.as_bytes());
        out.resize(out.len() + bytes, 0);
        out.into()
    }

    fn refusal(data: &Bytes) -> String {
        TensorFile::read("w", data).map(|_| ()).expect_err("refused").to_string()
    }

    #[test]
    fn a_header_is_refused_at_the_first_entry_that_no_delta_has() {
        let one = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let good = file(&format!(r#"{{"__metadata__":{{"format":"pt"}},{one}}}"#), 4);
        let read = TensorFile::read("w", &good).expect("a file");
        assert_eq!((read.names(), read.metadata("format")), (vec!["a".to_owned()], Some("pt")));
        let cases = [
            (format!("{{{one},{one}}}"), 4, "has a twice"),
            (format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},{one}}}"#), 4, "__metadata__ twice"),
            (format!(r#"{{"{}":1}}"#, "n".repeat(1025)), 0, "1024 bytes"),
            (r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#.into(), 4, "9 dimensions"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}"#.into(), 4, "more"),
            (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#.into(), 4, "-1"),
            (r#"{"a":{"dtype":"F32","shape":[1]}}"#.into(), 4, "data_offsets"),
            ("[]".into(), 0, "tensors by their names"),
            (format!("{{{one}}} x"), 4, "trailing"),
            ("{".into(), 0, "EOF"),
        ];
        for (header, bytes, word) in cases {
            let said = refusal(&file(&header, bytes));
            assert!(said.contains(word), "{header:.80}: {said}");
        }
    }

    #[test]
    fn many_tensors_are_not_read_to_their_end() {
        let entries = |n: usize| (0..n).map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#));
        let header = format!("{{{}", entries(MAX_TENSORS + 1).collect::<Vec<_>>().join(","));
        // what follows is no JSON, and is never looked at
        let said = refusal(&file(&format!("{header},!"), 0));
        assert!(said.contains("over 50000 tensors"), "{said}");
    }

    #[test]
    fn what_lies_where_is_checked_before_a_tensor_is_made() {
        let entry = |name: &str, shape: &str, from: u64, to: u64| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
        };
        let huge = "[4294967296,4294967296,4294967296]";
        for (entries, bytes) in [
            (vec![entry("a", "[1]", 0, 4), entry("b", "[1]", 0, 4)], 8), // one over the other
            (vec![entry("a", "[1]", 0, 4), entry("b", "[1]", 8, 12)], 12), // a gap
            (vec![entry("a", "[2]", 0, 8)], 4),                          // beyond the end
            (vec![entry("a", "[1]", 0, 4)], 8),                          // more behind it
            (vec![entry("a", "[1]", 4, 0)], 4),                          // backwards
            (vec![entry("a", huge, 0, 4)], 4),                           // a product beyond 64 bits
            (vec![entry("a", "[2]", 0, 4)], 4),                          // other sizes than its own
        ] {
            let said = refusal(&file(&format!("{{{}}}", entries.join(",")), bytes));
            assert!(said.contains("not valid safetensors"), "{entries:?}: {said}");
        }
        for length in [0u64, 1, 99_000_000, 1 << 63, u64::MAX] {
            let data = Bytes::from([&length.to_le_bytes()[..], b"{}"].concat());
            assert!(refusal(&data).starts_with("w: "), "{length}");
        }
    }
}
