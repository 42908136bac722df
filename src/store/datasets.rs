//! Datasets: what a tenant uploaded for training. The rows are in one blob; how to read them is the trainer's matter.

use super::{
    Store, StoreError,
    db::{Row, check_text, from_db, now_ms, parse, query, to_db},
};
use crate::ids::{BlobId, TenantId};

/// A dataset to store; its blob is stored already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDataset {
    /// The tenant's name for it; need not be unique.
    pub name: Option<String>,
    /// Its bytes.
    pub blob: BlobId,
    /// How to read them, e.g. `jsonl`.
    pub format: String,
    /// Examples in it.
    pub rows: u64,
    /// Bytes of the blob.
    pub bytes: u64,
}

/// A stored dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetRecord {
    /// Its id: a UUID, ordered by time.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// The tenant's name for it.
    pub name: Option<String>,
    /// Its bytes.
    pub blob: BlobId,
    /// How to read them.
    pub format: String,
    /// Examples in it.
    pub rows: u64,
    /// Bytes of the blob.
    pub bytes: u64,
    /// Unix milliseconds.
    pub created_ms: i64,
}

const SELECT_ONE: &str = "SELECT id, tenant, name, blob, format, row_count, bytes, created_ms FROM datasets \
                          WHERE tenant = $1 AND id = $2";
const SELECT_ALL: &str = "SELECT id, tenant, name, blob, format, row_count, bytes, created_ms FROM datasets \
                          WHERE tenant = $1 ORDER BY id DESC";

impl Store {
    /// Names a stored blob as a tenant's dataset.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the blob is not stored; [`StoreError::Quota`]; [`StoreError::TenantClosed`].
    pub async fn put_dataset(&self, tenant: &TenantId, new: NewDataset) -> Result<DatasetRecord, StoreError> {
        let blob = new.blob;
        let put = self.name_dataset(tenant, new).await;
        if put.is_err() {
            self.orphan(tenant, [blob]);
        }
        put
    }

    async fn name_dataset(&self, tenant: &TenantId, new: NewDataset) -> Result<DatasetRecord, StoreError> {
        check_text("name", new.name.as_deref().unwrap_or_default())?;
        let _hold = self.hold(&[new.blob]).await?;
        self.require_blob(new.blob).await?;
        let record = DatasetRecord {
            id: uuid::Uuid::now_v7().to_string(),
            tenant: tenant.clone(),
            name: new.name,
            blob: new.blob,
            format: new.format,
            rows: new.rows,
            bytes: new.bytes,
            created_ms: now_ms(),
        };
        let mut tx = self.db().begin().await?;
        self.check_held(&mut tx, &[new.blob]).await?;
        self.check_new_dataset(&mut tx, tenant, record.bytes).await?;
        let sql = "INSERT INTO datasets (id, tenant, name, blob, format, row_count, bytes, created_ms) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
        let insert = query(sql).bind(&record.id).bind(tenant.as_str()).bind(&record.name);
        let insert = insert.bind(record.blob.to_string()).bind(&record.format).bind(to_db(record.rows));
        insert.bind(to_db(record.bytes)).bind(record.created_ms).execute(&mut *tx).await?;
        crate::failpoint!("dataset-before-commit", |why| Err(StoreError::injected(why)));
        tx.commit().await?;
        crate::failpoint!("dataset-committed");
        Ok(record)
    }

    /// A tenant's dataset by id.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for another tenant's.
    pub async fn get_dataset(&self, tenant: &TenantId, id: &str) -> Result<DatasetRecord, StoreError> {
        let row = query(SELECT_ONE).bind(tenant.as_str()).bind(id).fetch_optional(self.db().readers()).await?;
        record(&row.ok_or_else(|| not_found(id))?)
    }

    /// A tenant's datasets, newest first.
    ///
    /// # Errors
    /// What the database refuses.
    pub async fn list_datasets(&self, tenant: &TenantId) -> Result<Vec<DatasetRecord>, StoreError> {
        let rows = query(SELECT_ALL).bind(tenant.as_str()).fetch_all(self.db().readers()).await?;
        rows.iter().map(record).collect()
    }

