//! The report of `bench`: one HTML page with tables and plots in it, which loads nothing.

use std::{fmt::Write as _, path::Path};

use anyhow::Context as _;
use serde_json::Value;

use super::{
    figures::{Figures, Percentiles},
    results::{Bucket, Point, Results},
    show,
};
use crate::cli::{
    chart::{Chart, Series},
    files,
};

/// Deltas that a table lists.
const LISTED: usize = 50;
/// The shortest time that is drawn, in milliseconds: an axis of factors has no 0.
const SHORTEST: f64 = 0.01;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}\
    table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}\
    th,td{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}\
    th:first-child,td:first-child{text-align:left}h2{margin-top:2.5rem;border-top:2px solid #ddd;padding-top:1rem}\
    svg{max-width:100%;height:auto}pre{background:#f5f5f5;padding:1rem;overflow-x:auto}";

/// Writes `index.html` into a folder.
///
/// # Errors
/// A folder or file that cannot be written.
pub(super) async fn write(results: &Results, dir: &Path) -> anyhow::Result<()> {
    let page = page(results)?;
    let path = dir.join("index.html");
    files::blocking(move || std::fs::write(&path, page).with_context(|| format!("write {}", path.display()))).await
}

/// Text that stands for itself in HTML, also between quotes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            _ => out.push(c),
        }
    }
    out
}

fn page(results: &Results) -> anyhow::Result<String> {
    let base = results.server.get("base");
    let word = |of: Option<&Value>, name: &str| match of.and_then(|v| v.get(name)) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => "?".to_owned(),
    };
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>deltaserve bench</title><style>{STYLE}</style>\
         </head><body>\n<h1>deltaserve bench</h1>\n"
    );
    let about = format!(
        "Base {} ({}, {} parameters, {} on {}), served by deltaserve {}; measured by the client of deltaserve {}. {} deltas of \
         {} tenants. Times are by the client's clock; of an open loop, from when a request was to be sent.",
        word(base, "name"),
        word(base, "family"),
        word(base, "parameters"),
        word(base, "dtype"),
        word(base, "device"),
        word(Some(&results.server), "version"),
        results.client,
        results.targets.len(),
        results.tenants.len(),
    );
    writeln!(out, "<p>{}</p>", escape(&about))?;
    if results.points.len() > 1 {
        out += &sweep(results)?;
    }
    for point in &results.points {
        out += &section(point, results)?;
    }
    let options = serde_json::to_string_pretty(&results.options)?;
    writeln!(out, "<h2>Options</h2>\n<pre>{}</pre>\n</body></html>", escape(&options))?;
    Ok(out)
}

fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: Vec<&str>| -> String {
        cells.into_iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
    };
    let mut out = format!("<table><tr>{}</tr>\n", cells("th", headings.to_vec()));
    for row in rows {
        out += &format!("<tr>{}</tr>\n", cells("td", row.iter().map(String::as_str).collect()));
    }
    out + "</table>\n"
}

/// The chart, if there is something to draw.
fn chart(chart: &Chart<'_>, series: Vec<Series>) -> anyhow::Result<String> {
    let series: Vec<Series> = series.into_iter().filter(|s| !s.points.is_empty()).collect();
    if series.is_empty() {
        return Ok(String::new());
    }
    Ok(format!("<figure>{}</figure>\n", chart.svg(&series)?))
}

fn line(name: &str, points: impl Iterator<Item = (f64, f64)>) -> Series {
    Series { name: name.to_owned(), points: points.collect() }
}

/// The table of all loads, and latency against throughput.
fn sweep(results: &Results) -> anyhow::Result<String> {
    let (headings, rows) = show::sweep_table(results);
    let mut out = format!("<h2>All loads</h2>\n{}", table(&headings, &rows));
    let of = |name: &str, time: fn(&Figures) -> Option<Percentiles>, part: fn(&Percentiles) -> f64| {
        let at = |p: &Point| Some((p.all.requests_per_second, part(&time(&p.all)?)));
        line(name, results.points.iter().filter_map(at))
    };
    let series = vec![
        of("first token, p50", |f| f.ttft_ms, |p| p.p50),
        of("first token, p99", |f| f.ttft_ms, |p| p.p99),
        of("whole request, p50", |f| f.latency_ms, |p| p.p50),
        of("whole request, p99", |f| f.latency_ms, |p| p.p99),
    ];
    let title = "Latency against throughput";
    let axes = Chart { title, x: "requests/s that succeeded", y: "ms", log_x: false, from_zero: true };
    out += &chart(&axes, series)?;
    let between =
        vec![of("between tokens, p50", |f| f.itl_ms, |p| p.p50), of("between tokens, p99", |f| f.itl_ms, |p| p.p99)];
    out += &chart(&Chart { title: "Time between tokens against throughput", ..axes }, between)?;
    Ok(out)
}

