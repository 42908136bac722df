//! Servers that share a database, and which of them a job belongs to.
//!
//! A server has one lease for all of its jobs: a row that it renews, and that runs out by the database's clock. A job names
//! its owner; when the owner's lease has run out, another server takes the job in one transaction, and from then on nothing
//! that the old owner says of the job is stored: each change of a job, and the publishing of its result, finds in its own
//! transaction that the job is still this process's. So no two servers write one job, however late one of them notices.
//! With SQLite the lock on the data directory is the lease: there is one server, whose name is empty.

use std::{collections::BTreeSet, path::Path, time::Duration};

use super::{
    JobRecord, Store, StoreError,
    db::{Conn, Db, query},
    jobs::{record, select_jobs, unfinished},
};
use crate::ids::TenantId;

/// How long a lease holds without being renewed.
pub const LEASE: Duration = Duration::from_secs(15);
/// How often it is renewed.
pub const RENEW: Duration = Duration::from_secs(3);

/// This server, as the database knows it.
pub(super) struct Server {
    /// The same for all processes of one data directory; empty: the only server.
    id: String,
    /// Of this process.
    incarnation: String,
}

/// What the owner of a job is asked to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobAsk {
    /// To end it.
    Cancel,
    /// To pause it.
    Pause,
}

impl JobAsk {
    fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
        }
    }
}

/// The id of the server that this data directory is of, made at its first start. The directory is locked.
pub(super) fn server_id(dir: &Path) -> Result<String, StoreError> {
    let path = dir.join("server-id");
    match std::fs::read_to_string(&path) {
        Ok(text) if uuid::Uuid::parse_str(text.trim()).is_ok() => return Ok(text.trim().to_owned()),
        // torn by a crash: nothing can have been done under that name
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(StoreError::io(&path)(e)),
    }
    let id = uuid::Uuid::now_v7().to_string();
    std::fs::write(&path, format!("{id}\n")).map_err(StoreError::io(&path))?;
    std::fs::File::open(&path).and_then(|file| file.sync_all()).map_err(StoreError::io(&path))?;
    Ok(id)
}

/// Takes this server's lease. An earlier process of the same data directory is gone: its lock is ours.
pub(super) async fn register(db: &Db, id: String) -> Result<Server, StoreError> {
    let server = Server { id, incarnation: uuid::Uuid::now_v7().to_string() };
    if db.is_shared() {
        let mut tx = db.begin().await?;
        let now = tx.now_ms().await?;
        let sql = "INSERT INTO servers (id, incarnation, until_ms, started_ms) VALUES ($1, $2, $3, $4) \
                   ON CONFLICT (id) DO UPDATE SET incarnation = excluded.incarnation, until_ms = excluded.until_ms, \
                   started_ms = excluded.started_ms";
        let insert = query(sql).bind(&server.id).bind(&server.incarnation).bind(now + milliseconds(LEASE)).bind(now);
        insert.execute(&mut *tx).await?;
        tx.commit().await?;
    }
    Ok(server)
}

impl Store {
    /// This server's name among those that share the database; empty: it is alone.
    pub fn server(&self) -> &str {
        &self.inner.server.id
    }

    /// Renews this server's lease. To be called every [`RENEW`]; whoever could not for [`LEASE`] must take it that its jobs
    /// are run by others.
    ///
    /// # Errors
    /// [`StoreError::Replaced`], or what the database refuses.
    pub async fn renew_lease(&self) -> Result<(), StoreError> {
        if !self.is_shared() {
            return Ok(());
        }
        let sql = "UPDATE servers SET until_ms = (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT + $3 \
                   WHERE id = $1 AND incarnation = $2";
        let Server { id, incarnation } = &self.inner.server;
        let update = query(sql).bind(id).bind(incarnation).bind(milliseconds(LEASE));
        match update.execute(self.db().lease()).await? {
            0 => Err(StoreError::Replaced),
            _ => Ok(()),
        }
    }

    /// Lets others have this server's jobs at once. If that cannot be said, they have them when the lease has run out.
    pub(super) async fn give_up_lease(&self) {
        if !self.is_shared() || self.is_closed() {
            return;
        }
        let sql = "UPDATE servers SET until_ms = 0, incarnation = '' WHERE id = $1 AND incarnation = $2";
        let Server { id, incarnation } = &self.inner.server;
        let update = query(sql).bind(id).bind(incarnation).execute(self.db().lease());
        if !matches!(tokio::time::timeout(RENEW, update).await, Ok(Ok(_))) {
            tracing::warn!("the lease on this server's jobs could not be given back; it runs out by itself");
        }
    }

