//! The checker is told wrong histories, each with one law broken once, and must say which.

use std::collections::BTreeMap;

use crate::{
    check::check,
    record::{Answer, Call, Change, History, Key, Stage, Time, Value, Version, What, Wrote},
};

const NAME: &str = "default/a";

fn version(number: u64, id: &str) -> Version {
    Version { number, id: id.into() }
}

fn tokens(of: &str) -> Value {
    Value::Tokens(of.bytes().map(u32::from).collect())
}

fn call(begun: Time, ended: Time, what: What) -> Call {
    Call { begun, ended, what }
}

fn write(begun: Time, ended: Time, change: Change, wrote: Wrote) -> Call {
    call(begun, ended, What::Write { name: NAME.into(), change, wrote })
}

fn upload(begun: Time, ended: Time, number: u64, id: &str) -> Call {
    let change = Change::Publish { id: Some(id.into()), job: None };
    write(begun, ended, change, Wrote::Done(Some(version(number, id))))
}

fn publish_of_job(begun: Time, ended: Time, number: u64, id: &str) -> Call {
    let change = Change::Publish { id: None, job: Some("j".into()) };
    write(begun, ended, change, Wrote::Done(Some(version(number, id))))
}

fn promote(begun: Time, ended: Time, number: u64, id: &str) -> Call {
    write(begun, ended, Change::Promote(number), Wrote::Done(Some(version(number, id))))
}

fn delete(begun: Time, ended: Time) -> Call {
    write(begun, ended, Change::Delete, Wrote::Done(None))
}

fn read_as(begun: Time, ended: Time, number: Option<u64>, answer: Answer) -> Call {
    call(begun, ended, What::Read { name: NAME.into(), number, answer, alone: false })
}

/// Says what the version says.
fn read(begun: Time, ended: Time, number: u64, id: &str) -> Call {
    read_as(begun, ended, None, Answer::By(version(number, id), vec![(Key::Generate(0), tokens(id))]))
}

fn job(at: Time, stage: Stage) -> Call {
    call(at, at + 1, What::Job { id: "j".into(), stage })
}

fn memory(bytes: u64, emptied: bool) -> Call {
    call(900, 901, What::Memory { bytes, resident: bytes.min(1), budget: 100, emptied })
}

fn base_read(key: Key, value: Value, alone: bool) -> Call {
    let answer = Answer::By(Version::default(), vec![(key, value)]);
    call(10, 20, What::Read { name: String::new(), number: None, answer, alone })
}

/// Versions `x`, `y` and `z` say their letters, the base says `base` and 0.5.
fn history(calls: Vec<Call>) -> History {
    let says = |id: &str| BTreeMap::from([(Key::Generate(0), tokens(id)), (Key::Embed(0), Value::Numbers(vec![1.0]))]);
    History {
        calls,
        expected: ["x", "y", "z"].map(|id| (id.to_owned(), says(id))).into(),
        base: BTreeMap::from([(Key::Generate(0), tokens("base")), (Key::Embed(0), Value::Numbers(vec![0.5]))]),
        baseline: (0, 0),
        p99: 1000,
    }
}

fn broken(calls: Vec<Call>) -> Vec<&'static str> {
    check(&history(calls)).violations.into_iter().map(|v| v.law).collect()
}

#[track_caller]
fn fine(calls: Vec<Call>) {
    let report = check(&history(calls));
    assert!(report.violations.is_empty(), "{:?}", report.violations);
    assert!(report.checked.values().sum::<usize>() > 0, "nothing was checked");
}

#[test]
fn a_right_history_is_right() {
    fine(vec![
        read_as(1, 2, None, Answer::NotFound),
        upload(10, 20, 1, "x"),
        // within the write: before it and after it
        read_as(12, 13, None, Answer::NotFound),
        read(13, 19, 1, "x"),
        read(30, 40, 1, "x"),
        upload(50, 60, 2, "y"),
        read(45, 55, 1, "x"),
        read(52, 58, 2, "y"),
        read_as(70, 80, Some(1), Answer::By(version(1, "x"), vec![(Key::Generate(0), tokens("x"))])),
        promote(90, 100, 1, "x"),
        read(101, 102, 1, "x"),
        delete(110, 120),
        read(105, 115, 1, "x"),
        read_as(121, 122, None, Answer::NotFound),
        read_as(121, 122, Some(2), Answer::NotFound),
        upload(130, 140, 3, "x"),
        read(141, 150, 3, "x"),
        read_as(141, 150, None, Answer::Failed),
        memory(0, true),
    ]);
}

#[test]
fn what_is_not_certain_is_not_held_against_anybody() {
    let unknown = |change| write(30, 40, change, Wrote::Unknown);
    let publish = Change::Publish { id: Some("y".into()), job: None };
    fine(vec![upload(10, 20, 1, "x"), unknown(publish.clone()), read(50, 60, 1, "x"), read(70, 80, 2, "y")]);
    fine(vec![upload(10, 20, 1, "x"), unknown(Change::Delete), read(50, 60, 1, "x")]);
    fine(vec![upload(10, 20, 1, "x"), unknown(Change::Delete), read_as(50, 60, None, Answer::NotFound)]);
    // seen, it has happened
    let calls = vec![upload(10, 20, 1, "x"), unknown(publish), read(50, 60, 2, "y"), read(70, 80, 1, "x")];
    assert_eq!(broken(calls), ["H2"]);
}

