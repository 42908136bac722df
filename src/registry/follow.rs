//! What other servers do to names in a shared store, taken over within moments: each change has a number, and this asks for
//! those after the last one seen.

use std::time::Duration;

use super::Registry;

/// How often the store is asked.
const EVERY: Duration = Duration::from_millis(500);

impl Registry {
    /// Follows the changes after this one until the store is closed.
    pub(super) async fn follow(self, mut seen: u64) {
        let mut failing = false;
        loop {
            tokio::time::sleep(EVERY).await;
            if self.store.is_closed() {
                return;
            }
            match self.catch_up(seen).await {
                Ok(last) => (seen, failing) = (last, false),
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "what other servers changed is not known for now");
                    }
                    failing = true;
                }
            }
        }
    }

    /// Takes over all changes after this one; the last one seen.
    async fn catch_up(&self, mut seen: u64) -> Result<u64, crate::store::StoreError> {
        loop {
            let (names, last) = self.store.changed_names(seen).await?;
            if last == seen {
                return Ok(seen);
            }
            for name in names {
                self.take_over(name).await;
            }
            seen = last;
        }
    }
}
