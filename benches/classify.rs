//! Speed of sequence classification by the forward itself (no gRPC): bare base under one head, one LoRA with its head, and a
//! different LoRA and head on every row, in one run.
//!
//! `cargo bench --bench classify -- [--base DIR] [--batch 1,32] [--len 64] [--repeat 15] [--rank 8] [--linears attention|all]
//! [--quantize q8_0|q4k] [--activations weights|f32]`
//! Without `--base` it makes a random base of BERT base's shape (109M). One JSON line per figure: medians over `repeat` runs,
//! variants interleaved.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a benchmark stops where anything fails")]

mod deltas;

use std::{sync::Arc, time::Instant};

use deltas::{Kind, median};
use deltaserve::{
    delta::{Delta, DeltaBatch},
    model::{Base, Input, LoadOptions, Quantize, testing},
    nn::{Cx, Wanted},
    ops::{self, Activations},
    rows::RowLayout,
};
use serde_json::json;

fn text(name: &str) -> Option<String> {
    let args: Vec<String> = std::env::args().collect();
    args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned()
}

fn number(name: &str, default: usize) -> usize {
    text(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} {v}: a number is expected")))
}

/// Seconds of one batch, up to the labels' logits.
fn run(base: &Base, len: usize, deltas: &[Option<Arc<Delta>>]) -> f64 {
    let begun = Instant::now();
    let rows = RowLayout::packed(&vec![len; deltas.len()]);
    let plan = DeltaBatch::new(&rows, deltas, base.sites.len());
    let tokens: Vec<u32> = (0..len * deltas.len()).map(|i| (1000 + i * 104_729 % 20_000) as u32).collect();
    let cx = Cx::new(&rows, &plan);
    let wanted = Wanted::of(&rows, &plan, base.transformer.head_rows(&cx));
    let cx = Cx { wanted: wanted.as_ref(), ..cx };
    let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx).expect("forward");
    let logits = base.transformer.classify(&hidden, &cx).expect("logits");
    assert!(logits.iter().all(|l| l.is_some()), "every row has a head");
    begun.elapsed().as_secs_f64()
}

fn main() {
    let batches = text("--batch").unwrap_or_else(|| "1,32".to_owned());
    let batches: Vec<usize> = batches.split(',').map(|n| n.parse().expect("--batch takes numbers")).collect();
    let (len, repeat, rank) = (number("--len", 64), number("--repeat", 15), number("--rank", 8));
    let all = text("--linears").is_some_and(|v| v == "all");
    let quantize = text("--quantize").map(|v| match v.as_str() {
        "q8_0" => Quantize::Q8_0,
        "q4k" => Quantize::Q4K,
        other => panic!("--quantize {other}: q8_0 and q4k are accepted"),
    });
    // as the server does
    let activations = text("--activations").map_or(Activations::AsWeights, |v| v.parse().expect("--activations"));
    let options = LoadOptions { quantize, ..LoadOptions::default() };
    let base = match text("--base") {
        Some(dir) => Base::load(dir.as_ref(), &options).expect("a base folder"),
        None => {
            let mut config = testing::tiny_bert();
            for (key, value) in [
                ("hidden_size", 768),
                ("num_hidden_layers", 12),
                ("num_attention_heads", 12),
                ("intermediate_size", 3072),
                ("vocab_size", 30_522),
                ("max_position_embeddings", 512),
            ] {
                config[key] = json!(value);
            }
            testing::random_base_as(&config, 7, &options).expect("random base")
        }
    };
    deltaserve::ops::keep_freed_memory();
    let largest = batches.iter().copied().max().unwrap_or(1);
    // heads of different sizes, as tenants have them
    let random = |i: usize| Some(deltas::random(&base, Kind::Lora { rank, all }, 2 + i % 7, i as u64));
    let loras: Vec<_> = (0..largest).map(random).collect();
    let bare = Some(deltas::random(&base, Kind::Bare, 2, 0));
    println!(
        "{}",
        json!({"base": base.arch.model_type, "parameters": base.parameters, "format": base.weight_format(), "len": len, "threads": rayon::current_num_threads(), "rank": rank, "linears": if all { "all" } else { "attention" }})
    );
    candle_core::utils::with_threadpool(|| {
        for &batch in &batches {
            let variants = [
                ("base".to_owned(), vec![bare.clone(); batch]),
                ("1 LoRA".to_owned(), vec![loras[0].clone(); batch]),
                (format!("{batch} LoRAs"), loras[..batch].to_vec()),
            ];
            let mut times = vec![Vec::new(); variants.len()];
            for round in 0..repeat + 2 {
                for (times, (_, deltas)) in times.iter_mut().zip(&variants) {
                    let seconds = ops::with_activations(activations, || run(&base, len, deltas));
                    if round >= 2 {
                        times.push(seconds); // the first rounds warm up
                    }
                }
            }
            let seconds: Vec<f64> = times.into_iter().map(median).collect();
            for ((name, _), own) in variants.iter().zip(&seconds) {
                println!(
                    "{}",
                    json!({"batch": batch, "deltas": name, "seq_per_s": (batch as f64 / own * 10.0).round() / 10.0,
                        "ms": (own * 1e5).round() / 100.0, "ratio_to_base": (seconds[0] / own * 1e3).round() / 1e3})
                );
            }
        }
    });
}
