//! Training jobs: their rows, their gap-free event histories, the blobs that they keep, and idempotency keys.
//!
//! Knows states as words and which of them are final; what a job does and what its JSON means is the trainer's matter.

mod changes;

pub use changes::{CheckpointRecord, JobChange};

use super::{
    Store, StoreError,
    db::{Conn, Row, check_text, from_db, now_ms, parse, query, to_db},
};
use crate::ids::{BlobId, DeltaId, TenantId};

/// Every state of a job.
const STATES: [&str; 8] =
    ["queued", "running", "paused", "publishing", "succeeded", "failed", "cancelled", "interrupted"];
/// Most jobs or events in one answer.
const MAX_PAGE: u32 = 1000;

/// Whether a job in this state has ended for good.
pub fn is_terminal(state: &str) -> bool {
    matches!(state, "succeeded" | "failed" | "cancelled" | "interrupted")
}

/// A job to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewJob {
    /// Its id: a UUID v7, ordered by time.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// The name that its result is published under.
    pub output_name: String,
    /// The request as it came.
    pub request_json: String,
    /// The request with every default filled in.
    pub resolved_json: String,
    /// A repeated request with this key gets the first one's job.
    pub idempotency_key: Option<String>,
    /// What makes a request with the same key the same request.
    pub request_digest: String,
    /// Fingerprint of the base that it is made for.
    pub base: String,
    /// Stored blobs that it keeps until its end, by a name of its own.
    pub blobs: Vec<(String, BlobId)>,
}

/// What became of a create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateJob {
    /// The job is new.
    Created(JobRecord),
    /// The same request had come before with this key.
    Existing(JobRecord),
}

/// A job as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRecord {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// The name that its result is published under.
    pub output_name: String,
    /// `queued`, `running`, `paused`, `publishing`, or final: `succeeded`, `failed`, `cancelled`, `interrupted`.
    pub state: String,
    /// The request as it came.
    pub request_json: String,
    /// The request with every default filled in.
    pub resolved_json: String,
    /// What came of it.
    pub result_json: Option<String>,
    /// Unix milliseconds.
    pub created_ms: i64,
    /// Unix milliseconds of its last event.
    pub updated_ms: i64,
    /// Number of its last event; 0 = none yet.
    pub last_seq: u64,
    /// Fingerprint of the base that it was made for; empty: not known.
    pub base: String,
}

/// One event of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// Its number: from 1, without gaps.
    pub seq: u64,
    /// Unix milliseconds.
    pub at_ms: i64,
    /// What happened.
    pub body_json: String,
}

/// A page of jobs, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobPage {
    /// The jobs.
    pub jobs: Vec<JobRecord>,
    /// Where the next page starts; empty: this is the last.
    pub next_page_token: String,
}

/// Jobs that have not ended.
macro_rules! unfinished {
    () => {
        "state IN ('queued', 'running', 'paused', 'publishing')"
    };
}
pub(super) use unfinished;

macro_rules! select_jobs {
    ($($rest:expr),+) => {
        concat!(
            "SELECT id, tenant, output_name, state, request_json, resolved_json, result_json, created_ms, updated_ms, ",
            "last_seq, base FROM jobs ",
            $($rest),+
        )
    };
}
pub(super) use select_jobs;

impl Store {
    /// Creates a job in state `queued`, once per idempotency key.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyConflict`] if the key came with another request before; [`StoreError::NotFound`] for a blob
    /// that is not stored.
    pub async fn create_job(&self, new: NewJob) -> Result<CreateJob, StoreError> {
        check_text("idempotency_key", new.idempotency_key.as_deref().unwrap_or_default())?;
        let blobs: Vec<BlobId> = new.blobs.iter().map(|(_, blob)| *blob).collect();
        let _held = self.hold(&blobs).await?;
        for blob in &blobs {
            self.require_blob(*blob).await?;
        }
        let mut tx = self.db().begin().await?;
        self.check_held(&mut tx, &blobs).await?;
        self.check_open(&new.tenant)?;
        if let Some(key) = &new.idempotency_key {
            let sql = "SELECT request_digest, job_id FROM idempotency WHERE tenant = $1 AND idempotency_key = $2";
            if let Some(row) = query(sql).bind(new.tenant.as_str()).bind(key).fetch_optional(&mut *tx).await? {
                if row.try_get::<String, _>(0)? != new.request_digest {
                    return Err(StoreError::IdempotencyConflict(key.clone()));
                }
                return Ok(CreateJob::Existing(find(&mut tx, row.try_get(1)?).await?));
            }
        }
        let now = now_ms();
        let sql = "INSERT INTO jobs (id, tenant, output_name, state, request_json, resolved_json, created_ms, \
                   updated_ms, base, owner) VALUES ($1, $2, $3, 'queued', $4, $5, $6, $6, $7, $8)";
        let insert = query(sql).bind(&new.id).bind(new.tenant.as_str()).bind(&new.output_name);
        let insert = insert.bind(&new.request_json).bind(&new.resolved_json).bind(now).bind(&new.base);
        insert.bind(self.server()).execute(&mut *tx).await?;
        for (name, blob) in &new.blobs {
            let sql = "INSERT INTO job_blobs (job_id, name, blob) VALUES ($1, $2, $3)";
            query(sql).bind(&new.id).bind(name).bind(blob.to_string()).execute(&mut *tx).await?;
        }
        if let Some(key) = &new.idempotency_key {
            let sql = "INSERT INTO idempotency (tenant, idempotency_key, request_digest, job_id, created_ms) \
                       VALUES ($1, $2, $3, $4, $5)";
            let insert = query(sql).bind(new.tenant.as_str()).bind(key).bind(&new.request_digest);
            insert.bind(&new.id).bind(now).execute(&mut *tx).await?;
        }
        let job = find(&mut tx, &new.id).await?;
        crate::failpoint!("job-create-before-commit", |why| Err(StoreError::injected(why)));
        tx.commit().await?;
        crate::failpoint!("job-create-committed");
        Ok(CreateJob::Created(job))
    }

