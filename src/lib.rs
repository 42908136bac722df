//! deltaserve: one frozen base model, many tenants' deltas, one forward.
pub mod admission;
pub mod delta;
pub mod hub;
pub mod ids;
pub mod interop;
pub mod kv;
pub mod model;
pub mod nn;
pub mod ops;
pub mod pacing;
pub mod registry;
pub mod rows;
pub mod train;
