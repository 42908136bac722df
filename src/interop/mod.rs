//! Interop: a version's files to a [`Delta`] and back: PEFT's and AdapterHub's folders, our BitFit form, and our form of
//! combinations, which no library has (`container`).
//!
//! Files come from strangers: headers are checked before anything is allocated, pickles are refused, and every tensor is
//! either applied or named in an error; nothing is ignored silently.

mod adapterhub;
mod archive;
mod bitfit;
mod check;
mod config;
mod container;
mod convert;
mod encode;
mod folder;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod head;
mod ia3;
mod keys;
mod ln_tuning;
mod lora;
mod pickle;
mod tensors;
mod tokens;
mod virtual_tokens;

pub use convert::convert;
pub use encode::{EncodeMeta, encode, for_peft};
pub use folder::read_folder;

use std::sync::Arc;

use serde_json::Value;

use crate::{
    admission::params::ServeError,
    delta::{Delta, DeltaFiles, DeltaSpec, Head, Patch, Problem, SiteId, Task},
    ids::BaseFingerprint,
    model::Base,
};
use tensors::TensorFile;

/// Names of the configuration file, in the order tried.
const CONFIGS: &[&str] = &["adapter_config.json", "bitfit_config.json"];
/// Names of the weights file, in the order tried.
const WEIGHTS: &[&str] = &["adapter_model.safetensors", "bitfit.safetensors", adapterhub::WEIGHTS];
/// Label names of a head, in index order.
const LABELS: &str = "labels.json";
/// Extensions of files that hold pickles.
const PICKLES: &[&str] = &[".bin", ".pt", ".pth", ".pkl", ".ckpt"];
/// Largest accepted configuration.
const MAX_CONFIG_BYTES: usize = 1 << 20;
pub use crate::admission::check::MAX_LABELS;

/// Why a delta's files were refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum InteropError {
    /// A file or field is wrong.
    #[error("{file}: {message}")]
    Invalid {
        /// Which file.
        file: String,
        /// What was wrong and what is accepted.
        message: String,
    },
    /// The delta belongs to another base.
    #[error("{0}")]
    BaseMismatch(String),
    /// A pickle.
    #[error(
        "{0} is a pickle, which runs code when it is read; `deltaserve deltas convert` writes the folder as safetensors \
         (or save it so: PEFT save_pretrained(safe_serialization=True), AdapterHub save_adapter(use_safetensors=True))"
    )]
    Pickle(String),
    /// Tensors that this server would not apply.
    #[error("tensors that would not be applied: {}{}", .0.iter().take(8).cloned().collect::<Vec<_>>().join(", "),
            if .0.len() > 8 { format!(" and {} more", .0.len() - 8) } else { String::new() })]
    Unapplied(Vec<String>),
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Tensor(String),
}

impl InteropError {
    fn invalid(file: &str, message: impl Into<String>) -> Self {
        Self::Invalid { file: file.into(), message: message.into() }
    }

    /// The same error of a part of a combination.
    fn in_part(self, part: &str) -> Self {
        match self {
            Self::Invalid { file, message } => Self::Invalid { file: format!("{part}.{file}"), message },
            Self::BaseMismatch(m) => Self::BaseMismatch(format!("{part}: {m}")),
            Self::Pickle(file) => Self::Pickle(format!("{part}.{file}")),
            Self::Unapplied(all) => Self::Unapplied(all.into_iter().map(|name| format!("{part}: {name}")).collect()),
            Self::Tensor(m) => Self::Tensor(m),
        }
    }
}

impl From<candle_core::Error> for InteropError {
    fn from(e: candle_core::Error) -> Self {
        Self::Tensor(e.to_string())
    }
}

impl From<InteropError> for ServeError {
    fn from(e: InteropError) -> Self {
        match &e {
            InteropError::Invalid { file, message } => Self::field(format!("files[{file}]"), message.clone()),
            InteropError::BaseMismatch(m) => Self::BaseMismatch(m.clone()),
            InteropError::Pickle(f) => Self::field(format!("files[{f}]"), e.to_string()),
            InteropError::Unapplied(_) => Self::field(format!("files[{}]", WEIGHTS[0]), e.to_string()),
            InteropError::Tensor(m) => Self::Internal(m.clone()),
        }
    }
}

/// What decoders collect.
#[derive(Default)]
struct Parts {
    patches: Vec<(SiteId, Patch)>,
    head: Option<Head>,
    methods: Vec<String>,
    /// Label names that came with the head.
    labels: Option<Vec<String>>,
    /// How the head's outputs are read, where its files say so.
    problem: Option<Problem>,
    /// Numbers of further files.
    more_elements: u64,
    /// Tokens that call it.
    invocation: Option<Arc<[u32]>>,
}

impl Parts {
    /// Adds the patch that the tensor `name` gives, where there is none of another name.
    fn add(&mut self, site: SiteId, patch: Patch, name: &str, file: &TensorFile<'_>) -> Result<(), InteropError> {
        if self.patches.iter().any(|(s, _)| *s == site) {
            return Err(InteropError::invalid(file.file(), format!("{name} is there under another name, too")));
        }
        self.patches.push((site, patch));
        Ok(())
    }
}

