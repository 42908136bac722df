//! `bench`: a load generator. It speaks the public API like any other client.
//!
//! A closed loop has N callers, each of which sends its next request when the last is answered; an open loop sends at its own rate,
//! whether or not the server keeps up, and counts latency from when a request was to be sent, which is the honest way to measure
//! latency under load. `workload` draws what is random, `plan` makes requests of it, `drive` sends them, `call` measures each,
//! `record` keeps the measurements, `figures` and `results` sum them up, `show`, `report` and `compare` present them.

pub(super) mod call;
mod chunks;
mod compare;
mod drive;
pub(super) mod figures;
mod metrics;
mod options;
mod plan;
mod record;
mod report;
mod results;
mod server;
mod show;
mod targets;
mod texts;
mod workload;

use std::{sync::Arc, time::Instant};

use anyhow::{Context as _, bail, ensure};
use tokio_util::sync::CancellationToken;

pub(super) use self::options::BenchArgs;
use self::{
    drive::Phases,
    options::{BenchCommand, Load},
    plan::Plan,
    results::{Point, Results},
    server::Watch,
};
use super::{Common, files, output};
use crate::shutdown;

/// Puts load on a server and reports, or compares two reports.
///
/// # Errors
/// Options that cannot be used; a server that cannot be reached; files that cannot be written; at the end, no request that
/// succeeded, or more failures than are allowed.
pub(super) async fn run(common: &Common, args: BenchArgs) -> anyhow::Result<()> {
    if let Some(BenchCommand::Compare { a, b }) = &args.command {
        return compare::run(common, a, b).await;
    }
    let loads = args.loads()?;
    let plan = Arc::new(Plan::new(common, &args, &loads).await?);
    // what cannot be had at the end is told before the load
    if let Some(url) = &args.metrics {
        metrics::scrape(url).await?;
    }
    if let Some(dir) = args.report.clone() {
        let make = move || std::fs::create_dir_all(&dir).with_context(|| format!("--report: make {}", dir.display()));
        files::blocking(make).await?;
    }
    let mut results = Results::new(&plan, &args, args.slo())?;
    let stop = on_signal();
    for load in loads {
        if stop.is_cancelled() {
            break;
        }
        let point = one(&plan, load, &args, &stop).await?;
        results.points.push(point);
        if let (false, Some(point)) = (common.json, results.points.last()) {
            show::point(point, &results)?;
        }
    }
    if common.json {
        output::json(&results)?;
    } else if results.points.len() > 1 {
        show::sweep(&results)?;
    }
    if let Some(path) = args.out.clone() {
        let text = serde_json::to_string_pretty(&results)? + "\n";
        let write = move || std::fs::write(&path, text).with_context(|| format!("--out: write {}", path.display()));
        files::blocking(write).await?;
    }
    if let Some(dir) = &args.report {
        report::write(&results, dir).await?;
    }
    verdict(&results, args.max_error_rate)
}

/// One load from its warm-up to its last answer.
async fn one(plan: &Arc<Plan>, load: Load, args: &BenchArgs, stop: &CancellationToken) -> anyhow::Result<Point> {
    let phases = Phases::of(args)?;
    let extent = match (phases.duration, args.requests) {
        (Some(duration), _) => format!("{} s", duration.as_secs_f64()),
        (None, requests) => format!("{} requests", requests.unwrap_or(0)),
    };
    output::note(&format!("{}: {extent} after {} s of warm-up", load.describe(), args.warmup));
    let observer = plan.observer().context("no connection")?.clone();
    let watch = Watch::start(observer, args.metrics.clone(), phases.warmup).await;
    let measured = drive::drive(plan, load, args, Instant::now(), stop).await;
    let server = watch.finish().await;
    Ok(Point::new(load, plan, measured?, args.slo(), server))
}

/// Cancelled by ctrl-c or SIGTERM.
fn on_signal() -> CancellationToken {
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        match shutdown::signal().await {
            Ok(_) => told.cancel(),
            Err(error) => output::note(&format!("signals cannot be waited for ({error}): an early end has no report")),
        }
    });
    stop
}

/// Whether the loads were served as they had to be.
fn verdict(results: &Results, max_error_rate: Option<f64>) -> anyhow::Result<()> {
    let succeeded: u64 = results.points.iter().map(|p| p.all.succeeded).sum();
    ensure!(succeeded > 0, "no request succeeded");
    let over = |p: &&Point| max_error_rate.is_some_and(|most| p.error_rate() > most);
    if let Some(point) = results.points.iter().find(over) {
        let (failed, rate) = (point.all.failed, show::percent(point.error_rate()));
        bail!("{}: {failed} requests failed ({rate}), more than --max-error-rate allows", point.load.describe());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_fails_where_nothing_succeeded_or_too_much_failed() {
        let mut results = results::tests::results(1.0);
        results.points.extend(results::tests::results(2.0).points);
        assert!(verdict(&results, None).is_ok() && verdict(&results, Some(0.0)).is_ok());
        results.points[1].all.failed = 10;
        assert!(verdict(&results, None).is_ok() && verdict(&results, Some(0.25)).is_ok());
        let error = verdict(&results, Some(0.2)).expect_err("too many").to_string();
        assert!(error.contains("2 requests/s") && error.contains("25.0 %"), "{error}");
        results.points.iter_mut().for_each(|p| p.all.succeeded = 0);
        assert!(verdict(&results, None).expect_err("nothing").to_string().contains("no request succeeded"));
    }
}
