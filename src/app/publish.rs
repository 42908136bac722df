//! What becomes of finished jobs: versions of deltas, or folders of whole models.

use std::sync::Arc;

use crate::{
    admission::{params::ServeError, train_params::ModelResult},
    audit::{AuditLog, Event, Note, Phase, Version},
    ids::{BaseFingerprint, DeltaName},
    interop::{self, EncodeMeta, InteropError},
    model::{Base, ModelError, ModelFolder, folder_fingerprint, write_folder},
    registry::{DeltaRef, Publication, Registry},
    store::{Models, Origin, Store, StoreError},
    train::{PublishFailure, PublishJob, Published, Publisher},
};

fn failure(code: &str, message: impl ToString) -> PublishFailure {
    PublishFailure { code: code.into(), message: message.to_string() }
}

fn internal(e: impl ToString) -> PublishFailure {
    failure("INTERNAL", e)
}

/// Turns what finished jobs made into files and publishes them.
pub(super) fn publisher(
    base: &Arc<Base>,
    base_name: &str,
    registry: &Registry,
    store: &Store,
    audit: &AuditLog,
) -> Publisher {
    let (base, base_name, registry) = (Arc::clone(base), base_name.to_owned(), registry.clone());
    let (store, audit) = (store.clone(), audit.clone());
    Arc::new(move |job: PublishJob| {
        let (base, base_name, registry) = (Arc::clone(&base), base_name.clone(), registry.clone());
        let (store, audit) = (store.clone(), audit.clone());
        Box::pin(async move {
            let before = current(&registry, &job);
            let (tenant, object, id) = (job.tenant.to_string(), job.name.clone(), job.job.clone());
            let mut note = Note { tenant, object, before, job: Some(id), ..Note::default() };
            let unrecorded = |_| failure("AUDIT_UNAVAILABLE", "the audit log cannot be written, and must be");
            if audit.is_required() {
                audit.record(&Event::now(Phase::Begin, ACTION, note.clone())).await.map_err(unrecorded)?;
            }
            let published = publish(base, base_name, &registry, &store, job).await;
            let (code, reason) = match &published {
                Ok(Published::Version { number, id }) => {
                    note.after = Some(Version { number: *number, id: id.to_string() });
                    ("ok", String::new())
                }
                Ok(Published::Model(model)) => {
                    note.detail = Some(format!("a model with the fingerprint {}", model.fingerprint));
                    ("ok", String::new())
                }
                Err(e) => ("failed_precondition", e.code.clone()),
            };
            let recorded = audit.record(&Event { code, reason, ..Event::now(Phase::End, ACTION, note) }).await;
            if recorded.is_err() {
                // it is done, and the log has that it began
                tracing::error!("the end of a job's publish is missing in the audit log");
            }
            published
        })
    })
}

/// What the audit log calls it when a job publishes.
const ACTION: &str = "JobPublish";

/// What the name of a job's result stands for.
fn current(registry: &Registry, job: &PublishJob) -> Option<Version> {
    let wanted = DeltaRef::current(DeltaName::new(&job.name).ok()?);
    let version = registry.resolve(&job.tenant, &wanted).ok()?;
    Some(Version { number: version.number, id: version.id.to_string() })
}

async fn publish(
    base: Arc<Base>,
    base_name: String,
    registry: &Registry,
    store: &Store,
    mut job: PublishJob,
) -> Result<Published, PublishFailure> {
    match job.model.take() {
        Some(model) => {
            store.check_new_model(&job.tenant, model.bytes()).await.map_err(|e| {
                let e = ServeError::from(e);
                failure(e.reason(), &e)
            })?;
            keep_model(base, model, store.models(), job.job).await
        }
        None => publish_delta(&base, base_name, registry, job).await,
    }
}

async fn publish_delta(
    base: &Arc<Base>,
    base_name: String,
    registry: &Registry,
    job: PublishJob,
) -> Result<Published, PublishFailure> {
    let PublishJob { job, tenant, name, policy, delta, input, model: _ } = job;
    let meta = EncodeMeta { base_name, rslora: input.rslora, dropout: input.dropout };
    let base = Arc::clone(base);
    // what is served later is what these files say: they are read back before anybody sees them
    let encode = move || {
        let files = interop::encode(&delta, &base, &meta)?;
        let spec = interop::decode(&files, &base)?.spec;
        Ok::<_, InteropError>((files, spec))
    };
    let encoded = tokio::task::spawn_blocking(encode).await.map_err(internal)?;
    let (files, spec) = encoded.map_err(internal)?;
    let name = DeltaName::new(&name).map_err(|e| failure("INVALID_REQUEST", format!("name {e}")))?;
    crate::failpoint!("job-encoded");
    let publication = Publication { name, files, spec, policy, origin: Origin::Job(job) };
    let version = registry.publish(&tenant, publication).await.map_err(|e| {
        let e = ServeError::from(e);
        failure(e.reason(), &e)
    })?;
    Ok(Published::Version { number: version.number, id: version.id })
}

