//! Who is calling, and how long they will wait: what a call's metadata says.

use std::{sync::Arc, time::Duration};

use tonic::{Request, codegen::http::HeaderMap, metadata::MetadataMap};

use crate::{access::Identity, admission::params::ServeError, ids::TenantId};

/// The metadata key that names the tenant.
pub const TENANT_KEY: &str = "x-deltaserve-tenant";
/// The tenant of calls without the key.
pub const DEFAULT_TENANT: &str = "default";

/// Who makes a call, and as which tenant; an extension of every request that `guard` lets through.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// Who it is.
    pub(super) identity: Arc<Identity>,
    /// As which tenant.
    pub(super) tenant: TenantId,
}

/// The calling tenant: what the identity says, never a request's metadata alone.
pub(super) fn tenant<T>(request: &Request<T>) -> Result<TenantId, ServeError> {
    let caller = request.extensions().get::<Caller>();
    caller.map(|caller| caller.tenant.clone()).ok_or_else(|| ServeError::Internal("a call without a caller".into()))
}

/// The tenant that a call names, if it names one.
pub(super) fn named_tenant(headers: &HeaderMap) -> Result<Option<TenantId>, ServeError> {
    let invalid = |message: String| ServeError::field(format!("metadata {TENANT_KEY}"), message);
    let mut values = headers.get_all(TENANT_KEY).iter();
    let name = match (values.next(), values.next()) {
        (None, _) => return Ok(None),
        (Some(value), None) => value.to_str().map_err(|_| invalid("must be ASCII".into()))?,
        (Some(_), Some(_)) => return Err(invalid("is given twice".into())),
    };
    TenantId::new(name).map(Some).map_err(|e| invalid(e.to_string()))
}

/// The call's deadline as time from now; a malformed one counts as none, as gRPC asks.
pub(super) fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    metadata.get("grpc-timeout").and_then(|v| v.to_str().ok()).and_then(parse_timeout)
}

/// `100m` = 100 milliseconds: up to 8 digits and a unit (gRPC over HTTP/2).
pub(super) fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_read_as_grpc_writes_them() {
        assert_eq!(parse_timeout("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "1", "123456789S", "-1S", "1.5S", "1x", "1é"] {
            assert_eq!(parse_timeout(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_tenant_is_named_once_and_by_a_name() {
        let mut headers = HeaderMap::new();
        let named = |headers: &HeaderMap| named_tenant(headers).map(|t| t.map(|t| t.to_string())).ok();
        assert_eq!(named(&headers), Some(None));
        headers.insert(TENANT_KEY, "acme".parse().expect("ASCII"));
        assert_eq!(named(&headers), Some(Some("acme".to_owned())));
        headers.append(TENANT_KEY, "other".parse().expect("ASCII"));
        assert_eq!(named(&headers), None);
        headers.insert(TENANT_KEY, "../x".parse().expect("ASCII"));
        assert_eq!(named(&headers), None);
    }

    #[test]
    fn a_request_that_passed_no_guard_has_no_tenant() {
        let mut request = Request::new(());
        request.metadata_mut().insert(TENANT_KEY, "acme".parse().expect("ASCII"));
        assert!(tenant(&request).is_err());
        let caller = Caller { identity: Arc::new(Identity::anyone()), tenant: TenantId::new("acme").expect("a name") };
        request.extensions_mut().insert(caller);
        assert_eq!(tenant(&request).map(|t| t.to_string()).ok().as_deref(), Some("acme"));
    }
}
