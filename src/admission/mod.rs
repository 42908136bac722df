//! Admission: the one place that joins text, registry, engine and training.
//!
//! Every edge calls [`Service`]; one function per call, read from top to bottom: check, take a permit, tokenise, resolve
//! and lease, hand over, answer. Nothing here computes; tokenising and decoding run on the blocking pool.

mod beam_params;
mod beams;
mod catalog;
pub mod catalog_params;
pub mod check;
mod choice;
mod classify;
mod classify_params;
mod constraint_params;
mod constraints;
mod encode;
mod engine_errors;
pub mod eval_metric;
mod generate;
pub mod generation_params;
mod info;
mod input_checks;
pub mod jobs;
mod limits_file;
mod merge;
pub mod method_parts;
mod models;
pub mod params;
mod places;
pub mod position_params;
pub mod preference_params;
pub mod quota;
pub mod resolved_training;
mod resume;
mod serve_error;
mod service;
mod speculation_params;
mod stored;
pub mod sweep_params;
mod tenant_deletion;
mod tenant_quota;
mod tenants;
pub mod train_params;
mod training;
pub mod transfer_params;

pub use limits_file::{LimitsError, MAX_LIMITS_BYTES, Quotas};
pub use models::FilePiece;
pub use service::{BasePooling, CallLease, Pieces, Service, ServiceLimits, ServiceParts};
pub use tenant_deletion::TenantDeleted;
pub use tenant_quota::QuotaUse;
pub use tenants::TenantLimits;
