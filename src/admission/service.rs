//! The service: what every edge holds, and the steps that all calls share.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::stream::BoxStream;
use tokio::sync::{OnceCell, Semaphore, mpsc, watch};

use super::{
    catalog_params::check_weighted,
    check::Problems,
    constraints::COMPILATIONS,
    merge::MERGES,
    params::{DeltaChoice, NgramSpeculation, Pooling, ServeError, ServedBy, ServedPart},
    places::Places,
    tenants::{Entered, Meter, TenantLimits, Tenants},
};
use crate::{
    audit::AuditLog,
    delta::Delta,
    engine::{ConstraintFactory, EngineHandle, Event, HeldDelta, Permit, Request, Work},
    grammar::Grammars,
    ids::{DeltaId, TenantId},
    model::Base,
    registry::{Composition, DeltaLease, DeltaRef, Registry, VersionRecord},
    store::Store,
    text::{ChatError, ChatTemplate, TextError, TextModel},
    train::{TrainerHandle, encode::TextCodec},
};

/// A stream of a reply's pieces; dropping it cancels the work behind it.
pub type Pieces<T> = BoxStream<'static, Result<T, ServeError>>;

/// How the base pools by default, as its folder says.
pub type BasePooling = Option<Pooling>;

/// Limits that admission enforces or reports.
#[derive(Debug, Clone, Copy)]
pub struct ServiceLimits {
    /// Sequences that may wait or run.
    pub max_admitted: usize,
    /// Largest message, bytes.
    pub max_message_bytes: u64,
    /// Largest upload, bytes.
    pub max_upload_bytes: u64,
    /// Requests that may wait.
    pub max_queue: usize,
    /// How tokens are guessed ahead for requests that do not say so; `None` = not at all.
    pub speculation: Option<NgramSpeculation>,
    /// Sequences in a batch.
    pub max_sequences: usize,
    /// Rows of an engine step.
    pub max_batch_tokens: usize,
    /// Positions of the key-value cache.
    pub kv_positions: usize,
    /// Jobs queued or running; 0 = no training.
    pub max_train_jobs: usize,
    /// Bytes of compiled constraints, kept ones and those that requests hold.
    pub grammar_bytes: u64,
}

/// What a service is made of.
pub struct ServiceParts {
    /// The resident base.
    pub base: Arc<Base>,
    /// Its name for people.
    pub base_name: String,
    /// Its tokenizer.
    pub text: Arc<TextModel>,
    /// Its chat template.
    pub chat: Option<Arc<ChatTemplate>>,
    /// How its folder says to pool.
    pub pooling: BasePooling,
    /// What training needs of the tokenizer.
    pub codec: TextCodec,
    /// Deltas.
    pub registry: Registry,
    /// Blobs and metadata.
    pub store: Store,
    /// Serving's compute.
    pub engine: EngineHandle,
    /// Training's compute.
    pub trainer: TrainerHandle,
    /// Limits.
    pub limits: ServiceLimits,
    /// Limits of each tenant.
    pub tenants: TenantLimits,
    /// Where it is written what was changed.
    pub audit: AuditLog,
}

/// Joins text, registry, engine and training. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) parts: ServiceParts,
    pub(super) places: Places,
    pub(super) tenants: Tenants,
    /// Merges, one at a time: they compute long.
    pub(super) merging: Arc<Semaphore>,
    /// Those that are made or wait.
    pub(super) merge_places: Semaphore,
    /// Publishing checkpoints of jobs, one at a time.
    pub(super) publishing: Semaphore,
    /// Compiled constraints.
    pub(super) grammars: Arc<Grammars>,
    /// Compiling them, a few at a time.
    pub(super) compiling: Arc<Semaphore>,
    pub(super) started: Instant,
    next_id: AtomicU64,
}

/// One sequence's tokens.
#[derive(Debug, Clone, Default)]
pub(super) struct Input {
    /// What an encoder-decoder's encoder reads; empty for all other bases.
    pub(super) source: Vec<u32>,
    /// The prompt; of an encoder-decoder, how its output begins.
    pub(super) tokens: Vec<u32>,
    /// Segment ids.
    pub(super) types: Option<Vec<u32>>,
}

impl Input {
    /// Tokens that the caller gave.
    pub(super) fn given(&self) -> usize {
        if self.source.is_empty() { self.tokens.len() } else { self.source.len() }
    }
}

