//! Admission: the one place that joins text, registry, engine and training.
pub mod params;
pub mod train_params;
