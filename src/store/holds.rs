//! Which blobs are being written or have just been written, so that the garbage collector leaves them alone.
//!
//! A publisher holds its blobs from before the first byte until its rows are committed. The collector claims a blob,
//! looks for rows once more, and only then deletes it. A claim is refused while anyone holds the blob; a holder waits
//! while the collector has it claimed, and then finds it absent and writes it again. So at every instant either a row
//! or a hold protects a blob, or nobody needs it. In a shared database a hold is a row, too, which runs out by itself, and
//! so is a claim: the same holds among servers. A row that names a blob is written only while the hold has not run out.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    Store, StoreError, VersionRecord,
    db::{Conn, query},
    leases::milliseconds,
};
use crate::ids::BlobId;

/// How long a blob written without a row stays safe from the collector: the time in which its writer names it.
pub(super) const GRACE: Duration = Duration::from_secs(3600);
/// Entries kept before those past their grace are thrown out.
const SWEEP_AT: usize = 8192;
/// How long a hold among servers lasts; those that are still needed are renewed at each collection, hourly.
const HOLD: Duration = Duration::from_secs(3 * 3600);
/// How long a claim among servers counts: beyond the longest wait for the removal of a blob.
pub(super) const CLAIM: Duration = Duration::from_secs(300);
/// Longest wait of a holder for a server that is removing the blob.
const CLAIMED: Duration = Duration::from_secs(60);

struct Held {
    holders: usize,
    claimed: bool,
    /// When it was last taken or let go; `None`: never by this process.
    touched: Option<Instant>,
}

impl Held {
    fn fresh(&self, now: Instant, grace: Duration) -> bool {
        self.holders > 0 || self.claimed || self.touched.is_some_and(|at| now.duration_since(at) < grace)
    }
}

/// The blobs in somebody's hands.
pub(super) struct Holds {
    held: Mutex<HashMap<BlobId, Held>>,
    unclaimed: Notify,
}

impl Holds {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { held: Mutex::new(HashMap::new()), unclaimed: Notify::new() })
    }

    /// Protects a blob until the hold is dropped, and for [`GRACE`] after. Waits for a collector that has it claimed.
    pub(super) async fn hold(self: &Arc<Self>, blob: BlobId) -> Hold {
        loop {
            let mut unclaimed = std::pin::pin!(self.unclaimed.notified());
            unclaimed.as_mut().enable();
            if self.try_hold(blob) {
                return Hold { holds: Arc::clone(self), blob };
            }
            unclaimed.await;
        }
    }

    fn try_hold(&self, blob: BlobId) -> bool {
        let now = Instant::now();
        let mut held = self.held.lock();
        if held.len() >= SWEEP_AT {
            held.retain(|_, h| h.fresh(now, GRACE));
        }
        let entry = held.entry(blob).or_insert(Held { holders: 0, claimed: false, touched: None });
        if entry.claimed {
            return false;
        }
        entry.holders += 1;
        entry.touched = Some(now);
        true
    }

    /// Claims a blob for deletion; `None` if it is held or was within `grace`.
    pub(super) fn claim(self: &Arc<Self>, blob: BlobId, grace: Duration) -> Option<Claim> {
        let now = Instant::now();
        let mut held = self.held.lock();
        let entry = held.entry(blob).or_insert(Held { holders: 0, claimed: false, touched: None });
        if entry.fresh(now, grace) {
            return None;
        }
        entry.claimed = true;
        Some(Claim { holds: Arc::clone(self), blob })
    }
}

/// A blob that must not be collected.
pub(super) struct Hold {
    holds: Arc<Holds>,
    blob: BlobId,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(entry) = self.holds.held.lock().get_mut(&self.blob) {
            entry.holders -= 1;
            entry.touched = Some(Instant::now());
        }
    }
}

/// The files of a version, which the collector leaves alone for as long as this lives, also if the version is deleted.
pub struct HeldFiles {
    _blobs: Vec<Hold>,
}

