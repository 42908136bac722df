//! Laws of backups.

use std::time::Duration;

use super::*;
use crate::{
    admission::params::PublishPolicy::Upsert,
    delta::DeltaFiles,
    store::{
        DatasetRecord, EventRecord, JobRecord, NameRecord, NewDataset, NewJob,
        testing::{Place, on_each_database},
        versions::tests::new_version,
    },
};

/// Two names, one of them deleted, a dataset and a job with an event.
async fn fill(store: &Store) -> String {
    let (version, _) = store.publish(new_version("n", "1", Upsert)).await.unwrap();
    store.publish(new_version("n", "2", Upsert)).await.unwrap();
    store.publish(new_version("gone", "3", Upsert)).await.unwrap();
    let gone = new_version("gone", "", Upsert);
    store.delete_versions(&gone.tenant, &gone.name, None, None).await.unwrap();
    let blob = store.put_blob("data".into()).await.unwrap();
    let new = NewDataset { name: None, blob, format: "jsonl".into(), rows: 1, bytes: 4 };
    store.put_dataset(&version.tenant, new).await.unwrap();
    let job = NewJob {
        id: uuid::Uuid::now_v7().to_string(),
        tenant: version.tenant.clone(),
        output_name: "n".into(),
        request_json: "{\"text\":\"é\\u0000\"}".into(),
        resolved_json: "{}".into(),
        idempotency_key: Some("k".into()),
        request_digest: "d".into(),
        base: "b".into(),
        blobs: vec![("data".into(), blob)],
    };
    let id = job.id.clone();
    store.create_job(job).await.unwrap();
    store.append_event(&id, "{}".into(), Some("running"), None).await.unwrap();
    id
}

/// Names, their files, datasets; a job, its events and blobs.
type Content =
    (Vec<NameRecord>, Vec<DeltaFiles>, Vec<DatasetRecord>, (JobRecord, Vec<EventRecord>, Vec<(String, BlobId)>));

/// What a store has, but for the order of names.
async fn content(store: &Store, job: &str) -> Content {
    let tenant = new_version("n", "", Upsert).tenant;
    let mut names = store.all_names().await.unwrap();
    names.sort_by(|a, b| a.name.cmp(&b.name));
    let mut files = Vec::new();
    for version in names.iter().flat_map(|name| name.versions.values()) {
        files.push(store.read_files(version).await.unwrap());
    }
    let events = store.events(job, 0, 10).await.unwrap();
    let jobs = (store.get_job(&tenant, job).await.unwrap(), events, store.job_blobs(job).await.unwrap());
    (names, files, store.list_datasets(&tenant).await.unwrap(), jobs)
}

async fn a_backup_beside_a_server_comes_back_whole_in_either_database(place: Place) {
    let store = place.open().await;
    let job = fill(&store).await;
    let before = content(&store, &job).await;
    let out = place.dir().join("out");
    let made = backup(&place.of("server"), &out).await.unwrap();
    assert_eq!((made.blobs, made.bytes, made.rows["versions"], made.rows["jobs"]), (4, 8, 3, 1));
    let again = backup(&place.of("server"), &out).await;
    assert!(matches!(again, Err(StoreError::Invalid { field: "--out", .. })));
    store.publish(new_version("n", "later", Upsert)).await.unwrap();

    let mut targets = vec![Place::sqlite()];
    targets.extend(place.is_shared().then(Place::postgres).flatten());
    for target in targets {
        restore(&target.of("server"), &out).await.unwrap();
        let restored = target.open().await;
        assert_eq!(content(&restored, &job).await, before);
        // a number that was used is not used again, and nothing of it is garbage
        let (version, _) = restored.publish(new_version("gone", "4", Upsert)).await.unwrap();
        assert_eq!(version.number, 2);
        let loose = restored.put_blob("loose".into()).await.unwrap();
        assert_eq!(restored.collect_garbage_after(Duration::ZERO).await.unwrap().blobs, 1);
        assert!(restored.get_blob(loose).await.is_err());
        restored.close().await;
        drop(restored);
        let full = restore(&target.of("server"), &out).await;
        assert!(matches!(full, Err(StoreError::Invalid { field: "--data-dir", .. })), "{full:?}");
    }
}

