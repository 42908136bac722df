//! What the commands that work through a file share: reading its rows, writing the output as a whole or not at all, progress,
//! patience with a server that is busy, and the figures at the end.

use std::{
    future::Future,
    io::{BufWriter, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Map, Value};
use tonic::Status;
use tonic_types::StatusExt as _;

use super::output;

/// A server that is busy with others is asked again for this long.
const PATIENCE: Duration = Duration::from_secs(120);
/// Problems that an error lists.
const SHOWN: usize = 10;

/// Where the rows go: a file is written beside its place and moved there when it is whole.
pub(super) struct Target {
    pub(super) to: BufWriter<Box<dyn Write + Send>>,
    /// What is written, and where it belongs.
    part: Option<(PathBuf, PathBuf)>,
}

impl Target {
    pub(super) fn open(path: &Path, to_stdout: bool) -> anyhow::Result<Self> {
        if to_stdout {
            return Ok(Self { to: BufWriter::new(Box::new(std::io::stdout())), part: None });
        }
        // a pipe or a device is written to as it is
        let special = std::fs::metadata(path).is_ok_and(|m| !m.is_file());
        let place = if special {
            path.to_owned()
        } else {
            let name = path.file_name().with_context(|| format!("--out {} names no file", path.display()))?;
            path.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()))
        };
        let open = std::fs::OpenOptions::new().write(true).create(!special).truncate(!special).open(&place);
        let file = open.with_context(|| format!("create {}", place.display()))?;
        let part = (!special).then(|| (place, path.to_owned()));
        Ok(Self { to: BufWriter::new(Box::new(file)), part })
    }

    /// Rows that nobody wants.
    pub(super) fn nowhere() -> Self {
        Self { to: BufWriter::new(Box::new(std::io::sink())), part: None }
    }

    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        self.to.flush()?;
        if let Some((part, path)) = &self.part {
            std::fs::rename(part, path).with_context(|| format!("move the rows to {}", path.display()))?;
        }
        self.part = None;
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some((part, _)) = &self.part {
            // best effort: the rows of a call that failed are of no use
            let _ = std::fs::remove_file(part);
        }
    }
}

/// Does what may take long on a thread that may wait.
///
/// # Errors
/// Those of `work`.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("work beside the runtime ended early")?
}

/// The bytes of a file; `-` = standard input.
pub(super) async fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let path = path.to_owned();
    let read = move || {
        if path.as_os_str() != "-" {
            return std::fs::read(&path).with_context(|| format!("read {}", path.display()));
        }
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("read standard input")?;
        Ok(bytes)
    };
    blocking(read).await
}

/// Reads the rows of a JSON Lines file; blank lines are skipped. `row` gets a line's number, from 1, and its fields in order.
///
/// # Errors
/// Every bad line, by number.
pub(super) fn rows<R>(
    bytes: &[u8],
    row: impl Fn(usize, Map<String, Value>) -> Result<R, String>,
) -> anyhow::Result<Vec<R>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let (mut rows, mut problems) = (Vec::new(), Vec::new());
    for (i, line) in bytes.split(|b| *b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        match fields(line).and_then(|fields| row(i + 1, fields)) {
            Ok(row) => rows.push(row),
            Err(problem) => problems.push(format!("line {}: {problem}", i + 1)),
        }
    }
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!("\nand {more} more") } else { String::new() };
        problems.truncate(SHOWN);
        bail!("nothing was sent:\n{}{more}", problems.join("\n"));
    }
    Ok(rows)
}

/// The fields of one line.
fn fields(line: &[u8]) -> Result<Map<String, Value>, String> {
    let text = std::str::from_utf8(line).map_err(|e| format!("is not UTF-8 from byte {}", e.valid_up_to()))?;
    match serde_json::from_str(text).map_err(not_json)? {
        Value::Object(fields) => Ok(fields),
        _ => Err("is not a JSON object".to_owned()),
    }
}

/// The parser's words; its own line number is that of this line alone.
fn not_json(e: serde_json::Error) -> String {
    let (what, column) = (e.to_string(), e.column());
    let what = what.rsplit_once(" at line").map_or(what.as_str(), |(what, _)| what);
    format!("is not JSON: {what} at column {column}")
}

/// The strings of a list under `field`.
///
/// # Errors
/// What is no string, by its index.
pub(super) fn strings(field: &str, list: &[Value]) -> Result<Vec<String>, String> {
    let text =
        |(i, v): (usize, &Value)| v.as_str().map(str::to_owned).ok_or_else(|| format!("{field}[{i}] is not a string"));
    list.iter().enumerate().map(text).collect()
}

