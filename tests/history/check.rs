//! The checker: a pure function from a history to what is wrong with it.
//!
//! The laws are H1 to H8 of the history checker in ARCHITECTURE.md. A name is an atomic register of its current version: a write
//! takes effect at one instant between call and return, and so does a read. A value that was read is explained by a write of
//! it that may have taken effect before the read's end, unless another write lies wholly between that write and the read. That a
//! version was seen sharpens when its write had taken effect at the latest.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::record::{Answer, Call, Change, History, Key, Stage, Time, Value, Version, What, Wrote};

/// How far numbers may be apart: of what they are and absolutely. Sums are taken in another order in other company.
const TOLERANCE: f32 = 2e-3;
const NEVER: Time = Time::MAX;

/// A law that was broken, where, and how.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Violation {
    pub(crate) law: &'static str,
    pub(crate) call: usize,
    pub(crate) how: String,
}

/// What was found, and how much was looked at.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) violations: Vec<Violation>,
    /// Checks made, by law.
    pub(crate) checked: BTreeMap<&'static str, usize>,
    /// Answers of versions whose fingerprint nobody knows.
    pub(crate) unknown: usize,
}

impl Report {
    fn checks(&mut self, law: &'static str, call: usize, holds: bool, how: impl FnOnce() -> String) {
        *self.checked.entry(law).or_default() += 1;
        if !holds {
            self.violations.push(Violation { law, call, how: how() });
        }
    }
}

/// A write that took effect or may have.
struct Effect {
    begun: Time,
    /// When it had taken effect at the latest; [`NEVER`]: perhaps not at all.
    by: Time,
    /// What the name stood for then; `None`: nothing. A number of 0 is not known.
    value: Option<Version>,
}

impl Effect {
    fn gives(&self, version: Option<&Version>) -> bool {
        match (&self.value, version) {
            (None, None) => true,
            (Some(a), Some(b)) => a.id == b.id && (a.number == b.number || a.number == 0),
            _ => false,
        }
    }
}

/// One name's writes.
#[derive(Default)]
struct Register {
    effects: Vec<Effect>,
    /// By the time at which they had taken effect: that time, and the latest beginning of these and all before.
    done: Vec<(Time, Time)>,
    /// Digests that only refused writes would have made.
    refused: BTreeSet<String>,
    /// Who published a digest: the jobs' ids, if jobs did. What is alike has the same digest.
    jobs: HashMap<String, Vec<String>>,
    numbers: HashMap<u64, String>,
}

impl Register {
    fn index(&mut self) {
        let mut done: Vec<_> = self.effects.iter().filter(|e| e.by < NEVER).map(|e| (e.by, e.begun)).collect();
        done.sort_unstable();
        let mut latest = 0;
        for (_, begun) in &mut done {
            latest = latest.max(*begun);
            *begun = latest;
        }
        self.done = done;
    }

    /// The latest beginning of a write that had taken effect before this time.
    fn overwritten(&self, before: Time) -> Time {
        match self.done.partition_point(|(by, _)| *by < before) {
            0 => 0,
            n => self.done[n - 1].1,
        }
    }

    fn explains(&self, read: &Call, version: Option<&Version>) -> bool {
        let cut = self.overwritten(read.begun);
        self.effects.iter().rev().any(|e| e.begun < read.ended && e.by >= cut && e.gives(version))
    }

    /// Whether a version of this number may have been there at some instant of the read.
    fn may_have(&self, read: &Call, version: &Version) -> bool {
        let mut publishes = self.effects.iter().filter(|e| e.gives(Some(version)) && e.begun < read.ended);
        let deletes: Vec<&Effect> = self.effects.iter().filter(|e| e.value.is_none() && e.by < read.begun).collect();
        publishes.any(|p| deletes.iter().all(|d| d.begun <= p.by))
    }

