//! Datasets and jobs.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream};
use tokio::sync::Semaphore;

use super::{
    catalog_params::{Page, PageRequest},
    params::{ServeError, Violation},
    service::{Pieces, Service},
    train_params::{
        DatasetInfo, DatasetUpload, JobEventInfo, JobInfo, JobState, PlanReply, TrainData, TrainParams, Validation,
        WatchParams,
    },
};
use crate::{
    audit,
    ids::{BlobId, TenantId},
    interop::{self, EncodeMeta},
    model::Base,
    registry::{DeltaLease, DeltaRef, KeptVersion, Registry, RegistryError},
    store::{DatasetRecord, NewDataset},
    train::{
        BaseInfo, Inputs, Kept, Prepared, TrainError,
        beginning::Reload,
        dataset::Dataset,
        joblog::LogError,
        memory::Shortage,
        mixing::Mix,
        prepare,
        spec::BaseShape,
        transfer::{Continue, Continued, StartingDelta},
    },
};

/// Where the bytes of the datasets come from that a request names, by their place in it.
#[derive(Debug, Default)]
pub(super) struct Sources {
    /// Of a job that is prepared again: the blobs that it kept.
    pub(super) kept: HashMap<String, BlobId>,
    /// What was read.
    pub(super) found: Vec<(String, BlobId)>,
}

fn dataset_info(d: &DatasetRecord) -> DatasetInfo {
    DatasetInfo {
        id: d.id.clone(),
        name: d.name.clone(),
        format: d.format.clone(),
        rows: d.rows,
        bytes: d.bytes,
        digest: d.blob.to_string(),
        created_ms: d.created_ms,
    }
}

impl Service {
    /// Stores a dataset after checking every line.
    ///
    /// # Errors
    /// All problems of the data, with line numbers.
    pub async fn upload_dataset(&self, tenant: &TenantId, upload: DatasetUpload) -> Result<DatasetInfo, ServeError> {
        audit::note(|note| {
            note.tenant = tenant.to_string();
            note.detail.clone_from(&upload.name);
        });
        let data = upload.data.clone();
        let (format, rows) = self
            .blocking(move |_| {
                let (dataset, report) = Dataset::parse(&data);
                match (report.is_ok(), dataset.format) {
                    (true, Some(format)) => Ok((format.as_str().to_owned(), dataset.rows.len() as u64)),
                    _ => Err(ServeError::Invalid(report.violations("data"))),
                }
            })
            .await?;
        let store = &self.parts().store;
        let bytes = upload.data.len() as u64;
        // before the bytes are written: what is refused must not fill the disk
        store.check_dataset_room(tenant, bytes).await?;
        let blob = store.put_blob(upload.data).await?;
        let record = store.put_dataset(tenant, NewDataset { name: upload.name, blob, format, rows, bytes }).await?;
        audit::note(|note| (note.object, note.digest) = (record.id.clone(), Some(blob.to_string())));
        Ok(dataset_info(&record))
    }

    /// The tenant's datasets, by id.
    ///
    /// # Errors
    /// The store's.
    pub async fn list_datasets(&self, tenant: &TenantId, page: PageRequest) -> Result<Page<DatasetInfo>, ServeError> {
        let mut all = self.parts().store.list_datasets(tenant).await?;
        all.sort_by(|a, b| a.id.cmp(&b.id));
        if let Some(after) = &page.token {
            all.retain(|d| d.id > *after);
        }
        let more = all.len() > page.size as usize;
        all.truncate(page.size as usize);
        let next = if more { all.last().map(|d| d.id.clone()) } else { None };
        Ok(Page { items: all.iter().map(dataset_info).collect(), next })
    }

    /// One dataset.
    ///
    /// # Errors
    /// Unknown, or another tenant's.
    pub async fn get_dataset(&self, tenant: &TenantId, id: &str) -> Result<DatasetInfo, ServeError> {
        Ok(dataset_info(&self.parts().store.get_dataset(tenant, id).await?))
    }

    /// Deletes a dataset. Jobs that were made from it have their own copy of what they need.
    ///
    /// # Errors
    /// Unknown, or another tenant's.
    pub async fn delete_dataset(&self, tenant: &TenantId, id: &str) -> Result<(), ServeError> {
        note_of(tenant, id);
        Ok(self.parts().store.delete_dataset(tenant, id).await?)
    }

    /// Everything that a job would do, without doing it.
    ///
    /// # Errors
    /// All problems of the request and of its data; no memory for full fine-tuning.
    pub async fn plan(&self, tenant: &TenantId, params: TrainParams) -> Result<PlanReply, ServeError> {
        params.check()?;
        Ok(self.prepare(tenant, Arc::new(params), &mut Sources::default()).await?.reply)
    }

