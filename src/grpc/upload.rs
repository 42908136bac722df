//! Client streams of files: header first, then bytes, bounded in size, in number of concurrent uploads and in waiting.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, Streaming};

use super::{convert, proto};
use crate::{
    admission::{
        params::{ServeError, UploadParams},
        train_params::DatasetUpload,
    },
    audit,
    ids::check_name,
};

/// Uploads are held in memory until they are stored; this many at a time.
const MAX_CONCURRENT: usize = 4;
const MAX_FILES: usize = 64;
const MAX_DATASET_NAME: usize = 128;
/// A client that sends nothing for so long loses its place.
const IDLE: Duration = Duration::from_secs(60);

/// Receives uploads within limits.
#[derive(Debug, Clone)]
pub(super) struct Receiver {
    places: Arc<Semaphore>,
    max_bytes: u64,
}

impl Receiver {
    pub(super) fn new(max_bytes: u64) -> Self {
        Self { places: Arc::new(Semaphore::new(MAX_CONCURRENT)), max_bytes }
    }

    /// A place among the uploads: taken before the first byte and held until what came is stored.
    ///
    /// # Errors
    /// [`ServeError::Overloaded`].
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, ServeError> {
        let full = |_| ServeError::Overloaded(format!("{MAX_CONCURRENT} uploads are in progress"));
        Arc::clone(&self.places).try_acquire_owned().map_err(full)
    }

    /// A delta's files.
    pub(super) async fn delta(&self, stream: Streaming<proto::UploadRequest>) -> Result<UploadParams, Status> {
        use proto::upload_request::Message;
        let mut stream = stream;
        let Some(Message::Header(header)) = next(&mut stream).await?.and_then(|m| m.message) else {
            return Err(ServeError::field("header", "must be the first message").into());
        };
        convert::upload_header(&header)?;
        let mut folder = Folder::new(self.max_bytes);
        while let Some(request) = next(&mut stream).await? {
            match request.message {
                Some(Message::Chunk(chunk)) => folder.push(chunk)?,
                Some(Message::Header(_)) => return Err(ServeError::field("header", "is given twice").into()),
                None => return Err(ServeError::field("message", "is empty").into()),
            }
        }
        Ok(convert::upload(header, folder.finish())?)
    }

    /// A dataset's bytes.
    pub(super) async fn dataset(
        &self,
        stream: Streaming<proto::UploadDatasetRequest>,
    ) -> Result<DatasetUpload, Status> {
        use proto::upload_dataset_request::Message;
        let mut stream = stream;
        let Some(Message::Header(header)) = next(&mut stream).await?.and_then(|m| m.message) else {
            return Err(ServeError::field("header", "must be the first message").into());
        };
        if header.name.len() > MAX_DATASET_NAME || header.name.chars().any(char::is_control) {
            let message = format!("must have at most {MAX_DATASET_NAME} bytes and no control characters");
            return Err(ServeError::field("header.name", message).into());
        }
        let mut data = BytesMut::new();
        while let Some(request) = next(&mut stream).await? {
            match request.message {
                Some(Message::Data(bytes)) => {
                    check_size("data", data.len() as u64, bytes.len(), self.max_bytes)?;
                    data.extend_from_slice(&bytes);
                }
                Some(Message::Header(_)) => return Err(ServeError::field("header", "is given twice").into()),
                None => return Err(ServeError::field("message", "is empty").into()),
            }
        }
        let name = (!header.name.is_empty()).then_some(header.name);
        Ok(DatasetUpload { name, data: data.freeze() })
    }
}

/// Stores what came in a task of its own, which keeps the place although the client may have left: what was received is
/// in memory until then.
pub(super) async fn held<T: Send + 'static>(
    place: OwnedSemaphorePermit,
    store: impl Future<Output = Result<T, ServeError>> + Send + 'static,
) -> Result<T, ServeError> {
    let task = tokio::spawn(audit::carried(async move {
        let stored = store.await;
        drop(place);
        stored
    }));
    task.await.map_err(|e| ServeError::Internal(format!("an upload ended early: {e}")))?
}

