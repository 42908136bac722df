//! Combinations: several methods in one version, each part in its own library's folder form.
//!
//! `delta.json` lists the parts in order of application, `{"format": "deltaserve.combination", "version": 1, "parts":
//! ["part0", "part1"]}`; the files of part `p` are named `p.<file name in its folder>`. One part may bring a head; label
//! names are in `labels.json` beside `delta.json`, or with the part that brings the head. A part can be taken out and
//! loaded by its library.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{InteropError, LABELS, MAX_CONFIG_BYTES, adapterhub, folder, label_names};
use crate::{
    delta::{Delta, DeltaFiles, Patch, Site, SiteId},
    model::Base,
};

/// Lists the parts.
pub(super) const INDEX: &str = "delta.json";
const FORMAT: &str = "deltaserve.combination";
/// Most parts.
const MAX_PARTS: usize = 16;
/// Most bytes that parts may come to beyond those of their files (16-bit numbers become twice as many): networks and
/// factors in a part may make large products of small files, and each part has that limit for itself.
const MAX_MADE_BYTES: u64 = 1 << 30;

/// Reads a combination; `one` reads a part.
///
/// # Errors
/// A bad index, files that belong to no part, parts that contradict each other, and those of the parts.
pub(super) fn decode(
    files: &DeltaFiles,
    base: &Base,
    one: impl Fn(&DeltaFiles, &Base) -> Result<Delta, InteropError>,
) -> Result<Delta, InteropError> {
    decode_within(MAX_MADE_BYTES, files, base, one)
}

fn decode_within(
    made: u64,
    files: &DeltaFiles,
    base: &Base,
    one: impl Fn(&DeltaFiles, &Base) -> Result<Delta, InteropError>,
) -> Result<Delta, InteropError> {
    let names = index(files)?;
    let mut parts: BTreeMap<&str, DeltaFiles> = names.iter().map(|n| (n.as_str(), DeltaFiles::default())).collect();
    let mut strangers = Vec::new();
    for (file, data) in &files.files {
        let own = names.iter().find_map(|n| Some((n, file.strip_prefix(n.as_str())?.strip_prefix('.')?)));
        match own {
            Some((part, name)) if name != INDEX => {
                if let Some(part) = parts.get_mut(part.as_str()) {
                    part.files.insert(name.to_owned(), data.clone());
                }
            }
            None if matches!(file.as_str(), INDEX | LABELS | folder::README) => {}
            _ => strangers.push(file.clone()),
        }
    }
    if let Some(file) = strangers.first() {
        return Err(InteropError::invalid(file, format!("belongs to no part; {INDEX} lists {}", names.join(", "))));
    }
    let mut deltas = Vec::with_capacity(names.len());
    let mut says_task = Vec::with_capacity(names.len());
    let most = 2 * files.files.values().map(|data| data.len() as u64).sum::<u64>() + made;
    let mut bytes = 0;
    for name in &names {
        let part = parts.remove(name.as_str()).unwrap_or_default();
        if part.files.is_empty() {
            return Err(InteropError::invalid(INDEX, format!("part {name:?} has no files")));
        }
        says_task.push(!adapterhub::is_without_head(&part));
        let mut delta = one(&part, base).map_err(|e| e.in_part(name))?;
        if let (Some(head), Some(data)) = (delta.head(), files.files.get(LABELS)) {
            delta.spec.labels = label_names(LABELS, data, head.weight.dims()[0])?;
        }
        bytes += delta.bytes();
        if bytes > most {
            let message = format!("parts up to {name:?} come to {bytes} bytes in memory; {most} are accepted");
            return Err(InteropError::invalid(INDEX, message));
        }
        deltas.push(delta);
    }
    join(deltas, &names, &says_task, base)
}

