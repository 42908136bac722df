//! The smaller methods' parts of a request: BitFit, (IA)3, LN tuning, bottleneck adapters, trainable tokens.

use std::collections::BTreeSet;

use super::{
    AdapterPlan, BiasSubset, BitfitPart, PatchPlan, Resolver, ScalingPlan, module_matches, module_pattern, some_of,
};
use crate::{
    admission::train_params::{AdapterPart, AdapterScaling, AdapterVariant, Ia3Part, LnPart, Targets},
    delta::{Act, Half, Proj, Site, SiteId, Wiring},
};

/// Most tokens with rows of their own.
const MAX_TOKENS: usize = 10_000;

impl Resolver<'_> {
    pub(super) fn bitfit(&mut self, field: &str, part: &BitfitPart) {
        let chosen = |site: Site| match (part.subset, site) {
            (BiasSubset::All, _) => true,
            (BiasSubset::Attention, Site::Linear { proj, .. }) => {
                matches!(proj, Proj::Q | Proj::K | Proj::V | Proj::Qkv | Proj::O)
            }
            (BiasSubset::Mlp, Site::Linear { proj, .. }) => matches!(proj, Proj::Gate | Proj::Up | Proj::Down),
            (BiasSubset::QueryAndMlpUp, Site::Linear { proj, .. }) => matches!(proj, Proj::Q | Proj::Qkv | Proj::Up),
            (BiasSubset::Norm, site) => is_norm(site),
            _ => false,
        };
        let sites: Vec<_> = self
            .base
            .sites
            .iter()
            .filter(|(_, e)| e.has_bias || (part.added && (matches!(e.site, Site::Linear { .. }) || is_norm(e.site))))
            .filter(|(_, e)| chosen(e.site) && self.reached(e.site))
            .map(|(id, _)| id)
            .collect();
        if sites.is_empty() {
            let with: BTreeSet<&str> = (self.base.sites.iter().filter(|(_, e)| e.has_bias))
                .map(|(_, e)| e.module.rsplit('.').next().unwrap_or_default())
                .collect();
            let have = if with.is_empty() { "none".to_owned() } else { some_of(&with.into_iter().collect::<Vec<_>>()) };
            self.problem(
                &format!("{field}.subset"),
                format!("selects no bias of this base (added = true adds zero biases); modules with a bias: {have}"),
            );
        }
        for site in sites {
            self.patches.entry(site).or_default().push(PatchPlan::Bias);
        }
    }

    pub(super) fn ia3(&mut self, field: &str, part: &Ia3Part) {
        let chosen = match &part.targets {
            None => self.ia3_defaults(),
            Some(targets) => {
                let field = format!("{field}.targets");
                let sites = self.targets(&field, targets);
                let inputs = self.ia3_inputs(&field, part, targets, &sites);
                sites.into_iter().map(|s| (s, inputs.contains(&s))).collect()
            }
        };
        let embedding = self.base.sites.id(Site::Embedding);
        for (site, input) in chosen {
            if Some(site) == embedding {
                self.problem(&format!("{field}.targets"), "names the embedding, which (IA)3 does not scale");
            }
            let plan = if input { PatchPlan::InScale } else { PatchPlan::Scale };
            self.patches.entry(site).or_default().push(plan);
        }
    }

    /// PEFT's by family: keys, values and the MLP's second input; Qwen2: queries instead of keys; encoders also the
    /// attention's output (whose name ends as the MLP's does).
    fn ia3_defaults(&self) -> Vec<(SiteId, bool)> {
        let bias_of = |p: Proj| {
            let id = self.base.sites.id(Site::Linear { layer: 0, proj: p });
            id.and_then(|id| self.base.sites.get(id)).is_some_and(|e| e.has_bias)
        };
        let qwen = self.base.causal && bias_of(Proj::Q) && !bias_of(Proj::O);
        let pick = |site: Site| match site {
            Site::Linear { proj: Proj::K, .. } if !qwen => Some(false),
            Site::Linear { proj: Proj::Q, .. } if qwen => Some(false),
            Site::Linear { proj: Proj::V | Proj::Qkv, .. } => Some(false),
            Site::Linear { proj: Proj::Down, .. } => Some(true),
            Site::Linear { proj: Proj::O, .. } if !self.base.causal => Some(true),
            _ => None,
        };
        self.base.sites.iter().filter_map(|(id, e)| Some((id, pick(e.site)?))).collect()
    }

    /// Which of the targets scale their input: those named, else the MLP's second matrices.
    fn ia3_inputs(&mut self, field: &str, part: &Ia3Part, targets: &Targets, sites: &[SiteId]) -> BTreeSet<SiteId> {
        let Some(names) = &part.feedforward else {
            let down = |id: &SiteId| {
                matches!(self.base.sites.get(*id).map(|e| e.site), Some(Site::Linear { proj: Proj::Down, .. }))
            };
            return sites.iter().copied().filter(down).collect();
        };
        let mut out = BTreeSet::new();
        for name in names {
            let hits: Vec<_> = self.matching(name).into_iter().filter(|s| sites.contains(s)).collect();
            if hits.is_empty() {
                self.problem(field, format!("feedforward {name:?} matches none of the targets {targets:?}"));
            }
            out.extend(hits);
        }
        out
    }

    pub(super) fn ln(&mut self, field: &str, part: &LnPart) {
        let norms: Vec<(SiteId, String)> =
            (self.base.sites.iter().filter(|(_, e)| is_norm(e.site))).map(|(id, e)| (id, e.module.clone())).collect();
        let mut chosen = BTreeSet::new();
        for name in &part.targets {
            let pattern = module_pattern(name);
            let hits = norms.iter().filter(|(_, m)| module_matches(m, name, pattern.as_ref())).map(|(id, _)| *id);
            let before = chosen.len();
            chosen.extend(hits);
            if chosen.len() == before {
                let names: BTreeSet<&str> = norms.iter().map(|(_, m)| m.rsplit('.').next().unwrap_or(m)).collect();
                let accepted = some_of(&names.into_iter().collect::<Vec<_>>());
                self.problem(
                    &format!("{field}.targets"),
                    format!("{name:?} is no norm of this base, or named twice; accepted are {accepted}"),
                );
            }
        }
        if part.targets.is_empty() {
            chosen.extend(norms.iter().map(|(id, _)| *id));
        }
        for site in chosen {
            self.patches.entry(site).or_default().push(PatchPlan::Affine);
        }
    }

    pub(super) fn adapter(&mut self, field: &str, part: &AdapterPart) {
        let (act, factor) = match part.variant {
            AdapterVariant::Houlsby => (Act::Silu, 16.0),
            AdapterVariant::Pfeiffer => (Act::Relu, 16.0),
            AdapterVariant::Parallel => (Act::Relu, 2.0),
        };
        let act = match part.activation.as_deref().map(|name| (name, Act::from_hf(name))) {
            None => act,
            Some((_, Some(act))) => act,
            Some((name, None)) => {
                let accepted = Act::NAMES.join(", ");
                self.problem(&format!("{field}.activation"), format!("is {name:?}; accepted are {accepted}"));
                act
            }
        };
        let factor = part.reduction_factor.unwrap_or(factor);
        let scaling = match part.scaling {
            None if part.variant == AdapterVariant::Parallel => ScalingPlan::Fixed(4.0),
            None => ScalingPlan::Fixed(1.0),
            Some(AdapterScaling::Fixed(s)) => ScalingPlan::Fixed(s),
            Some(AdapterScaling::Learned) => ScalingPlan::Learned,
            Some(AdapterScaling::Channel) => ScalingPlan::Channel,
        };
        if let ScalingPlan::Fixed(s) = scaling
            && !(s.is_finite() && s > 0.0)
        {
            self.problem(&format!("{field}.scaling"), format!("is {s}; accepted is a positive number"));
        }
        let wiring = match part.variant {
            AdapterVariant::Houlsby => Wiring::SEQUENTIAL,
            AdapterVariant::Pfeiffer => Wiring::AFTER_NORM,
            AdapterVariant::Parallel => Wiring::PARALLEL,
        };
        let plan = |width| AdapterPlan { width, act, wiring, scaling, norm_before: false, norm_after: false };
        self.adapter_sites(field, part, factor, plan);
        if part.train_norms {
            self.ln(field, &LnPart::default());
        }
    }

    fn adapter_sites(&mut self, field: &str, part: &AdapterPart, factor: f64, plan: impl Fn(usize) -> AdapterPlan) {
        let (layers, hidden) = (self.layers(), self.base.hidden);
        for layer in part.leave_out.iter().chain(part.reduction_by_layer.keys()) {
            if *layer as usize >= layers {
                self.problem(field, format!("names layer {layer}; this base has layers 0 to {}", layers.max(1) - 1));
            }
        }
        let mut chosen = Vec::new();
        for (id, e) in self.base.sites.iter() {
            let Site::Sublayer { layer, half } = e.site else { continue };
            let wanted = half == Half::Mlp || part.variant == AdapterVariant::Houlsby;
            if wanted && !part.leave_out.contains(&(layer as u32)) {
                chosen.push((id, part.reduction_by_layer.get(&(layer as u32)).copied().unwrap_or(factor)));
            }
        }
        if chosen.is_empty() {
            self.problem(field, "leaves no layer for an adapter");
        }
        for (site, factor) in chosen {
            if !(factor.is_finite() && factor > 0.0 && factor <= hidden as f64 && hidden as f64 / factor <= 65_536.0) {
                self.problem(
                    &format!("{field}.reduction_factor"),
                    format!("is {factor}; accepted is above 0 and at most the hidden size, {hidden}"),
                );
                return;
            }
            let width = ((hidden as f64 / factor).floor() as usize).max(1);
            self.patches.entry(site).or_default().push(PatchPlan::Adapter(plan(width)));
        }
    }

    pub(super) fn tokens(&mut self, field: &str, ids: &[u32]) {
        let vocab = self.base.vocab;
        let mut seen = BTreeSet::new();
        if !(1..=MAX_TOKENS).contains(&ids.len()) {
            self.problem(field, format!("has {} tokens; 1 to {MAX_TOKENS} are accepted", ids.len()));
        }
        for id in ids {
            if *id as usize >= vocab || !seen.insert(*id) {
                self.problem(field, format!("has {id}, which is given twice or outside a vocabulary of {vocab}"));
                return;
            }
        }
        match self.base.sites.id(Site::Embedding) {
            Some(site) => self.patches.entry(site).or_default().push(PatchPlan::TokenRows(ids.to_vec())),
            None => self.problem(field, "this base has no embedding to replace rows of"),
        }
    }

    /// Things that cannot stand together at one site.
    pub(super) fn check_combination(&mut self) {
        let count = |plans: &[PatchPlan], f: fn(&PatchPlan) -> bool| plans.iter().filter(|p| f(p)).count();
        let mut found = Vec::new();
        for (site, plans) in &self.patches {
            let module = self.base.sites.get(*site).map(|e| e.module.clone()).unwrap_or_default();
            let whole = count(plans, |p| matches!(p, PatchPlan::Affine | PatchPlan::Matrix));
            if whole > 0 && plans.len() > 1 {
                found.push(format!("{module} is trained whole and changed by another method, too"));
            }
            if count(plans, |p| matches!(p, PatchPlan::Bias)) > 1 {
                found.push(format!("the bias of {module} is trained by two methods"));
            }
            if count(plans, |p| matches!(p, PatchPlan::TokenRows(_))) > 1 {
                found.push("token rows are trained by two methods".into());
            }
        }
        found.truncate(1); // the same at every layer
        found.into_iter().for_each(|m| self.problem("methods", m));
    }

    /// Layers of the base.
    pub(super) fn layers(&self) -> usize {
        let layer = |site: Site| match site {
            Site::Linear { layer, .. } => Some(layer + 1),
            _ => None,
        };
        self.base.sites.iter().filter_map(|(_, e)| layer(e.site)).max().unwrap_or(0)
    }
}

fn is_norm(site: Site) -> bool {
    matches!(site, Site::Norm { .. } | Site::EmbeddingNorm | Site::FinalNorm)
}
