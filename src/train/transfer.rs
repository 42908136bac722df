//! Starting from an existing delta: which values a job takes from it, and what it holds on to (EWC).

use std::{
    any::Any,
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use candle_core::Tensor;

use crate::{
    admission::{
        params::Violation,
        train_params::{MethodPart, ResolvedEwc, ResolvedMix, StartedFrom, TrainParams},
    },
    delta::{Delta, DoraBase, Head, SiteTable, Task},
    ids::DeltaId,
    model::Base,
    train::{
        beginning::{Mixture, Reload},
        dataset::Dataset,
        encode::{Encoded, TextCodec, encode},
        issue::Report,
        mixing::Mix,
        plan::default_length,
        spec::{self, BaseShape, HeadPlan, TrainSpec},
        trainable::Trainable,
        validate::{LabelSet, check_common},
    },
};

/// Examples that the Fisher information is taken from by default.
const FISHER_EXAMPLES: u32 = 512;

/// The delta that a request names, kept resident until the job has copied its values.
#[derive(Clone)]
pub struct StartingDelta {
    name: String,
    id: DeltaId,
    delta: Arc<Delta>,
    /// What `delta` is the mean of, if the weights of deltas are trained.
    mix: Option<Arc<Mix>>,
    lease: Arc<dyn Any + Send + Sync>,
    /// What leases the deltas of `mix` again.
    reload: Option<Reload>,
}

impl StartingDelta {
    /// `name` is `name@number`; `lease` keeps the delta in memory.
    pub fn new(name: String, id: DeltaId, delta: Arc<Delta>, lease: impl Any + Send + Sync) -> Self {
        Self { name, id, delta, mix: None, lease: Arc::new(lease), reload: None }
    }

    /// The mean of deltas whose weights are to be trained, with what keeps them in memory.
    pub(super) fn mixed(mean: Arc<Delta>, mix: Mix, of: Vec<Self>) -> Self {
        let name = of.iter().map(Self::name).collect::<Vec<_>>().join(" + ");
        let id = of.first().map_or(DeltaId::from_bytes([0; 32]), |d| d.id);
        Self { name, id, delta: mean, mix: Some(Arc::new(mix)), lease: Arc::new(of), reload: None }
    }

    /// A job that mixes may let go of its deltas while it waits: this leases them again.
    pub fn reloaded_by(self, reload: Reload) -> Self {
        Self { reload: Some(reload), ..self }
    }

    /// `name@number`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The version.
    pub(super) fn id(&self) -> DeltaId {
        self.id
    }

    /// Its tensors.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }

    /// What it is the mean of, if the weights of deltas are to be trained.
    pub(super) fn mix(&self) -> Option<&Mix> {
        self.mix.as_deref()
    }

    /// What a job's record says of it without its head.
    pub(super) fn record(&self) -> StartedFrom {
        StartedFrom { name: self.name.clone(), id: self.id.to_string(), head: false }
    }
}

impl std::fmt::Debug for StartingDelta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StartingDelta({}, {})", self.name, self.id)
    }
}

/// A delta to continue and, for EWC, the old examples as JSON lines.
#[derive(Debug, Clone, Copy)]
pub struct Continue<'a> {
    /// The delta.
    pub from: &'a StartingDelta,
    /// The old task's examples.
    pub old: Option<&'a [u8]>,
}

/// What a job starts from.
#[derive(Debug, Clone)]
pub struct Continued {
    /// Patches and, where it is taken, the head, its rows in the order of the job's labels.
    pub delta: Arc<Delta>,
    /// What it holds on to.
    pub ewc: Option<Ewc>,
    /// Where it comes from, with the lease.
    from: StartingDelta,
}

/// EWC's side of a job.
#[derive(Debug, Clone)]
pub struct Ewc {
    /// Strength.
    pub lambda: f64,
    /// The delta that was good at the old task, with its head.
    pub delta: Arc<Delta>,
    /// Whether the job goes on with that head; a fresh one is free.
    pub head: bool,
    /// Examples of the old task.
    pub examples: Arc<[Encoded]>,
}

