//! The thread that owns the audit log's file.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::PathBuf,
};

use metrics::counter;
use tokio::sync::{mpsc, oneshot};

use super::Item;
use crate::telemetry::names;

/// Most lines that one fsync is for.
const BATCH: usize = 256;

pub(super) struct Writer {
    path: PathBuf,
    file: Option<File>,
    /// The file may end within a line.
    torn: bool,
    /// The last attempt failed, and that was said.
    failing: bool,
}

impl Writer {
    /// Opens the file, and makes it if needed.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        let mut this = Self { path, file: None, torn: false, failing: false };
        this.reopen()?;
        Ok(this)
    }

    /// Writes what comes until the end.
    pub(super) fn run(mut self, mut items: mpsc::Receiver<Item>) {
        while let Some(first) = items.blocking_recv() {
            let (mut lines, mut waiting, mut n) = (String::new(), Vec::new(), 0);
            let mut end = None;
            let mut next = Some(first);
            while let Some(item) = next {
                match item {
                    Item::Line(line, done) => {
                        lines += &line;
                        waiting.extend(done);
                        n += 1;
                    }
                    Item::End(done) => end = Some(done),
                }
                next = if end.is_some() || n >= BATCH { None } else { items.try_recv().ok() };
            }
            if n > 0 {
                self.batch(&lines, n as u64, waiting);
            }
            if let Some(done) = end {
                // who asked may have left
                let _ = done.send(true);
                return;
            }
        }
    }

    fn batch(&mut self, lines: &str, n: u64, waiting: Vec<oneshot::Sender<bool>>) {
        let written = self.append(lines);
        match &written {
            Ok(()) => {
                counter!(names::AUDIT_EVENTS, "outcome" => "written").increment(n);
                self.failing = false;
            }
            Err(error) => {
                // those that are waited for are counted by who waits
                counter!(names::AUDIT_EVENTS, "outcome" => "lost").increment(n - (waiting.len() as u64).min(n));
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, "the audit log cannot be written");
                }
                self.file = None;
            }
        }
        for done in waiting {
            // a caller that has left does not ask
            let _ = done.send(written.is_ok());
        }
    }

    /// Appends lines, durably.
    fn append(&mut self, lines: &str) -> io::Result<()> {
        if !self.is_current() {
            self.reopen()?;
        }
        let Some(file) = &mut self.file else { return Err(io::ErrorKind::NotFound.into()) };
        if self.torn {
            file.write_all(b"\n")?;
        }
        self.torn = true;
        file.write_all(lines.as_bytes())?;
        self.torn = false;
        file.sync_data()
    }

    /// Whether the name still stands for the open file.
    fn is_current(&self) -> bool {
        let Some(file) = &self.file else { return false };
        match (file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(open), Ok(named)) => same_file(&open, &named),
            _ => false,
        }
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.file = None;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&self.path)?;
        self.torn = ends_within_a_line(&mut file)?;
        if let Some(folder) = self.path.parent() {
            // a new file's name must not be lost either; where a folder cannot be opened, its own sync is all there is
            let folder = if folder.as_os_str().is_empty() { std::path::Path::new(".") } else { folder };
            if let Ok(folder) = File::open(folder) {
                folder.sync_all()?;
            }
        }
        self.file = Some(file);
        Ok(())
    }
}

/// As after a crash or a full disk. What is no plain file has no end.
fn ends_within_a_line(file: &mut File) -> io::Result<bool> {
    let found = file.metadata()?;
    if !found.is_file() || found.len() == 0 {
        return Ok(false);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

#[cfg(unix)]
fn same_file(a: &std::fs::Metadata, b: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(_: &std::fs::Metadata, _: &std::fs::Metadata) -> bool {
    true
}