async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
    match tokio::time::timeout(IDLE, stream.message()).await {
        Ok(message) => message,
        Err(_) => Err(ServeError::DeadlineExceeded(IDLE).into()),
    }
}

fn check_size(field: &str, have: u64, more: usize, max: u64) -> Result<(), ServeError> {
    match have.saturating_add(more as u64) {
        total if total > max => {
            Err(ServeError::field(field, format!("the upload has over {max} bytes, the server's limit")))
        }
        _ => Ok(()),
    }
}

/// Files as they arrive, one after the other.
struct Folder {
    files: BTreeMap<String, Bytes>,
    current: Option<(String, BytesMut)>,
    bytes: u64,
    max_bytes: u64,
}

impl Folder {
    fn new(max_bytes: u64) -> Self {
        Self { files: BTreeMap::new(), current: None, bytes: 0, max_bytes }
    }

    fn push(&mut self, chunk: proto::FileChunk) -> Result<(), ServeError> {
        check_size("chunk.data", self.bytes, chunk.data.len(), self.max_bytes)?;
        self.bytes += chunk.data.len() as u64;
        let same = chunk.file.is_empty() || self.current.as_ref().is_some_and(|(name, _)| *name == chunk.file);
        if !same {
            self.start(chunk.file)?;
        }
        match &mut self.current {
            Some((_, data)) => {
                data.extend_from_slice(&chunk.data);
                Ok(())
            }
            None => Err(ServeError::field("chunk.file", "is required in a file's first chunk")),
        }
    }

    fn start(&mut self, name: String) -> Result<(), ServeError> {
        check_name(&name).map_err(|e| ServeError::field("chunk.file", e.to_string()))?;
        self.close();
        if self.files.contains_key(&name) {
            return Err(ServeError::field("chunk.file", format!("{name} is sent in two places")));
        }
        if self.files.len() >= MAX_FILES {
            return Err(ServeError::field("chunk.file", format!("over {MAX_FILES} files")));
        }
        self.current = Some((name, BytesMut::new()));
        Ok(())
    }

    fn close(&mut self) {
        if let Some((name, data)) = self.current.take() {
            self.files.insert(name, data.freeze());
        }
    }

    fn finish(mut self) -> BTreeMap<String, Bytes> {
        self.close();
        self.files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(file: &str, data: &'static str) -> proto::FileChunk {
        proto::FileChunk { file: file.into(), data: Bytes::from_static(data.as_bytes()) }
    }

    #[test]
    fn chunks_of_a_file_are_joined_and_empty_files_exist() -> Result<(), ServeError> {
        let mut folder = Folder::new(100);
        for c in [chunk("a.json", "12"), chunk("", "3"), chunk("a.json", "4"), chunk("b.txt", "")] {
            folder.push(c)?;
        }
        let files = folder.finish();
        assert_eq!(files.get("a.json").map(|b| &b[..]), Some(&b"1234"[..]));
        assert_eq!(files.get("b.txt").map(Bytes::len), Some(0));
        Ok(())
    }

    #[test]
    fn a_file_is_named_first_sent_once_in_one_place_and_never_a_path() {
        for sequence in [
            vec![chunk("", "x")],
            vec![chunk("../etc", "x")],
            vec![chunk("a/b", "x")],
            vec![chunk("a", "x"), chunk("b", "x"), chunk("a", "x")],
        ] {
            let mut folder = Folder::new(100);
            assert!(sequence.into_iter().try_for_each(|c| folder.push(c)).is_err());
        }
    }

    #[test]
    fn the_limit_counts_all_files_together() {
        let mut folder = Folder::new(4);
        assert!(folder.push(chunk("a", "12")).is_ok());
        assert!(folder.push(chunk("b", "34")).is_ok());
        assert!(folder.push(chunk("b", "5")).is_err());
    }
}
