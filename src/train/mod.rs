//! Training in the background, against the same resident weights that serve.
//!
//! ```text
//! request + data -> plan (validate, tokenise, resolve) -> handle -> supervisor (queue, events, publish)
//!                                                                       |  ^
//!                                                              starts   v  |  reports
//!                                                                worker (thread): run, micro-step by micro-step
//! ```
//! It knows the model, deltas and the log of jobs. It never touches the engine (only the pacer is shared), never changes
//! a base weight, and never makes a version itself: the composition root gives it a [`Publisher`].

pub mod batches;
pub mod beginning;
#[cfg(test)]
mod best_laws;
mod control;
pub mod dataset;
pub mod encode;
mod ending;
mod error;
pub mod eval;
pub mod ewc;
#[cfg(test)]
mod full_laws;
#[cfg(test)]
mod full_tests;
pub mod generate;
#[cfg(test)]
mod generation_laws;
#[cfg(test)]
mod gradient_laws;
pub mod gradients;
mod handle;
pub mod issue;
pub mod joblog;
#[cfg(test)]
mod kl_laws;
#[cfg(test)]
mod laws;
mod left;
mod limits;
pub mod memory;
#[cfg(test)]
mod method_laws;
pub mod metrics;
pub mod mixing;
#[cfg(test)]
mod mixing_laws;
#[cfg(test)]
mod mixing_tests;
pub mod objective;
pub mod optim;
pub mod plan;
pub mod preference;
#[cfg(test)]
mod preference_laws;
#[cfg(test)]
mod quantized_laws;
#[cfg(test)]
mod replay_laws;
#[cfg(test)]
mod resume_laws;
#[cfg(test)]
mod resume_tests;
mod resuming;
pub mod run;
mod servers;
#[cfg(test)]
mod sharing_laws;
pub mod spec;
mod start;
mod supervisor;
#[cfg(test)]
mod supervisor_tests;
mod svd;
#[cfg(test)]
mod sweep_laws;
#[cfg(test)]
mod sweep_resume_laws;
#[cfg(test)]
mod testing;
mod together;
pub mod trainable;
pub mod transfer;
#[cfg(test)]
mod transfer_laws;
pub mod validate;
#[cfg(test)]
mod wanted_laws;
mod watch;
mod worker;
pub mod worst;

pub use error::{SpawnError, TrainError};
pub use handle::{Kept, TrainerHandle, TrainerParts};
pub use joblog::KeptJob;
pub use limits::TrainerConfig;
pub use plan::{BaseInfo, Inputs, Prepared, prepare};
pub use resuming::Place;
pub use supervisor::{PublishFailure, PublishInfo, PublishJob, Published, Publisher, Refusal, publish_info};
pub use watch::JobWatch;
