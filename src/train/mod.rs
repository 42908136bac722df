//! Training in the background, against the same resident weights that serve.
pub mod batches;
pub mod dataset;
pub mod encode;
pub mod issue;
pub mod optim;
pub mod plan;
pub mod spec;
pub mod trainable;
pub mod validate;
