//! Laws of leases, budget and names, on a store in a temporary directory and a loader that counts.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Instant,
};

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};

use super::*;
use crate::{
    admission::params::ServeError,
    delta::{Patch, SiteId, Task},
    ids::BlobId,
};

mod compose;
mod evictions;
mod failures;
mod random;

const BASE: BaseFingerprint = BaseFingerprint::from_bytes([1; 32]);
/// Bytes of a test delta's tensor.
const SIZE: u64 = 4096;

/// A loader whose deltas have as many bytes as their file says.
#[derive(Default)]
struct Counting {
    loads: AtomicUsize,
    /// While it is set, a load of a `gated` file does not end.
    gate: AtomicBool,
}

fn size_of(files: &DeltaFiles) -> u64 {
    let text = files.files.get("adapter_model.safetensors").unwrap();
    std::str::from_utf8(text).unwrap().split(' ').next().unwrap().parse().unwrap()
}

impl Counting {
    fn loader(self: &Arc<Self>) -> Loader {
        let this = Arc::clone(self);
        Arc::new(move |files| {
            let text = files.files["adapter_model.safetensors"].clone();
            if text.ends_with(b"invalid") {
                return Err(LoadError::Invalid("no tensors".into()));
            }
            if text.ends_with(b"panic") {
                panic!("in the loader");
            }
            let size = size_of(files);
            this.loads.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
            while text.ends_with(b"gated") && this.gate.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let tensor = Tensor::zeros(size as usize / 4, DType::F32, &Device::Cpu).unwrap();
            Ok(Delta::new(spec(size), vec![(0 as SiteId, Patch::Bias(tensor))], None))
        })
    }

    fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }
}

fn spec(size: u64) -> DeltaSpec {
    DeltaSpec {
        methods: vec!["bitfit".into()],
        task: Task::CausalLm,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: size / 4,
        resident_bytes: size,
    }
}

fn publication(name: &str, size: u64, text: &str) -> Publication {
    let files = [("adapter_model.safetensors".to_owned(), Bytes::from(format!("{size} {text}")))];
    Publication {
        name: DeltaName::new(name).unwrap(),
        files: DeltaFiles { files: BTreeMap::from(files) },
        spec: spec(size),
        policy: PublishPolicy::Upsert,
        origin: Origin::Upload,
    }
}

fn tenant() -> TenantId {
    TenantId::new("t").unwrap()
}

fn wanted(text: &str) -> DeltaRef {
    text.parse().unwrap()
}

