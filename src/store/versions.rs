//! Deltas in the database: names, their immutable versions, and the files of each.
//!
//! Every change of a name is one transaction, and answers with the name as it is after it, at a revision that only
//! grows: whoever keeps names in memory takes the answer with the highest revision.

mod rows;

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;

use super::{
    Store, StoreError, blobs,
    db::{Conn, Tx, from_db, now_ms, parse, query, to_db},
};
use crate::{
    admission::params::PublishPolicy,
    delta::{DeltaFiles, DeltaSpec},
    ids::{BaseFingerprint, BlobId, DeltaId, DeltaName, TenantId, check_name},
};

/// Most files of a version.
const MAX_FILES: usize = 64;
/// Most changed names that are read at a time.
const CHANGES: i64 = 256;

/// Where a version came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A client sent it.
    Upload,
    /// A training job made it.
    Job(String),
    /// It came with the program.
    Sample,
    /// Made of other versions: the method, and which with what weight.
    Merge(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Upload => f.write_str("upload"),
            Self::Job(id) => write!(f, "job:{id}"),
            Self::Sample => f.write_str("sample"),
            Self::Merge(of) => write!(f, "merge:{of}"),
        }
    }
}

/// One file of a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// Its name in the folder.
    pub name: String,
    /// Its bytes.
    pub blob: BlobId,
    /// How many they are.
    pub bytes: u64,
}

/// An immutable version of a delta. Handed around in an `Arc`.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionRecord {
    /// Whose it is.
    pub tenant: TenantId,
    /// Under which name.
    pub name: DeltaName,
    /// Its number under that name: from 1, never used twice.
    pub number: u64,
    /// Digest of base and files.
    pub id: DeltaId,
    /// The base that it was made for.
    pub base: BaseFingerprint,
    /// What is known of it without its tensors.
    pub spec: DeltaSpec,
    /// Its files, by name.
    pub files: Vec<StoredFile>,
    /// Bytes of its files.
    pub stored_bytes: u64,
    /// `upload`, `job:<id>`, `sample`.
    pub origin: String,
    /// Unix milliseconds.
    pub created_ms: i64,
}

/// A name with its live versions.
#[derive(Debug, Clone, PartialEq)]
pub struct NameRecord {
    /// Whose it is.
    pub tenant: TenantId,
    /// The name.
    pub name: DeltaName,
    /// Grows with every change.
    pub revision: u64,
    /// To be kept resident.
    pub pinned: bool,
    /// Number of the current version; `None`: the name has no live version.
    pub current: Option<u64>,
    /// Live versions by number.
    pub versions: BTreeMap<u64, Arc<VersionRecord>>,
}

impl NameRecord {
    /// The version that the name stands for.
    pub fn current(&self) -> Option<&Arc<VersionRecord>> {
        self.versions.get(&self.current?)
    }
}

/// A version to publish.
#[derive(Debug, Clone)]
pub struct NewVersion {
    /// Whose it is.
    pub tenant: TenantId,
    /// Under which name.
    pub name: DeltaName,
    /// The base that it was made for.
    pub base: BaseFingerprint,
    /// What is known of it without its tensors.
    pub spec: DeltaSpec,
    /// Its files.
    pub files: DeltaFiles,
    /// What may happen to an existing name.
    pub policy: PublishPolicy,
    /// Where it comes from.
    pub origin: Origin,
}

impl Store {
    /// Publishes a version: its blobs first, then the version and the move of its name in one transaction. Bytes that
    /// are a live version of this name already are not stored as another: the name moves to that version.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] and [`StoreError::Conflict`] as the policy says; [`StoreError::Invalid`] for file
    /// names; [`StoreError::Quota`]; [`StoreError::TenantClosed`]; what the database or the blob store refuses. Nothing is
    /// visible then.
    pub async fn publish(&self, new: NewVersion) -> Result<(Arc<VersionRecord>, NameRecord), StoreError> {
        check_files(&new.files)?;
        let mut files = Vec::new();
        for (name, bytes) in &new.files.files {
            let blob = blobs::digest(bytes).await?;
            files.push(StoredFile { name: name.clone(), blob, bytes: bytes.len() as u64 });
        }
        let held: Vec<BlobId> = files.iter().map(|file| file.blob).collect();
        let holds = self.hold(&held).await?;
        let record = self.draft(new.base, files, &new).await?;
        let published = self.write(&record, &new, &held).await;
        if published.is_err() {
            self.orphan(&new.tenant, record.files.iter().map(|file| file.blob));
        }
        drop(holds);
        published
    }

