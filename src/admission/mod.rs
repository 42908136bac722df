//! Admission: the one place that joins text, registry, engine and training.
pub mod jobs;
pub mod params;
pub mod train_params;
