//! Admission: the one place that joins text, registry, engine and training.
pub mod catalog_params;
pub mod check;
pub mod jobs;
pub mod params;
mod service;
pub mod train_params;

pub use service::{Pieces, Service};