    /// Writes the files, then the rows.
    async fn write(
        &self,
        record: &VersionRecord,
        new: &NewVersion,
        held: &[BlobId],
    ) -> Result<(Arc<VersionRecord>, NameRecord), StoreError> {
        // before the bytes are written, too: what is refused must not fill the disk
        let quota = self.quota(&new.tenant);
        if quota.bounds_versions() {
            record.check_room(&mut *self.db().snapshot().await?, &quota).await?;
        }
        for (file, bytes) in record.files.iter().zip(new.files.files.values()) {
            self.blobs().put(file.blob, bytes.clone()).await?;
        }
        crate::failpoint!("publish-blobs-written", |why| Err(StoreError::injected(why)));
        let mut tx = self.db().begin().await?;
        self.check_held(&mut tx, held).await?;
        self.check_open(&new.tenant)?;
        if let Origin::Job(id) = &new.origin {
            self.fence(&mut tx, id).await?;
        }
        record.check_room(&mut tx, &quota).await?;
        let number = record.insert(&mut tx, new.policy).await?;
        let name = rows::read_name(&mut tx, &new.tenant, &new.name).await?;
        crate::failpoint!("publish-before-commit", |why| Err(StoreError::injected(why)));
        tx.commit().await?;
        crate::failpoint!("publish-committed");
        let version = name.versions.get(&number).cloned();
        let version = version.ok_or_else(|| StoreError::row("versions", format!("number {number} is unreadable")))?;
        Ok((version, name))
    }

    /// The record as it will be, but for its number.
    async fn draft(
        &self,
        base: BaseFingerprint,
        files: Vec<StoredFile>,
        new: &NewVersion,
    ) -> Result<VersionRecord, StoreError> {
        let contents = new.files.files.clone();
        let id = tokio::task::spawn_blocking(move || DeltaId::compute(&base, &contents)).await?;
        Ok(VersionRecord {
            tenant: new.tenant.clone(),
            name: new.name.clone(),
            number: 0,
            id,
            base,
            spec: new.spec.clone(),
            stored_bytes: files.iter().map(|f| f.bytes).sum(),
            files,
            origin: new.origin.to_string(),
            created_ms: now_ms(),
        })
    }

    /// Deletes one version, or the name with all of its versions. Their numbers are not used again.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if `expected` is not the current version;
    /// [`StoreError::IsCurrent`] for the current version while there are others.
    pub async fn delete_versions(
        &self,
        tenant: &TenantId,
        name: &DeltaName,
        number: Option<u64>,
        expected: Option<DeltaId>,
    ) -> Result<NameRecord, StoreError> {
        let mut tx = self.db().begin().await?;
        let before = rows::read_live(&mut tx, tenant, name).await?;
        check_expected(&before, expected)?;
        if let Some(number) = number {
            if !before.versions.contains_key(&number) {
                return Err(not_found(&format!("{name}@{number}")));
            }
            if before.current == Some(number) && before.versions.len() > 1 {
                return Err(StoreError::IsCurrent { name: name.to_string(), number });
            }
        }
        let all = number.is_none() || before.versions.len() == 1;
        if all {
            rows::set_current(&mut tx, &before, None).await?;
            rows::set_pinned(&mut tx, &before, false).await?;
        } else {
            rows::touch(&mut tx, &before).await?;
        }
        let mut blobs = Vec::new();
        for (doomed, version) in before.versions.iter().filter(|(n, _)| all || number == Some(**n)) {
            rows::delete_version(&mut tx, &before, *doomed).await?;
            blobs.extend(version.files.iter().map(|file| file.blob));
        }
        crate::failpoint!("delete-before-commit", |why| Err(StoreError::injected(why)));
        let after = finish(tx, tenant, name).await?;
        crate::failpoint!("delete-committed");
        self.orphan(tenant, blobs);
        Ok(after)
    }