fn section(point: &Point, results: &Results) -> anyhow::Result<String> {
    let mut out = format!("<h2>{}</h2>\n", escape(&point.load.describe()));
    for said in show::lines(point, results) {
        writeln!(out, "<p>{}</p>", escape(&said))?;
    }
    let rows: Vec<Vec<String>> = show::times(&point.all).iter().map(|(name, p)| show::time_row(name, p)).collect();
    out += &table(&show::TIMES, &rows);
    out += &over_time(&point.course)?;
    out += &distributions(point)?;
    out += &popularity(point, results)?;
    out += &parts("Operation", point.by_op.iter().map(|(op, f)| (op.name(), f)));
    out += &parts("Kind of delta", point.by_kind.iter().map(|(kind, f)| (kind.as_str(), f)));
    out += &errors(point)?;
    if let Some(figures) = &point.server {
        out += "<h3>Server</h3>\n";
        for said in show::server(figures) {
            writeln!(out, "<p>{}</p>", escape(&said))?;
        }
        if !figures.metrics.is_empty() {
            let row = |(name, value): (&String, &f64)| vec![name.clone(), format!("{value}")];
            let rows: Vec<Vec<String>> = figures.metrics.iter().map(row).collect();
            let table = table(&["metric", "growth, or value at the end"], &rows);
            writeln!(out, "<details><summary>Metrics</summary>{table}</details>")?;
        }
    }
    Ok(out)
}

fn over_time(course: &[Bucket]) -> anyhow::Result<String> {
    let per_second = |of: fn(&Bucket) -> u64| {
        course.iter().filter(|b| b.seconds > 0.0).map(move |b| (b.at, of(b) as f64 / b.seconds))
    };
    let axes = |title, y| Chart { title, x: "seconds after the warm-up", y, log_x: false, from_zero: true };
    let time = |name: &str, of: fn(&Bucket) -> Option<f64>| {
        line(name, course.iter().filter_map(move |b| Some((b.at, of(b)?))))
    };
    let mut requests = vec![line("succeeded", per_second(|b| b.succeeded))];
    if course.iter().any(|b| b.failed > 0) {
        requests.push(line("failed", per_second(|b| b.failed)));
    }
    let tokens = match course.iter().any(|b| b.output_tokens > 0) {
        true => vec![line("output tokens", per_second(|b| b.output_tokens))],
        false => vec![],
    };
    let times = vec![
        time("first token, p50", |b| b.ttft_ms.map(|p| p.p50)),
        time("first token, p95", |b| b.ttft_ms.map(|p| p.p95)),
        time("whole request, p50", |b| b.latency_ms.map(|p| p.p50)),
        time("whole request, p95", |b| b.latency_ms.map(|p| p.p95)),
    ];
    Ok([
        chart(&axes("Requests over time", "requests/s that ended"), requests)?,
        chart(&axes("Tokens over time", "tokens/s"), tokens)?,
        chart(&axes("Latency over time", "ms, of requests that ended"), times)?,
    ]
    .concat())
}

fn distributions(point: &Point) -> anyhow::Result<String> {
    let one = |title: &str, steps: &[f64]| {
        let last = steps.len().saturating_sub(1).max(1) as f64;
        let points = steps.iter().enumerate().map(|(i, ms)| (ms.max(SHORTEST), i as f64 / last));
        let axes = Chart { title, x: "ms", y: "share at or below", log_x: true, from_zero: true };
        chart(&axes, vec![line(title, points)])
    };
    let d = &point.distributions;
    Ok([
        one("Time to the first token", &d.ttft_ms)?,
        one("Time between tokens", &d.itl_ms)?,
        one("Time of the whole request", &d.latency_ms)?,
    ]
    .concat())
}