/// Asks until the server is not too busy to answer, a little later each time.
pub(super) async fn while_busy<T, F: Future<Output = Result<T, Status>>>(ask: impl Fn() -> F) -> Result<T, Status> {
    let reasons = ["OVERLOADED", "TENANT_CONCURRENCY", "TENANT_RATE"];
    let busy = |status: &Status| status.get_details_error_info().is_some_and(|i| reasons.contains(&i.reason.as_str()));
    let (start, mut pause) = (Instant::now(), Duration::from_millis(20));
    loop {
        match ask().await {
            Err(status) if busy(&status) && start.elapsed() < PATIENCE => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            answer => return answer,
        }
    }
}

/// A bar on a terminal, else a line now and then; on standard error.
pub(super) struct Progress {
    bar: ProgressBar,
    total: u64,
    done: u64,
    said: Instant,
}

impl Progress {
    pub(super) fn new(total: u64) -> Self {
        let template = "[{bar:32}] {pos}/{len}  {per_sec}  eta {eta}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total).with_style(style.progress_chars("=> "));
        Self { bar, total, done: 0, said: Instant::now() }
    }

    pub(super) fn advance(&mut self, rows: u64) {
        self.done += rows;
        self.bar.set_position(self.done);
        if self.bar.is_hidden() && self.said.elapsed() >= Duration::from_secs(5) {
            self.said = Instant::now();
            output::note(&format!("{}/{} rows", self.done, self.total));
        }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// The lines that say what a file came to. As JSON, one object of `counts` and the figures. For people, `summary` with each
/// remark whose number is not 0, and a line per figure.
///
/// # Errors
/// Counts that are no JSON.
pub(super) fn figures(
    json: bool,
    counts: &impl Serialize,
    summary: &str,
    remarks: &[(u64, &str)],
    figures: &[(&str, f64)],
) -> anyhow::Result<Vec<String>> {
    if json {
        let mut value = serde_json::to_value(counts)?;
        if let Some(object) = value.as_object_mut() {
            object.extend(figures.iter().map(|(name, x)| ((*name).to_owned(), Value::from(*x))));
        }
        return Ok(vec![value.to_string()]);
    }
    let remarks: String = remarks.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!(", {n} {what}")).collect();
    let lines = figures.iter().map(|(name, x)| format!("{name:<16} {x:.4}"));
    Ok(std::iter::once(format!("{summary}{remarks}")).chain(lines).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_whole_or_as_it_was() -> anyhow::Result<()> {
        let dir = std::env::temp_dir().join(format!("deltaserve-files-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let path = dir.join("out.jsonl");
        std::fs::write(&path, "before")?;
        let names = || std::fs::read_dir(&dir).map(|all| all.count());
        let mut fails = Target::open(&path, false)?;
        writeln!(fails.to, "half")?;
        fails.to.flush()?;
        assert_eq!(std::fs::read_to_string(&path)?, "before");
        drop(fails);
        assert_eq!((std::fs::read_to_string(&path)?.as_str(), names()?), ("before", 1));
        let mut whole = Target::open(&path, false)?;
        writeln!(whole.to, "all")?;
        whole.finish()?;
        assert_eq!((std::fs::read_to_string(&path)?.as_str(), names()?), ("all\n", 1));
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }
    #[test]
    fn rows_come_with_their_numbers_and_every_bad_line_is_named() {
        let numbered =
            |text: &[u8]| rows(text, |n, fields| Ok((n, fields.keys().cloned().collect::<Vec<_>>().join(" "))));
        let good = numbered(b"\xef\xbb\xbf{\"b\":1,\"a\":2}\r\n\n  \n{}").unwrap();
        assert_eq!(good, [(1, "b a".to_owned()), (4, String::new())]);
        let bad = numbered(b"{}\nnonsense\n[]\n{\"a\":\"\xff\"}").unwrap_err().to_string();
        assert!(bad.starts_with("nothing was sent:\nline 2: is not JSON: expected ident at column 2\n"), "{bad}");
        assert!(bad.contains("\nline 3: is not a JSON object\nline 4: is not UTF-8 from byte 6"), "{bad}");
        let many = rows("{}\n".repeat(SHOWN + 2).as_bytes(), |_, _| Err::<(), _>("is bad".to_owned()));
        let many = many.unwrap_err().to_string();
        assert!(many.contains("line 10: is bad\nand 2 more") && !many.contains("line 11"), "{many}");
        assert_eq!(strings("x", &[Value::from("a"), Value::Null]).unwrap_err(), "x[1] is not a string");
    }

    #[test]
    fn figures_are_one_object_or_a_line_each() -> anyhow::Result<()> {
        let counts = serde_json::json!({"rows": 3});
        let said = |json, all: &[(&str, f64)]| figures(json, &counts, "3 rows", &[(0, "cut"), (2, "empty")], all);
        assert_eq!(said(true, &[("bleu", 1.5)])?, [r#"{"rows":3,"bleu":1.5}"#]);
        assert_eq!(said(false, &[("bleu", 1.5)])?, ["3 rows, 2 empty", "bleu             1.5000"]);
        assert_eq!(said(true, &[])?, [r#"{"rows":3}"#]);
        Ok(())
    }
}