    /// Moves a name to another of its live versions.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] if `expected` is not the current version.
    pub async fn set_current(
        &self,
        tenant: &TenantId,
        name: &DeltaName,
        number: u64,
        expected: Option<DeltaId>,
    ) -> Result<NameRecord, StoreError> {
        let mut tx = self.db().begin().await?;
        let before = rows::read_live(&mut tx, tenant, name).await?;
        check_expected(&before, expected)?;
        if !before.versions.contains_key(&number) {
            return Err(not_found(&format!("{name}@{number}")));
        }
        rows::set_current(&mut tx, &before, Some(number)).await?;
        crate::failpoint!("alias-before-commit", |why| Err(StoreError::injected(why)));
        let after = finish(tx, tenant, name).await;
        crate::failpoint!("alias-committed");
        after
    }

    /// Marks a name as to be kept resident, or not.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn set_pinned(
        &self,
        tenant: &TenantId,
        name: &DeltaName,
        pinned: bool,
    ) -> Result<NameRecord, StoreError> {
        let mut tx = self.db().begin().await?;
        let before = rows::read_live(&mut tx, tenant, name).await?;
        rows::set_pinned(&mut tx, &before, pinned).await?;
        crate::failpoint!("pin-before-commit", |why| Err(StoreError::injected(why)));
        let after = finish(tx, tenant, name).await;
        crate::failpoint!("pin-committed");
        after
    }

    /// Every name with a live version, of all tenants. Rows that cannot be read are logged and left out: one bad row
    /// must not keep the others from being served.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn all_names(&self) -> Result<Vec<NameRecord>, StoreError> {
        rows::read_all(&mut *self.db().snapshot().await?).await
    }

    /// The number of the last change of any name.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn last_change(&self) -> Result<u64, StoreError> {
        let row = query("SELECT COALESCE(MAX(change), 0) FROM deltas").fetch_one(self.db()).await?;
        from_db("deltas", row.try_get(0)?)
    }

    /// Names that changed after the change of this number, as they are now, and the number of the last change seen: what
    /// other servers did. Call again from there until none comes.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn changed_names(&self, after: u64) -> Result<(Vec<NameRecord>, u64), StoreError> {
        let mut tx = self.db().snapshot().await?;
        let sql = "SELECT tenant, name, change FROM deltas WHERE change > $1 ORDER BY change LIMIT $2";
        let rows = query(sql).bind(to_db(after)).bind(CHANGES).fetch_all(&mut *tx).await?;
        let (mut names, mut last) = (Vec::with_capacity(rows.len()), after);
        for row in &rows {
            last = from_db("deltas", row.try_get("change")?)?;
            let (tenant, name) = (row.try_get::<String, _>("tenant")?, row.try_get::<String, _>("name")?);
            match (TenantId::new(&tenant), DeltaName::new(&name)) {
                (Ok(tenant), Ok(name)) => names.push(rows::read_name(&mut tx, &tenant, &name).await?),
                _ => tracing::error!(%tenant, %name, "unreadable delta row left out"),
            }
        }
        Ok((names, last))
    }

    /// Reads a version's files, each verified against its digest and size.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if one is missing or its bytes are not the ones stored.
    pub async fn read_files(&self, version: &VersionRecord) -> Result<DeltaFiles, StoreError> {
        let mut files = BTreeMap::<String, Bytes>::new();
        for file in &version.files {
            files.insert(file.name.clone(), self.blobs().get(file.blob, Some(file.bytes)).await?);
        }
        Ok(DeltaFiles { files })
    }
}

