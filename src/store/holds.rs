//! Which blobs are being written or have just been written, so that the garbage collector leaves them alone.
//!
//! A publisher holds its blobs from before the first byte until its rows are committed. The collector claims a blob,
//! looks for rows once more, and only then deletes it. A claim is refused while anyone holds the blob; a holder waits
//! while the collector has it claimed, and then finds it absent and writes it again. So at every instant either a row
//! or a hold protects a blob, or nobody needs it. The directory lock makes this process the only one.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Store, VersionRecord};
use crate::ids::BlobId;

/// How long a blob written without a row stays safe from the collector: the time in which its writer names it.
pub(super) const GRACE: Duration = Duration::from_secs(3600);
/// Entries kept before those past their grace are thrown out.
const SWEEP_AT: usize = 8192;

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
    pub async fn hold_files(&self, version: &VersionRecord) -> HeldFiles {
        let mut blobs = Vec::with_capacity(version.files.len());
        for file in &version.files {
            blobs.push(self.inner.holds.hold(file.blob).await);
        }
        HeldFiles { _blobs: blobs }
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
