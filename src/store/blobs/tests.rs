//! Laws of blobs: whole or absent, healed by being written again, and never waited for without end.

use super::*;

#[tokio::test]
async fn a_changed_missing_or_cut_blob_is_corrupt_and_writing_it_again_heals_it() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), true).unwrap();
    let bytes = Bytes::from(vec![7u8; INLINE_DIGEST + 1]);
    let id = digest(&bytes).await.unwrap();
    assert!(matches!(blobs.get(id, None).await, Err(StoreError::Corrupt { .. })));
    blobs.put(id, bytes.clone()).await.unwrap();
    assert_eq!(blobs.get(id, Some(bytes.len() as u64)).await.unwrap(), bytes);
    let path = dir.path().join(&id.to_string()[..2]).join(id.to_string());
    for damage in [&b"x"[..], &[8u8; INLINE_DIGEST + 1]] {
        std::fs::write(&path, damage).unwrap();
        assert!(matches!(blobs.get(id, None).await, Err(StoreError::Corrupt { .. })));
        assert!(matches!(blobs.get(id, Some(bytes.len() as u64)).await, Err(StoreError::Corrupt { .. })));
        blobs.put(id, bytes.clone()).await.unwrap();
        assert_eq!(blobs.get(id, None).await.unwrap(), bytes);
        let written = blobs.written();
        blobs.put(id, bytes.clone()).await.unwrap();
        assert_eq!(blobs.written(), written, "it was there");
    }
    assert_eq!(blobs.written(), 3);
    let listed: Vec<_> = blobs.list().await.unwrap().iter().map(|stored| (stored.id, stored.bytes)).collect();
    assert_eq!(listed, [(id, bytes.len() as u64)]);
}

#[tokio::test]
async fn opening_removes_staged_files_and_keeps_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), true).unwrap();
    let id = BlobId::of(b"abc");
    blobs.put(id, Bytes::from_static(b"abc")).await.unwrap();
    let staged = dir.path().join(&id.to_string()[..2]).join(format!("{id}#1"));
    std::fs::write(&staged, b"ab").unwrap();
    let blobs = Blobs::open(dir.path(), true).unwrap();
    assert!(!staged.exists());
    assert_eq!(blobs.get(id, None).await.unwrap(), "abc");
}

#[tokio::test]
async fn what_is_quarantined_is_refused_and_healed_by_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), true).unwrap();
    let id = BlobId::of(b"abc");
    blobs.put(id, Bytes::from_static(b"abc")).await.unwrap();
    blobs.quarantine(id, "a test", true).await.unwrap();
    assert!(blobs.is_quarantined(id) && blobs.list().await.unwrap().is_empty());
    let refused = blobs.get(id, None).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Corrupt { reason, .. } if reason == "a test"), "{refused}");
    assert!(dir.path().join("quarantine").join(id.to_string()).is_file(), "kept for a look");
    blobs.put(id, Bytes::from_static(b"abc")).await.unwrap();
    assert_eq!(blobs.get(id, None).await.unwrap(), "abc");
    assert!(!blobs.is_quarantined(id));
    // one that is missing has nothing to move
    blobs.quarantine(BlobId::of(b"absent"), "missing", true).await.unwrap();
}

#[tokio::test]
async fn staged_files_of_other_servers_stay() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("ab")).unwrap();
    let staged = dir.path().join("ab/abc#1");
    std::fs::write(&staged, b"x").unwrap();
    Blobs::open(dir.path(), false).unwrap();
    assert!(staged.is_file());
    Blobs::open(dir.path(), true).unwrap();
    assert!(!staged.exists());
}

#[tokio::test]
async fn a_store_that_never_answers_is_given_up() {
    // takes connections, and says nothing
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let settings = [
        ("AWS_ENDPOINT", endpoint.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_REGION", "us-east-1"),
    ];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut blobs = Blobs::of(place::bucket("s3://bucket/some/prefix", settings.into_iter()).unwrap(), None);
    blobs.answer = Duration::from_millis(200);
    let id = BlobId::of(b"abc");
    let started = std::time::Instant::now();
    assert!(matches!(blobs.get(id, None).await, Err(StoreError::NoAnswer { .. })));
    assert!(matches!(blobs.put(id, Bytes::from_static(b"abc")).await, Err(StoreError::NoAnswer { .. })));
    assert!(matches!(blobs.delete(id).await, Err(StoreError::NoAnswer { .. })));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[tokio::test]
async fn blobs_in_a_bucket_are_written_read_listed_and_removed() {
    // an S3 server whose bucket is there, as `.ci/run` starts one
    let Ok(url) = std::env::var("DELTASERVE_TEST_S3") else {
        println!("skipped: DELTASERVE_TEST_S3 is not set (a URL such as s3://bucket; AWS_ENDPOINT says where)");
        return;
    };
    let url = format!("{url}/{}", uuid::Uuid::now_v7());
    let blobs = Blobs::at(&url, false).unwrap();
    assert_eq!(blobs.mark().await.unwrap(), None);
    blobs.set_mark("x").await.unwrap();
    assert_eq!(blobs.mark().await.unwrap().as_deref(), Some("x"));
    let bytes = Bytes::from(vec![7u8; 3 << 20]);
    let id = digest(&bytes).await.unwrap();
    assert!(!blobs.exists(id).await.unwrap());
    assert!(matches!(blobs.get(id, None).await, Err(StoreError::Corrupt { .. })));
    for _ in 0..2 {
        blobs.put(id, bytes.clone()).await.unwrap();
    }
    assert_eq!((blobs.written(), blobs.size(id).await.unwrap()), (1, Some(3 << 20)));
    assert_eq!(blobs.get(id, Some(3 << 20)).await.unwrap(), bytes);
    assert!(matches!(blobs.get(id, Some(1)).await, Err(StoreError::Corrupt { .. })));
    let other = Blobs::at(&format!("{url}-other"), false).unwrap();
    assert!(other.list().await.unwrap().is_empty(), "prefixes are apart");
    assert_eq!(blobs.list().await.unwrap().len(), 1);
    blobs.quarantine(id, "a test", true).await.unwrap();
    assert!(blobs.list().await.unwrap().is_empty());
    blobs.put(id, bytes.clone()).await.unwrap();
    assert_eq!(blobs.get(id, None).await.unwrap(), bytes);
    blobs.delete(id).await.unwrap();
    blobs.delete(id).await.unwrap();
    assert!(!blobs.exists(id).await.unwrap());
}