impl Continued {
    /// What the job's record says of the delta that it continues, if that is what it does.
    pub(super) fn record(&self) -> Option<StartedFrom> {
        self.from.mix.is_none().then(|| StartedFrom { head: self.delta.head().is_some(), ..self.from.record() })
    }

    /// What a run that mixes deltas holds beside its variables, in bytes.
    pub(super) fn held_bytes(&self) -> u64 {
        self.from.mix().map_or(0, Mix::bytes)
    }

    /// What the job's record says of the deltas that it mixes.
    pub(super) fn mix_record(&self) -> Option<ResolvedMix> {
        self.from.mix().map(Mix::record)
    }

    /// What a run takes that mixes deltas: without their mean, which only planning needs.
    pub(super) fn mixture(&self) -> Option<Mixture> {
        let StartingDelta { mix, lease, reload, .. } = &self.from;
        mix.as_ref().map(|mix| Mixture::new(Arc::clone(mix), Arc::clone(lease), reload.clone()))
    }

    /// What the job's record says of EWC.
    pub(super) fn ewc_record(&self) -> Option<ResolvedEwc> {
        self.ewc.as_ref().map(|e| ResolvedEwc { lambda: e.lambda, examples: e.examples.len() as u32 })
    }

    /// Numbers that are trained: the delta's own, and a fresh head's where it brings none.
    pub(super) fn parameters(&self, spec: &TrainSpec, sites: &SiteTable) -> u64 {
        if let Some(mix) = self.from.mix() {
            return mix.parameters(sites) + spec.head.map_or(0, |plan| plan.parameters() as u64);
        }
        let mut seen = HashSet::new(); // a tensor that two patches share is one variable
        let patches = self.delta.patches().iter().flat_map(|(_, p)| p.tensors()).map(|(_, t)| t);
        let head = self.delta.head().into_iter().flat_map(Head::tensors).map(|(_, t)| t);
        let own: usize = patches.chain(head).filter(|t| seen.insert(t.id())).map(Tensor::elem_count).sum();
        let fresh = spec.head.filter(|_| self.delta.head().is_none()).map_or(0, HeadPlan::parameters);
        (own + fresh) as u64
    }

    /// The variables of a job that continues a delta.
    ///
    /// # Errors
    /// The device.
    pub(super) fn trainable(&self, spec: &TrainSpec, base: &Base, seed: u64) -> candle_core::Result<Trainable> {
        let matrix = |site| match base.linear(site)? {
            Some((weight, bias)) => DoraBase::new(weight, bias),
            None => candle_core::bail!("no matrix at {site}"),
        };
        Trainable::continuing(&self.delta.over(matrix)?, spec, &base.sites, seed, &base.device)
    }
}

/// The request's parts with what they leave open taken from the delta; without parts, the delta's.
pub(super) fn methods(params: &TrainParams, start: Continue<'_>, base: BaseShape<'_>) -> Adopted {
    match params.methods.as_slice() {
        [] => (spec::parts_of(&start.from.delta, base.sites), Vec::new()),
        given => spec::adopt(given, &start.from.delta, base.hidden),
    }
}

/// Parts, and what is wrong with them.
pub(super) type Adopted = (Vec<MethodPart>, Vec<Violation>);

/// The sites of a request that may continue a delta.
pub(super) fn resolve(
    params: &TrainParams,
    methods: &[MethodPart],
    labels: &[String],
    base: BaseShape<'_>,
    start: Option<Continue<'_>>,
) -> Result<TrainSpec, Vec<Violation>> {
    let kind = (params.task, params.problem);
    match start {
        Some(start) if params.methods.is_empty() => TrainSpec::of_delta(&start.from.delta, kind, labels, base),
        Some(start) => {
            let spec = TrainSpec::resolve_for(methods, kind, labels, base)?;
            spec.check_continues(&start.from.delta, base.sites).map_err(|v| vec![v])?;
            Ok(spec)
        }
        None => TrainSpec::resolve_for(methods, kind, labels, base),
    }
}

