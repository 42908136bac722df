//! Training in the background, against the same resident weights that serve.
pub mod batches;
pub mod dataset;
pub mod encode;
pub mod eval;
pub mod issue;
#[cfg(test)]
mod laws;
pub mod metrics;
pub mod objective;
pub mod optim;
pub mod plan;
pub mod run;
pub mod spec;
pub mod trainable;
pub mod validate;