async fn a_damaged_backup_is_refused_and_leaves_the_place_empty(place: Place) {
    let store = place.open().await;
    fill(&store).await;
    let out = place.dir().join("out");
    backup(&place.of("server"), &out).await.unwrap();
    let target = Place::sqlite();
    let rows = fs::read_to_string(out.join(ROWS)).unwrap();
    fs::write(out.join(ROWS), rows.replace("\"n\"", "\"m\"")).unwrap();
    let refused = restore(&target.of("server"), &out).await;
    assert!(matches!(&refused, Err(StoreError::Invalid { field: "--from", .. })), "{refused:?}");
    fs::write(out.join(ROWS), &rows).unwrap();
    let hex = BlobId::of(b"2").to_string();
    let blob = out.join(BLOBS).join(&hex[..2]).join(&hex);
    fs::write(&blob, "3").unwrap();
    let refused = restore(&target.of("server"), &out).await;
    assert!(matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?}");
    let empty = target.open().await;
    assert!(empty.all_names().await.unwrap().is_empty());
    drop(empty);
    fs::write(&blob, "2").unwrap();
    fs::rename(out.join(MANIFEST), out.join("other")).unwrap();
    assert!(restore(&target.of("server"), &out).await.is_err(), "broken off before its end");
    fs::rename(out.join("other"), out.join(MANIFEST)).unwrap();
    restore(&target.of("server"), &out).await.unwrap();
}

async fn what_was_corrupt_already_is_said_and_the_rest_is_kept(place: Place) {
    let store = place.open().await;
    fill(&store).await;
    let hex = BlobId::of(b"1").to_string();
    fs::remove_file(place.dir().join("blobs").join(&hex[..2]).join(&hex)).unwrap();
    let out = place.dir().join("out");
    let made = backup(&place.of("server"), &out).await.unwrap();
    assert_eq!(made.corrupt.keys().collect::<Vec<_>>(), [&hex]);
    let target = Place::sqlite();
    restore(&target.of("server"), &out).await.unwrap();
    let restored = target.open().await;
    let names = restored.all_names().await.unwrap();
    assert!(matches!(restored.read_files(&names[0].versions[&1]).await, Err(StoreError::Corrupt { .. })));
    restored.read_files(&names[0].versions[&2]).await.unwrap();
}

on_each_database!(
    a_backup_beside_a_server_comes_back_whole_in_either_database,
    a_damaged_backup_is_refused_and_leaves_the_place_empty,
    what_was_corrupt_already_is_said_and_the_rest_is_kept,
);

#[tokio::test]
async fn every_table_and_column_is_in_a_backup_or_known_not_to_be() {
    const NOT_KEPT: &[&str] = &["meta", "servers", "blob_holds", "garbage", "_sqlx_migrations"];
    let place = Place::sqlite();
    let store = place.open().await;
    let sql = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name";
    for row in &query(sql).fetch_all(store.db()).await.unwrap() {
        let name: String = row.try_get(0).unwrap();
        if NOT_KEPT.contains(&name.as_str()) {
            continue;
        }
        let table = TABLES.iter().find(|table| table.name == name);
        let table = table.unwrap_or_else(|| panic!("table {name} is not in backups"));
        let rows = query("SELECT name FROM pragma_table_info($1)").bind(&name).fetch_all(store.db()).await.unwrap();
        let has: BTreeSet<String> = rows.iter().map(|row| row.try_get(0).unwrap()).collect();
        let mut kept: BTreeSet<String> = table.text.iter().chain(table.numbers).map(|c| (*c).to_owned()).collect();
        if name == "jobs" {
            kept.extend(["owner".to_owned(), "ask".to_owned()]); // of the servers that were there
        }
        assert_eq!(has, kept, "{name}");
    }
}
