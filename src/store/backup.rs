//! Backups: the rows of one moment as JSON lines, and every blob that they name, verified on the way out and on the way in.
//!
//! The form is the same for both databases, so a backup of one can be restored into the other. A server may go on
//! meanwhile: blobs never change, and where one was removed since the rows were read, they are read again. The manifest is
//! written last: a folder without one is no backup.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use sha2::{Digest as _, Sha256};

use super::{
    DatabaseUrl, Places, Store, StoreError,
    blobs::Blobs,
    db::{Conn, Db, FORMAT, Value, now_ms, query, query_text},
    open_blobs,
};
use crate::ids::BlobId;

const MANIFEST: &str = "manifest.json";
const ROWS: &str = "rows.jsonl";
const BLOBS: &str = "blobs";
const MODELS: &str = "models";
/// The form of backups.
const VERSION: u64 = 1;
/// Rows that are read at a time.
const PAGE: i64 = 2000;
/// Times that the rows are read, where blobs were removed meanwhile.
const READS: usize = 5;

/// A table's columns: text ones, numbers, and those that order its rows.
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) text: &'static [&'static str],
    pub(super) numbers: &'static [&'static str],
    key: &'static str,
}

/// What is kept, in the order in which it can be put back. Leases, holds and the database's own id are not: they are of the
/// servers and the place.
pub(super) const TABLES: &[Table] = &[
    Table {
        name: "deltas",
        text: &["tenant", "name"],
        numbers: &["current", "next_number", "pinned", "revision", "created_ms", "updated_ms", "change"],
        key: "tenant, name",
    },
    Table {
        name: "versions",
        text: &["tenant", "name", "id", "base", "spec_json", "origin"],
        numbers: &["number", "stored_bytes", "created_ms", "deleted_ms"],
        key: "tenant, name, number",
    },
    Table {
        name: "version_files",
        text: &["tenant", "name", "file", "blob"],
        numbers: &["number", "bytes"],
        key: "tenant, name, number, file",
    },
    Table {
        name: "datasets",
        text: &["id", "tenant", "name", "blob", "format"],
        numbers: &["row_count", "bytes", "created_ms"],
        key: "id",
    },
    Table {
        name: "jobs",
        text: &["id", "tenant", "output_name", "state", "request_json", "resolved_json", "result_json", "base"],
        numbers: &["created_ms", "updated_ms", "last_seq", "tries"],
        key: "id",
    },
    Table { name: "job_events", text: &["job_id", "body_json"], numbers: &["seq", "at_ms"], key: "job_id, seq" },
    Table { name: "job_blobs", text: &["job_id", "name", "blob"], numbers: &[], key: "job_id, name" },
    Table { name: "job_checkpoints", text: &["job_id", "blob"], numbers: &["step", "resumes"], key: "job_id" },
    Table {
        name: "idempotency",
        text: &["tenant", "idempotency_key", "request_digest", "job_id"],
        numbers: &["created_ms"],
        key: "tenant, idempotency_key",
    },
];

/// What a backup has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Form of the backup.
    pub version: u64,
    /// Format of the database that it is of.
    pub format: u64,
    /// Unix milliseconds.
    pub created_ms: i64,
    /// Rows by table.
    pub rows: BTreeMap<String, u64>,
    /// SHA-256 of the file of rows.
    pub rows_sha256: String,
    /// Blobs.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blobs that rows name and that were missing or damaged already, and why.
    pub corrupt: BTreeMap<String, String>,
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The backup.
    pub backup: Backup,
}

/// Writes a backup into an empty or new folder, also while a server is at work.
///
/// # Errors
/// [`StoreError::Invalid`] for a folder that has something in it, or a database of another format; what the file system,
/// the database or the blob store refuses.
pub async fn backup(places: &Places, out: &Path) -> Result<Backup, StoreError> {
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(invalid("--out", "has something in it; accepted is an empty or a new folder"));
    }
    fs::create_dir_all(out).map_err(StoreError::io(out))?;
    let db = match &places.database {
        Some(DatabaseUrl(url)) => Db::connect_beside(url).await?,
        None => Db::open_beside(&places.dir.join("meta.sqlite3")).await?,
    };
    let source = open_blobs(places, false).await?;
    let target = Blobs::open(&out.join(BLOBS), true)?;
    let mut backup = Backup { version: VERSION, format: FORMAT, created_ms: now_ms(), ..Backup::default() };
    for read in 1.. {
        let named = write_rows(&db, &out.join(ROWS), &mut backup).await?;
        if copy_blobs(&db, (&source, &target), &named, &mut backup).await? {
            break;
        }
        if read == READS {
            return Err(invalid("--out", "blobs were removed faster than they could be copied; try again"));
        }
    }
    db.close().await;
    copy_folder(&places.dir.join(MODELS), &out.join(MODELS))?;
    let path = out.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&backup).map_err(|e| StoreError::row("manifest", e))?;
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(&text)?;
        file.sync_all()?;
        File::open(out)?.sync_all()
    };
    write().map_err(StoreError::io(&path))?;
    Ok(backup)
}

