//! The statements on `deltas`, `versions` and `version_files`, and how their rows become records.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    super::{
        StoreError,
        db::{Conn, Row, from_db, now_ms, parse, query, to_db},
    },
    NameRecord, StoredFile, VersionRecord, not_found,
};
use crate::ids::{DeltaName, TenantId};

/// Columns of a version, in the order of [`version`].
macro_rules! select_versions {
    ($where:literal) => {
        concat!(
            "SELECT tenant, name, number, id, base, spec_json, stored_bytes, origin, created_ms FROM versions ",
            $where
        )
    };
}

/// What `deltas.change` becomes: writers come one after the other, so it grows in the order of commits.
macro_rules! next_change {
    () => {
        "(SELECT COALESCE(MAX(change), 0) + 1 FROM deltas)"
    };
}
pub(super) use next_change;

macro_rules! select_files {
    ($where:literal) => {
        concat!("SELECT tenant, name, number, file, blob, bytes FROM version_files ", $where, " ORDER BY file")
    };
}

type Files = HashMap<(String, String, i64), Vec<StoredFile>>;

/// A name as it is inside a transaction, whether or not it has live versions.
pub(super) async fn read_name(tx: &mut Conn, tenant: &TenantId, name: &DeltaName) -> Result<NameRecord, StoreError> {
    let (t, n) = (tenant.as_str(), name.as_str());
    let sql = "SELECT tenant, name, revision, pinned, current FROM deltas WHERE tenant = $1 AND name = $2";
    let head = query(sql).bind(t).bind(n).fetch_optional(&mut *tx).await?.ok_or_else(|| not_found(n))?;
    let sql = select_files!("WHERE tenant = $1 AND name = $2");
    let mut files = group(&query(sql).bind(t).bind(n).fetch_all(&mut *tx).await?)?;
    let sql = select_versions!("WHERE tenant = $1 AND name = $2 AND deleted_ms IS NULL");
    let rows = query(sql).bind(t).bind(n).fetch_all(&mut *tx).await?;
    let mut record = head_record(&head)?;
    record.versions = versions(&rows, &mut files).map(|v| (v.number, v)).collect();
    Ok(record)
}

/// A name that has a live version.
pub(super) async fn read_live(tx: &mut Conn, tenant: &TenantId, name: &DeltaName) -> Result<NameRecord, StoreError> {
    match read_name(tx, tenant, name).await? {
        record if record.current.is_some() => Ok(record),
        _ => Err(not_found(name.as_str())),
    }
}

/// Every name with a live version; in a snapshot.
pub(super) async fn read_all(tx: &mut Conn) -> Result<Vec<NameRecord>, StoreError> {
    let sql = "SELECT tenant, name, revision, pinned, current FROM deltas WHERE current IS NOT NULL";
    let heads = query(sql).fetch_all(&mut *tx).await?;
    let mut files = group(&query(select_files!("")).fetch_all(&mut *tx).await?)?;
    let rows = query(select_versions!("WHERE deleted_ms IS NULL")).fetch_all(&mut *tx).await?;
    let mut by_name = HashMap::<_, BTreeMap<_, _>>::new();
    for version in versions(&rows, &mut files) {
        let key = (version.tenant.clone(), version.name.clone());
        by_name.entry(key).or_default().insert(version.number, version);
    }
    let mut names = Vec::with_capacity(heads.len());
    for head in &heads {
        match head_record(head) {
            Ok(mut record) => {
                let key = (record.tenant.clone(), record.name.clone());
                record.versions = by_name.remove(&key).unwrap_or_default();
                names.push(record);
            }
            Err(error) => tracing::error!(%error, "unreadable delta row left out"),
        }
    }
    Ok(names)
}

pub(super) async fn insert_version(tx: &mut Conn, version: &VersionRecord, number: i64) -> Result<(), StoreError> {
    let spec = serde_json::to_string(&version.spec).map_err(|e| StoreError::row("versions", e))?;
    let (tenant, name) = (version.tenant.as_str(), version.name.as_str());
    let sql = "INSERT INTO versions (tenant, name, number, id, base, spec_json, stored_bytes, origin, created_ms) \
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";
    let insert = query(sql).bind(tenant).bind(name).bind(number).bind(version.id.to_string());
    let insert = insert.bind(version.base.to_string()).bind(spec).bind(to_db(version.stored_bytes));
    insert.bind(&version.origin).bind(version.created_ms).execute(&mut *tx).await?;
    let sql = "INSERT INTO version_files (tenant, name, number, file, blob, bytes) VALUES ($1, $2, $3, $4, $5, $6)";
    for file in &version.files {
        let insert = query(sql).bind(tenant).bind(name).bind(number).bind(&file.name);
        insert.bind(file.blob.to_string()).bind(to_db(file.bytes)).execute(&mut *tx).await?;
    }
    Ok(())
}

