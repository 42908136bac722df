//! What clients were told, and what they had asked for when the server died.
//!
//! Each name has one writer, so at most one change of it is under way: after a crash it is as before that change or as after it,
//! and nothing else.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use deltaserve::grpc::proto;
use parking_lot::Mutex;

/// A name as it is or was: live versions (number to digest), the current one, whether it is pinned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) versions: BTreeMap<u64, String>,
    pub(crate) current: Option<u64>,
    pub(crate) pinned: bool,
}

/// What a writer asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// A version with this digest.
    Upload(String),
    Promote(u64),
    Delete,
    Pin(bool),
}

/// What is known of a name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    pub(crate) state: State,
    /// The largest version number that anybody ever saw: it must not be used again.
    highest: u64,
    under_way: Option<Change>,
}

impl Known {
    /// Takes over what was found after a crash, if it can be.
    pub(crate) fn settle(&mut self, found: State) -> Result<(), String> {
        let under_way = self.under_way.take();
        let after = under_way.as_ref().is_some_and(|change| self.is_after(change, &found));
        if found != self.state && !after {
            return Err(format!(
                "acknowledged was {:?}, under way {under_way:?} (versions up to {}), found is {found:?}",
                self.state, self.highest
            ));
        }
        self.take(found);
        Ok(())
    }

    fn take(&mut self, found: State) {
        self.highest = self.highest.max(found.versions.keys().next_back().copied().unwrap_or(0));
        self.state = found;
    }

    fn is_after(&self, change: &Change, found: &State) -> bool {
        let before = &self.state;
        let same = |state: &State| state == found;
        match change {
            Change::Upload(id) => match before.versions.iter().find(|(_, had)| *had == id) {
                Some((number, _)) => same(&State { current: Some(*number), ..before.clone() }),
                None => {
                    let Some(number) = found.current.filter(|n| *n > self.highest) else { return false };
                    let mut after = State { current: Some(number), ..before.clone() };
                    after.versions.insert(number, id.clone());
                    same(&after)
                }
            },
            Change::Promote(number) => {
                before.versions.contains_key(number) && same(&State { current: Some(*number), ..before.clone() })
            }
            Change::Delete => same(&State::default()),
            Change::Pin(pinned) => same(&State { pinned: *pinned, ..before.clone() }),
        }
    }
}

/// What is known of a job.
#[derive(Debug, Clone, Default)]
pub(crate) struct JobNote {
    /// The terminal state that was seen, and what it published: name, number, digest.
    #[allow(clippy::type_complexity, reason = "named in the line above")]
    pub(crate) ended: Option<(i32, Option<(String, u64, String)>)>,
    /// A cancel was asked for.
    pub(crate) cancelled: bool,
}

/// Everything that clients know.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) names: Mutex<BTreeMap<String, Known>>,
    pub(crate) jobs: Mutex<BTreeMap<String, JobNote>>,
    /// Acknowledged datasets.
    pub(crate) datasets: Mutex<BTreeSet<String>>,
    /// Deleted ones, and those whose deletion was under way.
    pub(crate) dropped: Mutex<(BTreeSet<String>, BTreeSet<String>)>,
    /// What a version said first: it must say that always.
    outputs: Mutex<HashMap<String, Vec<u32>>>,
    acknowledged: Mutex<BTreeMap<&'static str, usize>>,
}

impl Ledger {
    pub(crate) fn state(&self, name: &str) -> State {
        self.names.lock().get(name).map(|known| known.state.clone()).unwrap_or_default()
    }

    pub(crate) fn begins(&self, name: &str, change: Change) {
        self.names.lock().entry(name.to_owned()).or_default().under_way = Some(change);
    }

    /// Nothing came of it, and that is certain.
    pub(crate) fn refused(&self, name: &str) {
        self.names.lock().entry(name.to_owned()).or_default().under_way = None;
    }

    /// The change that was under way is acknowledged; an upload with its number.
    pub(crate) fn done(&self, name: &str, number: u64) {
        let mut names = self.names.lock();
        let known = names.entry(name.to_owned()).or_default();
        let mut state = known.state.clone();
        let what = match known.under_way.take() {
            Some(Change::Upload(id)) => {
                let had = state.versions.insert(number, id.clone());
                assert!(had.is_none_or(|had| had == id), "{name}@{number} was other bytes before");
                assert!(known.state.versions.contains_key(&number) || number > known.highest, "{name}@{number} again");
                state.current = Some(number);
                "uploads"
            }
            Some(Change::Promote(number)) => {
                state.current = Some(number);
                "promotions"
            }
            Some(Change::Delete) => {
                state = State::default();
                "deletes"
            }
            Some(Change::Pin(pinned)) => {
                state.pinned = pinned;
                "pins"
            }
            None => panic!("{name}: nothing was under way"),
        };
        known.take(state);
        drop(names);
        self.count(what);
    }

