//! `TenantService`: decode, call, encode.

use tonic::{Request, Response, Status};

use super::{convert, proto, proto::tenant_service_server::TenantService, tenant::tenant};
use crate::{
    admission::{QuotaUse, Service, TenantDeleted, params::ServeError},
    ids::TenantId,
};

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Tenants {
    pub(super) service: Service,
}

#[tonic::async_trait]
impl TenantService for Tenants {
    async fn get_quota(
        &self,
        request: Request<proto::GetQuotaRequest>,
    ) -> Result<Response<proto::GetQuotaResponse>, Status> {
        let tenant = tenant(&request)?;
        let quotas = self.service.quota(&tenant).await?.into_iter().map(quota).collect();
        Ok(Response::new(proto::GetQuotaResponse { tenant: tenant.to_string(), quotas }))
    }

    async fn delete_tenant(
        &self,
        request: Request<proto::DeleteTenantRequest>,
    ) -> Result<Response<proto::DeleteTenantResponse>, Status> {
        let own = tenant(&request)?;
        let named = convert::required("tenant", request.into_inner().tenant)?;
        let named = TenantId::new(&named).map_err(|e| ServeError::field("tenant", e.to_string()))?;
        // named twice, since it cannot be undone: whoever may call as any tenant calls as this one
        if own != named {
            let message = "is not the tenant that calls; accepted is its own name";
            return Err(ServeError::NotAllowed(format!("tenant: {message}")).into());
        }
        let TenantDeleted { deltas, versions, datasets, jobs, models, blobs, blobs_left } =
            self.service.delete_tenant(&named).await?;
        Ok(Response::new(proto::DeleteTenantResponse { deltas, versions, datasets, jobs, models, blobs, blobs_left }))
    }
}

fn quota(q: QuotaUse) -> proto::Quota {
    proto::Quota { name: q.name.to_owned(), limit: q.limit, burst: q.burst, used: q.used }
}
