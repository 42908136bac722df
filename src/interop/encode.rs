//! A trained delta to files that PEFT or AdapterHub load (BitFit alone and combinations: our own forms).

mod lora;
mod peft;
mod positions;
mod small;
mod split;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::{InteropError, adapterhub, container, keys};
use crate::{
    delta::{Delta, DeltaFiles, HeadPool, Patch, Problem, Site, SiteId, Task},
    model::Base,
};
pub use peft::for_peft;
use split::Kind;

/// What the tensors do not say.
#[derive(Debug, Clone, Default)]
pub struct EncodeMeta {
    /// Name of the base, for PEFT's `base_model_name_or_path`.
    pub base_name: String,
    /// Whether scales are `alpha / sqrt(r)`.
    pub rslora: bool,
    /// LoRA dropout of the training, for the record.
    pub dropout: f64,
}

/// Tensors under their names in a file; sorted, so that the same delta always gives the same bytes.
pub(super) type Named = BTreeMap<String, Tensor>;

/// A configuration and its tensors.
pub(super) struct Part {
    pub(super) config: Value,
    pub(super) tensors: Named,
}

/// What all writers need.
pub(super) struct Writer<'a> {
    pub(super) delta: &'a Delta,
    pub(super) base: &'a Base,
    pub(super) meta: &'a EncodeMeta,
}

/// Patches of one form, by site.
pub(super) type Patches<'a> = Vec<(SiteId, &'a Patch)>;

/// Writes a delta as a version's files: `adapter_config.json`, the weights, and with a head `labels.json`; a combination
/// that has no folder form of its own as one folder form per part.
///
/// # Errors
/// A patch, an order of patches or a head that has no place in these formats.
pub fn encode(delta: &Delta, base: &Base, meta: &EncodeMeta) -> Result<DeltaFiles, InteropError> {
    let of = |delta| Writer { delta, base, meta };
    let mut parts = split::parts(&of(delta))?;
    if parts.len() > 1 {
        let folders = parts.iter().map(|(kind, part)| of(part).write(*kind)).collect::<Result<_, _>>()?;
        return container::encode(folders);
    }
    match parts.pop() {
        Some((kind, part)) => of(&part).write(kind),
        None => of(delta).write(Kind::Bitfit), // a head alone
    }
}

impl Writer<'_> {
    /// Writes a delta whose patches are all of one form.
    fn write(&self, kind: Kind) -> Result<DeltaFiles, InteropError> {
        let patches: Patches<'_> = self.delta.patches().iter().map(|(site, p)| (*site, p)).collect();
        let mut part = match kind {
            Kind::Prompt | Kind::Prefix => return positions::encode(self),
            Kind::Adapter => return adapterhub::encode(self, &patches),
            Kind::Lora | Kind::Dora => lora::lora(self, &patches)?,
            Kind::Bitfit => small::bitfit(self, &patches)?,
            Kind::Ia3 => small::ia3(self, &patches)?,
            Kind::Ln => small::ln(self, &patches)?,
            Kind::Tokens => small::tokens(self, &patches)?,
        };
        part.tensors.extend(self.head(keys::key)?);
        self.folder(&part)
    }

    fn unapplied(&self, site: SiteId, what: &str) -> InteropError {
        let module = self.base.sites.get(site).map(|e| e.label()).unwrap_or_default();
        InteropError::Unapplied(vec![format!("{module}: {what}")])
    }

    /// The keys that all PEFT configurations have.
    fn config(&self, kind: &str) -> Map<String, Value> {
        let task = match self.delta.spec.task {
            Task::CausalLm => "CAUSAL_LM",
            Task::Seq2Seq => "SEQ_2_SEQ_LM",
            Task::SeqCls => "SEQ_CLS",
            Task::TokenCls => "TOKEN_CLS",
            Task::Feature => "FEATURE_EXTRACTION",
        };
        let modules_to_save = match self.delta.spec.task {
            Task::SeqCls | Task::TokenCls => json!(["classifier", "score"]),
            _ => Value::Null,
        };
        let all = [
            ("base_model_name_or_path", json!(self.meta.base_name)),
            ("inference_mode", json!(true)),
            ("modules_to_save", modules_to_save),
            ("peft_type", json!(kind)),
            ("task_type", json!(task)),
        ];
        // what is not said is the usual, so that other deltas' files stay as they are
        let problem = self.delta.spec.problem;
        let special = (problem != Problem::SingleLabel && self.delta.head().is_some())
            .then(|| ("problem_type", json!(problem.as_str())));
        let called = self.delta.invocation().map(|tokens| ("alora_invocation_tokens", json!(&tokens[..])));
        all.into_iter().chain(special).chain(called).map(|(k, v)| (k.to_owned(), v)).collect()
    }

    /// PEFT's folder of these.
    fn folder(&self, part: &Part) -> Result<DeltaFiles, InteropError> {
        let mut out = DeltaFiles::default();
        out.files.insert("adapter_config.json".into(), pretty(&part.config)?.into());
        out.files.insert("adapter_model.safetensors".into(), serialize(&part.tensors, &self.info())?.into());
        self.labels(&mut out)?;
        Ok(out)
    }

    /// PEFT's head: one layer over the base's pooled row, or the family's two over the first row. `key` makes a module's
    /// name in the file.
    fn head(&self, key: impl Fn(&str) -> String) -> Result<Named, InteropError> {
        let mut out = Named::new();
        let Some(head) = self.delta.head() else { return Ok(out) };
        let names = &self.base.arch.names;
        let mut put = |name: &str, weight: &Tensor, bias: &Option<Tensor>| -> Result<(), InteropError> {
            let key = key(name);
            out.insert(format!("{key}.weight"), plain(weight)?);
            if let Some(b) = bias {
                out.insert(format!("{key}.bias"), plain(b)?);
            }
            Ok(())
        };
        let name = match (head.layers.as_slice(), head.pool, names.cls_inner) {
            ([inner], HeadPool::First, Some(known)) if inner.act == Some(known.act) => {
                put(known.dense, &inner.weight, &inner.bias)?;
                known.out
            }
            ([], HeadPool::Base, _) => names.head_of(self.delta.spec.task),
            _ => {
                return Err(InteropError::Unapplied(vec!["the head, which only an adapter's folder can hold".into()]));
            }
        };
        put(name, &head.weight, &head.bias)?;
        Ok(out)
    }

    /// `labels.json`, with a head.
    pub(super) fn labels(&self, out: &mut DeltaFiles) -> Result<(), InteropError> {
        if self.delta.head().is_some() {
            let labels =
                serde_json::to_vec(&self.delta.spec.labels).map_err(|e| InteropError::Tensor(e.to_string()))?;
            out.files.insert("labels.json".into(), labels.into());
        }
        Ok(())
    }

    /// What the weights file says of itself.
    pub(super) fn info(&self) -> [(String, String); 2] {
        [("format".into(), "pt".into()), ("deltaserve.base_fingerprint".into(), self.base.fingerprint.to_string())]
    }

    /// A site's path as PEFT sees it.
    pub(super) fn path(&self, site: SiteId) -> Result<String, InteropError> {
        let entry = self.base.sites.get(site).ok_or_else(|| InteropError::Tensor(format!("no site {site}")))?;
        Ok(keys::peft_path(&entry.module, self.base, self.delta.spec.task == Task::Feature))
    }

    /// The shortest list of path endings that names exactly these modules among `all`; full paths where none does.
    fn endings(&self, wanted: &[String], among: impl Fn(Site) -> bool) -> Result<Vec<String>, InteropError> {
        let sites = self.base.sites.iter().filter(|(_, e)| among(e.site)).map(|(id, _)| id);
        let all = sites.map(|id| self.path(id)).collect::<Result<Vec<_>, _>>()?;
        for parts in 1..=3 {
            let ending = |path: &String| -> String {
                let pieces: Vec<&str> = path.split('.').collect();
                pieces[pieces.len().saturating_sub(parts)..].join(".")
            };
            let mut endings: Vec<String> = wanted.iter().map(ending).collect();
            endings.sort_unstable();
            endings.dedup();
            let matches = |path: &String| endings.iter().any(|e| path == e || path.ends_with(&format!(".{e}")));
            if all.iter().filter(|p| matches(p)).count() == wanted.len() {
                return Ok(endings);
            }
        }
        Ok(wanted.to_vec())
    }
}

