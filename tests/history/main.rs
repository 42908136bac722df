//! Histories: clients generate, classify, embed, score, upload, promote, delete, pin, train and cancel at once, everything is
//! written down, and a checker says whether the server's answers can be explained. Seeds are printed.
//!
//! `DELTASERVE_HISTORY_SECONDS` (default 8), `DELTASERVE_SOAK_SECONDS` (default 6), `DELTASERVE_SEED`,
//! `DELTASERVE_HISTORY_P99_MS` (default 5000: the bound on reads while jobs train). With `--features failpoints`, places where
//! state changes also wait or fail by chance.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests stop where anything fails")]

#[path = "../it/chance.rs"]
mod chance;
mod check;
#[cfg(test)]
mod check_tests;
mod clients;
mod inputs;
mod prints;
mod record;
mod soak;
#[allow(dead_code, reason = "shared with the other tests")]
#[path = "../it/support.rs"]
mod support;

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    sync::atomic::Ordering,
    time::Duration,
};

use chance::{number, seed};
use clients::{Scene, says_alone};
use record::{History, Key, Value};
use support::*;

/// Failpoints and what they do by chance, while clients run.
#[cfg(feature = "failpoints")]
const MISHAPS: &[(&str, &str)] = &[
    ("blob-before-write", "1%return(injected)->5%sleep(3)"),
    ("publish-before-commit", "3%return(injected)->10%sleep(3)"),
    ("publish-committed", "20%sleep(4)"),
    ("alias-before-commit", "3%return(injected)->10%sleep(3)"),
    ("alias-committed", "20%sleep(3)"),
    ("delete-before-commit", "3%return(injected)->10%sleep(3)"),
    ("delete-committed", "20%sleep(3)"),
    ("job-change-committed", "5%sleep(3)"),
    ("registry-before-load", "2%return(injected)->10%sleep(4)"),
    ("registry-before-seat", "2%return(injected)->10%sleep(4)"),
    ("registry-evicted", "10%sleep(3)"),
    ("registry-before-take-over", "20%sleep(5)"),
    ("registry-before-retire", "20%sleep(3)"),
];

/// Sets the failpoints, or back.
#[cfg(feature = "failpoints")]
fn mishaps(on: bool) {
    for (name, what) in MISHAPS {
        fail::cfg(*name, if on { what } else { "off" }).expect("a failpoint");
    }
}

/// There are none.
#[cfg(not(feature = "failpoints"))]
fn mishaps(_on: bool) {}

/// Runs one test at a time: memory and times are looked at.
fn alone(work: impl Future<Output = ()>) {
    static TURN: parking_lot::Mutex<()> = parking_lot::Mutex::new(());
    let _turn = TURN.lock();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(work);
}

/// A server with room for some of what is used at once.
fn small_world() -> World {
    let mut world = prints::world();
    world.config.max_resident_bytes = world.delta_bytes() * 12;
    // what failed by chance may be tried again at once
    world.config.delta_retry = Duration::ZERO;
    world
}

#[test]
fn every_answer_is_explained_by_the_history() {
    let seconds = number("DELTASERVE_HISTORY_SECONDS", 8);
    let p99 = number("DELTASERVE_HISTORY_P99_MS", 5000) * 1000;
    alone(history(seed(), Duration::from_secs(seconds), p99));
}

async fn history(seed: u64, lasts: Duration, p99: u64) {
    // a server that has nothing, then one version at a time
    let reference = prints::world();
    let oracle = reference.start().await;
    let base = says_alone(&oracle.client, "", false).await;
    let names = prints::names(&reference);
    let mut expected: HashMap<String, BTreeMap<Key, Value>> = HashMap::new();
    for print in names.iter().flat_map(|name| &name.prints) {
        let made = oracle.client.upload("one", &print.files).await.expect("an upload");
        assert_eq!(made.id, print.id);
        let says = says_alone(&oracle.client, "one", print.classifies).await;
        print.check_forced(&says, &base);
        expected.insert(made.id, says);
    }
    tell_apart(&expected, &base);

    let world = small_world();
    let running = world.start().await;
    let scene = Scene::new(&running.client, names, prints::trained(), true);
    let memory = running.client.info().await.expect("info").residency.unwrap_or_default();
    let baseline = (memory.bytes, memory.resident);
    mishaps(true);
    let tasks = scene.start(seed);
    tokio::time::sleep(lasts).await;
    scene.stop(tasks).await;
    mishaps(false);

    // alone again, but for all that has happened
    eventually("nothing runs", async || running.client.running().await == 0).await;
    for key in inputs::text_keys() {
        scene.ask(&running.client, ("", None), &[key], true).await;
    }
    for name in scene.names.iter().chain([&scene.trained]) {
        scene.look_at_name(name).await;
        scene.delete(name).await;
        scene.look_at_name(name).await;
    }
    eventually("all leases end", async || {
        running.client.info().await.is_ok_and(|i| i.residency.unwrap_or_default().leased == 0)
    })
    .await;
    scene.look_at_memory(true).await;
    running.stop().await;

    let made = scene.made.lock().clone();
    for (id, files) in made {
        let made = oracle.client.upload("one", &files).await.expect("what a job made is a delta elsewhere, too");
        assert_eq!(made.id, id, "a download of other bytes");
        expected.insert(id, says_alone(&oracle.client, "one", false).await);
    }
    oracle.stop().await;
    judge(&scene, History { calls: scene.take_calls(), expected, base, baseline, p99 });
}

fn judge(scene: &Scene, history: History) {
    let report = check::check(&history);
    let reads = history.calls.iter().filter(|c| matches!(c.what, record::What::Read { .. })).count();
    let failed = scene.failed.load(Ordering::Relaxed);
    println!(
        "{} operations, {reads} reads ({failed} refused, {} of versions that were gone before they could be asked alone)",
        history.calls.len(),
        report.unknown
    );
    println!("checks: {:?}, violations: {}", report.checked, report.violations.len());
    for violation in report.violations.iter().take(20) {
        println!("{}: {}\n  {:?}", violation.law, violation.how, history.calls[violation.call]);
    }
    assert!(report.violations.is_empty(), "{} violations", report.violations.len());
    for law in ["H1", "H2", "H3", "H4", "H5", "H6", "H7", "H8"] {
        assert!(report.checked.contains_key(law), "{law} was never checked");
    }
    assert!(failed * 4 < reads && report.unknown * 4 < reads, "most of it says nothing");
}

/// Fingerprints are worth something only if they differ.
fn tell_apart(expected: &HashMap<String, BTreeMap<Key, Value>>, base: &BTreeMap<Key, Value>) {
    let all: Vec<_> = expected.values().chain([base]).collect();
    for (i, one) in all.iter().enumerate() {
        for other in &all[..i] {
            let same = |key: &Key| other.get(key).is_some_and(|value| check::close(value, &one[key]));
            assert!(!one.keys().all(same), "two versions say the same: {one:?}");
        }
    }
}
