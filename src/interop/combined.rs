//! Combinations that no library's format holds: the parts' own configurations in a list, and their tensors under
//! `part.<i>.`; a head keeps PEFT's key. Parts are applied in order.

use serde_json::Value;

use super::{
    InteropError, Parts, bitfit, decode_parts,
    keys::{self, HeadParts, Owner},
    tensors::TensorFile,
};
use crate::model::Base;

/// Our `peft_type`.
pub(super) const KIND: &str = "COMBINED";
/// Most parts.
const MAX_PARTS: usize = 16;

/// What a part's tensors are called before their own names.
pub(super) fn prefix(part: usize) -> String {
    format!("part.{part}.")
}

pub(super) fn decode(file: &str, config: &Value, tensors: &TensorFile<'_>, base: &Base) -> Result<Parts, InteropError> {
    let bad = |m: String| InteropError::invalid(file, m);
    let list = config.get("parts").and_then(Value::as_array).ok_or_else(|| bad("parts is not a list".into()))?;
    if list.is_empty() || list.len() > MAX_PARTS {
        return Err(bad(format!("parts has {} entries; 1 to {MAX_PARTS} are accepted", list.len())));
    }
    let mut all = Parts::default();
    let mut head: HeadParts = (None, None);
    let mut left = Vec::new();
    for name in tensors.names() {
        if (0..list.len()).any(|i| name.starts_with(&prefix(i))) {
            continue;
        }
        match (keys::owner(keys::split(&name).0, base), keys::split(&name).1) {
            (Some(Owner::Head), "weight") => head.0 = Some(tensors.get(&name)?),
            (Some(Owner::Head), "bias") => head.1 = Some(tensors.get(&name)?),
            _ => left.push(name),
        }
    }
    if !left.is_empty() {
        return Err(InteropError::Unapplied(left));
    }
    for (i, part) in list.iter().enumerate() {
        if part.get("peft_type").and_then(Value::as_str) == Some(KIND) {
            return Err(bad(format!("parts[{i}] is a combination itself")));
        }
        let (own, _) = decode_parts(&format!("{file} parts[{i}]"), part, &tensors.part(&prefix(i)), base)?;
        if own.head.is_some() {
            return Err(bad(format!("parts[{i}] has a head; a combination's head is beside its parts")));
        }
        all.patches.extend(own.patches);
        all.methods.extend(own.methods);
    }
    all.head = bitfit::head(head, base)?;
    Ok(all)
}
