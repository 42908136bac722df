//! What was acknowledged is there after a restart and after `kill -9`.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use deltaserve::{grpc::proto, model::testing::Rng};
use proto::JobState;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn deltas_aliases_jobs_and_events_survive_a_restart() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    client.upload("style", &world.delta(2)).await.expect("an upload");
    client.promote("style", "1").await.expect("a roll-back");
    let job = client.create_job(spec("made", proto::Task::CausalLm, stories(8), 5), "key").await.expect("a job");
    let events = client.events(&job.id, 0).await.expect("a watch");
    let texts = [client.text("style", "once", 8).await, client.text("made", "once", 8).await];
    let (jobs, mut deltas) = (client.jobs().await, client.list().await);
    running.stop().await;

    let running = world.start().await;
    let client = &running.client;
    assert_eq!([client.text("style", "once", 8).await, client.text("made", "once", 8).await], texts);
    assert_eq!(client.delta("style").await.expect("it").versions.len(), 2);
    assert_eq!(client.jobs().await, jobs);
    assert_eq!(client.events(&job.id, 0).await.expect("a replay"), events);
    let again = client.create_job(spec("made", proto::Task::CausalLm, stories(8), 5), "key").await.expect("the job");
    assert_eq!(again.id, job.id, "idempotency keys are kept");
    let mut now = client.list().await;
    for delta in deltas.iter_mut().chain(&mut now) {
        (delta.resident_bytes, delta.leases) = (0, 0);
    }
    assert_eq!(now, deltas);
    running.stop().await;
}

/// What the server has acknowledged.
#[derive(Default)]
struct Acknowledged {
    versions: parking_lot::Mutex<Vec<(String, u64, String)>>,
    jobs: parking_lot::Mutex<Vec<String>>,
}

impl Acknowledged {
    /// Versions and jobs.
    fn counts(&self) -> (usize, usize) {
        (self.versions.lock().len(), self.jobs.lock().len())
    }
}

/// Uploads until the server is gone.
async fn uploads(client: Client, world: Arc<World>, round: u64, seen: Arc<Acknowledged>) {
    for i in 0u64.. {
        let name = format!("d{}", i % 3);
        match client.upload(&name, &world.delta(1000 * (round + 1) + i)).await {
            Ok(made) => seen.versions.lock().push((name, made.number, made.id)),
            Err(_) => return,
        }
    }
}

/// Keeps the trainer busy until the server is gone; not with more jobs than a tenant may have after two rounds.
async fn jobs(client: Client, round: u64, seen: Arc<Acknowledged>) {
    for i in 0u32..6 {
        let name = format!("job{round}");
        // some end and publish, some run when the server is killed
        let steps = [3, 100_000][(i % 2) as usize];
        match client.create_job(spec(&name, proto::Task::CausalLm, stories(16), steps), "").await {
            Ok(job) => seen.jobs.lock().push(job.id),
            Err(_) => return,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn check(client: &Client, seen: &Acknowledged) {
    let versions = seen.versions.lock().clone();
    for (name, number, id) in versions {
        let found = client.delta(&format!("{name}@{number}")).await.expect("an acknowledged version");
        assert_eq!(found.delta.unwrap_or_default().id, id, "{name}@{number}");
    }
    let jobs = seen.jobs.lock().clone();
    for id in jobs {
        let job = client.job(&id).await.expect("an acknowledged job");
        use JobState::{Cancelled, Interrupted, Publishing, Queued, Running, Succeeded};
        let known = [Succeeded, Interrupted, Cancelled, Queued, Running, Publishing];
        assert!(known.contains(&job.state()), "{id} is {:?} after the restart", job.state());
        // those that waited go on: too long for this test
        let request = client.request(proto::CancelJobRequest { id: id.clone() });
        client.training().cancel_job(request).await.expect("a cancel");
        let events = client.events(&id, 0).await.expect("its story");
        assert!(events.iter().zip(1..).all(|(e, seq)| e.seq == seq));
        if let (Succeeded, Some(result)) = (job.state(), job.result) {
            client.delta(&format!("{}@{}", result.name, result.id)).await.expect("a published result");
        }
    }
    let mut versions: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for delta in client.list().await {
        let detail = client.delta(&delta.name).await.expect("a listed delta");
        versions.insert(delta.name, detail.versions.iter().map(|v| v.number).collect());
    }
    for (name, numbers) in &versions {
        for number in numbers {
            let reference = format!("{name}@{number}");
            let files = client.download(&reference).await.expect("a whole version");
            assert!(files.files.len() >= 2);
            assert_eq!(client.generate(ask(&reference, "x", 2)).await.expect("it serves").ids.len(), 2);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_by_kill_9_and_no_version_is_torn() {
    let world = Arc::new(World::new());
    let seen = Arc::new(Acknowledged::default());
    let seed = Instant::now().elapsed().as_nanos() as u64 ^ u64::from(std::process::id());
    println!("seed {seed}");
    let mut rng = Rng(seed | 1);
    for round in 0..6 {
        let mut spawned = world.spawn().await;
        let client = spawned.client.clone();
        let before = seen.counts();
        let work = [
            tokio::spawn(uploads(client.clone(), Arc::clone(&world), round, Arc::clone(&seen))),
            tokio::spawn(jobs(client.clone(), round, Arc::clone(&seen))),
        ];
        eventually("one more of each is acknowledged", async || {
            let now = seen.counts();
            now.0 > before.0 && now.1 > before.1
        })
        .await;
        tokio::time::sleep(Duration::from_millis((rng.uniform() * 900.0) as u64)).await;
        spawned.kill();
        for task in work {
            timely("the clients notice", task).await.expect("no panic");
        }
        if round % 2 == 1 {
            let spawned = world.spawn().await;
            check(&spawned.client, &seen).await;
        }
    }
    let (versions, jobs) = seen.counts();
    println!("{versions} versions and {jobs} jobs were acknowledged");
}