    /// The job that this key made, if the request was the same one.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyConflict`] if the key came with another request.
    pub async fn job_made_with(
        &self,
        tenant: &TenantId,
        key: &str,
        digest: &str,
    ) -> Result<Option<JobRecord>, StoreError> {
        let sql = "SELECT request_digest, job_id FROM idempotency WHERE tenant = $1 AND idempotency_key = $2";
        let query = query(sql).bind(tenant.as_str()).bind(key);
        let Some(row) = query.fetch_optional(self.db().readers()).await? else { return Ok(None) };
        if row.try_get::<String, _>(0)? != digest {
            return Err(StoreError::IdempotencyConflict(key.to_owned()));
        }
        self.get_job(tenant, row.try_get(1)?).await.map(Some)
    }

    /// Number and id of the version that a job published, deleted or not.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn version_of_job(
        &self,
        tenant: &TenantId,
        name: &str,
        job_id: &str,
    ) -> Result<Option<(u64, DeltaId)>, StoreError> {
        let sql = "SELECT number, id FROM versions WHERE tenant = $1 AND name = $2 AND origin = $3";
        let query = query(sql).bind(tenant.as_str()).bind(name);
        let query = query.bind(super::Origin::Job(job_id.to_owned()).to_string());
        let Some(row) = query.fetch_optional(self.db().readers()).await? else { return Ok(None) };
        Ok(Some((from_db("versions", row.try_get(0)?)?, parse("versions", row.try_get(1)?)?)))
    }

    /// Appends an event, and with it, in the same transaction, the job's new state and result if given. Returns the
    /// event's number.
    ///
    /// # Errors
    /// [`StoreError::JobEnded`] after a final state; [`StoreError::NotFound`]; [`StoreError::Invalid`] for an unknown
    /// state.
    pub async fn append_event(
        &self,
        job_id: &str,
        body_json: String,
        state: Option<&str>,
        result_json: Option<String>,
    ) -> Result<u64, StoreError> {
        let state = state.map(str::to_owned);
        self.change_job(job_id, JobChange { events: vec![body_json], state, result_json, ..JobChange::default() }).await
    }

    /// A job's events from number `from_seq` on, in order, at most `limit` (and at most 1000) of them.
    ///
    /// # Errors
    /// What the database refuses. An unknown job has no events.
    pub async fn events(&self, job_id: &str, from_seq: u64, limit: u32) -> Result<Vec<EventRecord>, StoreError> {
        let sql = "SELECT seq, at_ms, body_json FROM job_events WHERE job_id = $1 AND seq >= $2 ORDER BY seq LIMIT $3";
        let query = query(sql).bind(job_id).bind(to_db(from_seq)).bind(i64::from(limit.min(MAX_PAGE)));
        let rows = query.fetch_all(self.db().readers()).await?;
        let event = |row: &Row| {
            let seq = from_db("job_events", row.try_get(0)?)?;
            Ok(EventRecord { seq, at_ms: row.try_get(1)?, body_json: row.try_get(2)? })
        };
        rows.iter().map(event).collect()
    }

    /// A tenant's job.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for another tenant's.
    pub async fn get_job(&self, tenant: &TenantId, id: &str) -> Result<JobRecord, StoreError> {
        let query = query(select_jobs!("WHERE tenant = $1 AND id = $2")).bind(tenant.as_str()).bind(id);
        record(&query.fetch_optional(self.db().readers()).await?.ok_or_else(|| not_found(id))?)
    }

    /// A job of any tenant: for what the server itself has to know.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn any_job(&self, id: &str) -> Result<Option<JobRecord>, StoreError> {
        let query = query(select_jobs!("WHERE id = $1")).bind(id);
        query.fetch_optional(self.db().readers()).await?.as_ref().map(record).transpose()
    }

    /// A tenant's jobs, newest first; of one state, if given. `page_token` is empty or what the last page gave.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for an unknown state.
    pub async fn list_jobs(
        &self,
        tenant: &TenantId,
        page_token: &str,
        limit: u32,
        state: Option<&str>,
    ) -> Result<JobPage, StoreError> {
        if let Some(state) = state {
            check_state(state)?;
        }
        let limit = limit.clamp(1, MAX_PAGE);
        let sql = select_jobs!(
            "WHERE tenant = $1 AND ($2 = '' OR id < $2) AND ($3 = '' OR state = $3) ORDER BY id DESC LIMIT $4"
        );
        let query = query(sql).bind(tenant.as_str()).bind(page_token).bind(state.unwrap_or_default());
        let rows = query.bind(i64::from(limit) + 1).fetch_all(self.db().readers()).await?;
        let mut jobs = rows.iter().map(record).collect::<Result<Vec<_>, _>>()?;
        let more = jobs.len() > limit as usize;
        jobs.truncate(limit as usize);
        let last = if more { jobs.last() } else { None };
        Ok(JobPage { next_page_token: last.map(|j| j.id.clone()).unwrap_or_default(), jobs })
    }

    /// Jobs of all tenants that have not ended, oldest first: what a restart has to take up again.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn unfinished_jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        let sql = select_jobs!("WHERE ", unfinished!(), " ORDER BY id");
        query(sql).fetch_all(self.db().readers()).await?.iter().map(record).collect()
    }

    /// Lets a job keep a stored blob alive under a name of its own (`dataset`, `checkpoint`); replaces the one before.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for an unknown job or a blob that is not stored.
    pub async fn set_job_blob(&self, job_id: &str, name: &str, blob: BlobId) -> Result<(), StoreError> {
        let _hold = self.hold(&[blob]).await?;
        self.require_blob(blob).await?;
        let mut tx = self.db().begin().await?;
        self.check_held(&mut tx, &[blob]).await?;
        find(&mut tx, job_id).await?;
        self.fence(&mut tx, job_id).await?;
        let sql = "INSERT INTO job_blobs (job_id, name, blob) VALUES ($1, $2, $3) \
                   ON CONFLICT (job_id, name) DO UPDATE SET blob = excluded.blob";
        query(sql).bind(job_id).bind(name).bind(blob.to_string()).execute(&mut *tx).await?;
        crate::failpoint!("job-blob-before-commit", |why| Err(StoreError::injected(why)));
        tx.commit().await?;
        crate::failpoint!("job-blob-committed");
        Ok(())
    }

    /// The blobs that a job keeps, by name.
    ///
    /// # Errors
    /// What the database refuses. An unknown job keeps none.
    pub async fn job_blobs(&self, job_id: &str) -> Result<Vec<(String, BlobId)>, StoreError> {
        let sql = "SELECT name, blob FROM job_blobs WHERE job_id = $1 ORDER BY name";
        let rows = query(sql).bind(job_id).fetch_all(self.db().readers()).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, parse("job_blobs", row.try_get(1)?)?))).collect()
    }

    /// Lets go of all blobs that a job keeps.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn clear_job_blobs(&self, job_id: &str) -> Result<(), StoreError> {
        let mut tx = self.db().begin().await?;
        query("DELETE FROM job_blobs WHERE job_id = $1").bind(job_id).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(())
    }
}

