//! The audit log at the edge: who called what of the calls that change something, and how each ended.
//!
//! A layer around the services and inside of those that authenticate and refuse. What a call changes is said by the service
//! itself (see [`audit::note`]). Where the log is required, a call is announced before it begins, and refused if that cannot be
//! recorded.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{
        Service,
        http::{Extensions, Request, Response},
    },
};
use tonic_types::StatusExt as _;
use tower::Layer;

use super::{gate::outcome_label, incoming::Peer, tenant::Caller};
use crate::{
    admission::params::ServeError,
    audit::{self, AuditError, AuditLog, Event, Note, Phase},
};

/// The methods that change something, by service. All answer with one message, so that their status is known with the
/// response's head.
const RECORDED: [(&str, &[&str]); 3] = [
    ("DeltaService", &["Upload", "DeleteDelta", "PinDelta", "SetAlias", "MergeDeltas"]),
    (
        "TrainingService",
        &[
            "UploadDataset",
            "DeleteDataset",
            "CreateJob",
            "CancelJob",
            "PauseJob",
            "ResumeJob",
            "PublishCheckpoint",
            "DeleteModel",
        ],
    ),
    ("TenantService", &["DeleteTenant"]),
];

/// Puts [`Audited`] around every service.
#[derive(Debug, Clone)]
pub(super) struct AuditLayer {
    audit: AuditLog,
    /// Path -> method.
    methods: Arc<HashMap<String, &'static str>>,
}

impl AuditLayer {
    pub(super) fn new(audit: AuditLog) -> Self {
        let of = |(service, methods): (&'static str, &'static [&'static str])| {
            methods.iter().map(move |method| (format!("/deltaserve.v1.{service}/{method}"), *method))
        };
        Self { audit, methods: Arc::new(RECORDED.into_iter().flat_map(of).collect()) }
    }
}

impl<S> Layer<S> for AuditLayer {
    type Service = Audited<S>;

    fn layer(&self, inner: S) -> Audited<S> {
        Audited { inner, layer: self.clone() }
    }
}

/// A service whose changes are recorded.
#[derive(Debug, Clone)]
pub(super) struct Audited<S> {
    inner: S,
    layer: AuditLayer,
}

impl<S> Service<Request<Body>> for Audited<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The clone takes the readiness that was polled; `self` gets a fresh one.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let action = self.layer.methods.get(request.uri().path()).copied().filter(|_| self.layer.audit.is_on());
        let Some(action) = action else { return Box::pin(inner.call(request)) };
        let mut entry = Entry::new(self.layer.audit.clone(), action, &request);
        Box::pin(async move {
            if entry.audit.is_required() && entry.begin().await.is_err() {
                return Ok(refused("it is refused: the audit log cannot be written, and must be").into_http());
            }
            let Ok(response) = audit::noting(Arc::clone(&entry.note), inner.call(request)).await;
            match entry.end(Status::from_header_map(response.headers())).await {
                Ok(()) => Ok(response),
                Err(AuditError) => {
                    Ok(refused("it may have been done: the audit log cannot be written, and must be").into_http())
                }
            }
        })
    }
}

fn refused(message: &str) -> Status {
    ServeError::AuditUnavailable(message.to_owned()).into()
}

/// One call. Where it is dropped before its end, its caller has left.
struct Entry {
    audit: AuditLog,
    action: &'static str,
    caller: Option<String>,
    peer: Option<String>,
    note: Arc<Mutex<Note>>,
    over: bool,
}

impl Entry {
    fn new(audit: AuditLog, action: &'static str, request: &Request<Body>) -> Self {
        let extensions = request.extensions();
        let caller = extensions.get::<Caller>();
        let tenant = caller.map(|caller| caller.tenant.to_string()).unwrap_or_default();
        let note = Arc::new(Mutex::new(Note { tenant, ..Note::default() }));
        let caller = caller.map(|caller| caller.identity.name.clone());
        Self { audit, action, caller, peer: peer(extensions), note, over: false }
    }

    fn event(&self, phase: Phase) -> Event {
        let note = self.note.lock().clone();
        Event { caller: self.caller.clone(), peer: self.peer.clone(), ..Event::now(phase, self.action, note) }
    }

    async fn begin(&mut self) -> Result<(), AuditError> {
        let recorded = self.audit.record(&self.event(Phase::Begin)).await;
        // what was never announced does not end
        self.over = recorded.is_err();
        recorded
    }

    /// `status`: of a refused call.
    async fn end(&mut self, status: Option<Status>) -> Result<(), AuditError> {
        self.over = true;
        let code = status.as_ref().map_or(Code::Ok, Status::code);
        let details = status.map(|status| status.get_error_details());
        let reason = details.as_ref().and_then(|d| d.error_info()).map(|info| info.reason.clone());
        let (code, reason) = (outcome_label(code), reason.unwrap_or_default());
        self.audit.record(&Event { code, reason, ..self.event(Phase::End) }).await
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if !self.over {
            let code = outcome_label(Code::Cancelled);
            self.audit.record_now(&Event { code, ..self.event(Phase::End) });
        }
    }
}

