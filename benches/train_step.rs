//! One LoRA training step with the base frozen: forward and backward time, and memory that the step adds.
//!
//! `cargo bench --bench train_step -- [--base DIR] [--rows 8] [--len 128] [--repeat 5]`
//! Without `--base` it makes a random base of GPT-2 small's shape (124M). Memory is the peak resident set (`VmHWM`) less
//! the resident set before the first step; gradients of the frozen weights would add the size of the base.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a benchmark stops at the first surprise")]

use std::{sync::Arc, time::Instant};

use candle_core::{Device, Tensor, Var};
use deltaserve::{
    delta::{Delta, DeltaBatch, DeltaSpec, LowRank, Patch, Task},
    model::{Base, Input, LoadOptions, testing},
    nn::Cx,
    rows::RowLayout,
};
use serde_json::json;

fn number(name: &str, default: usize) -> usize {
    let args: Vec<String> = std::env::args().collect();
    let at = args.iter().position(|a| a == name);
    at.and_then(|i| args.get(i + 1)).and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// A line of /proc/self/status in MiB.
fn status_mib(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(key)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|v| v.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

fn trainable(base: &Base, rank: usize) -> (Arc<Delta>, Vec<Tensor>) {
    let (mut patches, mut vars) = (Vec::new(), Vec::new());
    for (site, entry) in base.sites.linears().filter(|(_, e)| e.module.ends_with("c_attn")) {
        let var = |o: usize| Var::randn(0f32, 0.02, (rank, o), &Device::Cpu).expect("a variable");
        let (a, b) = (var(entry.in_dim).as_tensor().clone(), var(entry.out_dim).as_tensor().clone());
        vars.extend([a.clone(), b.clone()]);
        patches.push((site, Patch::LowRank(LowRank { a, b, scale: 2.0 })));
    }
    let spec = DeltaSpec {
        methods: vec!["lora".into()],
        task: Task::CausalLm,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    (Arc::new(Delta::new(spec, patches, None)), vars)
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let (rows, len, repeat) = (number("--rows", 8), number("--len", 128), number("--repeat", 5));
    let args: Vec<String> = std::env::args().collect();
    let base = match args.iter().position(|a| a == "--base").and_then(|i| args.get(i + 1)) {
        Some(dir) => Base::load(dir.as_ref(), &LoadOptions::default()).expect("a base folder"),
        None => {
            let mut config = testing::tiny_gpt2();
            let shape =
                [("n_embd", 768), ("n_layer", 12), ("n_head", 12), ("vocab_size", 50_257), ("n_positions", 1024)];
            for (key, value) in shape {
                config[key] = json!(value);
            }
            testing::random_base(&config, 7).expect("random base")
        }
    };
    let (delta, vars) = trainable(&base, 8);
    let layout = RowLayout::packed(&vec![len; rows]);
    let batch = DeltaBatch::single(delta, &layout, base.sites.len());
    let cx = Cx::new(&layout, &batch);
    let tokens: Vec<u32> = (0..rows * len).map(|i| ((i * 104_729) % base.arch.vocab) as u32).collect();
    let (mut pick, mut targets) = (Vec::new(), Vec::new());
    for span in layout.spans() {
        for row in span.start..span.start + span.len - 1 {
            pick.push(row as u32);
            targets.push(tokens[row + 1]);
        }
    }
    // peak counters are reset here, so that making the base does not count
    std::fs::write("/proc/self/clear_refs", "5").ok();
    let before = status_mib("VmRSS");
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..=repeat {
        let t = Instant::now();
        let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx).expect("forward");
        let loss = base.transformer.nll(&hidden, &pick, &targets, &cx).and_then(|l| l.mean_all()).expect("loss");
        forward.push(t.elapsed().as_secs_f64());
        let t = Instant::now();
        let grads = loss.backward().expect("backward");
        backward.push(t.elapsed().as_secs_f64());
        assert!(vars.iter().all(|v| grads.get(v).is_some()), "every variable has a gradient");
        assert_eq!(grads.get_ids().filter(|id| vars.iter().any(|v| v.id() == **id)).count(), vars.len());
    }
    let (f, b) = (median(forward.split_off(1)), median(backward.split_off(1)));
    println!(
        "{}",
        json!({
            "base_mib": base.parameters as f64 * 4.0 / f64::from(1 << 20), "tokens": rows * len,
            "forward_s": f, "backward_s": b, "backward_over_forward": b / f,
            "step_tokens_per_s": (rows * len) as f64 / (f + b),
            "peak_extra_mib": status_mib("VmHWM") - before,
        })
    );
}
