//! A delta as parts that each have a folder form of their own.

use std::collections::BTreeMap;

use super::{Writer, keys};
use crate::{
    delta::{Delta, Patch, PrefixForm, PromptStage, SiteId},
    interop::{InteropError, tokens},
};

/// Forms that a patch may be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// PEFT's LORA, with what may stand beside pairs.
    Lora,
    /// The same with magnitudes, which a file has for all pairs or none.
    Dora,
    /// Our biases.
    Bitfit,
    /// PEFT's IA3.
    Ia3,
    /// PEFT's LN_TUNING.
    Ln,
    /// PEFT's TRAINABLE_TOKENS.
    Tokens,
    /// AdapterHub's bottleneck adapters.
    Adapter,
    /// PEFT's or AdapterHub's prompt.
    Prompt,
    /// PEFT's or AdapterHub's prefix.
    Prefix,
}

/// A part in the making: the patches of one form, of which a folder can hold one of a kind at each site; `nth` counts
/// the folders of that form.
struct Group {
    kind: Kind,
    nth: usize,
    patches: Vec<(SiteId, Patch)>,
}

/// The parts in order of application; the head goes with the last that can hold it. None for a head alone.
///
/// # Errors
/// A patch that no form holds, an order of patches that no order of parts gives.
pub(super) fn parts(w: &Writer<'_>) -> Result<Vec<(Kind, Delta)>, InteropError> {
    let (groups, places) = groups(w)?;
    let groups = in_order(w, groups, &places)?;
    let anywhere = w.head(keys::key).is_ok();
    // heads of other layers, or of another row, have a form in AdapterHub's folders only
    let holder = groups.iter().rposition(|g| anywhere || is_hub(g)).unwrap_or(groups.len().saturating_sub(1));
    let part = |(i, group): (usize, Group)| {
        let head = w.delta.head().filter(|_| i == holder).cloned();
        let part = Delta::new(w.delta.spec.clone(), group.patches, head);
        (group.kind, part.invoked_by(w.delta.invocation().cloned()))
    };
    Ok(groups.into_iter().enumerate().map(part).collect())
}

/// Whether AdapterHub's folder form is written.
fn is_hub(group: &Group) -> bool {
    group.patches.iter().all(|(_, p)| match p {
        Patch::Bottleneck(_) => true,
        Patch::Prompt(p) => p.stage == PromptStage::Hidden,
        Patch::Prefix(p) => p.form == PrefixForm::Pinned,
        _ => false,
    })
}

/// Whether a folder has one place for both: one of a kind, and one of (IA)3's two scales.
fn collide(a: &Patch, b: &Patch) -> bool {
    let scale = |p: &Patch| matches!(p, Patch::Scale(_) | Patch::InScale(_));
    (scale(a) && scale(b)) || std::mem::discriminant(a) == std::mem::discriminant(b)
}

/// By site: the groups of its patches, in order.
type Places = BTreeMap<SiteId, Vec<usize>>;

fn groups(w: &Writer<'_>) -> Result<(Vec<Group>, Places), InteropError> {
    let all = w.delta.patches();
    let has = |f: fn(&Patch) -> bool| all.iter().any(|(_, p)| f(p));
    let low = match (has(|p| matches!(p, Patch::LowRank(_))), has(|p| matches!(p, Patch::Dora(_)))) {
        (true, _) => Some(Kind::Lora),
        (false, true) => Some(Kind::Dora),
        (false, false) => None,
    };
    let scales = has(|p| matches!(p, Patch::Scale(_)));
    let tied = tokens::tied_head(w.base);
    let (mut groups, mut places): (Vec<Group>, Places) = (Vec::new(), Places::new());
    for (at, (site, patch)) in all.iter().enumerate() {
        let kind = match patch {
            Patch::LowRank(_) => Kind::Lora,
            Patch::Dora(_) => Kind::Dora,
            // a bias beside a scale must keep its place in the order
            Patch::Bias(_) => low.filter(|_| !scales).unwrap_or(Kind::Bitfit),
            Patch::Scale(_) | Patch::InScale(_) => Kind::Ia3,
            Patch::Affine(_) => Kind::Ln,
            Patch::TokenRows(_) if Some(*site) == tied => continue, // follows from the embedding's rows
            Patch::TokenRows(_) => low.unwrap_or(Kind::Tokens),
            Patch::Matrix(_) => low.ok_or_else(|| w.unapplied(*site, "a whole matrix without LoRA beside it"))?,
            Patch::Bottleneck(_) => Kind::Adapter,
            Patch::Prompt(_) => Kind::Prompt,
            Patch::Prefix(_) => Kind::Prefix,
        };
        let before = all[..at].iter().rev().take_while(|(s, _)| s == site);
        let nth = before.filter(|(_, p)| collide(p, patch)).count();
        let group = groups.iter().position(|g| (g.kind, g.nth) == (kind, nth)).unwrap_or_else(|| {
            groups.push(Group { kind, nth, patches: Vec::new() });
            groups.len() - 1
        });
        groups[group].patches.push((*site, patch.clone()));
        places.entry(*site).or_default().push(group);
    }
    Ok((groups, places))
}

/// An order of the groups that is right at every site: first what nothing else must be ahead of.
fn in_order(w: &Writer<'_>, left: Vec<Group>, places: &Places) -> Result<Vec<Group>, InteropError> {
    let mut order = Vec::with_capacity(left.len());
    while order.len() < left.len() {
        let free = |g: &usize| {
            let ahead = |groups: &Vec<usize>| {
                let last = groups.iter().rposition(|x| x == g).unwrap_or(0);
                groups[..last].iter().any(|x| x != g && !order.contains(x))
            };
            !order.contains(g) && !places.values().any(ahead)
        };
        // prompts and prefixes come after what changes rows
        let candidates: Vec<usize> = (0..left.len()).filter(free).collect();
        let rank = |g: &&usize| (matches!(left[**g].kind, Kind::Prompt | Kind::Prefix), left[**g].kind == Kind::Prefix);
        let Some(next) = candidates.iter().min_by_key(rank) else {
            let site = places.iter().find(|(_, groups)| groups.len() > 1).map_or(0, |(site, _)| *site);
            return Err(w.unapplied(site, "an order of patches that no order of parts gives"));
        };
        order.push(*next);
    }
    let mut taken: Vec<Option<Group>> = left.into_iter().map(Some).collect();
    Ok(order.into_iter().filter_map(|i| taken[i].take()).collect())
}