    /// Enqueues a training job; with an idempotency key that the same request was made with, returns that job.
    ///
    /// # Errors
    /// All problems of the request and of its data; no memory for full fine-tuning; too many jobs; a reused idempotency key.
    pub async fn create_job(&self, tenant: &TenantId, params: TrainParams) -> Result<JobInfo, ServeError> {
        note_of(tenant, "");
        audit::note(|note| note.detail = Some(format!("publishes {}", params.output_name)));
        self.check_trains()?;
        params.check()?;
        // a retry is answered whatever has become of the data, the delta and the memory since
        if let Some(job) = self.parts().trainer.made_before(tenant, &params).await? {
            note_of(tenant, &job.id);
            return Ok(job);
        }
        let params = Arc::new(params);
        let mut sources = Sources::default();
        let prepared = self.prepare(tenant, Arc::clone(&params), &mut sources).await?;
        self.check_model_room(tenant, &prepared).await?;
        let kept = Kept { base: self.parts().base.fingerprint.to_string(), blobs: sources.found };
        let job = self.parts().trainer.create(tenant, &params, &prepared, kept).await?;
        note_of(tenant, &job.id);
        Ok(job)
    }

    pub(super) fn check_trains(&self) -> Result<(), ServeError> {
        match self.parts().limits.max_train_jobs {
            0 => Err(ServeError::WrongTask("this server runs without training (--max-train-jobs 0)".into())),
            _ => Ok(()),
        }
    }

    /// Fetches the data and resolves a checked request.
    pub(super) async fn prepare(
        &self,
        tenant: &TenantId,
        params: Arc<TrainParams>,
        sources: &mut Sources,
    ) -> Result<Prepared, ServeError> {
        let train = self.data(tenant, &params.data, "data", sources).await?;
        let validation = match &params.validation {
            Some(Validation::Data(data)) => Some(self.data(tenant, data, "validation", sources).await?),
            _ => None,
        };
        let held = match &params.forgetting {
            Some(data) => Some(self.data(tenant, data, "forgetting", sources).await?),
            None => None,
        };
        let replay = match &params.replay {
            Some(data) => Some(self.data(tenant, data, "replay", sources).await?),
            None => None,
        };
        let from = self.starting_delta(tenant, params.from_delta.as_deref().unwrap_or_default()).await?;
        let (mut mixed, mut kept) = (Vec::new(), Vec::new());
        // ahead of the leases: those who wait hold nothing
        let turn = match &params.mix {
            Some(_) => Some(Arc::clone(&self.inner.merging).acquire_owned().await),
            None => None,
        };
        let turn = turn.transpose().map_err(|e| ServeError::Internal(e.to_string()))?;
        for reference in params.mix.iter().flat_map(|m| &m.deltas) {
            let (registry, wanted): (_, DeltaRef) = (&self.parts().registry, reference.parse()?);
            let version = registry.keep(tenant, &wanted).await?;
            mixed.push(starting(registry.lease_kept(&version).await?));
            kept.push(version);
        }
        let reload = self.reload(kept);
        // their mean, and the same as files
        let bytes: u64 = mixed.iter().map(|d: &StartingDelta| d.delta().bytes()).sum();
        let room = match bytes {
            0 => None,
            _ => Some(self.parts().registry.work_space(bytes.saturating_mul(2)).await.map_err(|e| match e {
                RegistryError::TooLarge { bytes, budget } => {
                    let message = format!("a mean of these takes {bytes} bytes; the resident budget is {budget} bytes");
                    ServeError::field("spec.mix.deltas", message)
                }
                other => other.into(),
            })?),
        };
        let old = match &params.ewc {
            Some(ewc) => Some(self.data(tenant, &ewc.data, "ewc", sources).await?),
            None => None,
        };
        self.blocking(move |parts| {
            let _held = (turn, room);
            let base = &parts.base;
            let from = match &params.mix {
                Some(mix) => {
                    let start = Mix::start(mixed, mix.per_layer, &base.sites).map_err(|v| refused(vec![v]))?;
                    Some(start.reloaded_by(reload))
                }
                None => from,
            };
            let start = from.as_ref().map(|from| Continue { from, old: old.as_deref() });
            let info = BaseInfo { shape: BaseShape::of(base), max_positions: base.arch.max_positions };
            let (validation, forgetting, replay) = (validation.as_deref(), held.as_deref(), replay.as_deref());
            let inputs = Inputs { params: &params, train: &train, validation, forgetting, replay, start };
            let prepared = prepare(inputs, info, &parts.codec);
            let mut prepared = prepared.map_err(|mut found| {
                if params.mix.is_some() {
                    let of_delta = found.iter_mut().filter(|v| v.field == "from_delta");
                    of_delta.for_each(|v| v.field = "mix.deltas".into());
                }
                refused(found)
            })?;
            if let Some(start) = &prepared.start {
                let field = if params.mix.is_some() { "spec.mix.deltas" } else { "spec.from_delta" };
                check_writable(start, base, field)?;
            }
            parts.trainer.fit(&mut prepared)?;
            Ok(prepared)
        })
        .await
    }