/// What a sequence of a call has in common with its siblings.
pub(super) struct Admitted {
    pub(super) tenant: TenantId,
    pub(super) lease: Option<Held>,
    pub(super) deadline: Option<Instant>,
    pub(super) arrived: Instant,
    /// Among the tenant's own requests.
    pub(super) priority: i32,
}

/// The delta of a call, kept resident: a version, or several as one.
#[derive(Debug, Clone)]
pub(super) enum Held {
    One(DeltaLease),
    Sum(Composition),
}

/// A call in progress: it counts against its tenant's limits until this is dropped, and its delta is leased once. One
/// version serves all of its prompts, wherever its name moves meanwhile.
#[derive(Debug, Default)]
pub struct CallLease {
    held: OnceCell<Option<Held>>,
    _entered: Option<Entered>,
}

impl Held {
    pub(super) fn id(&self) -> DeltaId {
        match self {
            Self::One(lease) => lease.id(),
            Self::Sum(sum) => sum.id(),
        }
    }

    pub(super) fn delta(&self) -> &Arc<Delta> {
        match self {
            Self::One(lease) => lease.delta(),
            Self::Sum(sum) => sum.delta(),
        }
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("base", &self.inner.parts.base_name).finish_non_exhaustive()
    }
}

impl Service {
    /// Puts the service together.
    pub fn new(parts: ServiceParts) -> Self {
        let (places, tenants) = (Places::new(parts.limits.max_admitted), Tenants::new(parts.tenants.clone()));
        let (merging, started, next_id) = (Arc::new(Semaphore::new(1)), Instant::now(), AtomicU64::new(1));
        let (merge_places, publishing) = (Semaphore::new(MERGES), Semaphore::new(1));
        let grammars = Arc::new(Grammars::new(Arc::clone(&parts.text), parts.eos(), parts.limits.grammar_bytes));
        let compiling = Arc::new(Semaphore::new(COMPILATIONS));
        let inner =
            Inner { parts, places, tenants, merging, merge_places, publishing, grammars, compiling, started, next_id };
        Self { inner: Arc::new(inner) }
    }

    /// Whether the trainer thread lives; false from when it has ended by itself.
    pub fn training(&self) -> watch::Receiver<bool> {
        self.parts().trainer.alive()
    }

    pub(super) fn parts(&self) -> &ServiceParts {
        &self.inner.parts
    }

    /// How many sequences may wait or run.
    pub(super) fn places(&self) -> &Places {
        &self.inner.places
    }

    /// Counts a call of inference against its tenant's limits, for as long as what is returned lives.
    ///
    /// # Errors
    /// [`ServeError::TenantLimit`].
    pub fn enter(&self, tenant: &TenantId) -> Result<CallLease, ServeError> {
        Ok(CallLease { held: OnceCell::new(), _entered: Some(self.inner.tenants.enter(tenant)?) })
    }

    /// What takes a tenant's tokens, where they are limited.
    pub(super) fn meter(&self, tenant: &TenantId) -> Option<Meter> {
        self.inner.tenants.meter(tenant)
    }

    /// Where it is written what was changed.
    pub fn audit(&self) -> &AuditLog {
        &self.parts().audit
    }

    /// The delta of a call: nothing for an empty reference, never the base for an unknown one.
    pub(super) async fn lease(&self, tenant: &TenantId, reference: &str) -> Result<Option<DeltaLease>, ServeError> {
        if reference.is_empty() {
            return Ok(None);
        }
        let wanted: DeltaRef = reference.parse().map_err(ServeError::from)?;
        Ok(Some(self.parts().registry.lease(tenant, &wanted).await?))
    }

    /// The delta of a call, which may be a weighted sum: it then takes one place of a step as any other.
    async fn held(&self, tenant: &TenantId, choice: &DeltaChoice) -> Result<Option<Held>, ServeError> {
        if let Some(reference) = choice.single() {
            return Ok(self.lease(tenant, reference).await?.map(Held::One));
        }
        let mut problems = Problems::default();
        check_weighted(choice.parts(), 1, &mut problems);
        problems.finish()?;
        let wanted = references(choice.parts())?;
        let sum = self.parts().registry.lease_sum(tenant, &wanted, &self.parts().base.sites).await?;
        Ok(Some(Held::Sum(sum)))
    }

