//! What holds for every delta that was read, whichever form its files have: the forward can apply all of it.

use super::InteropError;
use crate::{
    delta::{Delta, Head, Patch, Site, SiteId, Task},
    model::Base,
};

fn module(site: SiteId, base: &Base) -> String {
    base.sites.get(site).map_or_else(|| format!("site {site}"), |e| e.label())
}

/// Every patch is of a kind that its site takes, and of the right shape.
///
/// # Errors
/// [`InteropError::Unapplied`] names the modules.
pub(super) fn applicable(delta: &Delta, base: &Base) -> Result<(), InteropError> {
    let problem = |(site, patch): &(SiteId, Patch)| {
        let why = match base.sites.get(*site) {
            Some(entry) => patch.misfit(entry, base.arch.vocab)?,
            None => "no site of this base".to_owned(),
        };
        Some(format!("{}: {why}", module(*site, base)))
    };
    let problems: Vec<String> = delta.patches().iter().filter_map(problem).collect();
    if problems.is_empty() { Ok(()) } else { Err(InteropError::Unapplied(problems)) }
}

/// No patch undoes another: what replaces the base's own (a norm's gain and bias, a whole matrix) comes first at its site,
/// and nothing that was made from the base's matrix follows another one.
///
/// # Errors
/// [`InteropError::Unapplied`] names the module and both kinds.
pub(super) fn order(delta: &Delta, base: &Base) -> Result<(), InteropError> {
    let mut rest = delta.patches();
    while let Some((site, _)) = rest.first() {
        let n = rest.iter().take_while(|(s, _)| s == site).count();
        let (here, after) = rest.split_at(n);
        rest = after;
        // an input's scale is ahead of the matrix, whichever that is
        let rows = here.iter().map(|(_, p)| p).filter(|p| !p.adds_positions() && !matches!(p, Patch::InScale(_)));
        let rows: Vec<&Patch> = rows.collect();
        for pair in rows.windows(2) {
            if pair[1].replaces() {
                let (before, after) = (pair[0].kind(), pair[1].kind());
                let what = format!("{}: a {before}, which a {after} behind it would replace", module(*site, base));
                return Err(InteropError::Unapplied(vec![what]));
            }
        }
        let own = |p: &&&Patch| matches!(p, Patch::TokenRows(_) | Patch::Dora(_));
        if let (Some(Patch::Matrix(_)), Some(other)) = (rows.first(), rows.iter().find(own)) {
            let what =
                format!("{}: a {} of the base's matrix beside a whole matrix", module(*site, base), other.kind());
            return Err(InteropError::Unapplied(vec![what]));
        }
    }
    Ok(())
}

/// A delta that has to be called by tokens of the prompt is one whose rows can be told apart: low-rank updates of linears, without
/// anything that PEFT applies to all tokens, on a base that reads from left to right.
///
/// # Errors
/// What else it has.
pub(super) fn activated(file: &str, delta: &Delta, base: &Base) -> Result<(), InteropError> {
    if delta.invocation().is_none() {
        return Ok(());
    }
    let refused = |what: String| {
        let message =
            format!("alora_invocation_tokens is set, and {what}; accepted are plain low-rank pairs of linears");
        Err(InteropError::invalid(file, message))
    };
    if !base.arch.is_causal() || base.arch.is_encoder_decoder() || delta.spec.task != Task::CausalLm {
        return refused(format!("it is for {} on {}, not for CAUSAL_LM", delta.spec.task.as_str(), base.arch.kind()));
    }
    if delta.head().is_some() {
        return refused("a head is there".into());
    }
    let plain = |site: SiteId, patch: &Patch| {
        let linear = base.sites.get(site).is_some_and(|e| matches!(e.site, Site::Linear { .. } | Site::LmHead));
        linear && matches!(patch, Patch::LowRank(_))
    };
    match delta.patches().iter().find(|(site, patch)| !plain(*site, patch)) {
        Some((site, patch)) => refused(format!("{} has a {}", module(*site, base), patch.kind())),
        None => Ok(()),
    }
}

/// A head from a weights file has all the layers that the family classifies texts with. Where the outer layer's name stands
/// for itself (DistilBERT's `classifier`), PEFT saves that alone, over the inner layer of the base: the base's own is taken.
///
/// # Errors
/// The name of the layer that neither the file nor the base has.
pub(super) fn head_layers(file: &str, head: &mut Head, task: Option<Task>, base: &Base) -> Result<(), InteropError> {
    let names = &base.arch.names;
    let Some(inner) = names.cls_inner else { return Ok(()) };
    if task.unwrap_or(Task::SeqCls) != Task::SeqCls || !head.layers.is_empty() {
        return Ok(());
    }
    if let Some(own) = base.transformer.own_head().filter(|own| !own.layers.is_empty() && inner.out == names.cls_head) {
        (head.layers, head.pool) = (own.layers.clone(), own.pool);
        return Ok(());
    }
    let message = format!(
        "{}.weight is missing, and the base has none: a {} classifies texts by {} and {}; one layer is accepted with \
         task_type TOKEN_CLS",
        inner.dense, base.arch.model_type, inner.dense, inner.out
    );
    Err(InteropError::invalid(file, message))
}

#[cfg(test)]
mod tests;
