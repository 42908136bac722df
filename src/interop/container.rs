//! Combinations: several methods in one version, each part in its own library's folder form.
//!
//! `delta.json` lists the parts in order of application, `{"format": "deltaserve.combination", "version": 1, "parts":
//! ["part0", "part1"]}`; the files of part `p` are named `p.<file name in its folder>`. One part may bring a head; label
//! names are in `labels.json` beside `delta.json`, or with the part that brings the head. A part can be taken out and
//! loaded by its library.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{EncodeMeta, InteropError, MAX_CONFIG_BYTES, adapterhub};
use crate::{
    delta::{Delta, DeltaFiles, HeadPool, Patch, PrefixForm, PromptStage, Site, SiteId, Task},
    model::Base,
};

/// Lists the parts.
pub(super) const INDEX: &str = "delta.json";
const FORMAT: &str = "deltaserve.combination";
const LABELS: &str = "labels.json";
/// Most parts.
const MAX_PARTS: usize = 16;

/// Reads a combination; `one` reads a part.
///
/// # Errors
/// A bad index, files that belong to no part, parts that contradict each other, and those of the parts.
pub(super) fn decode(
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
            None if matches!(file.as_str(), INDEX | LABELS) || file.ends_with(".md") => {}
            _ => strangers.push(file.clone()),
        }
    }
    if let Some(file) = strangers.first() {
        return Err(InteropError::invalid(file, format!("belongs to no part; {INDEX} lists {}", names.join(", "))));
    }
    let mut deltas = Vec::with_capacity(names.len());
    let mut says_task = Vec::with_capacity(names.len());
    for name in &names {
        let mut part = parts.remove(name.as_str()).unwrap_or_default();
        if part.files.is_empty() {
            return Err(InteropError::invalid(INDEX, format!("part {name:?} has no files")));
        }
        says_task.push(!adapterhub::is_without_head(&part));
        let has_head = |d: &Delta| d.head().is_some();
        let mut delta = one(&part, base).map_err(|e| e.in_part(name))?;
        if let (true, Some(labels)) = (has_head(&delta), files.files.get(LABELS)) {
            part.files.insert(LABELS.to_owned(), labels.clone());
            delta = one(&part, base).map_err(|e| e.in_part(name))?;
        }
        deltas.push(delta);
    }
    join(deltas, &names, &says_task, base)
}

fn index(files: &DeltaFiles) -> Result<Vec<String>, InteropError> {
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
pub(super) fn check_positions(patches: &[(SiteId, Patch)], base: &Base) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for (site, patch) in patches.iter().filter(|(_, p)| p.adds_positions()) {
        if !seen.insert(*site) {
            let what = match base.sites.get(*site).map(|e| e.site) {
                Some(Site::Embedding) => "prompts".to_owned(),
                Some(Site::KeyValue { layer }) => format!("prefixes (layer {layer})"),
                other => format!("{other:?}"),
            };
            let n = patch.tensors().first().map_or(0, |(_, t)| t.dims()[0]);
            return Err(format!("two parts bring {what}, the second of {n} virtual tokens; one may"));
        }
    }
    Ok(())
}

/// Writes a delta of several kinds of patches: `split` gives its parts, `one` writes a part.
///
/// # Errors
/// Those of the parts.
pub(super) fn encode(
    parts: &[Delta],
    base: &Base,
    meta: &EncodeMeta,
    one: impl Fn(&Delta, &Base, &EncodeMeta) -> Result<DeltaFiles, InteropError>,
) -> Result<DeltaFiles, InteropError> {
    let mut out = DeltaFiles::default();
    let names: Vec<String> = (0..parts.len()).map(|i| format!("part{i}")).collect();
    for (part, name) in parts.iter().zip(&names) {
        for (file, data) in one(part, base, meta)?.files {
            out.files.insert(format!("{name}.{file}"), data);
        }
    }
    let index = json!({ "format": FORMAT, "parts": names, "version": 1 });
    let text = serde_json::to_vec_pretty(&index).map_err(|e| InteropError::Tensor(e.to_string()))?;
    out.files.insert(INDEX.to_owned(), text.into());
    Ok(out)
}

/// A delta as parts that each have a folder form of their own: patches of rows, the prompt, the prefix; the head goes with
/// the last that can hold it. One part where it has one form.
pub(super) fn split(delta: &Delta) -> Vec<Delta> {
    let group = |patch: &Patch| match patch {
        Patch::Prompt(_) => 1,
        Patch::Prefix(_) => 2,
        _ => 0,
    };
    let mut groups: BTreeMap<u8, Vec<(SiteId, Patch)>> = BTreeMap::new();
    for (site, patch) in delta.patches() {
        groups.entry(group(patch)).or_default().push((*site, patch.clone()));
    }
    // heads of more than one linear, or of another row, have a form in AdapterHub's folders only
    let hub = |patches: &[(SiteId, Patch)]| {
        patches.iter().all(|(_, p)| match p {
            Patch::Bottleneck(_) => true,
            Patch::Prompt(p) => p.stage == PromptStage::Hidden,
            Patch::Prefix(p) => p.form == PrefixForm::Pinned,
            _ => false,
        })
    };
    let plain = delta.head().is_none_or(|h| h.layers.is_empty() && h.pool == HeadPool::Base);
    let holder = groups.iter().rev().find(|(_, patches)| plain || hub(patches)).or(groups.iter().next_back());
    let holder = holder.map(|(of, _)| *of);
    let methods = |of: u8| -> Vec<String> {
        let kind = |m: &str| match m {
            "prompt" | "p_tuning" => 1,
            "prefix" => 2,
            _ => 0,
        };
        delta.spec.methods.iter().filter(|m| kind(m) == of && *m != "head").cloned().collect()
    };
    let part = |(of, patches): (u8, Vec<(SiteId, Patch)>)| {
        let head = delta.head().filter(|_| Some(of) == holder).cloned();
        let mut spec = delta.spec.clone();
        spec.methods = methods(of);
        spec.methods.extend(head.iter().map(|_| "head".to_owned()));
        if head.is_none() && !matches!(spec.task, Task::CausalLm | Task::Feature) {
            spec.labels.clear();
        }
        Delta::new(spec, patches, head)
    };
    groups.into_iter().map(part).collect()
}

#[cfg(test)]
mod tests;
