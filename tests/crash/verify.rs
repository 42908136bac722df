//! What must hold after a start, whatever came before it.

use std::{collections::BTreeSet, path::Path};

use deltaserve::{
    grpc::proto::{self, JobState},
    ids::{DeltaId, TenantId},
    store::Store,
};
use tonic::Code;

use crate::{
    chance::Chance,
    ledger::{Ledger, State},
    support::*,
    work::{NAMES, digest},
};

/// How many of the older names and jobs are looked at after a start that is not the last.
const SOME: usize = 4;

pub(crate) struct Verifier<'a> {
    pub(crate) world: &'a World,
    pub(crate) client: &'a Client,
    pub(crate) ledger: &'a Ledger,
}

impl Verifier<'_> {
    /// Compares what is there with what was acknowledged; `all`: also what was compared before.
    pub(crate) async fn verify(&self, chance: &mut Chance, all: bool) {
        for name in NAMES {
            let found = self.found(name).await;
            let mut names = self.ledger.names.lock();
            let settled = names.entry(name.to_owned()).or_default().settle(found);
            settled.unwrap_or_else(|problem| panic!("{name}: {problem}"));
        }
        let listed = self.client.list().await;
        let is_ours = |name: &str| NAMES.contains(&name) || name.starts_with("job-");
        for delta in &listed {
            assert!(delta.current && is_ours(&delta.name), "nobody published {delta:?}");
        }
        for name in NAMES {
            let there = listed.iter().any(|d| d.name == name);
            assert_eq!(there, self.ledger.state(name).current.is_some(), "{name} in the list");
        }
        for delta in &listed {
            if all || NAMES.contains(&delta.name.as_str()) || chance.below(listed.len()) < SOME {
                self.whole(&delta.name).await;
            }
        }
        self.jobs(chance, all).await;
        self.datasets().await;
    }

    /// A name as the server has it.
    async fn found(&self, name: &str) -> State {
        match self.client.delta(name).await {
            Ok(reply) => {
                let current = reply.delta.expect("the current version");
                assert!(current.current, "{current:?}");
                let versions = reply.versions.into_iter().map(|v| (v.number, v.id)).collect();
                State { versions, current: Some(current.number), pinned: current.pinned }
            }
            Err(status) => {
                assert_eq!(status.code(), Code::NotFound, "{name}: {status:?}");
                State::default()
            }
        }
    }

    /// Every version of a name can be had, is the bytes that its digest says, and serves.
    async fn whole(&self, name: &str) {
        let reply = self.client.delta(name).await.expect("a listed delta");
        for version in reply.versions {
            let reference = format!("{name}@{}", version.number);
            let files = self.client.download(&reference).await.expect("a whole version");
            assert_eq!(digest(self.world, &files), version.id, "{reference} is torn");
            let said = self.client.generate(ask(&reference, "x", 3)).await.expect("it serves");
            assert_eq!(said.finished.served_by.unwrap_or_default().id, version.id, "{reference}");
            self.ledger.said(&version.id, said.ids);
        }
    }

    /// Every acknowledged job is there; one that had ended has the same end, and any other ends now, by itself or cancelled.
    async fn jobs(&self, chance: &mut Chance, all: bool) {
        let notes: Vec<_> = self.ledger.jobs.lock().iter().map(|(id, note)| (id.clone(), note.clone())).collect();
        // those whose creation nobody was told of must not go on for ever
        for job in self.client.jobs().await {
            let ended = matches!(
                job.state(),
                JobState::Succeeded | JobState::Failed | JobState::Cancelled | JobState::Interrupted
            );
            if !ended && notes.iter().all(|(id, _)| *id != job.id) {
                let request = self.client.request(proto::CancelJobRequest { id: job.id });
                self.client.training().cancel_job(request).await.expect("a cancel");
            }
        }
        for (id, note) in &notes {
            if note.ended.is_some() && !all && chance.below(notes.len()) >= SOME {
                continue;
            }
            let job = self.client.job(id).await.unwrap_or_else(|e| panic!("acknowledged job {id}: {e:?}"));
            let Some((state, made)) = &note.ended else {
                self.ends(&job, note.cancelled).await;
                continue;
            };
            assert_eq!(job.state, *state, "job {id} had ended otherwise");
            if let Some((name, number, version)) = made {
                let found = self.client.delta(&format!("{name}@{number}")).await.expect("what a job published");
                assert_eq!(found.delta.unwrap_or_default().id, *version, "{name}@{number}");
            }
        }
    }

    async fn ends(&self, job: &proto::Job, cancelled: bool) {
        // too long to wait for, paused when the server ended, or to be cancelled then
        let stops = job.resolved.as_ref().is_none_or(|r| r.total_steps > 100) || job.state() == JobState::Paused;
        if stops || cancelled {
            let request = self.client.request(proto::CancelJobRequest { id: job.id.clone() });
            self.client.training().cancel_job(request).await.expect("a cancel");
        }
        let events = self.client.events(&job.id, 0).await.expect("its story");
        assert!(events.iter().zip(1..).all(|(event, seq)| event.seq == seq), "{}: a gap in {events:?}", job.id);
        let end = match events.last().and_then(|e| e.body.clone()) {
            Some(proto::job_event::Body::State(end)) => end,
            other => panic!("{}: a watch ended with {other:?}", job.id),
        };
        let well = [JobState::Succeeded, JobState::Interrupted];
        let fine = well.contains(&end.state()) || (end.state() == JobState::Cancelled && (stops || cancelled));
        assert!(fine, "job {} ended as {:?} after a restart: {:?}", job.id, end.state(), end.failure);
        if let Some(made) = end.result.as_ref().filter(|made| made.number > 0) {
            self.whole(&made.name).await;
        }
        self.ledger.job_ended(&job.id, &end);
    }

    async fn datasets(&self) {
        let ids: Vec<String> = self.ledger.datasets.lock().iter().cloned().collect();
        for id in ids {
            let request = self.client.request(proto::GetDatasetRequest { id: id.clone() });
            let found = self.client.training().get_dataset(request).await.map(|_| ());
            let (gone, leaving) = {
                let dropped = self.ledger.dropped.lock();
                (dropped.0.contains(&id), dropped.1.contains(&id))
            };
            match found {
                Ok(()) => assert!(!gone, "dataset {id} was deleted and is back"),
                Err(status) => {
                    assert!(status.code() == Code::NotFound && leaving, "acknowledged dataset {id}: {status:?}");
                    self.ledger.dropped.lock().0.insert(id);
                }
            }
        }
    }
}

