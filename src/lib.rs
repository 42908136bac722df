//! deltaserve: one frozen base model, many tenants' deltas, one forward.

pub mod admission;
pub mod app;
pub mod cli;
pub mod config;
pub mod delta;
pub mod engine;
pub mod grpc;
pub mod http;
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
pub mod shutdown;
pub mod store;
pub mod telemetry;
pub mod text;
pub mod train;
