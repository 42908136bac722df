//! What happens to every call around its service: a bound on concurrent calls, the deadline, and the request metrics.
//!
//! Health checks and reflection pass freely, so that a loaded server is not mistaken for a dead one.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body::Frame;
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{
        Service,
        http::{HeaderMap, Request, Response},
    },
};
use tower::Layer;

use super::{proto::DESCRIPTORS, tenant::parse_timeout};
use crate::{admission::params::ServeError, telemetry::names};

/// The transport cancels a call at its deadline with a bare CANCELLED; a little earlier it is ours to answer.
const EARLY: Duration = Duration::from_millis(3);

/// Puts [`Gate`] around every service.
#[derive(Debug, Clone)]
pub(super) struct GateLayer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    calls: Arc<Semaphore>,
    /// Path -> method label: the methods of our protocol and nothing else, so that clients cannot make labels.
    methods: HashMap<String, metrics::SharedString>,
}

impl GateLayer {
    /// At most `max_calls` at a time; further ones are refused, not queued.
    pub(super) fn new(max_calls: usize) -> Self {
        let shared = Shared { calls: Arc::new(Semaphore::new(max_calls)), methods: methods() };
        Self { shared: Arc::new(shared) }
    }
}

fn methods() -> HashMap<String, metrics::SharedString> {
    // Written by the build; if it could not be read, calls would be counted as `other`.
    let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
    let mut out = HashMap::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                out.insert(path, metrics::SharedString::from(method.name().to_owned()));
            }
        }
    }
    out
}

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        Gate { inner, shared: Arc::clone(&self.shared) }
    }
}

/// See [`GateLayer`].
#[derive(Debug, Clone)]
pub(super) struct Gate<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
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
        let Some(method) = self.shared.methods.get(request.uri().path()).cloned() else {
            return Box::pin(inner.call(request));
        };
        let permit = Arc::clone(&self.shared.calls).try_acquire_owned();
        Box::pin(async move {
            let mut call = Call::begin(method);
            let Ok(permit) = permit else {
                metrics::counter!(names::REFUSALS, "reason" => "calls").increment(1);
                return Ok(call.refuse(ServeError::Overloaded("too many calls at a time".into())));
            };
            call.permit = Some(permit);
            let timeout = request.headers().get("grpc-timeout").and_then(|v| v.to_str().ok()).and_then(parse_timeout);
            let mut deadline = timeout.map(|t| Box::pin(sleep(t.saturating_sub(EARLY))));
            let response = tokio::select! {
                biased;
                response = inner.call(request) => response?,
                () = passed(&mut deadline) => {
                    let waited = timeout.unwrap_or_default();
                    return Ok(call.refuse(ServeError::DeadlineExceeded(waited)));
                }
            };
            call.note(response.headers());
            Ok(response.map(|inner| Body::new(Guarded { inner, call, deadline })))
        })
    }
}

async fn passed(deadline: &mut Option<Pin<Box<Sleep>>>) {
    match deadline {
        Some(sleep) => sleep.await,
        None => std::future::pending().await,
    }
}

/// One call, counted when it is dropped.
#[derive(Debug)]
struct Call {
    method: metrics::SharedString,
    start: Instant,
    outcome: Option<Code>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Call {
    fn begin(method: metrics::SharedString) -> Self {
        metrics::gauge!(names::CALLS).increment(1.0);
        Self { method, start: Instant::now(), outcome: None, permit: None }
    }

    fn refuse(&mut self, error: ServeError) -> Response<Body> {
        let status = Status::from(error);
        self.outcome = Some(status.code());
        status.into_http()
    }

    /// Reads the outcome from headers (an early error) or trailers.
    fn note(&mut self, headers: &HeaderMap) {
        if let Some(status) = headers.get("grpc-status") {
            self.outcome = Some(Code::from_bytes(status.as_bytes()));
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // A call that is dropped before its status was that of a client that left.
        let outcome = outcome_label(self.outcome.unwrap_or(Code::Cancelled));
        metrics::gauge!(names::CALLS).decrement(1.0);
        metrics::counter!(names::REQUESTS, "method" => self.method.clone(), "outcome" => outcome).increment(1);
        metrics::histogram!(names::REQUEST_SECONDS, "method" => self.method.clone()).record(self.start.elapsed());
    }
}

pub(super) fn outcome_label(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

/// A response body that keeps its call's place, ends it at the deadline and sees how it ended.
struct Guarded {
    inner: Body,
    call: Call,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.inner).poll_frame(cx);
        if let Poll::Ready(frame) = &polled {
            match frame {
                Some(Ok(frame)) => frame.trailers_ref().into_iter().for_each(|t| this.call.note(t)),
                Some(Err(status)) => this.call.outcome = Some(status.code()),
                None => {}
            }
            return polled;
        }
        let late = this.deadline.as_mut().is_some_and(|d| d.as_mut().poll(cx).is_ready());
        if !late {
            return Poll::Pending;
        }
        // Dropping the body drops the stream behind it, which frees what the call used.
        this.inner = Body::empty();
        this.deadline = None;
        let status = Status::from(ServeError::DeadlineExceeded(this.call.start.elapsed()));
        this.call.outcome = Some(status.code());
        let mut trailers = HeaderMap::new();
        match status.add_header(&mut trailers) {
            Ok(()) => Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
            Err(status) => Poll::Ready(Some(Err(status))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Never;

    impl Service<Request<Body>> for Never {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Pending<Result<Response<Body>, Infallible>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<Body>) -> Self::Future {
            std::future::pending()
        }
    }

    fn request(timeout: &str) -> Request<Body> {
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = "/deltaserve.v1.ServerService/GetServerInfo".parse().expect("a path");
        request.headers_mut().insert("grpc-timeout", timeout.parse().expect("ASCII"));
        request
    }

    fn code(response: &Response<Body>) -> Option<Code> {
        response.headers().get("grpc-status").map(|s| Code::from_bytes(s.as_bytes()))
    }

    #[tokio::test]
    async fn a_call_ends_at_its_deadline_with_our_status() {
        let mut gate = GateLayer::new(1).layer(Never);
        let Ok(response) = gate.call(request("30m")).await;
        assert_eq!(code(&response), Some(Code::DeadlineExceeded));
    }

    #[tokio::test]
    async fn calls_over_the_bound_are_refused_at_once_and_a_place_is_given_back() {
        let mut gate = GateLayer::new(1).layer(Never);
        let first = tokio::spawn(gate.call(request("1H")));
        tokio::task::yield_now().await;
        let Ok(second) = gate.call(request("30m")).await;
        assert_eq!(code(&second), Some(Code::ResourceExhausted));
        first.abort();
        assert!(first.await.is_err());
        let Ok(third) = gate.call(request("30m")).await;
        assert_eq!(code(&third), Some(Code::DeadlineExceeded), "it had a place");
    }

    #[test]
    fn labels_are_the_methods_of_the_protocol() {
        let methods = methods();
        assert_eq!(methods.len(), 6 + 8 + 15 + 1 + 2);
        assert!(methods.contains_key("/deltaserve.v1.InferenceService/Generate"));
        assert!(!methods.contains_key("/grpc.health.v1.Health/Check"));
    }
}