    /// Whether a version of this number may have been absent at some instant of the read.
    fn may_lack(&self, read: &Call, number: u64) -> bool {
        let is = |e: &&Effect| e.value.as_ref().is_some_and(|v| v.number == number);
        let first = self.effects.iter().filter(is).map(|e| e.by).min().unwrap_or(NEVER);
        let begun = self.effects.iter().filter(is).map(|e| e.begun).min().unwrap_or(NEVER);
        let deleted = |d: &Effect| d.value.is_none() && d.begun > 0 && d.by > begun && d.begun < read.ended;
        first >= read.begun || self.effects.iter().any(deleted)
    }
}

/// Checks all laws.
pub(crate) fn check(history: &History) -> Report {
    let mut report = Report::default();
    let stages = stages(history);
    let mut registers = registers(history, &stages);
    sharpen(history, &mut registers);
    let empty = Register::default();
    for (at, call) in history.calls.iter().enumerate() {
        match &call.what {
            What::Read { name, number, answer, alone } => {
                let register = registers.get(name).unwrap_or(&empty);
                if name.is_empty() {
                    base_read(history, &mut report, at, answer, *alone);
                } else {
                    read(&mut report, register, (at, call), *number, answer);
                    values(history, &mut report, at, answer);
                    published(&mut report, register, (at, call), answer, &stages);
                }
            }
            What::List { name, versions } => listed(&mut report, at, name, versions, &stages),
            What::Memory { bytes, resident, budget, emptied } => {
                report.checks("H5", at, bytes <= budget, || format!("{bytes} bytes in memory, at most {budget}"));
                let (baseline, deltas) = history.baseline;
                if *emptied {
                    report.checks("H5", at, *bytes == baseline && *resident == deltas, || {
                        format!("{bytes} bytes of {resident} deltas stay; before there were {baseline} of {deltas}")
                    });
                }
            }
            What::Write { .. } | What::Job { .. } => {}
        }
    }
    latency(history, &mut report);
    report
}

/// What each job was seen to be: stage and window of the look.
fn stages(history: &History) -> HashMap<&str, Vec<(Stage, Time)>> {
    let mut stages: HashMap<&str, Vec<(Stage, Time)>> = HashMap::new();
    for call in &history.calls {
        if let What::Job { id, stage } = &call.what {
            stages.entry(id.as_str()).or_default().push((*stage, call.begun));
        }
    }
    stages
}

fn registers(history: &History, stages: &HashMap<&str, Vec<(Stage, Time)>>) -> HashMap<String, Register> {
    let mut registers: HashMap<String, Register> = HashMap::new();
    for call in &history.calls {
        let What::Write { name, change, wrote } = &call.what else { continue };
        let register = registers.entry(name.clone()).or_default();
        if register.effects.is_empty() {
            // at first there is nothing
            register.effects.push(Effect { begun: 0, by: 0, value: None });
        }
        let by = if matches!(wrote, Wrote::Done(_)) { call.ended } else { NEVER };
        let mut took = |value| register.effects.push(Effect { begun: call.begun, by, value });
        match (change, wrote) {
            (Change::Publish { id: Some(id), .. }, Wrote::Refused) => {
                register.refused.insert(id.clone());
            }
            (_, Wrote::Refused) => {}
            (_, Wrote::Done(value)) => took(value.clone()),
            (Change::Delete, Wrote::Unknown) => took(None),
            (Change::Publish { id: Some(id), .. }, Wrote::Unknown) => took(Some(Version { number: 0, id: id.clone() })),
            // what it points at is a version of this name whose digest is found below
            (Change::Promote(number), Wrote::Unknown) => {
                took(Some(Version { number: *number, id: String::new() }));
            }
            (Change::Publish { id: None, .. }, Wrote::Unknown) => {}
        }
        if let (Change::Publish { job, .. }, Wrote::Done(Some(made))) = (change, wrote) {
            register.numbers.insert(made.number, made.id.clone());
            if let Some(job) = job.as_ref().filter(|job| stages.contains_key(job.as_str())) {
                register.jobs.entry(made.id.clone()).or_default().push(job.clone());
            }
        }
    }
    for register in registers.values_mut() {
        for effect in &mut register.effects {
            if let Some(version) = effect.value.as_mut().filter(|v| v.id.is_empty()) {
                version.id = register.numbers.get(&version.number).cloned().unwrap_or_default();
            }
        }
        register.effects.sort_by_key(|e| e.begun);
        register.index();
        let made: BTreeSet<&String> = register.effects.iter().filter_map(|e| Some(&e.value.as_ref()?.id)).collect();
        register.refused.retain(|id| !made.contains(id));
    }
    registers
}

