//! How answers are printed: JSON for scripts, tables and lines for people.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is where the command line prints")]

use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::grpc::proto;

/// One JSON value on a line.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string(value)?)
}

/// A line on standard output.
pub(super) fn line(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(())
}

/// Text as it comes, at once.
pub(super) fn piece(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// A note on standard error.
pub(super) fn note(text: &str) {
    eprintln!("{text}");
}

/// Lines on standard output, or on standard error where standard output has something else.
pub(super) fn say(lines: &[String], to_stderr: bool) -> anyhow::Result<()> {
    if to_stderr {
        lines.iter().for_each(|text| note(text));
        return Ok(());
    }
    lines.iter().try_for_each(|text| line(text))
}

/// Whether someone looks at standard output.
pub(super) fn terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Rows under headings, columns aligned.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> anyhow::Result<()> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(headings.get(column).map(|h| h.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let print = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, &w)| format!("{cell:w$}")).collect();
        line(padded.join("  ").trim_end())
    };
    print(headings.to_vec())?;
    rows.iter().try_for_each(|row| print(row.iter().map(String::as_str).collect()))
}

/// `name@3 (1a2b3c4d5e6f)`, several as `a@1*0.7 + b@2*0.3 (1a2b3c4d5e6f)`, or `the bare base`.
pub(super) fn served_by(served: Option<&proto::ServedBy>) -> String {
    match served {
        Some(s) if !s.name.is_empty() => format!("{}@{} ({})", s.name, s.number, short(&s.id)),
        Some(s) if !s.parts.is_empty() => {
            let part = |p: &proto::ServedPart| format!("{}@{}*{}", p.name, p.number, p.weight);
            let parts: Vec<String> = s.parts.iter().map(part).collect();
            format!("{} ({})", parts.join(" + "), short(&s.id))
        }
        _ => "the bare base".to_owned(),
    }
}

/// Who served it, how many tokens, where the time went.
pub(super) fn summary(
    served: Option<&proto::ServedBy>,
    usage: Option<&proto::Usage>,
    timings: Option<&proto::Timings>,
) -> String {
    let (u, t) = (usage.copied().unwrap_or_default(), timings.copied().unwrap_or_default());
    let cached = if u.cached_tokens > 0 { format!(" ({} cached)", u.cached_tokens) } else { String::new() };
    let drafts = match (u.accepted_tokens, u.drafted_tokens) {
        (_, 0) => String::new(),
        (accepted, drafted) => format!(" ({accepted} of {drafted} guessed)"),
    };
    format!(
        "[{}; {}{cached} + {} tokens{drafts}; queue {:.1} ms, prefill {:.1} ms, decode {:.1} ms]",
        served_by(served),
        u.prompt_tokens,
        u.completion_tokens,
        t.queue_ms,
        t.prefill_ms,
        t.decode_ms
    )
}

/// The first digits of a digest.
pub(super) fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// Bytes for people.
pub(super) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// Time since a moment, for people.
pub(super) fn ago(unix_ms: i64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let then = u64::try_from(unix_ms / 1000).unwrap_or(0);
    match now.saturating_sub(then) {
        s if s < 120 => format!("{s} s ago"),
        s if s < 7200 => format!("{} min ago", s / 60),
        s if s < 172_800 => format!("{} h ago", s / 3600),
        s => format!("{} d ago", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_in_the_largest_fitting_unit() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }

    #[test]
    fn enums_have_names_in_json() -> Result<(), serde_json::Error> {
        let event = proto::JobEvent {
            seq: 1,
            time_ms: 2,
            body: Some(proto::job_event::Body::State(proto::StateChange { state: 2, ..Default::default() })),
        };
        let value = serde_json::to_value(&event)?;
        assert_eq!(value["state"]["state"], "running");
        assert_eq!(value["seq"], 1);
        Ok(())
    }
}
