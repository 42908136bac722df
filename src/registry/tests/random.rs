//! The budget under random concurrent leases (I8).

use std::sync::Weak;

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;

/// Whatever is alive of the deltas that were handed out.
#[derive(Default)]
struct Alive(Mutex<Vec<Weak<Delta>>>);

impl Alive {
    fn bytes(&self) -> u64 {
        let mut alive = self.0.lock();
        alive.retain(|delta| delta.strong_count() > 0);
        let mut seen = std::collections::HashMap::new();
        for delta in alive.iter().filter_map(Weak::upgrade) {
            seen.insert(Arc::as_ptr(&delta), delta.bytes());
        }
        seen.values().sum()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn bytes_in_memory_never_exceed_the_budget(
        steps in prop::collection::vec(prop::collection::vec((0_usize..12, 0_u8..4), 1..40), 1..5),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let w = World::with(RegistryConfig { room_wait: Duration::from_millis(3), ..config(4) }).await;
            for i in 0..12_u64 {
                let new = publication(&format!("n{i}"), SIZE / 2 + i * SIZE / 12 / 4 * 4, &i.to_string());
                w.registry.publish(&tenant(), new).await.unwrap();
            }
            let alive = Arc::new(Alive::default());
            for wave in steps {
                let walk = |steps: &[(usize, u8)]| {
                    tokio::spawn(walk(w.registry.clone(), Arc::clone(&alive), steps.to_vec()))
                };
                let walkers: Vec<_> = wave.chunks(8).map(walk).collect();
                while !walkers.iter().all(tokio::task::JoinHandle::is_finished) {
                    assert!(w.registry.stats().bytes <= 4 * SIZE);
                    tokio::task::yield_now().await;
                }
                let mut held = Vec::new();
                for walker in walkers {
                    held.extend(walker.await.unwrap());
                }
                // At rest, what is counted is exactly what is alive, with the leases and without.
                assert_eq!(alive.bytes(), w.registry.stats().bytes);
                held.clear();
                assert_eq!((alive.bytes(), w.registry.stats().leased), (w.registry.stats().bytes, 0));
            }
            for i in 0..12 {
                w.registry.delete(&tenant(), &wanted(&format!("n{i}")), None).await.unwrap();
            }
            assert_eq!((w.registry.stats().bytes, w.registry.stats().resident), (0, 0));
            assert_eq!(alive.bytes(), 0);
        });
    }
}

/// Leases and lets go at random; checks that what it got is what it asked for.
async fn walk(registry: Registry, alive: Arc<Alive>, steps: Vec<(usize, u8)>) -> Vec<DeltaLease> {
    let mut held: Vec<DeltaLease> = Vec::new();
    for (i, op) in steps {
        match op {
            0 if !held.is_empty() => drop(held.swap_remove(i % held.len())),
            1 if !held.is_empty() && held.len() < 3 => held.push(held[i % held.len()].clone()),
            _ => match registry.lease(&tenant(), &wanted(&format!("n{i}"))).await {
                Ok(lease) => {
                    assert_eq!(lease.delta().bytes(), lease.version().spec.resident_bytes);
                    alive.0.lock().push(Arc::downgrade(lease.delta()));
                    held.push(lease);
                    if held.len() > 2 {
                        held.remove(0);
                    }
                }
                Err(e) => assert!(matches!(e, RegistryError::BudgetFull { .. }), "{e}"),
            },
        }
    }
    held
}
