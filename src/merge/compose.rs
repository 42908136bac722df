//! The delta of a request that names several: the sum of their weighted updates, as one delta that takes one slot.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{MAX_RANK, MergeError, Pair, Source, cat, check_called, check_same_task, check_sum, kind, label};
use crate::delta::{Delta, DeltaSpec, Head, Patch, SiteId, SiteTable};

/// The weighted sum of what adds up: low-rank pairs side by side (exactly the sum of the updates), and biases. Anything
/// else comes from one delta of weight 1, where no other changes the same site. The sum is for what the owner of its head is for.
///
/// # Errors
/// A kind that has no weight, by name; two heads, prompts or prefixes; without a head, different tasks or labels; ranks that add
/// up to more than [`MAX_RANK`].
pub fn compose(sources: &[Source<'_>], sites: &SiteTable) -> Result<Delta, MergeError> {
    check_called(sources)?;
    let mut at: BTreeMap<SiteId, Vec<(&Source<'_>, &Patch)>> = BTreeMap::new();
    for source in sources {
        source.delta.patches().iter().for_each(|(site, p)| at.entry(*site).or_default().push((source, p)));
    }
    let mut patches = Vec::new();
    for (site, parts) in &at {
        match parts.iter().find(|(_, p)| !adds_up(p)) {
            Some((owner, patch)) => patches.extend(whole(owner, patch, parts, *site, sites)?),
            None => patches.extend(sum(parts, *site, sites)?.into_iter().map(|p| (*site, p))),
        }
    }
    check_positions(sources)?;
    let head = head(sources)?;
    if head.is_none() {
        check_same_task(sources)?;
    }
    let first = head.map(|(owner, _)| owner).or(sources.first());
    let Some(spec) = first.map(|s| &s.delta.spec) else {
        return Err(MergeError::Refused("names no delta".into()));
    };
    let mut methods: Vec<String> = Vec::new();
    for method in sources.iter().flat_map(|s| &s.delta.spec.methods) {
        if !methods.contains(method) {
            methods.push(method.clone());
        }
    }
    let parameters = sources.iter().map(|s| s.delta.spec.parameters).sum();
    let spec = DeltaSpec { methods, parameters, ..spec.clone() };
    Ok(Delta::new(spec, patches, head.map(|(_, h)| h.clone())))
}

/// Whether patches of this kind add up under weights.
pub(crate) fn adds_up(patch: &Patch) -> bool {
    matches!(patch, Patch::LowRank(_) | Patch::Bias(_))
}

/// The patches of a site's only owner, as they are.
fn whole(
    owner: &Source<'_>,
    patch: &Patch,
    parts: &[(&Source<'_>, &Patch)],
    site: SiteId,
    sites: &SiteTable,
) -> Result<Vec<(SiteId, Patch)>, MergeError> {
    let what = format!("{} has {} at {}", owner.name, kind(patch), label(sites, site));
    if let Some((other, _)) = parts.iter().find(|(s, _)| !std::ptr::eq(*s, owner)) {
        return Err(MergeError::Refused(format!("{what}, which does not add up with {}", other.name)));
    }
    if owner.weight != 1.0 {
        let weight = owner.weight;
        return Err(MergeError::Refused(format!("{what}, which cannot be weighted; its weight is {weight}, not 1")));
    }
    Ok(parts.iter().map(|(_, p)| (site, (*p).clone())).collect())
}

/// Low-rank pairs and biases of one site.
fn sum(parts: &[(&Source<'_>, &Patch)], site: SiteId, sites: &SiteTable) -> Result<Vec<Patch>, MergeError> {
    let mut pairs = Vec::new();
    let mut bias: Option<Tensor> = None;
    for (source, patch) in parts {
        match patch {
            Patch::LowRank(low) => pairs.push(Pair { weight: source.weight * low.scale, low }),
            Patch::Bias(b) => {
                let own = (b * source.weight)?;
                bias = Some(match bias {
                    Some(before) => (before + own)?,
                    None => own,
                });
            }
            _ => {}
        }
    }
    check_sum(&pairs, MAX_RANK, site, sites)?;
    let low = if pairs.is_empty() { None } else { Some(Patch::LowRank(cat(&pairs)?)) };
    Ok(low.into_iter().chain(bias.map(Patch::Bias)).collect())
}

fn check_positions(sources: &[Source<'_>]) -> Result<(), MergeError> {
    for (what, has) in [
        ("a prompt", (|p: &Patch| matches!(p, Patch::Prompt(_))) as fn(&Patch) -> bool),
        ("a prefix", |p: &Patch| matches!(p, Patch::Prefix(_))),
    ] {
        let mut owners = sources.iter().filter(|s| s.delta.patches().iter().any(|(_, p)| has(p)));
        if let (Some(a), Some(b)) = (owners.next(), owners.next()) {
            return Err(MergeError::Refused(format!("{} and {} both have {what}", a.name, b.name)));
        }
    }
    Ok(())
}

fn head<'a, 'b>(sources: &'b [Source<'a>]) -> Result<Option<(&'b Source<'a>, &'a Head)>, MergeError> {
    let mut owners = sources.iter().filter_map(|s| s.delta.head().map(|h| (s, h)));
    match (owners.next(), owners.next()) {
        (Some((a, _)), Some((b, _))) => {
            Err(MergeError::Refused(format!("{} and {} both have a head; a request has one", a.name, b.name)))
        }
        (Some((owner, _)), None) if owner.weight != 1.0 => Err(MergeError::Refused(format!(
            "{} has a head, which cannot be weighted; its weight is {}, not 1",
            owner.name, owner.weight
        ))),
        (one, _) => Ok(one),
    }
}