/// The names of the parts, in order.
///
/// # Errors
/// An index that is missing, malformed, or whose names could be taken for another file's.
pub(super) fn index(files: &DeltaFiles) -> Result<Vec<String>, InteropError> {
    let bad = |m: String| InteropError::invalid(INDEX, m);
    let data = files.files.get(INDEX).ok_or_else(|| bad("is missing".into()))?;
    if data.len() > MAX_CONFIG_BYTES {
        return Err(bad(format!("is {} bytes; at most {MAX_CONFIG_BYTES}", data.len())));
    }
    let value: Value = serde_json::from_slice(data).map_err(|e| bad(e.to_string()))?;
    if value["format"] != FORMAT || value["version"] != 1 {
        return Err(bad(format!(
            "format {}, version {}; accepted is {FORMAT:?}, version 1",
            value["format"], value["version"]
        )));
    }
    let parts = value["parts"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !(1..=MAX_PARTS).contains(&parts.len()) {
        return Err(bad(format!("parts: {} entries; accepted are 1 to {MAX_PARTS}", parts.len())));
    }
    let mut names = Vec::with_capacity(parts.len());
    for part in parts {
        let plain =
            |n: &&str| !n.is_empty() && n.len() <= 32 && n.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let name = part.as_str().filter(plain);
        let name = name.ok_or_else(|| bad(format!("parts: {part}; accepted are names of letters, digits and _")))?;
        names.push(name.to_owned());
    }
    if names.iter().collect::<BTreeSet<_>>().len() < names.len() {
        return Err(bad("parts: a name appears twice".into()));
    }
    Ok(names)
}

/// Puts parts together, in order of application. Parts whose files say no task take that of the others.
fn join(parts: Vec<Delta>, names: &[String], says_task: &[bool], base: &Base) -> Result<Delta, InteropError> {
    let bad = |m: String| InteropError::invalid(INDEX, m);
    if let Some(i) = parts.iter().position(|part| part.invocation().is_some()) {
        let message =
            format!("part {} has alora_invocation_tokens; an activated LoRA goes without other parts", names[i]);
        return Err(bad(message));
    }
    let headed: Vec<usize> = (0..parts.len()).filter(|&i| parts[i].head().is_some()).collect();
    if let [first, second, ..] = headed[..] {
        return Err(bad(format!("parts {} and {} both bring a head; one may", names[first], names[second])));
    }
    let leading = headed.first().copied().or(says_task.iter().position(|s| *s)).unwrap_or(0);
    let Some(lead) = parts.get(leading) else { return Err(bad("has no parts".into())) };
    let (mut spec, head) = (lead.spec.clone(), lead.head().cloned());
    if let Some(other) = (0..parts.len()).find(|&i| says_task[i] && parts[i].spec.task != spec.task) {
        let (a, b) = (spec.task.as_str(), parts[other].spec.task.as_str());
        return Err(bad(format!("part {} is for {a}, part {} for {b}", names[leading], names[other])));
    }
    spec.methods = Vec::new();
    spec.parameters = 0;
    let mut patches = Vec::new();
    for part in &parts {
        spec.parameters += part.spec.parameters;
        for method in part.spec.methods.iter().filter(|m| *m != "head") {
            if !spec.methods.contains(method) {
                spec.methods.push(method.clone());
            }
        }
        patches.extend(part.patches().iter().cloned());
    }
    spec.methods.extend(head.iter().map(|_| "head".to_owned()));
    check_positions(&patches, base).map_err(bad)?;
    Ok(Delta::new(spec, patches, head))
}

/// One prompt and one prefix at most.
fn check_positions(patches: &[(SiteId, Patch)], base: &Base) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for (site, patch) in patches.iter().filter(|(_, p)| p.adds_positions()) {
        if !seen.insert(*site) {
            let what = match base.sites.get(*site).map(|e| e.site) {
                Some(Site::Embedding) => "prompts".to_owned(),
                Some(Site::KeyValue { layer, .. }) => format!("prefixes (layer {layer})"),
                other => format!("{other:?}"),
            };
            let n = patch.tensors().first().map_or(0, |(_, t)| t.dims()[0]);
            return Err(format!("two parts bring {what}, the second of {n} virtual tokens; one may"));
        }
    }
    Ok(())
}

/// Puts the folders of parts together, in order of application.
///
/// # Errors
/// More parts than are read again.
pub(super) fn encode(parts: Vec<DeltaFiles>) -> Result<DeltaFiles, InteropError> {
    if parts.len() > MAX_PARTS {
        return Err(InteropError::Unapplied(vec![format!("a combination of {} parts", parts.len())]));
    }
    let mut out = DeltaFiles::default();
    let names: Vec<String> = (0..parts.len()).map(|i| format!("part{i}")).collect();
    for (part, name) in parts.into_iter().zip(&names) {
        for (file, data) in part.files {
            out.files.insert(format!("{name}.{file}"), data);
        }
    }
    let index = json!({ "format": FORMAT, "parts": names, "version": 1 });
    let text = serde_json::to_vec_pretty(&index).map_err(|e| InteropError::Tensor(e.to_string()))?;
    out.files.insert(INDEX.to_owned(), text.into());
    Ok(out)
}

#[cfg(test)]
mod tests;
