//! Every target over its corpus, with bytes of it changed one by one, and over random mutations: no panic, no hang, and
//! no memory without bound. `DELTASERVE_FUZZ_THOUSANDS` sets how many executions there are (20 unless set), and
//! `DELTASERVE_FUZZ_SEED` where the random ones begin.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Entry, TARGETS};

/// Longest that one input may take, on a machine that is busy with other tests.
const HANG: Duration = Duration::from_secs(60);
/// Most that this process may grow by: other tests run in it at the same time.
const GROWTH: u64 = 3 << 30;
/// Longest input that mutations make.
const LONGEST: usize = 1 << 16;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// The inputs of a target's folder, in order of name.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = root().join("corpus").join(target);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&folder).expect("its corpus").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).expect("an input")).collect()
}

/// One to four small changes: numbers that are edges of their types, bits, pieces taken out, doubled, or of another input.
fn mutated(seed: &[u8], other: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut out = seed.to_vec();
    for _ in 0..=rng.below(4) {
        let at = rng.below(out.len() + 1);
        let scale = rng.below(6);
        let length = 1 + rng.below(1 << scale);
        let end = (at + length).min(out.len());
        match rng.below(8) {
            0 => out[at..end].iter_mut().for_each(|byte| *byte = rng.next() as u8),
            1 => out[at..end].iter_mut().take(1).for_each(|byte| *byte ^= 1 << rng.below(8)),
            2 => drop(out.drain(at..end)),
            3 => {
                let piece = out[at..end].repeat(1 + rng.below(20));
                out.splice(at..at, piece);
            }
            4 => {
                let from = rng.below(other.len() + 1);
                let to = (from + length).min(other.len());
                out.splice(at..end, other[from..to].iter().copied());
            }
            5 => {
                let edges = [u64::MAX, 1 << 63, u64::from(u32::MAX), 1 << 31, 1 << 16, 255, 127, 0];
                let bytes = edges[rng.below(edges.len())].to_le_bytes();
                out.splice(at..end, bytes[..1 << rng.below(4)].iter().copied());
            }
            6 => {
                let words = [
                    "\"", "{", "}", "[", "]", ",", "\\", "null", "-1", "1e999", "\0", "\n", "é", "\u{FFFE}", "{{", "%}",
                ];
                out.splice(at..at, words[rng.below(words.len())].bytes());
            }
            _ => out.truncate(at),
        }
    }
    out.truncate(LONGEST);
    out
}

/// Peak of resident memory, in bytes; 0 where the system does not tell.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// What a target is given, in order: `each` is told of one after the other.
fn inputs(target: &str, thousands: u64, cost: u64, mut each: impl FnMut(&[u8])) {
    let seeds = corpus(target);
    assert!(!seeds.is_empty(), "fuzz/corpus/{target} is empty");
    each(&[]);
    seeds.iter().for_each(|seed| each(seed));
    let budget = (thousands * 1000 / cost) as usize;
    // each byte of each seed in turn, or, of many, as many evenly apart
    let bytes: usize = seeds.iter().map(Vec::len).sum();
    let changes = [|b: u8| b ^ 1, |b: u8| b ^ 0x80, |_| 0, |_| 0xFF, |_| b'"', |b: u8| b.wrapping_add(1)];
    let stride = (bytes * changes.len()).div_ceil(budget.max(1)).max(1);
    let places = seeds.iter().flat_map(|seed| (0..seed.len() * changes.len()).map(move |i| (seed, i)));
    for (seed, i) in places.step_by(stride) {
        let (at, change) = (i / changes.len(), changes[i % changes.len()]);
        let mut data = seed.clone();
        data[at] = change(data[at]);
        each(&data);
    }
    let mut rng = Rng(from_env("DELTASERVE_FUZZ_SEED", 1));
    for _ in 0..budget {
        let (seed, other) = (&seeds[rng.below(seeds.len())], &seeds[rng.below(seeds.len())]);
        each(&mutated(seed, other, &mut rng));
    }
}

/// Runs a target in a thread of its own and watches it. Executions cost about so many microseconds over ten.
fn smoke(target: &'static str, cost: u64) {
    let entry: Entry = TARGETS.iter().find(|(name, _)| *name == target).expect("a target").1;
    let thousands = from_env("DELTASERVE_FUZZ_THOUSANDS", 20);
    let before = peak();
    let current = Arc::new(Mutex::new((Instant::now(), Vec::new())));
    let (done, ended) = channel::<()>();
    let watched = Arc::clone(&current);
    let thread = std::thread::spawn(move || {
        // dropped at a panic, too
        let _done = done;
        inputs(target, thousands, cost, |data| {
            *watched.lock() = (Instant::now(), data.to_vec());
            entry(data);
        });
    });
    while ended.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
        let (since, data) = &*current.lock();
        assert!(since.elapsed() < HANG, "{target} hangs on {}", data.escape_ascii());
    }
    let ended = thread.join();
    assert!(ended.is_ok(), "{target} panics on {}", current.lock().1.escape_ascii());
    let grown = peak().saturating_sub(before);
    assert!(grown < GROWTH, "{target}: {grown} bytes more are resident");
}

#[test]
fn safetensors_header() {
    smoke("safetensors_header", 10);
}

#[test]
fn peft_config() {
    smoke("peft_config", 10);
}

#[test]
fn adapterhub_config() {
    smoke("adapterhub_config", 20);
}

#[test]
fn dataset() {
    smoke("dataset", 4);
}

#[test]
fn proto_request() {
    smoke("proto_request", 1);
}

#[test]
fn tokenizer() {
    smoke("tokenizer", 50);
}

#[test]
fn chat_template() {
    smoke("chat_template", 20);
}

#[test]
fn stop_strings() {
    smoke("stop_strings", 4);
}

#[test]
fn grammar() {
    smoke("grammar", 100);
}

#[test]
fn gguf_header() {
    smoke("gguf_header", 2);
}

#[test]
fn pickle() {
    smoke("pickle", 1);
}

#[test]
fn each_target_has_its_file_and_its_corpus() {
    let named: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let in_folder = |folder: &str| -> BTreeSet<String> {
        let files = std::fs::read_dir(root().join(folder)).expect("a folder");
        files.map(|e| e.expect("an entry").file_name().to_string_lossy().trim_end_matches(".rs").to_owned()).collect()
    };
    assert_eq!(in_folder("fuzz_targets"), named);
    assert_eq!(in_folder("corpus"), named);
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("its manifest");
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let code = std::fs::read_to_string(root().join(format!("fuzz_targets/{name}.rs"))).expect("its code");
        assert!(code.contains(&format!("deltaserve::fuzzing::{name}(data)")), "{name}");
        assert!(corpus(name).iter().all(|input| input.len() <= LONGEST), "{name}: small inputs are committed");
    }
}
