//! Tensor names in delta files: `base_model.model.` + module path + suffix.

use candle_core::Tensor;

use super::InteropError;
use crate::{
    delta::{Site, SiteId},
    model::Base,
};

const PEFT_PREFIX: &str = "base_model.model.";
/// What PEFT puts before a head that it saves with a prompt or prefix.
const PEFT_PROMPT_PREFIX: &str = "base_model.";

/// What a key belongs to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A site; with the module path as PEFT sees it (for patterns).
    Site(SiteId, String),
    /// A layer of the classification head.
    Head(HeadPart),
}

/// A layer of a classification head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeadPart {
    /// The first of two.
    Inner,
    /// The second of two.
    Out,
    /// The one that gives the labels, under the name that it has alone (DistilBERT: also behind another).
    Only,
}

/// Finds a module by its path with or without PEFT's and the family's prefix.
pub(super) fn owner(module: &str, base: &Base) -> Option<Owner> {
    let names = &base.arch.names;
    let path = module.strip_prefix(PEFT_PREFIX).unwrap_or(module);
    let head = path.strip_prefix(PEFT_PROMPT_PREFIX).unwrap_or(path);
    if !head.is_empty() && [names.cls_head, names.tag_head].contains(&head) {
        return Some(Owner::Head(HeadPart::Only));
    }
    match names.cls_inner {
        Some(inner) if head == inner.dense => return Some(Owner::Head(HeadPart::Inner)),
        Some(inner) if head == inner.out => return Some(Owner::Head(HeadPart::Out)),
        _ => {}
    }
    let bare = path.strip_prefix(names.prefix).unwrap_or(path);
    base.sites.by_module(bare).map(|site| Owner::Site(site, path.to_owned()))
}

/// The path under which PEFT saves a site's module: with the family's prefix unless the bare model was wrapped.
pub(super) fn peft_path(module: &str, base: &Base, wrapped_bare: bool) -> String {
    let names = &base.arch.names;
    let prefix = if wrapped_bare || module == names.lm_head { "" } else { names.prefix };
    format!("{prefix}{module}")
}

/// The full key of a module.
pub(super) fn key(path: &str) -> String {
    format!("{PEFT_PREFIX}{path}")
}

/// The full key of a head that is saved with a prompt or prefix.
pub(super) fn prompt_head_key(path: &str) -> String {
    format!("{PEFT_PROMPT_PREFIX}{path}")
}

/// A head or site tensor's key parts: module and suffix (`weight`, `bias`).
pub(super) fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or((key, ""))
}

/// Puts a tensor into its place.
///
/// # Errors
/// A place that another name filled: one of the two would be lost.
pub(super) fn once(place: &mut Option<Tensor>, tensor: Tensor, name: &str, file: &str) -> Result<(), InteropError> {
    match place.replace(tensor) {
        Some(_) => Err(InteropError::invalid(file, format!("{name} is there under another name, too"))),
        None => Ok(()),
    }
}

/// Checks that a tensor is `[n]`, nothing that only counts right.
///
/// # Errors
/// Another rank is malformed, another length another base's.
pub(super) fn vector(name: &str, t: &Tensor, n: usize, base: &Base) -> Result<(), InteropError> {
    match *t.dims() {
        [own] if own == n => Ok(()),
        [own] => Err(InteropError::BaseMismatch(format!(
            "{name} has {own} numbers, this server's base {} has {n} outputs there",
            base.fingerprint.short()
        ))),
        _ => Err(InteropError::invalid(super::WEIGHTS[0], format!("{name} is {:?}; [{n}] is accepted", t.dims()))),
    }
}

/// An error for keys that found no owner: another family if none at all did.
pub(super) fn unapplied(left: Vec<String>, applied: usize, base: &Base) -> InteropError {
    match left.first() {
        Some(first) if applied == 0 => InteropError::BaseMismatch(format!(
            "none of its tensors (e.g. {first}) is a module of this server's base, a {} of {} layers, hidden size {} \
             (fingerprint {})",
            base.arch.model_type,
            base.arch.layers,
            base.arch.hidden,
            base.fingerprint.short()
        )),
        _ => InteropError::Unapplied(left),
    }
}

/// Whether a module's matrix lies `[in, out]` in files, as GPT-2's Conv1D keeps it; its head is a linear like others.
pub(super) fn is_conv1d(site: SiteId, base: &Base) -> bool {
    base.arch.conv1d && is_linear(site, base) && base.sites.get(site).is_some_and(|e| e.site != Site::LmHead)
}

/// Whether a site is a linear map; its weight is not touched.
pub(super) fn is_linear(site: SiteId, base: &Base) -> bool {
    let kind = base.sites.get(site).map(|e| e.site);
    matches!(kind, Some(Site::Linear { .. } | Site::Pooler | Site::LmHead))
}