fn peer(extensions: &Extensions) -> Option<String> {
    extensions.get::<Peer>().map(|peer| peer.address.to_string())
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{access::Identity, audit::AuditConfig, grpc::proto::DESCRIPTORS, ids::TenantId};

    /// Answers with a status, and says what it changes.
    #[derive(Clone)]
    struct Says(Code);

    impl Service<Request<Body>> for Says {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<Body>) -> Self::Future {
            let code = self.0;
            Box::pin(async move {
                audit::note(|note| note.object = "style".into());
                match code {
                    Code::Ok => Ok(Response::new(Body::empty())),
                    Code::NotFound => Ok(Status::from(ServeError::DeltaNotFound("style".into())).into_http()),
                    _ => std::future::pending().await,
                }
            })
        }
    }

    fn request(method: &str) -> Request<Body> {
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = format!("/deltaserve.v1.{method}").parse().expect("a path");
        let identity = Identity { name: "key-1".into(), ..Identity::anyone() };
        let tenant = TenantId::new("acme").expect("a name");
        request.extensions_mut().insert(Caller { identity: Arc::new(identity), tenant });
        request
    }

    fn code(response: &Response<Body>) -> Option<Code> {
        response.headers().get("grpc-status").map(|s| Code::from_bytes(s.as_bytes()))
    }

    async fn call(layer: &AuditLayer, code: Code, method: &str) -> Response<Body> {
        let Ok(response) = layer.layer(Says(code)).call(request(method)).await;
        response
    }

    fn events(path: &std::path::Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).expect("a log");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    #[tokio::test]
    async fn calls_that_change_something_are_recorded_with_their_ends_and_others_are_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("audit.jsonl");
        let log = AuditLog::open(&AuditConfig { file: Some(path.clone()), required: false }).expect("opens");
        let layer = AuditLayer::new(log.clone());
        call(&layer, Code::Ok, "DeltaService/Upload").await;
        call(&layer, Code::NotFound, "DeltaService/DeleteDelta").await;
        call(&layer, Code::Ok, "DeltaService/ListDeltas").await;
        let left = layer.layer(Says(Code::Cancelled)).call(request("TrainingService/CreateJob"));
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), left).await.is_err());
        log.close().await;
        let events = events(&path);
        let shown: Vec<[&str; 5]> = events
            .iter()
            .map(|e| ["action", "code", "tenant", "object", "caller"].map(|key| e[key].as_str().unwrap_or("-")))
            .collect();
        assert_eq!(
            shown,
            [
                ["Upload", "ok", "acme", "style", "key-1"],
                ["DeleteDelta", "not_found", "acme", "style", "key-1"],
                ["CreateJob", "cancelled", "acme", "style", "key-1"],
            ]
        );
        assert_eq!(events[1]["reason"], "DELTA_NOT_FOUND");
    }

    #[tokio::test]
    async fn where_it_is_required_a_call_is_announced_or_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().join("log");
        std::fs::create_dir(&folder).expect("made");
        let path = folder.join("audit.jsonl");
        let log = AuditLog::open(&AuditConfig { file: Some(path.clone()), required: true }).expect("opens");
        let layer = AuditLayer::new(log.clone());
        assert_eq!(code(&call(&layer, Code::Ok, "DeltaService/PinDelta").await), None);
        let phases: Vec<_> = events(&path).iter().map(|e| e["phase"].clone()).collect();
        assert_eq!(phases, ["begin", "end"]);
        std::fs::remove_dir_all(&folder).expect("removed");
        assert_eq!(code(&call(&layer, Code::Ok, "DeltaService/PinDelta").await), Some(Code::Unavailable));
        assert_eq!(code(&call(&layer, Code::Ok, "DeltaService/ListDeltas").await), None, "which changes nothing");
        log.close().await;
    }

    #[test]
    fn every_recorded_method_is_one_of_the_protocol_with_one_answer() {
        let layer = AuditLayer::new(AuditLog::default());
        let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).expect("a description");
        let mut known = HashMap::new();
        for service in set.file.iter().flat_map(|file| &file.service) {
            for method in &service.method {
                known.insert(format!("/deltaserve.v1.{}/{}", service.name(), method.name()), method.server_streaming());
            }
        }
        assert_eq!(layer.methods.len(), 14);
        for path in layer.methods.keys() {
            assert_eq!(known.get(path), Some(&false), "{path}");
        }
        // whatever is called as what changes something is recorded
        let verbs = ["Upload", "Delete", "Pin", "Set", "Merge", "Create", "Cancel", "Pause", "Resume", "Publish"];
        for path in known.keys() {
            let method = path.rsplit('/').next().unwrap_or_default();
            let changes = verbs.iter().any(|verb| method.starts_with(verb));
            assert_eq!(changes, layer.methods.contains_key(path), "{path}");
        }
    }
}
