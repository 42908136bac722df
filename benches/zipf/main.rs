//! Many registered deltas, few of them in memory: how often a request's delta is there, beside what is possible.
//!
//! `cargo bench --bench zipf -- [--deltas 10000] [--requests 50000] [--room 256] [--zipf 1.0] [--seed 1] [--rank 1]`
//! `    [--shift N] [--scan N] [--base adapters/base/tiny-stories] [--keep DIR]`
//!
//! Registers so many tiny LoRAs on the base in a data directory of its own, then leases one after the other what a trace names whose
//! popularity follows Zipf's law, with a budget of bytes for `room` of them. With `--shift N`, others are popular after every N
//! requests; with `--scan N`, N requests for all deltas in turn follow every 4 N others. One JSON line per figure: what registering
//! took, hit rate and resident memory as the trace goes on, and at the end the registry's hits (what it evicts is `registry::demand`'s
//! to say) beside Belady's optimum on the same trace, an LRU, an LFU with counts of all requests, and one whose counts fade slowly.
//!
//! Belady's optimum knows the future, and on independent draws nothing of it can be known: keeping the most popular is the best
//! that can be done there, and has a share of sum(k^-s, k <= room) / sum(k^-s, k <= deltas) of the requests (`most_popular`), once
//! they have come in and are known. That is 62.6 % with room for 256 of 10,000 and s = 1, 5.1 points below the optimum on such a
//! trace of 50,000: no policy that works without the future comes within 5 points of it.
//!
//! With `--keep`, the directory stays, so that the same can be measured through a server: `deltaserve serve --base ... --data-dir DIR
//! --max-resident-mb N`, then `deltaserve bench --delta-prefix z --popularity zipf --zipf-s 1.0 --rate ...`, which says the hit rate.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a benchmark stops where anything fails")]

mod policies;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use candle_core::{Device, Tensor};
use deltaserve::{
    delta::{Delta, DeltaFiles, DeltaSpec, LowRank, Patch, Task},
    ids::{DeltaName, TenantId},
    interop::{self, EncodeMeta},
    model::{Base, LoadOptions, testing},
    registry::{DeltaRef, LoadError, Loader, Origin, Publication, PublishPolicy, Registry, RegistryConfig},
    store::Store,
};
use serde_json::json;

struct Args {
    deltas: usize,
    requests: usize,
    room: usize,
    exponent: f64,
    seed: u64,
    /// 0: never.
    shift: usize,
    /// 0: none.
    scan: usize,
    rank: usize,
    base: PathBuf,
    keep: Option<PathBuf>,
}

fn args() -> Args {
    let mut map: BTreeMap<String, String> = BTreeMap::new();
    let mut it = std::env::args().skip(1);
    while let Some(key) = it.next() {
        // cargo's own flag has no value
        if let Some(name) = key.strip_prefix("--").filter(|name| *name != "bench") {
            map.insert(name.into(), it.next().unwrap_or_default());
        }
    }
    let mut take = |key: &str| map.remove(key);
    let number = |key: &str, given: Option<String>, default: usize| {
        given.map_or(default, |v| v.parse().ok().filter(|n| *n > 0).unwrap_or_else(|| panic!("--{key} {v}: 1 or more")))
    };
    let args = Args {
        deltas: number("deltas", take("deltas"), 10_000),
        requests: number("requests", take("requests"), 50_000),
        room: number("room", take("room"), 256),
        exponent: take("zipf").map_or(1.0, |v| v.parse().expect("--zipf: a number")),
        shift: take("shift").map_or(0, |v| v.parse().expect("--shift: a number")),
        scan: take("scan").map_or(0, |v| v.parse().expect("--scan: a number")),
        seed: take("seed").map_or(1, |v| v.parse().expect("--seed: a number")),
        rank: number("rank", take("rank"), 1),
        base: take("base").unwrap_or_else(|| "adapters/base/tiny-stories".into()).into(),
        keep: take("keep").map(Into::into),
    };
    assert!(map.is_empty(), "unknown: {map:?}");
    args
}

