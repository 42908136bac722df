//! A specification that continues an existing delta: what the delta trains where, and whether a request says the same.

use std::collections::{BTreeMap, BTreeSet};

use super::{AdapterPlan, BaseShape, LowRankPlan, PatchPlan, PositionPlan, Resolver, ScalingPlan, Start, TrainSpec};
use crate::{
    admission::{
        params::Violation,
        train_params::{
            AdapterPart, AdapterVariant, BitfitPart, Ia3Part, LnPart, LoraBias, LoraInit, LoraPart, MethodPart,
            PrefixLibrary, PrefixPart, PromptInit, PromptPart, Targets, TokensPart,
        },
    },
    delta::{AdapterInput, Delta, Patch, PrefixForm, Problem, Scaling, SiteId, SiteTable, Task},
};

const FIELD: &str = "methods";

impl TrainSpec {
    /// What an existing delta trains, with the head that the task wants.
    ///
    /// # Errors
    /// A task that does not fit the base or the delta's sites.
    pub fn of_delta(
        delta: &Delta,
        (task, problem): (Task, Problem),
        labels: &[String],
        base: BaseShape<'_>,
    ) -> Result<Self, Vec<Violation>> {
        let mut r = Resolver::new(base, task);
        let parts = parts_of(delta, base.sites);
        let whole = delta.patches().iter().find(|(_, p)| matches!(p, Patch::Matrix(_)));
        if let Some((site, _)) = whole
            && !parts.iter().any(|p| p.kind() == "lora")
        {
            let module = base.sites.get(*site).map(|e| e.label()).unwrap_or_default();
            r.problem("from_delta", format!("holds {module} whole without a LoRA beside it, which no method trains"));
            return Err(r.problems);
        }
        r.check_task(&parts, (task, problem), labels);
        for (site, patch) in delta.patches() {
            let Some(entry) = base.sites.get(*site) else { continue };
            let plan = plan_of(patch);
            if let PatchPlan::Prompt { n, .. } | PatchPlan::Prefix { n, .. } = plan {
                let position = PositionPlan { n, start: Start::Random, encoder: None, field: FIELD.into(), text: None };
                match plan {
                    PatchPlan::Prompt { .. } => r.positions.prompt = Some(position),
                    _ => r.positions.prefix = Some(position),
                }
            }
            if !r.reached(entry.site) {
                let module = entry.label();
                r.problem("from_delta", format!("changes {module}, which {} does not use", task.as_str()));
            }
            r.patches.entry(*site).or_default().push(plan);
        }
        for (site, plans) in &r.patches {
            if plans.iter().filter(|p| matches!(p, PatchPlan::LowRank(_) | PatchPlan::Dora(_))).count() > 1 {
                let module = base.sites.get(*site).map(|e| e.label()).unwrap_or_default();
                let message = format!("has two low-rank updates at {module}, which cannot be trained");
                r.problems.push(Violation { field: "from_delta".into(), code: String::new(), message });
                break;
            }
        }
        if !r.problems.is_empty() {
            return Err(r.problems);
        }
        let head = super::head_plan(task, labels, base);
        let own = delta.spec.methods.iter().filter(|m| *m != "head").cloned();
        let methods = own.chain(head.map(|_| "head".to_owned())).collect();
        let patches =
            r.patches.into_iter().flat_map(|(site, plans)| plans.into_iter().map(move |p| (site, p))).collect();
        let labels = if head.is_some() { labels.to_vec() } else { Vec::new() };
        let (vocab, positions) = (base.vocab, r.positions);
        Ok(Self { task, problem, methods, labels, patches, head, vocab, positions, full: None })
    }

    /// The first difference between what this trains and what a delta is made of.
    ///
    /// # Errors
    /// The difference, with the module.
    pub fn check_continues(&self, delta: &Delta, sites: &SiteTable) -> Result<(), Violation> {
        let (mut wanted, mut own): (BySite, BySite) = Default::default();
        self.patches.iter().for_each(|(site, p)| wanted.entry(*site).or_default().push(p.clone()));
        delta.patches().iter().for_each(|(site, p)| own.entry(*site).or_default().push(plan_of(p)));
        let all: BTreeSet<SiteId> = wanted.keys().chain(own.keys()).copied().collect();
        let none = Vec::new();
        let mut found: Vec<String> = Vec::new();
        for site in all {
            let module = sites.get(site).map(|e| e.label()).unwrap_or_default();
            if let Some(d) = difference(wanted.get(&site).unwrap_or(&none), own.get(&site).unwrap_or(&none)) {
                found.push(format!("at {module}, {d}"));
            }
        }
        let Some(first) = found.first() else { return Ok(()) };
        let more = match found.len() {
            1 => String::new(),
            n => format!(" ({} more modules differ, too)", n - 1),
        };
        let message = format!("differ from what from_delta is made of: {first}{more}; leave them out to take its own");
        Err(Violation { field: FIELD.into(), code: String::new(), message })
    }
}

