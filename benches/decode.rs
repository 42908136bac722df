//! Decode speed of the forward itself (no gRPC): bare base, one LoRA, a different LoRA on every row, and with `--mixed yes`
//! a different delta on every row, of five kinds (LoRA, adapter, prefix, prompt, BitFit), in one run.
//!
//! `cargo bench --bench decode -- [--base DIR --loras DIR] [--batch 1,8,32] [--new 32] [--prompt 32] [--repeat 5]
//! [--rank 8] [--linears attention|all] [--mixed yes] [--quantize q8_0|q4k] [--dtype f32|bf16]
//! [--activations weights|f32]`
//! Without `--base` it makes a random base of GPT-2 small's shape (124M); without `--loras` random LoRAs, on `c_attn` (or
//! queries and values) or on all linears.
//! One JSON line per figure: tokens per second are medians over `repeat` runs, variants interleaved.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a benchmark stops where anything fails")]

mod deltas;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Instant};

use candle_core::{CpuStorage, DType, Storage, Tensor};
use deltas::{Kind, median};
use deltaserve::{
    delta::{Delta, DeltaBatch, DeltaFiles},
    interop,
    kv::KvCache,
    model::{Base, Input, LoadOptions, Quantize, testing},
    nn::{Cx, Wanted},
    ops::{self, Activations},
    rows::RowLayout,
};
use rayon::prelude::*;
use serde_json::json;

struct Args {
    base: Option<PathBuf>,
    loras: Option<PathBuf>,
    batches: Vec<usize>,
    new: usize,
    prompt: usize,
    repeat: usize,
    rank: usize,
    /// LoRAs on all linears, not on attention's inputs alone.
    all: bool,
    mixed: bool,
    quantize: Option<Quantize>,
    dtype: DType,
    activations: Activations,
}

fn args() -> Args {
    let mut map: BTreeMap<String, String> = BTreeMap::new();
    let mut it = std::env::args().skip(1);
    while let Some(key) = it.next() {
        if let Some(name) = key.strip_prefix("--") {
            // cargo's own flag has no value
            if name == "bench" {
                continue;
            }
            map.insert(name.into(), it.next().unwrap_or_default());
        }
    }
    let num = |key: &str, default: usize| map.get(key).and_then(|v| v.parse().ok()).unwrap_or(default);
    Args {
        base: map.get("base").map(Into::into),
        loras: map.get("loras").map(Into::into),
        batches: map
            .get("batch")
            .map_or_else(|| vec![1, 8, 32], |v| v.split(',').filter_map(|n| n.parse().ok()).collect()),
        new: num("new", 32),
        prompt: num("prompt", 32),
        repeat: num("repeat", 5),
        rank: num("rank", 8),
        all: map.get("linears").is_some_and(|v| v == "all"),
        mixed: map.contains_key("mixed"),
        quantize: map.get("quantize").map(|v| match v.as_str() {
            "q8_0" => Quantize::Q8_0,
            "q4k" => Quantize::Q4K,
            other => panic!("--quantize {other}: q8_0 and q4k are accepted"),
        }),
        dtype: match map.get("dtype").map(String::as_str) {
            None | Some("f32") => DType::F32,
            Some("bf16") => DType::BF16,
            Some(other) => panic!("--dtype {other}: f32 and bf16 are accepted"),
        },
        // as the server does
        activations: map.get("activations").map_or(Activations::AsWeights, |v| v.parse().expect("--activations")),
    }
}

fn load_loras(base: &Base, dir: &PathBuf) -> Vec<Arc<Delta>> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("folder of LoRAs")
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.join("adapter_config.json").is_file())
        .collect();
    dirs.sort();
    let mut cold = Vec::new();
    let loras = dirs
        .iter()
        .map(|d| {
            let t = Instant::now();
            let mut files = DeltaFiles::default();
            for name in ["adapter_config.json", "adapter_model.safetensors"] {
                files.files.insert(name.into(), std::fs::read(d.join(name)).expect("PEFT file").into());
            }
            let delta = Arc::new(interop::decode(&files, base).expect("a LoRA of this base"));
            cold.push(t.elapsed().as_secs_f64() * 1e3);
            delta
        })
        .collect();
    println!("{}", json!({"what": "decode a PEFT folder from disk", "ms": median(cold)}));
    loras
}

/// The largest of each row, rows side by side as the engine chooses tokens.
fn greedy(logits: &Tensor) -> Vec<u32> {
    let (storage, _) = logits.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(numbers)) = &*storage else { panic!("f32 on the CPU") };
    let largest = |row: &[f32]| {
        let mut lanes = [f32::NEG_INFINITY; 16];
        for numbers in row.chunks(16) {
            lanes.iter_mut().zip(numbers).for_each(|(lane, x)| *lane = lane.max(*x));
        }
        let most = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        row.iter().position(|x| *x == most).expect("a number") as u32
    };
    numbers.par_chunks_exact(logits.dim(1).expect("vocab")).map(largest).collect()
}

