//! Results for people, on the terminal.

use super::{
    figures::{Figures, Percentiles},
    metrics,
    results::{Point, Results},
    server::ServerFigures,
};
use crate::{cli::output, telemetry};

/// A number of milliseconds, or `-`.
pub(super) fn ms(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| if v < 10.0 { format!("{v:.2}") } else { format!("{v:.1}") })
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// What times there are, with their names.
pub(super) fn times(figures: &Figures) -> Vec<(&'static str, Percentiles)> {
    let all = [
        ("first token", figures.ttft_ms),
        ("between tokens", figures.itl_ms),
        ("between chunks", figures.pause_ms),
        ("whole request", figures.latency_ms),
        ("server: queue", figures.queue_ms),
        ("server: prefill", figures.prefill_ms),
        ("client: sent late", figures.lag_ms),
    ];
    all.into_iter().filter_map(|(name, p)| Some((name, p?))).collect()
}

pub(super) const TIMES: [&str; 8] = ["ms", "COUNT", "MEAN", "P50", "P90", "P95", "P99", "MAX"];

/// The cells of [`TIMES`].
pub(super) fn time_row(name: &str, p: &Percentiles) -> Vec<String> {
    let numbers = [p.mean, p.p50, p.p90, p.p95, p.p99, p.max].map(|v| ms(Some(v)));
    [name.to_owned(), p.count.to_string()].into_iter().chain(numbers).collect()
}

pub(super) const SHORT: [&str; 10] = [
    "REQUESTS",
    "FAILED",
    "REQUESTS/S",
    "TOKENS/S",
    "TTFT P50",
    "TTFT P99",
    "ITL P50",
    "ITL P99",
    "LATENCY P50",
    "LATENCY P99",
];

/// The cells of [`SHORT`].
pub(super) fn short_row(figures: &Figures) -> Vec<String> {
    let p50 = |p: Option<Percentiles>| ms(p.map(|p| p.p50));
    let p99 = |p: Option<Percentiles>| ms(p.map(|p| p.p99));
    vec![
        figures.requests.to_string(),
        figures.failed.to_string(),
        format!("{:.2}", figures.requests_per_second),
        format!("{:.1}", figures.output_tokens_per_second),
        p50(figures.ttft_ms),
        p99(figures.ttft_ms),
        p50(figures.itl_ms),
        p99(figures.itl_ms),
        p50(figures.latency_ms),
        p99(figures.latency_ms),
    ]
}

/// Lines that say what a load came to.
pub(super) fn lines(point: &Point, results: &Results) -> Vec<String> {
    let all = &point.all;
    let not_sent = if all.shed > 0 { format!(" ({} of them not sent)", all.shed) } else { String::new() };
    let mut lines = vec![
        format!(
            "{}: {} requests in {:.1} s, {} succeeded, {} failed{not_sent}",
            point.load.describe(),
            all.requests,
            point.seconds,
            all.succeeded,
            all.failed
        ),
        format!(
            "{:.2} requests/s, {:.1} output tokens/s, {:.1} input tokens/s ({:.0} % from the prefix cache)",
            all.requests_per_second,
            all.output_tokens_per_second,
            all.input_tokens_per_second,
            100.0 * all.cached_tokens as f64 / all.input_tokens.max(1) as f64
        ),
    ];
    if let (Some(goodput), Some(slo)) = (all.goodput, results.slo) {
        let limits = [("first token", slo.ttft_ms), ("mean between tokens", slo.itl_ms)];
        let limits: Vec<String> =
            limits.into_iter().filter_map(|(name, limit)| Some(format!("{name} within {} ms", limit?))).collect();
        lines.push(format!(
            "goodput: {} of the requests, {:.2} requests/s ({})",
            percent(goodput.share),
            goodput.requests_per_second,
            limits.join(", ")
        ));
    }
    if point.interrupted {
        lines.push(format!("ended by a signal; {} requests were given up under way", point.cut));
    }
    if point.full {
        lines.push("ended early: no more requests are kept than these".to_owned());
    }
    lines
}