type BySite = BTreeMap<SiteId, Vec<PatchPlan>>;

/// A request's parts with what they leave open taken from the delta, and what they cannot say when its values are taken.
pub fn adopt(parts: &[MethodPart], delta: &Delta, hidden: usize) -> (Vec<MethodPart>, Vec<Violation>) {
    let mut problems = Vec::new();
    let mut clash = |i: usize, field: &str| {
        let field = format!("{FIELD}[{i}].{field}");
        let message = "is given, but the values come from from_delta".to_owned();
        problems.push(Violation { field, code: String::new(), message });
    };
    let pairs: Vec<LowRankPlan> = delta.patches().iter().filter_map(|(_, p)| low_rank(&plan_of(p))).collect();
    let adopted = parts.iter().enumerate().map(|(i, part)| match part {
        MethodPart::Lora(p) => {
            if p.init != LoraInit::Zero {
                clash(i, "init");
            }
            let same = same(pairs.iter().map(|p| p.rank as u32)).filter(|_| p.rank_pattern.is_empty());
            let rank = p.rank.or(same);
            let alpha = |l: &LowRankPlan| l.scale * if p.rslora { (l.rank as f64).sqrt() } else { l.rank as f64 };
            let alphas = same_number(pairs.iter().map(alpha)).filter(|_| p.alpha_pattern.is_empty());
            MethodPart::Lora(LoraPart { rank, alpha: p.alpha.or(alphas), ..p.clone() })
        }
        MethodPart::Adapter(p) if p.reduction_factor.is_none() => {
            let widths = delta.patches().iter().filter_map(|(_, p)| match p {
                Patch::Bottleneck(b) => b.down.dim(0).ok(),
                _ => None,
            });
            let factor = same(widths).map(|w| hidden as f64 / w as f64);
            MethodPart::Adapter(AdapterPart { reduction_factor: factor, ..p.clone() })
        }
        MethodPart::Prompt(p) => {
            if p.init != PromptInit::Vocabulary {
                clash(i, "init");
            }
            let n = p.num_virtual_tokens.or(Some(delta.ahead().rows as u32).filter(|n| *n > 0));
            MethodPart::Prompt(PromptPart { num_virtual_tokens: n, ..p.clone() })
        }
        MethodPart::Prefix(p) => {
            if p.init.is_some() {
                clash(i, "init");
            }
            let n = p.num_virtual_tokens.or(Some(delta.ahead().keys as u32).filter(|n| *n > 0));
            MethodPart::Prefix(PrefixPart { num_virtual_tokens: n, form: p.form.or(prefix_of(delta)), ..p.clone() })
        }
        MethodPart::Full => {
            clash(i, "full");
            part.clone()
        }
        other => other.clone(),
    });
    (adopted.collect(), problems)
}

/// The parts of a request that would make a delta like this one, for people: a combination's biases and scales are told
/// as those of all their modules.
pub fn parts_of(delta: &Delta, sites: &SiteTable) -> Vec<MethodPart> {
    let module = |site: &SiteId| sites.get(*site).map(|e| e.label()).unwrap_or_default();
    let plans: Vec<(SiteId, PatchPlan)> = delta.patches().iter().map(|(s, p)| (*s, plan_of(p))).collect();
    let modules = |f: fn(&PatchPlan) -> bool| -> Vec<String> {
        plans.iter().filter(|(_, p)| f(p)).map(|(s, _)| module(s)).collect()
    };
    let mut parts = Vec::new();
    if let Some(lora) = lora_of(&plans, &module) {
        let save_modules = modules(|p| matches!(p, PatchPlan::Matrix));
        let biased = plans.iter().any(|(_, p)| matches!(p, PatchPlan::Bias));
        let bitfit = delta.spec.methods.iter().any(|m| m == "bitfit");
        let bias = if biased && !bitfit { LoraBias::All } else { LoraBias::None };
        parts.push(MethodPart::Lora(LoraPart { save_modules, bias, ..lora }));
    }
    let biases: Vec<bool> = (plans.iter().filter(|(_, p)| matches!(p, PatchPlan::Bias)))
        .map(|(s, _)| sites.get(*s).is_some_and(|e| !e.has_bias))
        .collect();
    if !biases.is_empty() && (parts.is_empty() || delta.spec.methods.iter().any(|m| m == "bitfit")) {
        parts.push(MethodPart::Bitfit(BitfitPart { added: biases.contains(&true), ..BitfitPart::default() }));
    }
    let scaled = modules(|p| matches!(p, PatchPlan::Scale | PatchPlan::InScale));
    if !scaled.is_empty() {
        let feedforward = Some(modules(|p| matches!(p, PatchPlan::InScale)));
        parts.push(MethodPart::Ia3(Ia3Part { targets: Some(Targets::Modules(scaled)), feedforward }));
    }
    let targets = modules(|p| matches!(p, PatchPlan::Affine));
    if !targets.is_empty() {
        parts.push(MethodPart::Ln(LnPart { targets }));
    }
    parts.extend(adapter_of(delta).map(MethodPart::Adapter));
    if let Some((_, PatchPlan::TokenRows(ids))) = plans.iter().find(|(_, p)| matches!(p, PatchPlan::TokenRows(_))) {
        parts.push(MethodPart::Tokens(TokensPart { ids: ids.clone() }));
    }
    for (_, plan) in &plans {
        match plan {
            PatchPlan::Prompt { n, .. } => parts
                .push(MethodPart::Prompt(PromptPart { num_virtual_tokens: Some(*n as u32), ..PromptPart::default() })),
            PatchPlan::Prefix { n, .. } if !parts.iter().any(|p| p.kind() == "prefix") => {
                parts.push(MethodPart::Prefix(PrefixPart {
                    num_virtual_tokens: Some(*n as u32),
                    form: prefix_of(delta),
                    ..PrefixPart::default()
                }));
            }
            _ => {}
        }
    }
    parts
}

