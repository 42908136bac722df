//! What changes in a job: events, its state, the checkpoint that it goes on from; each change is one transaction.

use std::time::Duration;

use sqlx::{Row, SqliteConnection};

use super::{check_state, find, is_terminal};
use crate::{
    ids::BlobId,
    store::{
        Store, StoreError,
        db::{from_db, now_ms, parse, to_db},
    },
};

/// The name under which a job that failed keeps its last good weights: the one blob that outlives the job's end.
const KEPT: &str = "checkpoint";

/// A change of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobChange {
    /// What happened, in order; at least one.
    pub events: Vec<String>,
    /// The new state.
    pub state: Option<String>,
    /// What came of the job.
    pub result_json: Option<String>,
    /// What it goes on from, from now on: step, and a stored blob that nobody else names. A change with an older one than
    /// the job has is left out whole.
    pub checkpoint: Option<(u64, BlobId)>,
    /// The job goes on from its checkpoint after a stop of the server that it did not come out of by itself.
    pub resumes: bool,
}

/// What a job goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Steps done.
    pub step: u64,
    /// Its bytes.
    pub blob: BlobId,
    /// Starts of the server that went on from it without making a newer one.
    pub resumes: u64,
}

impl Store {
    /// Appends events, and with them, in the same transaction, the job's new state, result and checkpoint if given. What a
    /// new checkpoint replaces is removed after, and with a final state, all that the job kept to go on. Returns the number
    /// of the last event.
    ///
    /// # Errors
    /// [`StoreError::JobEnded`] after a final state; [`StoreError::NotFound`], also of a blob that is not stored;
    /// [`StoreError::Invalid`] for an unknown state.
    pub async fn change_job(&self, job_id: &str, change: JobChange) -> Result<u64, StoreError> {
        if let Some(state) = &change.state {
            check_state(state)?;
        }
        let _hold = match change.checkpoint {
            Some((_, blob)) => {
                let hold = self.inner.holds.hold(blob).await;
                self.require_blob(blob).await?;
                Some(hold)
            }
            None => None,
        };
        let mut tx = self.db().begin().await?;
        let job = find(&mut tx, job_id).await?;
        if is_terminal(&job.state) {
            return Err(StoreError::JobEnded { id: job.id, state: job.state });
        }
        let before = checkpoint(&mut tx, job_id).await?;
        if let (Some((step, blob)), before) = (change.checkpoint, &before) {
            if before.is_some_and(|b| b.step > step) {
                return Ok(job.last_seq);
            }
            let sql = "INSERT INTO job_checkpoints (job_id, step, blob) VALUES ($1, $2, $3) ON CONFLICT (job_id) \
                       DO UPDATE SET step = excluded.step, blob = excluded.blob, resumes = 0";
            let insert = sqlx::query(sql).bind(job_id).bind(to_db(step)).bind(blob.to_string());
            insert.execute(&mut *tx).await?;
        }
        if change.resumes {
            let sql = "UPDATE job_checkpoints SET resumes = resumes + 1 WHERE job_id = $1";
            sqlx::query(sql).bind(job_id).execute(&mut *tx).await?;
        }
        let over = change.state.as_deref().is_some_and(is_terminal);
        if over {
            sqlx::query("DELETE FROM job_checkpoints WHERE job_id = $1").bind(job_id).execute(&mut *tx).await?;
            let sql = "DELETE FROM job_blobs WHERE job_id = $1 AND name <> $2";
            sqlx::query(sql).bind(job_id).bind(KEPT).execute(&mut *tx).await?;
        }
        let (mut seq, now) = (job.last_seq, now_ms());
        for body in change.events {
            seq += 1;
            let sql = "INSERT INTO job_events (job_id, seq, at_ms, body_json) VALUES ($1, $2, $3, $4)";
            sqlx::query(sql).bind(job_id).bind(to_db(seq)).bind(now).bind(body).execute(&mut *tx).await?;
        }
        let sql = "UPDATE jobs SET last_seq = $2, updated_ms = $3, state = $4, result_json = $5 WHERE id = $1";
        let update = sqlx::query(sql).bind(job_id).bind(to_db(seq)).bind(now).bind(change.state.unwrap_or(job.state));
        update.bind(change.result_json.or(job.result_json)).execute(&mut *tx).await?;
        tx.commit().await?;
        if let Some(before) = before.filter(|b| over || change.checkpoint.is_some_and(|(_, new)| new != b.blob)) {
            self.free(before.blob).await;
        }
        Ok(seq)
    }

    /// What a job goes on from.
    ///
    /// # Errors
    /// What the database refuses. An unknown job has none.
    pub async fn job_checkpoint(&self, job_id: &str) -> Result<Option<CheckpointRecord>, StoreError> {
        let mut reader = self.db().readers().acquire().await?;
        checkpoint(&mut reader, job_id).await
    }

    /// Removes a blob of a job's own that no row names any more, at once: the next one is as large. If it cannot, the
    /// hourly collection does.
    async fn free(&self, blob: BlobId) {
        // who is about to name these bytes holds them
        let Some(_claim) = self.inner.holds.claim(blob, Duration::ZERO) else { return };
        let freed = match self.is_named(blob).await {
            Ok(true) => return,
            Ok(false) => self.blobs().delete(blob).await,
            Err(e) => Err(e),
        };
        if let Err(error) = freed {
            tracing::warn!(%blob, %error, "a replaced checkpoint could not be removed");
        }
    }
}

async fn checkpoint(tx: &mut SqliteConnection, job_id: &str) -> Result<Option<CheckpointRecord>, StoreError> {
    const TABLE: &str = "job_checkpoints";
    let sql = "SELECT step, blob, resumes FROM job_checkpoints WHERE job_id = $1";
    let Some(row) = sqlx::query(sql).bind(job_id).fetch_optional(tx).await? else { return Ok(None) };
    Ok(Some(CheckpointRecord {
        step: from_db(TABLE, row.try_get(0)?)?,
        blob: parse(TABLE, row.try_get(1)?)?,
        resumes: from_db(TABLE, row.try_get(2)?)?,
    }))
}
