//! The key-value cache: bookkeeping of pages (no tensors) and the tensors they index.

mod cache;
mod pool;

pub use cache::KvCache;
pub use pool::{PAGE_SIZE, PagePool, PageTable, pages_for};