    /// Takes the unfinished jobs that no living server owns, and those of this server that it does not know of; but for
    /// those of `except`. Of a shared database, only jobs for the base `base` (or for none that is known): oldest first.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn claim_jobs(&self, base: &str, except: &BTreeSet<String>) -> Result<Vec<JobRecord>, StoreError> {
        if self.is_shared() && !self.has_claims(except).await? {
            return Ok(Vec::new());
        }
        let mut tx = self.db().begin().await?;
        let now = tx.now_ms().await?;
        let sql = select_jobs!(
            "WHERE ",
            unfinished!(),
            " AND (owner = $1 OR owner NOT IN (SELECT id FROM servers WHERE until_ms > $2)) ORDER BY id"
        );
        let rows = query(sql).bind(self.server()).bind(now).fetch_all(&mut *tx).await?;
        let mut claimed = Vec::new();
        for row in &rows {
            let job = match record(row) {
                Ok(job) => job,
                Err(error) => {
                    tracing::error!(%error, "a stored job is unreadable");
                    continue;
                }
            };
            let suits = !self.is_shared() || job.base.is_empty() || job.base == base;
            if suits && !except.contains(&job.id) {
                let sql = "UPDATE jobs SET owner = $2 WHERE id = $1";
                query(sql).bind(&job.id).bind(self.server()).execute(&mut *tx).await?;
                claimed.push(job);
            }
        }
        tx.commit().await?;
        Ok(claimed)
    }

    /// Whether there may be jobs to claim, as nearly always there are not: asked without keeping a writer waiting.
    async fn has_claims(&self, except: &BTreeSet<String>) -> Result<bool, StoreError> {
        let mut tx = self.db().snapshot().await?;
        let now = tx.now_ms().await?;
        let sql = concat!(
            "SELECT id FROM jobs WHERE ",
            unfinished!(),
            " AND (owner = $1 OR owner NOT IN (SELECT id FROM servers WHERE until_ms > $2))"
        );
        for row in &query(sql).bind(self.server()).bind(now).fetch_all(&mut *tx).await? {
            if !except.contains(&row.try_get::<String, _>(0)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes a paused job, whichever server paused it: it runs nowhere. Whether it is this server's now.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn claim_paused(&self, job_id: &str) -> Result<bool, StoreError> {
        let mut tx = self.db().begin().await?;
        let sql = "UPDATE jobs SET owner = $2 WHERE id = $1 AND state = 'paused'";
        let claimed = query(sql).bind(job_id).bind(self.server()).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(claimed > 0)
    }

    /// Whether a job is this server's.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn owns_job(&self, job_id: &str) -> Result<bool, StoreError> {
        let sql = "SELECT 1 FROM jobs WHERE id = $1 AND owner = $2";
        Ok(query(sql).bind(job_id).bind(self.server()).fetch_optional(self.db()).await?.is_some())
    }

    /// Ids of this server's unfinished jobs.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn owned_jobs(&self) -> Result<BTreeSet<String>, StoreError> {
        let sql = concat!("SELECT id FROM jobs WHERE owner = $1 AND ", unfinished!());
        let rows = query(sql).bind(self.server()).fetch_all(self.db()).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Asks the owner of a tenant's unfinished job to do something with it; replaces what it was asked before.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for another tenant's and one that has ended.
    pub async fn ask_of_job(&self, tenant: &TenantId, job_id: &str, ask: JobAsk) -> Result<(), StoreError> {
        let mut tx = self.db().begin().await?;
        let sql = concat!("UPDATE jobs SET ask = $3 WHERE tenant = $1 AND id = $2 AND ", unfinished!());
        let asked = query(sql).bind(tenant.as_str()).bind(job_id).bind(ask.as_str()).execute(&mut *tx).await?;
        if asked == 0 {
            return Err(StoreError::NotFound { kind: "job", name: job_id.to_owned() });
        }
        tx.commit().await
    }

    /// Takes what other servers were asked to do with this server's jobs, and with those that no living server owns, which
    /// become this one's.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn take_asks(&self) -> Result<Vec<(String, JobAsk)>, StoreError> {
        let asked = "SELECT id, ask FROM jobs WHERE ask <> ''";
        if query(asked).fetch_optional(self.db()).await?.is_none() {
            return Ok(Vec::new()); // as nearly always: no writer is kept waiting for that
        }
        let mut tx = self.db().begin().await?;
        let now = tx.now_ms().await?;
        let sql = "SELECT id, ask FROM jobs WHERE ask <> '' AND \
                   (owner = $1 OR owner NOT IN (SELECT id FROM servers WHERE until_ms > $2)) ORDER BY id";
        let rows = query(sql).bind(self.server()).bind(now).fetch_all(&mut *tx).await?;
        let mut asks = Vec::with_capacity(rows.len());
        for row in &rows {
            let (id, ask) = (row.try_get::<String, _>(0)?, row.try_get::<String, _>(1)?);
            query("UPDATE jobs SET ask = '', owner = $2 WHERE id = $1")
                .bind(&id)
                .bind(self.server())
                .execute(&mut *tx)
                .await?;
            match ask.as_str() {
                "cancel" => asks.push((id, JobAsk::Cancel)),
                "pause" => asks.push((id, JobAsk::Pause)),
                _ => tracing::warn!(job = id, ask, "an unknown request of another server is passed over"),
            }
        }
        tx.commit().await?;
        Ok(asks)
    }

    /// Refuses a change of a job that is another server's, or another process's of this server. A job that is not known is
    /// nobody's.
    pub(super) async fn fence(&self, tx: &mut Conn, job_id: &str) -> Result<(), StoreError> {
        if !self.is_shared() {
            return Ok(());
        }
        let sql = "SELECT j.owner, s.incarnation FROM jobs j LEFT JOIN servers s ON s.id = j.owner WHERE j.id = $1";
        let Some(row) = query(sql).bind(job_id).fetch_optional(tx).await? else { return Ok(()) };
        let (owner, incarnation) = (row.try_get::<String, _>(0)?, row.try_get::<Option<String>, _>(1)?);
        let Server { id, incarnation: own } = &self.inner.server;
        match owner == *id && incarnation.as_deref() == Some(own) {
            true => Ok(()),
            false => Err(StoreError::NotOwner(job_id.to_owned())),
        }
    }
}

pub(super) fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
