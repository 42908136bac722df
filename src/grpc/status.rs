//! The one place where a domain error becomes a gRPC status: code, stable reason, field violations, when to retry.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, QuotaViolation, StatusExt};

use crate::admission::params::{ServeError, TenantLimit, Violation};

/// `domain` of every `google.rpc.ErrorInfo`.
pub(crate) const DOMAIN: &str = "deltaserve";

/// When a refused caller may try again: about a queue's length at small load.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// All that a client is told of what is our fault.
const INTERNAL: &str = "internal error; the server's log has the details";

/// Clients accept 8 KiB of trailers by default, in base64; more would turn the status into a transport error.
const MAX_VIOLATION_BYTES: usize = 4096;
const MAX_MESSAGE_BYTES: usize = 800;

impl From<ServeError> for Status {
    fn from(error: ServeError) -> Self {
        if let ServeError::Internal(detail) = &error {
            tracing::error!(detail, "internal error");
        }
        if let ServeError::StoreUnavailable(detail) = &error {
            tracing::error!(detail, "the store does not answer");
        }
        let code = code(&error);
        let message = match &error {
            ServeError::Internal(_) => INTERNAL.to_owned(),
            ServeError::Failing { error, retry } if matches!(**error, ServeError::Internal(_)) => {
                format!("{INTERNAL}; it is tried again in {:.1} s", retry.as_secs_f64())
            }
            other => cut(&other.to_string(), MAX_MESSAGE_BYTES),
        };
        let mut details = ErrorDetails::with_error_info(error.reason(), DOMAIN, HashMap::new());
        match &error {
            ServeError::Invalid(violations) => add_violations(&mut details, violations),
            ServeError::Overloaded(_)
            | ServeError::ResidentBudget(_)
            | ServeError::StoreUnavailable(_)
            | ServeError::TenantDeleting(_)
            | ServeError::AuditUnavailable(_)
            | ServeError::ConstraintMemory { lasting: false, .. }
            | ServeError::NotEnoughMemory { lasting: false, .. } => {
                details.set_retry_info(Some(RETRY_AFTER));
            }
            ServeError::TenantLimit { limit, retry } => {
                if retry.is_some() {
                    details.set_retry_info(*retry);
                }
                details.set_quota_failure(vec![violation(*limit)]);
            }
            ServeError::Failing { retry, .. } => {
                details.set_retry_info(Some(*retry));
            }
            _ => {}
        }
        Self::with_error_details(code, message, details)
    }
}

/// Table of the codes; the reasons are beside the error's variants.
fn code(error: &ServeError) -> Code {
    match error {
        ServeError::Invalid(_) => Code::InvalidArgument,
        ServeError::DeltaNotFound(_) | ServeError::NotFound { .. } | ServeError::NoCheckpoint(_) => Code::NotFound,
        ServeError::BaseMismatch(_)
        | ServeError::WrongTask(_)
        | ServeError::NonFinite
        | ServeError::JobState(_)
        | ServeError::CannotResume(_)
        | ServeError::NotEnoughMemory { lasting: true, .. } => Code::FailedPrecondition,
        ServeError::AlreadyExists(_) | ServeError::IdempotencyConflict(_) => Code::AlreadyExists,
        ServeError::Conflict(_) => Code::Aborted,
        ServeError::Overloaded(_)
        | ServeError::TenantLimit { .. }
        | ServeError::ResidentBudget(_)
        | ServeError::ConstraintMemory { .. }
        | ServeError::NotEnoughMemory { lasting: false, .. } => Code::ResourceExhausted,
        ServeError::Failing { error, .. } => self::code(error),
        ServeError::Corrupt(_) => Code::DataLoss,
        ServeError::Draining
        | ServeError::TrainingDown
        | ServeError::StoreUnavailable(_)
        | ServeError::TenantDeleting(_)
        | ServeError::AuditUnavailable(_) => Code::Unavailable,
        ServeError::NotAllowed(_) => Code::PermissionDenied,
        ServeError::DeadlineExceeded(_) => Code::DeadlineExceeded,
        ServeError::Cancelled => Code::Cancelled,
        ServeError::Internal(_) => Code::Internal,
    }
}

/// A tenant's limit: its name, its value, and how much of it is used.
fn violation(limit: TenantLimit) -> QuotaViolation {
    let (value, used) = limit.numbers();
    let mut violation = QuotaViolation::new("tenant", limit.to_string());
    limit.name().clone_into(&mut violation.quota_id);
    violation.quota_value = value as i64;
    violation.quota_dimensions.insert("limit".into(), value.to_string());
    if let Some(used) = used {
        violation.quota_dimensions.insert("used".into(), used.to_string());
    }
    violation
}