/// Writes the folder beside its place, reads it back, and takes it as the job's model.
async fn keep_model(
    base: Arc<Base>,
    model: ModelFolder,
    models: Models,
    job: String,
) -> Result<Published, PublishFailure> {
    let keep = move || {
        models.check_room(model.bytes()).map_err(|e| match e {
            StoreError::DiskFull { .. } => failure("DISK_FULL", e),
            e => internal(e),
        })?;
        let part = models.begin(&job).map_err(internal)?;
        let written = write_folder(&base, &model, &part);
        crate::failpoint!("model-written");
        drop(model);
        let written = written.map_err(|e| {
            // best effort: swept at the next start
            let _ = models.discard(&job);
            failure("INTERNAL", format!("the model could not be written: {e}"))
        })?;
        accept(&models, &job, written, folder_fingerprint(&part))
    };
    let kept = tokio::task::spawn_blocking(keep).await.map_err(internal)?;
    kept.map(Published::Model)
}

/// Takes a folder that says what was written to it. One that does not, or cannot be read, is kept for a look: it may be
/// all that is left of a long run.
fn accept(
    models: &Models,
    job: &str,
    written: BaseFingerprint,
    found: Result<BaseFingerprint, ModelError>,
) -> Result<ModelResult, PublishFailure> {
    let problem = match found {
        Ok(found) if found == written => match models.keep(job, written.to_string()) {
            Ok(model) => return Ok(model),
            Err(e) => format!("it could not be moved to its place: {e}"),
        },
        Ok(found) => format!("its fingerprint is {found}, and what was written has {written}"),
        Err(e) => e.to_string(),
    };
    let place = match models.set_aside(job) {
        Ok(place) => format!("it is kept as {}", place.display()),
        Err(e) => format!("and it could not be kept: {e}"),
    };
    Err(failure("MODEL_UNREADABLE", format!("the model was written but is not taken: {problem}; {place}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        delta::Task,
        model::{LoadOptions, testing},
    };

    #[tokio::test]
    async fn a_model_is_kept_when_it_was_read_back_and_set_aside_when_not() {
        let dir = tempfile::tempdir().unwrap();
        testing::write_random(&dir.path().join("base"), &testing::tiny_gpt2(), 5).unwrap();
        let base = Arc::new(Base::load(&dir.path().join("base"), &LoadOptions::default()).unwrap());
        let store = Store::open(&dir.path().join("data")).await.unwrap();
        let model = || {
            let weights = testing::private_copy(&base, Task::CausalLm).unwrap().1;
            ModelFolder { weights, head: None, task: Task::CausalLm, problem: Default::default(), labels: vec![] }
        };
        let kept = keep_model(Arc::clone(&base), model(), store.models(), "a".into()).await.unwrap();
        let Published::Model(kept) = kept else { panic!("a model") };
        let served = Base::load(&store.models().path("a"), &LoadOptions::default()).unwrap();
        assert_eq!(kept.fingerprint, served.fingerprint.to_string());
        assert_eq!(store.models().find("a").unwrap(), Some(kept.clone()));
        assert!(model().bytes() < kept.bytes && kept.bytes < model().bytes() + 100_000);

        let unreadable = || ModelError::Checkpoint("torn".into());
        for (found, says) in [(Ok(BaseFingerprint::from_bytes([1; 32])), "fingerprint is"), (Err(unreadable()), "torn")]
        {
            write_folder(&base, &model(), &store.models().begin("b").unwrap()).unwrap();
            let failed = accept(&store.models(), "b", served.fingerprint, found).unwrap_err();
            let place = dir.path().join("data/models/b.unverified");
            assert_eq!(failed.code, "MODEL_UNREADABLE");
            assert!(failed.message.contains(says), "{}", failed.message);
            assert!(failed.message.contains(&place.display().to_string()), "{}", failed.message);
            assert!(place.join("model.safetensors").is_file() && store.models().find("b").unwrap().is_none());
        }
    }
}
