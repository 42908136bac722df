//! Laws of publishing.

use std::time::Duration;

use super::*;
use crate::{
    delta::Task,
    store::{
        Garbage,
        testing::{Place, on_each_database},
    },
};

pub(in crate::store) fn new_version(name: &str, content: &str, policy: PublishPolicy) -> NewVersion {
    let files = [("adapter_config.json", "{}"), ("adapter_model.safetensors", content)];
    let files = files.map(|(name, text)| (name.to_owned(), Bytes::copy_from_slice(text.as_bytes())));
    NewVersion {
        tenant: TenantId::new("t").unwrap(),
        name: DeltaName::new(name).unwrap(),
        base: BaseFingerprint::from_bytes([1; 32]),
        spec: DeltaSpec {
            methods: vec!["lora".into()],
            task: Task::CausalLm,
            labels: vec!["no".into()],
            num_virtual_tokens: 0,
            problem: Default::default(),
            parameters: 10,
            resident_bytes: 40,
        },
        files: DeltaFiles { files: files.into() },
        policy,
        origin: Origin::Job("j1".into()),
    }
}

use PublishPolicy::{CompareAndSwap, Create, Upsert};

async fn policies_decide_what_a_publish_may_replace(place: Place) {
    let store = place.open().await;
    let (one, _) = store.publish(new_version("n", "1", Create)).await.unwrap();
    assert_eq!((one.number, one.origin.as_str(), one.stored_bytes), (1, "job:j1", 3));
    assert!(matches!(store.publish(new_version("n", "2", Create)).await, Err(StoreError::AlreadyExists(_))));
    let (two, _) = store.publish(new_version("n", "2", Upsert)).await.unwrap();
    let stale = store.publish(new_version("n", "3", CompareAndSwap(one.id))).await;
    assert!(matches!(stale, Err(StoreError::Conflict { current: Some(id), .. }) if id == two.id));
    let (three, name) = store.publish(new_version("n", "3", CompareAndSwap(two.id))).await.unwrap();
    assert_eq!((three.number, name.current), (3, Some(3)));
    let nothing = store.publish(new_version("m", "3", CompareAndSwap(one.id))).await;
    assert!(matches!(nothing, Err(StoreError::Conflict { current: None, .. })));
    assert_eq!(store.all_names().await.unwrap(), [name]);
}

async fn the_same_bytes_are_the_same_version(place: Place) {
    let store = place.open().await;
    let (one, first) = store.publish(new_version("n", "1", Upsert)).await.unwrap();
    let (again, name) = store.publish(new_version("n", "1", Upsert)).await.unwrap();
    assert_eq!(one, again);
    assert_eq!(name.versions.len(), 1);
    assert!(name.revision > first.revision);
    store.publish(new_version("n", "2", Upsert)).await.unwrap();
    let (back, name) = store.publish(new_version("n", "1", Upsert)).await.unwrap();
    assert_eq!((back.number, name.current, name.versions.len()), (1, Some(1), 2));
    let (next, _) = store.publish(new_version("n", "4", Upsert)).await.unwrap();
    assert_eq!(next.number, 3);
}

async fn of_concurrent_swaps_of_one_version_exactly_one_wins(place: Place) {
    let store = place.open().await;
    let (base, _) = store.publish(new_version("n", "0", Create)).await.unwrap();
    let racers: Vec<_> = (1..=16)
        .map(|i| {
            let (store, id) = (store.clone(), base.id);
            tokio::spawn(async move { store.publish(new_version("n", &i.to_string(), CompareAndSwap(id))).await })
        })
        .collect();
    let mut winners = Vec::new();
    for racer in racers {
        match racer.await.unwrap() {
            Ok((version, _)) => winners.push(version),
            Err(e) => assert!(matches!(e, StoreError::Conflict { .. }), "{e}"),
        }
    }
    let [winner] = &winners[..] else { panic!("{} winners", winners.len()) };
    let names = store.all_names().await.unwrap();
    assert_eq!(names[0].current().map(|v| v.id), Some(winner.id));
    assert_eq!(names[0].versions.len(), 2);
}

async fn numbers_are_never_used_twice_even_after_delete(place: Place) {
    let store = place.open().await;
    let new = |content: &str| new_version("n", content, Upsert);
    let (tenant, name) = (new("").tenant, new("").name);
    let (one, _) = store.publish(new("1")).await.unwrap();
    let (two, _) = store.publish(new("2")).await.unwrap();
    let current = store.delete_versions(&tenant, &name, Some(2), None).await;
    assert!(matches!(current, Err(StoreError::IsCurrent { number: 2, .. })));
    let stale = store.delete_versions(&tenant, &name, None, Some(one.id)).await;
    assert!(matches!(stale, Err(StoreError::Conflict { .. })));
    let after = store.delete_versions(&tenant, &name, Some(1), Some(two.id)).await.unwrap();
    assert_eq!(after.versions.keys().copied().collect::<Vec<_>>(), [2]);
    let after = store.delete_versions(&tenant, &name, None, None).await.unwrap();
    assert_eq!((after.current, after.versions.len()), (None, 0));
    assert!(matches!(store.delete_versions(&tenant, &name, None, None).await, Err(StoreError::NotFound { .. })));
    assert!(store.all_names().await.unwrap().is_empty());
    let (three, _) = store.publish(new_version("n", "1", Create)).await.unwrap();
    assert_eq!((three.number, three.id), (3, one.id));
}

