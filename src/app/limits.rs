//! Limits of tenants: from flags, and from a file that is read again when it changes.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};

use crate::{
    admission::{
        MAX_LIMITS_BYTES, Quotas,
        params::{Quota, Rate},
    },
    config::TenantConfig,
    shutdown::Drain,
};

/// How often it is looked whether the file has changed.
pub(super) const LOOK: Duration = Duration::from_secs(2);

/// The limits as they are at the start.
///
/// # Errors
/// What is wrong with the file.
pub(super) async fn quotas(config: &TenantConfig) -> anyhow::Result<Quotas> {
    let rate = |(per_second, burst)| Rate { per_second, burst };
    let quotas = Quotas::new(Quota {
        max_concurrent: config.max_concurrent,
        rate: config.rate.map(rate),
        tokens: config.tokens.map(rate),
        deltas: config.max_deltas,
        versions: config.max_versions,
        stored_bytes: config.max_stored_bytes,
        resident_bytes: config.max_resident_bytes,
        train_jobs: config.max_train_jobs,
        dataset_bytes: config.max_dataset_bytes,
        model_bytes: config.max_model_bytes,
    });
    if let Some(file) = &config.file {
        read(file, &quotas).await.context("--tenant-limits")?;
    }
    Ok(quotas)
}

/// Reads the file again whenever it changes, until the server drains. One that is wrong, or gone, changes nothing.
pub(super) async fn follow(file: PathBuf, every: Duration, quotas: Quotas, drain: Drain) {
    let mut known = mark(&file).await;
    // it may have changed between the first time that it was read and now
    let mut unread = true;
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = drain.begun() => return,
        }
        let now = mark(&file).await;
        if now == known && !unread {
            continue;
        }
        unread = false;
        known = now;
        match read(&file, &quotas).await {
            Ok(named) => tracing::info!(named, "read the limits of tenants"),
            Err(error) => tracing::error!(error = %format!("{error:#}"), "the limits of tenants stay as they were"),
        }
    }
}

/// What tells a file from what it was.
async fn mark(file: &Path) -> Option<(u64, Option<SystemTime>)> {
    let found = tokio::fs::metadata(file).await.ok()?;
    Some((found.len(), found.modified().ok()))
}

async fn read(file: &Path, quotas: &Quotas) -> anyhow::Result<usize> {
    let place = || file.display().to_string();
    let found = tokio::fs::metadata(file).await.with_context(place)?;
    if found.len() > MAX_LIMITS_BYTES {
        bail!("{} has {} bytes; at most {MAX_LIMITS_BYTES} are accepted", place(), found.len());
    }
    let text = tokio::fs::read_to_string(file).await.with_context(place)?;
    quotas.read(&text).with_context(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TenantId;

    #[tokio::test]
    async fn the_file_is_read_at_the_start_and_a_bad_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("limits.json");
        let config = TenantConfig { file: Some(file.clone()), max_deltas: Some(5), ..TenantConfig::default() };
        let error = format!("{:#}", quotas(&config).await.unwrap_err());
        assert!(error.contains("--tenant-limits") && error.contains("limits.json"), "{error}");
        std::fs::write(&file, r#"{"tenants": {"a": {"max_delta": 1}}}"#).unwrap();
        let error = format!("{:#}", quotas(&config).await.unwrap_err());
        assert!(error.contains("max_delta"), "{error}");
        std::fs::write(&file, r#"{"tenants": {"a": {"max_deltas": 1}}}"#).unwrap();
        let quotas = quotas(&config).await.unwrap();
        let deltas = |name| quotas.of(&TenantId::new(name).unwrap()).deltas;
        assert_eq!((deltas("a"), deltas("b")), (Some(1), Some(5)));
    }

    #[tokio::test]
    async fn a_change_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("limits.json");
        std::fs::write(&file, r#"{"tenants": {}}"#).unwrap();
        let config = TenantConfig { file: Some(file.clone()), ..TenantConfig::default() };
        let quotas = quotas(&config).await.unwrap();
        let follows =
            tokio::spawn(follow(file.clone(), Duration::from_millis(5), quotas.clone(), Drain::new(Duration::ZERO)));
        std::fs::write(&file, r#"{"tenants": {"a": {"max_deltas": 3}}}"#).unwrap();
        for _ in 0..1000 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if quotas.of(&TenantId::new("a").unwrap()).deltas == Some(3) {
                follows.abort();
                return;
            }
        }
        panic!("it was not read again");
    }
}
