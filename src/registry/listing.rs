//! A tenant's deltas, a page at a time.

use super::{DeltaRef, DeltaStatus, Registry, RegistryError, VersionSel, catalog::Listing};
use crate::ids::{DeltaName, TenantId};

/// Most versions in one page of a list.
const MAX_PAGE: usize = 1000;

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Names that start with this.
    pub prefix: String,
    /// All versions, not only the current ones.
    pub all_versions: bool,
    /// Empty, or what the last page gave.
    pub page_token: String,
    /// Most versions, 1 to 1000; 0: 100.
    pub page_size: usize,
}

/// A page of versions, by name, newest first.
#[derive(Debug, Clone)]
pub struct ListPage {
    /// The versions.
    pub deltas: Vec<DeltaStatus>,
    /// Where the next page starts; empty: this is the last.
    pub next_page_token: String,
}

impl Registry {
    /// A tenant's deltas, a page at a time.
    ///
    /// # Errors
    /// [`RegistryError::BadReference`] for a page token that no page gave.
    pub async fn list(&self, tenant: &TenantId, query: &ListQuery) -> Result<ListPage, RegistryError> {
        let after = match query.page_token.as_str() {
            "" => None,
            token => Some(page_token(token)?),
        };
        let size = if query.page_size == 0 { 100 } else { query.page_size.min(MAX_PAGE) };
        let after = after.as_ref().map(|(name, number)| (name, *number));
        let listing = Listing { prefix: &query.prefix, after, limit: size + 1, all: query.all_versions };
        let mut found = self.catalog.list(tenant, &listing);
        let more = found.len() > size;
        found.truncate(size);
        let last = found.last().filter(|_| more).map(|f| format!("{}@{}", f.version.name, f.version.number));
        let mut deltas = Vec::with_capacity(found.len());
        for found in found {
            deltas.push(self.status(found).await);
        }
        Ok(ListPage { deltas, next_page_token: last.unwrap_or_default() })
    }
}

fn page_token(token: &str) -> Result<(DeltaName, u64), RegistryError> {
    match token.parse()? {
        DeltaRef { name, version: Some(VersionSel::Number(number)) } => Ok((name, number)),
        _ => Err(RegistryError::BadReference { text: token.to_owned(), detail: "is not a page token".to_owned() }),
    }
}