fn lora_of(plans: &[(SiteId, PatchPlan)], module: &impl Fn(&SiteId) -> String) -> Option<LoraPart> {
    let pairs: Vec<(String, LowRankPlan)> =
        plans.iter().filter_map(|(s, p)| low_rank(p).map(|l| (module(s), l))).collect();
    let first = pairs.first()?.1;
    let other = |f: fn(&LowRankPlan) -> f64| -> BTreeMap<String, f64> {
        let differs = pairs.iter().filter(|(_, p)| f(p) != f(&first));
        differs.map(|(m, p)| (m.clone(), f(p))).collect()
    };
    Some(LoraPart {
        rank: Some(first.rank as u32),
        alpha: Some(first.alpha),
        targets: Targets::Modules(pairs.iter().map(|(m, _)| m.clone()).collect()),
        rank_pattern: other(|p| p.rank as f64).into_iter().map(|(m, r)| (m, r as u32)).collect(),
        alpha_pattern: other(|p| p.alpha),
        dora: plans.iter().any(|(_, p)| matches!(p, PatchPlan::Dora(_))),
        ..LoraPart::default()
    })
}

fn adapter_of(delta: &Delta) -> Option<AdapterPart> {
    let adapters: Vec<_> = (delta.patches().iter())
        .filter_map(|(_, p)| if let Patch::Bottleneck(b) = p { Some(b.as_ref()) } else { None })
        .collect();
    let first = *adapters.first()?;
    let variant = match first.wiring.input {
        AdapterInput::Output => AdapterVariant::Houlsby,
        AdapterInput::Sum => AdapterVariant::Pfeiffer,
        AdapterInput::Residual => AdapterVariant::Parallel,
    };
    let (width, hidden) = first.down.dims2().ok()?;
    let reduction_factor = Some(hidden as f64 / width.max(1) as f64);
    Some(AdapterPart { variant, reduction_factor, ..AdapterPart::default() })
}

/// What a patch is as a plan; its scale says its alpha as alpha / rank.
fn plan_of(patch: &Patch) -> PatchPlan {
    let rows = |t: &candle_core::Tensor| t.dim(0).unwrap_or(0);
    let pair = |l: &crate::delta::LowRank| {
        let rank = rows(&l.a);
        LowRankPlan { rank, scale: l.scale, alpha: l.scale * rank as f64, dropout: 0.0, b_rate: 1.0, pissa: false }
    };
    match patch {
        Patch::LowRank(l) => PatchPlan::LowRank(pair(l)),
        Patch::Dora(d) => PatchPlan::Dora(pair(&d.low)),
        Patch::Bias(_) => PatchPlan::Bias,
        Patch::Scale(_) => PatchPlan::Scale,
        Patch::InScale(_) => PatchPlan::InScale,
        Patch::Affine(_) => PatchPlan::Affine,
        Patch::Bottleneck(b) => PatchPlan::Adapter(AdapterPlan {
            width: rows(&b.down),
            act: b.act,
            wiring: b.wiring,
            scaling: match &b.scaling {
                Scaling::Fixed(s) => ScalingPlan::Fixed(*s),
                Scaling::Learned(t) if t.elem_count() == 1 => ScalingPlan::Learned,
                Scaling::Learned(_) => ScalingPlan::Channel,
            },
            norm_before: b.norm_before.is_some(),
            norm_after: b.norm_after.is_some(),
        }),
        Patch::TokenRows(t) => PatchPlan::TokenRows(t.ids.clone()),
        Patch::Matrix(_) => PatchPlan::Matrix,
        Patch::Prompt(p) => PatchPlan::Prompt { n: rows(&p.rows), made: false, stack: p.stack },
        Patch::Prefix(p) => PatchPlan::Prefix { n: rows(&p.k), made: false, like: None, form: p.form, stack: p.stack },
    }
}

