//! What changes in a job: events, its state, the checkpoint that it goes on from; each change is one transaction.

use std::time::Duration;

use super::{check_state, find, is_terminal, not_found};
use crate::{
    ids::{BlobId, TenantId},
    store::{
        Store, StoreError,
        db::{Conn, On, Row, from_db, now_ms, parse, query, to_db},
    },
};

/// The name under which a job that failed keeps its last good weights: they outlive the job's end.
const KEPT: &str = "checkpoint";
/// What the names begin with under which a job keeps the weights of its best evaluations; the step follows.
const BEST: &str = "best.";
/// Jobs of a tenant that have ended and keep what they would go on from or the weights of their best evaluations; the oldest let
/// go of it first.
const KEEPERS: i64 = 8;

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
    /// new checkpoint replaces is removed after, and with a final state, all that the job kept to go on; one that did not
    /// end as its owner wanted (`failed`, `interrupted`) keeps its checkpoint and data, until the tenant has some newer ones. So
    /// does, but for the checkpoint, one that succeeded with weights of its best evaluations ([`Self::keep_best`]).
    /// Returns the number of the last event.
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
                let hold = self.hold(&[blob]).await?;
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
        self.fence(&mut tx, job_id).await?;
        if let Some((_, blob)) = change.checkpoint {
            self.check_held(&mut tx, &[blob]).await?;
        }
        let before = checkpoint(&mut *tx, job_id).await?;
        if let (Some((step, blob)), before) = (change.checkpoint, &before) {
            if before.is_some_and(|b| b.step > step) {
                return Ok(job.last_seq);
            }
            let sql = "INSERT INTO job_checkpoints (job_id, step, blob) VALUES ($1, $2, $3) ON CONFLICT (job_id) \
                       DO UPDATE SET step = excluded.step, blob = excluded.blob, resumes = 0";
            let insert = query(sql).bind(job_id).bind(to_db(step)).bind(blob.to_string());
            insert.execute(&mut *tx).await?;
        }
        if change.resumes {
            let sql = "UPDATE job_checkpoints SET resumes = resumes + 1 WHERE job_id = $1";
            query(sql).bind(job_id).execute(&mut *tx).await?;
        }
        let over = change.state.as_deref().is_some_and(is_terminal);
        let goes_on = before.is_some() || change.checkpoint.is_some();
        let has_best = over && !bests(&mut *tx, job_id).await?.is_empty();
        let keeps = match change.state.as_deref() {
            Some("failed" | "interrupted") => goes_on || has_best,
            Some("succeeded") => has_best,
            _ => false,
        };
        let mut freed: Vec<BlobId> = Vec::new();
        if over && !keeps {
            freed.extend(let_go(&mut tx, job_id).await?);
        } else if change.state.as_deref() == Some("succeeded") {
            freed.extend(forget_checkpoint(&mut tx, job_id).await?); // it has nothing to go on to
        } else if let (Some(before), Some((_, new))) = (&before, change.checkpoint) {
            freed.extend((before.blob != new).then_some(before.blob));
        }
        if keeps {
            for older in keepers(&mut tx, job_id, &job.tenant).await? {
                freed.extend(let_go(&mut tx, &older).await?);
            }
        }
        let (mut seq, now) = (job.last_seq, now_ms());
        for body in change.events {
            seq += 1;
            let sql = "INSERT INTO job_events (job_id, seq, at_ms, body_json) VALUES ($1, $2, $3, $4)";
            query(sql).bind(job_id).bind(to_db(seq)).bind(now).bind(body).execute(&mut *tx).await?;
        }
        let sql = "UPDATE jobs SET last_seq = $2, updated_ms = $3, state = $4, result_json = $5 WHERE id = $1";
        let update = query(sql).bind(job_id).bind(to_db(seq)).bind(now).bind(change.state.unwrap_or(job.state));
        update.bind(change.result_json.or(job.result_json)).execute(&mut *tx).await?;
        crate::failpoint!("job-change-before-commit", |why| Err(StoreError::injected(why)));
        tx.commit().await?;
        crate::failpoint!("job-change-committed");
        for blob in freed {
            self.free(blob).await;
        }
        Ok(seq)
    }

    /// Counts one more start of the server that prepares a waiting job again, before it does; or, once that has come to an
    /// end, forgets them. Returns how many there were before.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what the database refuses.
    pub async fn count_try(&self, job_id: &str, begins: bool) -> Result<u64, StoreError> {
        let mut tx = self.db().begin().await?;
        self.fence(&mut tx, job_id).await?;
        let row = query("SELECT tries FROM jobs WHERE id = $1").bind(job_id).fetch_optional(&mut *tx).await?;
        let tries = row.ok_or_else(|| not_found(job_id))?.try_get::<i64, _>(0)?;
        crate::failpoint!("job-try-before-commit");
        let after = if begins { tries.saturating_add(1) } else { 0 };
        query("UPDATE jobs SET tries = $2 WHERE id = $1").bind(job_id).bind(after).execute(&mut *tx).await?;
        tx.commit().await?;
        from_db("jobs", tries)
    }

    /// Starts of the server that began to prepare a waiting job again and did not come to the end of it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what the database refuses.
    pub async fn job_tries(&self, job_id: &str) -> Result<u64, StoreError> {
        let query = query("SELECT tries FROM jobs WHERE id = $1").bind(job_id);
        let row = query.fetch_optional(self.db().readers()).await?.ok_or_else(|| not_found(job_id))?;
        from_db("jobs", row.try_get(0)?)
    }

    /// What a job goes on from.
    ///
    /// # Errors
    /// What the database refuses. An unknown job has none.
    pub async fn job_checkpoint(&self, job_id: &str) -> Result<Option<CheckpointRecord>, StoreError> {
        checkpoint(self.db(), job_id).await
    }

    /// Keeps the weights that a job had after a step, one of its best evaluations, beside what it goes on from; replaces what
    /// it kept of that step.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for an unknown job or a blob that is not stored.
    pub async fn keep_best(&self, job_id: &str, step: u64, blob: BlobId) -> Result<(), StoreError> {
        self.set_job_blob(job_id, &format!("{BEST}{step}"), blob).await
    }

    /// What a job keeps of its best evaluations: steps, in order, and weights.
    ///
    /// # Errors
    /// What the database refuses. An unknown job keeps none.
    pub async fn job_bests(&self, job_id: &str) -> Result<Vec<(u64, BlobId)>, StoreError> {
        bests(self.db(), job_id).await
    }

    /// Removes a blob of a job's own that no row names any more, at once: the next one is as large. If it cannot, the
    /// hourly collection does.
    pub(crate) async fn free(&self, blob: BlobId) {
        if let Err(error) = self.collect(blob, Duration::ZERO).await {
            tracing::warn!(%blob, %error, "a replaced checkpoint could not be removed");
        }
    }
}