/// Where only one write gave a version, a read of it had that write behind it.
fn sharpen(history: &History, registers: &mut HashMap<String, Register>) {
    let mut seen: HashMap<&str, HashMap<&Version, Time>> = HashMap::new();
    for call in &history.calls {
        if let What::Read { name, number: None, answer: Answer::By(version, _), .. } = &call.what {
            let first = seen.entry(name.as_str()).or_default().entry(version).or_insert(NEVER);
            *first = call.ended.min(*first);
        }
    }
    for (name, register) in registers.iter_mut() {
        for (version, first) in seen.get(name.as_str()).into_iter().flatten() {
            let mut giving = register.effects.iter_mut().filter(|e| e.gives(Some(version)));
            if let (Some(only), None) = (giving.next(), giving.next()) {
                only.by = only.by.min((*first).max(only.begun));
            }
        }
        register.index();
    }
}

/// H2 (and H6): the version was current in the window, or is the one that was asked for and was there.
fn read(report: &mut Report, register: &Register, (at, call): (usize, &Call), number: Option<u64>, answer: &Answer) {
    match answer {
        Answer::By(version, _) => {
            let invented = register.refused.contains(&version.id);
            report.checks("H6", at, !invented, || format!("{version:?} is of a write that was refused"));
            if invented {
                return;
            }
            let same = register.numbers.get(&version.number).is_none_or(|id| *id == version.id);
            report.checks("H1", at, same, || format!("number {} is another version than {version:?}", version.number));
            match number {
                Some(number) => {
                    let fits = number == version.number && register.may_have(call, version);
                    report.checks("H2", at, fits, || format!("asked for {number}, served by {version:?}"));
                }
                None => {
                    let current = register.explains(call, Some(version));
                    report.checks("H2", at, current, || format!("{version:?} was not current within the call"));
                }
            }
        }
        Answer::NotFound => {
            let fits = match number {
                Some(number) => register.may_lack(call, number),
                None => register.effects.is_empty() || register.explains(call, None),
            };
            report.checks("H2", at, fits, || format!("not found ({number:?}), though it was there all the time"));
        }
        Answer::Failed => {}
    }
}

/// H1 and H4: each value is what the version says alone.
fn values(history: &History, report: &mut Report, at: usize, answer: &Answer) {
    let Answer::By(version, values) = answer else { return };
    if values.is_empty() {
        return;
    }
    if version.id.is_empty() {
        report.checks("H1", at, false, || "a name was answered by the bare base".to_owned());
        return;
    }
    let Some(expected) = history.expected.get(&version.id) else {
        report.unknown += 1;
        return;
    };
    for (key, value) in values {
        let holds = expected.get(key).is_some_and(|wanted| close(wanted, value));
        // in company, what is nobody's fingerprint is a wrong number rather than a wrong version
        let law = if values.len() > 1 && (holds || others(history, *key, value).is_empty()) { "H4" } else { "H1" };
        report.checks(law, at, holds, || {
            let whose = others(history, *key, value);
            format!("{key:?} of {version:?} is {value:?}, wanted {:?}; that is what {whose:?} say", expected.get(key))
        });
    }
}