/// Restores a backup into a place that has no deltas, datasets or jobs yet. All rows come in one transaction, after their
/// blobs: broken off, it can be done again.
///
/// # Errors
/// [`StoreError::Invalid`] for what is no whole backup or a place that is not empty; [`StoreError::Corrupt`] for a blob of
/// the backup that is not as it was; as [`Store::open_at`].
pub async fn restore(places: &Places, from: &Path) -> Result<Restored, StoreError> {
    let path = from.join(MANIFEST);
    let text = fs::read(&path).map_err(StoreError::io(&path))?;
    let backup: Backup = serde_json::from_slice(&text)
        .map_err(|e| invalid("--from", &format!("{MANIFEST} is not that of a backup: {e}")))?;
    if backup.version > VERSION || backup.format > FORMAT {
        return Err(StoreError::TooNew { found: backup.format.max(backup.version), known: FORMAT });
    }
    let rows = from.join(ROWS);
    let found = digest(&rows)?;
    if found != backup.rows_sha256 {
        return Err(invalid(
            "--from",
            &format!("{ROWS} is damaged: its digest is {found}, not {}", backup.rows_sha256),
        ));
    }
    let store = Store::open_at(places).await?;
    let restored = put_back(&store, from, &backup).await;
    store.close().await;
    restored?;
    Ok(Restored { backup })
}

async fn put_back(store: &Store, from: &Path, backup: &Backup) -> Result<(), StoreError> {
    for table in ["deltas", "datasets", "jobs"] {
        let row = query_text(format!("SELECT 1 FROM {table} LIMIT 1")).fetch_optional(store.db()).await?;
        if row.is_some() {
            return Err(invalid("--data-dir", "has deltas, datasets or jobs already; accepted is an empty place"));
        }
    }
    let source = Blobs::open(&from.join(BLOBS), false)?;
    let mut copied = BTreeSet::new();
    each_row(&from.join(ROWS), |_, row| {
        if let Some(Json::String(blob)) = row.get("blob") {
            copied.insert(blob.clone());
        }
        Ok(())
    })?;
    for text in copied.iter().filter(|text| !backup.corrupt.contains_key(*text)) {
        let blob: BlobId = super::db::parse("backup", text)?;
        store.put_blob(source.get(blob, None).await?).await?;
    }
    copy_folder(&from.join(MODELS), &store.dir().join(MODELS))?;
    let mut rows = Vec::new();
    each_row(&from.join(ROWS), |table, row| {
        rows.push((table, row));
        Ok(())
    })?;
    let mut tx = store.db().begin().await?;
    let mut counts = BTreeMap::<String, u64>::new();
    // a name and its current version name each other: the database looks at the commit
    for table in TABLES {
        for (_, row) in rows.iter().filter(|(name, _)| *name == table.name) {
            insert(&mut tx, table, row).await?;
            *counts.entry(table.name.to_owned()).or_default() += 1;
        }
    }
    let wanted: BTreeMap<_, _> = backup.rows.iter().filter(|(_, n)| **n > 0).map(|(t, n)| (t.clone(), *n)).collect();
    if counts != wanted {
        return Err(invalid("--from", &format!("has the rows {counts:?}, and its manifest says {wanted:?}")));
    }
    tx.commit().await
}

async fn insert(tx: &mut Conn, table: &Table, row: &Map<String, Json>) -> Result<(), StoreError> {
    let known = table.text.iter().chain(table.numbers);
    if let Some(odd) = row.keys().find(|column| !known.clone().any(|k| k == column)) {
        return Err(StoreError::row(table.name, format!("unknown column {odd:?}")));
    }
    // an older backup lacks newer columns: they get their default
    let columns: Vec<&str> = known.copied().filter(|column| row.contains_key(*column)).collect();
    let places: Vec<String> = (1..=columns.len()).map(|i| format!("${i}")).collect();
    let sql = format!("INSERT INTO {} ({}) VALUES ({})", table.name, columns.join(", "), places.join(", "));
    let mut insert = query_text(sql);
    for column in columns {
        let value = match (&row[column], table.text.contains(&column)) {
            (Json::Null, true) => Value::Text(None),
            (Json::Null, false) => Value::Int(None),
            (Json::String(text), true) => Value::Text(Some(text.clone())),
            (Json::Number(n), false) if n.is_i64() => Value::Int(n.as_i64()),
            (odd, _) => return Err(StoreError::row(table.name, format!("{column} is {odd}"))),
        };
        insert = insert.bind(value);
    }
    insert.execute(tx).await?;
    Ok(())
}

