//! Laws of limits on what is stored, and of deleting a tenant.

use std::path::Path;

use bytes::Bytes;

use super::*;
use crate::{
    admission::params::PublishPolicy::Upsert,
    ids::DeltaName,
    store::{JobChange, NewDataset, NewJob, NewVersion, versions::tests::new_version},
};

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

async fn open(quota: Quota) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    store.set_quotas(Arc::new(move |tenant| if tenant.as_str() == "free" { Quota::default() } else { quota }));
    (dir, store)
}

fn version(owner: &str, name: &str, content: &str) -> NewVersion {
    NewVersion { tenant: tenant(owner), ..new_version(name, content, Upsert) }
}

/// The item of a refusal.
async fn publish(store: &Store, new: NewVersion) -> Option<QuotaItem> {
    match store.publish(new).await {
        Ok(_) => None,
        Err(StoreError::Quota(TenantLimit::Amount { item, .. })) => Some(item),
        Err(e) => panic!("{e}"),
    }
}

async fn put(store: &Store, owner: &str, text: &str) -> Result<(), StoreError> {
    store.check_dataset_room(&tenant(owner), text.len() as u64).await?;
    let blob = store.put_blob(Bytes::from(text.to_owned())).await?;
    let new = NewDataset { name: Some(text.into()), blob, format: "jsonl".into(), rows: 1, bytes: text.len() as u64 };
    store.put_dataset(&tenant(owner), new).await.map(|_| ())
}

#[tokio::test]
async fn what_goes_over_a_limit_is_refused_by_its_name_and_leaves_nothing() {
    let (_dir, store) = open(Quota { deltas: Some(2), versions: Some(3), ..Quota::default() }).await;
    for name in ["a", "b"] {
        assert_eq!(publish(&store, version("t", name, "1")).await, None);
    }
    let blobs = store.blobs_written();
    assert_eq!(publish(&store, version("t", "c", "3")).await, Some(QuotaItem::Deltas));
    assert_eq!(store.blobs_written(), blobs, "nothing is written of what is refused");
    assert_eq!(publish(&store, version("t", "a", "2")).await, None, "a name that is there");
    assert_eq!(publish(&store, version("t", "a", "4")).await, Some(QuotaItem::Versions));
    assert_eq!(publish(&store, version("t", "a", "1")).await, None, "the same bytes are no other version");
    let usage = store.tenant_usage(&tenant("t")).await.unwrap();
    assert_eq!((usage.deltas, usage.versions, usage.stored_bytes), (2, 3, 9), "two bytes of {{}} and one each");
    // room comes back, and others have their own
    store.delete_versions(&tenant("t"), &DeltaName::new("a").unwrap(), None, None).await.unwrap();
    assert_eq!(publish(&store, version("t", "c", "3")).await, None);
    for name in ["a", "b", "c", "d"] {
        assert_eq!(publish(&store, version("free", name, "1")).await, None);
    }
}

#[tokio::test]
async fn bytes_of_versions_and_of_datasets_have_limits_of_their_own() {
    let (_dir, store) = open(Quota { stored_bytes: Some(10), dataset_bytes: Some(5), ..Quota::default() }).await;
    assert_eq!(publish(&store, version("t", "a", "12345678")).await, None);
    assert_eq!(publish(&store, version("t", "b", "x")).await, Some(QuotaItem::StoredBytes));
    put(&store, "t", "12345").await.unwrap();
    let refused = put(&store, "t", "1").await.unwrap_err();
    let limit = TenantLimit::Amount { item: QuotaItem::DatasetBytes, limit: 5, used: 5, asked: 1 };
    assert!(matches!(refused, StoreError::Quota(found) if found == limit), "{refused}");
    put(&store, "free", "1234567890").await.unwrap();
}

#[tokio::test]
async fn limits_hold_for_many_at_once() {
    let (_dir, store) = open(Quota { versions: Some(5), ..Quota::default() }).await;
    let all = (0..20).map(|i| {
        let store = store.clone();
        tokio::spawn(async move { publish(&store, version("t", &format!("n{i}"), &format!("{i}"))).await })
    });
    let mut published = 0;
    for one in all.collect::<Vec<_>>() {
        published += usize::from(one.await.unwrap().is_none());
    }
    assert_eq!((published, store.tenant_usage(&tenant("t")).await.unwrap().versions), (5, 5));
}

/// Files below a folder that have these bytes in their names or contents.
fn with(dir: &Path, marker: &[u8], found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            with(&path, marker, found);
            continue;
        }
        let has = |bytes: &[u8]| bytes.windows(marker.len()).any(|w| w == marker);
        if has(&std::fs::read(&path).unwrap()) || has(path.to_string_lossy().as_bytes()) {
            found.push(path.display().to_string());
        }
    }
}

