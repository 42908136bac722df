//! LoRA's part of a request: which modules, at which rank and scale, and what comes beside the pairs.

use std::collections::BTreeSet;

use super::{LowRankPlan, MAX_RANK, PatchPlan, Resolver};
use crate::{
    admission::train_params::{LoraBias, LoraInit, LoraPart},
    delta::{Site, SiteId},
};

impl Resolver<'_> {
    pub(super) fn lora(&mut self, field: &str, part: &LoraPart) {
        let rank = part.rank.unwrap_or(16);
        let alpha = part.alpha.unwrap_or(2.0 * f64::from(rank));
        let dropout = part.dropout.unwrap_or(0.0);
        let b_rate = part.plus_ratio.unwrap_or(1.0);
        self.check_rank(&format!("{field}.rank"), rank);
        self.check_alpha(&format!("{field}.alpha"), alpha);
        if !(0.0..1.0).contains(&dropout) {
            self.problem(&format!("{field}.dropout"), format!("is {dropout}; accepted is [0, 1)"));
        }
        if !(b_rate.is_finite() && b_rate > 0.0 && b_rate <= 1000.0) {
            self.problem(&format!("{field}.plus_ratio"), format!("is {b_rate}; accepted is (0, 1000]"));
        }
        let sites = self.targets(&format!("{field}.targets"), &part.targets);
        let sites = self.chosen(field, part, sites);
        let ranks = self.patterns(&format!("{field}.rank_pattern"), &part.rank_pattern, &sites);
        let alphas = self.patterns(&format!("{field}.alpha_pattern"), &part.alpha_pattern, &sites);
        for (key, rank) in &part.rank_pattern {
            self.check_rank(&format!("{field}.rank_pattern[{key:?}]"), *rank);
        }
        for (key, alpha) in &part.alpha_pattern {
            self.check_alpha(&format!("{field}.alpha_pattern[{key:?}]"), *alpha);
        }
        for site in &sites {
            let rank = ranks.get(site).copied().unwrap_or(rank).max(1);
            let alpha = alphas.get(site).copied().unwrap_or(alpha);
            let scale = alpha / if part.rslora { f64::from(rank).sqrt() } else { f64::from(rank) };
            let pissa = part.init == LoraInit::Pissa;
            let plan = LowRankPlan { rank: rank as usize, scale, alpha, dropout, b_rate, pissa };
            self.check_site(field, part, *site, &plan);
            let plan = if part.dora { PatchPlan::Dora(plan) } else { PatchPlan::LowRank(plan) };
            self.patches.entry(*site).or_default().push(plan);
        }
        self.beside(field, part, &sites);
    }

    fn check_rank(&mut self, field: &str, rank: u32) {
        if !(1..=MAX_RANK).contains(&rank) {
            self.problem(field, format!("is {rank}; accepted is 1 to {MAX_RANK}"));
        }
    }

    fn check_alpha(&mut self, field: &str, alpha: f64) {
        if !(alpha.is_finite() && alpha > 0.0 && alpha <= 1e6) {
            self.problem(field, format!("is {alpha}; accepted is (0, 1000000]"));
        }
    }

    /// Targets without excluded modules and other layers.
    fn chosen(&mut self, field: &str, part: &LoraPart, mut sites: Vec<SiteId>) -> Vec<SiteId> {
        for name in &part.exclude {
            let hits: BTreeSet<SiteId> = self.matching(name).into_iter().collect();
            if !sites.iter().any(|s| hits.contains(s)) {
                self.problem(&format!("{field}.exclude"), format!("{name:?} matches none of the target modules"));
            }
            sites.retain(|s| !hits.contains(s));
        }
        if !part.layers.is_empty() {
            let layers = self.layers();
            if let Some(bad) = part.layers.iter().find(|l| **l as usize >= layers) {
                self.problem(
                    &format!("{field}.layers"),
                    format!("has {bad}; this base has layers 0 to {}", layers - 1),
                );
            }
            let inside = |site: &SiteId| match self.base.sites.get(*site).map(|e| e.site) {
                Some(Site::Linear { layer, .. }) => part.layers.contains(&(layer as u32)),
                _ => false,
            };
            sites.retain(inside);
        }
        let filtered = !part.exclude.is_empty() || !part.layers.is_empty();
        if sites.is_empty() && filtered && self.problems.is_empty() {
            self.problem(field, "leaves no module: exclude and layers take away all targets");
        }
        sites
    }

    /// What DoRA and PiSSA cannot do.
    fn check_site(&mut self, field: &str, part: &LoraPart, site: SiteId, plan: &LowRankPlan) {
        let Some(e) = self.base.sites.get(site) else { return };
        let (embedding, least, module) = (e.site == Site::Embedding, e.in_dim.min(e.out_dim), e.module.clone());
        if embedding && (part.dora || plan.pissa || plan.dropout > 0.0 || part.b_bias) {
            self.problem(
                field,
                format!("{module} is the embedding, which takes plain LoRA without dropout and biases only"),
            );
        }
        if plan.pissa && !embedding && plan.rank > least {
            self.problem(field, format!("rank {} of {module}: PiSSA's is at most {least} there", plan.rank));
        }
        if part.dora && plan.dropout > 0.0 {
            self.problem(&format!("{field}.dropout"), "is set, which DoRA here does not have; accepted is 0");
        }
    }

    /// Biases, token rows and whole modules beside the pairs.
    fn beside(&mut self, field: &str, part: &LoraPart, sites: &[SiteId]) {
        if part.dora && part.init == LoraInit::Pissa {
            self.problem(&format!("{field}.init"), "is PiSSA, which does not go with DoRA");
        }
        let all: Vec<(SiteId, bool)> =
            (self.base.sites.iter()).filter(|(_, e)| self.reached(e.site)).map(|(id, e)| (id, e.has_bias)).collect();
        for (site, has_bias) in all {
            let target = sites.contains(&site);
            let wanted = match part.bias {
                LoraBias::None => false,
                LoraBias::LoraOnly => target && has_bias,
                LoraBias::All => has_bias,
            };
            if wanted || (part.b_bias && target) {
                self.patches.entry(site).or_default().push(PatchPlan::Bias);
            }
        }
        if part.b_bias && part.dora {
            self.problem(&format!("{field}.b_bias"), "is set, which does not go with DoRA");
        }
        if !part.tokens.is_empty() {
            self.tokens(&format!("{field}.tokens"), &part.tokens);
        }
        for name in &part.save_modules {
            let hits = self.matching(name);
            let hits: Vec<_> = hits.into_iter().filter(|s| !sites.contains(s)).collect();
            if hits.is_empty() {
                self.problem(
                    &format!("{field}.save_modules"),
                    format!("{name:?} matches no matrix that is not a target already"),
                );
            }
            for site in hits {
                self.patches.entry(site).or_default().push(PatchPlan::Matrix);
            }
        }
    }
}
