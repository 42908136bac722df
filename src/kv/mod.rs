//! The key-value cache: bookkeeping of pages (no tensors) and the tensors they index.

mod cache;

pub use cache::KvCache;