/// Reads a version's files into a delta for this base.
///
/// # Errors
/// [`InteropError`] names the file, field or tensor.
pub fn decode(files: &DeltaFiles, base: &Base) -> Result<Delta, InteropError> {
    let delta = if files.files.contains_key(container::INDEX) {
        container::decode(files, base, single)?
    } else {
        single(files, base)?
    };
    check::order(&delta, base)?;
    Ok(delta)
}

/// Reads one folder.
fn single(files: &DeltaFiles, base: &Base) -> Result<Delta, InteropError> {
    folder::check(files)?;
    let (config_name, config) = config_of(files)?;
    let (weights_name, weights) = find(files, WEIGHTS).ok_or_else(|| missing(files, WEIGHTS[0]))?;
    let tensors = TensorFile::read(weights_name, weights)?;
    check_fingerprint(&tensors, base)?;
    let (mut parts, task) = decode_parts(config_name, &config, &tensors, base)?;
    if let Some(head) = &mut parts.head {
        check::head_layers(weights_name, head, task, base)?;
    }
    let head_task = adapterhub::decode_head(files, &mut parts, base)?;
    let task = match (task.or(head_task), &parts.head) {
        (Some(task), _) => task,
        (None, Some(_)) => Task::SeqCls,
        (None, None) if base.transformer.has_head() => base.arch.head.as_ref().map_or(Task::Feature, |h| h.task),
        (None, None) if base.arch.is_encoder_decoder() => Task::Seq2Seq,
        (None, None) if base.arch.is_causal() => Task::CausalLm,
        (None, None) => Task::Feature,
    };
    let labels = labels(files, &tensors, &parts, base, task)?;
    let parameters = tensors.elements() + parts.more_elements;
    let problem = problem(config_name, &config, &parts, base, task)?;
    let mut methods = parts.methods;
    methods.extend(parts.head.as_ref().map(|_| "head".to_owned()));
    let spec = DeltaSpec { methods, task, problem, labels, num_virtual_tokens: 0, parameters, resident_bytes: 0 };
    let delta = Delta::new(spec, parts.patches, parts.head).invoked_by(parts.invocation);
    check::applicable(&delta, base)?;
    check::activated(config_name, &delta, base)?;
    Ok(delta)
}

/// The patches (and head) of one configuration and its tensors, and the task that the configuration names.
fn decode_parts(
    file: &str,
    config: &Value,
    tensors: &TensorFile<'_>,
    base: &Base,
) -> Result<(Parts, Option<Task>), InteropError> {
    if adapterhub::is_config(config) {
        return Ok((adapterhub::decode(file, config, tensors, base)?, None));
    }
    let kind = config::kind(file, config)?;
    let task = config::task(file, config, base)?;
    let invocation = config::invocation(file, config, base)?;
    if invocation.is_some() && kind != "LORA" {
        let message = format!("alora_invocation_tokens are for peft_type \"LORA\", not {kind:?}");
        return Err(InteropError::invalid(file, message));
    }
    let mut parts = match kind.as_str() {
        "LORA" => lora::decode(file, config, tensors, base)?,
        "BITFIT" => bitfit::decode(tensors, base)?,
        "IA3" => ia3::decode(tensors, base)?,
        "LN_TUNING" => ln_tuning::decode(tensors, base)?,
        "TRAINABLE_TOKENS" => tokens::decode(file, config, tensors, base)?,
        "PREFIX_TUNING" | "PROMPT_TUNING" | "P_TUNING" => virtual_tokens::decode(file, &kind, config, tensors, base)?,
        other => {
            return Err(InteropError::invalid(
                file,
                format!("peft_type {other:?} is not supported; supported are {}", config::KINDS.join(", ")),
            ));
        }
    };
    if invocation.is_some() {
        parts.methods.iter_mut().filter(|method| *method == "lora").for_each(|method| *method = "alora".into());
    }
    parts.invocation = invocation;
    Ok((parts, task))
}

/// The first of these names that is among the files.
fn find<'a>(files: &'a DeltaFiles, names: &[&'static str]) -> Option<(&'static str, &'a bytes::Bytes)> {
    names.iter().find_map(|n| files.files.get(*n).map(|b| (*n, b)))
}

fn config_of(files: &DeltaFiles) -> Result<(&'static str, Value), InteropError> {
    let Some((name, data)) = find(files, CONFIGS) else {
        return Err(InteropError::invalid(CONFIGS[0], "is missing"));
    };
    Ok((name, json_file(name, data)?))
}