/// Takes from a job that has ended what it kept to go on and of its best evaluations; the blobs that were its own.
async fn let_go(tx: &mut Conn, job_id: &str) -> Result<Vec<BlobId>, StoreError> {
    let mut own: Vec<BlobId> = bests(&mut *tx, job_id).await?.into_iter().map(|(_, blob)| blob).collect();
    own.extend(forget_checkpoint(tx, job_id).await?);
    let sql = "DELETE FROM job_blobs WHERE job_id = $1 AND name <> $2";
    query(sql).bind(job_id).bind(KEPT).execute(tx).await?;
    Ok(own)
}

/// Takes its checkpoint from a job; its blob, if it had one.
async fn forget_checkpoint(tx: &mut Conn, job_id: &str) -> Result<Option<BlobId>, StoreError> {
    let had = checkpoint(&mut *tx, job_id).await?;
    query("DELETE FROM job_checkpoints WHERE job_id = $1").bind(job_id).execute(tx).await?;
    Ok(had.map(|c| c.blob))
}

/// The jobs of a tenant that ended and kept something, and are too many beside this one, which ends so now.
async fn keepers(tx: &mut Conn, job_id: &str, tenant: &TenantId) -> Result<Vec<String>, StoreError> {
    let sql = "SELECT id FROM jobs WHERE tenant = $1 AND id <> $2 AND state IN ('failed', 'interrupted', 'succeeded') AND \
               (EXISTS (SELECT 1 FROM job_checkpoints WHERE job_id = jobs.id) OR EXISTS \
               (SELECT 1 FROM job_blobs WHERE job_id = jobs.id AND name LIKE $4)) \
               ORDER BY updated_ms DESC, id DESC LIMIT 1000000000 OFFSET $3";
    let query = query(sql).bind(tenant.as_str()).bind(job_id).bind(KEEPERS - 1).bind(format!("{BEST}%"));
    query.fetch_all(tx).await?.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// What a job keeps of its best evaluations: steps, in order, and weights.
async fn bests<'a>(on: impl Into<On<'a>>, job_id: &str) -> Result<Vec<(u64, BlobId)>, StoreError> {
    const TABLE: &str = "job_blobs";
    let sql = "SELECT name, blob FROM job_blobs WHERE job_id = $1 AND name LIKE $2";
    let rows = query(sql).bind(job_id).bind(format!("{BEST}%")).fetch_all(on).await?;
    let read = |row: &Row| {
        let name: String = row.try_get(0)?;
        let step = name.strip_prefix(BEST).and_then(|step| step.parse().ok());
        let step = step.ok_or_else(|| StoreError::row(TABLE, format!("name {name:?}")))?;
        Ok((step, parse(TABLE, row.try_get(1)?)?))
    };
    let mut all = rows.iter().map(read).collect::<Result<Vec<(u64, BlobId)>, StoreError>>()?;
    all.sort_unstable_by_key(|(step, _)| *step);
    Ok(all)
}

async fn checkpoint<'a>(on: impl Into<On<'a>>, job_id: &str) -> Result<Option<CheckpointRecord>, StoreError> {
    const TABLE: &str = "job_checkpoints";
    let sql = "SELECT step, blob, resumes FROM job_checkpoints WHERE job_id = $1";
    let Some(row) = query(sql).bind(job_id).fetch_optional(on).await? else { return Ok(None) };
    Ok(Some(CheckpointRecord {
        step: from_db(TABLE, row.try_get(0)?)?,
        blob: parse(TABLE, row.try_get(1)?)?,
        resumes: from_db(TABLE, row.try_get(2)?)?,
    }))
}
