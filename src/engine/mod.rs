//! The engine: one thread that owns serving's compute.

mod sampler;
mod scheduler;