/// A JSON object of bounded size.
fn json_file(name: &str, data: &[u8]) -> Result<Value, InteropError> {
    if data.len() > MAX_CONFIG_BYTES {
        return Err(InteropError::invalid(name, format!("is {} bytes; at most {MAX_CONFIG_BYTES}", data.len())));
    }
    let value: Value = serde_json::from_slice(data).map_err(|e| InteropError::invalid(name, e.to_string()))?;
    if value.is_object() { Ok(value) } else { Err(InteropError::invalid(name, "is not a JSON object")) }
}

/// A file that is not there: because it was pickled, perhaps.
fn missing(files: &DeltaFiles, wanted: &str) -> InteropError {
    match files.files.keys().find(|name| PICKLES.iter().any(|p| name.ends_with(p))) {
        Some(pickle) => InteropError::Pickle(pickle.clone()),
        None => InteropError::invalid(wanted, "is missing"),
    }
}

/// Files that deltaserve wrote say which base they are for.
fn check_fingerprint(tensors: &TensorFile<'_>, base: &Base) -> Result<(), InteropError> {
    let Some(want) = tensors.metadata("deltaserve.base_fingerprint") else { return Ok(()) };
    match want.parse::<BaseFingerprint>() {
        Ok(fingerprint) if fingerprint == base.fingerprint => Ok(()),
        Ok(other) => Err(InteropError::BaseMismatch(format!(
            "it was trained on base {}, this server's base is {}",
            other.short(),
            base.fingerprint.short()
        ))),
        Err(e) => Err(InteropError::invalid(WEIGHTS[0], format!("metadata deltaserve.base_fingerprint {e}"))),
    }
}

/// How a text head's outputs are read: what the files say, else as Hugging Face does: one output is a number. Without a
/// head of its own, as the base's.
fn problem(file: &str, config: &Value, parts: &Parts, base: &Base, task: Task) -> Result<Problem, InteropError> {
    let bad = |message: String| InteropError::invalid(file, message);
    let said =
        match config.get("problem_type") {
            None | Some(Value::Null) => parts.problem,
            Some(value) => {
                let known = value.as_str().and_then(Problem::from_name);
                Some(known.ok_or_else(|| {
                    bad(format!("problem_type is {value}; accepted are {}", Problem::NAMES.join(", ")))
                })?)
            }
        };
    let own = parts.head.as_ref().map(|head| head.weight.dims()[0]);
    let of_base = base.arch.head.as_ref().filter(|head| head.task == Task::SeqCls);
    let outputs = own.or(of_base.map(|head| head.labels.len()));
    match said {
        Some(problem) if task != Task::SeqCls && problem != Problem::SingleLabel => {
            Err(bad(format!("problem_type is {}, which is for SEQ_CLS, not {}", problem.as_str(), task.as_str())))
        }
        Some(Problem::Regression) if outputs.is_some_and(|n| n != 1) => {
            Err(bad(format!("problem_type is regression, but the head has {} outputs", outputs.unwrap_or_default())))
        }
        Some(problem) => Ok(problem),
        None if task != Task::SeqCls => Ok(Problem::SingleLabel),
        None => Ok(match (own, of_base) {
            (Some(1), _) => Problem::Regression,
            (None, Some(head)) => head.problem,
            (Some(_), _) | (None, None) => Problem::SingleLabel,
        }),
    }
}

/// Label names: `labels.json`, else the file's metadata, else the base's own, else `LABEL_i`.
fn labels(
    files: &DeltaFiles,
    tensors: &TensorFile<'_>,
    parts: &Parts,
    base: &Base,
    task: Task,
) -> Result<Vec<String>, InteropError> {
    let Some(head) = &parts.head else {
        if files.files.contains_key(LABELS) {
            return Err(InteropError::invalid(LABELS, "names labels, but no head is in the files"));
        }
        let own = base.arch.head.as_ref().filter(|h| h.task == task && base.transformer.has_head());
        return Ok(own.map(|h| h.labels.clone()).unwrap_or_default());
    };
    let n = head.weight.dims()[0];
    if let Some(data) = files.files.get(LABELS) {
        return label_names(LABELS, data, n);
    }
    if let Some(text) = tensors.metadata("deltaserve.labels") {
        return label_names(WEIGHTS[0], text.as_bytes(), n);
    }
    if let Some(names) = &parts.labels {
        return Ok(names.clone());
    }
    match &base.arch.head {
        Some(own) if own.labels.len() == n => Ok(own.labels.clone()),
        _ => Ok((0..n).map(|i| format!("LABEL_{i}")).collect()),
    }
}

/// A JSON list of `n` distinct names.
fn label_names(file: &str, data: &[u8], n: usize) -> Result<Vec<String>, InteropError> {
    let names: Vec<String> =
        serde_json::from_slice(data).map_err(|e| InteropError::invalid(file, format!("not a list of names: {e}")))?;
    if names.len() != n {
        return Err(InteropError::invalid(file, format!("{} names for a head of {n} labels", names.len())));
    }
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort();
    match sorted.windows(2).find(|w| w[0] == w[1]) {
        Some(twice) => Err(InteropError::invalid(file, format!("label {:?} appears twice", twice[0]))),
        None => Ok(names),
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
