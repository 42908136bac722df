//! The `deltaserve` binary: threads, then the command line.

use std::{collections::HashSet, process::ExitCode, thread::available_parallelism};

use clap::Parser;
use deltaserve::cli::{Cli, describe};

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    deltaserve::failpoint::arm();
    let cli = Cli::parse();
    set_compute_threads(cli.threads());
    set_elementwise_threads();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("start the runtime: {error}")),
    };
    match runtime.block_on(cli.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&describe(&error)),
    }
}

#[allow(clippy::print_stderr, reason = "where a failed command says why")]
fn fail(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::FAILURE
}

/// candle asks for the number of threads at every matrix product: without this variable it reads /proc/cpuinfo each
/// time, and it would count hyper-threads, which slow matrix products down.
#[allow(unsafe_code, reason = "set_var is unsound beside other threads; main calls this before it starts any")]
fn set_compute_threads(asked: Option<usize>) {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    let threads = match asked {
        Some(threads) => threads,
        None if std::env::var_os(VARIABLE).is_some() => return,
        None => default_threads(),
    };
    // SAFETY: no other thread runs yet
    unsafe { std::env::set_var(VARIABLE, threads.max(1).to_string()) };
}

/// candle's element-wise pool spins and serialises its callers on one lock; engine and trainer would wait for each other
/// there. Without helpers of its own each caller works alone, which for rows of this size is as fast.
#[allow(unsafe_code, reason = "as above")]
fn set_elementwise_threads() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: as above
        unsafe { std::env::set_var(VARIABLE, "1") };
    }
}

/// Physical cores, as far as this process may use them.
fn default_threads() -> usize {
    let available = available_parallelism().map_or(1, usize::from);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match physical_cores(&cpuinfo) {
        0 => available,
        cores => cores.min(available),
    }
}

/// Distinct (socket, core) pairs; 0 where the system does not tell.
fn physical_cores(cpuinfo: &str) -> usize {
    let field = |block: &str, name: &str| {
        let line = block.lines().find(|l| l.split(':').next().is_some_and(|key| key.trim() == name))?;
        line.split(':').nth(1).map(|v| v.trim().to_owned())
    };
    let core = |block: &str| Some((field(block, "physical id")?, field(block, "core id")?));
    cpuinfo.split("\n\n").filter_map(core).collect::<HashSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hyper_threads_are_not_cores() {
        let cpu = |n: u32, core: u32| {
            format!("processor\t: {n}\nphysical id\t: 0\nmodel name\t: x: y\ncore id\t\t: {core}\n\n")
        };
        assert_eq!(physical_cores(&[cpu(0, 0), cpu(1, 1), cpu(2, 0), cpu(3, 1)].concat()), 2);
        assert_eq!(physical_cores("processor : 0\n\nprocessor : 1\n"), 0);
    }
}
