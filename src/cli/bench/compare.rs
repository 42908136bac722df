//! `bench compare`: two result files side by side.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::Serialize;

use super::results::{Point, Results};
use crate::cli::{Common, files, output};

/// A figure of both.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Line {
    load: String,
    figure: String,
    a: Option<f64>,
    b: Option<f64>,
    /// `b` over `a`.
    ratio: Option<f64>,
}

/// Reads two files and prints their figures.
///
/// # Errors
/// Files that cannot be read; no load that both have.
pub(super) async fn run(common: &Common, a: &Path, b: &Path) -> anyhow::Result<()> {
    let (a, b) = (read(a).await?, read(b).await?);
    let (lines, alone) = compare(&a, &b);
    alone.iter().for_each(|load| output::note(&format!("only one of both has the load {load}")));
    ensure!(!lines.is_empty(), "the files have no load in common");
    if common.json {
        return lines.iter().try_for_each(output::json);
    }
    let mut loads: Vec<&str> = lines.iter().map(|l| l.load.as_str()).collect();
    loads.dedup();
    for load in loads {
        output::line(load)?;
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.3}"));
        let row = |l: &Line| vec![l.figure.clone(), number(l.a), number(l.b), number(l.ratio)];
        let rows: Vec<Vec<String>> = lines.iter().filter(|l| l.load == load).map(row).collect();
        output::table(&["FIGURE", "A", "B", "B/A"], &rows)?;
    }
    Ok(())
}

async fn read(path: &Path) -> anyhow::Result<Results> {
    let bytes = files::read(path).await?;
    Results::parse(&bytes).with_context(|| path.display().to_string())
}

/// The figures of the loads that both have (of the only load of each, whatever it is), and the loads that one of them has.
fn compare(a: &Results, b: &Results) -> (Vec<Line>, Vec<String>) {
    if let ([one], [other]) = (&a.points[..], &b.points[..]) {
        let load = match one.load == other.load {
            true => one.load.describe(),
            false => format!("{} against {}", other.load.describe(), one.load.describe()),
        };
        return (lines(&load, one, other), vec![]);
    }
    let (mut all, mut alone) = (Vec::new(), Vec::new());
    for one in &a.points {
        match b.points.iter().find(|other| other.load == one.load) {
            Some(other) => all.extend(lines(&one.load.describe(), one, other)),
            None => alone.push(one.load.describe()),
        }
    }
    let only_b = b.points.iter().filter(|other| !a.points.iter().any(|one| one.load == other.load));
    alone.extend(only_b.map(|other| other.load.describe()));
    (all, alone)
}

fn lines(load: &str, a: &Point, b: &Point) -> Vec<Line> {
    let line = |((figure, a), (_, b)): ((String, Option<f64>), (String, Option<f64>))| Line {
        load: load.to_owned(),
        figure,
        a,
        b,
        ratio: a.zip(b).filter(|(a, _)| *a != 0.0).map(|(a, b)| b / a),
    };
    let both = figures(a).into_iter().zip(figures(b)).map(line);
    both.filter(|l| l.a.is_some() || l.b.is_some()).collect()
}

/// The same names in the same order for every point.
fn figures(point: &Point) -> Vec<(String, Option<f64>)> {
    let f = &point.all;
    let mut all: Vec<(String, Option<f64>)> = [
        ("requests/s", Some(f.requests_per_second)),
        ("output tokens/s", Some(f.output_tokens_per_second)),
        ("input tokens/s", Some(f.input_tokens_per_second)),
        ("share of failures", Some(point.error_rate())),
        ("goodput, share", f.goodput.map(|g| g.share)),
        ("goodput, requests/s", f.goodput.map(|g| g.requests_per_second)),
        ("hit rate", point.server.as_ref().and_then(|s| s.hit_rate)),
        ("resident bytes, most", point.server.as_ref().map(|s| s.peak_resident_bytes as f64)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    for (name, p) in [("TTFT", f.ttft_ms), ("ITL", f.itl_ms), ("latency", f.latency_ms)] {
        let parts = [
            ("mean", p.map(|p| p.mean)),
            ("p50", p.map(|p| p.p50)),
            ("p95", p.map(|p| p.p95)),
            ("p99", p.map(|p| p.p99)),
        ];
        all.extend(parts.into_iter().map(|(part, value)| (format!("{name} {part}, ms"), value)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::results::tests::results;

    #[test]
    fn figures_of_the_second_are_set_over_those_of_the_first() {
        let a = results(1.0);
        let mut b = results(1.0);
        b.points[0].all.requests_per_second *= 1.5;
        b.points[0].all.ttft_ms = None;
        let (lines, alone) = compare(&a, &b);
        assert!(alone.is_empty());
        let find = |name: &str| lines.iter().find(|l| l.figure == name).expect(name);
        assert!((find("requests/s").ratio.expect("a ratio") - 1.5).abs() < 1e-12);
        assert_eq!((find("latency p99, ms").ratio, find("TTFT p50, ms").ratio), (Some(1.0), None));
        // nothing over nothing is no ratio, and what neither has is no line
        assert_eq!(find("share of failures").ratio, None);
        assert!(lines.iter().all(|l| !l.figure.starts_with("ITL")));
    }

    #[test]
    fn loads_are_paired_and_single_ones_are_always_a_pair() {
        let (a, b) = (results(1.0), results(2.0));
        let (lines, _) = compare(&a, &b);
        assert!(lines[0].load.contains("against"), "{}", lines[0].load);
        let mut sweep = results(1.0);
        sweep.points.extend(results(4.0).points);
        let mut other = results(4.0);
        other.points.extend(results(8.0).points);
        let (lines, alone) = compare(&sweep, &other);
        assert!(lines.iter().all(|l| l.load == "open loop, 4 requests/s") && !lines.is_empty());
        assert_eq!(alone, ["open loop, 1 requests/s", "open loop, 8 requests/s"]);
    }
}
