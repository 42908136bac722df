//! What the trainer answers where it does not do what it was asked.

use std::io;

use crate::{
    admission::{params::TenantLimit, train_params::JobState},
    train::{joblog::LogError, memory::Shortage},
};

/// Why the trainer refused.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The queue, or the tenant's share of it, is full.
    #[error("overloaded: {0}")]
    Overloaded(String),
    /// The tenant is at a limit of its own.
    #[error("{0}")]
    Quota(TenantLimit),
    /// The server is going down.
    #[error("the server is shutting down")]
    Draining,
    /// The trainer thread has ended by itself.
    #[error("training is down until the server is restarted; its jobs go on then")]
    Down,
    /// No such job, or another tenant's.
    #[error("no job {0:?}")]
    NotFound(String),
    /// The job's state does not allow it.
    #[error("job {id} is {}, not {wanted}", .state.as_str())]
    State {
        /// Which job.
        id: String,
        /// Its state.
        state: JobState,
        /// The states that do.
        wanted: &'static str,
    },
    /// Another server has the job, and has not done yet what it was asked.
    #[error("job {0} is run by another server, which has not paused it yet")]
    Elsewhere(String),
    /// Full fine-tuning has no checkpoints.
    #[error("job {0} trains every weight and has begun: it cannot be paused, only cancelled")]
    FullRuns(String),
    /// No room for full fine-tuning.
    #[error(transparent)]
    Memory(#[from] Shortage),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Why the trainer did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// No thread.
    #[error("no trainer thread: {0}")]
    Thread(#[from] io::Error),
}
