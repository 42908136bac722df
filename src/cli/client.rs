//! The connection to a server, the caller's identity on every call, and errors as people read them.

use std::{fmt::Write as _, time::Duration};

use anyhow::Context as _;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use tonic_types::StatusExt;

use super::Common;
use crate::grpc::{
    TENANT_KEY,
    proto::{
        self, delta_service_client::DeltaServiceClient, inference_service_client::InferenceServiceClient,
        server_service_client::ServerServiceClient, tenant_service_client::TenantServiceClient,
        training_service_client::TrainingServiceClient,
    },
};

const MAX_MESSAGE: usize = 1 << 30;

/// Puts credentials, the tenant and the deadline on every call.
#[derive(Debug, Clone)]
pub(super) struct Identify {
    authorization: Option<MetadataValue<Ascii>>,
    tenant: Option<MetadataValue<Ascii>>,
    timeout: Option<Duration>,
}

impl Interceptor for Identify {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        if let Some(tenant) = &self.tenant {
            request.metadata_mut().insert(TENANT_KEY, tenant.clone());
        }
        if let Some(timeout) = self.timeout {
            request.set_timeout(timeout);
        }
        Ok(request)
    }
}

pub(super) type Connection = InterceptedService<Channel, Identify>;

/// A connected client.
#[derive(Debug, Clone)]
pub(super) struct Client {
    connection: Connection,
    channel: Channel,
    identify: Identify,
}

impl Client {
    /// Connects to `common.server`.
    pub(super) async fn connect(common: &Common) -> anyhow::Result<Self> {
        let tenant = common.tenant.as_ref().map(|tenant| tenant.parse()).transpose().context("--tenant")?;
        let timeout = common.timeout.map(Duration::try_from_secs_f64).transpose().context("--timeout")?;
        let endpoint = common.credentials.endpoint(&common.server).await?;
        let authorization = common.credentials.authorization(&endpoint).await?;
        let channel = endpoint.connect().await.with_context(|| format!("connect to a server at {}", endpoint.uri()))?;
        Ok(Self::over(channel, Identify { authorization, tenant, timeout }))
    }

    /// Another tenant's client over the same connection.
    ///
    /// # Errors
    /// A name that cannot be in a call's metadata.
    pub(super) fn with_tenant(&self, tenant: &str) -> anyhow::Result<Self> {
        let tenant = tenant.parse().with_context(|| format!("--tenant {tenant:?}"))?;
        Ok(Self::over(self.channel.clone(), Identify { tenant: Some(tenant), ..self.identify.clone() }))
    }

    fn over(channel: Channel, identify: Identify) -> Self {
        Self { connection: InterceptedService::new(channel.clone(), identify.clone()), channel, identify }
    }

    pub(super) fn inference(&self) -> InferenceServiceClient<Connection> {
        InferenceServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub(super) fn deltas(&self) -> DeltaServiceClient<Connection> {
        DeltaServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// A delta by name, and the reference of the version that it is now, so that all requests of a file get the same.
    ///
    /// # Errors
    /// Refused calls.
    pub(super) async fn version(&self, name: &str) -> anyhow::Result<(String, proto::Delta)> {
        let request = proto::GetDeltaRequest { delta: name.to_owned() };
        let found = self.deltas().get_delta(request).await?.into_inner().delta.context("a reply without a delta")?;
        Ok((format!("{}@{}", found.name, found.id), found))
    }

    pub(super) fn training(&self) -> TrainingServiceClient<Connection> {
        TrainingServiceClient::new(self.connection.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub(super) fn tenants(&self) -> TenantServiceClient<Connection> {
        TenantServiceClient::new(self.connection.clone())
    }

    pub(super) fn server(&self) -> ServerServiceClient<Connection> {
        ServerServiceClient::new(self.connection.clone())
    }
}

/// An error as the command line prints it: what happened, the stable reason, and each bad field on its own line.
pub fn describe(error: &anyhow::Error) -> String {
    let Some(status) = error.downcast_ref::<Status>() else { return format!("{error:#}") };
    let details = status.get_error_details();
    let reason = details.error_info().map_or_else(|| format!("{:?}", status.code()), |info| info.reason.clone());
    let violations = details.bad_request().map(|b| b.field_violations.as_slice()).unwrap_or_default();
    if violations.is_empty() {
        return format!("{} ({reason})", status.message());
    }
    let mut out = format!("the request was refused ({reason}):");
    for violation in violations {
        let sep = if violation.field.is_empty() { "" } else { ": " };
        // Writing to a string cannot fail.
        let _ = write!(out, "\n  {}{sep}{}", violation.field, violation.description);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::params::{ServeError, Violation};

    #[test]
    fn errors_name_their_reason_and_every_bad_field() {
        let field = |f: &str| Violation { field: f.into(), code: "NOT_JSON".into(), message: "bad".into() };
        let error = anyhow::Error::from(Status::from(ServeError::Invalid(vec![field("line 1"), field("line 9")])));
        let expected = "the request was refused (INVALID_REQUEST):\n  line 1: NOT_JSON: bad\n  line 9: NOT_JSON: bad";
        assert_eq!(describe(&error), expected);
        let error = anyhow::Error::from(Status::from(ServeError::DeltaNotFound("x".into())));
        assert_eq!(describe(&error), "no delta \"x\" (DELTA_NOT_FOUND)");
    }
}
