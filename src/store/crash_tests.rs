//! `kill -9` at any moment: a child process publishes in a loop and is killed; whatever rows it left must be whole.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use super::{testing::Place, versions::tests::new_version, *};
use crate::{
    admission::params::PublishPolicy,
    store::jobs::{JobChange, NewJob},
};

const CHILD: &str = "DELTASERVE_TEST_CRASH_DIR";
/// The database of the child, if it is not in its directory.
const DATABASE: &str = "DELTASERVE_TEST_CRASH_DATABASE";
const ROUNDS: usize = 6;

/// The child's life: publishes, swaps, deletes, appends, saves checkpoints and collects, and says so after each, until it is killed.
async fn work(places: &Places) {
    let store = Store::open_at(places).await.unwrap();
    let mut new = new_version("n", "", PublishPolicy::Upsert);
    let job = NewJob {
        id: uuid::Uuid::now_v7().to_string(),
        tenant: new.tenant.clone(),
        output_name: "n".into(),
        request_json: "{}".into(),
        resolved_json: "{}".into(),
        idempotency_key: None,
        request_digest: String::new(),
        base: String::new(),
        blobs: vec![],
    };
    let job_id = job.id.clone();
    store.create_job(job).await.unwrap();
    for i in 0_u32.. {
        let weights = format!("{job_id}-{i}-").repeat(2000);
        new.files.files.insert("adapter_model.safetensors".into(), weights.into());
        let (version, name) = store.publish(new.clone()).await.unwrap();
        store.append_event(&job_id, format!("{i}"), Some("running"), None).await.unwrap();
        let blob = store.put_blob(format!("{job_id} at {i} ").repeat(2000).into()).await.unwrap();
        let checkpoint = Some((u64::from(i), blob));
        let saved = JobChange { events: vec![format!("saved {i}")], checkpoint, ..JobChange::default() };
        store.change_job(&job_id, saved).await.unwrap();
        if let Some(&oldest) = name.versions.keys().next().filter(|_| name.versions.len() > 4) {
            store.delete_versions(&version.tenant, &version.name, Some(oldest), None).await.unwrap();
            store.collect_garbage_after(std::time::Duration::ZERO).await.unwrap();
        }
        println!("done {} {}", version.number, version.id);
    }
}

/// What a reopened directory must hold: at least what the child reported, and all of it readable.
async fn verify(places: &Places, reported: &[(u64, String)]) {
    let store = Store::open_at(places).await.unwrap();
    assert!(store.verify(Verify::Full).await.unwrap().corrupt.is_empty());
    let names = store.all_names().await.unwrap();
    for name in &names {
        assert!(name.current().is_some(), "{name:?}");
        for version in name.versions.values() {
            let files = store.read_files(version).await.unwrap();
            assert_eq!(version.id, crate::ids::DeltaId::compute(&version.base, &files.files));
        }
    }
    if let Some((number, id)) = reported.last() {
        let version = names[0].versions.get(number).expect("a reported version is lost");
        assert_eq!(version.id.to_string(), *id);
        assert!(names[0].current >= Some(*number));
    }
    for job in store.unfinished_jobs().await.unwrap() {
        let mut seqs = Vec::new();
        loop {
            let page = store.events(&job.id, seqs.len() as u64 + 1, 100).await.unwrap();
            if page.is_empty() {
                break;
            }
            seqs.extend(page.iter().map(|e| e.seq));
        }
        assert_eq!(seqs, (1..=job.last_seq).collect::<Vec<_>>());
        // the event and the row came together, and the row has its bytes
        if let Some(kept) = store.job_checkpoint(&job.id).await.unwrap() {
            assert!(
                store
                    .get_blob(kept.blob)
                    .await
                    .unwrap()
                    .starts_with(format!("{} at {} ", job.id, kept.step).as_bytes())
            );
            let last = store.events(&job.id, job.last_seq.saturating_sub(1), 2).await.unwrap();
            assert!(last.iter().any(|e| e.body_json == format!("saved {}", kept.step)), "{last:?}");
        }
    }
    store.collect_garbage().await.unwrap();
    for version in names.iter().flat_map(|n| n.versions.values()) {
        store.read_files(version).await.unwrap();
    }
    if !store.is_shared() {
        // among servers they wait until they were garbage for a while
        let blobs = store.blobs().list().await.unwrap();
        assert_eq!(blobs.len(), store.named_blobs().await.unwrap().len());
    }
    store.close().await;
}

#[test]
fn a_kill_at_any_moment_leaves_every_row_with_its_blobs() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let database = std::env::var(DATABASE).ok().map(|url| url.parse().unwrap());
        runtime().block_on(work(&Places { database, ..Places::local(Path::new(&dir)) }));
        return;
    }
    kills(&Place::sqlite());
}

#[test]
fn a_kill_at_any_moment_leaves_every_row_of_postgresql_with_its_blobs() {
    if let Some(place) = Place::postgres() {
        kills(&place);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn kills(place: &Place) {
    let places = Places { database: place.of("").database, ..Places::local(place.dir()) };
    let mut reported = Vec::new();
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::crash_tests::a_kill_at_any_moment_leaves_every_row_with_its_blobs",
                "--nocapture",
            ])
            .env(CHILD, place.dir())
            .envs(place.url().map(|url| (DATABASE, url)))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let is_report = |line: &String| line.contains("done ");
        reported.extend(lines.by_ref().filter(is_report).take(3 + round * 2).filter_map(|line| parse_report(&line)));
        // Not at a line's border: somewhere within the next publish.
        std::thread::sleep(std::time::Duration::from_micros(997 * (round as u64 * 3 + 1)));
        child.kill().unwrap();
        child.wait().unwrap();
        // The rest of what it said; a last line without its end was cut off by the kill.
        reported.extend(lines.filter_map(|line| parse_report(&line)));
        runtime().block_on(verify(&places, &reported));
    }
    assert!(reported.len() >= ROUNDS * 3);
}

fn parse_report(line: &str) -> Option<(u64, String)> {
    let (_, report) = line.split_once("done ")?;
    let (number, id) = report.split_once(' ')?;
    (id.len() == 64).then(|| (number.parse().unwrap(), id.to_owned()))
}
