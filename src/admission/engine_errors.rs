//! What the engine refuses and ends with, as what callers are told.

use super::params::ServeError;
use crate::engine::{EngineError, SubmitError};

impl From<SubmitError> for ServeError {
    fn from(e: SubmitError) -> Self {
        match e {
            SubmitError::Invalid(m) => Self::field("request", m),
            SubmitError::ConstraintTooLarge { .. } => Self::ConstraintMemory { message: e.to_string(), lasting: true },
            SubmitError::Overloaded(_) => Self::Overloaded(e.to_string()),
            SubmitError::Draining => Self::Draining,
            SubmitError::Stopped => Self::Internal(e.to_string()),
        }
    }
}

impl From<EngineError> for ServeError {
    fn from(e: EngineError) -> Self {
        match e {
            EngineError::Internal(_) => Self::Internal(e.to_string()),
            EngineError::NonFinite => Self::NonFinite,
            EngineError::Constraint(_) => Self::field("options.constraint", e.to_string()),
            EngineError::ConstraintMemory { .. } => Self::ConstraintMemory { message: e.to_string(), lasting: false },
            EngineError::NoHead => Self::WrongTask(e.to_string()),
            EngineError::DeadlineExceeded(after) => Self::DeadlineExceeded(after),
            EngineError::Draining => Self::Draining,
            EngineError::TenantEnded => Self::deleting(),
        }
    }
}
