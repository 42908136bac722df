//! Laws of job rows.

use super::*;
use crate::store::testing::{Place, on_each_database};

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

fn job(tenant_name: &str, key: Option<&str>, digest: &str) -> NewJob {
    NewJob {
        id: uuid::Uuid::now_v7().to_string(),
        tenant: tenant(tenant_name),
        output_name: "style".into(),
        request_json: "{}".into(),
        resolved_json: "{\"rank\":8}".into(),
        idempotency_key: key.map(str::to_owned),
        request_digest: digest.into(),
        base: String::new(),
        blobs: vec![],
    }
}

async fn created(store: &Store, new: NewJob) -> JobRecord {
    match store.create_job(new).await.unwrap() {
        CreateJob::Created(job) => job,
        CreateJob::Existing(job) => panic!("exists: {job:?}"),
    }
}

async fn events_are_gap_free_under_concurrency_and_refused_after_the_one_final_state(place: Place) {
    let store = place.open().await;
    let id = created(&store, job("a", None, "")).await.id;
    let appends = (0..40).map(|i| {
        let (store, id) = (store.clone(), id.clone());
        tokio::spawn(async move { store.append_event(&id, format!("{i}"), Some("running"), None).await.unwrap() })
    });
    let mut seqs = Vec::new();
    for append in appends.collect::<Vec<_>>() {
        seqs.push(append.await.unwrap());
    }
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=40).collect::<Vec<_>>());
    // Of many that want to end it, exactly one does.
    let ends = ["succeeded", "failed", "cancelled", "interrupted"].map(|state| {
        let (store, id) = (store.clone(), id.clone());
        tokio::spawn(async move { store.append_event(&id, "end".into(), Some(state), Some(state.into())).await })
    });
    let mut won = 0;
    for end in ends {
        match end.await.unwrap() {
            Ok(seq) => {
                assert_eq!(seq, 41);
                won += 1;
            }
            Err(e) => assert!(matches!(e, StoreError::JobEnded { .. }), "{e}"),
        }
    }
    assert_eq!(won, 1);
    assert!(matches!(store.append_event(&id, "late".into(), None, None).await, Err(StoreError::JobEnded { .. })));
    let job = store.get_job(&tenant("a"), &id).await.unwrap();
    assert!(is_terminal(&job.state));
    assert_eq!((job.last_seq, job.result_json), (41, Some(job.state)));
    let tail = store.events(&id, 39, 10).await.unwrap();
    assert_eq!(tail.iter().map(|e| e.seq).collect::<Vec<_>>(), [39, 40, 41]);
    assert_eq!(store.events(&id, 1, 5).await.unwrap().len(), 5);
}

async fn unknown_jobs_and_states_are_refused(place: Place) {
    let store = place.open().await;
    let id = created(&store, job("a", None, "")).await.id;
    assert!(matches!(store.append_event("x", "e".into(), None, None).await, Err(StoreError::NotFound { .. })));
    let odd = store.append_event(&id, "e".into(), Some("done"), None).await;
    assert!(matches!(odd, Err(StoreError::Invalid { field: "state", .. })));
    assert!(matches!(store.get_job(&tenant("b"), &id).await, Err(StoreError::NotFound { .. })));
    assert_eq!(store.get_job(&tenant("a"), &id).await.unwrap().last_seq, 0);
}

async fn an_idempotency_key_replays_its_request_and_refuses_another(place: Place) {
    let store = place.open().await;
    let tries = (0..8).map(|_| {
        let store = store.clone();
        tokio::spawn(async move { store.create_job(job("a", Some("k"), "d")).await.unwrap() })
    });
    let (mut ids, mut new) = (std::collections::HashSet::new(), 0);
    for attempt in tries.collect::<Vec<_>>() {
        match attempt.await.unwrap() {
            CreateJob::Created(job) => {
                new += 1;
                ids.insert(job.id);
            }
            CreateJob::Existing(job) => {
                ids.insert(job.id);
            }
        }
    }
    assert_eq!((new, ids.len()), (1, 1));
    let other = store.create_job(job("a", Some("k"), "other")).await;
    assert!(matches!(other, Err(StoreError::IdempotencyConflict(key)) if key == "k"));
    // Keys belong to their tenant.
    created(&store, job("b", Some("k"), "other")).await;
}