/// Modules with a matrix, which PEFT's LoRA and (IA)3 look among.
fn is_matrix(site: Site) -> bool {
    matches!(site, Site::Linear { .. } | Site::LmHead | Site::Pooler)
}

/// f32 on the CPU, contiguous, detached.
pub(super) fn plain(t: &Tensor) -> Result<Tensor, InteropError> {
    Ok(t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?)
}

/// JSON as PEFT writes it: indented, sorted keys.
pub(super) fn pretty(config: &Value) -> Result<Vec<u8>, InteropError> {
    let mut config = config.clone();
    config.sort_all_objects();
    serde_json::to_vec_pretty(&config).map_err(|e| InteropError::Tensor(e.to_string()))
}

/// A safetensors file with this metadata; the same input gives the same bytes.
pub(super) fn serialize(tensors: &Named, info: &[(String, String)]) -> Result<Vec<u8>, InteropError> {
    let info: std::collections::HashMap<String, String> = info.iter().cloned().collect();
    let mut weights = safetensors::serialize(tensors, (!info.is_empty()).then_some(info))
        .map_err(|e| InteropError::Tensor(format!("cannot write safetensors: {e}")))?;
    sort_metadata(&mut weights)?;
    Ok(weights)
}

/// Puts the header's metadata in order: the library writes it in a hash map's, and an id is a digest of the bytes.
fn sort_metadata(file: &mut [u8]) -> Result<(), InteropError> {
    let bad = |m: &str| InteropError::Tensor(format!("cannot write safetensors: {m}"));
    let (len, rest) = file.split_first_chunk_mut::<8>().ok_or_else(|| bad("no header"))?;
    let header = rest.get_mut(..u64::from_le_bytes(*len) as usize).ok_or_else(|| bad("short header"))?;
    let mut json: Map<String, Value> = serde_json::from_slice(header).map_err(|e| bad(&e.to_string()))?;
    if let Some(Value::Object(meta)) = json.get_mut("__metadata__") {
        meta.sort_keys();
    }
    let mut text = serde_json::to_vec(&json).map_err(|e| bad(&e.to_string()))?;
    if text.len() > header.len() {
        return Err(bad("the header grew"));
    }
    text.resize(header.len(), b' '); // safetensors pads headers with spaces
    header.copy_from_slice(&text);
    Ok(())
}
