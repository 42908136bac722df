//! Who may call: around every service, the one place that asks for credentials, looks the call up in the policy, and says as
//! which tenant it is made.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::{Ready, ready},
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::Either;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{
        Service,
        http::{HeaderMap, Request, Response, header::AUTHORIZATION},
    },
};
use tonic_types::{ErrorDetails, StatusExt as _};
use tower::Layer;

use super::{
    incoming::Peer,
    policy::{self, Rule},
    status::DOMAIN,
    tenant::{Caller, DEFAULT_TENANT, TENANT_KEY, named_tenant},
};
use crate::{
    access::{Access, Denied, Identity, Tenancy},
    admission::params::ServeError,
    ids::TenantId,
    telemetry::names,
};

/// Puts [`Guard`] around every service.
#[derive(Debug, Clone)]
pub(super) struct GuardLayer {
    access: Arc<Access>,
}

impl GuardLayer {
    pub(super) fn new(access: Arc<Access>) -> Self {
        Self { access }
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { inner, access: Arc::clone(&self.access) }
    }
}

/// See [`GuardLayer`].
#[derive(Debug, Clone)]
pub(super) struct Guard<S> {
    inner: S,
    access: Arc<Access>,
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<Ready<Result<Response<Body>, Infallible>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match admit(&self.access, &request) {
            Ok(caller) => {
                if let Some(caller) = caller {
                    tracing::trace!(who = %caller.identity, tenant = %caller.tenant, "admitted");
                    request.extensions_mut().insert(caller);
                }
                Either::Right(self.inner.call(request))
            }
            Err(refusal) => {
                if let Some(reason) = refusal.label() {
                    metrics::counter!(names::ACCESS_REFUSALS, "reason" => reason).increment(1);
                }
                Either::Left(ready(Ok(Status::from(refusal).into_http())))
            }
        }
    }
}

/// Whose call this is and as which tenant; `None` where nobody asks.
fn admit(access: &Access, request: &Request<Body>) -> Result<Option<Caller>, Refusal> {
    let rule = policy::rule(request.uri().path());
    if rule == Some(Rule::Open) {
        return Ok(None);
    }
    // who calls comes first: a stranger does not learn which RPCs there are
    let headers = request.headers();
    let certificate = request.extensions().get::<Peer>().and_then(|peer| peer.certificate.as_deref());
    let identity = match access.asks_for_credentials() {
        true => access.identify(bearer(headers)?, certificate),
        false => access.identify(None, None),
    };
    let identity = identity.map_err(Refusal::Nobody)?;
    let rule = rule.ok_or(Refusal::UnknownMethod)?;
    if !rule.allows(&identity) {
        return Err(Refusal::Permission(rule));
    }
    let tenant = tenant(&identity, headers)?;
    Ok(Some(Caller { identity, tenant }))
}

/// The key or token of a call, if it has one.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = match (values.next(), values.next()) {
        (None, _) => return Ok(None),
        (Some(value), None) => value,
        (Some(_), Some(_)) => return Err(Refusal::Nobody(Denied::Refused)),
    };
    let text = value.to_str().ok().and_then(|text| text.split_once(' '));
    match text {
        Some((scheme, text)) if scheme.eq_ignore_ascii_case("bearer") => Ok(Some(text.trim())),
        _ => Err(Refusal::Nobody(Denied::Refused)),
    }
}

/// The tenant that a call is made as: an identity's own, whatever the call says; any that it names for one of all tenants.
fn tenant(identity: &Identity, headers: &HeaderMap) -> Result<TenantId, Refusal> {
    let named = named_tenant(headers).map_err(Refusal::Request)?;
    match (&identity.tenancy, named) {
        (Tenancy::One(own), None) => Ok(own.clone()),
        (Tenancy::One(own), Some(named)) if named == *own => Ok(named),
        (Tenancy::One(_), Some(_)) => Err(Refusal::Tenant),
        (Tenancy::Any, Some(named)) => Ok(named),
        (Tenancy::Any, None) => TenantId::new(DEFAULT_TENANT)
            .map_err(|e| Refusal::Request(ServeError::Internal(format!("the default tenant {e}")))),
    }
}

/// Why a call does not reach its service.
#[derive(Debug)]
enum Refusal {
    Nobody(Denied),
    Permission(Rule),
    Tenant,
    UnknownMethod,
    /// What is no question of who calls.
    Request(ServeError),
}

impl Refusal {
    fn label(&self) -> Option<&'static str> {
        match self {
            Self::Nobody(Denied::Missing) => Some("no_credentials"),
            Self::Nobody(Denied::Refused) => Some("bad_credentials"),
            Self::Permission(_) => Some("permission"),
            Self::Tenant => Some("tenant"),
            Self::UnknownMethod => Some("unknown_method"),
            Self::Request(_) => None,
        }
    }
}