    /// A delta that a job starts from, leased until the job has copied its values; none for an empty reference.
    async fn starting_delta(&self, tenant: &TenantId, reference: &str) -> Result<Option<StartingDelta>, ServeError> {
        Ok(self.lease(tenant, reference).await?.map(starting))
    }

    /// What leases the deltas of a mix again when the job's turn has come.
    fn reload(&self, kept: Vec<KeptVersion>) -> Reload {
        let (registry, merging) = (self.parts().registry.clone(), Arc::clone(&self.inner.merging));
        let kept = Arc::new(kept);
        Reload::new(move || {
            let (registry, merging, kept) = (registry.clone(), Arc::clone(&merging), Arc::clone(&kept));
            async move {
                let mut waits = RELOAD_WAITS.into_iter().map(Duration::from_secs);
                loop {
                    match lease_all(&registry, &merging, &kept).await {
                        // room comes back when others are done; meanwhile nothing is held
                        Err(RegistryError::BudgetFull { .. } | RegistryError::LoadTimeout(_)) if waits.len() > 0 => {
                            tokio::time::sleep(waits.next().unwrap_or_default()).await;
                        }
                        found => return found.map_err(|e| e.to_string()),
                    }
                }
            }
            .boxed()
        })
    }

    /// The bytes of a request's data.
    async fn data(
        &self,
        tenant: &TenantId,
        data: &TrainData,
        place: &str,
        sources: &mut Sources,
    ) -> Result<Bytes, ServeError> {
        match data {
            TrainData::Jsonl(text) => Ok(Bytes::from(text.clone().into_bytes())),
            TrainData::Dataset(id) => {
                let store = &self.parts().store;
                let blob = match sources.kept.get(place) {
                    Some(blob) => *blob,
                    None => store.get_dataset(tenant, id).await?.blob,
                };
                sources.found.push((place.to_owned(), blob));
                Ok(store.get_blob(blob).await?)
            }
        }
    }

    /// One job.
    ///
    /// # Errors
    /// Unknown, or another tenant's.
    pub async fn get_job(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, ServeError> {
        Ok(self.parts().trainer.get(tenant, id).await?)
    }

    /// The tenant's jobs, newest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn list_jobs(
        &self,
        tenant: &TenantId,
        page: PageRequest,
        state: Option<JobState>,
    ) -> Result<Page<JobInfo>, ServeError> {
        let (items, next) = self.parts().trainer.list(tenant, page.token.as_deref(), page.size, state).await?;
        Ok(Page { items, next })
    }

    /// A job's events from a sequence number on: replayed, then followed, until the terminal one.
    ///
    /// # Errors
    /// Unknown, or another tenant's.
    pub async fn watch_job(&self, tenant: &TenantId, params: WatchParams) -> Result<Pieces<JobEventInfo>, ServeError> {
        let watch = self.parts().trainer.watch(tenant, &params.job, params.from_seq).await?;
        let events = stream::unfold(Some(watch), |watch| async move {
            let mut watch = watch?;
            match watch.next().await {
                Ok(Some(event)) => Some((Ok(event), Some(watch))),
                Ok(None) => None,
                Err(e) => Some((Err(e.into()), None)),
            }
        });
        Ok(events.boxed())
    }