/// A LoRA on the first attention's queries.
fn files(base: &Base, rank: usize, seed: u64) -> DeltaFiles {
    let mut rng = testing::Rng(seed * 2 + 1);
    let wanted = |module: &str| module.ends_with("c_attn") || module.ends_with("q_proj") || module.ends_with("query");
    let (site, entry) = base.sites.iter().find(|(_, entry)| wanted(&entry.module)).expect("an attention");
    let mut make = |width: usize| {
        let data: Vec<f32> = (0..rank * width).map(|_| 0.02 * rng.normal()).collect();
        Tensor::from_vec(data, (rank, width), &Device::Cpu).expect("shape fits")
    };
    let (a, b) = (make(entry.in_dim), make(entry.out_dim));
    let spec = DeltaSpec {
        methods: vec!["lora".into()],
        task: Task::CausalLm,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    let delta = Delta::new(spec, vec![(site, Patch::LowRank(LowRank { a, b, scale: 1.0 }))], None);
    interop::encode(&delta, base, &EncodeMeta::default()).expect("a LoRA has a form")
}

/// The process's resident memory in MiB; 0 where the system does not say.
fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// Bytes of all files below a folder.
fn bytes_below(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { bytes_below(&e.path()) } else { e.metadata().map_or(0, |m| m.len()) }).sum()
}

#[tokio::main]
async fn main() {
    let args = args();
    let base = Arc::new(Base::load(&args.base, &LoadOptions::default()).expect("the base loads"));
    let temporary = tempfile::tempdir().expect("a folder");
    let dir = args.keep.clone().unwrap_or_else(|| temporary.path().join("data"));
    let store = Store::open(&dir).await.expect("the store opens");
    let loader: Loader = {
        let base = Arc::clone(&base);
        Arc::new(move |files| interop::decode(files, &base).map_err(|e| LoadError::Invalid(e.to_string())))
    };
    let spec = interop::decode(&files(&base, args.rank, 0), &base).expect("reads back").spec.clone();
    let config = RegistryConfig { max_resident_bytes: args.room as u64 * spec.resident_bytes, ..Default::default() };
    let registry = Registry::open(store.clone(), base.fingerprint, loader, config).await.expect("opens");
    let tenant = TenantId::new("default").expect("a name");
    let names: Vec<DeltaName> = (0..args.deltas).map(|i| DeltaName::new(&format!("z{i}")).expect("a name")).collect();

    let (before, start) = (resident_mib(), Instant::now());
    for (i, name) in names.iter().enumerate() {
        let publication = Publication {
            name: name.clone(),
            files: files(&base, args.rank, i as u64),
            spec: spec.clone(),
            policy: PublishPolicy::Upsert,
            origin: Origin::Upload,
        };
        registry.publish(&tenant, publication).await.expect("publishes");
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}",
        json!({
            "what": "register", "deltas": args.deltas, "seconds": seconds, "ms_each": seconds * 1e3 / args.deltas as f64,
            "disk_bytes": bytes_below(&dir), "bytes_each_in_memory": spec.resident_bytes,
            "rss_mib_before": before, "rss_mib": resident_mib(),
        })
    );

    let mut trace = policies::zipf(args.deltas, args.exponent, args.requests, args.seed);
    if args.shift > 0 {
        trace = policies::shifting(&trace, args.deltas, args.shift);
    }
    if args.scan > 0 {
        trace = policies::scanning(&trace, args.deltas, args.scan);
    }
    let independent = args.shift == 0 && args.scan == 0;
    let start = Instant::now();
    let tenth = args.requests.div_ceil(10);
    for (i, id) in trace.iter().enumerate() {
        let wanted = DeltaRef::current(names[*id as usize].clone());
        drop(registry.lease(&tenant, &wanted).await.expect("leases"));
        if (i + 1) % tenth == 0 || i + 1 == trace.len() {
            let stats = registry.stats();
            println!(
                "{}",
                json!({
                    "what": "lease", "requests": i + 1, "seconds": start.elapsed().as_secs_f64(),
                    "hit_rate": stats.hits as f64 / (i + 1) as f64, "resident": stats.resident, "bytes": stats.bytes,
                    "rss_mib": resident_mib(),
                })
            );
        }
    }
    let rate = |hits: u64| hits as f64 / trace.len() as f64;
    let (ours, optimum) = (rate(registry.stats().hits), rate(policies::belady(&trace, args.room)));
    println!(
        "{}",
        json!({
            "what": "hit rates", "room": args.room, "zipf": args.exponent, "seed": args.seed, "shift": args.shift, "scan": args.scan,
            "registry": ours, "belady": optimum,
            "most_popular": independent.then(|| policies::most_popular(args.deltas, args.exponent, args.room)),
            "lru": rate(policies::lru(&trace, args.room)), "lfu": rate(policies::lfu(&trace, args.room)),
            "fading_lfu": rate(policies::fading(&trace, args.room, 32.0 * args.room as f64)),
            "points_below_belady": 100.0 * (optimum - ours),
        })
    );
    store.close().await;
}
