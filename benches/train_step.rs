//! One LoRA training step with the base frozen: forward and backward time, and memory that the step adds.
//!
//! `cargo bench --bench train_step -- [--base DIR] [--rows 8] [--len 128] [--repeat 5] [--sweep K | --jobs K] [--bf16x2 off]`
//! Without `--base` it makes a random base of GPT-2 small's shape (124M). Memory is the peak resident set (`VmHWM`) less
//! the resident set before the first step; gradients of the frozen weights would add the size of the base.
//!
//! With `--sweep K` it compares a sweep of K learning rates, whose steps are done together, with the same K jobs one after the
//! other: seconds per step of all K, and their ratio (`--rows` examples of `--len` tokens per candidate and step, `--rank 8`).
//!
//! With `--jobs K` it compares K independent jobs with data of their own that share each pass with the same jobs in turn:
//! seconds per round (a step of each), and their ratio (`--rows` examples of `--len` tokens per job and step, `--rank 8`). A
//! server shares passes of few rows only; here they are shared whatever their length, to see where that pays.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a benchmark stops at the first surprise")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor, Var};
use deltaserve::{
    delta::{Delta, DeltaBatch, DeltaSpec, LowRank, Patch, Task},
    model::{Base, Input, LoadOptions, testing},
    nn::{Cx, Wanted},
    ops::{self, Halves},
    rows::RowLayout,
    train::{
        BaseInfo, Inputs,
        encode::TextCodec,
        prepare,
        run::{Advance, Run, RunInput, Work, shared_pass},
        spec::BaseShape,
    },
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

/// A job on texts of so many tokens, one per byte; `wanted.from` is the number of the first text.
fn input(base: &Base, (rows, len, steps): (usize, usize, usize), wanted: serde_json::Value) -> RunInput {
    let from = wanted["from"].as_u64().unwrap_or(0) as usize;
    let text = |i: usize| -> String {
        let i = from + i;
        (0..len - 1).map(|j| char::from(b'!' + ((i * 31 + j * j * 7 + j) % 90) as u8)).collect()
    };
    let lines = |n: usize| -> String { (0..n).map(|i| json!({"text": text(i)}).to_string() + "\n").collect() };
    let mut params = json!({
        "output_name": "out", "task": "causal_lm", "data": {"jsonl": "-"}, "validation": {"data": {"jsonl": "-"}},
        "labels": [], "publish": "upsert",
        "hyper": {
            "max_steps": steps, "batch_size": rows, "max_length": len, "eval_every": 1_000_000, "warmup_ratio": 0.0
        },
    });
    let hyper = wanted["hyper"].as_object().into_iter().flatten();
    hyper.for_each(|(key, value)| params["hyper"][key] = value.clone());
    params["methods"] = json!([{"kind": "lora", "rank": number("--rank", 8)}]);
    params["sweep"] = wanted["sweep"].clone();
    let params = serde_json::from_value(params).expect("a request");
    let codec = TextCodec::new(
        Arc::new(|text: &str, _: bool| Ok(text.bytes().map(u32::from).collect())),
        Arc::new(|_: &[String]| Err("no words".to_owned())),
        None,
        vec![0],
    )
    .expect("a codec");
    let (train, held) = (lines(rows * 4), lines(2));
    let inputs = Inputs {
        params: &params,
        train: train.as_bytes(),
        validation: Some(held.as_bytes()),
        forgetting: None,
        replay: None,
        start: None,
    };
    let info = BaseInfo { shape: BaseShape::of(base), max_positions: base.arch.max_positions };
    RunInput::from(&prepare(inputs, info, &codec).expect("a job"))
}

/// Seconds per step, after the first.
fn seconds_per_step(base: &Arc<Base>, input: RunInput, steps: usize) -> f64 {
    let mut work = Work::new(Arc::clone(base), None, input).expect("a job");
    let (mut begun, mut took) = (Instant::now(), Duration::ZERO);
    while (work.step() as usize) < steps {
        let before = work.step();
        assert!(matches!(work.advance(), Advance::More(_)), "it goes on");
        match (before, work.step()) {
            (0, 1) => begun = Instant::now(),
            (a, b) if a != b => took = begun.elapsed(),
            _ => {}
        }
    }
    took.as_secs_f64() / (steps - 1) as f64
}

/// The candidates together against one after the other.
fn sweep(base: &Arc<Base>, candidates: usize, (rows, len, steps): (usize, usize, usize)) {
    let rates: Vec<f64> = (1..=candidates).map(|i| 1e-4 * i as f64).collect();
    // a job more than is timed, so that none ends within the measured steps
    let size = (rows, len, steps + 1);
    let together =
        seconds_per_step(base, input(base, size, json!({"sweep": {"learning_rates": rates, "ranks": []}})), steps);
    let alone = |rate: &f64| {
        let wanted = json!({"hyper": {"learning_rate": rate}});
        seconds_per_step(base, input(base, size, wanted), steps)
    };
    let apart: f64 = rates.iter().map(alone).sum();
    println!(
        "{}",
        json!({
            "candidates": candidates, "tokens_per_candidate": rows * len, "together_s": together, "apart_s": apart,
            "together_over_apart": together / apart, "peak_mib": status_mib("VmHWM"),
        })
    );
}

/// Seconds per round of these jobs, after the first: in one pass, or in turn.
fn seconds_per_round(base: &Arc<Base>, inputs: &[RunInput], steps: usize, share: bool) -> f64 {
    let mut runs: Vec<Run> =
        inputs.iter().map(|input| Run::new(Arc::clone(base), None, input.clone()).expect("a job")).collect();
    let (mut begun, mut took) = (Instant::now(), Duration::ZERO);
    while (runs[0].step() as usize) < steps {
        let before = runs[0].step();
        assert!(runs.iter_mut().all(|run| run.shared_rows().is_some()), "all train");
        let goes_on = |came: Advance| assert!(matches!(came, Advance::More(_)), "it goes on");
        if share {
            let shares = shared_pass(&runs.iter().collect::<Vec<_>>()).expect("a pass");
            runs.iter_mut().zip(shares).for_each(|(run, share)| goes_on(run.take(share)));
        } else {
            runs.iter_mut().for_each(|run| goes_on(run.advance()));
        }
        match (before, runs[0].step()) {
            (0, 1) => begun = Instant::now(),
            (a, b) if a != b => took = begun.elapsed(),
            _ => {}
        }
    }
    took.as_secs_f64() / (steps - 1) as f64
}

/// Jobs that share passes against the same jobs in turn.
fn jobs(base: &Arc<Base>, jobs: usize, (rows, len, steps): (usize, usize, usize)) {
    // a step more than is timed, so that none ends within the measured steps
    let job = |i: usize| input(base, (rows, len, steps + 1), json!({"from": i * rows * 4, "hyper": {"seed": i}}));
    let inputs: Vec<RunInput> = (1..=jobs).map(job).collect();
    let in_turn = seconds_per_round(base, &inputs, steps, false);
    let shared = seconds_per_round(base, &inputs, steps, true);
    println!(
        "{}",
        json!({
            "jobs": jobs, "tokens_per_job": rows * len, "shared_s": shared, "in_turn_s": in_turn,
            "shared_over_in_turn": shared / in_turn, "peak_mib": status_mib("VmHWM"),
        })
    );
}

fn main() {
    let off = std::env::args().collect::<Vec<_>>().windows(2).any(|pair| pair[0] == "--bf16x2" && pair[1] == "off");
    // as a server's trainer has it in steps
    ops::permitting(if off { Halves::Never } else { Halves::Always }, measure);
}

fn measure() {
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
    let candidates = number("--sweep", 0);
    if candidates > 0 {
        return sweep(&Arc::new(base), candidates, (rows, len, repeat + 1));
    }
    let together = number("--jobs", 0);
    if together > 0 {
        return jobs(&Arc::new(base), together, (rows, len, repeat + 1));
    }
    let (delta, vars) = trainable(&base, 8);
    let layout = RowLayout::packed(&vec![len; rows]);
    let batch = DeltaBatch::single(delta, &layout, base.sites.len());
    let tokens: Vec<u32> = (0..rows * len).map(|i| ((i * 104_729) % base.arch.vocab) as u32).collect();
    let (mut pick, mut targets) = (Vec::new(), Vec::new());
    for span in layout.spans() {
        for row in span.start..span.start + span.len - 1 {
            pick.push(row as u32);
            targets.push(tokens[row + 1]);
        }
    }
    let wanted = Wanted::of(&layout, &batch, pick.iter().copied());
    let cx = Cx { wanted: wanted.as_ref(), ..Cx::new(&layout, &batch) };
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