    /// A version has said something.
    pub(crate) fn said(&self, id: &str, tokens: Vec<u32>) {
        let mut outputs = self.outputs.lock();
        match outputs.get(id) {
            Some(first) => assert_eq!(*first, tokens, "version {id} says something else than before"),
            None => drop(outputs.insert(id.to_owned(), tokens)),
        }
    }

    pub(crate) fn job(&self, id: &str, note: impl FnOnce(&mut JobNote)) {
        note(self.jobs.lock().entry(id.to_owned()).or_default());
    }

    pub(crate) fn job_ended(&self, id: &str, end: &proto::StateChange) {
        let made = end.result.as_ref().filter(|r| r.number > 0).map(|r| (r.name.clone(), r.number, r.id.clone()));
        self.job(id, |note| note.ended = Some((end.state, made)));
        self.count("ends of jobs");
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.acknowledged.lock().entry(what).or_default() += 1;
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.acknowledged.lock().values().sum()
    }

    pub(crate) fn summary(&self) -> String {
        let counts = self.acknowledged.lock();
        let parts: Vec<_> = counts.iter().map(|(what, n)| format!("{n} {what}")).collect();
        format!("acknowledged: {}", parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(versions: &[(u64, &str)], current: u64) -> State {
        let versions: BTreeMap<_, _> = versions.iter().map(|(n, id)| (*n, (*id).to_owned())).collect();
        State { current: (current > 0).then_some(current), versions, pinned: false }
    }

    fn known(under_way: Option<Change>) -> Known {
        Known { state: state(&[(1, "a"), (3, "c")], 3), highest: 4, under_way }
    }

    #[test]
    fn after_a_crash_a_name_is_as_before_the_change_or_as_after_it() {
        let upload = |id: &str| Some(Change::Upload(id.into()));
        let before = state(&[(1, "a"), (3, "c")], 3);
        let fits: &[(Option<Change>, State)] = &[
            (None, before.clone()),
            (upload("x"), before.clone()),
            (upload("x"), state(&[(1, "a"), (3, "c"), (5, "x")], 5)),
            (upload("a"), state(&[(1, "a"), (3, "c")], 1)),
            (Some(Change::Promote(1)), state(&[(1, "a"), (3, "c")], 1)),
            (Some(Change::Delete), state(&[], 0)),
            (Some(Change::Pin(true)), State { pinned: true, ..before.clone() }),
        ];
        for (change, found) in fits {
            let mut name = known(change.clone());
            name.settle(found.clone()).unwrap();
            assert_eq!((&name.state, &name.under_way), (found, &None));
        }
    }

    #[test]
    fn a_lost_a_torn_and_a_returned_change_are_told() {
        let upload = Some(Change::Upload("x".into()));
        let wrong: &[(Option<Change>, State)] = &[
            // lost
            (None, state(&[(1, "a")], 1)),
            (None, state(&[], 0)),
            (Some(Change::Promote(1)), state(&[(3, "c")], 3)),
            // torn: the version without the move of its name, the move without the version
            (upload.clone(), state(&[(1, "a"), (3, "c"), (5, "x")], 3)),
            (upload.clone(), state(&[(1, "a"), (3, "c")], 5)),
            // other bytes, a number that was used before
            (upload.clone(), state(&[(1, "a"), (3, "c"), (5, "y")], 5)),
            (upload, state(&[(1, "a"), (3, "c"), (4, "x")], 4)),
            // half a delete
            (Some(Change::Delete), state(&[(1, "a")], 1)),
            // nobody asked for it
            (None, state(&[(1, "a"), (3, "c")], 1)),
        ];
        for (change, found) in wrong {
            assert!(known(change.clone()).settle(found.clone()).is_err(), "{change:?} {found:?}");
        }
        let mut deleted = Known { state: State::default(), highest: 4, under_way: None };
        assert!(deleted.settle(state(&[(3, "c")], 3)).is_err(), "what was deleted came back");
    }
}