#[tokio::test]
async fn nothing_of_a_deleted_tenant_is_left_in_any_file_and_others_have_all_of_theirs() {
    let (dir, store) = open(Quota::default()).await;
    let mine = tenant("zebra-works");
    for i in 0..40 {
        publish(&store, version("zebra-works", &format!("zebra-{}", i % 7), &format!("zebra weights {i}"))).await;
    }
    // some of it was deleted before, in the usual way
    store.delete_versions(&mine, &DeltaName::new("zebra-3").unwrap(), None, None).await.unwrap();
    put(&store, "zebra-works", &"zebra ".repeat(3000)).await.unwrap();
    publish(&store, version("zebra-works", "plain", "shared by both")).await;
    publish(&store, version("other", "plain", "shared by both")).await;
    put(&store, "other", "of the other").await.unwrap();
    let data = store.put_blob(Bytes::from_static(b"zebra rows")).await.unwrap();
    let checkpoint = store.put_blob(Bytes::from_static(b"zebra checkpoint")).await.unwrap();
    let id = uuid::Uuid::now_v7().to_string();
    let job = |owner: &str, id: &str, blobs| NewJob {
        id: id.to_owned(),
        tenant: tenant(owner),
        output_name: "zebra-out".into(),
        request_json: "{}".into(),
        resolved_json: "{}".into(),
        idempotency_key: Some(format!("{owner}-key")),
        request_digest: "d".into(),
        base: String::new(),
        blobs,
    };
    store.create_job(job("zebra-works", &id, vec![("data".into(), data)])).await.unwrap();
    let change = JobChange {
        events: (0..200).map(|i| format!("\"zebra event {i}\"")).collect(),
        state: Some("paused".into()),
        checkpoint: Some((5, checkpoint)),
        ..JobChange::default()
    };
    store.change_job(&id, change).await.unwrap();
    let part = store.models().begin(&id).unwrap();
    std::fs::create_dir(&part).unwrap();
    std::fs::write(part.join("weights"), "zebra model").unwrap();
    store.models().keep(&id, "f".into()).unwrap();
    assert_eq!(store.model_bytes(&mine).await.unwrap(), 11);
    assert_eq!(store.model_bytes(&tenant("other")).await.unwrap(), 0);
    let mut found = Vec::new();
    with(dir.path(), b"zebra", &mut found);
    assert!(found.len() > 40, "{found:?}");

    let closed = store.close_tenant(&mine);
    let refused = [
        store.publish(version("zebra-works", "late", "late")).await.err(),
        put(&store, "zebra-works", "late").await.err(),
        store.create_job(job("zebra-works", "late", vec![])).await.err(),
    ];
    assert!(refused.iter().all(|e| matches!(e, Some(StoreError::TenantClosed))), "{refused:?}");
    let deleted = store.delete_tenant(&closed).await.unwrap();
    assert_eq!((deleted.deltas, deleted.versions, deleted.datasets), (8, 41, 1));
    assert_eq!((deleted.jobs, deleted.models, deleted.blobs_left), (1, 1, 0));
    let mut found = Vec::new();
    with(dir.path(), b"zebra", &mut found);
    assert_eq!(found, Vec::<String>::new());
    assert_eq!(store.tenant_usage(&mine).await.unwrap(), TenantUsage::default());
    // again: there is nothing
    assert_eq!(store.delete_tenant(&closed).await.unwrap(), DeletedTenant::default());
    drop(closed);

    let names = store.all_names().await.unwrap();
    assert_eq!(names.iter().map(|n| n.tenant.as_str()).collect::<Vec<_>>(), ["other"]);
    store.read_files(names[0].current().unwrap()).await.unwrap();
    assert_eq!(store.list_datasets(&tenant("other")).await.unwrap().len(), 1);
    // the name may be used again, from the beginning
    let (again, _) = store.publish(version("zebra-works", "zebra-1", "new")).await.unwrap();
    assert_eq!(again.number, 1);
}

#[tokio::test]
async fn a_blob_that_is_being_read_stays_until_it_is_let_go() {
    let (_dir, store) = open(Quota::default()).await;
    let (made, _) = store.publish(version("t", "a", "held weights")).await.unwrap();
    let held = store.hold_files(&made).await;
    let closed = store.close_tenant(&tenant("t"));
    let task = {
        let store = store.clone();
        tokio::spawn(async move { store.delete_tenant(&closed).await.unwrap() })
    };
    tokio::time::sleep(3 * PAUSE).await;
    assert!(!task.is_finished(), "it waits for who reads");
    drop(held);
    let deleted = task.await.unwrap();
    assert_eq!((deleted.versions, deleted.blobs, deleted.blobs_left), (1, 2, 0));
}
