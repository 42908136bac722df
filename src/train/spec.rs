//! What a job trains: a request's methods, resolved against what the base offers.
//!
//! Everything contradictory, unknown or out of range is an error that names the field and what is accepted; nothing is
//! ignored. No tensors: the result is a list of sites with their patch shapes.

mod continued;
mod lora;
mod parts;
mod plans;
mod positions;

use std::collections::{BTreeMap, BTreeSet};

use regex::{Regex, RegexBuilder};

pub use continued::{adopt, parts_of};
pub use plans::{AdapterPlan, LowRankPlan, PatchPlan, ScalingPlan};
pub use positions::{
    EncoderPlan, PositionPlan, PositionPlans, Start, p_tuning_defaults, prefix_defaults, prompt_defaults,
};

use crate::{
    admission::{
        params::Violation,
        train_params::{BiasSubset, BitfitPart, MemoryEstimate, MethodPart, Targets},
    },
    delta::{Problem, Proj, Site, SiteEntry, SiteId, SiteTable, Task},
    model::Base,
    ops::Act,
    train::validate::{MAX_LABELS, some_of},
};

/// Largest accepted rank.
pub const MAX_RANK: u32 = 1024;

/// The head that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadPlan {
    /// Number of labels.
    pub labels: usize,
    /// Input width.
    pub hidden: usize,
    /// Encoders' heads have a bias, decoders' (`score`) have none, as in `transformers`.
    pub bias: bool,
    /// A square layer before it, and what follows that.
    pub inner: Option<Act>,
}

impl HeadPlan {
    /// Numbers in it.
    pub fn parameters(self) -> usize {
        let layer = |out: usize| out * self.hidden + if self.bias { out } else { 0 };
        layer(self.labels) + self.inner.map_or(0, |_| layer(self.hidden))
    }
}

/// A resolved specification.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSpec {
    /// Task.
    pub task: Task,
    /// Methods in it, `head` included.
    pub methods: Vec<String>,
    /// What a text head's outputs are.
    pub problem: Problem,
    /// Label names.
    pub labels: Vec<String>,
    /// What is trained where, by site.
    pub patches: Vec<(SiteId, PatchPlan)>,
    /// The head, for classification.
    pub head: Option<HeadPlan>,
    /// The base's vocabulary, which patches of the embedding are as wide as.
    pub vocab: usize,
    /// More on the parts that add positions.
    pub positions: PositionPlans,
    /// Every weight of the base is trained, in a copy: how many numbers that is.
    pub full: Option<u64>,
}

/// What the specification needs to know of the base.
#[derive(Debug, Clone, Copy)]
pub struct BaseShape<'a> {
    /// Sites.
    pub sites: &'a SiteTable,
    /// Width of hidden states.
    pub hidden: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Whether it predicts the next token (else it is an encoder).
    pub causal: bool,
    /// Whether its input goes through an encoder and its output through a decoder.
    pub encoder_decoder: bool,
    /// Where its classification heads for texts have two layers: what is between.
    pub inner: Option<Act>,
    /// Its weights, for full fine-tuning.
    pub base: Option<&'a Base>,
}

impl<'a> BaseShape<'a> {
    /// The shape of a loaded base.
    pub fn of(base: &'a Base) -> Self {
        let arch = &base.arch;
        Self {
            sites: &base.sites,
            hidden: arch.hidden,
            vocab: arch.vocab,
            causal: arch.is_causal(),
            encoder_decoder: arch.is_encoder_decoder(),
            inner: arch.names.cls_inner.map(|i| i.act),
            base: Some(base),
        }
    }
}

impl TrainSpec {
    /// Resolves a request.
    ///
    /// # Errors
    /// Every contradiction, unknown name and number out of range.
    pub fn resolve(
        methods: &[MethodPart],
        task: Task,
        labels: &[String],
        base: BaseShape<'_>,
    ) -> Result<Self, Vec<Violation>> {
        Self::resolve_for(methods, (task, Problem::SingleLabel), labels, base)
    }