/// As many violations as clients take, and how many were left out.
fn add_violations(details: &mut ErrorDetails, violations: &[Violation]) {
    let mut bytes = 0;
    for (i, violation) in violations.iter().enumerate() {
        let description = match violation.code.as_str() {
            "" => violation.message.clone(),
            code => format!("{code}: {}", violation.message),
        };
        let (field, description) = (cut(&violation.field, 200), cut(&description, 400));
        bytes += field.len() + description.len() + 16;
        if bytes > MAX_VIOLATION_BYTES {
            details.add_bad_request_violation("", format!("and {} more problems", violations.len() - i));
            return;
        }
        details.add_bad_request_violation(field, description);
    }
}

/// At most `max` bytes, whole characters.
fn cut(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let mut end = max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::params::QuotaItem;

    #[test]
    fn every_error_has_its_code_and_reason() {
        let s = || "x".to_owned();
        let limit = |limit| ServeError::TenantLimit { limit, retry: Some(Duration::from_millis(1500)) };
        let memory = |lasting| ServeError::NotEnoughMemory { message: s(), lasting };
        let room = |lasting| ServeError::ConstraintMemory { message: s(), lasting };
        let table = [
            (ServeError::field("f", "m"), Code::InvalidArgument, "INVALID_REQUEST"),
            (ServeError::DeltaNotFound(s()), Code::NotFound, "DELTA_NOT_FOUND"),
            (ServeError::NotFound { kind: "job", name: s() }, Code::NotFound, "NOT_FOUND"),
            (ServeError::NoCheckpoint(s()), Code::NotFound, "NOT_FOUND"),
            (ServeError::BaseMismatch(s()), Code::FailedPrecondition, "BASE_MISMATCH"),
            (ServeError::WrongTask(s()), Code::FailedPrecondition, "WRONG_TASK"),
            (ServeError::JobState(s()), Code::FailedPrecondition, "JOB_STATE"),
            (ServeError::CannotResume(s()), Code::FailedPrecondition, "CANNOT_RESUME"),
            (ServeError::NonFinite, Code::FailedPrecondition, "NON_FINITE"),
            (ServeError::AlreadyExists(s()), Code::AlreadyExists, "PUBLISH_CONFLICT"),
            (ServeError::Conflict(s()), Code::Aborted, "PUBLISH_CONFLICT"),
            (ServeError::IdempotencyConflict(s()), Code::AlreadyExists, "IDEMPOTENCY_CONFLICT"),
            (ServeError::Overloaded(s()), Code::ResourceExhausted, "OVERLOADED"),
            (limit(TenantLimit::Concurrency(3)), Code::ResourceExhausted, "TENANT_CONCURRENCY"),
            (limit(TenantLimit::Rate(0.5, 2)), Code::ResourceExhausted, "TENANT_RATE"),
            (limit(TenantLimit::Tokens(0.5, 2)), Code::ResourceExhausted, "TENANT_TOKENS"),
            (ServeError::ResidentBudget(s()), Code::ResourceExhausted, "RESIDENT_BUDGET"),
            (memory(false), Code::ResourceExhausted, "NOT_ENOUGH_MEMORY"),
            (memory(true), Code::FailedPrecondition, "NOT_ENOUGH_MEMORY"),
            (room(false), Code::ResourceExhausted, "CONSTRAINT_MEMORY"),
            (ServeError::Corrupt(s()), Code::DataLoss, "DELTA_CORRUPT"),
            (ServeError::Draining, Code::Unavailable, "DRAINING"),
            (ServeError::NotAllowed(s()), Code::PermissionDenied, "PERMISSION_DENIED"),
            (ServeError::TrainingDown, Code::Unavailable, "TRAINING_DOWN"),
            (ServeError::StoreUnavailable(s()), Code::Unavailable, "STORE_UNAVAILABLE"),
            (ServeError::DeadlineExceeded(Duration::from_secs(1)), Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (ServeError::Cancelled, Code::Cancelled, "CANCELLED"),
            (ServeError::Internal(s()), Code::Internal, "INTERNAL"),
        ];
        for (error, code, reason) in table {
            let retry = code == Code::ResourceExhausted
                || matches!(reason, "STORE_UNAVAILABLE" | "TENANT_DELETING" | "AUDIT_UNAVAILABLE");
            let status = Status::from(error);
            let details = status.get_error_details();
            assert_eq!(status.code(), code);
            assert_eq!(details.error_info().map(|i| (i.reason.as_str(), i.domain.as_str())), Some((reason, DOMAIN)));
            assert_eq!(details.retry_info().is_some(), retry, "{reason}");
        }
        for (error, reason) in
            [(ServeError::deleting(), "TENANT_DELETING"), (ServeError::AuditUnavailable(s()), "AUDIT_UNAVAILABLE")]
        {
            let status = Status::from(error);
            let details = status.get_error_details();
            assert!(status.code() == Code::Unavailable && details.retry_info().is_some());
            assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some(reason));
        }
        let never = Status::from(room(true));
        assert!(never.code() == Code::ResourceExhausted && never.get_error_details().retry_info().is_none());
    }

    #[test]
    fn a_load_that_failed_a_moment_ago_says_how_and_when_to_retry() {
        let failing =
            |error| Status::from(ServeError::Failing { error: Box::new(error), retry: Duration::from_millis(4200) });
        let status = failing(ServeError::Corrupt("style@3".into()));
        let details = status.get_error_details();
        assert_eq!(
            (status.code(), status.message()),
            (Code::DataLoss, "stored delta \"style@3\" is corrupt; it is tried again in 4.2 s")
        );
        assert_eq!(details.error_info().map(|info| info.reason.as_str()), Some("DELTA_CORRUPT"));
        assert_eq!(details.retry_info().and_then(|r| r.retry_delay), Some(Duration::from_millis(4200)));
        let status = failing(ServeError::Internal("/secret/path".into()));
        assert!(!status.message().contains("secret") && status.message().contains("4.2 s"), "{}", status.message());
    }

    #[test]
    fn a_tenants_limit_says_which_and_when_to_retry() {
        let limit = TenantLimit::Rate(2.5, 4);
        let status = Status::from(ServeError::TenantLimit { limit, retry: Some(Duration::from_millis(380)) });
        assert!(status.message().contains("2.5 per second, 4 at once"), "{}", status.message());
        let retry = status.get_error_details().retry_info().and_then(|r| r.retry_delay);
        assert_eq!(retry, Some(Duration::from_millis(380)));
    }

    #[test]
    fn an_amount_names_its_limit_with_its_numbers_and_waiting_is_advised_where_it_helps() {
        for (item, waits) in [(QuotaItem::StoredBytes, false), (QuotaItem::TrainJobs, true)] {
            let limit = TenantLimit::Amount { item, limit: 10, used: 8, asked: 3 };
            let status = Status::from(ServeError::from(limit));
            let details = status.get_error_details();
            assert_eq!((status.code(), details.retry_info().is_some()), (Code::ResourceExhausted, waits));
            let quota = details.quota_failure().map(|q| q.violations.clone()).unwrap_or_default();
            assert_eq!((quota[0].quota_id.as_str(), quota[0].quota_value), (item.name(), 10));
            assert_eq!(quota[0].quota_dimensions.get("used").map(String::as_str), Some("8"));
            assert!(quota[0].description.contains("asked for 3 more"), "{quota:?}");
        }
    }

    #[test]
    fn internal_detail_is_not_sent() {
        let status = Status::from(ServeError::Internal("/secret/path".into()));
        assert!(!status.message().contains("secret"));
    }

    #[test]
    fn field_violations_name_the_field_the_code_and_the_problem() {
        let violation = Violation { field: "line 3".into(), code: "NOT_JSON".into(), message: "expected `,`".into() };
        let details = Status::from(ServeError::Invalid(vec![violation])).get_error_details();
        let all: Vec<_> = details.bad_request().map(|b| b.field_violations.clone()).unwrap_or_default();
        assert_eq!((all[0].field.as_str(), all[0].description.as_str()), ("line 3", "NOT_JSON: expected `,`"));
    }

    #[test]
    fn ten_thousand_violations_fit_in_the_trailers_and_are_counted() {
        let one = |i| Violation { field: format!("line {i}"), code: "WRONG_TYPE".into(), message: "é".repeat(700) };
        let status = Status::from(ServeError::Invalid((0..10_000).map(one).collect()));
        let details = status.get_error_details();
        let all: Vec<_> = details.bad_request().map(|b| b.field_violations.clone()).unwrap_or_default();
        let left_out = all.last().map(|v| v.description.clone()).unwrap_or_default();
        assert_eq!(left_out, format!("and {} more problems", 10_000 - (all.len() - 1)));
        assert!(status.details().len() * 4 / 3 < 7000, "{} bytes", status.details().len());
        assert!(status.message().len() < 1000);
    }
}
