//! Whole models that jobs of full fine-tuning made: their files as a stream, and the memory that such a job has.

use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use tokio::{fs::File, io::AsyncReadExt as _};

use super::{
    params::ServeError,
    service::{Pieces, Service},
    train_params::ModelResult,
};
use crate::ids::TenantId;

/// Bytes of a piece of a file.
const PIECE: usize = 256 * 1024;

/// A piece of a file: its name, and the next bytes.
pub type FilePiece = (String, Bytes);

impl Service {
    /// What a job's full fine-tuning made, and its files in pieces, one file after the other.
    ///
    /// # Errors
    /// An unknown job or another tenant's; one that made no model; a folder that was removed.
    pub async fn download_model(
        &self,
        tenant: &TenantId,
        id: &str,
    ) -> Result<(ModelResult, Pieces<FilePiece>), ServeError> {
        let job = self.get_job(tenant, id).await?;
        let gone = || ServeError::NotFound { kind: "model of job", name: id.to_owned() };
        let model = job.result.and_then(|r| r.model).ok_or_else(gone)?;
        let folder = self.parts().models.join(&job.id);
        let mut entries = tokio::fs::read_dir(&folder).await.map_err(|_| gone())?;
        let mut files: Vec<(String, PathBuf)> = Vec::new();
        while let Some(entry) = entries.next_entry().await.map_err(|e| unreadable(&job.id, &e))? {
            files.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
        files.sort();
        let job = job.id;
        let pieces = stream::iter(files).flat_map(move |(name, path)| file(job.clone(), name, path));
        Ok((model, pieces.boxed()))
    }
}

fn unreadable(job: &str, e: &std::io::Error) -> ServeError {
    ServeError::Internal(format!("the model of job {job} cannot be read: {e}"))
}

/// A file in pieces; an empty file is one empty piece.
fn file(job: String, name: String, path: PathBuf) -> Pieces<FilePiece> {
    enum At {
        Closed(PathBuf),
        Open(File),
        End,
    }
    let next = move |at: At| {
        let (job, name) = (job.clone(), name.clone());
        async move {
            let read = async {
                let (mut file, first) = match at {
                    At::Closed(path) => (File::open(path).await?, true),
                    At::Open(file) => (file, false),
                    At::End => return Ok(None),
                };
                let mut piece = BytesMut::with_capacity(PIECE);
                while piece.len() < PIECE && file.read_buf(&mut piece).await? > 0 {}
                let empty = piece.is_empty();
                Ok((!empty || first).then(|| (piece.freeze(), if empty { At::End } else { At::Open(file) })))
            };
            match read.await {
                Ok(piece) => piece.map(|(piece, at)| (Ok((name, piece)), at)),
                Err(e) => Some((Err(unreadable(&job, &e)), At::End)),
            }
        }
    };
    stream::unfold(At::Closed(path), next).boxed()
}

/// Bytes that a new job can have: what the system has free, within the control group's limit. Unknown on a GPU, and where
/// the system does not say.
pub(super) fn free_memory(on_cpu: bool) -> Option<u64> {
    if !on_cpu {
        return None;
    }
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    let group = |file: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse().ok()
    };
    // files that were read count as used there, though they give way
    let cached = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").ok().and_then(|text| inactive_file(&text));
    let used = group("memory.current").map(|used| used.saturating_sub(cached.unwrap_or(0)));
    let group = group("memory.max").zip(used).map(|(max, used)| max.saturating_sub(used));
    match (system, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// `inactive_file` of a control group's `memory.stat`, in bytes.
fn inactive_file(stat: &str) -> Option<u64> {
    stat.lines().find_map(|l| l.strip_prefix("inactive_file "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_in_bytes() {
        let text = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   12000000 kB\n";
        assert_eq!(available(text), Some(12_000_000 * 1024));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert!(free_memory(true).is_some_and(|b| b > 0) && free_memory(false).is_none());
    }

    #[tokio::test]
    async fn a_file_comes_whole_in_pieces_and_an_empty_one_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        for size in [0, 1, PIECE, PIECE + 1, 3 * PIECE] {
            let data: Vec<u8> = (0..size).map(|i| i as u8).collect();
            let path = dir.path().join("f");
            std::fs::write(&path, &data).unwrap();
            let pieces: Vec<FilePiece> = file("j".into(), "f".into(), path).map(Result::unwrap).collect().await;
            assert!(!pieces.is_empty() && pieces.iter().all(|(name, p)| name == "f" && p.len() <= 2 * PIECE));
            assert_eq!(pieces.iter().flat_map(|(_, p)| p.to_vec()).collect::<Vec<_>>(), data);
        }
        let gone = file("j".into(), "g".into(), dir.path().join("g")).next().await;
        assert!(matches!(gone, Some(Err(ServeError::Internal(_)))));
    }
}
