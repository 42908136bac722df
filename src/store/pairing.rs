//! Which blobs a database goes with. Blobs that no row of *this* database names are garbage, so a server that was pointed
//! at the blobs of another database would remove them all, and one without its blobs would find every delta corrupt.
//!
//! The database has an id of its own, and the blob store a mark with that id. The id is made first, the mark second, and
//! that there is a mark is noted third: a crash in between is made up for, and a mark that is gone is noticed.

use super::{
    StoreError,
    blobs::Blobs,
    db::{Db, query},
};

/// Finds that database and blobs are of each other; or, where they are new, makes them so.
pub(super) async fn pair(db: &Db, blobs: &Blobs) -> Result<(), StoreError> {
    let mut tx = db.begin().await?;
    let sql = "INSERT INTO meta (fact, value) VALUES ('store', $1) ON CONFLICT (fact) DO NOTHING";
    query(sql).bind(uuid::Uuid::now_v7().to_string()).execute(&mut *tx).await?;
    let id: String = query("SELECT value FROM meta WHERE fact = 'store'").fetch_one(&mut *tx).await?.try_get(0)?;
    let marked = query("SELECT 1 FROM meta WHERE fact = 'store_marked'").fetch_optional(&mut *tx).await?.is_some();
    tx.commit().await?;
    let at = blobs.describe();
    match blobs.mark().await? {
        Some(mark) if mark == id => {}
        Some(_) => {
            return Err(StoreError::Mismatch(format!(
                "the blobs at {at} belong to another database; --database and --blobs must go together"
            )));
        }
        None if marked => {
            return Err(StoreError::Mismatch(format!(
                "the blobs of this database are not at {at}: it has no object store-id; every server of a database \
                 takes the same --blobs, and what was lost comes back with `deltaserve restore` into an empty place"
            )));
        }
        None => blobs.set_mark(&id).await?,
    }
    if !marked {
        let mut tx = db.begin().await?;
        let sql = "INSERT INTO meta (fact, value) VALUES ('store_marked', 'yes') ON CONFLICT (fact) DO NOTHING";
        query(sql).execute(&mut *tx).await?;
        tx.commit().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::store::{Places, Store, StoreError};

    #[tokio::test]
    async fn blobs_of_another_database_are_refused_and_lost_ones_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let shared = format!("file://{}", dir.path().join("blobs").display());
        let at = |name: &str| Places { dir: dir.path().join(name), database: None, blobs: Some(shared.clone()) };
        let first = Store::open_at(&at("a")).await.unwrap();
        first.put_blob("x".into()).await.unwrap();
        let refused = Store::open_at(&at("b")).await.err().unwrap();
        assert!(matches!(&refused, StoreError::Mismatch(why) if why.contains("another database")), "{refused}");
        first.close().await;
        drop(first);
        drop(Store::open_at(&at("a")).await.unwrap());
        std::fs::remove_dir_all(dir.path().join("blobs")).unwrap();
        let lost = Store::open_at(&at("a")).await.err().unwrap();
        assert!(matches!(&lost, StoreError::Mismatch(why) if why.contains("store-id")), "{lost}");
    }
}
