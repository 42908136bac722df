//! Whether the store is whole: every blob that a row names is there with its size, or, asked for in full, with its digest.
//!
//! What is corrupt is taken out of service by itself: its delta is listed as corrupt and refused, and all else goes on.
//! Nothing that a row names is ever removed here; bytes that are not their blob's are moved aside.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};

use super::{
    Store, StoreError, VersionRecord,
    blobs::Stored,
    db::{Row, from_db, parse, query},
};
use crate::ids::BlobId;

/// Blobs that are read at a time.
const READS: usize = 4;
/// Most that the log tells of one by one.
const TOLD: usize = 100;

/// How thoroughly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// That every blob is there, with its size.
    #[default]
    Quick,
    /// That every blob's bytes have its digest: reads all of them.
    Full,
}

impl std::str::FromStr for Verify {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "quick" => Ok(Self::Quick),
            "full" => Ok(Self::Full),
            _ => Err(format!("is {text:?}; accepted are quick and full")),
        }
    }
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Blobs that rows name.
    pub blobs: u64,
    /// Their bytes, of those that are there.
    pub bytes: u64,
    /// Those that are missing or have other bytes, and what names them.
    pub corrupt: BTreeMap<BlobId, String>,
    /// Those that could not be looked at: the blob store did not answer.
    pub unknown: u64,
    /// Rows put right.
    pub repaired: u64,
    /// How long it took.
    pub took: Duration,
}

/// What names a blob.
#[derive(Default)]
struct Named {
    size: Option<u64>,
    by: Vec<String>,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = self.by.len().saturating_sub(3);
        f.write_str(&self.by[..self.by.len() - more].join(", "))?;
        if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
    }
}

impl Store {
    /// Compares rows and blobs, takes what is corrupt out of service, and puts right what is safe to: file rows that a
    /// deleted version kept. Says so in the log and in metrics.
    ///
    /// # Errors
    /// What the database refuses, or the blob store's whole listing.
    pub async fn verify(&self, how: Verify) -> Result<Verified, StoreError> {
        let began = Instant::now();
        let mut found = Verified { repaired: self.repair().await?, ..Verified::default() };
        let named = self.named_by().await?;
        found.blobs = named.len() as u64;
        // rows first: what was published in between is not missed in the list
        let listed: HashMap<BlobId, u64> =
            self.blobs().list().await?.into_iter().map(|Stored { id, bytes, .. }| (id, bytes)).collect();
        found.bytes = named.keys().filter_map(|blob| listed.get(blob)).sum();
        let suspect: Vec<(BlobId, Option<u64>)> = match how {
            Verify::Full => named.iter().map(|(blob, n)| (*blob, n.size)).collect(),
            Verify::Quick => named
                .iter()
                .filter(|(blob, n)| listed.get(blob).is_none_or(|bytes| n.size.is_some_and(|size| size != *bytes)))
                .map(|(blob, n)| (*blob, n.size))
                .collect(),
        };
        let blobs = self.blobs();
        let mut looked = stream::iter(suspect)
            .map(move |(blob, size)| async move { (blob, blobs.get(blob, size).await) })
            .buffer_unordered(READS);
        while let Some((blob, read)) = looked.next().await {
            match read {
                Ok(_) => {}
                // what nobody names any more was removed in the meantime
                Err(StoreError::Corrupt { reason, .. }) if self.is_named(self.db(), blob).await? => {
                    self.blobs().quarantine(blob, &reason, !self.is_shared()).await?;
                    let by = named.get(&blob).map(Named::to_string).unwrap_or_default();
                    found.corrupt.insert(blob, format!("{by}: {reason}"));
                }
                Err(StoreError::Corrupt { .. }) => self.blobs().forget(blob),
                Err(error) => {
                    tracing::warn!(%blob, %error, "a blob could not be verified");
                    found.unknown += 1;
                }
            }
        }
        drop(looked);
        found.took = began.elapsed();
        tell(&found, how);
        Ok(found)
    }

    /// Whether a version is known to be corrupt: its bytes were found missing or changed.
    pub fn is_corrupt(&self, version: &VersionRecord) -> bool {
        version.files.iter().any(|file| self.blobs().is_quarantined(file.blob))
    }

    /// Removes file rows that name blobs for a version that is deleted.
    async fn repair(&self) -> Result<u64, StoreError> {
        let mut tx = self.db().begin().await?;
        let sql = "DELETE FROM version_files WHERE EXISTS (SELECT 1 FROM versions v WHERE v.tenant = version_files.tenant \
                   AND v.name = version_files.name AND v.number = version_files.number AND v.deleted_ms IS NOT NULL)";
        let repaired = query(sql).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(repaired)
    }