impl Store {
    /// Keeps the files of a version from the collector; takes no memory for them.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn hold_files(&self, version: &VersionRecord) -> Result<HeldFiles, StoreError> {
        let blobs: Vec<BlobId> = version.files.iter().map(|file| file.blob).collect();
        Ok(HeldFiles { _blobs: self.hold(&blobs).await? })
    }

    /// Protects blobs from every server's collector until what this returns is dropped, and for a while after. Waits for a
    /// collector that is removing one.
    pub(super) async fn hold(&self, blobs: &[BlobId]) -> Result<Vec<Hold>, StoreError> {
        let mut held = Vec::with_capacity(blobs.len());
        for blob in blobs {
            held.push(self.inner.holds.hold(*blob).await);
        }
        if self.is_shared() && !blobs.is_empty() {
            self.hold_among_servers(blobs).await?;
        }
        Ok(held)
    }

    async fn hold_among_servers(&self, blobs: &[BlobId]) -> Result<(), StoreError> {
        let began = Instant::now();
        loop {
            let mut tx = self.db().begin().await?;
            let now = tx.now_ms().await?;
            let mut claimed = false;
            for blob in blobs {
                let blob = blob.to_string();
                // not garbage any more; a claim that is old is of a server that died at it
                let sql = "DELETE FROM garbage WHERE blob = $1 AND claimed_ms < $2";
                query(sql).bind(&blob).bind(now - milliseconds(CLAIM)).execute(&mut *tx).await?;
                let row = query("SELECT 1 FROM garbage WHERE blob = $1").bind(&blob).fetch_optional(&mut *tx).await?;
                claimed |= row.is_some();
                let sql = "INSERT INTO blob_holds (blob, owner, until_ms) VALUES ($1, $2, $3) \
                           ON CONFLICT (blob, owner) DO UPDATE SET until_ms = excluded.until_ms";
                let insert = query(sql).bind(&blob).bind(self.server()).bind(now + milliseconds(HOLD));
                insert.execute(&mut *tx).await?;
            }
            if !claimed {
                return tx.commit().await;
            }
            drop(tx);
            if began.elapsed() > CLAIMED {
                return Err(StoreError::NoAnswer { of: "a server that removes unused blobs", waited: CLAIMED });
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Renews the holds that are still needed.
    pub(super) async fn renew_holds(&self) -> Result<(), StoreError> {
        if !self.is_shared() {
            return Ok(());
        }
        let held: Vec<BlobId> = {
            let held = self.inner.holds.held.lock();
            held.iter().filter(|(_, h)| h.holders > 0).map(|(blob, _)| *blob).collect()
        };
        for some in held.chunks(100) {
            self.hold_among_servers(some).await?;
        }
        Ok(())
    }

    /// Refuses to name a blob whose hold has run out: it may have been collected. Within the transaction that names it.
    pub(super) async fn check_held(&self, tx: &mut Conn, blobs: &[BlobId]) -> Result<(), StoreError> {
        if !self.is_shared() {
            return Ok(());
        }
        let now = tx.now_ms().await?;
        for blob in blobs {
            let sql = "SELECT 1 FROM blob_holds WHERE blob = $1 AND owner = $2 AND until_ms > $3";
            let query = query(sql).bind(blob.to_string()).bind(self.server()).bind(now);
            if query.fetch_optional(&mut *tx).await?.is_none() {
                return Err(StoreError::HoldExpired);
            }
        }
        Ok(())
    }
}

/// A blob that is being collected.
pub(super) struct Claim {
    holds: Arc<Holds>,
    blob: BlobId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.holds.held.lock().remove(&self.blob);
        self.holds.unclaimed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_held_blob_cannot_be_claimed_and_a_claimed_one_makes_holders_wait() {
        let holds = Holds::new();
        let blob = BlobId::of(b"x");
        let hold = holds.hold(blob).await;
        assert!(holds.claim(blob, Duration::ZERO).is_none());
        drop(hold);
        assert!(holds.claim(blob, GRACE).is_none(), "within its grace");
        let claim = holds.claim(blob, Duration::ZERO).unwrap();
        assert!(holds.claim(blob, Duration::ZERO).is_none());
        let waiter = tokio::spawn({
            let holds = Arc::clone(&holds);
            async move { holds.hold(blob).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(claim);
        drop(waiter.await.unwrap());
    }
}