/// What is needed beside the delta to continue it.
pub(super) struct Context<'a> {
    pub(super) params: &'a TrainParams,
    pub(super) labels: &'a [String],
    pub(super) codec: &'a TextCodec,
    /// Longest example of the job.
    pub(super) max_length: usize,
    /// Longest example that the context has room for.
    pub(super) room: usize,
}

/// The values and, for EWC, the old examples with what is to be said of them.
///
/// # Errors
/// Every problem of the old examples.
pub(super) fn continued(start: Continue<'_>, cx: &Context<'_>) -> Result<(Continued, Report), Vec<Violation>> {
    let old = &start.from.delta;
    if old.invocation().is_some() {
        let message = "is an activated LoRA (alora_invocation_tokens); it is served, and not trained on".to_owned();
        return Err(vec![violation("from_delta", message)]);
    }
    let bare = || Delta::new(old.spec.clone(), old.patches().to_vec(), None);
    let same = (cx.params.task, cx.params.problem) == (old.spec.task, old.spec.problem);
    let head = same.then(|| ordered_head(old, cx.labels)).flatten();
    let delta = match head {
        Some(Ok(head)) => Delta::new(old.spec.clone(), old.patches().to_vec(), Some(head)),
        Some(Err(e)) => return Err(vec![violation("from_delta", e.to_string())]),
        None => bare(),
    };
    let delta = Arc::new(delta);
    let mut report = Report::default();
    let ewc = match (&cx.params.ewc, start.old) {
        (Some(ewc), Some(bytes)) => {
            // the old head speaks of its own labels, in the order that its rows have
            let (good, labels) = match delta.head() {
                Some(_) => (Arc::clone(&delta), cx.labels.to_vec()),
                None => (Arc::clone(old), old.spec.labels.clone()),
            };
            let labels = LabelSet::new(labels).of_problem(old.spec.problem);
            let examples = old_examples(bytes, old.spec.task, &labels, cx, &mut report)?;
            let most = ewc.max_examples.unwrap_or(FISHER_EXAMPLES) as usize;
            let head = delta.head().is_some();
            Some(Ewc { lambda: ewc.lambda, delta: good, head, examples: spread(&examples, most).into() })
        }
        _ => None,
    };
    Ok((Continued { delta, ewc, from: start.from.clone() }, report))
}

/// The head with its rows in the order of these labels; `None` if it has other labels, or there is none.
fn ordered_head(delta: &Delta, labels: &[String]) -> Option<candle_core::Result<Head>> {
    let head = delta.head()?;
    let set = |names: &[String]| names.iter().cloned().collect::<BTreeSet<_>>();
    if labels.len() != delta.spec.labels.len() || set(labels) != set(&delta.spec.labels) {
        return None;
    }
    let rows: Option<Vec<u32>> =
        labels.iter().map(|l| delta.spec.labels.iter().position(|o| o == l).map(|i| i as u32)).collect();
    let rows = rows?;
    let last = |name: &str| name == "head.weight" || name == "head.bias";
    Some(head.map(&mut |name, t| match last(name) {
        true => t.index_select(&Tensor::new(rows.as_slice(), t.device())?, 0),
        false => Ok(t.clone()),
    }))
}

/// Encoded as the old task's: its own labels and, unless the job's task is the same, its own length.
fn old_examples(
    bytes: &[u8],
    task: Task,
    labels: &LabelSet,
    cx: &Context<'_>,
    report: &mut Report,
) -> Result<Vec<Encoded>, Vec<Violation>> {
    let (data, found) = Dataset::parse(bytes);
    *report = found;
    check_common(&data, task, labels, report);
    let max_length = if task == cx.params.task { cx.max_length } else { default_length(task).min(cx.room) };
    let examples = encode(&data, cx.codec, labels, max_length, report);
    match report.is_ok() {
        true => Ok(examples),
        false => Err(report.violations("ewc.data")),
    }
}

/// At most `most` of them, evenly spread.
fn spread(all: &[Encoded], most: usize) -> Vec<Encoded> {
    let n = all.len().min(most);
    (0..n).map(|i| all[i * all.len() / n].clone()).collect()
}

fn violation(field: &str, message: String) -> Violation {
    Violation { field: field.into(), code: String::new(), message }
}
