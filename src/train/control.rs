//! What the supervisor asks of a job on the trainer thread, and whether its last checkpoint is still on its way to the disk.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const GO_ON: u8 = 0;
const PAUSE: u8 = 1;
const CANCEL: u8 = 2;

/// What is asked of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    GoOn,
    /// To leave the thread with a checkpoint.
    Pause,
    /// To leave the thread.
    Cancel,
}

/// Shared by the two sides.
#[derive(Debug, Default)]
pub(crate) struct Control {
    ask: AtomicU8,
    saving: AtomicBool,
}

impl Control {
    pub(crate) fn ask(&self) -> Ask {
        match self.ask.load(Ordering::Relaxed) {
            PAUSE => Ask::Pause,
            CANCEL => Ask::Cancel,
            _ => Ask::GoOn,
        }
    }

    /// Asks for a pause, unless the job is to end.
    pub(crate) fn pause(&self) {
        // a cancelled job stays cancelled
        let _ = self.ask.compare_exchange(GO_ON, PAUSE, Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(crate) fn cancel(&self) {
        self.ask.store(CANCEL, Ordering::Relaxed);
    }

    /// Whether a checkpoint is being written.
    pub(crate) fn is_saving(&self) -> bool {
        self.saving.load(Ordering::Relaxed)
    }

    pub(crate) fn set_saving(&self, saving: bool) {
        self.saving.store(saving, Ordering::Relaxed);
    }
}
