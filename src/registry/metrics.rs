//! The registry's metrics: handles made once. A recorder must be installed before the registry is opened.

use metrics::{Counter, Gauge, Histogram};

pub(super) struct Metrics {
    pub(super) hits: Counter,
    pub(super) misses: Counter,
    pub(super) evictions: Counter,
    pub(super) load_seconds: Histogram,
    pub(super) resident: Gauge,
    pub(super) bytes: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Self {
            hits: metrics::counter!("deltaserve_cache_hits_total"),
            misses: metrics::counter!("deltaserve_cache_misses_total"),
            evictions: metrics::counter!("deltaserve_cache_evictions_total"),
            load_seconds: metrics::histogram!("deltaserve_delta_load_seconds"),
            resident: metrics::gauge!("deltaserve_resident_deltas"),
            bytes: metrics::gauge!("deltaserve_cache_bytes", "tier" => "resident"),
        }
    }
}
