//! Reading a fixture folder: manifest, models, deltas, expected tensors.

use std::{
    cell::RefCell,
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use deltaserve::{
    delta::{Delta, DeltaFiles},
    interop::{self, InteropError},
    model::{Base, LoadOptions, ModelError},
};
use serde_json::Value;

pub(crate) enum Outcome {
    Passed(String),
    Failed(String),
    Unsupported(String),
}

/// Ends a case early with its outcome.
pub(crate) type Step<T> = Result<T, Outcome>;

pub(crate) fn fail(e: impl std::fmt::Display) -> Outcome {
    Outcome::Failed(e.to_string())
}

pub(crate) fn id(case: &Value) -> &str {
    case["id"].as_str().unwrap_or("?")
}

pub(crate) struct Fixtures {
    pub(crate) root: PathBuf,
    pub(crate) manifest: Value,
    bases: RefCell<HashMap<String, Arc<Base>>>,
}

impl Fixtures {
    pub(crate) fn default_folder(committed: &Path) -> PathBuf {
        if let Some(dir) = std::env::var_os("DELTASERVE_FIXTURES") {
            return dir.into();
        }
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
        if shared.join("manifest.json").is_file() {
            return shared;
        }
        println!("golden: ../shared/fixtures is absent, so the committed subset is used");
        committed.to_path_buf()
    }

    pub(crate) fn open(root: &Path) -> Result<Self, String> {
        let text = std::fs::read(root.join("manifest.json")).map_err(|e| e.to_string())?;
        let manifest = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
        Ok(Self { root: root.to_path_buf(), manifest, bases: RefCell::default() })
    }

    pub(crate) fn list(&self, key: &str) -> &[Value] {
        self.manifest[key].as_array().map_or(&[], Vec::as_slice)
    }

    pub(crate) fn tolerance(&self, key: &str) -> f64 {
        self.manifest["tolerance"][key].as_f64().unwrap_or_else(|| panic!("the manifest states no {key}"))
    }

    pub(crate) fn base(&self, model: &str) -> Step<Arc<Base>> {
        if let Some(base) = self.bases.borrow().get(model) {
            return Ok(Arc::clone(base));
        }
        let path = self.manifest["models"][model]["path"].as_str().ok_or_else(|| fail("no such model"))?;
        let base = match Base::load(&self.root.join(path), &LoadOptions::default()) {
            Ok(base) => Arc::new(base),
            Err(ModelError::Unsupported(m)) => return Err(Outcome::Unsupported(m)),
            Err(e) => return Err(fail(e)),
        };
        self.bases.borrow_mut().insert(model.into(), Arc::clone(&base));
        Ok(base)
    }

    /// Loads a delta's folder. What this version says it does not support may be passed over only outside its scope:
    /// methods that are row-wise, and prompts and prefixes of tier core, must load.
    pub(crate) fn delta(&self, base: &Base, case: &Value) -> Step<Option<Arc<Delta>>> {
        let Some(path) = case["delta"].as_str() else { return Ok(None) };
        let files = read_folder(&self.root.join(path))?;
        let kind = case["type"].as_str().unwrap_or("LORA");
        let rows =
            matches!(kind, "LORA" | "BITFIT" | "IA3" | "LN_TUNING" | "TRAINABLE_TOKENS" | "BOTTLENECK" | "COMPACTER");
        let positions = matches!(kind, "PREFIX_TUNING" | "PROMPT_TUNING" | "P_TUNING");
        let in_scope = rows || (positions && case["tier"].as_str().unwrap_or("core") == "core");
        let decoded = match interop::decode(&files, base) {
            // the server refuses pickles; the client's command makes them safetensors
            Err(InteropError::Pickle(_)) => {
                interop::convert(&self.root.join(path)).and_then(|files| interop::decode(&files, base))
            }
            other => other,
        };
        match decoded {
            Ok(delta) => Ok(Some(Arc::new(delta))),
            Err(e @ (InteropError::Invalid { .. } | InteropError::Unapplied(_) | InteropError::Pickle(_)))
                if !in_scope =>
            {
                Err(Outcome::Unsupported(e.to_string()))
            }
            Err(e) => Err(fail(e)),
        }
    }

    pub(crate) fn tensors(&self, path: &str) -> Step<HashMap<String, Tensor>> {
        candle_core::safetensors::load(self.root.join(path), &Device::Cpu).map_err(fail)
    }
}

pub(crate) fn read_folder(dir: &Path) -> Step<DeltaFiles> {
    let mut files = DeltaFiles::default();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let data = std::fs::read(entry.path()).map_err(fail)?;
        files.files.insert(entry.file_name().to_string_lossy().into_owned(), data.into());
    }
    Ok(files)
}