    async fn named_by(&self) -> Result<HashMap<BlobId, Named>, StoreError> {
        let mut tx = self.db().snapshot().await?;
        let mut named = HashMap::<BlobId, Named>::new();
        let mut add = |table, row: &Row, size: Option<i64>, by: String| {
            let blob = parse(table, row.try_get("blob")?)?;
            let entry = named.entry(blob).or_default();
            entry.size = size.map(|size| from_db(table, size)).transpose()?.or(entry.size);
            entry.by.push(by);
            Ok::<_, StoreError>(())
        };
        let text = |row: &Row, column: &'static str| row.try_get::<String, _>(column);
        let sql = "SELECT tenant, name, number, blob, bytes FROM version_files";
        for row in &query(sql).fetch_all(&mut *tx).await? {
            let number: i64 = row.try_get("number")?;
            let by = format!("delta {}/{}@{number}", text(row, "tenant")?, text(row, "name")?);
            add("version_files", row, Some(row.try_get("bytes")?), by)?;
        }
        for row in &query("SELECT tenant, id, blob, bytes FROM datasets").fetch_all(&mut *tx).await? {
            let by = format!("dataset {}/{}", text(row, "tenant")?, text(row, "id")?);
            add("datasets", row, Some(row.try_get("bytes")?), by)?;
        }
        for row in &query("SELECT job_id, name, blob FROM job_blobs").fetch_all(&mut *tx).await? {
            add("job_blobs", row, None, format!("{} of job {}", text(row, "name")?, text(row, "job_id")?))?;
        }
        for row in &query("SELECT job_id, blob FROM job_checkpoints").fetch_all(&mut *tx).await? {
            add("job_checkpoints", row, None, format!("checkpoint of job {}", text(row, "job_id")?))?;
        }
        Ok(named)
    }
}

fn tell(found: &Verified, how: Verify) {
    for (blob, why) in found.corrupt.iter().take(TOLD) {
        tracing::error!(%blob, why, "corrupt: out of service");
    }
    metrics::counter!("deltaserve_store_repairs_total").increment(found.repaired);
    let (corrupt, seconds) = (found.corrupt.len(), found.took.as_secs_f32());
    let Verified { blobs, bytes, unknown, repaired, .. } = found;
    if corrupt == 0 && *unknown == 0 {
        tracing::info!(?how, blobs, bytes, repaired, seconds, "the store is whole");
    } else {
        tracing::error!(?how, blobs, bytes, corrupt, unknown, repaired, seconds, "the store is not whole");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::params::PublishPolicy::Upsert,
        store::{
            testing::{Place, on_each_database},
            versions::tests::new_version,
        },
    };

    on_each_database!(what_is_missing_or_changed_is_found_named_and_refused_and_the_rest_is_served);

    async fn what_is_missing_or_changed_is_found_named_and_refused_and_the_rest_is_served(place: Place) {
        let store = place.open().await;
        let mut versions = Vec::new();
        for name in ["whole", "missing", "cut", "changed"] {
            let (version, _) = store.publish(new_version(name, &format!("weights of {name}"), Upsert)).await.unwrap();
            versions.push(version);
        }
        assert_eq!(store.verify(Verify::Full).await.unwrap().corrupt, BTreeMap::new());
        let weights = |i: usize| versions[i].files.iter().find(|f| f.bytes > 2).unwrap().blob;
        let path = |i: usize| {
            let hex = weights(i).to_string();
            place.dir().join("blobs").join(&hex[..2]).join(hex)
        };
        std::fs::remove_file(path(1)).unwrap();
        std::fs::write(path(2), "weig").unwrap();
        std::fs::write(path(3), "WEIGHTS of changed").unwrap();
        let quick = store.verify(Verify::Quick).await.unwrap();
        assert_eq!(quick.corrupt.keys().copied().collect::<Vec<_>>(), {
            let mut two = vec![weights(1), weights(2)];
            two.sort();
            two
        });
        assert!(quick.corrupt[&weights(1)].contains("delta t/missing@1: missing"), "{quick:?}");
        // a digest tells what a size does not
        assert!(!store.is_corrupt(&versions[3]));
        let full = store.verify(Verify::Full).await.unwrap();
        assert_eq!((full.corrupt.len(), full.blobs, full.unknown), (3, 5, 0));
        for (i, version) in versions.iter().enumerate() {
            assert_eq!(store.is_corrupt(version), i > 0);
            let read = store.read_files(version).await;
            assert!(if i == 0 { read.is_ok() } else { matches!(read, Err(StoreError::Corrupt { .. })) }, "{i}");
        }
        // the same bytes again heal it
        store.publish(new_version("missing", "weights of missing", Upsert)).await.unwrap();
        assert!(!store.is_corrupt(&versions[1]));
        store.read_files(&versions[1]).await.unwrap();
        // also after a restart it is known which are corrupt
        store.close().await;
        drop(store);
        let store = place.open().await;
        assert_eq!(store.verify(Verify::Full).await.unwrap().corrupt.len(), 2);
        // put back by hand
        std::fs::write(path(3), "weights of changed").unwrap();
        store.read_files(&versions[3]).await.unwrap();
        assert!(!store.is_corrupt(&versions[3]) && store.is_corrupt(&versions[2]));
    }

    #[tokio::test]
    async fn file_rows_of_deleted_versions_are_repaired() {
        let place = Place::sqlite();
        let store = place.open().await;
        store.publish(new_version("n", "1", Upsert)).await.unwrap();
        store.publish(new_version("n", "2", Upsert)).await.unwrap();
        let mut tx = store.db().begin().await.unwrap();
        query("UPDATE versions SET deleted_ms = 1 WHERE number = 1").execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(store.verify(Verify::Quick).await.unwrap().repaired, 2);
        assert_eq!(store.verify(Verify::Quick).await.unwrap().repaired, 0);
        assert_eq!(store.collect_garbage_after(Duration::ZERO).await.unwrap().blobs, 1);
    }
}