fn check_state(state: &str) -> Result<(), StoreError> {
    match STATES.contains(&state) {
        true => Ok(()),
        false => {
            let message = format!("{state:?} is not a job state; accepted are {}", STATES.join(", "));
            Err(StoreError::Invalid { field: "state", message })
        }
    }
}

fn not_found(id: &str) -> StoreError {
    StoreError::NotFound { kind: "job", name: id.to_owned() }
}

async fn find(tx: &mut Conn, id: &str) -> Result<JobRecord, StoreError> {
    let row = query(select_jobs!("WHERE id = $1")).bind(id).fetch_optional(tx).await?;
    record(&row.ok_or_else(|| not_found(id))?)
}

pub(super) fn record(row: &Row) -> Result<JobRecord, StoreError> {
    let tenant: String = row.try_get("tenant")?;
    Ok(JobRecord {
        id: row.try_get("id")?,
        tenant: TenantId::new(&tenant).map_err(|e| StoreError::row("jobs", format!("tenant {e}")))?,
        output_name: row.try_get("output_name")?,
        state: row.try_get("state")?,
        request_json: row.try_get("request_json")?,
        resolved_json: row.try_get("resolved_json")?,
        result_json: row.try_get("result_json")?,
        created_ms: row.try_get("created_ms")?,
        updated_ms: row.try_get("updated_ms")?,
        last_seq: from_db("jobs", row.try_get("last_seq")?)?,
        base: row.try_get("base")?,
    })
}

#[cfg(test)]
mod tests;