    /// Resolves a request for any problem of a text head.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn resolve_for(
        methods: &[MethodPart],
        (task, problem): (Task, Problem),
        labels: &[String],
        base: BaseShape<'_>,
    ) -> Result<Self, Vec<Violation>> {
        let mut r = Resolver::new(base, task);
        r.check_task(methods, (task, problem), labels);
        let mut kinds = BTreeSet::new();
        for (i, part) in methods.iter().enumerate() {
            let field = format!("methods[{i}]");
            if !kinds.insert(part.kind()) {
                r.problem(&field, format!("{} is given twice; give each method once", part.kind()));
            }
            match part {
                MethodPart::Lora(p) => r.lora(&field, p),
                MethodPart::Bitfit(p) => r.bitfit(&field, p),
                MethodPart::Ia3(p) => r.ia3(&field, p),
                MethodPart::Ln(p) => r.ln(&field, p),
                MethodPart::Adapter(p) => r.adapter(&field, p),
                MethodPart::Tokens(p) => r.tokens(&format!("{field}.ids"), &p.ids),
                MethodPart::Prefix(p) => r.prefix(&field, p),
                MethodPart::Prompt(p) => r.prompt(&field, p),
                MethodPart::PTuning(p) => r.p_tuning(&field, p),
                MethodPart::Full => r.full(&field, methods.len()),
            }
        }
        r.check_combination();
        if !r.problems.is_empty() {
            return Err(r.problems);
        }
        let head = head_plan(task, labels, base);
        let mut methods: Vec<String> = methods.iter().map(|m| m.kind().to_owned()).collect();
        methods.extend(head.map(|_| "head".to_owned()));
        let patches =
            r.patches.into_iter().flat_map(|(site, plans)| plans.into_iter().map(move |p| (site, p))).collect();
        let labels = if head.is_some() { labels.to_vec() } else { Vec::new() };
        let full = if methods.iter().any(|m| m == "full") { base.base.map(|b| b.trained_by(task)) } else { None };
        Ok(Self { task, problem, methods, labels, patches, head, vocab: base.vocab, positions: r.positions, full })
    }

    /// Numbers that are trained.
    pub fn parameters(&self, sites: &SiteTable) -> u64 {
        let head = self.head.map_or(0, HeadPlan::parameters);
        let patch = |(site, plan): &(SiteId, PatchPlan)| sites.get(*site).map_or(0, |e| plan.parameters(e, self.vocab));
        let patches: usize = self.patches.iter().map(patch).sum();
        (head + self.positions.encoder_parameters() + patches) as u64 + self.full.unwrap_or(0)
    }

    /// Bytes that a run of so many trained `parameters` needs beside the base: `rows` of a micro-batch, `longest` example in
    /// it. An estimate: every linear keeps its input and output once, attention its probabilities, a language model one
    /// chunk of logits; DoRA keeps plain copies of the matrices it is on. Full fine-tuning keeps what norms and the head make
    /// on their way, all logits included, and projections that are joined, with their gradients.
    pub fn memory(
        &self,
        base: BaseShape<'_>,
        parameters: u64,
        (rows, longest): (usize, usize),
        by_layer: bool,
    ) -> MemoryEstimate {
        const F32: usize = 4;
        const LOGIT_ROWS: usize = 512;
        let parameters = parameters * F32 as u64;
        let widths: usize = base.sites.linears().map(|(_, e)| e.in_dim + e.out_dim).sum();
        let layers = base.sites.iter().filter(|(_, e)| matches!(e.site, Site::Linear { proj: Proj::O, .. })).count();
        let heads = base.hidden.div_ceil(64).max(1);
        let (logit_rows, copies) = if self.full.is_some() { (2 * rows, 2) } else { (LOGIT_ROWS.min(rows), 1) };
        let logits = if self.task.generates() { logit_rows * base.vocab * 2 } else { 0 };
        let of_layers = copies * rows * widths + rows * longest * heads * layers;
        let kept = if by_layer { of_layers / layers.max(1) + rows * base.hidden * layers } else { of_layers };
        let dora = self.patches.iter().filter(|(_, plan)| matches!(plan, PatchPlan::Dora(_)));
        let dora: usize = dora.filter_map(|(site, _)| base.sites.get(*site)).map(|e| e.in_dim * e.out_dim).sum();
        let activations = (kept + logits + dora) * F32;
        let joined = base.base.filter(|_| self.full.is_some()).map_or(0, Base::joined_parameters);
        // a whole model's snapshot and the sum of its gradients over micro-batches count
        let twice = if self.full.is_some() { 2 * parameters } else { parameters };
        MemoryEstimate {
            parameters: twice,
            gradients: twice,
            optimizer: 2 * parameters,
            activations: activations as u64 + 2 * joined * F32 as u64,
        }
    }
}

