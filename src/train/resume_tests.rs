//! The life of a job that stops and goes on: pauses, restarts of the server, checkpoints that are no use.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    Kept, Prepared, Refusal, TrainError, TrainerConfig, TrainerHandle,
    joblog::{JobLog, NewJob},
    supervisor_tests::{PATIENCE, accept, all, gap_free, log, next, reaches, request, states, tenant, trainer},
};
use crate::admission::train_params::{
    JobEventBody, JobEventInfo, JobFailure, JobInfo, JobState, StateEvent, TrainParams,
};

/// Waits for what follows on an answer at once.
async fn soon(what: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < until, "does not come");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Lets a paused job go on, as the service does.
pub(super) async fn resume(trainer: &TrainerHandle, id: &str, prepared: &Prepared) -> Result<JobInfo, TrainError> {
    let a = tenant("a");
    let kept = trainer.kept(&a, id).await?;
    let place = trainer.place(&a, &kept.info)?;
    let from = match kept.checkpoint {
        Some(c) => Some((c.step as u32, trainer.blob(c.blob).await?)),
        None => None,
    };
    trainer.go_on(place, &a, kept, prepared, from).await
}

fn long() -> (TrainParams, Prepared) {
    request(1_000_000)
}

fn narrow() -> TrainerConfig {
    TrainerConfig { max_concurrent_jobs: 1, max_jobs: 2, max_jobs_per_tenant: 9, ..TrainerConfig::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_job_gives_its_place_back_and_goes_on_from_its_step_under_its_id() {
    let (_dir, log) = log().await;
    let trainer = trainer(&log, accept(&Arc::default()), narrow()).await;
    let (a, (p, prepared)) = (tenant("a"), long());
    let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let waits = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let mut watch = trainer.watch(&a, &job.id, 0).await.unwrap();
    let mut seen = reaches(&mut watch, 3).await;
    // one that waits, with nothing done
    let paused = trainer.pause(&a, &waits.id).await.unwrap();
    assert_eq!((paused.state, paused.step, log.checkpoint(&waits.id).await.unwrap()), (JobState::Paused, 0, None));
    let paused = trainer.pause(&a, &job.id).await.unwrap();
    let kept = log.checkpoint(&job.id).await.unwrap().unwrap();
    assert_eq!((paused.state, u64::from(paused.step)), (JobState::Paused, kept.step));
    assert!(kept.step >= 4);
    assert_eq!(trainer.pause(&a, &job.id).await.unwrap().state, JobState::Paused, "again changes nothing");
    // the state is written before the places are given back
    soon(|| trainer.unfinished() == 0 && trainer.room.available_permits() == 2).await;
    let (small, few) = request(2);
    for _ in 0..2 {
        trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    }
    assert!(matches!(resume(&trainer, &job.id, &prepared).await, Err(TrainError::Overloaded(_))));
    assert_eq!(trainer.get(&a, &job.id).await.unwrap().state, JobState::Paused, "refused, it stays as it was");
    for other in trainer.list(&a, None, 10, None).await.unwrap().0.iter().filter(|j| j.state != JobState::Paused) {
        trainer.cancel(&a, &other.id).await.unwrap();
        all(trainer.watch(&a, &other.id, 0).await.unwrap()).await;
    }
    let error = trainer.pause(&a, &trainer.list(&a, None, 1, None).await.unwrap().0[0].id).await.unwrap_err();
    assert!(error.to_string().contains("is cancelled, not queued or running"), "{error}");
    let resumed = resume(&trainer, &job.id, &prepared).await.unwrap();
    assert_eq!(resumed.id, job.id);
    let error = resume(&trainer, &job.id, &prepared).await.unwrap_err();
    assert!(matches!(&error, TrainError::State { wanted: "paused", .. }), "{error}");
    seen.extend(reaches(&mut watch, kept.step as u32 + 2).await);
    gap_free(&seen, 1);
    use JobState::{Paused, Queued, Running};
    assert_eq!(states(&seen), [Queued, Running, Paused, Queued, Running]);
    let resumed: Vec<u32> =
        seen.iter().filter_map(|e| if let JobEventBody::Resumed(r) = &e.body { Some(r.step) } else { None }).collect();
    assert_eq!(resumed, [kept.step as u32]);
    trainer.cancel(&a, &job.id).await.unwrap();
    seen.extend(all(watch).await);
    gap_free(&seen, 1);
    assert_eq!(log.checkpoint(&job.id).await.unwrap(), None, "an ended job keeps nothing to go on from");
    // the other begins at last, and a paused one can be cancelled
    resume(&trainer, &waits.id, &few).await.unwrap();
    assert_eq!(states(&all(trainer.watch(&a, &waits.id, 0).await.unwrap()).await).last(), Some(&JobState::Succeeded));
    let more = trainer.create(&a, &small, &few, Kept::default()).await.unwrap();
    if trainer.pause(&a, &more.id).await.is_ok_and(|j| j.state == JobState::Paused) {
        trainer.cancel(&a, &more.id).await.unwrap();
        let events = all(trainer.watch(&a, &more.id, 0).await.unwrap()).await;
        assert_eq!(states(&events).last(), Some(&JobState::Cancelled));
    }
}

#[tokio::test]
async fn a_job_that_cannot_be_read_does_not_hide_the_others() {
    let (dir, log) = log().await;
    left_in(&log, "good", JobState::Running, Some(3)).await;
    let bad = crate::store::NewJob {
        id: "bad".into(),
        tenant: tenant("a"),
        output_name: "n".into(),
        request_json: "torn".into(),
        resolved_json: "torn".into(),
        idempotency_key: None,
        request_digest: String::new(),
        base: String::new(),
        blobs: vec![],
    };
    drop(log);
    let store = crate::store::Store::open(dir.path()).await.unwrap();
    store.create_job(bad).await.unwrap();
    let left = JobLog::new(store).unfinished().await.unwrap();
    assert_eq!(left.iter().map(|j| j.info.id.as_str()).collect::<Vec<_>>(), ["good"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_that_cannot_store_its_checkpoint_goes_on_from_the_one_before() {
    let (dir, log) = log().await;
    let trainer = trainer(&log, accept(&Arc::default()), narrow()).await;
    let (a, (p, prepared)) = (tenant("a"), long());
    let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let mut watch = trainer.watch(&a, &job.id, 0).await.unwrap();
    let mut seen = reaches(&mut watch, 0).await;
    // the first pause stores one; the next by the clock is not due in this test, so that nothing is written meanwhile
    trainer.pause(&a, &job.id).await.unwrap();
    let kept = log.checkpoint(&job.id).await.unwrap().unwrap();
    resume(&trainer, &job.id, &prepared).await.unwrap();
    seen.extend(reaches(&mut watch, kept.step as u32).await);
    let (blobs, aside) = (dir.path().join("blobs"), dir.path().join("aside"));
    std::fs::rename(&blobs, &aside).unwrap();
    std::fs::write(&blobs, "no folder").unwrap();
    let paused = trainer.pause(&a, &job.id).await.unwrap();
    assert_eq!(paused.state, JobState::Paused, "{paused:?}");
    assert_eq!(log.checkpoint(&job.id).await.unwrap().unwrap().step, kept.step);
    std::fs::remove_file(&blobs).unwrap();
    std::fs::rename(&aside, &blobs).unwrap();
    resume(&trainer, &job.id, &prepared).await.unwrap();
    let lost = |e: &JobEventInfo| matches!(&e.body, JobEventBody::Warning(n) if n.code == "CHECKPOINT_LOST" && n.message.contains("the one before"));
    let goes_on = |e: &JobEventInfo| matches!(&e.body, JobEventBody::Resumed(r) if u64::from(r.step) == kept.step);
    while seen.iter().filter(|e| goes_on(e)).count() < 2 {
        seen.extend(reaches(&mut watch, 0).await);
    }
    gap_free(&seen, 1);
    assert!(seen.iter().any(lost));
    trainer.cancel(&a, &job.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_waits_or_is_paused_goes_on_after_a_restart_and_its_watchers_are_told_of_the_stop() {
    let (_dir, log) = log().await;
    let (a, (p, prepared)) = (tenant("a"), long());
    let first = trainer(&log, accept(&Arc::default()), narrow()).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(first.create(&a, &p, &prepared, Kept::default()).await.unwrap().id);
    }
    let mut watch = first.watch(&a, &ids[0], 0).await.unwrap();
    reaches(&mut watch, 2).await;
    first.pause(&a, &ids[0]).await.unwrap();
    let mut second = first.watch(&a, &ids[1], 0).await.unwrap();
    reaches(&mut second, 2).await;
    let third = first.create(&a, &p, &prepared, Kept::default()).await.unwrap().id;
    first.drain(PATIENCE).await;
    for mut watch in [watch, second] {
        let end = loop {
            match next(&mut watch).await {
                Ok(Some(event)) => assert!(!matches!(event.body, JobEventBody::State(s) if s.state.is_terminal())),
                end => break end,
            }
        };
        assert!(matches!(end, Err(TrainError::Draining)), "{end:?}");
    }
    drop(first);
    let states_of = async |trainer: &TrainerHandle| {
        let mut states = Vec::new();
        for id in [&ids[0], &ids[1], &third] {
            states.push(trainer.get(&a, id).await.unwrap().state);
        }
        states
    };
    let again = trainer(&log, accept(&Arc::default()), narrow()).await;
    use JobState::{Cancelled, Paused, Queued, Running};
    assert_eq!(states_of(&again).await, [Paused, Queued, Queued]);
    let step = again.get(&a, &ids[1]).await.unwrap().step;
    assert!(step > 2);
    let mut watch = again.watch(&a, &ids[1], 0).await.unwrap();
    // one is cancelled before it is prepared
    assert_eq!(again.cancel(&a, &third).await.unwrap().state, Cancelled);
    assert_eq!(again.unfinished(), 1, "one paused, one cancelled");
    assert_eq!(log.checkpoint(&ids[1]).await.unwrap().unwrap().resumes, 0, "a stop of its own is none of its faults");
    let left = again.take_left();
    assert_eq!(left.iter().map(|(_, id)| id.clone()).collect::<Vec<_>>(), [ids[1].clone(), third.clone()]);
    let place = again.place_of_left(&third).await.unwrap();
    let kept = again.kept(&a, &third).await.unwrap();
    let error = again.go_on(place, &a, kept, &prepared, None).await.unwrap_err();
    assert!(matches!(error, TrainError::State { state: Cancelled, .. }), "{error}");
    let place = again.place_of_left(&ids[1]).await.unwrap();
    let kept = again.kept(&a, &ids[1]).await.unwrap();
    let bytes = again.blob(kept.checkpoint.unwrap().blob).await.unwrap();
    again.go_on(place, &a, kept, &prepared, Some((step, bytes))).await.unwrap();
    let seen = reaches(&mut watch, step + 1).await;
    gap_free(&seen, 1);
    assert_eq!(states(&seen), [Queued, Running, Queued, Running]);
    assert_eq!(states_of(&again).await, [Paused, Running, Cancelled]);
}

/// A job's row in a state, as a process leaves it that is killed.
async fn left_in(log: &JobLog, id: &str, state: JobState, checkpoint: Option<u32>) {
    let new = NewJob {
        id: id.into(),
        tenant: tenant("a"),
        output_name: "x".into(),
        request_json: "{}".into(),
        resolved: request(2).1.reply.resolved,
        idempotency_key: None,
        request_digest: String::new(),
        base: String::new(),
        blobs: vec![],
    };
    log.create(new).await.unwrap();
    if let Some(step) = checkpoint {
        log.save(id, step, Bytes::from(format!("bytes of {id}")), None).await.unwrap();
    }
    let event = StateEvent { state, result: None, failure: None };
    log.append(id, 0, JobEventBody::State(event)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_a_job_goes_on_if_there_is_something_to_go_on_from() {
    let (_dir, log) = log().await;
    let a = tenant("a");
    left_in(&log, "ran", JobState::Running, None).await;
    left_in(&log, "saved", JobState::Running, Some(7)).await;
    left_in(&log, "published", JobState::Publishing, Some(9)).await;
    left_in(&log, "waited", JobState::Queued, None).await;
    left_in(&log, "paused", JobState::Paused, Some(4)).await;
    // three starts go on from one checkpoint; a job that is there at every crash is not tried for ever
    for start in 1..=4 {
        let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
        let job = async |id: &str| trainer.get(&a, id).await.unwrap();
        let ran = job("ran").await;
        assert_eq!((ran.state, ran.failure.unwrap().code.as_str()), (JobState::Interrupted, "INTERRUPTED"));
        assert_eq!((job("paused").await.state, job("paused").await.step), (JobState::Paused, 4));
        assert_eq!(job("waited").await.state, JobState::Queued);
        let (saved, published) = (job("saved").await, job("published").await);
        if start == 4 {
            let failure = saved.failure.unwrap();
            assert_eq!((saved.state, failure.code.as_str()), (JobState::Interrupted, "INTERRUPTED"));
            assert!(failure.message.contains("3 earlier starts from step 7"), "{}", failure.message);
            assert_eq!(trainer.unfinished(), 1);
            break;
        }
        assert_eq!((saved.state, saved.step), (JobState::Queued, 7));
        assert_eq!((published.state, published.step), (JobState::Queued, 9));
        let left: Vec<_> = trainer.take_left().into_iter().map(|(_, id)| id).collect();
        assert_eq!(left.len(), 3, "{left:?}");
        drop(trainer);
        for id in ["saved", "published"] {
            let running = StateEvent { state: JobState::Running, result: None, failure: None };
            log.append(id, 7, JobEventBody::State(running)).await.unwrap();
        }
    }
    let replay = log.events("saved", 1, 100).await.unwrap();
    gap_free(&replay, 1);
    assert_eq!(replay.iter().filter(|e| matches!(&e.body, JobEventBody::State(s) if s.state.is_terminal())).count(), 1);
    assert_eq!(log.checkpoint("saved").await.unwrap().map(|c| c.step), Some(7), "what it had come to is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_job_that_brings_the_server_down_while_it_is_prepared_is_not_tried_for_ever() {
    let (_dir, log) = log().await;
    let a = tenant("a");
    left_in(&log, "bad", JobState::Queued, Some(5)).await;
    left_in(&log, "behind", JobState::Queued, None).await;
    for start in 1..=4 {
        let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
        let left: Vec<_> = trainer.take_left().into_iter().map(|(_, id)| id).collect();
        assert_eq!(trainer.get(&a, "behind").await.unwrap().state, JobState::Queued, "it was never at fault");
        if start == 4 {
            assert_eq!(left, ["behind"]);
            let bad = trainer.get(&a, "bad").await.unwrap();
            let failure = bad.failure.unwrap();
            assert_eq!((bad.state, failure.code.as_str()), (JobState::Interrupted, "INTERRUPTED"));
            assert!(failure.message.contains("3 last starts"), "{}", failure.message);
            assert!(log.checkpoint("bad").await.unwrap().is_some(), "what it had come to is kept");
            // one that is prepared starts anew
            trainer.begin_try("behind").await.unwrap();
            trainer.end_try("behind").await;
            assert_eq!(log.tries("behind").await.unwrap(), 0);
            break;
        }
        assert_eq!(left, ["bad", "behind"]);
        trainer.begin_try("bad").await.unwrap(); // and the process is gone
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_cannot_go_on_fails_with_the_reason_or_is_paused_where_the_server_is_not_right_for_it() {
    let (_dir, log) = log().await;
    let (a, (_, prepared)) = (tenant("a"), long());
    left_in(&log, "bad", JobState::Running, Some(3)).await;
    left_in(&log, "other", JobState::Running, Some(3)).await;
    left_in(&log, "torn", JobState::Running, Some(3)).await;
    let count = Arc::default();
    let trainer = trainer(&log, accept(&count), TrainerConfig::default()).await;
    let failure = JobFailure { code: "CANNOT_RESUME".into(), message: "other examples".into() };
    trainer.refuse("bad", Refusal::Fails(failure.clone())).await;
    trainer.refuse("other", Refusal::Pauses("another base".into())).await;
    let events = all(trainer.watch(&a, "bad", 0).await.unwrap()).await;
    assert_eq!(states(&events), [JobState::Running, JobState::Queued, JobState::Failed]);
    assert_eq!(trainer.get(&a, "bad").await.unwrap().failure, Some(failure));
    let mut watch = trainer.watch(&a, "other", 0).await.unwrap();
    let mut last = Vec::new();
    while states(&last).last() != Some(&JobState::Paused) {
        last.push(next(&mut watch).await.unwrap().unwrap());
    }
    assert!(last.iter().any(|e| matches!(&e.body, JobEventBody::Warning(n) if n.message == "another base")));
    // bytes that are no run end the job on the trainer thread, too
    let place = trainer.place_of_left("torn").await.unwrap();
    let kept = super::KeptJob {
        info: trainer.get(&a, "torn").await.unwrap(),
        request: request(2).0,
        base: String::new(),
        blobs: Default::default(),
        checkpoint: None,
        bests: vec![],
    };
    trainer.go_on(place, &a, kept, &prepared, Some((3, Bytes::from_static(b"nonsense")))).await.unwrap();
    let events = all(trainer.watch(&a, "torn", 0).await.unwrap()).await;
    assert_eq!(states(&events).last(), Some(&JobState::Failed));
    let message = trainer.get(&a, "torn").await.unwrap().failure.unwrap().message;
    assert!(message.contains("the checkpoint is unreadable"), "{message}");
    assert_eq!(log.checkpoint("torn").await.unwrap().map(|c| c.step), Some(3), "it is kept all the same");
    assert_eq!(count.load(Ordering::SeqCst), 0, "nothing is published");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints_replace_each_other_and_each_is_told() {
    let (dir, log) = log().await;
    let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
    let (a, (p, mut prepared)) = (tenant("a"), long());
    prepared.reply.resolved.checkpoint_every = 3;
    let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let mut watch = trainer.watch(&a, &job.id, 0).await.unwrap();
    let mut steps = Vec::new();
    while steps.len() < 4 {
        if let JobEventBody::Checkpoint(c) = next(&mut watch).await.unwrap().unwrap().body {
            steps.push(c.step);
        }
    }
    // later than a multiple where the one before was still being written, or took its share of the time
    assert!(steps[0] >= 3 && steps.windows(2).all(|w| w[0] / 3 < w[1] / 3), "{steps:?}");
    let blobs = || {
        let shards = std::fs::read_dir(dir.path().join("blobs")).unwrap();
        let shards = shards.map(|s| s.unwrap().path()).filter(|path| path.is_dir());
        shards.map(|shard| std::fs::read_dir(shard).unwrap().count()).sum::<usize>()
    };
    assert!(blobs() <= 3, "{} blobs of one job", blobs());
    trainer.cancel(&a, &job.id).await.unwrap();
    assert_eq!(states(&all(watch).await), [JobState::Cancelled]);
    // one may have been on its way when the job ended: nothing names it, and it goes with the next collection
    assert!(blobs() <= 1, "{} blobs are left", blobs());
    // also of a job that comes to its end
    let (p, mut prepared) = request(60);
    prepared.reply.resolved.checkpoint_every = 3;
    let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let events = all(trainer.watch(&a, &job.id, 0).await.unwrap()).await;
    assert_eq!(states(&events).last(), Some(&JobState::Succeeded));
    assert_eq!(log.checkpoint(&job.id).await.unwrap(), None);
    assert!(blobs() <= 2, "{} blobs are left of two jobs", blobs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_jobs_of_a_tenant_are_bounded_and_one_that_goes_on_makes_room() {
    let (_dir, log) = log().await;
    let config = TrainerConfig { max_paused_per_tenant: 2, ..TrainerConfig::default() };
    let trainer = trainer(&log, accept(&Arc::default()), config).await;
    let (p, prepared) = long();
    let mut ids = Vec::new();
    for name in ["a", "a", "a", "b"] {
        ids.push(trainer.create(&tenant(name), &p, &prepared, Kept::default()).await.unwrap().id);
    }
    let (a, b) = (tenant("a"), tenant("b"));
    // at once: those that are about to be paused count
    let (x, y, z) = tokio::join!(trainer.pause(&a, &ids[0]), trainer.pause(&a, &ids[1]), trainer.pause(&a, &ids[2]));
    let results = [x, y, z];
    assert_eq!(results.iter().filter(|r| r.as_ref().is_ok_and(|j| j.state == JobState::Paused)).count(), 2);
    let (over, refused) = results.iter().enumerate().find_map(|(i, r)| Some((i, r.as_ref().err()?))).unwrap();
    let said = refused.to_string();
    assert!(
        matches!(refused, TrainError::Overloaded(_)) && said.contains("2 jobs") && said.contains("at most 2"),
        "{said}"
    );
    let paused = &ids[(over + 1) % 3];
    assert_eq!(trainer.pause(&a, paused).await.unwrap().state, JobState::Paused, "again changes nothing");
    assert_eq!(trainer.pause(&b, &ids[3]).await.unwrap().state, JobState::Paused, "others have their own");
    resume(&trainer, paused, &prepared).await.unwrap();
    assert_eq!(trainer.pause(&a, &ids[over]).await.unwrap().state, JobState::Paused);
    trainer.drain(PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_just_before_the_server_stops_is_a_pause_and_a_pause_is_answered_whoever_resumes() {
    let (_dir, log) = log().await;
    let trainer = trainer(&log, accept(&Arc::default()), TrainerConfig::default()).await;
    let (a, (p, prepared)) = (tenant("a"), long());
    let job = trainer.create(&a, &p, &prepared, Kept::default()).await.unwrap();
    let mut watch = trainer.watch(&a, &job.id, 0).await.unwrap();
    reaches(&mut watch, 2).await;
    for _ in 0..5 {
        let resumes = async {
            while resume(&trainer, &job.id, &prepared).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        let both = async { tokio::join!(trainer.pause(&a, &job.id), resumes) };
        let (paused, ()) = tokio::time::timeout(PATIENCE, both).await.expect("it is answered");
        paused.unwrap();
    }
    reaches(&mut watch, 2).await;
    // marked first, then the drain: in the order of the commands
    let (paused, ()) = tokio::join!(biased_pause(&trainer, &job.id), async {
        tokio::task::yield_now().await;
        trainer.drain(PATIENCE).await;
    });
    let state = trainer.get(&a, &job.id).await.unwrap().state;
    match paused {
        Ok(job) => assert_eq!((job.state, state), (JobState::Paused, JobState::Paused)),
        Err(error) => panic!("{error}"),
    }
}

/// Sends its command at its first poll.
async fn biased_pause(trainer: &TrainerHandle, id: &str) -> Result<JobInfo, TrainError> {
    let (done, marked) = tokio::sync::oneshot::channel();
    trainer
        .commands
        .send(super::supervisor::Command::Pause(id.to_owned(), done))
        .await
        .map_err(|_| TrainError::Draining)?;
    marked.await.map_err(|_| TrainError::Draining)??;
    loop {
        let job = trainer.get(&tenant("a"), id).await?;
        if job.state != JobState::Running {
            return Ok(job);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
