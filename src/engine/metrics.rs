//! The engine's metrics: handles made once.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::scheduler::Scheduler;
use crate::pacing::{Figures, Pacer};

/// Handles of all engine metrics; names are described in telemetry.
pub(super) struct Metrics {
    /// Rows of a step.
    pub(super) batch_rows: Histogram,
    /// Distinct deltas of a step.
    pub(super) distinct_deltas: Histogram,
    /// Wall time of a step.
    pub(super) step_seconds: Histogram,
    /// Arrival to first token.
    pub(super) time_to_first_token: Histogram,
    /// Between two tokens of a sequence.
    pub(super) inter_token: Histogram,
    /// Sequences that lost their pages.
    pub(super) preemptions: Counter,
    /// Tokens whose keys and values were there when their sequence began.
    pub(super) cache_hits: Counter,
    /// Tokens whose keys and values might have been there and were not.
    pub(super) cache_misses: Counter,
    /// Cached pages that made room.
    pub(super) cache_evictions: Counter,
    /// Times that the cache was found damaged and emptied.
    pub(super) integrity_failures: Counter,
    /// Prompt tokens of sequences that started.
    pub(super) prompt_tokens: Counter,
    /// Tokens generated.
    pub(super) completion_tokens: Counter,
    /// Tokens guessed ahead that were then chosen.
    pub(super) drafts_accepted: Counter,
    /// Those that were not.
    pub(super) drafts_rejected: Counter,
    /// Tokens that came ahead of their step because nothing else could come.
    pub(super) drafts_forced: Counter,
    /// Arrival to first step.
    pub(super) queue_wait: Histogram,
    queue_depth: Gauge,
    waiting_tenants: Gauge,
    running: Gauge,
    pages_used: Gauge,
    pages_cached: Gauge,
    pages_free: Gauge,
    constraint_bytes: Gauge,
    floor: Gauge,
    duty: Gauge,
    slowdown: Gauge,
    p99: Gauge,
    p99_off: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Self {
        Self {
            batch_rows: histogram!("deltaserve_batch_rows"),
            distinct_deltas: histogram!("deltaserve_step_distinct_deltas"),
            step_seconds: histogram!("deltaserve_step_seconds"),
            time_to_first_token: histogram!("deltaserve_time_to_first_token_seconds"),
            inter_token: histogram!("deltaserve_inter_token_seconds"),
            preemptions: counter!("deltaserve_preemptions_total"),
            cache_hits: counter!("deltaserve_prefix_cache_tokens_total", "outcome" => "hit"),
            cache_misses: counter!("deltaserve_prefix_cache_tokens_total", "outcome" => "miss"),
            cache_evictions: counter!("deltaserve_prefix_cache_evictions_total"),
            integrity_failures: counter!("deltaserve_kv_integrity_failures_total"),
            prompt_tokens: counter!("deltaserve_tokens_total", "kind" => "prompt"),
            completion_tokens: counter!("deltaserve_tokens_total", "kind" => "completion"),
            drafts_accepted: counter!("deltaserve_draft_tokens_total", "outcome" => "accepted"),
            drafts_rejected: counter!("deltaserve_draft_tokens_total", "outcome" => "rejected"),
            drafts_forced: counter!("deltaserve_draft_tokens_total", "outcome" => "forced"),
            queue_wait: histogram!("deltaserve_queue_wait_seconds"),
            waiting_tenants: gauge!("deltaserve_waiting_tenants"),
            queue_depth: gauge!("deltaserve_queue_depth", "queue" => "engine"),
            running: gauge!("deltaserve_running_sequences"),
            pages_used: gauge!("deltaserve_kv_pages", "state" => "used"),
            pages_cached: gauge!("deltaserve_kv_pages", "state" => "cached"),
            pages_free: gauge!("deltaserve_kv_pages", "state" => "free"),
            constraint_bytes: gauge!("deltaserve_constraint_bytes"),
            floor: gauge!("deltaserve_train_floor_seconds"),
            duty: gauge!("deltaserve_train_duty"),
            slowdown: gauge!("deltaserve_train_slowdown"),
            p99: gauge!("deltaserve_train_inter_token_p99_seconds", "training" => "on"),
            p99_off: gauge!("deltaserve_train_inter_token_p99_seconds", "training" => "off"),
        }
    }

    /// Sets the gauges.
    pub(super) fn observe(&self, scheduler: &Scheduler, pacer: &Pacer) {
        self.queue_depth.set(scheduler.waiting() as f64);
        self.waiting_tenants.set(scheduler.waiting_tenants() as f64);
        self.running.set(scheduler.running() as f64);
        self.pages_used.set(scheduler.pool().used() as f64);
        self.pages_cached.set(scheduler.pool().cached() as f64);
        self.pages_free.set(scheduler.pool().free() as f64);
        self.constraint_bytes.set(scheduler.constraint_bytes() as f64);
        self.floor.set(pacer.given().as_secs_f64());
        self.duty.set(pacer.duty());
        // what holds no more is no number
        let figures = pacer.figures();
        let figure = |of: fn(&Figures) -> f64| figures.as_ref().map_or(f64::NAN, of);
        self.slowdown.set(figure(Figures::slowdown));
        self.p99.set(figure(|figures| figures.p99));
        self.p99_off.set(figure(|figures| figures.p99_off));
    }
}
