//! The audit log: who changed what, as JSON lines that are only ever appended. It is apart from the log for people, which
//! may be lost or filtered.
//!
//! Events go through a bounded queue to one thread, which owns the file: it appends what waits, makes it durable with one
//! fsync, and opens the file anew when its name stands for another file or none (rotation). With `required`, a call that
//! changes something is announced before it begins and waits until that is durable; one that cannot be announced is
//! refused. Without, events that find no room are counted as lost, and nobody waits.
//!
//! What a call changes is known deep inside it: whoever knows says so by [`note`], which finds the call's [`Note`] in the
//! task that it runs in.

mod event;
mod writer;

use std::{
    future::Future,
    io,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use metrics::counter;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

pub use event::{Event, Note, Phase, Version};

use crate::telemetry::names;

/// Events that may wait to be written.
const QUEUE: usize = 4096;
/// Longest wait until an event is durable.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the audit log is and whether the server may do without it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditConfig {
    /// The file; `None` = no audit log.
    pub file: Option<PathBuf>,
    /// Refuse what cannot be recorded.
    pub required: bool,
}

/// An event could not be made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the audit log cannot be written")]
pub struct AuditError;

/// The audit log, or none. Clones write to the same.
#[derive(Debug, Clone, Default)]
pub struct AuditLog {
    inner: Option<Arc<Inner>>,
}

#[derive(Debug)]
struct Inner {
    queue: mpsc::Sender<Item>,
    required: bool,
    losing: AtomicBool,
}

/// What the writer gets.
#[derive(Debug)]
enum Item {
    /// A line, and who waits until it is durable.
    Line(String, Option<oneshot::Sender<bool>>),
    /// Nothing follows; answered when all is written.
    End(oneshot::Sender<bool>),
}

impl AuditLog {
    /// Opens (and makes) the file and starts the thread that writes it.
    ///
    /// # Errors
    /// The file system's, or no thread.
    pub fn open(config: &AuditConfig) -> io::Result<Self> {
        let Some(path) = &config.file else { return Ok(Self::default()) };
        let writer = writer::Writer::open(path.clone())?;
        let (queue, items) = mpsc::channel(QUEUE);
        std::thread::Builder::new().name("audit".into()).spawn(move || writer.run(items))?;
        let inner = Inner { queue, required: config.required, losing: AtomicBool::new(false) };
        Ok(Self { inner: Some(Arc::new(inner)) })
    }

    /// Whether there is one.
    pub fn is_on(&self) -> bool {
        self.inner.is_some()
    }

    /// Whether what cannot be recorded must not be done.
    pub fn is_required(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| inner.required)
    }

    /// Records an event; where the log is required, returns when it is durable.
    ///
    /// # Errors
    /// [`AuditError`], only where the log is required.
    pub async fn record(&self, event: &Event) -> Result<(), AuditError> {
        let Some(inner) = &self.inner else { return Ok(()) };
        if !inner.required {
            self.record_now(event);
            return Ok(());
        }
        let (done, written) = oneshot::channel();
        let wait = async {
            inner.queue.send(Item::Line(event.line(), Some(done))).await.map_err(|_| AuditError)?;
            written.await.map_err(|_| AuditError)
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false) | Err(_)) | Err(_) => {
                inner.lose("it was not written in time, or at all");
                Err(AuditError)
            }
        }
    }

    /// Records an event if there is room for it, without waiting for anything.
    pub fn record_now(&self, event: &Event) {
        let Some(inner) = &self.inner else { return };
        match inner.queue.try_send(Item::Line(event.line(), None)) {
            Ok(()) => inner.losing.store(false, Ordering::Relaxed),
            Err(_) => inner.lose("its queue is full"),
        }
    }

    /// Writes what waits, and ends; events that come later are lost.
    pub async fn close(&self) {
        let Some(inner) = &self.inner else { return };
        let (done, ended) = oneshot::channel();
        let wait = async {
            if inner.queue.send(Item::End(done)).await.is_ok() {
                let _ = ended.await;
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            tracing::error!("the audit log could not be written to its end");
        }
    }
}

impl Inner {
    /// Counts a lost event, and says so once per run of them.
    fn lose(&self, why: &str) {
        counter!(names::AUDIT_EVENTS, "outcome" => "lost").increment(1);
        if !self.losing.swap(true, Ordering::Relaxed) {
            tracing::error!(why, "an event is missing in the audit log");
        }
    }
}

tokio::task_local! {
    static NOTE: Arc<Mutex<Note>>;
}

/// Says something about what the present call changes; nothing happens outside of [`noting`].
pub fn note(say: impl FnOnce(&mut Note)) {
    // outside of a call that is recorded there is nobody to tell
    let _ = NOTE.try_with(|note| say(&mut note.lock()));
}

/// Runs a call whose parts may say what it changes.
pub async fn noting<F: Future>(note: Arc<Mutex<Note>>, call: F) -> F::Output {
    NOTE.scope(note, call).await
}

/// Lets a part of the present call say what it changes from a task of its own.
pub fn carried<F: Future>(part: F) -> impl Future<Output = F::Output> {
    let note = NOTE.try_with(Arc::clone).ok();
    async move {
        match note {
            Some(note) => NOTE.scope(note, part).await,
            None => part.await,
        }
    }
}

#[cfg(test)]
mod tests;