/// Versions (`base` for none) whose fingerprint this is.
fn others(history: &History, key: Key, value: &Value) -> Vec<String> {
    let is = |known: &BTreeMap<Key, Value>| known.get(&key).is_some_and(|wanted| close(wanted, value));
    let base = is(&history.base).then(|| "base".to_owned());
    base.into_iter().chain(history.expected.iter().filter(|(_, known)| is(known)).map(|(id, _)| id.clone())).collect()
}

/// H3: the bare base says what it says on a server without deltas, alone to the bit.
fn base_read(history: &History, report: &mut Report, at: usize, answer: &Answer, alone: bool) {
    let Answer::By(version, values) = answer else { return };
    report.checks("H3", at, version.id.is_empty(), || format!("the bare base was asked, and {version:?} answered"));
    for (key, value) in values {
        let wanted = history.base.get(key);
        let holds = wanted.is_some_and(|wanted| if alone { same_bits(wanted, value) } else { close(wanted, value) });
        report.checks("H3", at, holds, || format!("{key:?} of the base is {value:?}, wanted {wanted:?}"));
    }
}

/// H7: no version answers before its job has begun to publish.
fn published(
    report: &mut Report,
    register: &Register,
    (at, call): (usize, &Call),
    answer: &Answer,
    stages: &HashMap<&str, Vec<(Stage, Time)>>,
) {
    let Answer::By(version, _) = answer else { return };
    let Some(jobs) = register.jobs.get(&version.id) else { return };
    let trained_later = |(stage, begun): &(Stage, Time)| *stage == Stage::Before && *begun > call.ended;
    let early = jobs.iter().all(|job| stages.get(job.as_str()).into_iter().flatten().any(trained_later));
    report.checks("H7", at, !early, || format!("{version:?} answered, and its job still trained later"));
}

/// H6: what a failed job would have made is nowhere.
fn listed(
    report: &mut Report,
    at: usize,
    name: &str,
    versions: &[(Version, String)],
    stages: &HashMap<&str, Vec<(Stage, Time)>>,
) {
    for (version, origin) in versions {
        let Some(looks) = origin.strip_prefix("job:").and_then(|job| stages.get(job)) else { continue };
        let without = looks.iter().any(|(stage, _)| *stage == Stage::EndedWithout);
        report.checks("H6", at, !without, || format!("{name} has {version:?} of a job that failed"));
    }
}

/// H8: while jobs train, reads stay within their bound.
fn latency(history: &History, report: &mut Report) {
    let is_training =
        |call: &&Call| matches!(&call.what, What::Write { change: Change::Publish { job: Some(_), .. }, .. });
    let jobs: Vec<(Time, Time)> = history.calls.iter().filter(is_training).map(|c| (c.begun, c.ended)).collect();
    let during = |call: &Call| jobs.iter().any(|(begun, ended)| call.begun < *ended && call.ended > *begun);
    let is_read =
        |call: &Call| matches!(&call.what, What::Read { answer: Answer::By(_, values), .. } if !values.is_empty());
    let reads = history.calls.iter().enumerate().filter(|(_, call)| is_read(call) && during(call));
    let mut took: Vec<(Time, usize)> = reads.map(|(at, call)| (call.ended - call.begun, at)).collect();
    took.sort_unstable();
    if let Some((p99, at)) = took.get((took.len() * 99).div_ceil(100).saturating_sub(1)).copied() {
        report.checks("H8", at, p99 <= history.p99, || {
            format!("99 of 100 reads during training took up to {p99} us; the bound is {}", history.p99)
        });
    }
}

fn same_bits(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Tokens(a), Value::Tokens(b)) => a == b,
        (Value::Numbers(a), Value::Numbers(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
        }
        _ => false,
    }
}

/// Tokens are the same; numbers are, but for rounding.
pub(crate) fn close(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Numbers(a), Value::Numbers(b)) => {
            let near = |a: f32, b: f32| (a - b).abs() <= TOLERANCE * (1.0 + a.abs().max(b.abs()));
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| near(*a, *b))
        }
        _ => same_bits(a, b),
    }
}
