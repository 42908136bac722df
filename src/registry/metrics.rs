//! The registry's metrics: handles made once. A recorder must be installed before the registry is opened.

use metrics::{Counter, Gauge, Histogram};

use crate::telemetry::names;

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
            hits: metrics::counter!(names::CACHE_HITS),
            misses: metrics::counter!(names::CACHE_MISSES),
            evictions: metrics::counter!(names::CACHE_EVICTIONS),
            load_seconds: metrics::histogram!(names::LOAD_SECONDS),
            resident: metrics::gauge!(names::RESIDENT_DELTAS),
            bytes: metrics::gauge!(names::CACHE_BYTES, "tier" => "resident"),
        }
    }
}