    /// The call's delta and deadline; a call that is late already is not started.
    pub(super) async fn admit(
        &self,
        tenant: &TenantId,
        choice: &DeltaChoice,
        arrived: Instant,
        timeout: Option<Duration>,
    ) -> Result<Admitted, ServeError> {
        self.admit_once(tenant, choice, (arrived, timeout), &CallLease::default()).await
    }

    /// As [`Self::admit`], with the delta that the call has leased already, if it has.
    pub(super) async fn admit_once(
        &self,
        tenant: &TenantId,
        choice: &DeltaChoice,
        (arrived, timeout): (Instant, Option<Duration>),
        call: &CallLease,
    ) -> Result<Admitted, ServeError> {
        let deadline = timeout.and_then(|t| arrived.checked_add(t));
        let lease = async { call.held.get_or_try_init(|| self.held(tenant, choice)).await.cloned() };
        let lease = match deadline {
            Some(at) => match tokio::time::timeout_at(at.into(), lease).await {
                Ok(lease) => lease?,
                Err(_) => return Err(ServeError::DeadlineExceeded(arrived.elapsed())),
            },
            None => lease.await?,
        };
        Ok(Admitted { tenant: tenant.clone(), lease, deadline, arrived, priority: 0 })
    }

    /// Hands one sequence to the engine.
    pub(super) fn submit(
        &self,
        input: Input,
        work: Work,
        admitted: &Admitted,
        place: impl Any + Send + Sync,
    ) -> Result<mpsc::Receiver<Event>, ServeError> {
        self.submit_constrained(input, work, None, admitted, place)
    }

    /// Hands one sequence to the engine whose output is bounded.
    pub(super) fn submit_constrained(
        &self,
        input: Input,
        work: Work,
        constraint: Option<Arc<dyn ConstraintFactory>>,
        admitted: &Admitted,
        place: impl Any + Send + Sync,
    ) -> Result<mpsc::Receiver<Event>, ServeError> {
        self.inner.tenants.check_open(&admitted.tenant)?;
        let (events, receiver) = mpsc::channel(work.events());
        let delta = admitted.lease.as_ref().map(|l| HeldDelta::new(l.id(), Arc::clone(l.delta()), l.clone()));
        let request = Request {
            id: self.inner.next_id.fetch_add(1, Ordering::Relaxed),
            weight: self.inner.tenants.weight(&admitted.tenant),
            tenant: Some(admitted.tenant.clone()),
            priority: admitted.priority,
            source: input.source,
            tokens: input.tokens,
            token_types: input.types,
            delta,
            work,
            constraint,
            deadline: admitted.deadline,
            events,
            permit: Some(Permit::new(place)),
            arrived: admitted.arrived,
        };
        self.parts().engine.submit(request)?;
        Ok(receiver)
    }

    /// The tokens of a prompt as this base takes them: an encoder-decoder reads them with its encoder, and its output
    /// begins with a token of its own.
    pub(super) fn prompt(&self, tokens: Vec<u32>) -> Result<Input, ServeError> {
        let arch = &self.parts().base.arch;
        if !arch.is_encoder_decoder() {
            return Ok(Input { source: vec![], tokens, types: None });
        }
        match arch.decoder_start {
            Some(start) => Ok(Input { source: tokens, tokens: vec![start], types: None }),
            None => Err(no_start()),
        }
    }