#[test]
fn h1_another_versions_output_is_told() {
    let by_x = |value| read_as(30, 40, None, Answer::By(version(1, "x"), vec![(Key::Generate(0), value)]));
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), by_x(tokens("y"))]), ["H1"]);
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), by_x(tokens("base"))]), ["H1"]);
    // a number is one version for ever
    let calls = vec![upload(10, 20, 1, "x"), upload(21, 22, 2, "y"), read(30, 40, 2, "x")];
    assert!(broken(calls).contains(&"H1"));
    let by_base = read_as(30, 40, None, Answer::By(Version::default(), vec![(Key::Generate(0), tokens("base"))]));
    assert!(broken(vec![upload(10, 20, 1, "x"), by_base]).contains(&"H1"), "a name fell back to the base");
}

#[test]
fn h2_a_version_outside_of_its_time_is_told() {
    // replaced before the call
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), upload(30, 40, 2, "y"), read(50, 60, 1, "x")]), ["H2"]);
    // not there yet
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), read(30, 40, 2, "y"), upload(50, 60, 2, "y")]), ["H2"]);
    // deleted
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), delete(30, 40), read(50, 60, 1, "x")]), ["H2"]);
    // deleted, and asked for by its number
    let by_number = |begun, ended| read_as(begun, ended, Some(1), Answer::By(version(1, "x"), vec![]));
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), delete(30, 40), by_number(50, 60)]), ["H2"]);
    // there all the time
    let lost = |number| read_as(50, 60, number, Answer::NotFound);
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), lost(None)]), ["H2"]);
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), lost(Some(1))]), ["H2"]);
    // another number than the one asked for
    let other = read_as(50, 60, Some(2), Answer::By(version(1, "x"), vec![]));
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), upload(21, 22, 2, "y"), other]), ["H2"]);
    // new, then old again, while the write is still under way
    let calls = vec![upload(10, 20, 1, "x"), upload(30, 90, 2, "y"), read(40, 50, 2, "y"), read(60, 70, 1, "x")];
    assert_eq!(broken(calls), ["H2"]);
    // nobody made it
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), read(30, 40, 7, "z")]), ["H2"]);
}

#[test]
fn h3_a_base_that_deltas_change_is_told() {
    fine(vec![base_read(Key::Generate(0), tokens("base"), true)]);
    assert_eq!(broken(vec![base_read(Key::Generate(0), tokens("x"), false)]), ["H3"]);
    let almost = Value::Numbers(vec![0.500_000_1]);
    fine(vec![base_read(Key::Embed(0), almost.clone(), false)]);
    assert_eq!(broken(vec![base_read(Key::Embed(0), almost, true)]), ["H3"], "alone it is the same to the bit");
    let by_x = Answer::By(version(1, "x"), vec![]);
    let read = call(30, 40, What::Read { name: String::new(), number: None, answer: by_x, alone: false });
    assert_eq!(broken(vec![read]), ["H3"]);
}

#[test]
fn h4_a_batch_that_says_something_else_is_told() {
    let batch = |number| {
        let values = vec![(Key::Generate(0), tokens("x")), (Key::Embed(0), Value::Numbers(vec![number]))];
        vec![upload(10, 20, 1, "x"), read_as(30, 40, None, Answer::By(version(1, "x"), values))]
    };
    fine(batch(1.0));
    fine(batch(1.001));
    assert_eq!(broken(batch(1.1)), ["H4"]);
    assert_eq!(broken(batch(0.5)), ["H1"], "of the base");
}

#[test]
fn h5_memory_that_does_not_come_back_is_told() {
    fine(vec![memory(100, false), memory(0, true)]);
    assert_eq!(broken(vec![memory(7, true)]), ["H5"]);
    assert_eq!(broken(vec![memory(101, false)]), ["H5"]);
}

#[test]
fn h6_what_a_failed_load_or_job_leaves_is_told() {
    let refused = write(30, 40, Change::Publish { id: Some("y".into()), job: None }, Wrote::Refused);
    fine(vec![upload(10, 20, 1, "x"), refused.clone(), read(50, 60, 1, "x")]);
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), refused.clone(), read(50, 60, 2, "y")]), ["H6"]);
    // and it takes nothing away
    let gone = read_as(50, 60, None, Answer::NotFound);
    assert_eq!(broken(vec![upload(10, 20, 1, "x"), refused, gone]), ["H2"]);
    let listed = |stage| {
        let versions = vec![(version(1, "x"), "job:j".to_owned())];
        vec![job(10, stage), call(30, 40, What::List { name: NAME.into(), versions })]
    };
    fine(listed(Stage::Succeeded));
    assert_eq!(broken(listed(Stage::EndedWithout)), ["H6"]);
}

#[test]
fn h7_a_version_that_answers_while_its_job_trains_is_told() {
    let calls = |looked| {
        vec![
            job(looked, Stage::Before),
            job(80, Stage::Succeeded),
            publish_of_job(10, 90, 1, "x"),
            read(30, 40, 1, "x"),
        ]
    };
    fine(calls(20));
    assert_eq!(broken(calls(50)), ["H7"]);
}

#[test]
fn h8_reads_that_training_holds_up_are_told() {
    let calls = |took: Time| vec![upload(1, 2, 1, "x"), publish_of_job(10, 5000, 2, "y"), read(20, 20 + took, 1, "x")];
    fine(calls(1000));
    assert_eq!(broken(calls(1001)), ["H8"]);
}
