//! Laws of jobs among servers.

use std::collections::BTreeSet;

use super::*;
use crate::{
    admission::params::PublishPolicy,
    ids::BlobId,
    store::{
        CreateJob, JobChange, NewJob, Origin,
        testing::{Place, psql},
        versions::tests::new_version,
    },
};

fn job(base: &str) -> NewJob {
    NewJob {
        id: uuid::Uuid::now_v7().to_string(),
        tenant: TenantId::new("t").unwrap(),
        output_name: "n".into(),
        request_json: "{}".into(),
        resolved_json: "{}".into(),
        idempotency_key: None,
        request_digest: String::new(),
        base: base.into(),
        blobs: vec![],
    }
}

async fn created(store: &Store, base: &str) -> String {
    match store.create_job(job(base)).await.unwrap() {
        CreateJob::Created(job) | CreateJob::Existing(job) => job.id,
    }
}

async fn claims(store: &Store, base: &str) -> Vec<String> {
    store.claim_jobs(base, &BTreeSet::new()).await.unwrap().into_iter().map(|job| job.id).collect()
}

fn expire(place: &Place, server: &Store) {
    let sql = format!("UPDATE servers SET until_ms = 1 WHERE id = '{}'", server.server());
    psql(place.url().unwrap(), &sql).unwrap();
}

#[tokio::test]
async fn a_job_of_a_living_server_is_nobody_elses_and_one_of_a_dead_server_is_of_exactly_one() {
    let Some(place) = Place::postgres() else { return };
    let (a, b, c) = (place.server("a").await, place.server("b").await, place.server("c").await);
    let id = created(&a, "base").await;
    let other = created(&a, "another base").await;
    assert!(claims(&b, "base").await.is_empty());
    a.append_event(&id, "1".into(), Some("running"), None).await.unwrap();
    expire(&place, &a);
    // late, but nobody has taken it yet
    a.append_event(&id, "2".into(), None, None).await.unwrap();
    let (of_b, of_c) = tokio::join!(claims(&b, "base"), claims(&c, "base"));
    assert_eq!([of_b.len(), of_c.len()].iter().sum::<usize>(), 1, "{of_b:?} {of_c:?}");
    let owner = if of_b.is_empty() { &c } else { &b };
    assert_eq!(owner.owned_jobs().await.unwrap(), BTreeSet::from([id.clone()]));
    // whatever the old owner says of it now is refused, and leaves nothing
    let refused = a.append_event(&id, "3".into(), Some("succeeded"), None).await;
    assert!(matches!(refused, Err(StoreError::NotOwner(job)) if job == id));
    let blob = a.put_blob("run".into()).await.unwrap();
    let saved = JobChange { events: vec!["saved".into()], checkpoint: Some((1, blob)), ..JobChange::default() };
    assert!(matches!(a.change_job(&id, saved).await, Err(StoreError::NotOwner(_))));
    assert!(matches!(a.keep_best(&id, 1, blob).await, Err(StoreError::NotOwner(_))));
    assert!(matches!(a.count_try(&id, true).await, Err(StoreError::NotOwner(_))));
    let mut version = new_version("n", "1", PublishPolicy::Upsert);
    version.origin = Origin::Job(id.clone());
    assert!(matches!(a.publish(version.clone()).await, Err(StoreError::NotOwner(_))));
    assert!(a.all_names().await.unwrap().is_empty());
    assert_eq!(owner.events(&id, 1, 10).await.unwrap().len(), 2);
    // and the new one's is not
    owner.append_event(&id, "3".into(), Some("publishing"), None).await.unwrap();
    owner.publish(version).await.unwrap();
    owner.append_event(&id, "4".into(), Some("succeeded"), None).await.unwrap();
    // nobody here serves the other base: it waits, and its owner may have it back
    assert!(claims(&b, "base").await.is_empty());
    a.renew_lease().await.unwrap();
    assert_eq!(claims(&a, "another base").await, [other]);
}

#[tokio::test]
async fn a_second_process_of_a_server_takes_its_place() {
    let Some(place) = Place::postgres() else { return };
    let first = place.server("a").await;
    let id = created(&first, "base").await;
    // a copy of the data directory, which the lock does not guard
    std::fs::create_dir_all(place.dir().join("copy")).unwrap();
    std::fs::copy(place.dir().join("a/server-id"), place.dir().join("copy/server-id")).unwrap();
    let second = place.server("copy").await;
    assert_eq!(first.server(), second.server());
    assert!(matches!(first.renew_lease().await, Err(StoreError::Replaced)));
    assert!(matches!(first.append_event(&id, "1".into(), None, None).await, Err(StoreError::NotOwner(_))));
    second.renew_lease().await.unwrap();
    assert_eq!(second.append_event(&id, "1".into(), None, None).await.unwrap(), 1);
    first.close().await;
    second.renew_lease().await.unwrap();
}

