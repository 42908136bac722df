//! Laws of compositions: shared, counted, let go, and of the versions that are current.

use super::*;
use crate::delta::SiteTable;

fn list(parts: &[(&str, f64)]) -> Vec<(DeltaRef, f64)> {
    parts.iter().map(|(text, weight)| (wanted(text), *weight)).collect()
}

impl World {
    async fn sum(&self, parts: &[(&str, f64)]) -> Result<Composition, RegistryError> {
        self.registry.lease_sum(&tenant(), &list(parts), &SiteTable::default()).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_list_is_one_sum_in_any_order_and_its_versions_may_go() {
    let w = World::new(4).await;
    let (a, b) = (w.publish("a", "1").await, w.publish("b", "2").await);
    let tasks: Vec<_> = (0..50)
        .map(|i| {
            let registry = w.registry.clone();
            let mut parts = list(&[("a", 0.5), ("b@1", -2.0)]);
            parts.rotate_left(i % 2);
            tokio::spawn(async move { registry.lease_sum(&tenant(), &parts, &SiteTable::default()).await.unwrap() })
        })
        .collect();
    let mut sums = Vec::new();
    for task in tasks {
        sums.push(task.await.unwrap());
    }
    assert!(sums.iter().all(|s| Arc::ptr_eq(s.delta(), sums[0].delta()) && s.id() == sums[0].id()));
    let parts: Vec<_> = sums[1].parts().iter().map(|(v, weight)| (v.id, *weight)).collect();
    assert_eq!(parts, [(b.id, -2.0), (a.id, 0.5)], "in the order asked for");
    assert_eq!(w.counting.loads(), 2);
    // the sum alone is held; its versions are idle and go when room is needed
    assert_eq!((w.registry.stats().leased, w.registry.stats().bytes), (1, 3 * SIZE));
    for name in ["c", "d", "e"] {
        w.publish(name, name).await;
    }
    let others = (w.lease("c").await.unwrap(), w.lease("d").await.unwrap(), w.lease("e").await.unwrap());
    assert_eq!(w.registry.stats().bytes, 4 * SIZE);
    let again = w.sum(&[("a", 0.5), ("b", -2.0)]).await.unwrap();
    assert!(Arc::ptr_eq(again.delta(), sums[0].delta()), "found although its versions are not resident");
    assert_eq!(w.counting.loads(), 5);
    let full = w.sum(&[("a", 0.5), ("b", -2.1)]).await.unwrap_err();
    assert!(matches!(full, RegistryError::BudgetFull { .. }), "{full}");
    drop((others, again, sums));
    assert_eq!((w.registry.stats().leased, w.registry.stats().bytes), (0, 4 * SIZE));
}

#[tokio::test]
async fn a_replaced_version_makes_another_sum_and_a_deleted_one_leaves_none() {
    let w = World::new(8).await;
    w.publish("a", "1").await;
    w.publish("b", "2").await;
    let parts = [("a", 1.0), ("b", 1.0)];
    let before = w.sum(&parts).await.unwrap();
    let new = w.publish("a", "3").await;
    let after = w.sum(&parts).await.unwrap();
    assert_eq!((after.parts()[0].0.id, before.parts()[0].0.number), (new.id, 1));
    assert_ne!(after.id(), before.id());
    assert_eq!(w.sum(&[("a@1", 1.0), ("b", 1.0)]).await.unwrap().id(), before.id());
    assert_ne!(w.sum(&[("a", 1.0), ("b", 1.5)]).await.unwrap().id(), after.id(), "weights count");
    assert_eq!(
        w.sum(&[("a", 0.0), ("b", 1.0)]).await.unwrap().id(),
        w.sum(&[("a", -0.0), ("b", 1.0)]).await.unwrap().id()
    );
    w.registry.delete(&tenant(), &wanted("b"), None).await.unwrap();
    assert!(matches!(w.sum(&parts).await, Err(RegistryError::NotFound(_))));
    assert_eq!(w.registry.stats().leased, 2, "those who hold a sum keep it");
    drop((before, after));
    // `a` has two versions; nothing is left of `b` or of what was made of it
    assert_eq!((w.registry.stats().resident, w.registry.stats().bytes), (2, 2 * SIZE));
}

#[tokio::test]
async fn what_cannot_be_leased_or_is_named_twice_is_refused_by_name() {
    let w = World::new(3).await;
    w.publish("a", "1").await;
    w.publish("b", "2").await;
    let unknown = w.sum(&[("a", 1.0), ("nobody", 1.0)]).await.unwrap_err();
    assert_eq!(ServeError::from(unknown).to_string(), "no delta \"nobody\"");
    let twice = w.sum(&[("a", 1.0), ("b", 1.0), ("a@1", 0.5)]).await.unwrap_err();
    assert!(twice.to_string().contains("a@1"), "{twice}");
    assert!(ServeError::from(twice).to_string().contains("deltas"));
    assert!(
        matches!(w.sum(&[("a", 1.0), ("b", 1.0)]).await, Err(RegistryError::BudgetFull { .. })),
        "both and the sum"
    );
    assert_eq!(w.registry.stats().leased, 0);
    let other = w.reopened(BaseFingerprint::from_bytes([2; 32]), config(4)).await;
    let error = other.lease_sum(&tenant(), &list(&[("a", 1.0), ("b", 1.0)]), &SiteTable::default()).await.unwrap_err();
    assert!(matches!(error, RegistryError::BaseMismatch { .. }));
}

#[tokio::test]
async fn tenants_share_no_sum_and_so_no_names_in_its_errors() {
    let w = World::new(4).await;
    let version = w.publish("a", "1").await;
    let parts = [(version, 1.0)];
    let id = |tenant: &str| super::super::compose::id_of(&TenantId::new(tenant).unwrap(), &parts);
    assert_eq!(id("x"), id("x"));
    assert_ne!(id("x"), id("y"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sums_whose_callers_have_left_are_given_up_and_take_no_room() {
    let w = World::new(12).await;
    w.publish("a", "gated").await;
    w.publish("b", "2").await;
    w.counting.gate.store(true, Ordering::SeqCst);
    let ask = |weight: f64| {
        let registry = w.registry.clone();
        let parts = list(&[("a", weight), ("b", 1.0)]);
        tokio::spawn(async move { registry.lease_sum(&tenant(), &parts, &SiteTable::default()).await })
    };
    let left: Vec<_> = (1..=6).map(|i| ask(f64::from(i))).collect();
    // six sums, and what the first of them is made of
    until(|| w.registry.stats().misses > 6 && w.counting.loads() > 0).await;
    let before = w.registry.stats().misses;
    let stays = ask(1.0); // waits for the sum that one of the others makes
    until(|| w.registry.stats().misses > before).await;
    for task in left {
        task.abort();
        assert!(task.await.is_err_and(|e| e.is_cancelled()), "it waits at the gate");
    }
    w.counting.gate.store(false, Ordering::SeqCst);
    let sum = stays.await.unwrap().expect("the one that stays makes it");
    // its turn comes after all that waited for theirs
    ask(7.0).await.unwrap().expect("another");
    // two versions and two sums
    assert_eq!((w.registry.stats().resident, w.registry.stats().bytes), (4, 4 * SIZE));
    drop(sum);
    let all: Vec<_> = (1..=6).map(|i| ask(f64::from(i))).collect();
    for task in all {
        task.await.unwrap().expect("in turn");
    }
    assert_eq!(w.registry.stats().resident, 9);
}
