//! What the commands that work through a file share: reading it, writing the output as a whole or not at all, progress, and
//! patience with a server that is busy.

use std::{
    future::Future,
    io::{BufWriter, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use tonic::Status;
use tonic_types::StatusExt as _;

use super::output;

/// A server that is busy with others is asked again for this long.
const PATIENCE: Duration = Duration::from_secs(120);

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

/// The bytes of a file; `-` = standard input.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path.as_os_str() != "-" {
        return std::fs::read(path).with_context(|| format!("read {}", path.display()));
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("read standard input")?;
    Ok(bytes)
}

/// The parser's words; its own line number is that of this line alone.
pub(super) fn not_json(e: serde_json::Error) -> String {
    let (what, column) = (e.to_string(), e.column());
    let what = what.rsplit_once(" at line").map_or(what.as_str(), |(what, _)| what);
    format!("is not JSON: {what} at column {column}")
}

/// Asks until the server is not too busy to answer, a little later each time.
pub(super) async fn while_busy<T, F: Future<Output = Result<T, Status>>>(ask: impl Fn() -> F) -> Result<T, Status> {
    let busy = |status: &Status| status.get_details_error_info().is_some_and(|info| info.reason == "OVERLOADED");
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
}
