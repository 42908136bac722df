//! Trainable tokens: replaced rows of the embedding (PEFT's TRAINABLE_TOKENS, and `trainable_token_indices` of LoRA).

use std::collections::HashSet;

use candle_core::Tensor;
use serde_json::Value;

use super::{
    InteropError, Parts,
    head::HeadTensors,
    keys::{self, Owner},
    tensors::TensorFile,
};
use crate::{
    delta::{Patch, Site, SiteId, TokenRows},
    model::Base,
};

/// Most tokens with rows of their own.
const MAX_TOKENS: usize = 10_000;

pub(super) fn decode(file: &str, config: &Value, tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let mut parts = Parts::default();
    let mut head = HeadTensors::default();
    let (mut left, mut applied) = (Vec::new(), 0);
    for name in tensors.names() {
        let (path, kind) = keys::split(&name);
        match (keys::owner(path, base), kind) {
            (Some(Owner::Head(part)), "weight" | "bias") => head.take(part, &name, tensors.get(&name)?)?,
            (Some(Owner::Site(site, path)), "trainable_tokens_delta") => {
                let ids = indices(file, "token_indices", config.get("token_indices"), &path, base)?;
                for (site, patch) in patches(file, site, &path, ids, tensors.get(&name)?, base)? {
                    parts.add(site, patch, &name, tensors)?;
                }
            }
            _ => {
                left.push(name);
                continue;
            }
        }
        applied += 1;
    }
    if !left.is_empty() {
        return Err(keys::unapplied(left, applied, base));
    }
    if !parts.patches.is_empty() {
        parts.methods.push("tokens".into());
    }
    parts.head = head.build(base)?;
    Ok(parts)
}

/// The token ids of a module: a list, or an object of lists by module name.
pub(super) fn indices(
    file: &str,
    key: &str,
    value: Option<&Value>,
    path: &str,
    base: &Base,
) -> Result<Vec<u32>, InteropError> {
    let bad = |m: String| InteropError::invalid(file, m);
    let list = match value {
        Some(Value::Array(list)) => list,
        Some(Value::Object(map)) => map
            .iter()
            .find(|(name, _)| path == *name || path.ends_with(&format!(".{name}")))
            .and_then(|(_, v)| v.as_array())
            .ok_or_else(|| bad(format!("{key} has no list for {path}")))?,
        _ => return Err(bad(format!("{key} is missing or not a list, and {path} has trained rows"))),
    };
    if !(1..=MAX_TOKENS).contains(&list.len()) {
        return Err(bad(format!("{key} has {} tokens; 1 to {MAX_TOKENS} are accepted", list.len())));
    }
    let mut ids = Vec::with_capacity(list.len());
    let mut seen = HashSet::with_capacity(list.len());
    for v in list {
        let id = v.as_u64().filter(|id| (*id as usize) < base.arch.vocab);
        let id = id.ok_or_else(|| bad(format!("{key}: {v} is no token of a vocabulary of {}", base.arch.vocab)))?;
        if !seen.insert(id) {
            return Err(bad(format!("{key}: token {id} is there twice")));
        }
        ids.push(id as u32);
    }
    Ok(ids)
}

/// Rows of the embedding (and of the head, if it is tied to it), or of the head alone.
pub(super) fn patches(
    file: &str,
    site: SiteId,
    path: &str,
    ids: Vec<u32>,
    rows: Tensor,
    base: &Base,
) -> Result<Vec<(SiteId, Patch)>, InteropError> {
    let kind = base.sites.get(site).map(|e| e.site);
    if !matches!(kind, Some(Site::Embedding | Site::LmHead)) {
        return Err(InteropError::Unapplied(vec![format!("{path}.trainable_tokens_delta")]));
    }
    let hidden = base.arch.hidden;
    if rows.dims() != [ids.len(), hidden] {
        return Err(InteropError::invalid(
            file,
            format!("{path}: rows of shape {:?} for {} tokens of width {hidden}", rows.dims(), ids.len()),
        ));
    }
    let rows = rows.to_device(&base.device)?.to_dtype(base.dtype)?;
    let own = own_rows(site, &ids, base)?;
    let patch = |own: Tensor| Patch::TokenRows(TokenRows { ids: ids.clone(), rows: rows.clone(), base: own });
    let mut out = vec![(site, patch(own.clone()))];
    if kind == Some(Site::Embedding)
        && let Some(head) = tied_head(base)
    {
        out.push((head, patch(own)));
    }
    Ok(out)
}

/// The language-model head's site, if it shares the embedding table.
pub(super) fn tied_head(base: &Base) -> Option<SiteId> {
    base.sites.id(Site::LmHead).filter(|_| base.arch.tied_head)
}

/// The base's rows of these tokens, `[ids, hidden]`.
fn own_rows(site: SiteId, ids: &[u32], base: &Base) -> Result<Tensor, InteropError> {
    Ok(match base.linear(site)? {
        Some((w, _)) => w.index_select(&Tensor::new(ids, w.device())?, 1)?.t()?.contiguous()?,
        None => base.table_rows(ids)?,
    })
}
