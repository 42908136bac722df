//! A data directory of an older program is brought up to date with all that is in it, and one of a newer is left alone.

use bytes::Bytes;

use super::{
    db::{query, query_text},
    testing::{Place, on_each_database, psql},
    *,
};
use crate::ids::{DeltaName, TenantId};

/// Makes a SQLite file of the fixture's statements.
async fn old_database(path: &Path) {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path).create_if_missing(true).foreign_keys(false);
    let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    sqlx::raw_sql(include_str!("fixtures/format-3.sql")).execute(&pool).await.unwrap();
    pool.close().await;
}

#[tokio::test]
async fn a_data_directory_of_format_3_is_brought_up_to_date_with_all_that_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    old_database(&dir.path().join("meta.sqlite3")).await;
    for content in ["{}", "one", "two", "data", "run"] {
        let name = BlobId::of(content.as_bytes()).to_string();
        let shard = dir.path().join("blobs").join(&name[..2]);
        std::fs::create_dir_all(&shard).unwrap();
        std::fs::write(shard.join(name), content).unwrap();
    }
    for _ in 0..2 {
        let store = Store::open(dir.path()).await.unwrap();
        let names = store.all_names().await.unwrap();
        assert_eq!(names.len(), 1);
        let style = &names[0];
        assert_eq!((style.name.as_str(), style.current, style.revision, style.pinned), ("style", Some(2), 5, true));
        for (number, content) in [(1, "one"), (2, "two")] {
            let files = store.read_files(&style.versions[&number]).await.unwrap().files;
            assert_eq!(files["adapter_model.safetensors"], content);
        }
        let acme = TenantId::new("acme").unwrap();
        let datasets = store.list_datasets(&acme).await.unwrap();
        assert_eq!(store.get_blob(datasets[0].blob).await.unwrap(), "data");
        let running = "0190a000-0000-7000-8000-00000000000b";
        let kept = store.job_checkpoint(running).await.unwrap().unwrap();
        assert_eq!((kept.step, kept.resumes, store.get_blob(kept.blob).await.unwrap()), (7, 1, Bytes::from("run")));
        let left = store.claim_jobs("any", &Default::default()).await.unwrap();
        assert_eq!(left.iter().map(|job| job.state.as_str()).collect::<Vec<_>>(), ["running", "queued"]);
        let made = store.job_made_with(&acme, "key-1", "digest").await.unwrap().unwrap();
        assert_eq!((made.state.as_str(), made.last_seq), ("succeeded", 2));
        assert_eq!(store.collect_garbage().await.unwrap(), Garbage::default(), "all of it is named");
        // numbers go on where they were, also that of a name without a live version
        let gone = DeltaName::new("gone").unwrap();
        assert!(matches!(store.set_pinned(&acme, &gone, true).await, Err(StoreError::NotFound { .. })));
        store.close().await;
    }
}

async fn a_newer_database_is_refused_and_left_alone(place: Place) {
    let store = place.open().await;
    let mut tx = store.db().begin().await.unwrap();
    query("UPDATE meta SET value = '1000' WHERE fact = 'format'").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    store.close().await;
    drop(store);
    let refused = Store::open_at(&place.of("server")).await.err().unwrap();
    assert!(matches!(refused, StoreError::TooNew { found: 1000, .. }), "{refused}");
    assert!(refused.to_string().contains("run the version that made it"), "{refused}");
}

async fn text_sorts_by_its_bytes(place: Place) {
    let store = place.open().await;
    let mut tx = store.db().begin().await.unwrap();
    for fact in ["b", "B", "a-b", "ab", "_", "1"] {
        let insert = query("INSERT INTO meta (fact, value) VALUES ($1, 'sorted')").bind(fact);
        insert.execute(&mut *tx).await.unwrap();
    }
    let rows = query("SELECT fact FROM meta WHERE value = 'sorted' ORDER BY fact").fetch_all(&mut *tx).await.unwrap();
    let facts: Vec<String> = rows.iter().map(|row| row.try_get(0).unwrap()).collect();
    assert_eq!(facts, ["1", "B", "_", "a-b", "ab", "b"]);
    // a transaction that is dropped leaves nothing
    drop(tx);
    let rows =
        query_text("SELECT fact FROM meta WHERE value = 'sorted'".to_owned()).fetch_all(store.db()).await.unwrap();
    assert!(rows.is_empty());
}

on_each_database!(a_newer_database_is_refused_and_left_alone, text_sorts_by_its_bytes);

#[tokio::test]
async fn what_another_tool_sees_is_what_was_committed() {
    let Some(place) = Place::postgres() else { return };
    let store = place.open().await;
    let url = place.url().unwrap();
    assert_eq!(psql(url, "SELECT value FROM meta WHERE fact = 'format'").unwrap(), db::FORMAT.to_string());
    assert_eq!(psql(url, "SELECT count(*) FROM servers").unwrap(), "1");
    store.close().await;
    assert_eq!(psql(url, "SELECT max(until_ms) FROM servers").unwrap(), "0", "the lease was given back");
}
