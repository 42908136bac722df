//! Tensor names in delta files: `base_model.model.` + module path + suffix.

use crate::{delta::SiteId, model::Base};

const PEFT_PREFIX: &str = "base_model.model.";

/// What a key belongs to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A site; with the module path as PEFT sees it (for patterns).
    Site(SiteId, String),
    /// The classification head.
    Head,
}

/// Finds a module by its path with or without PEFT's and the family's prefix.
pub(super) fn owner(module: &str, base: &Base) -> Option<Owner> {
    let names = &base.arch.names;
    let path = module.strip_prefix(PEFT_PREFIX).unwrap_or(module);
    if path == names.cls_head {
        return Some(Owner::Head);
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

/// A head or site tensor's key parts: module and suffix (`weight`, `bias`).
pub(super) fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or((key, ""))
}

/// Head tensors among others: (weight, bias) as they were found.
pub(super) type HeadParts = (Option<candle_core::Tensor>, Option<candle_core::Tensor>);

/// An error for keys that found no owner: another family if none at all did.
pub(super) fn unapplied(left: Vec<String>, applied: usize, base: &Base) -> super::InteropError {
    match left.first() {
        Some(first) if applied == 0 => super::InteropError::BaseMismatch(format!(
            "none of its tensors (e.g. {first}) is a module of this server's base, a {} of {} layers, hidden size {} \
             (fingerprint {})",
            base.arch.model_type,
            base.arch.layers,
            base.arch.hidden,
            base.fingerprint.short()
        )),
        _ => super::InteropError::Unapplied(left),
    }
}