pub(super) async fn set_current(tx: &mut Conn, name: &NameRecord, number: Option<u64>) -> Result<(), StoreError> {
    let sql = concat!(
        "UPDATE deltas SET current = $3, revision = revision + 1, updated_ms = $4, change = ",
        next_change!(),
        " WHERE tenant = $1 AND name = $2"
    );
    let update = query(sql).bind(name.tenant.as_str()).bind(name.name.as_str()).bind(number.map(to_db));
    update.bind(now_ms()).execute(tx).await?;
    Ok(())
}

pub(super) async fn set_pinned(tx: &mut Conn, name: &NameRecord, pinned: bool) -> Result<(), StoreError> {
    let sql = concat!(
        "UPDATE deltas SET pinned = $3, revision = revision + 1, updated_ms = $4, change = ",
        next_change!(),
        " WHERE tenant = $1 AND name = $2"
    );
    let update = query(sql).bind(name.tenant.as_str()).bind(name.name.as_str()).bind(i64::from(pinned));
    update.bind(now_ms()).execute(tx).await?;
    Ok(())
}

/// Marks that the name's versions have changed.
pub(super) async fn touch(tx: &mut Conn, name: &NameRecord) -> Result<(), StoreError> {
    set_current(tx, name, name.current).await
}

pub(super) async fn delete_version(tx: &mut Conn, name: &NameRecord, number: u64) -> Result<(), StoreError> {
    let (t, n, number) = (name.tenant.as_str(), name.name.as_str(), to_db(number));
    let sql = "DELETE FROM version_files WHERE tenant = $1 AND name = $2 AND number = $3";
    query(sql).bind(t).bind(n).bind(number).execute(&mut *tx).await?;
    let sql = "UPDATE versions SET deleted_ms = $4 WHERE tenant = $1 AND name = $2 AND number = $3";
    query(sql).bind(t).bind(n).bind(number).bind(now_ms()).execute(tx).await?;
    Ok(())
}

fn head_record(row: &Row) -> Result<NameRecord, StoreError> {
    let current: Option<i64> = row.try_get("current")?;
    Ok(NameRecord {
        tenant: tenant(row)?,
        name: name(row)?,
        revision: from_db("deltas", row.try_get("revision")?)?,
        pinned: row.try_get::<i64, _>("pinned")? != 0,
        current: current.map(|n| from_db("deltas", n)).transpose()?,
        versions: BTreeMap::new(),
    })
}

/// The readable versions among these rows.
fn versions(rows: &[Row], files: &mut Files) -> impl Iterator<Item = Arc<VersionRecord>> {
    rows.iter().filter_map(|row| match version(row, files) {
        Ok(version) => Some(Arc::new(version)),
        Err(error) => {
            tracing::error!(%error, "unreadable version row left out");
            None
        }
    })
}

fn version(row: &Row, files: &mut Files) -> Result<VersionRecord, StoreError> {
    let key = (row.try_get("tenant")?, row.try_get("name")?, row.try_get("number")?);
    let spec: String = row.try_get("spec_json")?;
    Ok(VersionRecord {
        tenant: tenant(row)?,
        name: name(row)?,
        number: from_db("versions", key.2)?,
        id: parse("versions", row.try_get("id")?)?,
        base: parse("versions", row.try_get("base")?)?,
        spec: serde_json::from_str(&spec).map_err(|e| StoreError::row("versions", e))?,
        stored_bytes: from_db("versions", row.try_get("stored_bytes")?)?,
        origin: row.try_get("origin")?,
        created_ms: row.try_get("created_ms")?,
        files: files.remove(&key).unwrap_or_default(),
    })
}

fn group(rows: &[Row]) -> Result<Files, StoreError> {
    let mut files = Files::new();
    for row in rows {
        let file = StoredFile {
            name: row.try_get("file")?,
            blob: parse("version_files", row.try_get("blob")?)?,
            bytes: from_db("version_files", row.try_get("bytes")?)?,
        };
        let key = (row.try_get("tenant")?, row.try_get("name")?, row.try_get("number")?);
        files.entry(key).or_default().push(file);
    }
    Ok(files)
}

fn tenant(row: &Row) -> Result<TenantId, StoreError> {
    TenantId::new(row.try_get("tenant")?).map_err(|e| StoreError::row("deltas", format!("tenant {e}")))
}

fn name(row: &Row) -> Result<DeltaName, StoreError> {
    DeltaName::new(row.try_get("name")?).map_err(|e| StoreError::row("deltas", format!("name {e}")))
}
