//! What is asked for often stays, and what was evicted is known again.

use super::*;

#[tokio::test]
async fn what_is_asked_for_often_outlasts_a_scan_and_an_eviction_is_no_new_beginning() {
    let w = World::new(4).await;
    let all = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    for name in all {
        w.publish(name, name).await;
    }
    let lease = async |names: &[&str]| {
        for name in names {
            w.lease(name).await.unwrap();
        }
    };
    let resident = async |names: &[&str]| {
        for name in all {
            let status = w.registry.get(&tenant(), &wanted(name)).await.unwrap();
            assert_eq!(status.resident_bytes > 0, names.contains(&name), "{name}");
        }
    };
    lease(&["a", "a", "a", "b", "c", "d", "e", "f", "g"]).await;
    resident(&["a", "e", "f", "g"]).await;
    // for the second time: it counts for more than those that come after it for the first
    lease(&["b", "h", "i", "j"]).await;
    resident(&["a", "b", "i", "j"]).await;
    assert_eq!((w.registry.stats().evictions, w.registry.stats().bytes), (7, 4 * SIZE));
    // deleted and published again, it is a new one
    w.registry.delete(&tenant(), &wanted("a"), None).await.unwrap();
    w.publish("a", "a").await;
    lease(&["a", "c", "d", "e"]).await;
    resident(&["b", "c", "d", "e"]).await;
}
