//! SIGTERM: what runs finishes, or goes on at the next start, what is new is refused, and nobody waits longer than that.

use deltaserve::grpc::proto;
use proto::JobState;

use crate::support::*;

/// With a grace period longer than anything here is waited for: what takes that long is not waiting for its work.
fn patient() -> World {
    let mut world = World::long();
    world.config.drain = 2 * PATIENCE;
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn after_sigterm_a_running_stream_finishes_new_calls_are_refused_and_the_exit_is_clean() {
    let world = patient();
    let mut spawned = world.spawn().await;
    let client = spawned.client.clone();
    let mut stream = client.stream(ask("", "once", 2_000)).await.expect("a stream");
    let first = stream.message().await.expect("a message").expect("a token");
    assert!(first.event.is_some());
    spawned.terminate();
    eventually("new calls are refused", async || client.info().await.is_err()).await;
    let said = timely("the stream ends", finish(Said::default(), stream)).await.expect("it is not cut off");
    assert_eq!(said.finished.usage.unwrap_or_default().completion_tokens, 2_000);
    let mut status = None;
    eventually("the process ends, with nothing to wait for", async || {
        status = spawned.child.try_wait().expect("its state");
        status.is_some()
    })
    .await;
    assert_eq!(status.and_then(|s| s.code()), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_waits_for_streams_keeps_jobs_for_the_next_start_and_tells_who_watches_them() {
    let world = patient();
    let running = world.start().await;
    let client = running.client.clone();
    let job = client.create_job(spec("style", proto::Task::CausalLm, stories(64), 100_000), "").await.expect("a job");
    eventually("it runs", async || client.job(&job.id).await.is_ok_and(|j| j.step > 0)).await;
    let watch = tokio::spawn({
        let (client, id) = (client.clone(), job.id.clone());
        async move { client.events(&id, 0).await }
    });
    let mut stream = client.stream(ask("", "once", 1_000)).await.expect("a stream");
    stream.message().await.expect("a message").expect("a token");
    let both = async { tokio::join!(finish(Said::default(), stream), running.stop()) };
    let (said, ()) = timely("both end", both).await;
    assert_eq!(said.expect("it is not cut off").finished.usage.unwrap_or_default().completion_tokens, 1_000);
    let told = watch.await.expect("no panic").expect_err("the job has not ended");
    assert_eq!(kind(&told), (tonic::Code::Unavailable, "DRAINING".into()));

    let running = world.start().await;
    let client = &running.client;
    let before = client.job(&job.id).await.expect("the job").step;
    assert!(before > 0, "it knows how far it came");
    eventually("it goes on", async || client.job(&job.id).await.is_ok_and(|j| j.step > before)).await;
    assert_eq!(client.job(&job.id).await.expect("the job").state(), JobState::Running);
    running.stop().await;
}
