//! Jobs that are no longer this server's: they leave the trainer thread, and nothing is written of them.

use super::Supervisor;

impl Supervisor {
    /// This server's lease has run out, or may have: whatever it runs and keeps waiting may be another's. What nobody has
    /// taken by the time that the lease is renewed comes back as jobs of a server that is gone do.
    pub(super) fn fence(&mut self) {
        self.queue.clear();
        self.running.retain(|_, job| !job.phase.is_loading());
        for job in self.running.values() {
            job.control.lose();
        }
        self.pacer.hurry();
        self.shared.left.lock().clear();
        let running: Vec<String> = self.running.keys().cloned().collect();
        self.shared.forget_all_but(&running);
    }

    /// The store says that a job is another server's.
    pub(super) fn lose(&self, id: &str) {
        tracing::warn!(job = id, "another server has this job; it is stopped here");
        if let Some(job) = self.running.get(id) {
            job.control.lose();
            self.pacer.hurry();
        }
    }

    pub(super) fn is_lost(&self, id: &str) -> bool {
        self.running.get(id).is_some_and(|job| job.control.is_lost())
    }

    /// A lost job has left the thread.
    pub(super) fn leave(&mut self, id: &str) {
        self.running.remove(id);
        self.shared.forget(id);
    }
}