/// Seconds of prefill and of `new` decode steps.
fn run(base: &Base, batch: usize, args: &Args, deltas: &[Option<Arc<Delta>>]) -> (f64, f64) {
    let (prompt, new) = (args.prompt, args.new);
    let ahead: Vec<_> = deltas.iter().map(|d| d.as_ref().map_or_else(Default::default, |d| d.ahead())).collect();
    let total = prompt + new + 1 + ahead.iter().map(|a| a.slots()).max().unwrap_or(0);
    let cache =
        KvCache::new(base.arch.layers, batch * total, base.arch.kv_width(), base.dtype, &base.device).expect("cache");
    let slots = |i: usize, len: usize| -> Arc<[u32]> { (0..len).map(|p| (i * total + p) as u32).collect() };
    let mut last: Vec<u32> = Vec::new();
    let mut times = (0.0, 0.0);
    for step in 0..=new {
        let t = Instant::now();
        let mut rows = RowLayout::default();
        let mut tokens = Vec::new();
        for i in 0..batch {
            let (ahead, first) = (ahead[i], ahead[i].rows + prompt);
            match last.get(i) {
                None => {
                    rows.push_after(ahead, first, 0, slots(i, ahead.keys + first));
                    tokens.extend((0..prompt).map(|p| ((i * 7919 + p * 104_729) % base.arch.vocab) as u32));
                }
                Some(&token) => {
                    rows.push_after(ahead, 1, first + step - 1, slots(i, ahead.keys + first + step));
                    tokens.push(token);
                }
            }
        }
        let plan = DeltaBatch::new(&rows, deltas, base.sites.len());
        let wanted = Wanted::of(&rows, &plan, rows.last_rows());
        let cx = Cx { kv: Some(&cache), wanted: wanted.as_ref(), ..Cx::new(&rows, &plan) };
        let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx).expect("forward");
        last = greedy(&base.transformer.logits(&hidden, &rows.last_rows(), &cx).expect("logits"));
        let spent = t.elapsed().as_secs_f64();
        if step == 0 { times.0 += spent } else { times.1 += spent }
    }
    times
}

fn main() {
    let args = args();
    let options = LoadOptions { dtype: args.dtype, quantize: args.quantize, ..LoadOptions::default() };
    let base = match &args.base {
        Some(dir) => Base::load(dir, &options).expect("a base folder"),
        None => {
            let mut config = testing::tiny_gpt2();
            for (key, value) in
                [("n_embd", 768), ("n_layer", 12), ("n_head", 12), ("vocab_size", 50_257), ("n_positions", 1024)]
            {
                config[key] = json!(value);
            }
            testing::random_base_as(&config, 7, &options).expect("random base")
        }
    };
    deltaserve::ops::keep_freed_memory();
    let largest = args.batches.iter().copied().max().unwrap_or(1);
    let loras = match &args.loras {
        Some(dir) => load_loras(&base, dir),
        None => {
            let kind = Kind::Lora { rank: args.rank, all: args.all };
            (0..largest as u64).map(|i| deltas::random(&base, kind, 0, i)).collect()
        }
    };
    let kinds = deltas::mixed(args.rank);
    let of_kinds = |i: usize| Some(deltas::random(&base, kinds[i % kinds.len()], 0, i as u64));
    let of_kinds: Vec<_> = (0..if args.mixed { largest } else { 0 }).map(of_kinds).collect();
    let threads = rayon::current_num_threads();
    println!(
        "{}",
        json!({"base": base.arch.model_type, "parameters": base.parameters, "format": base.weight_format(), "weight_bytes": base.weight_bytes(), "threads": threads, "prompt": args.prompt, "new": args.new})
    );
    candle_core::utils::with_threadpool(|| {
        for &batch in &args.batches {
            let mixed = |n: usize| (0..batch).map(|i| loras.get(i % n).cloned()).collect::<Vec<_>>();
            let mut variants = vec![("base".to_owned(), vec![None; batch]), ("1 LoRA".to_owned(), mixed(1))];
            for n in [8, 32] {
                if n <= batch && n <= loras.len() {
                    variants.push((format!("{n} LoRAs"), mixed(n)));
                }
            }
            if args.mixed {
                variants.push(("five kinds".to_owned(), of_kinds[..batch].to_vec()));
            }
            let run = |deltas: &[_]| ops::with_activations(args.activations, || run(&base, batch, &args, deltas));
            run(&variants[0].1); // warm up
            let mut times: Vec<Vec<(f64, f64)>> = vec![vec![]; variants.len()];
            for _ in 0..args.repeat {
                for (v, (_, deltas)) in variants.iter().enumerate() {
                    times[v].push(run(deltas));
                }
            }
            let tok_s = |t: &[(f64, f64)]| median(t.iter().map(|t| (batch * args.new) as f64 / t.1).collect());
            let bare = tok_s(&times[0]);
            for ((name, _), times) in variants.iter().zip(&times) {
                let speed = tok_s(times);
                println!(
                    "{}",
                    json!({
                        "batch": batch, "deltas": name, "decode_tok_s": (speed * 10.0).round() / 10.0,
                        "ratio_to_base": (speed / bare * 1e3).round() / 1e3,
                        "prefill_ms": (median(times.iter().map(|t| t.0 * 1e3).collect()) * 10.0).round() / 10.0,
                    })
                );
            }
        }
    });
}
