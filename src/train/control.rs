//! What the supervisor asks of a job on the trainer thread, and whether its last checkpoint is still on its way to the disk.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const GO_ON: u8 = 0;
const PAUSE: u8 = 1;
const CANCEL: u8 = 2;
const STOP: u8 = 3;

/// What is asked of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    GoOn,
    /// To leave the thread with a checkpoint.
    Pause,
    /// To leave the thread.
    Cancel,
    /// The server goes down: as a pause, or of a whole model as the end.
    Stop,
}

/// Shared by the two sides.
#[derive(Debug, Default)]
pub(crate) struct Control {
    ask: AtomicU8,
    saving: AtomicBool,
    lost: AtomicBool,
}

impl Control {
    pub(crate) fn ask(&self) -> Ask {
        match self.ask.load(Ordering::Relaxed) {
            PAUSE => Ask::Pause,
            CANCEL => Ask::Cancel,
            STOP => Ask::Stop,
            _ => Ask::GoOn,
        }
    }

    /// Asks for a pause, unless the job is to end.
    pub(crate) fn pause(&self) {
        // a cancelled job stays cancelled
        let _ = self.ask.compare_exchange(GO_ON, PAUSE, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Says that the server goes down; what its owner asked for before stands.
    pub(crate) fn stop(&self) {
        let _ = self.ask.compare_exchange(GO_ON, STOP, Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(crate) fn cancel(&self) {
        self.ask.store(CANCEL, Ordering::Relaxed);
    }

    /// The job is another server's now: it leaves the thread, and nothing more is said of it.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
        self.cancel();
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Whether a checkpoint is being written.
    pub(crate) fn is_saving(&self) -> bool {
        self.saving.load(Ordering::Relaxed)
    }

    pub(crate) fn set_saving(&self, saving: bool) {
        self.saving.store(saving, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_owner_asked_for_stands_when_the_server_goes_down() {
        let asked = |asks: &[fn(&Control)]| {
            let control = Control::default();
            asks.iter().for_each(|ask| ask(&control));
            control.ask()
        };
        assert_eq!(asked(&[]), Ask::GoOn);
        assert_eq!(asked(&[Control::stop]), Ask::Stop);
        assert_eq!(asked(&[Control::pause, Control::stop]), Ask::Pause);
        assert_eq!(asked(&[Control::cancel, Control::stop, Control::pause]), Ask::Cancel);
        assert_eq!(asked(&[Control::stop, Control::cancel]), Ask::Cancel);
    }
}