/// Lines about the server.
pub(super) fn server(figures: &ServerFigures) -> Vec<String> {
    let mut lines = vec![
        format!(
            "{} deltas found in memory, {} loaded{}, {} evicted",
            figures.hits,
            figures.misses,
            figures.hit_rate.map(|rate| format!(" (hit rate {})", percent(rate))).unwrap_or_default(),
            figures.evictions
        ),
        format!(
            "{} deltas resident, {} (at most {}) of {}; at most {} running, {} queued, {} cache positions",
            figures.resident,
            output::bytes(figures.resident_bytes),
            output::bytes(figures.peak_resident_bytes),
            output::bytes(figures.budget_bytes),
            figures.peak_running,
            figures.peak_queued,
            figures.peak_kv_positions
        ),
    ];
    let values = &figures.metrics;
    let means = [
        ("load of a delta", telemetry::names::LOAD_SECONDS, 1e3, " ms"),
        ("step", "deltaserve_step_seconds", 1e3, " ms"),
        ("rows of a step", "deltaserve_batch_rows", 1.0, ""),
        ("deltas of a step", "deltaserve_step_distinct_deltas", 1.0, ""),
    ];
    let mut parts: Vec<String> = means
        .into_iter()
        .filter_map(|(name, metric, factor, unit)| Some((name, metrics::mean(values, metric)? * factor, unit)))
        .map(|(name, mean, unit)| format!("{name} {mean:.2}{unit}"))
        .collect();
    parts.extend(metrics::total(values, "deltaserve_preemptions_total").map(|n| format!("{n} preemptions")));
    if !parts.is_empty() {
        lines.push(format!("means: {}", parts.join(", ")));
    }
    let memory = |name| metrics::total(values, name).map(|bytes| output::bytes(bytes as u64));
    if let Some(now) = memory(telemetry::names::PROCESS_BYTES) {
        let peak = memory(telemetry::names::PROCESS_PEAK_BYTES).unwrap_or_else(|| "?".to_owned());
        lines.push(format!("the server's process: {now} at the end, {peak} at most since its start"));
    }
    lines
}

/// Prints a load's results.
pub(super) fn point(point: &Point, results: &Results) -> anyhow::Result<()> {
    lines(point, results).iter().try_for_each(|l| output::line(l))?;
    for f in &point.failures {
        output::line(&format!("  {} x {}: {} {}", f.count, f.op.name(), f.code, f.reason))?;
    }
    let rows: Vec<Vec<String>> = times(&point.all).iter().map(|(name, p)| time_row(name, p)).collect();
    if !rows.is_empty() {
        output::table(&TIMES, &rows)?;
    }
    if point.by_op.len() > 1 {
        parts("OPERATION", point.by_op.iter().map(|(op, f)| (op.name(), f)))?;
    }
    if point.by_kind.len() > 1 {
        parts("KIND OF DELTA", point.by_kind.iter().map(|(kind, f)| (kind.as_str(), f)))?;
    }
    match &point.server {
        Some(figures) => server(figures).iter().try_for_each(|l| output::line(l)),
        None => Ok(()),
    }
}

fn parts<'a>(what: &str, parts: impl Iterator<Item = (&'a str, &'a Figures)>) -> anyhow::Result<()> {
    let headings: Vec<&str> = std::iter::once(what).chain(SHORT).collect();
    let row = |(name, figures): (&str, &Figures)| {
        std::iter::once(name.to_owned()).chain(short_row(figures)).collect::<Vec<_>>()
    };
    output::table(&headings, &parts.map(row).collect::<Vec<_>>())
}

/// Prints a sweep's loads, one a line.
pub(super) fn sweep(results: &Results) -> anyhow::Result<()> {
    let (headings, rows) = sweep_table(results);
    output::table(&headings, &rows)
}

/// Headings and rows of a sweep.
pub(super) fn sweep_table(results: &Results) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let goodput = results.slo.is_some();
    let headings = std::iter::once("LOAD").chain(SHORT).chain(goodput.then_some("GOODPUT")).collect();
    let row = |point: &Point| {
        let mut row = vec![point.load.describe()];
        row.extend(short_row(&point.all));
        if goodput {
            row.push(point.all.goodput.map_or_else(|| "-".to_owned(), |g| percent(g.share)));
        }
        row
    };
    (headings, results.points.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::results::tests::results;

    #[test]
    fn what_a_load_came_to_is_said_in_words() {
        let all = results(2.5);
        let said = lines(&all.points[0], &all).join("\n");
        for part in
            ["open loop, 2.5 requests/s: 40 requests in 5.0 s", "8.00 requests/s", "goodput: 52.5 %", "within 70.5 ms"]
        {
            assert!(said.contains(part), "{part}: {said}");
        }
        let (headings, rows) = sweep_table(&all);
        assert!(rows.iter().all(|row| row.len() == headings.len()) && headings.last() == Some(&"GOODPUT"));
        assert_eq!(time_row("x", &all.points[0].all.latency_ms.expect("times")).len(), TIMES.len());
    }

    #[test]
    fn the_server_is_told_with_what_its_metrics_have() {
        let mut figures = ServerFigures { hits: 3, misses: 1, hit_rate: Some(0.75), ..ServerFigures::default() };
        assert!(server(&figures)[0].contains("hit rate 75.0 %"));
        assert_eq!(server(&figures).len(), 2);
        let metrics = [
            ("deltaserve_delta_load_seconds_sum", 0.5),
            ("deltaserve_delta_load_seconds_count", 4.0),
            (telemetry::names::PROCESS_BYTES, 2048.0),
        ];
        figures.metrics = metrics.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let said = server(&figures).join("\n");
        assert!(said.contains("load of a delta 125.00 ms") && said.contains("2.0 KiB at the end"), "{said}");
    }
}
