//! `DeltaService`: decode, call, encode.

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    convert, proto,
    proto::delta_service_server::DeltaService,
    tenant::tenant,
    upload::{Receiver, held},
};
use crate::admission::{Service, catalog_params::AliasParams, params::ServeError};

/// Bytes of a download's chunk: large enough to be fast, small enough for every client's message limit.
const CHUNK: usize = 256 * 1024;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Deltas {
    pub(super) service: Service,
    pub(super) receiver: Receiver,
}

#[tonic::async_trait]
impl DeltaService for Deltas {
    async fn upload(
        &self,
        request: Request<Streaming<proto::UploadRequest>>,
    ) -> Result<Response<proto::UploadResponse>, Status> {
        let tenant = tenant(&request)?;
        let place = self.receiver.place()?;
        let params = self.receiver.delta(request.into_inner()).await?;
        let service = self.service.clone();
        let info = held(place, async move { service.upload(&tenant, params).await }).await?;
        Ok(Response::new(proto::UploadResponse { delta: Some(convert::delta(info)) }))
    }

    async fn get_delta(
        &self,
        request: Request<proto::GetDeltaRequest>,
    ) -> Result<Response<proto::GetDeltaResponse>, Status> {
        let tenant = tenant(&request)?;
        let reference = convert::required("delta", request.into_inner().delta)?;
        let detail = self.service.get_delta(&tenant, &reference).await?;
        Ok(Response::new(proto::GetDeltaResponse {
            delta: Some(convert::delta(detail.delta)),
            versions: detail.versions.into_iter().map(convert::delta).collect(),
        }))
    }

    async fn list_deltas(
        &self,
        request: Request<proto::ListDeltasRequest>,
    ) -> Result<Response<proto::ListDeltasResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::ListDeltasRequest { page_size, page_token, name_prefix } = request.into_inner();
        let page = self.service.list_deltas(&tenant, convert::page(page_size, page_token)?, &name_prefix).await?;
        Ok(Response::new(proto::ListDeltasResponse {
            deltas: page.items.into_iter().map(convert::delta).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn delete_delta(
        &self,
        request: Request<proto::DeleteDeltaRequest>,
    ) -> Result<Response<proto::DeleteDeltaResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::DeleteDeltaRequest { name, expected_id } = request.into_inner();
        let name = convert::required("name", name)?;
        let expected = convert::expected("expected_id", expected_id.as_deref())?;
        self.service.delete_delta(&tenant, &name, expected).await?;
        Ok(Response::new(proto::DeleteDeltaResponse {}))
    }

    async fn pin_delta(
        &self,
        request: Request<proto::PinDeltaRequest>,
    ) -> Result<Response<proto::PinDeltaResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::PinDeltaRequest { name, pinned } = request.into_inner();
        let info = self.service.pin(&tenant, &convert::required("name", name)?, pinned).await?;
        Ok(Response::new(proto::PinDeltaResponse { delta: Some(convert::delta(info)) }))
    }

    async fn set_alias(
        &self,
        request: Request<proto::SetAliasRequest>,
    ) -> Result<Response<proto::SetAliasResponse>, Status> {
        let tenant = tenant(&request)?;
        let proto::SetAliasRequest { name, version, expected_id } = request.into_inner();
        let params = AliasParams {
            name: convert::required("name", name)?,
            version: convert::required("version", version)?,
            expected: convert::expected("expected_id", expected_id.as_deref())?,
        };
        let info = self.service.set_alias(&tenant, params).await?;
        Ok(Response::new(proto::SetAliasResponse { delta: Some(convert::delta(info)) }))
    }

    async fn merge_deltas(
        &self,
        request: Request<proto::MergeDeltasRequest>,
    ) -> Result<Response<proto::MergeDeltasResponse>, Status> {
        let tenant = tenant(&request)?;
        let params = convert::merge(request.into_inner())?;
        let info = self.service.merge(&tenant, params).await?;
        Ok(Response::new(proto::MergeDeltasResponse { delta: Some(convert::delta(info)) }))
    }

    type DownloadStream = BoxStream<'static, Result<proto::DownloadResponse, Status>>;

    async fn download(
        &self,
        request: Request<proto::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        use proto::download_response::Message;
        let tenant = tenant(&request)?;
        let request = request.into_inner();
        let for_peft = match proto::DeltaForm::try_from(request.form) {
            Ok(proto::DeltaForm::Unspecified) => false,
            Ok(proto::DeltaForm::Peft) => true,
            Err(unknown) => return Err(ServeError::field("form", unknown.to_string()).into()),
        };
        let reference = convert::required("delta", request.delta)?;
        let reply = self.service.download(&tenant, &reference, for_peft).await?;
        let head = Message::Delta(convert::delta(reply.delta));
        let chunks = reply.files.files.into_iter().flat_map(|(file, data)| chunks(file, data)).map(Message::Chunk);
        let messages = std::iter::once(head).chain(chunks);
        let stream = futures::stream::iter(messages.map(|m| Ok(proto::DownloadResponse { message: Some(m) })));
        Ok(Response::new(stream.boxed()))
    }
}

/// A file in pieces; an empty file is one empty piece.
fn chunks(file: String, data: Bytes) -> impl Iterator<Item = proto::FileChunk> {
    let count = data.len().div_ceil(CHUNK).max(1);
    (0..count).map(move |i| {
        let end = data.len().min((i + 1) * CHUNK);
        proto::FileChunk { file: file.clone(), data: data.slice(i * CHUNK..end) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_give_the_file_back_and_an_empty_file_is_sent() {
        for size in [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let data = Bytes::from((0..size).map(|i| i as u8).collect::<Vec<_>>());
            let pieces: Vec<_> = chunks("f".into(), data.clone()).collect();
            assert!(!pieces.is_empty() && pieces.iter().all(|p| p.data.len() <= CHUNK && p.file == "f"));
            assert_eq!(pieces.iter().flat_map(|p| p.data.to_vec()).collect::<Vec<_>>(), data);
        }
    }
}
