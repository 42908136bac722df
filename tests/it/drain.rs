//! SIGTERM: what runs finishes, what is new is refused, the process ends well.

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn after_sigterm_a_running_stream_finishes_new_calls_are_refused_and_the_exit_is_clean() {
    let world = World::long();
    let mut spawned = world.spawn().await;
    let client = spawned.client.clone();
    let mut stream = client.stream(ask("", "once", 12_000)).await.expect("a stream");
    let first = stream.message().await.expect("a message").expect("a token");
    assert!(first.event.is_some());
    spawned.terminate();
    eventually("new calls are refused", async || client.info().await.is_err()).await;
    let said = timely("the stream ends", finish(Said::default(), stream)).await.expect("it is not cut off");
    assert_eq!(said.finished.usage.unwrap_or_default().completion_tokens, 12_000);
    drop(client);
    let mut status = None;
    eventually("the process ends", async || {
        status = spawned.child.try_wait().expect("its state");
        status.is_some()
    })
    .await;
    assert_eq!(status.and_then(|s| s.code()), Some(0));
}