fn popularity(point: &Point, results: &Results) -> anyhow::Result<String> {
    if point.by_delta.is_empty() {
        return Ok(String::new());
    }
    let of = |name: &str, value: fn(&super::results::DeltaFigures) -> Option<f64>| {
        line(name, point.by_delta.iter().filter_map(move |d| Some((d.rank as f64, value(d)?))))
    };
    let title = "Latency by popularity of the delta";
    let axes = Chart { title, x: "rank, 1 = most popular", y: "ms", log_x: point.by_delta.len() > 20, from_zero: true };
    let series = vec![
        of("first token, p50", |d| d.ttft_ms.map(|p| p.p50)),
        of("first token, p95", |d| d.ttft_ms.map(|p| p.p95)),
        of("whole request, p50", |d| d.latency_ms.map(|p| p.p50)),
        of("whole request, p95", |d| d.latency_ms.map(|p| p.p95)),
    ];
    let row = |d: &super::results::DeltaFigures| {
        let target = results.targets.get(d.rank - 1);
        let text =
            |of: fn(&super::targets::Target) -> &String| target.map_or_else(|| "?".to_owned(), |t| of(t).clone());
        vec![
            text(|t| &t.delta),
            d.rank.to_string(),
            text(|t| &t.tenant),
            text(|t| &t.kind),
            d.requests.to_string(),
            d.failed.to_string(),
            show::ms(d.ttft_ms.map(|p| p.p50)),
            show::ms(d.latency_ms.map(|p| p.p50)),
            show::ms(d.latency_ms.map(|p| p.p95)),
        ]
    };
    let rows: Vec<Vec<String>> = point.by_delta.iter().take(LISTED).map(row).collect();
    let headings =
        ["delta", "rank", "tenant", "kind", "requests", "failed", "first token p50", "request p50", "request p95"];
    let more = match point.by_delta.len().saturating_sub(LISTED) {
        0 => String::new(),
        more => format!("<p>And {more} more.</p>\n"),
    };
    Ok(format!("{}{}{more}", chart(&axes, series)?, table(&headings, &rows)))
}

fn parts<'a>(what: &str, parts: impl Iterator<Item = (&'a str, &'a Figures)>) -> String {
    let rows: Vec<Vec<String>> =
        parts.map(|(name, f)| std::iter::once(name.to_owned()).chain(show::short_row(f)).collect()).collect();
    let headings: Vec<&str> = std::iter::once(what).chain(show::SHORT).collect();
    if rows.len() > 1 { table(&headings, &rows) } else { String::new() }
}

fn errors(point: &Point) -> anyhow::Result<String> {
    if point.failures.is_empty() {
        return Ok("<h3>Errors</h3>\n<p>None.</p>\n".to_owned());
    }
    let row = |f: &super::results::FailureCount| {
        vec![f.reason.clone(), f.code.clone(), f.op.name().to_owned(), f.count.to_string()]
    };
    let rows: Vec<Vec<String>> = point.failures.iter().map(row).collect();
    Ok(format!("<h3>Errors</h3>\n{}", table(&["reason", "code", "operation", "requests"], &rows)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::results::tests::results;

    #[test]
    fn what_is_markup_is_shown_as_text() {
        assert_eq!(escape("a <b> & \"c\" 'd' é"), "a &lt;b&gt; &amp; &quot;c&quot; &#39;d&#39; é");
        assert_eq!(escape("&lt;"), "&amp;lt;");
        let mut all = results(1.0);
        all.targets[0].delta = "<img src=x onerror=alert(1)>".into();
        all.options = serde_json::json!({"prompt": "</pre><script>alert(2)</script>"});
        let page = page(&all).expect("a page");
        for markup in ["<script", "<img", "<b>", "onerror=alert(1)>"] {
            assert!(!page.contains(markup), "{markup}");
        }
        assert!(page.contains("&lt;b&gt;DRAINING") && page.contains("&lt;script&gt;alert(1)"));
    }

    #[test]
    fn a_page_has_its_plots_and_tables_and_loads_nothing() {
        let mut all = results(1.0);
        let single = page(&all).expect("a page");
        for part in [
            "Requests over time",
            "Tokens over time",
            "Latency over time",
            "Time of the whole request",
            "by popularity",
        ] {
            assert!(single.contains(part), "{part}");
        }
        // nothing was between tokens in these results
        assert!(!single.contains("Time between tokens") && !single.contains("All loads"));
        assert_eq!(single.matches("<svg").count(), single.matches("</svg>").count());
        for outside in ["src=", "href=", "@import", "url("] {
            assert!(!single.contains(outside), "{outside}");
        }
        all.points.extend(results(3.0).points);
        let sweep = page(&all).expect("a page");
        assert!(sweep.contains("All loads") && sweep.contains("Latency against throughput"));
        assert!(sweep.matches("<svg").count() > 2 * single.matches("<svg").count());
    }
}