/// The head that a task wants.
fn head_plan(task: Task, labels: &[String], base: BaseShape<'_>) -> Option<HeadPlan> {
    let classifies = matches!(task, Task::SeqCls | Task::TokenCls);
    let inner = base.inner.filter(|_| task == Task::SeqCls);
    classifies.then_some(HeadPlan { labels: labels.len(), hidden: base.hidden, bias: !base.causal, inner })
}

struct Resolver<'a> {
    base: BaseShape<'a>,
    task: Task,
    problems: Vec<Violation>,
    patches: BTreeMap<SiteId, Vec<PatchPlan>>,
    positions: PositionPlans,
}

impl<'a> Resolver<'a> {
    fn new(base: BaseShape<'a>, task: Task) -> Self {
        let (problems, positions) = (Vec::new(), PositionPlans::default());
        Self { base, task, problems, patches: BTreeMap::new(), positions }
    }

    fn problem(&mut self, field: &str, message: impl Into<String>) {
        self.problems.push(Violation { field: field.to_owned(), code: String::new(), message: message.into() });
    }

    fn full(&mut self, field: &str, methods: usize) {
        if methods > 1 {
            self.problem(field, "full trains every weight; give it alone");
        }
        if self.base.base.is_some_and(|b| b.gguf.is_some()) {
            self.problem(
                field,
                "full fine-tuning is not supported on a GGUF base, which has no plain weights to train; train a delta, or \
                 serve the model's safetensors folder (with --quantize for less memory)",
            );
        }
    }

    fn check_task(&mut self, methods: &[MethodPart], (task, problem): (Task, Problem), labels: &[String]) {
        if problem != Problem::SingleLabel && task != Task::SeqCls {
            self.problem("problem_type", format!("is {}, which is for the task seq_cls", problem.as_str()));
        }
        let accepted: &[Task] = match (self.base.encoder_decoder, self.base.causal) {
            (true, _) => &[Task::Seq2Seq],
            (false, true) => &[Task::CausalLm, Task::SeqCls, Task::TokenCls],
            (false, false) => &[Task::SeqCls, Task::TokenCls],
        };
        if !accepted.contains(&task) {
            let kind = match (self.base.encoder_decoder, self.base.causal) {
                (true, _) => "encoder-decoder",
                (false, true) => "decoder",
                (false, false) => "encoder",
            };
            let names: Vec<&str> = accepted.iter().map(|t| t.as_str()).collect();
            let names = names.join(", ");
            self.problem("task", format!("is {}, but the base is a {kind}; accepted are {names}", task.as_str()));
        } else if !task.generates() {
            self.check_labels(labels, problem);
        } else if methods.is_empty() {
            self.problem("methods", "is empty; give at least one method");
        } else if !labels.is_empty() {
            self.problem("labels", format!("are given, but {} has no labels", task.as_str()));
        }
    }

    fn check_labels(&mut self, labels: &[String], problem: Problem) {
        let mut seen = BTreeSet::new();
        let (least, most) = match problem {
            Problem::SingleLabel => (2, MAX_LABELS),
            Problem::MultiLabel => (1, MAX_LABELS),
            Problem::Regression => (1, 1),
        };
        if !(least..=most).contains(&labels.len()) {
            let (name, n) = (problem.as_str(), labels.len());
            self.problem("labels", format!("has {n} labels; {least} to {most} are accepted for {name}"));
        }
        for (i, label) in labels.iter().enumerate() {
            if label.trim().is_empty() {
                self.problem(&format!("labels[{i}]"), "is empty");
            } else if !seen.insert(label) {
                self.problem(&format!("labels[{i}]"), format!("{label:?} is given twice"));
            }
        }
    }

    /// Sites that a LoRA may change: everything that multiplies by a matrix, and the embedding table.
    fn matrices(&self) -> Vec<(SiteId, &SiteEntry)> {
        let matrix =
            |e: &SiteEntry| matches!(e.site, Site::Linear { .. } | Site::Pooler | Site::LmHead | Site::Embedding);
        self.base.sites.iter().filter(|(_, e)| matrix(e) && self.reached(e.site)).collect()
    }

