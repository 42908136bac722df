//! Servers that share a database and its blobs: each serves what the other publishes, a job is one server's, and it goes on
//! at another when its server is gone. Runs where there is PostgreSQL.

#[path = "../support/postgres.rs"]
mod postgres;

use deltaserve::{
    grpc::proto,
    store::{DatabaseUrl, Verify},
};
use proto::{JobState, job_event::Body};

use crate::support::*;

/// A world whose store others can share, and the database's URL.
fn shared() -> Option<(World, String)> {
    let url = postgres::new_database()?;
    let mut world = World::new();
    let blobs = format!("file://{}", world.data_dir().with_file_name("blobs").display());
    world.config.store.database = Some(url.parse::<DatabaseUrl>().expect("a URL"));
    world.config.store.blobs = Some(blobs);
    world.config.store.verify = Verify::Full;
    Some((world, url))
}

/// The next server of a world has a data directory of its own.
fn elsewhere(world: &mut World) {
    world.config.data_dir = world.data_dir().with_file_name("other-data");
}

async fn cancel(client: &Client, job: &str) {
    let request = client.request(proto::CancelJobRequest { id: job.into() });
    client.training().cancel_job(request).await.expect("a cancel");
}

/// A job that lasts for longer than any test, with a checkpoint as often as one can be kept.
fn endless(name: &str) -> proto::TrainingSpec {
    let plain = spec(name, proto::Task::CausalLm, stories(16), 1_000_000);
    let hyper = proto::HyperParameters { checkpoint_every: Some(1), ..plain.hyper.unwrap_or_default() };
    proto::TrainingSpec { hyper: Some(hyper), ..plain }
}

/// Waits for an event of a job.
async fn happens(client: &Client, job: &str, what: &str, is: impl Fn(&Body) -> bool) {
    let request = client.request(proto::WatchJobRequest { id: job.into(), from_seq: 0 });
    let mut events = client.training().watch_job(request).await.expect("a watch").into_inner();
    timely(what, async {
        while let Some(event) = events.message().await.expect("an event") {
            if event.body.as_ref().is_some_and(&is) {
                return;
            }
        }
        panic!("{what}: the job ended before");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_server_does_the_others_know_within_moments() {
    let Some((mut world, _)) = shared() else { return };
    let a = world.start().await;
    elsewhere(&mut world);
    let b = world.start().await;
    a.client.upload("d", &world.delta(1)).await.expect("an upload");
    eventually("the other server knows it", async || b.client.delta("d").await.is_ok()).await;
    assert_eq!(a.client.text("d", "the cat", 8).await, b.client.text("d", "the cat", 8).await);
    // a new version, made where the name was not made
    let second = b.client.upload("d", &world.delta(2)).await.expect("an upload");
    eventually("the first one knows it", async || {
        a.client.delta("d").await.is_ok_and(|d| d.delta.is_some_and(|d| d.id == second.id))
    })
    .await;
    assert_eq!(a.client.text("d", "the cat", 8).await, b.client.text("d", "the cat", 8).await);

    // a job is one job at all servers, and its story is the same
    let small = || spec("trained", proto::Task::CausalLm, stories(8), 4);
    let job = a.client.create_job(small(), "a key").await.expect("a job");
    assert_eq!(b.client.create_job(small(), "a key").await.expect("the same job").id, job.id);
    let (of_a, of_b) = tokio::join!(a.client.events(&job.id, 0), b.client.events(&job.id, 0));
    let (of_a, of_b) = (of_a.expect("a watch"), of_b.expect("a watch"));
    assert_eq!(of_a, of_b);
    assert!(matches!(&of_b.last().expect("an end").body, Some(Body::State(s)) if s.state() == JobState::Succeeded));
    eventually("its delta is everywhere", async || b.client.delta("trained").await.is_ok()).await;

    // asked of one server, done by the one that has the job
    let job = a.client.create_job(endless("endless"), "").await.expect("a job");
    happens(&b.client, &job.id, "a checkpoint", |body| matches!(body, Body::Checkpoint(_))).await;
    let paused = b.client.pause(&job.id).await.expect("a pause");
    assert_eq!(paused.state(), JobState::Paused);
    // and what is paused goes on wherever it is resumed
    b.client.resume(&job.id).await.expect("a resume");
    happens(&a.client, &job.id, "it goes on", |body| matches!(body, Body::Resumed(_))).await;
    cancel(&a.client, &job.id).await;
    assert_eq!(a.client.ended(&job.id).await.state(), JobState::Cancelled);
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_server_that_is_taken_for_dead_goes_on_at_another_and_nowhere_else() {
    let Some((mut world, url)) = shared() else { return };
    let a = world.start().await;
    let job = a.client.create_job(endless("endless"), "").await.expect("a job");
    happens(&a.client, &job.id, "a checkpoint", |body| matches!(body, Body::Checkpoint(_))).await;
    let id = std::fs::read_to_string(world.data_dir().join("server-id")).expect("its name");
    elsewhere(&mut world);
    let b = world.start().await;
    // its lease is gone, and it does not know yet
    let sql = format!("UPDATE servers SET until_ms = 1, incarnation = 'another' WHERE id = '{}'", id.trim());
    postgres::psql(&url, &sql).expect("a change from outside");
    happens(&b.client, &job.id, "it goes on", |body| matches!(body, Body::Resumed(_))).await;
    eventually("the first server stops training", async || !*a.server.service.training().borrow()).await;
    // it serves on, and a cancel there reaches the one that has the job
    a.client.upload("d", &world.delta(1)).await.expect("an upload");
    cancel(&a.client, &job.id).await;
    let events = b.client.events(&job.id, 0).await.expect("a watch");
    assert!(events.iter().zip(1..).all(|(event, seq)| event.seq == seq), "a gap");
    let states = events.iter().filter_map(|event| match &event.body {
        Some(Body::State(state)) => Some(state.state()),
        _ => None,
    });
    use JobState::{Cancelled, Queued, Running};
    assert_eq!(states.collect::<Vec<_>>(), [Queued, Running, Queued, Running, Cancelled]);
    assert!(events.iter().any(|event| matches!(&event.body, Some(Body::Resumed(r)) if r.step > 0)));
    a.stop().await;
    b.stop().await;
}
