//! The key-value cache: bookkeeping of pages (no tensors) and the tensors they index.

mod cache;
mod keys;
mod pool;

pub use cache::KvCache;
pub use keys::{PageKey, PageKeys, PageOwner};
pub use pool::{Found, PAGE_SIZE, PagePool, PageTable, pages_for};
