//! Whole models that jobs of full fine-tuning made: their files as a stream, and their removal.

use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use tokio::{fs::File, io::AsyncReadExt as _};

use super::{
    params::ServeError,
    service::{Pieces, Service},
    train_params::ModelResult,
    training::note_of,
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
        let gone = || no_model(id);
        let model = job.result.and_then(|r| r.model).ok_or_else(gone)?;
        let folder = self.parts().store.models().path(&job.id);
        let mut entries = tokio::fs::read_dir(&folder).await.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => gone(),
            _ => unreadable(&job.id, &e),
        })?;
        let mut files: Vec<(String, PathBuf)> = Vec::new();
        while let Some(entry) = entries.next_entry().await.map_err(|e| unreadable(&job.id, &e))? {
            files.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
        files.sort();
        let job = job.id;
        let pieces = stream::iter(files).flat_map(move |(name, path)| file(job.clone(), name, path));
        Ok((model, pieces.boxed()))
    }

    /// Removes what a job's full fine-tuning left in the data directory; the job's record stays.
    ///
    /// # Errors
    /// An unknown job or another tenant's; one that has not ended, made no model, or whose model was removed.
    pub async fn delete_model(&self, tenant: &TenantId, id: &str) -> Result<(), ServeError> {
        note_of(tenant, id);
        let job = self.get_job(tenant, id).await?;
        if !job.state.is_terminal() {
            return Err(no_model(id));
        }
        let removed = self.blocking(move |parts| Ok(parts.store.models().remove(&job.id)?)).await?;
        if removed { Ok(()) } else { Err(no_model(id)) }
    }
}

fn no_model(id: &str) -> ServeError {
    ServeError::NotFound { kind: "model of job", name: id.to_owned() }
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

#[cfg(test)]
mod tests {
    use super::*;

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
