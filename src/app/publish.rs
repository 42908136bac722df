//! What becomes of finished jobs: versions of deltas, or folders of whole models.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    admission::{params::ServeError, train_params::ModelResult},
    ids::DeltaName,
    interop::{self, EncodeMeta, InteropError},
    model::{Base, LoadOptions, ModelFolder, write_folder},
    registry::{Publication, Registry},
    store::Origin,
    train::{PublishFailure, PublishJob, Published, Publisher},
};

/// Folder of the data directory that holds models, one folder per job.
pub(super) const MODELS: &str = "models";

fn failure(code: &str, message: impl ToString) -> PublishFailure {
    PublishFailure { code: code.into(), message: message.to_string() }
}

/// Turns what finished jobs made into files and publishes them.
pub(super) fn publisher(base: &Arc<Base>, base_name: &str, registry: &Registry, data_dir: &Path) -> Publisher {
    let (base, base_name, registry) = (Arc::clone(base), base_name.to_owned(), registry.clone());
    let data_dir = data_dir.to_path_buf();
    Arc::new(move |mut job: PublishJob| {
        let (base, base_name, registry) = (Arc::clone(&base), base_name.clone(), registry.clone());
        let data_dir = data_dir.clone();
        Box::pin(async move {
            match job.model.take() {
                Some(model) => keep_model(base, model, data_dir, job.job).await,
                None => publish_delta(&base, base_name, &registry, job).await,
            }
        })
    })
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
    let encoded = tokio::task::spawn_blocking(encode).await.map_err(|e| failure("INTERNAL", e))?;
    let (files, spec) = encoded.map_err(|e| failure("INTERNAL", e))?;
    let name = DeltaName::new(&name).map_err(|e| failure("INVALID_REQUEST", format!("name {e}")))?;
    let publication = Publication { name, files, spec, policy, origin: Origin::Job(job) };
    let version = registry.publish(&tenant, publication).await.map_err(|e| {
        let e = ServeError::from(e);
        failure(e.reason(), &e)
    })?;
    Ok(Published::Version { number: version.number, id: version.id })
}

/// Writes the folder beside its place, loads it as a server would, and moves it there.
async fn keep_model(
    base: Arc<Base>,
    model: ModelFolder,
    data_dir: PathBuf,
    job: String,
) -> Result<Published, PublishFailure> {
    let keep = move || {
        let (part, path) = (data_dir.join(MODELS).join(format!("{job}.part")), data_dir.join(MODELS).join(&job));
        let kept = write_and_read_back(&base, model, &part).and_then(|(fingerprint, bytes)| {
            move_into_place(&part, &path).map_err(|e| failure("INTERNAL", format!("{}: {e}", path.display())))?;
            Ok(ModelResult { path: format!("{MODELS}/{job}"), fingerprint, bytes })
        });
        if kept.is_err() {
            // best effort: swept at the next start
            let _ = fs::remove_dir_all(&part);
        }
        kept
    };
    let kept = tokio::task::spawn_blocking(keep).await.map_err(|e| failure("INTERNAL", e))?;
    kept.map(Published::Model)
}

/// The folder's fingerprint as a base, and its bytes.
fn write_and_read_back(base: &Base, model: ModelFolder, part: &Path) -> Result<(String, u64), PublishFailure> {
    if part.exists() {
        fs::remove_dir_all(part).map_err(|e| failure("INTERNAL", e))?;
    }
    write_folder(base, &model, part).map_err(|e| failure("INTERNAL", e))?;
    drop(model); // its memory is wanted for the reading
    let options = LoadOptions { device: base.device.clone(), ..LoadOptions::default() };
    let read = Base::load(part, &options).map_err(|e| failure("INTERNAL", e))?;
    let size = |entry: io::Result<fs::DirEntry>| Ok::<u64, io::Error>(entry?.metadata()?.len());
    let bytes = fs::read_dir(part).and_then(|files| files.map(size).sum::<io::Result<u64>>());
    Ok((read.fingerprint.to_string(), bytes.map_err(|e| failure("INTERNAL", e))?))
}

fn move_into_place(part: &Path, path: &Path) -> io::Result<()> {
    if path.exists() {
        fs::remove_dir_all(path)?; // of a run that ended before its end was written
    }
    fs::rename(part, path)?;
    path.parent().map_or(Ok(()), |models| fs::File::open(models)?.sync_all())
}

/// Removes half-written models that an earlier process left.
pub(super) fn sweep(data_dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(data_dir.join(MODELS)) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "part") {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