/// The same for credentials that are missing, unknown or expired: it tells nobody which keys there are.
const NOBODY: &str = "valid credentials are needed: an API key or a token (metadata `authorization: Bearer ...`), or a client \
                      certificate that stands for an identity";

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let status = |code, reason: &str, message: String| {
            Self::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new()))
        };
        match refusal {
            Refusal::Nobody(_) => status(Code::Unauthenticated, "UNAUTHENTICATED", NOBODY.to_owned()),
            Refusal::Permission(rule) => {
                let needed = match rule {
                    Rule::Any(permissions) => permissions.iter().map(|p| p.name()).collect::<Vec<_>>().join(" or "),
                    Rule::Open | Rule::Known => String::new(),
                };
                let message = format!("these credentials do not have the permission for this call: {needed}");
                status(Code::PermissionDenied, "PERMISSION_DENIED", message)
            }
            Refusal::Tenant => {
                let message =
                    format!("metadata {TENANT_KEY}: these credentials are another tenant's; leave the key out");
                status(Code::PermissionDenied, "TENANT_DENIED", message)
            }
            Refusal::UnknownMethod => Self::unimplemented("this server has no such method"),
            Refusal::Request(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{AccessConfig, KeyEntry, with_entry};

    const INFO: &str = "/deltaserve.v1.ServerService/GetServerInfo";
    const UPLOAD: &str = "/deltaserve.v1.DeltaService/Upload";

    fn keyed(tenant: &str, permissions: &[&str]) -> (Access, String) {
        let dir = tempfile::tempdir().expect("a folder");
        let permissions: Vec<String> = permissions.iter().map(|&p| p.to_owned()).collect();
        let (key, entry) = KeyEntry::generate("ci", tenant, &permissions, None).expect("a key");
        let path = dir.path().join("keys.json");
        std::fs::write(&path, with_entry(b"", &entry).expect("an entry")).expect("a file");
        let config = AccessConfig { api_keys: Some(path), ..AccessConfig::default() };
        (Access::open(&config).expect("keys"), key)
    }

    fn call(path: &str, headers: &[(&str, &str)]) -> Request<Body> {
        let mut request = Request::builder().uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).expect("a request")
    }

    fn code(access: &Access, path: &str, headers: &[(&str, &str)]) -> Code {
        admit(access, &call(path, headers)).map_or_else(|refusal| Status::from(refusal).code(), |_| Code::Ok)
    }

    #[test]
    fn a_bearer_is_one_header_of_its_scheme() {
        let (access, key) = keyed("acme", &["infer"]);
        let (good, lower) = (format!("Bearer {key}"), format!("bearer  {key} "));
        for value in [good.as_str(), &lower] {
            assert_eq!(code(&access, INFO, &[("authorization", value)]), Code::Ok, "{value:?}");
        }
        let basic = format!("Basic {key}");
        for value in [key.as_str(), &basic, "Bearer", "Bearer ", ""] {
            assert_eq!(code(&access, INFO, &[("authorization", value)]), Code::Unauthenticated, "{value:?}");
        }
        assert_eq!(code(&access, INFO, &[("authorization", &good), ("authorization", &good)]), Code::Unauthenticated);
        assert_eq!(code(&access, INFO, &[]), Code::Unauthenticated);
    }

    #[test]
    fn who_calls_comes_ahead_of_what_is_called() {
        let (access, key) = keyed("acme", &["infer"]);
        let authorization = format!("Bearer {key}");
        let known = ("authorization", authorization.as_str());
        let table = [
            ("/grpc.health.v1.Health/Check", Code::Ok, Code::Ok),
            (INFO, Code::Unauthenticated, Code::Ok),
            (UPLOAD, Code::Unauthenticated, Code::PermissionDenied),
            ("/deltaserve.v1.DeltaService/Nothing", Code::Unauthenticated, Code::Unimplemented),
            ("/", Code::Unauthenticated, Code::Unimplemented),
        ];
        for (path, stranger, caller) in table {
            assert_eq!((code(&access, path, &[]), code(&access, path, &[known])), (stranger, caller), "{path}");
        }
        // deny by default holds also where nobody is asked for credentials
        let open = Access::open(&AccessConfig::default()).expect("no files");
        assert_eq!(code(&open, UPLOAD, &[("authorization", "Basic x")]), Code::Ok);
        assert_eq!(code(&open, "/deltaserve.v1.DeltaService/Nothing", &[]), Code::Unimplemented);
    }

    #[test]
    fn the_tenant_is_the_identitys_whatever_the_call_says() {
        let tenant = |(access, key): &(Access, String), named: &[&str]| {
            let authorization = format!("Bearer {key}");
            let mut headers = vec![("authorization", authorization.as_str())];
            headers.extend(named.iter().map(|name| (TENANT_KEY, *name)));
            match admit(access, &call(INFO, &headers)) {
                Ok(caller) => Ok(caller.map(|c| c.tenant.to_string()).unwrap_or_default()),
                Err(refusal) => Err(Status::from(refusal).code()),
            }
        };
        let own = keyed("acme", &["infer", "admin"]);
        assert_eq!([tenant(&own, &[]), tenant(&own, &["acme"])], ["acme", "acme"].map(|t| Ok(t.to_owned())));
        for (named, refused) in [
            (&["other"][..], Code::PermissionDenied),
            (&["default"][..], Code::PermissionDenied),
            (&["acme", "acme"][..], Code::InvalidArgument),
            (&["../acme"][..], Code::InvalidArgument),
            (&["*"][..], Code::InvalidArgument),
        ] {
            assert_eq!(tenant(&own, named), Err(refused), "{named:?}");
        }
        let all = keyed("*", &["admin"]);
        assert_eq!([tenant(&all, &[]), tenant(&all, &["other"])], ["default", "other"].map(|t| Ok(t.to_owned())));
    }

    #[test]
    fn refusals_say_no_more_than_they_must() {
        let nobody = [Denied::Missing, Denied::Refused].map(|denied| Status::from(Refusal::Nobody(denied)));
        assert_eq!(nobody[0].message(), nobody[1].message());
        let permission = policy::rule("/deltaserve.v1.DeltaService/GetDelta").map(Refusal::Permission);
        let status = Status::from(permission.expect("a rule"));
        assert!(status.message().ends_with("infer or train or manage"), "{}", status.message());
        assert_eq!(status.get_error_details().error_info().map(|i| i.reason.as_str()), Some("PERMISSION_DENIED"));
    }
}