/// Writes the rows of one moment; the blobs that they name.
async fn write_rows(db: &Db, path: &Path, backup: &mut Backup) -> Result<BTreeSet<String>, StoreError> {
    let mut file = BufWriter::new(File::create(path).map_err(StoreError::io(path))?);
    let mut named = BTreeSet::new();
    let mut tx = db.snapshot().await?;
    let format = query("SELECT value FROM meta WHERE fact = 'format'").fetch_optional(&mut *tx).await;
    let format = format.ok().flatten().map(|row| row.try_get::<String, _>(0)).transpose()?;
    if format.as_deref() != Some(&FORMAT.to_string()) {
        return Err(invalid(
            "--data-dir",
            "has a database of an older format: start the server once, which updates it",
        ));
    }
    for table in TABLES {
        let columns: Vec<&str> = table.text.iter().chain(table.numbers).copied().collect();
        let (name, columns, key) = (table.name, columns.join(", "), table.key);
        let mut count = 0_i64;
        loop {
            let sql = format!("SELECT {columns} FROM {name} ORDER BY {key} LIMIT $1 OFFSET $2");
            let rows = query_text(sql).bind(PAGE).bind(count).fetch_all(&mut *tx).await?;
            count += rows.len() as i64;
            for row in &rows {
                let mut json = Map::new();
                for column in table.text {
                    let value: Option<String> = row.try_get(*column)?;
                    if let (&"blob", Some(blob)) = (column, &value) {
                        named.insert(blob.clone());
                    }
                    json.insert((*column).to_owned(), value.into());
                }
                for column in table.numbers {
                    let value: Option<i64> = row.try_get(*column)?;
                    json.insert((*column).to_owned(), value.into());
                }
                let line = serde_json::json!({ "table": name, "row": json });
                writeln!(file, "{line}").map_err(StoreError::io(path))?;
            }
            if (rows.len() as i64) < PAGE {
                break;
            }
        }
        backup.rows.insert(name.to_owned(), count.unsigned_abs());
    }
    let file = file.into_inner().map_err(|e| StoreError::io(path)(e.into_error()))?;
    file.sync_all().map_err(StoreError::io(path))?;
    backup.rows_sha256 = digest(path)?;
    Ok(named)
}

/// Copies blobs, each verified; false: one was removed since the rows were read.
async fn copy_blobs(
    db: &Db,
    (source, target): (&Blobs, &Blobs),
    named: &BTreeSet<String>,
    backup: &mut Backup,
) -> Result<bool, StoreError> {
    (backup.blobs, backup.bytes) = (0, 0);
    backup.corrupt.clear();
    for text in named {
        let blob: BlobId = super::db::parse("backup", text)?;
        match source.get(blob, None).await {
            Ok(bytes) => {
                backup.blobs += 1;
                backup.bytes += bytes.len() as u64;
                target.put(blob, bytes).await?;
            }
            Err(StoreError::Corrupt { reason, .. }) => {
                if !super::garbage::is_named(db, blob).await? {
                    return Ok(false);
                }
                backup.corrupt.insert(text.clone(), reason);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

fn each_row(
    path: &Path,
    mut take: impl FnMut(String, Map<String, Json>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    #[derive(Deserialize)]
    struct Line {
        table: String,
        row: Map<String, Json>,
    }
    for (i, line) in BufReader::new(File::open(path).map_err(StoreError::io(path))?).lines().enumerate() {
        let line = line.map_err(StoreError::io(path))?;
        let Line { table, row } = serde_json::from_str(&line)
            .map_err(|e| invalid("--from", &format!("line {} of {ROWS} is no row: {e}", i + 1)))?;
        take(table, row)?;
    }
    Ok(())
}

fn digest(path: &Path) -> Result<String, StoreError> {
    let (mut file, mut hash) = (File::open(path).map_err(StoreError::io(path))?, Sha256::new());
    std::io::copy(&mut file, &mut hash).map_err(StoreError::io(path))?;
    Ok(hex::encode(hash.finalize()))
}

/// Copies a folder of whole files, if it is there; half-written ones are left out.
fn copy_folder(from: &Path, to: &Path) -> Result<(), StoreError> {
    let entries = match fs::read_dir(from) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(StoreError::io(from)(e)),
    };
    fs::create_dir_all(to).map_err(StoreError::io(to))?;
    for entry in entries {
        let entry = entry.map_err(StoreError::io(from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_name().to_string_lossy().ends_with(".part") {
            continue;
        }
        if source.is_dir() {
            copy_folder(&source, &target)?;
        } else {
            fs::copy(&source, &target).map_err(StoreError::io(&source))?;
            File::open(&target).and_then(|file| file.sync_all()).map_err(StoreError::io(&target))?;
        }
    }
    File::open(to).and_then(|dir| dir.sync_all()).map_err(StoreError::io(to))
}

fn invalid(field: &'static str, message: &str) -> StoreError {
    StoreError::Invalid { field, message: message.to_owned() }
}

#[cfg(test)]
mod tests;