/// Opens the data directory as a server would, collects garbage, and compares rows with files: every named blob is there and
/// whole, and no other is.
pub(crate) async fn offline(dir: &Path) {
    let store = Store::open(dir).await.expect("the directory opens after a kill");
    store.collect_garbage().await.expect("garbage is collected");
    let mut named = BTreeSet::new();
    for name in store.all_names().await.expect("the names") {
        assert!(name.current().is_some(), "{name:?}");
        for version in name.versions.values() {
            let files = store.read_files(version).await.expect("every file of a listed version");
            assert_eq!(DeltaId::compute(&version.base, &files.files), version.id, "{version:?} is torn");
            named.extend(version.files.iter().map(|f| f.blob));
        }
    }
    let tenant = TenantId::new("default").expect("a tenant");
    for dataset in store.list_datasets(&tenant).await.expect("datasets") {
        named.insert(dataset.blob);
    }
    let mut page = String::new();
    loop {
        let found = store.list_jobs(&tenant, &page, 1000, None).await.expect("jobs");
        for job in found.jobs {
            named.extend(store.job_blobs(&job.id).await.expect("blobs of a job").into_iter().map(|(_, blob)| blob));
            named.extend(store.job_checkpoint(&job.id).await.expect("its checkpoint").map(|c| c.blob));
        }
        page = found.next_page_token;
        if page.is_empty() {
            break;
        }
    }
    for blob in &named {
        store.get_blob(*blob).await.expect("a named blob is whole");
    }
    let mut files = BTreeSet::new();
    for shard in std::fs::read_dir(dir.join("blobs")).expect("the blobs") {
        let shard = shard.expect("an entry").path();
        // beside the folders there is a mark of the database that the blobs belong to
        if !shard.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(shard).expect("a folder of blobs") {
            files.insert(file.expect("a file").file_name().to_string_lossy().into_owned());
        }
    }
    let named: BTreeSet<String> = named.iter().map(ToString::to_string).collect();
    assert_eq!(files, named, "files and rows differ after a collection");
    store.close().await;
}