/// Rows of ids with their padding taken out.
pub(crate) struct Batch {
    pub(crate) tokens: Vec<Vec<u32>>,
    pub(crate) types: Option<Vec<Vec<u32>>>,
    pub(crate) mask: Vec<Vec<i64>>,
}

impl Batch {
    pub(crate) fn read(t: &HashMap<String, Tensor>, ids: &str, mask: &str) -> Step<Self> {
        let get = |key: &str| -> Step<Vec<Vec<i64>>> {
            let tensor = t.get(key).ok_or_else(|| fail(format!("no tensor {key}")))?;
            tensor.to_dtype(DType::I64).and_then(|t| t.to_vec2::<i64>()).map_err(fail)
        };
        let mask = get(mask)?;
        let cut = |rows: Vec<Vec<i64>>| -> Vec<Vec<u32>> {
            rows.iter()
                .zip(&mask)
                .map(|(r, m)| r.iter().zip(m).filter(|(_, m)| **m == 1).map(|(v, _)| *v as u32).collect())
                .collect()
        };
        let tokens = cut(get(ids)?);
        let types = if t.contains_key("token_type_ids") && ids == "input_ids" {
            Some(cut(get("token_type_ids")?))
        } else {
            None
        };
        Ok(Self { tokens, types, mask })
    }

    /// What an encoder-decoder's decoder reads, and no padding in it; else the rows of `input_ids`.
    pub(crate) fn read_output(t: &HashMap<String, Tensor>, base: &Base) -> Step<Self> {
        if base.arch.is_encoder_decoder() {
            return Self::unpadded(t, "decoder_input_ids");
        }
        Self::read(t, "input_ids", "attention_mask")
    }

    /// All of a tensor of ids, whatever the mask.
    pub(crate) fn unpadded(t: &HashMap<String, Tensor>, name: &str) -> Step<Self> {
        let ids = t.get(name).ok_or_else(|| fail(format!("no tensor {name}")))?;
        let rows = ids.to_dtype(DType::U32).and_then(|t| t.to_vec2::<u32>()).map_err(fail)?;
        let mask = rows.iter().map(|r| vec![1; r.len()]).collect();
        Ok(Self { tokens: rows, types: None, mask })
    }

    /// Positions of row `i` that are no padding, in the padded tensor.
    pub(crate) fn places(&self, i: usize) -> Vec<usize> {
        self.mask[i].iter().enumerate().filter(|(_, m)| **m == 1).map(|(j, _)| j).collect()
    }
}

/// Largest absolute difference.
pub(crate) fn max_diff(a: &Tensor, b: &Tensor) -> Step<f64> {
    if a.dims() != b.dims() {
        return Err(fail(format!("shapes {:?} and {:?}", a.dims(), b.dims())));
    }
    let go = || -> candle_core::Result<f64> {
        let d = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.flatten_all()?;
        let worst =
            d.to_vec1::<f64>()?.into_iter().fold(0.0, |m: f64, v| if v.is_nan() { f64::INFINITY } else { m.max(v) });
        Ok(worst)
    };
    go().map_err(fail)
}
