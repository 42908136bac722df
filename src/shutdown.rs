//! Draining: stop accepting, let what runs finish within a grace period, then cut it off.
//!
//! Owns the order of a shutdown, never what is shut down.

use std::{future::Future, io, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The state of a shutdown; clones share it.
#[derive(Debug, Clone)]
pub struct Drain {
    begun: CancellationToken,
    expired: CancellationToken,
    tasks: TaskTracker,
    grace: Duration,
}

impl Drain {
    /// Nothing is draining yet; [`Self::finish`] will wait at most `grace`.
    pub fn new(grace: Duration) -> Self {
        Self { begun: CancellationToken::new(), expired: CancellationToken::new(), tasks: TaskTracker::new(), grace }
    }

    /// Stop accepting.
    pub fn begin(&self) {
        self.begun.cancel();
    }

    /// Whether to refuse new work.
    pub fn is_draining(&self) -> bool {
        self.begun.is_cancelled()
    }

    /// Resolves when draining begins.
    pub fn begun(&self) -> impl Future<Output = ()> + Send + 'static {
        self.begun.clone().cancelled_owned()
    }

    /// Resolves when the grace period is over: what still runs must end now.
    pub fn expired(&self) -> impl Future<Output = ()> + Send + 'static {
        self.expired.clone().cancelled_owned()
    }

    /// Runs a task that [`Self::finish`] waits for, whether or not its caller stays: a publish is never torn in half by
    /// a client that hangs up.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// Waits for the tracked tasks, at most the grace period from now; then expires. True if all ended in time.
    pub async fn finish(&self) -> bool {
        self.begin();
        self.tasks.close();
        let in_time = tokio::time::timeout(self.grace, self.tasks.wait()).await.is_ok();
        self.expired.cancel();
        in_time
    }
}

/// Resolves at SIGTERM or ctrl-c.
///
/// # Errors
/// If the handlers cannot be installed.
pub async fn signal() -> io::Result<&'static str> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok("SIGTERM"),
            done = tokio::signal::ctrl_c() => done.map(|()| "SIGINT"),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.map(|()| "ctrl-c")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn finishing_waits_for_tasks_but_not_beyond_the_grace_period() {
        let drain = Drain::new(Duration::from_millis(50));
        let (tx, rx) = tokio::sync::oneshot::channel::<()>();
        drain.spawn(async move {
            let _ = rx.await;
        });
        assert!(!drain.is_draining());
        assert!(!drain.finish().await, "the task still runs");
        assert!(drain.is_draining());
        drain.expired().await;

        let drain = Drain::new(Duration::from_secs(60));
        let task = drain.spawn(async { 7 });
        drop(tx);
        assert!(drain.finish().await);
        assert_eq!(task.await.ok(), Some(7));
    }
}