    /// Ends a job.
    ///
    /// # Errors
    /// Unknown, or another tenant's.
    pub async fn cancel_job(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, ServeError> {
        note_of(tenant, id);
        Ok(self.parts().trainer.cancel(tenant, id).await?)
    }
}

/// Says whose and which thing a call changes.
pub(super) fn note_of(tenant: &TenantId, object: &str) {
    audit::note(|note| (note.tenant, note.object) = (tenant.to_string(), object.to_owned()));
}

/// Seconds between the tries to load the deltas of a mix while there is no room for them.
const RELOAD_WAITS: [u64; 5] = [1, 2, 4, 8, 16];

/// Leases all of the versions or none, in turn with merges: several that each hold a part could wait for each other.
async fn lease_all(
    registry: &Registry,
    turns: &Semaphore,
    kept: &[KeptVersion],
) -> Result<Vec<StartingDelta>, RegistryError> {
    let _turn = turns.acquire().await.map_err(|_| RegistryError::Abandoned)?;
    let mut leased = Vec::with_capacity(kept.len());
    for version in kept {
        leased.push(starting(registry.lease_kept(version).await?));
    }
    Ok(leased)
}

/// A leased delta as what a job starts from.
fn starting(lease: DeltaLease) -> StartingDelta {
    let version = lease.version();
    let name = format!("{}@{}", version.name, version.number);
    StartingDelta::new(name, lease.id(), Arc::clone(lease.delta()), lease)
}

/// Finds out now, not when the job is done: what cannot be written cannot be published.
fn check_writable(start: &Continued, base: &Base, field: &str) -> Result<(), ServeError> {
    let written = interop::encode(&start.delta, base, &EncodeMeta::default());
    written.map_err(|e| ServeError::field(field, format!("cannot be trained further: {e}"))).map(|_| ())
}

fn refused(found: Vec<Violation>) -> ServeError {
    ServeError::Invalid(in_request(found))
}

/// Names the fields as requests do: training knows the spec's own fields, and two words of its own for the data.
fn in_request(mut found: Vec<Violation>) -> Vec<Violation> {
    for violation in &mut found {
        let field = match violation.field.strip_prefix("validation") {
            Some(".fraction") => "validation_fraction".to_owned(),
            Some(rest) => format!("validation_data{rest}"),
            None => std::mem::take(&mut violation.field),
        };
        violation.field = format!("spec.{field}");
    }
    found
}

impl From<TrainError> for ServeError {
    fn from(e: TrainError) -> Self {
        match e {
            TrainError::Overloaded(m) => Self::Overloaded(m),
            TrainError::Quota(limit) => limit.into(),
            TrainError::Draining => Self::Draining,
            TrainError::Down => Self::TrainingDown,
            TrainError::NotFound(name) => Self::NotFound { kind: "job", name },
            TrainError::State { .. } | TrainError::FullRuns(_) => Self::JobState(e.to_string()),
            TrainError::Memory(Shortage { message, lasting }) => Self::NotEnoughMemory { message, lasting },
            TrainError::Log(LogError::IdempotencyConflict(key)) => Self::IdempotencyConflict(key),
            TrainError::Elsewhere(_) | TrainError::Log(LogError::NotOwner(_)) => Self::Conflict(e.to_string()),
            TrainError::Log(LogError::Ended(id)) => Self::Conflict(format!("job {id} has ended")),
            TrainError::Log(LogError::Store(e)) => e.into(),
            TrainError::Log(e) => Self::Internal(e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::{
        delta::{Delta, DeltaSpec, Head, HeadLayer, LowRank, Patch, Task},
        ids::DeltaId,
        model::testing,
        train::{encode::tests::byte_codec, plan::tests::params},
    };

    #[test]
    fn what_will_be_written_is_tried_and_not_a_head_that_is_left_behind() {
        let base = testing::random_base(&testing::tiny_bert(), 7).unwrap();
        let ones = |rows: usize, columns: usize| Tensor::ones((rows, columns), DType::F32, &Device::Cpu).unwrap();
        let (site, entry) = base.sites.linears().next().unwrap();
        let pair = LowRank { a: ones(2, entry.in_dim), b: ones(2, entry.out_dim), scale: 1.0 };
        let spec = DeltaSpec {
            methods: vec!["lora".into()],
            task: Task::SeqCls,
            problem: Default::default(),
            labels: vec!["x".into(), "y".into()],
            num_virtual_tokens: 0,
            parameters: 0,
            resident_bytes: 0,
        };
        // such a head has a place in an adapter's folder only
        let layers = vec![HeadLayer { weight: ones(base.arch.hidden, base.arch.hidden), bias: None, act: None }];
        let head = Head { layers, ..Head::linear(ones(2, base.arch.hidden), None) };
        let old = Arc::new(Delta::new(spec, vec![(site, Patch::LowRank(pair))], Some(head)));
        let from = StartingDelta::new("old@1".into(), DeltaId::from_bytes([1; 32]), old, ());
        let check = |labels: [&str; 2]| {
            let row = |i: usize| format!("{{\"text\": \"{}\", \"label\": \"{}\"}}\n", "#".repeat(i + 1), labels[i % 2]);
            let data: String = (0..6).map(row).collect();
            let params = params(Task::SeqCls, vec![]);
            let start = Some(Continue { from: &from, old: None });
            let inputs = Inputs {
                params: &params,
                train: data.as_bytes(),
                validation: None,
                forgetting: None,
                replay: None,
                start,
            };
            let info = BaseInfo { shape: BaseShape::of(&base), max_positions: base.arch.max_positions };
            check_writable(&prepare(inputs, info, &byte_codec(true)).unwrap().start.unwrap(), &base, "spec.from_delta")
        };
        assert!(check(["p", "q"]).is_ok(), "a fresh head");
        assert!(matches!(check(["x", "y"]), Err(ServeError::Invalid(v)) if v[0].field == "spec.from_delta"));
    }
}