    /// Removes a tenant's dataset; jobs that keep its blob (see [`Store::set_job_blob`]) still have it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for another tenant's.
    pub async fn delete_dataset(&self, tenant: &TenantId, id: &str) -> Result<(), StoreError> {
        let found = self.get_dataset(tenant, id).await?;
        let mut tx = self.db().begin().await?;
        let sql = "DELETE FROM datasets WHERE tenant = $1 AND id = $2";
        let done = query(sql).bind(tenant.as_str()).bind(id).execute(&mut *tx).await?;
        if done == 0 {
            return Err(not_found(id));
        }
        crate::failpoint!("dataset-delete-before-commit", |why| Err(StoreError::injected(why)));
        tx.commit().await?;
        crate::failpoint!("dataset-delete-committed");
        self.orphan(tenant, [found.blob]);
        Ok(())
    }

    /// Refuses to name a blob that is not there. The caller holds it.
    pub(super) async fn require_blob(&self, blob: BlobId) -> Result<(), StoreError> {
        match self.blobs().exists(blob).await? {
            true => Ok(()),
            false => Err(StoreError::NotFound { kind: "blob", name: blob.to_string() }),
        }
    }
}

fn not_found(id: &str) -> StoreError {
    StoreError::NotFound { kind: "dataset", name: id.to_owned() }
}

fn record(row: &Row) -> Result<DatasetRecord, StoreError> {
    let tenant: String = row.try_get("tenant")?;
    Ok(DatasetRecord {
        id: row.try_get("id")?,
        tenant: TenantId::new(&tenant).map_err(|e| StoreError::row("datasets", format!("tenant {e}")))?,
        name: row.try_get("name")?,
        blob: parse("datasets", row.try_get("blob")?)?,
        format: row.try_get("format")?,
        rows: from_db("datasets", row.try_get("row_count")?)?,
        bytes: from_db("datasets", row.try_get("bytes")?)?,
        created_ms: row.try_get("created_ms")?,
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::store::testing::{Place, on_each_database};

    on_each_database!(datasets_belong_to_their_tenant_and_their_blobs_must_exist);

    async fn datasets_belong_to_their_tenant_and_their_blobs_must_exist(place: Place) {
        let store = place.open().await;
        let (mine, other) = (TenantId::new("mine").unwrap(), TenantId::new("other").unwrap());
        let new = |blob| NewDataset { name: None, blob, format: "jsonl".into(), rows: 2, bytes: 3 };
        let absent = store.put_dataset(&mine, new(BlobId::of(b"absent"))).await;
        assert!(matches!(absent, Err(StoreError::NotFound { kind: "blob", .. })));
        let blob = store.put_blob(Bytes::from_static(b"abc")).await.unwrap();
        let a = store.put_dataset(&mine, new(blob)).await.unwrap();
        let b = store.put_dataset(&mine, new(blob)).await.unwrap();
        assert_eq!(store.get_dataset(&mine, &a.id).await.unwrap(), a);
        assert_eq!(store.list_datasets(&mine).await.unwrap(), [b, a.clone()]);
        for id in [a.id.as_str(), "nonsense"] {
            assert!(matches!(store.get_dataset(&other, id).await, Err(StoreError::NotFound { .. })));
            assert!(matches!(store.delete_dataset(&other, id).await, Err(StoreError::NotFound { .. })));
        }
        let odd = NewDataset { name: Some("a\0b".into()), ..new(blob) };
        assert!(matches!(store.put_dataset(&mine, odd).await, Err(StoreError::Invalid { field: "name", .. })));
        store.delete_dataset(&mine, &a.id).await.unwrap();
        assert!(matches!(store.get_dataset(&mine, &a.id).await, Err(StoreError::NotFound { .. })));
    }
}