    /// Runs text work on the blocking pool.
    pub(super) async fn blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce(&ServiceParts) -> Result<R, ServeError> + Send + 'static,
    ) -> Result<R, ServeError> {
        let this = self.clone();
        match tokio::task::spawn_blocking(move || work(this.parts())).await {
            Ok(result) => result,
            Err(e) => Err(ServeError::Internal(format!("text work ended early: {e}"))),
        }
    }

    /// Longest sequence, prompt and output together.
    pub(super) fn context(&self) -> usize {
        self.parts().engine.max_positions()
    }

    /// The source of an encoder-decoder against its encoder's context, beside what its delta puts ahead of it.
    pub(super) fn check_source(&self, field: &str, input: &Input, admitted: &Admitted) -> Result<(), ServeError> {
        let ahead = admitted.lease.as_ref().map_or(0, |l| l.delta().source_ahead().rows);
        let (limit, source) = (self.context(), input.source.len());
        if source == 0 || ahead + source <= limit {
            return Ok(());
        }
        let more = if ahead > 0 { format!(" behind {ahead} virtual positions of the delta") } else { String::new() };
        let message = format!("comes to {source} tokens{more}, which exceed the encoder's context of {limit}");
        Err(ServeError::field(field, message))
    }

    /// Most tokens of a sequence, beside what its delta puts ahead of them.
    pub(super) fn room(&self, admitted: &Admitted) -> usize {
        let ahead = admitted.lease.as_ref().map(|l| l.delta().ahead()).unwrap_or_default();
        self.parts().engine.max_tokens(ahead)
    }

    /// Tokens of a sequence (of an encoder-decoder: its decoder's) against the context, beside what its delta puts ahead
    /// of them.
    pub(super) fn check_room(
        &self,
        field: &str,
        input: &Input,
        new: usize,
        admitted: &Admitted,
    ) -> Result<(), ServeError> {
        let ahead = admitted.lease.as_ref().map(|l| l.delta().ahead()).unwrap_or_default();
        let (limit, most) = (self.context(), self.parts().engine.max_tokens(ahead));
        let len = input.tokens.len();
        if len > 0 && len + new <= most {
            return Ok(());
        }
        let encoded = !input.source.is_empty();
        let context = if encoded { "decoder's context" } else { "base's context" };
        if len == 0 || (new == 0 && ahead.slots() == 0 && !encoded) {
            let message = format!("comes to {len} tokens; accepted are 1 to {most} (the {context})");
            return Err(ServeError::field(field, message));
        }
        let mut summands = Vec::new();
        if ahead.slots() > 0 {
            summands.push(format!("{} virtual positions of the delta", ahead.slots()));
        }
        summands.push(match (encoded, new) {
            (false, 0) => format!("{len} tokens"),
            (false, _) => format!("{len} prompt tokens"),
            (true, 0) => format!("{len} tokens of the start and the completion"),
            (true, _) => format!("{len} start token"),
        });
        if new > 0 {
            summands.push(format!("{new} new tokens"));
        }
        let (parts, total) = (summands.join(" + "), ahead.slots() + len + new);
        Err(ServeError::field(field, format!("{parts} = {total} exceed the {context} of {limit}")))
    }
}

impl Admitted {
    /// The same with a priority.
    pub(super) fn with_priority(self, priority: i32) -> Self {
        Self { priority, ..self }
    }

    /// What every inference response says of its delta.
    pub(super) fn served_by(&self) -> ServedBy {
        let id = self.lease.as_ref().map(Held::id);
        match &self.lease {
            Some(Held::One(lease)) => {
                let v = lease.version();
                ServedBy { name: v.name.to_string(), number: v.number, id, parts: vec![] }
            }
            Some(Held::Sum(sum)) => {
                let part = |(v, weight): &(Arc<VersionRecord>, f64)| ServedPart {
                    name: v.name.to_string(),
                    number: v.number,
                    id: v.id,
                    weight: *weight,
                };
                ServedBy { name: String::new(), number: 0, id, parts: sum.parts().iter().map(part).collect() }
            }
            None => ServedBy { name: String::new(), number: 0, id, parts: vec![] },
        }
    }
}

/// The references of a weighted list; a bad one is named by its place.
pub(super) fn references(deltas: &[(String, f64)]) -> Result<Vec<(DeltaRef, f64)>, ServeError> {
    let mut problems = Problems::default();
    let mut out = Vec::with_capacity(deltas.len());
    for (i, (reference, weight)) in deltas.iter().enumerate() {
        match reference.parse::<DeltaRef>() {
            Ok(wanted) => out.push((wanted, *weight)),
            Err(e) => problems.push(format!("deltas[{i}].delta"), e.to_string()),
        }
    }
    problems.finish()?;
    Ok(out)
}

/// An encoder-decoder that does not say how its output starts.
pub(super) fn no_start() -> ServeError {
    let message =
        "the base's config.json names no decoder_start_token_id, which generating, scoring and embedding need";
    ServeError::WrongTask(message.into())
}

/// A text error of a named field.
pub(super) fn text_error(field: &str, e: &TextError) -> ServeError {
    match e {
        TextError::TooLong { .. } | TextError::Encode(_) => ServeError::field(field, e.to_string()),
        _ => ServeError::Internal(e.to_string()),
    }
}

/// A chat error of a named field.
pub(super) fn chat_error(field: &str, e: &ChatError) -> ServeError {
    match e {
        ChatError::Text(e) => text_error(field, e),
        _ => ServeError::field(field, e.to_string()),
    }
}