async fn the_name_moves_back_only_to_a_live_version(place: Place) {
    let store = place.open().await;
    let (one, _) = store.publish(new_version("n", "1", Upsert)).await.unwrap();
    let (two, _) = store.publish(new_version("n", "2", Upsert)).await.unwrap();
    let (t, n) = (&one.tenant, &one.name);
    assert!(matches!(store.set_current(t, n, 1, Some(one.id)).await, Err(StoreError::Conflict { .. })));
    assert_eq!(store.set_current(t, n, 1, Some(two.id)).await.unwrap().current, Some(1));
    assert!(matches!(store.set_current(t, n, 9, None).await, Err(StoreError::NotFound { .. })));
    store.delete_versions(t, n, Some(2), None).await.unwrap();
    assert!(matches!(store.set_current(t, n, 2, None).await, Err(StoreError::NotFound { .. })));
}

async fn a_restart_keeps_everything(place: Place) {
    let store = place.open().await;
    for i in 0..3 {
        store.publish(new_version("n", &i.to_string(), Upsert)).await.unwrap();
        store.publish(new_version(&format!("m{i}"), "x", Upsert)).await.unwrap();
    }
    let (t, n) = (TenantId::new("t").unwrap(), DeltaName::new("n").unwrap());
    store.set_pinned(&t, &n, true).await.unwrap();
    let sorted = |mut names: Vec<NameRecord>| {
        names.sort_by(|a, b| a.name.cmp(&b.name));
        names
    };
    let before = sorted(store.all_names().await.unwrap());
    store.close().await;
    drop(store);
    let store = place.open().await;
    let after = sorted(store.all_names().await.unwrap());
    assert_eq!(before, after);
    assert!(after[3].pinned);
    let version = after[3].current().unwrap();
    assert_eq!(store.read_files(version).await.unwrap(), new_version("n", "2", Upsert).files);
}

async fn names_that_are_paths_are_refused(place: Place) {
    let store = place.open().await;
    for bad in ["../x", "a/b", "", ".."] {
        let mut new = new_version("n", "1", Upsert);
        new.files.files.insert(bad.into(), Bytes::new());
        assert!(matches!(store.publish(new).await, Err(StoreError::Invalid { field: "files", .. })), "{bad:?}");
    }
    let empty = NewVersion { files: DeltaFiles::default(), ..new_version("n", "1", Upsert) };
    assert!(matches!(store.publish(empty).await, Err(StoreError::Invalid { .. })));
    assert!(store.all_names().await.unwrap().is_empty());
}

async fn an_unreadable_row_does_not_hide_the_others(place: Place) {
    let store = place.open().await;
    store.publish(new_version("bad", "1", Upsert)).await.unwrap();
    let (good, _) = store.publish(new_version("good", "1", Upsert)).await.unwrap();
    let mut tx = store.db().begin().await.unwrap();
    query("UPDATE versions SET spec_json = '{' WHERE name = 'bad'").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let names = store.all_names().await.unwrap();
    let good_now = names.iter().find(|n| n.name.as_str() == "good").unwrap();
    assert_eq!(good_now.current(), Some(&good));
    assert!(names.iter().filter(|n| n.name.as_str() == "bad").all(|n| n.current().is_none()));
}

async fn garbage_is_what_no_row_names(place: Place) {
    let store = place.open().await;
    let (one, _) = store.publish(new_version("n", "1", Upsert)).await.unwrap();
    store.publish(new_version("n", "2", Upsert)).await.unwrap();
    let loose = store.put_blob(Bytes::from_static(b"loose")).await.unwrap();
    assert_eq!(store.collect_garbage().await.unwrap(), Garbage::default(), "within the grace");
    store.delete_versions(&one.tenant, &one.name, Some(1), None).await.unwrap();
    let removed = store.collect_garbage_after(Duration::ZERO).await.unwrap();
    assert_eq!(removed, Garbage { blobs: 2, bytes: 6 });
    assert!(matches!(store.get_blob(loose).await, Err(StoreError::Corrupt { .. })));
    let names = store.all_names().await.unwrap();
    store.read_files(names[0].current().unwrap()).await.unwrap();
}

async fn a_collection_beside_publishes_never_takes_a_named_blob(place: Place) {
    let store = place.open().await;
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let collector = tokio::spawn({
        let (store, done) = (store.clone(), Arc::clone(&done));
        async move {
            let mut removed = 0;
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                removed += store.collect_garbage_after(Duration::ZERO).await.unwrap().blobs;
            }
            removed
        }
    });
    // The same few contents come, go and come back, so that blobs turn into garbage while they are published again.
    for _ in 0..40 {
        for content in ["a", "b"] {
            let (version, _) = store.publish(new_version("n", content, Upsert)).await.unwrap();
            store.read_files(&version).await.unwrap();
        }
        let new = new_version("n", "", Upsert);
        store.delete_versions(&new.tenant, &new.name, None, None).await.unwrap();
    }
    done.store(true, std::sync::atomic::Ordering::Release);
    assert!(collector.await.unwrap() > 0, "nothing was ever collected: the test proves nothing");
    let (version, _) = store.publish(new_version("n", "a", Upsert)).await.unwrap();
    store.collect_garbage_after(Duration::ZERO).await.unwrap();
    store.read_files(&version).await.unwrap();
}

on_each_database!(
    policies_decide_what_a_publish_may_replace,
    the_same_bytes_are_the_same_version,
    of_concurrent_swaps_of_one_version_exactly_one_wins,
    numbers_are_never_used_twice_even_after_delete,
    the_name_moves_back_only_to_a_live_version,
    a_restart_keeps_everything,
    names_that_are_paths_are_refused,
    an_unreadable_row_does_not_hide_the_others,
    garbage_is_what_no_row_names,
    a_collection_beside_publishes_never_takes_a_named_blob,
);
