//! deltaserve: one frozen base model, many tenants' deltas, one forward.
pub mod admission;
pub mod delta;
pub mod ids;
pub mod pacing;
pub mod registry;
pub mod rows;
pub mod store;
