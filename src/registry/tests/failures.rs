//! Loads that failed a moment ago are not tried again at once.

use super::*;

#[tokio::test]
async fn a_load_that_failed_is_not_tried_again_until_its_time_or_a_change() {
    let w = World::with(RegistryConfig { retry_after: Duration::from_secs(3600), ..config(4) }).await;
    let bad = w.publish("bad", "1").await;
    w.publish("same", "1").await;
    let (path, whole) = (w.blob_path(bad.files[0].blob), std::fs::read(w.blob_path(bad.files[0].blob)).unwrap());
    std::fs::write(&path, b"4096 x").unwrap();
    assert!(matches!(w.lease("bad").await, Err(RegistryError::Corrupt { .. })));
    // it is whole again, and nobody looks
    std::fs::write(&path, &whole).unwrap();
    for _ in 0..100 {
        let Err(RegistryError::Failing { error, .. }) = w.lease("same").await else { panic!("it is remembered") };
        assert!(matches!(*error, RegistryError::Corrupt { name, .. } if name == "same@1"), "by the name asked for");
    }
    assert_eq!(w.counting.loads(), 0);
    // another version of the name is a change, also for the old one
    w.publish("bad", "2").await;
    assert_eq!(w.lease("bad@1").await.unwrap().id(), bad.id);
    // so is a delete
    for name in ["a", "b"] {
        w.publish(name, "invalid").await;
    }
    assert!(matches!(w.lease("a").await, Err(RegistryError::Corrupt { .. })));
    assert!(matches!(w.lease("b").await, Err(RegistryError::Failing { .. })));
    w.registry.delete(&tenant(), &wanted("a"), None).await.unwrap();
    assert!(matches!(w.lease("a").await, Err(RegistryError::NotFound(_))));
    let told = ServeError::from(w.lease("b").await.unwrap_err());
    assert!(matches!(told, ServeError::Failing { .. }), "the bytes that are left are the ones that failed: {told}");
}

#[tokio::test]
async fn with_its_time_over_or_without_one_a_load_is_tried_again() {
    for retry_after in [Duration::from_millis(30), Duration::ZERO] {
        let w = World::with(RegistryConfig { retry_after, ..config(4) }).await;
        let bad = w.publish("bad", "1").await;
        let (path, whole) = (w.blob_path(bad.files[0].blob), std::fs::read(w.blob_path(bad.files[0].blob)).unwrap());
        std::fs::write(&path, b"4096 x").unwrap();
        assert!(matches!(w.lease("bad").await, Err(RegistryError::Corrupt { .. })));
        std::fs::write(&path, &whole).unwrap();
        tokio::time::sleep(retry_after).await;
        w.lease("bad").await.unwrap();
    }
}

#[tokio::test]
async fn bytes_that_are_put_back_are_seen_by_all_that_have_them_also_if_the_name_is_refused() {
    let w = World::with(RegistryConfig { retry_after: Duration::from_secs(3600), ..config(4) }).await;
    let bad = w.publish("bad", "1").await;
    let mut shares = publication("shares", SIZE, "1");
    shares.files.files.insert("README.md".into(), Bytes::from_static(b"another version"));
    let shares = w.registry.publish(&tenant(), shares).await.unwrap();
    assert!(shares.id != bad.id && shares.files.iter().any(|file| file.blob == bad.files[0].blob));
    w.publish("odd", "invalid").await;
    assert!(matches!(w.lease("odd").await, Err(RegistryError::Corrupt { .. })));
    let refused = async |name: &str, text: &str| {
        let again = Publication { policy: PublishPolicy::Create, ..publication(name, SIZE, text) };
        let told = ServeError::from(w.registry.publish(&tenant(), again).await.unwrap_err());
        assert!(matches!(told, ServeError::AlreadyExists(_)), "{told}");
    };
    refused("odd", "invalid").await;
    assert!(matches!(w.lease("odd").await, Err(RegistryError::Failing { .. })), "nothing was written");
    std::fs::write(w.blob_path(bad.files[0].blob), b"4096 x").unwrap();
    for name in ["bad", "shares"] {
        assert!(matches!(w.lease(name).await, Err(RegistryError::Corrupt { .. })));
        assert!(matches!(w.lease(name).await, Err(RegistryError::Failing { .. })));
    }
    refused("bad", "1").await;
    assert_eq!(w.lease("bad").await.unwrap().id(), bad.id);
    assert_eq!(w.lease("shares").await.unwrap().id(), shares.id);
}