    /// Whether the task's forward passes the site: a patch elsewhere would never get a gradient.
    fn reached(&self, site: Site) -> bool {
        match site {
            Site::Pooler => self.task == Task::SeqCls && self.base.inner.is_none(),
            Site::LmHead => self.task.generates(),
            _ => true,
        }
    }

    fn targets(&mut self, field: &str, targets: &Targets) -> Vec<SiteId> {
        let names = match targets {
            Targets::AllLinear => return self.base.sites.linears().map(|(id, _)| id).collect(),
            Targets::Modules(names) if names.is_empty() => {
                self.problem(field, "names no module; give names or all-linear");
                return Vec::new();
            }
            Targets::Modules(names) => names,
        };
        let mut found = BTreeSet::new();
        for name in names {
            if name == "all-linear" {
                found.extend(self.base.sites.linears().map(|(id, _)| id));
                continue;
            }
            let hits = self.matching(name);
            if hits.is_empty() {
                let accepted = self.accepted();
                self.problem(
                    field,
                    format!("{name:?} is no linear of this base; accepted are {accepted}, or all-linear"),
                );
            }
            found.extend(hits);
        }
        found.into_iter().collect()
    }

    fn accepted(&self) -> String {
        let names: BTreeSet<&str> =
            self.matrices().iter().map(|(_, e)| e.module.rsplit('.').next().unwrap_or_default()).collect();
        some_of(&names.into_iter().collect::<Vec<_>>())
    }

    fn matching(&self, key: &str) -> Vec<SiteId> {
        let pattern = module_pattern(key);
        let hit = |module: &str| module_matches(module, key, pattern.as_ref());
        self.matrices().into_iter().filter(|(_, e)| hit(&e.module)).map(|(id, _)| id).collect()
    }

    /// Values by site; a key that matches none of the chosen sites is an error.
    fn patterns<T: Copy>(&mut self, field: &str, map: &BTreeMap<String, T>, sites: &[SiteId]) -> BTreeMap<SiteId, T> {
        let mut out = BTreeMap::new();
        for (key, value) in map {
            let hits: Vec<_> = self.matching(key).into_iter().filter(|id| sites.contains(id)).collect();
            if hits.is_empty() {
                self.problem(field, format!("{key:?} matches none of the target modules"));
            }
            for id in hits {
                out.entry(id).or_insert(*value); // the first key wins, as in PEFT
            }
        }
        out
    }
}

/// PEFT's rule for pattern keys: a regular expression for the end of the module's path.
fn module_pattern(key: &str) -> Option<Regex> {
    RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{key})$")).size_limit(1 << 20).build().ok()
}

