//! `ServerService`: decode, call, encode.

use tonic::{Request, Response, Status};

use super::{convert, proto, proto::server_service_server::ServerService};
use crate::admission::Service;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) service: Service,
}

#[tonic::async_trait]
impl ServerService for Server {
    async fn get_server_info(
        &self,
        _request: Request<proto::GetServerInfoRequest>,
    ) -> Result<Response<proto::GetServerInfoResponse>, Status> {
        Ok(Response::new(convert::server_info(self.service.server_info().await?)))
    }
}
