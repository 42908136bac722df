//! Loads that failed a moment ago: whoever asks meanwhile gets the same answer, and the store is left alone.
//!
//! What is remembered is about the version: bytes that are missing, changed or no longer decode, a load that took too long or broke.
//! Whether it lasts is not told apart: corrupt bytes may be put back from a backup, and a disk that is too slow once is so for the
//! next hundred requests, too. So each is tried again after a short while. What is about the server's room (a full budget) is not
//! remembered.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use metrics::Counter;
use parking_lot::Mutex;

use super::RegistryError;
use crate::ids::DeltaId;

/// Most failures that are remembered.
const MOST: usize = 1024;

pub(super) struct Failures {
    /// For how long; zero: not at all.
    after: Duration,
    state: Mutex<State>,
    failed: Counter,
    refused: Counter,
}

#[derive(Default)]
struct State {
    kept: HashMap<DeltaId, (RegistryError, Instant)>,
    /// Loads under way, and whether what they come to is to be forgotten.
    loading: HashMap<DeltaId, bool>,
}

impl Failures {
    pub(super) fn new(after: Duration) -> Self {
        let outcome =
            |outcome: &'static str| metrics::counter!("deltaserve_delta_load_failures_total", "outcome" => outcome);
        Self { after, state: Mutex::default(), failed: outcome("failed"), refused: outcome("refused") }
    }

    /// How a version's last load failed, if that was a moment ago.
    pub(super) fn find(&self, id: &DeltaId) -> Option<RegistryError> {
        let state = &mut *self.state.lock();
        let (error, until) = state.kept.get(id)?;
        let retry = until.saturating_duration_since(Instant::now());
        if retry.is_zero() {
            state.kept.remove(id);
            return None;
        }
        self.refused.increment(1);
        Some(RegistryError::Failing { error: Box::new(error.clone()), retry })
    }

    /// A load begins.
    pub(super) fn begin(&self, id: DeltaId) {
        self.state.lock().loading.insert(id, false);
    }

    /// It has ended.
    pub(super) fn end<T>(&self, id: DeltaId, outcome: &Result<T, RegistryError>) {
        let state = &mut *self.state.lock();
        let forgotten = state.loading.remove(&id).unwrap_or(false);
        state.kept.remove(&id);
        let Err(error) = outcome else { return };
        if !is_of_the_version(error) {
            return;
        }
        self.failed.increment(1);
        if forgotten || self.after.is_zero() {
            return;
        }
        let now = Instant::now();
        if state.kept.len() >= MOST {
            state.kept.retain(|_, (_, until)| *until > now);
        }
        if state.kept.len() >= MOST
            && let Some(first) = state.kept.iter().min_by_key(|(_, (_, until))| *until).map(|(id, _)| *id)
        {
            state.kept.remove(&first);
        }
        state.kept.insert(id, (error.clone(), now + self.after));
    }

    /// Something has changed about a version: its next load is a new matter, also if one is under way.
    pub(super) fn forget(&self, id: &DeltaId) {
        let state = &mut *self.state.lock();
        state.kept.remove(id);
        if let Some(forgotten) = state.loading.get_mut(id) {
            *forgotten = true;
        }
    }

    /// Bytes were written to the store, and versions share them: the next load of each is a new matter.
    pub(super) fn forget_all(&self) {
        let state = &mut *self.state.lock();
        state.kept.clear();
        state.loading.values_mut().for_each(|forgotten| *forgotten = true);
    }
}

fn is_of_the_version(error: &RegistryError) -> bool {
    use RegistryError as E;
    matches!(error, E::Corrupt { .. } | E::LoadTimeout(_) | E::LoadFailed { .. } | E::Store(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> DeltaId {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        DeltaId::from_bytes(bytes)
    }

    fn failed() -> Result<(), RegistryError> {
        Err(RegistryError::LoadTimeout(Duration::from_secs(1)))
    }

    #[test]
    fn a_failure_is_known_for_a_while_and_until_something_changes() {
        let failures = Failures::new(Duration::from_millis(200));
        failures.begin(id(1));
        failures.end(id(1), &failed());
        let Some(RegistryError::Failing { error, retry }) = failures.find(&id(1)) else { panic!("it is known") };
        assert!(matches!(*error, RegistryError::LoadTimeout(_)) && retry <= Duration::from_millis(200));
        assert!(failures.find(&id(2)).is_none());
        failures.forget(&id(1));
        assert!(failures.find(&id(1)).is_none());
        // what changes during a load is not what that load was about
        failures.begin(id(1));
        failures.forget(&id(1));
        failures.end(id(1), &failed());
        assert!(failures.find(&id(1)).is_none());
        failures.end(id(1), &failed());
        failures.begin(id(2));
        failures.forget_all();
        failures.end(id(2), &failed());
        assert!(failures.find(&id(1)).is_none() && failures.find(&id(2)).is_none());
        failures.end(id(1), &failed());
        std::thread::sleep(Duration::from_millis(210));
        assert!(failures.find(&id(1)).is_none(), "its time is over");
    }

    #[test]
    fn only_what_a_version_is_to_blame_for_is_remembered_and_only_if_wanted() {
        let failures = Failures::new(Duration::from_secs(60));
        let full = RegistryError::BudgetFull { needed: 1, used: 1, budget: 1 };
        for error in [full, RegistryError::TooLarge { bytes: 2, budget: 1 }, RegistryError::Abandoned] {
            failures.end(id(1), &Err::<(), _>(error));
            assert!(failures.find(&id(1)).is_none());
        }
        failures.end(id(1), &failed());
        failures.end(id(1), &Ok(()));
        assert!(failures.find(&id(1)).is_none(), "it was loaded since");
        let off = Failures::new(Duration::ZERO);
        off.end(id(1), &failed());
        assert!(off.find(&id(1)).is_none());
    }

    #[test]
    fn a_flood_of_bad_versions_takes_bounded_memory() {
        let failures = Failures::new(Duration::from_secs(60));
        for n in 0..MOST as u32 + 50 {
            failures.begin(id(n));
            failures.end(id(n), &failed());
        }
        let state = failures.state.lock();
        assert_eq!((state.kept.len(), state.loading.len()), (MOST, 0));
        assert!(!state.kept.contains_key(&id(0)) && state.kept.contains_key(&id(MOST as u32 + 49)));
    }
}