#[tokio::test]
async fn a_server_that_stops_leaves_its_jobs_at_once_and_an_ask_reaches_the_owner() {
    let Some(place) = Place::postgres() else { return };
    let (a, b) = (place.server("a").await, place.server("b").await);
    let (one, two) = (created(&a, "base").await, created(&a, "base").await);
    let tenant = TenantId::new("t").unwrap();
    b.ask_of_job(&tenant, &one, JobAsk::Cancel).await.unwrap();
    let stranger = TenantId::new("stranger").unwrap();
    assert!(matches!(b.ask_of_job(&stranger, &one, JobAsk::Pause).await, Err(StoreError::NotFound { .. })));
    assert!(b.take_asks().await.unwrap().is_empty(), "it is not its job");
    assert_eq!(a.take_asks().await.unwrap(), [(one.clone(), JobAsk::Cancel)]);
    assert!(a.take_asks().await.unwrap().is_empty(), "once");
    // paused: it may go on anywhere
    assert!(!b.claim_paused(&two).await.unwrap());
    a.append_event(&two, "1".into(), Some("paused"), None).await.unwrap();
    assert!(b.claim_paused(&two).await.unwrap());
    assert_eq!(a.owned_jobs().await.unwrap(), BTreeSet::from([one.clone()]));
    a.close().await;
    assert_eq!(claims(&b, "base").await, [one, two]);
}

#[tokio::test]
async fn what_one_server_publishes_the_others_find_by_its_change() {
    let Some(place) = Place::postgres() else { return };
    let (a, b) = (place.server("a").await, place.server("b").await);
    let mut seen = b.last_change().await.unwrap();
    assert_eq!(b.changed_names(seen).await.unwrap(), (vec![], seen));
    let (version, name) = a.publish(new_version("n", "1", PublishPolicy::Upsert)).await.unwrap();
    a.publish(new_version("m", "2", PublishPolicy::Upsert)).await.unwrap();
    let (names, last) = b.changed_names(seen).await.unwrap();
    assert_eq!((names.len(), &names[0]), (2, &name));
    seen = last;
    b.read_files(&version).await.unwrap();
    b.delete_versions(&version.tenant, &version.name, None, None).await.unwrap();
    let (names, last) = a.changed_names(seen).await.unwrap();
    assert!(last > seen && names.len() == 1 && names[0].versions.is_empty() && names[0].current.is_none());
    // both swap the same version: one does
    let (one, _) = a.publish(new_version("x", "1", PublishPolicy::Upsert)).await.unwrap();
    let swap = |content: &str| new_version("x", content, PublishPolicy::CompareAndSwap(one.id));
    let (of_a, of_b) = tokio::join!(a.publish(swap("2")), b.publish(swap("3")));
    assert!(of_a.is_ok() != of_b.is_ok(), "{of_a:?} {of_b:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_on_one_server_beside_publishes_on_another_never_takes_a_named_blob() {
    let Some(place) = Place::postgres() else { return };
    let (a, b) = (place.server("a").await, place.server("b").await);
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let collector = tokio::spawn({
        let done = std::sync::Arc::clone(&done);
        async move {
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                b.collect_garbage_after(Duration::ZERO).await.unwrap();
            }
            b
        }
    });
    for i in 0..20 {
        for content in ["a", "b"] {
            let (version, _) = a.publish(new_version("n", content, PublishPolicy::Upsert)).await.unwrap();
            a.read_files(&version).await.unwrap();
        }
        let new = new_version("n", "", PublishPolicy::Upsert);
        a.delete_versions(&new.tenant, &new.name, None, None).await.unwrap();
        if i % 5 == 0 {
            // as if the publisher had died: what it held is garbage then
            psql(place.url().unwrap(), "DELETE FROM blob_holds").unwrap();
        }
    }
    done.store(true, std::sync::atomic::Ordering::Release);
    let b = collector.await.unwrap();
    let (version, _) = a.publish(new_version("n", "a", PublishPolicy::Upsert)).await.unwrap();
    b.collect_garbage_after(Duration::ZERO).await.unwrap();
    a.read_files(&version).await.unwrap();
    // without its hold, bytes are not named any more
    let blob = a.put_blob("late".into()).await.unwrap();
    psql(place.url().unwrap(), "DELETE FROM blob_holds").unwrap();
    let mut tx = a.db().begin().await.unwrap();
    assert!(matches!(a.check_held(&mut tx, &[blob]).await, Err(StoreError::HoldExpired)));
    drop(tx);
    assert!(b.collect_garbage_after(Duration::ZERO).await.unwrap().blobs > 0);
    assert!(matches!(a.get_blob(BlobId::of(b"late")).await, Err(StoreError::Corrupt { .. })));
}
