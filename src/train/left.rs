//! Jobs that an earlier process left behind: which end, which go on.

use crate::{
    admission::train_params::{JobEventBody, JobState, StateEvent},
    train::{
        joblog::{JobLog, LogError, StoredJob},
        supervisor::interrupted,
    },
};

/// Starts of the server that go on from one checkpoint, or that begin to prepare a waiting job: one that brings the server
/// down must not do so for ever.
const MAX_RESUMES: u64 = 3;

/// What becomes of such a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// It has ended.
    Ended,
    /// It waits to be prepared again; steps done.
    Waits(u32),
    /// It is paused; steps done.
    Paused(u32),
}

/// Writes what has become of a job that has not ended. One that had published has succeeded; one that waited or was paused
/// still does; one that ran waits again if it has a checkpoint, and is interrupted else. One that was there at several stops
/// of the server is interrupted, too.
///
/// # Errors
/// The log's.
pub(super) async fn take_over(log: &JobLog, job: &StoredJob) -> Result<Left, LogError> {
    let (id, was) = (&job.info.id, job.info.state);
    let kept = log.checkpoint(id).await?;
    let step = kept.map_or(0, |k| u32::try_from(k.step).unwrap_or(u32::MAX));
    let tries = log.tries(id).await?;
    let why = match (log.published(job).await?, was, kept) {
        (Some(result), _, _) => {
            let event = StateEvent { state: JobState::Succeeded, result: Some(result), failure: None };
            return end(log, job, event).await;
        }
        (None, JobState::Paused, _) => return Ok(Left::Paused(step)),
        (None, JobState::Queued, _) if tries >= MAX_RESUMES => {
            format!("the server stopped while the job was being prepared, at each of its {tries} last starts")
        }
        (None, JobState::Queued, _) => {
            if job.info.last_seq == 0 {
                log.queue_again(id, step, false).await?; // it was made, and its first event was not written
            }
            return Ok(Left::Waits(step));
        }
        (None, _, Some(kept)) if kept.resumes < MAX_RESUMES => {
            tracing::warn!(job = id, state = was.as_str(), step, "queued a job that an earlier process left");
            log.queue_again(id, step, true).await?;
            return Ok(Left::Waits(step));
        }
        (None, _, Some(kept)) => format!(
            "the server stopped while the job was {}, as it did at its {} earlier starts from step {step}",
            was.as_str(),
            kept.resumes
        ),
        (None, _, None) => format!("the server stopped while the job was {}", was.as_str()),
    };
    let failure = Some(interrupted(&why));
    end(log, job, StateEvent { state: JobState::Interrupted, result: None, failure }).await
}

async fn end(log: &JobLog, job: &StoredJob, event: StateEvent) -> Result<Left, LogError> {
    let (id, was) = (&job.info.id, job.info.state.as_str());
    tracing::warn!(job = id, state = was, end = event.state.as_str(), "ended a job that an earlier process left");
    log.append(id, job.info.step, JobEventBody::State(event)).await?;
    Ok(Left::Ended)
}