/// A key matches a module by suffix (in either direction: keys may carry the full path of the head model) or pattern.
fn module_matches(module: &str, key: &str, pattern: Option<&Regex>) -> bool {
    let suffix =
        |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    !key.is_empty() && (suffix(module, key) || suffix(key, module) || pattern.is_some_and(|p| p.is_match(module)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{admission::train_params::LoraPart, delta::NormAt};

    pub(crate) fn table(biases: bool) -> SiteTable {
        let mut t = SiteTable::default();
        for layer in 0..2 {
            for (proj, name, i, o) in [
                (Proj::Q, "self_attn.q_proj", 8, 8),
                (Proj::V, "self_attn.v_proj", 8, 4),
                (Proj::O, "self_attn.o_proj", 8, 8),
                (Proj::Up, "mlp.up_proj", 8, 16),
            ] {
                let module = format!("layers.{layer}.{name}");
                t.push(SiteEntry {
                    site: Site::Linear { layer, proj },
                    module,
                    in_dim: i,
                    out_dim: o,
                    has_bias: biases,
                });
            }
            let module = format!("layers.{layer}.norm");
            let site = Site::Norm { layer, at: NormAt::Attn };
            t.push(SiteEntry { site, module, in_dim: 0, out_dim: 8, has_bias: biases });
        }
        t
    }

    fn base(sites: &SiteTable) -> BaseShape<'_> {
        BaseShape { sites, hidden: 8, vocab: 32, causal: true, encoder_decoder: false, inner: None, base: None }
    }

    fn lora(part: LoraPart) -> Vec<MethodPart> {
        vec![MethodPart::Lora(part)]
    }

    #[test]
    fn targets_are_names_suffixes_patterns_or_all_linears() {
        let sites = table(false);
        let count = |names: &[&str]| {
            let targets = Targets::Modules(names.iter().map(|s| (*s).to_owned()).collect());
            TrainSpec::resolve(&lora(LoraPart { targets, ..LoraPart::default() }), Task::CausalLm, &[], base(&sites))
                .map(|s| s.patches.len())
                .map_err(|v| v[0].message.clone())
        };
        assert_eq!(count(&["q_proj"]), Ok(2));
        assert_eq!(count(&["layers.1.self_attn.q_proj", "v_proj"]), Ok(3));
        assert_eq!(count(&["model.layers.1.self_attn.q_proj"]), Ok(1));
        assert_eq!(count(&[r"layers\.0\..*_proj"]), Ok(4));
        assert_eq!(count(&["all-linear"]), Ok(8));
        let message = count(&["proj"]).unwrap_err();
        assert!(message.contains("\"proj\"") && message.contains("o_proj, q_proj, up_proj, v_proj"), "{message}");
    }

    #[test]
    fn patterns_set_rank_and_alpha_and_must_match() {
        let sites = table(false);
        let mut part = LoraPart { rank: Some(4), alpha: Some(8.0), rslora: true, ..LoraPart::default() };
        part.rank_pattern.insert("layers.0.self_attn.q_proj".into(), 16);
        part.alpha_pattern.insert("v_proj".into(), 2.0);
        let spec = TrainSpec::resolve(&lora(part.clone()), Task::CausalLm, &[], base(&sites)).unwrap();
        let scale = |m: &str| match &spec.patches.iter().find(|(id, _)| sites.get(*id).unwrap().module == m).unwrap().1
        {
            PatchPlan::LowRank(LowRankPlan { rank, scale, .. }) => (*rank, *scale),
            other => panic!("{other:?}"),
        };
        assert_eq!(scale("layers.0.self_attn.q_proj"), (16, 2.0));
        assert_eq!(scale("layers.1.self_attn.q_proj"), (4, 4.0));
        assert_eq!(scale("layers.1.self_attn.v_proj"), (4, 1.0));
        assert_eq!(spec.parameters(&sites), (16 * 16 + 4 * 16 + 2 * 4 * 12 + 2 * 4 * 16 + 2 * 4 * 24) as u64);
        part.rank_pattern.insert("k_proj".into(), 1);
        assert!(TrainSpec::resolve(&lora(part), Task::CausalLm, &[], base(&sites)).is_err());
    }

    #[test]
    fn bitfit_takes_the_biases_that_exist() {
        let (with, without) = (table(true), table(false));
        let spec = |subset, sites| {
            let methods = [MethodPart::Bitfit(BitfitPart { subset, ..BitfitPart::default() })];
            TrainSpec::resolve(&methods, Task::CausalLm, &[], base(sites)).map(|s| s.patches.len())
        };
        assert_eq!(spec(BiasSubset::All, &with), Ok(10));
        assert_eq!(spec(BiasSubset::QueryAndMlpUp, &with), Ok(4));
        assert_eq!(spec(BiasSubset::Norm, &with), Ok(2));
        assert!(spec(BiasSubset::All, &without).unwrap_err()[0].message.contains("no bias"));
    }

    #[test]
    fn contradictions_and_numbers_out_of_range_are_all_named() {
        let sites = table(true);
        let part = LoraPart { rank: Some(0), alpha: Some(f64::NAN), dropout: Some(1.0), ..LoraPart::default() };
        let twice = [lora(part.clone()), lora(LoraPart::default())].concat();
        let problems = TrainSpec::resolve(&twice, Task::CausalLm, &["x".into()], base(&sites)).unwrap_err();
        let fields: Vec<_> = problems.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(fields, ["labels", "methods[0].rank", "methods[0].alpha", "methods[0].dropout", "methods[1]"]);
        let encoder = BaseShape { causal: false, ..base(&sites) };
        assert!(TrainSpec::resolve(&lora(LoraPart::default()), Task::CausalLm, &[], encoder).is_err());
        let same = ["a".to_owned(), "a".to_owned()];
        assert!(TrainSpec::resolve(&[], Task::SeqCls, &same, encoder).is_err());
        let two = ["a".to_owned(), "b".to_owned()];
        let head = TrainSpec::resolve(&[], Task::SeqCls, &two, encoder).unwrap();
        assert_eq!((head.methods.clone(), head.parameters(&sites)), (vec!["head".to_owned()], 18));
    }
}