/// Whose form a delta's prefix has.
fn prefix_of(delta: &Delta) -> Option<PrefixLibrary> {
    delta.patches().iter().find_map(|(_, p)| match p {
        Patch::Prefix(p) if p.form == PrefixForm::Pinned => Some(PrefixLibrary::AdapterHub),
        Patch::Prefix(_) => Some(PrefixLibrary::Peft),
        _ => None,
    })
}

fn low_rank(plan: &PatchPlan) -> Option<LowRankPlan> {
    match plan {
        PatchPlan::LowRank(p) | PatchPlan::Dora(p) => Some(*p),
        _ => None,
    }
}

/// The one value of all, if they are the same.
fn same<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|v| v == first).then_some(first)
}

fn same_number(mut values: impl Iterator<Item = f64>) -> Option<f64> {
    let first = values.next()?;
    values.all(|v| close(v, first)).then_some(first)
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * a.abs().max(b.abs())
}

/// How the plans of one site differ, if they do.
fn difference(wanted: &[PatchPlan], own: &[PatchPlan]) -> Option<String> {
    let kinds = |plans: &[PatchPlan]| -> Vec<&'static str> {
        let mut kinds: Vec<_> = plans.iter().map(PatchPlan::kind).collect();
        kinds.sort_unstable();
        kinds
    };
    let (ours, theirs) = (kinds(wanted), kinds(own));
    if ours != theirs {
        let list = |kinds: &[&str]| if kinds.is_empty() { "nothing".to_owned() } else { kinds.join(" + ") };
        return Some(format!("the request trains {} and the delta has {}", list(&ours), list(&theirs)));
    }
    wanted.iter().find_map(|w| own.iter().find(|o| o.kind() == w.kind()).and_then(|o| apart(w, o)))
}

/// How two plans of one kind differ, if they do.
fn apart(wanted: &PatchPlan, own: &PatchPlan) -> Option<String> {
    match (wanted, own) {
        (PatchPlan::LowRank(w), PatchPlan::LowRank(o)) | (PatchPlan::Dora(w), PatchPlan::Dora(o)) => {
            if w.rank != o.rank {
                return Some(format!("the request's rank is {} and the delta's is {}", w.rank, o.rank));
            }
            let scales = format!("the request's scale (alpha over rank) is {} and the delta's is {}", w.scale, o.scale);
            (!close(w.scale, o.scale)).then_some(scales)
        }
        (PatchPlan::Adapter(w), PatchPlan::Adapter(o)) if w.width != o.width => {
            Some(format!("the request's adapter is {} wide and the delta's is {}", w.width, o.width))
        }
        (PatchPlan::Adapter(w), PatchPlan::Adapter(o)) if w != o => {
            Some(format!("the request's adapter is {w:?} and the delta's is {o:?}"))
        }
        (PatchPlan::TokenRows(w), PatchPlan::TokenRows(o)) => {
            let set = |ids: &[u32]| ids.iter().copied().collect::<BTreeSet<_>>();
            (set(w) != set(o)).then(|| "the request's tokens are not the delta's".to_owned())
        }
        (PatchPlan::Prefix { form: w, .. }, PatchPlan::Prefix { form: o, .. }) if w != o => {
            let of = |form: &PrefixForm| if *form == PrefixForm::Pinned { "AdapterHub's" } else { "PEFT's" };
            Some(format!("the request's prefix has {} form and the delta's {}", of(w), of(o)))
        }
        (PatchPlan::Prompt { n: w, made, .. }, PatchPlan::Prompt { n: o, .. })
        | (PatchPlan::Prefix { n: w, made, .. }, PatchPlan::Prefix { n: o, .. }) => match (*made, w == o) {
            (true, _) => Some(
                "the request's virtual tokens are made by a network, which a published delta does not have any more"
                    .to_owned(),
            ),
            (false, false) => Some(format!("the request has {w} virtual tokens and the delta {o}")),
            (false, true) => None,
        },
        _ => None,
    }
}