impl VersionRecord {
    /// Writes the rows of this draft under the policy; returns the number that the name now stands at.
    async fn insert(&self, tx: &mut Conn, policy: PublishPolicy) -> Result<u64, StoreError> {
        let (tenant, name) = (self.tenant.as_str(), self.name.as_str());
        let sql = "SELECT d.next_number, v.id FROM deltas d LEFT JOIN versions v \
                   ON v.tenant = d.tenant AND v.name = d.name AND v.number = d.current \
                   WHERE d.tenant = $1 AND d.name = $2";
        let row = query(sql).bind(tenant).bind(name).fetch_optional(&mut *tx).await?;
        let (next, current) = match &row {
            None => (1, None),
            Some(row) => (row.try_get::<i64, _>(0)?, row.try_get::<Option<String>, _>(1)?),
        };
        let current = current.map(|id| parse::<DeltaId>("versions", &id)).transpose()?;
        check_policy(name, policy, current)?;
        if row.is_none() {
            let sql = "INSERT INTO deltas (tenant, name, created_ms, updated_ms) VALUES ($1, $2, $3, $3)";
            query(sql).bind(tenant).bind(name).bind(self.created_ms).execute(&mut *tx).await?;
        }
        let sql = "SELECT number FROM versions WHERE tenant = $1 AND name = $2 AND id = $3 AND deleted_ms IS NULL";
        let same = query(sql).bind(tenant).bind(name).bind(self.id.to_string());
        let number = match same.fetch_optional(&mut *tx).await? {
            Some(row) => row.try_get::<i64, _>(0)?,
            None => {
                rows::insert_version(tx, self, next).await?;
                next
            }
        };
        let sql = concat!(
            "UPDATE deltas SET current = $3, next_number = $4, revision = revision + 1, updated_ms = $5, change = ",
            rows::next_change!(),
            " WHERE tenant = $1 AND name = $2"
        );
        let update = query(sql).bind(tenant).bind(name).bind(number).bind(next.max(number + 1));
        update.bind(self.created_ms).execute(&mut *tx).await?;
        from_db("versions", number)
    }
}

async fn finish(mut tx: Tx, tenant: &TenantId, name: &DeltaName) -> Result<NameRecord, StoreError> {
    let after = rows::read_name(&mut tx, tenant, name).await?;
    tx.commit().await?;
    Ok(after)
}

fn check_policy(name: &str, policy: PublishPolicy, current: Option<DeltaId>) -> Result<(), StoreError> {
    match policy {
        PublishPolicy::Create if current.is_some() => Err(StoreError::AlreadyExists(name.to_owned())),
        PublishPolicy::CompareAndSwap(expected) if current != Some(expected) => {
            Err(StoreError::Conflict { name: name.to_owned(), expected, current })
        }
        PublishPolicy::Create | PublishPolicy::Upsert | PublishPolicy::CompareAndSwap(_) => Ok(()),
    }
}

fn check_expected(name: &NameRecord, expected: Option<DeltaId>) -> Result<(), StoreError> {
    let current = name.current().map(|v| v.id);
    match expected {
        Some(expected) if current != Some(expected) => {
            Err(StoreError::Conflict { name: name.name.to_string(), expected, current })
        }
        _ => Ok(()),
    }
}

fn check_files(files: &DeltaFiles) -> Result<(), StoreError> {
    let invalid = |message: String| Err(StoreError::Invalid { field: "files", message });
    match files.files.len() {
        0 => return invalid("at least one file is required".to_owned()),
        n if n > MAX_FILES => return invalid(format!("{n} files; at most {MAX_FILES} are accepted")),
        _ => {}
    }
    for name in files.files.keys() {
        if let Err(e) = check_name(name) {
            return invalid(format!("file name {name:?} {e}"));
        }
    }
    Ok(())
}

fn not_found(name: &str) -> StoreError {
    StoreError::NotFound { kind: "delta", name: name.to_owned() }
}

#[cfg(test)]
pub(super) mod tests;
