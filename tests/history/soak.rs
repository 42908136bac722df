//! A soak: the same clients for a while; memory, open files and tasks of the process stay what they were after its first half.

use std::time::{Duration, Instant};

use crate::{
    alone,
    chance::{number, seed},
    clients::Scene,
    prints, small_world,
};

/// From this length on nothing is forgiven: caches have been filled.
const LONG: Duration = Duration::from_secs(120);
/// Growth that is none.
const FLAT: f64 = 0.02;

#[derive(Debug, Clone, Copy)]
struct Sample {
    bytes: f64,
    files: f64,
    tasks: f64,
}

fn sample() -> Sample {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<f64>().ok()).expect("resident pages");
    let files = std::fs::read_dir("/proc/self/fd").expect("open files").count();
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    Sample { bytes: pages * 4096.0, files: files as f64, tasks: tasks as f64 }
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut numbers: Vec<f64> = samples.iter().map(of).collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Compares the last quarter with the one before; `slack` is forgiven beside 2 %.
fn growth(samples: &[Sample], slack: f64, of: impl Fn(&Sample) -> f64 + Copy) -> Result<(f64, f64), String> {
    let (half, three) = (samples.len() / 2, samples.len() * 3 / 4);
    let (before, after) = (median(&samples[half..three], of), median(&samples[three..], of));
    match after <= before * (1.0 + FLAT) + slack {
        true => Ok((before, after)),
        false => Err(format!("grew from {before} to {after}")),
    }
}

#[test]
fn a_soak_leaves_memory_files_and_tasks_flat() {
    let lasts = Duration::from_secs(number("DELTASERVE_SOAK_SECONDS", 6));
    alone(soak(seed(), lasts));
}

async fn soak(seed: u64, lasts: Duration) {
    let world = small_world();
    let running = world.start().await;
    let scene = Scene::new(&running.client, prints::names(&world), prints::trained(), false);
    let tasks = scene.start(seed);
    let every = (lasts / 200).max(Duration::from_millis(25));
    let (began, mut samples) = (Instant::now(), Vec::new());
    while began.elapsed() < lasts || samples.len() < 8 {
        tokio::time::sleep(every).await;
        samples.push(sample());
    }
    scene.stop(tasks).await;
    running.stop().await;
    // a short one still fills caches, and its medians are of few samples
    let short = lasts < LONG;
    let slack = |of_short: f64, of_long: f64| if short { of_short } else { of_long };
    let grown = [
        ("memory", growth(&samples, slack((32 << 20) as f64, 0.0), |s| s.bytes)),
        ("files", growth(&samples, slack(4.0, 1.0), |s| s.files)),
        ("tasks", growth(&samples, slack(12.0, 2.0), |s| s.tasks)),
    ];
    println!("{} operations in {lasts:?}: {grown:?}", scene.operations.load(std::sync::atomic::Ordering::Relaxed));
    for (what, grown) in grown {
        grown.unwrap_or_else(|problem| panic!("{what} {problem}"));
    }
}

#[test]
fn growth_is_told_and_noise_is_not() {
    let samples = |of: &dyn Fn(usize) -> f64| -> Vec<Sample> {
        (0..100).map(|i| Sample { bytes: of(i), files: 0.0, tasks: 0.0 }).collect()
    };
    let noisy = samples(&|i| 1000.0 + (i * 37 % 11) as f64);
    let warm = samples(&|i| if i < 45 { 100.0 * i as f64 } else { 5000.0 });
    let leaks = samples(&|i| 1000.0 + 3.0 * i as f64);
    assert!(growth(&noisy, 0.0, |s| s.bytes).is_ok() && growth(&warm, 0.0, |s| s.bytes).is_ok());
    assert!(growth(&leaks, 0.0, |s| s.bytes).is_err() && growth(&leaks, 100.0, |s| s.bytes).is_ok());
}