async fn pages_cover_every_job_once_newest_first(place: Place) {
    let store = place.open().await;
    let mut ids = Vec::new();
    for i in 0..7 {
        let id = created(&store, job("a", None, "")).await.id;
        if i % 2 == 0 {
            store.append_event(&id, "{}".into(), Some("failed"), None).await.unwrap();
        }
        ids.push(id);
    }
    created(&store, job("b", None, "")).await;
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let page = store.list_jobs(&tenant("a"), &token, 3, None).await.unwrap();
        seen.extend(page.jobs.into_iter().map(|j| j.id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    ids.sort_by(|a, b| b.cmp(a));
    assert_eq!(seen, ids);
    assert_eq!(store.list_jobs(&tenant("a"), "", 10, Some("failed")).await.unwrap().jobs.len(), 4);
    assert_eq!(store.unfinished_jobs().await.unwrap().len(), 4);
}

async fn a_restart_finds_jobs_events_and_kept_blobs_again(place: Place) {
    let store = place.open().await;
    let id = created(&store, job("a", Some("k"), "d")).await.id;
    store.append_event(&id, "{\"loss\":1}".into(), Some("running"), None).await.unwrap();
    let blob = store.put_blob(bytes::Bytes::from_static(b"checkpoint")).await.unwrap();
    store.set_job_blob(&id, "checkpoint", blob).await.unwrap();
    let before = store.get_job(&tenant("a"), &id).await.unwrap();
    store.close().await;
    drop(store);
    let store = place.open().await;
    assert_eq!(store.unfinished_jobs().await.unwrap(), [before]);
    assert_eq!(store.events(&id, 0, 10).await.unwrap().len(), 1);
    store.collect_garbage().await.unwrap();
    assert_eq!(store.job_blobs(&id).await.unwrap(), [("checkpoint".to_owned(), blob)]);
    assert_eq!(store.get_blob(blob).await.unwrap(), "checkpoint");
    store.clear_job_blobs(&id).await.unwrap();
    // among servers it is not garbage before it was that for a while
    assert_eq!(store.collect_garbage().await.unwrap().blobs, u64::from(!place.is_shared()));
}

fn saves(step: u64, blob: BlobId) -> JobChange {
    JobChange { events: vec![format!("saved {step}")], checkpoint: Some((step, blob)), ..JobChange::default() }
}

async fn a_job_has_one_checkpoint_the_newest_and_none_after_its_end(place: Place) {
    let store = place.open().await;
    let data = store.put_blob(bytes::Bytes::from_static(b"data")).await.unwrap();
    let blobs = vec![("data".to_owned(), data)];
    let id = created(&store, NewJob { blobs, base: "b".into(), ..job("a", None, "") }).await.id;
    assert_eq!(store.get_job(&tenant("a"), &id).await.unwrap().base, "b");
    let absent = store.change_job(&id, saves(1, BlobId::of(b"absent"))).await;
    assert!(matches!(absent, Err(StoreError::NotFound { kind: "blob", .. })));
    assert_eq!(store.job_checkpoint(&id).await.unwrap(), None);
    let put = async |step: u64| store.put_blob(bytes::Bytes::from(format!("checkpoint {step}"))).await.unwrap();
    for step in [3, 9] {
        let blob = put(step).await;
        let seq = store.change_job(&id, saves(step, blob)).await.unwrap();
        assert_eq!(seq, if step == 3 { 1 } else { 2 });
        let kept = store.job_checkpoint(&id).await.unwrap();
        assert_eq!(kept, Some(CheckpointRecord { step, blob, resumes: 0 }));
    }
    assert!(!store.blobs().exists(BlobId::of(b"checkpoint 3")).await.unwrap(), "what was replaced is gone");
    assert!(store.blobs().exists(BlobId::of(b"checkpoint 9")).await.unwrap());
    // one that was overtaken changes nothing, its event included
    let old = put(5).await;
    assert_eq!(store.change_job(&id, saves(5, old)).await.unwrap(), 2);
    assert_eq!(store.job_checkpoint(&id).await.unwrap().map(|c| c.step), Some(9));
    // resumes are counted until a newer one comes
    for n in 1..=2 {
        let again = JobChange { events: vec!["again".into()], resumes: true, ..JobChange::default() };
        store.change_job(&id, again).await.unwrap();
        assert_eq!(store.job_checkpoint(&id).await.unwrap().map(|c| c.resumes), Some(n));
    }
    store.close().await;
    drop(store);
    let store = place.open().await;
    store.collect_garbage().await.unwrap();
    assert_eq!(store.job_checkpoint(&id).await.unwrap().map(|c| (c.step, c.resumes)), Some((9, 2)));
    assert_eq!(store.get_blob(BlobId::of(b"checkpoint 9")).await.unwrap(), "checkpoint 9");
    assert_eq!(store.get_blob(data).await.unwrap(), "data");
    // two events and the new state at once
    let last = store.put_blob(bytes::Bytes::from_static(b"last")).await.unwrap();
    let pause =
        JobChange { events: vec!["saved".into(), "paused".into()], state: Some("paused".into()), ..saves(12, last) };
    assert_eq!(store.change_job(&id, pause).await.unwrap(), 6);
    assert_eq!(store.job_checkpoint(&id).await.unwrap().map(|c| c.resumes), Some(0));
    assert!(!store.blobs().exists(BlobId::of(b"checkpoint 9")).await.unwrap(), "what was replaced is gone");
    assert_eq!(store.get_job(&tenant("a"), &id).await.unwrap().state, "paused");
    assert_eq!(store.unfinished_jobs().await.unwrap().len(), 1);
    let weights = store.put_blob(bytes::Bytes::from_static(b"weights")).await.unwrap();
    store.set_job_blob(&id, "checkpoint", weights).await.unwrap();
    store.append_event(&id, "end".into(), Some("cancelled"), None).await.unwrap();
    assert_eq!(store.job_checkpoint(&id).await.unwrap(), None);
    assert_eq!(store.job_blobs(&id).await.unwrap(), [("checkpoint".to_owned(), weights)], "its last weights stay");
    assert!(!store.blobs().exists(last).await.unwrap());
    let seqs: Vec<u64> = store.events(&id, 1, 100).await.unwrap().iter().map(|e| e.seq).collect();
    assert_eq!(seqs, (1..=7).collect::<Vec<_>>());
}

async fn a_job_that_failed_keeps_its_checkpoint_and_data_until_the_tenant_has_eight_newer_ones(place: Place) {
    let store = place.open().await;
    let ends = async |owner: &str, state: &str, has: bool| {
        let id = uuid::Uuid::now_v7().to_string();
        let data = store.put_blob(bytes::Bytes::from(format!("data {id}"))).await.unwrap();
        let new = NewJob { id: id.clone(), blobs: vec![("data".into(), data)], ..job(owner, None, "") };
        created(&store, new).await;
        if has {
            let blob = store.put_blob(bytes::Bytes::from(format!("run {id}"))).await.unwrap();
            store.change_job(&id, saves(4, blob)).await.unwrap();
        }
        store.append_event(&id, "end".into(), Some(state), None).await.unwrap();
        id
    };
    let kept = async |id: &str| {
        let checkpoint = store.job_checkpoint(id).await.unwrap();
        let run = store.blobs().exists(BlobId::of(format!("run {id}").as_bytes())).await.unwrap();
        assert_eq!((checkpoint.is_some(), store.job_blobs(id).await.unwrap().len()), (run, usize::from(run)));
        run
    };
    let (first, other) = (ends("a", "failed", true).await, ends("b", "interrupted", true).await);
    assert!(kept(&first).await && kept(&other).await);
    for state in ["succeeded", "cancelled"] {
        assert!(!kept(&ends("a", state, true).await).await, "{state}");
    }
    assert!(!kept(&ends("a", "failed", false).await).await, "nothing to go on from: its data is of no use");
    let mut newer = Vec::new();
    for _ in 0..7 {
        newer.push(ends("a", "failed", true).await);
    }
    assert!(kept(&first).await);
    newer.push(ends("a", "interrupted", true).await);
    assert!(!kept(&first).await && kept(&other).await, "the oldest of the tenant lets go");
    for id in &newer {
        assert!(kept(id).await);
    }
}

async fn weights_of_the_best_evaluations_outlive_a_good_end_and_count_as_what_ended_jobs_keep(place: Place) {
    let store = place.open().await;
    let put = async |text: String| store.put_blob(bytes::Bytes::from(text)).await.unwrap();
    // steps out of order, and of names that sort otherwise
    let ends = async |owner: &str, state: &str| {
        let id = uuid::Uuid::now_v7().to_string();
        let data = put(format!("data {id}")).await;
        created(&store, NewJob { id: id.clone(), blobs: vec![("data".into(), data)], ..job(owner, None, "") }).await;
        let run = put(format!("run {id}")).await;
        store.change_job(&id, saves(4, run)).await.unwrap();
        for step in [100, 20, 3] {
            let blob = put(format!("best {step} {id}")).await;
            store.keep_best(&id, step, blob).await.unwrap();
        }
        store.append_event(&id, "end".into(), Some(state), None).await.unwrap();
        id
    };
    let there = async |text: String| store.blobs().exists(BlobId::of(text.as_bytes())).await.unwrap();
    let steps = async |id: &str| {
        let bests = store.job_bests(id).await.unwrap();
        for (step, blob) in &bests {
            assert_eq!(*blob, BlobId::of(format!("best {step} {id}").as_bytes()));
        }
        bests.into_iter().map(|(step, _)| step).collect::<Vec<_>>()
    };
    let good = ends("a", "succeeded").await;
    assert_eq!(steps(&good).await, [3, 20, 100]);
    assert_eq!(store.job_checkpoint(&good).await.unwrap(), None, "it goes on from nothing");
    assert!(!there(format!("run {good}")).await);
    assert_eq!(store.job_blobs(&good).await.unwrap().len(), 4, "its data, too");
    let bad = ends("a", "failed").await;
    assert!(steps(&bad).await.len() == 3 && there(format!("run {bad}")).await);
    let cancelled = ends("a", "cancelled").await;
    assert!(steps(&cancelled).await.is_empty() && store.job_blobs(&cancelled).await.unwrap().is_empty());
    assert!(!there(format!("best 20 {cancelled}")).await, "at once");
    // the same step again is one
    let other = put("another".into()).await;
    let open = created(&store, job("b", None, "")).await.id;
    for blob in [BlobId::of(format!("best 3 {good}").as_bytes()), other] {
        store.keep_best(&open, 3, blob).await.unwrap();
    }
    assert_eq!(store.job_bests(&open).await.unwrap(), [(3, other)]);
    // eight ended jobs of a tenant keep something, whichever way they ended
    let mut newer = Vec::new();
    for state in ["succeeded", "interrupted", "succeeded", "failed", "succeeded", "succeeded"] {
        newer.push(ends("a", state).await);
    }
    assert!(!steps(&good).await.is_empty());
    newer.push(ends("a", "succeeded").await);
    assert!(steps(&good).await.is_empty() && store.job_blobs(&good).await.unwrap().is_empty(), "the oldest lets go");
    assert!(!there(format!("best 3 {good}")).await && !there(format!("best 100 {good}")).await);
    assert_eq!(steps(&bad).await.len(), 3);
    store.close().await;
    drop(store);
    let store = place.open().await;
    store.collect_garbage_after(std::time::Duration::ZERO).await.unwrap();
    for id in newer.iter().chain([&bad]) {
        let bests = store.job_bests(id).await.unwrap();
        assert_eq!(bests.len(), 3);
        for (step, blob) in bests {
            assert_eq!(store.get_blob(blob).await.unwrap(), format!("best {step} {id}"));
        }
    }
}

async fn a_checkpoint_that_another_job_replaces_stays_for_the_one_that_is_about_to_name_it(place: Place) {
    let store = place.open().await;
    let (first, second) = (created(&store, job("a", None, "")).await.id, created(&store, job("b", None, "")).await.id);
    let same = bytes::Bytes::from_static(b"the same run");
    let blob = store.put_blob(same.clone()).await.unwrap();
    store.change_job(&first, saves(1, blob)).await.unwrap();
    let (again, hold) = store.put_held(same).await.unwrap();
    let next = store.put_blob(bytes::Bytes::from_static(b"a step later")).await.unwrap();
    store.change_job(&first, saves(2, next)).await.unwrap();
    store.change_job(&second, saves(1, again)).await.unwrap();
    drop(hold);
    assert_eq!(store.get_blob(blob).await.unwrap(), "the same run");
}

on_each_database!(
    events_are_gap_free_under_concurrency_and_refused_after_the_one_final_state,
    unknown_jobs_and_states_are_refused,
    an_idempotency_key_replays_its_request_and_refuses_another,
    pages_cover_every_job_once_newest_first,
    a_restart_finds_jobs_events_and_kept_blobs_again,
    a_job_has_one_checkpoint_the_newest_and_none_after_its_end,
    a_job_that_failed_keeps_its_checkpoint_and_data_until_the_tenant_has_eight_newer_ones,
    weights_of_the_best_evaluations_outlive_a_good_end_and_count_as_what_ended_jobs_keep,
    a_checkpoint_that_another_job_replaces_stays_for_the_one_that_is_about_to_name_it,
);