/// Waits for what comes by itself.
async fn until(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !what() {
        assert!(Instant::now() < deadline, "does not come");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

struct World {
    dir: tempfile::TempDir,
    store: Store,
    registry: Registry,
    counting: Arc<Counting>,
}

fn config(deltas: u64) -> RegistryConfig {
    RegistryConfig { max_resident_bytes: deltas * SIZE, room_wait: Duration::ZERO, ..RegistryConfig::default() }
}

impl World {
    async fn new(deltas: u64) -> Self {
        Self::with(config(deltas)).await
    }

    async fn with(config: RegistryConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let counting = Arc::new(Counting::default());
        let registry = Registry::open(store.clone(), BASE, counting.loader(), config).await.unwrap();
        Self { dir, store, registry, counting }
    }

    async fn publish(&self, name: &str, text: &str) -> Arc<VersionRecord> {
        self.registry.publish(&tenant(), publication(name, SIZE, text)).await.unwrap()
    }

    async fn lease(&self, text: &str) -> Result<DeltaLease, RegistryError> {
        self.registry.lease(&tenant(), &wanted(text)).await
    }

    /// Another registry of the same store.
    async fn reopened(&self, base: BaseFingerprint, config: RegistryConfig) -> Registry {
        Registry::open(self.store.clone(), base, self.counting.loader(), config).await.unwrap()
    }

    fn blob_path(&self, blob: BlobId) -> std::path::PathBuf {
        self.dir.path().join("blobs").join(&blob.to_string()[..2]).join(blob.to_string())
    }
}

#[tokio::test]
async fn a_name_moves_and_a_lease_does_not() {
    let w = World::new(4).await;
    let one = w.publish("n", "1").await;
    let lease = w.lease("n").await.unwrap();
    let two = w.publish("n", "2").await;
    assert_eq!((lease.id(), lease.bytes()), (one.id, SIZE));
    assert_eq!(w.lease("n").await.unwrap().id(), two.id);
    assert_eq!(w.lease("n@1").await.unwrap().id(), one.id);
    let by_prefix = w.lease(&format!("n@{}", &two.id.to_string()[..12])).await.unwrap();
    assert_eq!((by_prefix.id(), by_prefix.version().number), (two.id, 2));
    let back = w.registry.set_alias(&tenant(), &one.name, &VersionSel::Number(1), Some(two.id)).await.unwrap();
    assert_eq!(back.id, one.id);
    assert_eq!(w.lease("n").await.unwrap().id(), one.id);
    let lost = w.registry.set_alias(&tenant(), &one.name, &VersionSel::Number(2), Some(two.id)).await;
    assert!(matches!(ServeError::from(lost.unwrap_err()), ServeError::Conflict(_)));
}

#[tokio::test]
async fn unknown_and_foreign_names_get_the_same_answer() {
    let w = World::new(4).await;
    w.publish("n", "1").await;
    let other = TenantId::new("other").unwrap();
    for text in ["n", "n@1", "m", "n@7"] {
        let reference = wanted(text);
        let foreign = ServeError::from(w.registry.lease(&other, &reference).await.unwrap_err());
        assert_eq!(foreign.to_string(), format!("no delta {text:?}"));
        for error in [
            w.registry.get(&other, &reference).await.unwrap_err(),
            w.registry.download(&other, &reference).await.unwrap_err(),
            w.registry.delete(&other, &reference, None).await.unwrap_err(),
        ] {
            assert_eq!(ServeError::from(error).to_string(), foreign.to_string());
        }
    }
    assert!(w.registry.list(&other, &ListQuery::default()).await.unwrap().deltas.is_empty());
    assert!(matches!(w.lease("m").await, Err(RegistryError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_leases_at_once_are_one_load() {
    let w = World::new(4).await;
    w.publish("n", "1").await;
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let registry = w.registry.clone();
            tokio::spawn(async move { registry.lease(&tenant(), &wanted("n")).await.unwrap() })
        })
        .collect();
    let mut leases = Vec::new();
    for task in tasks {
        leases.push(task.await.unwrap());
    }
    assert_eq!(w.counting.loads(), 1);
    let status = w.registry.get(&tenant(), &wanted("n")).await.unwrap();
    assert_eq!((status.leases, status.resident_bytes), (100, SIZE));
    let clone = leases[0].clone();
    drop(leases);
    assert_eq!((w.registry.stats().leased, w.registry.stats().bytes), (1, SIZE));
    drop(clone);
    assert_eq!((w.registry.stats().leased, w.registry.stats().bytes), (0, SIZE));
    w.lease("n").await.unwrap();
    assert_eq!(w.counting.loads(), 1);
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_break_off_the_load_or_keep_its_bytes() {
    let w = World::new(1).await;
    w.publish("a", "1").await;
    w.publish("b", "2").await;
    let waiting = tokio::spawn({
        let registry = w.registry.clone();
        async move { registry.lease(&tenant(), &wanted("a")).await }
    });
    until(|| w.registry.stats().misses > 0).await;
    waiting.abort();
    // The load ends on its own; then its bytes are free for another.
    until(|| w.registry.stats().resident > 0 && w.registry.stats().leased == 0).await;
    assert_eq!(w.counting.loads(), 1);
    w.lease("b").await.unwrap();
    assert_eq!(w.registry.stats().bytes, SIZE);
}

#[tokio::test]
async fn the_least_asked_for_goes_and_leased_and_pinned_ones_stay() {
    let w = World::new(4).await;
    for name in ["a", "b", "c", "d", "e", "f", "g"] {
        w.publish(name, name).await;
    }
    let resident = async |names: &[&str]| {
        for name in ["a", "b", "c", "d", "e", "f", "g"] {
            let status = w.registry.get(&tenant(), &wanted(name)).await.unwrap();
            assert_eq!(status.resident_bytes > 0, names.contains(&name), "{name}");
        }
    };
    let pin = DeltaName::new("a").unwrap();
    w.registry.pin(&tenant(), &pin, true).await.unwrap();
    let leased = w.lease("b").await.unwrap();
    w.lease("c").await.unwrap();
    w.lease("d").await.unwrap();
    w.lease("c").await.unwrap();
    resident(&["a", "b", "c", "d"]).await;
    w.lease("e").await.unwrap();
    resident(&["a", "b", "c", "e"]).await;
    let (e, f) = (w.lease("e").await.unwrap(), w.lease("f").await.unwrap());
    resident(&["a", "b", "e", "f"]).await;
    let full = w.lease("g").await.unwrap_err();
    assert!(matches!(full, RegistryError::BudgetFull { needed: SIZE, .. }));
    assert!(matches!(ServeError::from(full), ServeError::ResidentBudget(_)));
    assert_eq!(w.registry.stats().evictions, 2);
    drop((e, f));
    w.registry.pin(&tenant(), &pin, false).await.unwrap();
    w.lease("g").await.unwrap();
    resident(&["b", "e", "f", "g"]).await;
    drop(leased);
}

#[tokio::test]
async fn pins_take_at_most_half_of_the_budget() {
    let w = World::new(4).await;
    let names = ["a", "b", "c"].map(|n| DeltaName::new(n).unwrap());
    for name in &names {
        w.publish(name.as_str(), name.as_str()).await;
    }
    w.registry.pin(&tenant(), &names[0], true).await.unwrap();
    w.registry.pin(&tenant(), &names[1], true).await.unwrap();
    let third = w.registry.pin(&tenant(), &names[2], true).await;
    assert!(
        matches!(third, Err(RegistryError::PinBudget { needed, allowed }) if needed == 3 * SIZE && allowed == 2 * SIZE)
    );
    assert_eq!(w.registry.stats().pinned_bytes, 2 * SIZE);
    // A new version of a pinned name takes over the pin; one that is too large is served unpinned.
    let large = publication("a", 3 * SIZE, "large");
    w.registry.publish(&tenant(), large).await.unwrap();
    assert_eq!(w.registry.stats().pinned_bytes, SIZE);
    w.lease("a").await.unwrap();
    // Pins outlive a restart and are loaded by it.
    let reopened = w.reopened(BASE, config(4)).await;
    assert_eq!(reopened.stats().pinned_bytes, SIZE);
    until(|| reopened.stats().resident > 0).await;
}

#[tokio::test]
async fn what_waits_for_room_gets_it_when_a_lease_ends() {
    let w = World::with(RegistryConfig { room_wait: Duration::from_secs(60), ..config(1) }).await;
    w.publish("a", "1").await;
    w.publish("b", "2").await;
    let lease = w.lease("a").await.unwrap();
    let waiting = tokio::spawn({
        let registry = w.registry.clone();
        async move { registry.lease(&tenant(), &wanted("b")).await }
    });
    until(|| w.registry.stats().misses == 2).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(!waiting.is_finished());
    drop(lease);
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn deleting_spares_leases_and_frees_the_bytes_with_the_last() {
    let w = World::new(2).await;
    let first = w.publish("n", "1").await;
    w.publish("n", "2").await;
    let lease = w.lease("n").await.unwrap();
    let old = w.lease("n@1").await.unwrap();
    assert!(matches!(
        ServeError::from(w.registry.delete(&tenant(), &wanted("n@2"), None).await.unwrap_err()),
        ServeError::Conflict(_)
    ));
    let stale = w.registry.delete(&tenant(), &wanted("n"), Some(first.id)).await;
    assert!(matches!(ServeError::from(stale.unwrap_err()), ServeError::Conflict(_)));
    w.registry.delete(&tenant(), &wanted("n@1"), None).await.unwrap();
    assert!(matches!(w.lease("n@1").await, Err(RegistryError::NotFound(_))));
    w.registry.delete(&tenant(), &wanted("n"), None).await.unwrap();
    assert!(matches!(w.lease("n").await, Err(RegistryError::NotFound(_))));
    assert!(matches!(w.registry.delete(&tenant(), &wanted("n"), None).await, Err(RegistryError::NotFound(_))));
    assert_eq!(lease.delta().bytes(), SIZE);
    assert_eq!((w.registry.stats().bytes, w.registry.stats().resident), (2 * SIZE, 2), "leased bytes still count");
    // Published again while the old one is leased: the same bytes are another copy, and the budget is full.
    w.publish("n", "2").await;
    assert!(matches!(w.lease("n").await, Err(RegistryError::BudgetFull { .. })));
    drop((lease, old));
    assert_eq!((w.registry.stats().bytes, w.registry.stats().resident), (0, 0));
    assert_eq!(w.lease("n").await.unwrap().version().number, 3);
}

#[tokio::test]
async fn what_is_kept_takes_no_memory_and_can_be_leased_after_it_is_deleted() {
    let w = World::new(2).await;
    w.publish("n", "1").await;
    let kept = w.registry.keep(&tenant(), &wanted("n@1")).await.unwrap();
    assert_eq!((w.counting.loads(), w.registry.stats().bytes), (0, 0));
    w.registry.delete(&tenant(), &wanted("n"), None).await.unwrap();
    assert!(matches!(w.registry.keep(&tenant(), &wanted("n@1")).await, Err(RegistryError::NotFound(_))));
    assert_eq!(w.store.collect_garbage_after(Duration::ZERO).await.unwrap().blobs, 0);
    let lease = w.registry.lease_kept(&kept).await.unwrap();
    assert_eq!((lease.delta().bytes(), lease.version().number, w.registry.stats().bytes), (SIZE, 1, SIZE));
    drop(lease);
    assert_eq!(w.registry.stats().bytes, 0, "nobody can ask for it: it goes with its lease");
    drop(kept);
    assert_eq!(w.store.collect_garbage_after(Duration::ZERO).await.unwrap().blobs, 1);
}

#[tokio::test]
async fn bytes_shared_by_two_names_are_resident_once_and_outlive_one_of_them() {
    let w = World::new(2).await;
    w.publish("a", "same").await;
    w.publish("b", "same").await;
    let (a, b) = (w.lease("a").await.unwrap(), w.lease("b").await.unwrap());
    assert_eq!((a.id(), w.counting.loads(), w.registry.stats().bytes), (b.id(), 1, SIZE));
    assert_eq!((a.version().name.as_str(), b.version().name.as_str()), ("a", "b"));
    w.registry.delete(&tenant(), &wanted("a"), None).await.unwrap();
    w.lease("b").await.unwrap();
    assert_eq!(w.counting.loads(), 1);
}

#[tokio::test]
async fn a_corrupt_delta_is_told_and_the_others_are_served() {
    let w = World::new(4).await;
    let bad = w.publish("bad", "1").await;
    w.publish("good", "2").await;
    std::fs::write(w.blob_path(bad.files[0].blob), b"4096 x").unwrap();
    assert!(matches!(w.lease("bad").await, Err(RegistryError::Corrupt { name, .. }) if name == "bad@1"));
    assert!(matches!(w.lease("bad").await, Err(RegistryError::Failing { .. })));
    std::fs::remove_file(w.blob_path(bad.files[0].blob)).unwrap();
    let lost = w.registry.download(&tenant(), &wanted("bad")).await.unwrap_err();
    assert!(matches!(ServeError::from(lost), ServeError::Corrupt(_)));
    w.lease("good").await.unwrap();
    assert_eq!(w.registry.stats().bytes, SIZE, "a failed load keeps nothing");
    // Publishing the same bytes again heals it.
    assert_eq!(w.publish("bad", "1").await, bad);
    w.lease("bad").await.unwrap();
}

#[tokio::test]
async fn a_loader_that_refuses_or_panics_costs_nothing() {
    let w = World::new(2).await;
    w.publish("invalid", "invalid").await;
    w.publish("panics", "panic").await;
    assert!(matches!(w.lease("invalid").await, Err(RegistryError::Corrupt { .. })));
    assert!(matches!(w.lease("panics").await, Err(RegistryError::LoadFailed { .. })));
    assert_eq!(w.registry.stats().bytes, 0);
}

#[tokio::test]
async fn another_base_and_too_large_a_delta_are_refused() {
    let w = World::new(2).await;
    w.publish("n", "1").await;
    let large = w.registry.publish(&tenant(), publication("big", 3 * SIZE, "")).await;
    assert!(matches!(large, Err(RegistryError::TooLarge { .. })));
    let other = w.reopened(BaseFingerprint::from_bytes([2; 32]), config(2)).await;
    let refused = other.lease(&tenant(), &wanted("n")).await.unwrap_err();
    assert!(matches!(ServeError::from(refused), ServeError::BaseMismatch(_)));
}

#[tokio::test]
async fn a_load_that_takes_too_long_fails_and_gives_its_bytes_back_when_it_ends() {
    let w = World::with(RegistryConfig { load_timeout: Duration::from_millis(20), ..config(1) }).await;
    w.publish("n", "gated").await;
    w.counting.gate.store(true, Ordering::SeqCst);
    assert!(matches!(w.lease("n").await, Err(RegistryError::LoadTimeout(_))));
    until(|| w.registry.stats().bytes == 0 || w.counting.loads() > 0).await;
    // Once the decode has begun, it keeps its bytes counted until it ends (a timeout before it has given them back).
    assert_eq!(w.registry.stats().bytes, w.counting.loads() as u64 * SIZE);
    w.counting.gate.store(false, Ordering::SeqCst);
    until(|| w.registry.stats().bytes == 0).await;
}

#[tokio::test]
async fn a_delta_larger_than_its_spec_says_is_counted_as_it_is() {
    let w = World::new(3).await;
    let mut understated = publication("n", 2 * SIZE, "");
    understated.spec.resident_bytes = SIZE;
    w.registry.publish(&tenant(), understated).await.unwrap();
    w.lease("n").await.unwrap();
    assert_eq!(w.registry.stats().bytes, 2 * SIZE);
    let mut overstated = publication("m", SIZE, "");
    overstated.spec.resident_bytes = 2 * SIZE;
    w.registry.publish(&tenant(), overstated).await.unwrap();
    w.lease("m").await.unwrap();
    assert_eq!(w.registry.stats().bytes, SIZE);
}

#[tokio::test]
async fn pages_cover_every_version_once_and_survive_a_restart() {
    let w = World::new(2).await;
    for i in 0..5 {
        w.publish("n", &i.to_string()).await;
        w.publish(&format!("m{i}"), "x").await;
    }
    let reopened = w.reopened(BASE, config(2)).await;
    for registry in [&w.registry, &reopened] {
        let mut query = ListQuery { all_versions: true, page_size: 3, ..ListQuery::default() };
        let mut seen = Vec::new();
        loop {
            let page = registry.list(&tenant(), &query).await.unwrap();
            seen.extend(page.deltas.iter().map(|d| format!("{}@{}", d.version.name, d.version.number)));
            query.page_token = page.next_page_token;
            if query.page_token.is_empty() {
                break;
            }
        }
        let expected = ["m0@1", "m1@1", "m2@1", "m3@1", "m4@1", "n@5", "n@4", "n@3", "n@2", "n@1"].map(str::to_owned);
        assert_eq!(seen, expected);
        let query = ListQuery { prefix: "n".into(), ..ListQuery::default() };
        let current = registry.list(&tenant(), &query).await.unwrap().deltas;
        assert_eq!(current.iter().map(|d| (d.version.number, d.current)).collect::<Vec<_>>(), [(5, true)]);
    }
    let query = ListQuery { page_token: "../x".into(), ..ListQuery::default() };
    assert!(w.registry.list(&tenant(), &query).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_concurrent_publishes_memory_and_disk_agree_on_what_is_current() {
    let w = World::new(2).await;
    for round in 0..5 {
        let tasks: Vec<_> = (0..8)
            .map(|i| {
                let registry = w.registry.clone();
                let new = publication("n", SIZE, &format!("{round}-{i}"));
                tokio::spawn(async move { registry.publish(&tenant(), new).await.unwrap() })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let stored = w.store.all_names().await.unwrap();
        let in_memory = w.registry.resolve(&tenant(), &wanted("n")).unwrap();
        assert_eq!(stored[0].current(), Some(&in_memory));
    }
}
