//! Logs and metrics: how they leave the process, and the name and meaning of every metric.
//!
//! Labels are of bounded number: methods of the protocol, status codes, tiers, kinds. Tenants choose names of deltas,
//! datasets and jobs, so those are never labels.

use std::io::IsTerminal;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{EnvFilter, filter::ParseError, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// Names of the metrics of the edges and of the cache.
pub mod names {
    /// Calls by `method` and `outcome`.
    pub const REQUESTS: &str = "deltaserve_requests_total";
    /// Time of calls by `method`, streams to their end.
    pub const REQUEST_SECONDS: &str = "deltaserve_request_seconds";
    /// Calls refused because of a bound, by `reason`.
    pub const REFUSALS: &str = "deltaserve_refusals_total";
    /// Calls refused because of who made them, by `reason`.
    pub const ACCESS_REFUSALS: &str = "deltaserve_access_refusals_total";
    /// Files of credentials and certificates that changed, by `outcome`.
    pub const ACCESS_RELOADS: &str = "deltaserve_access_reloads_total";
    /// TLS handshakes that came to nothing, by `reason`.
    pub const TLS_FAILURES: &str = "deltaserve_tls_handshake_failures_total";
    /// Time until the server's certificate runs out.
    pub const TLS_EXPIRES: &str = "deltaserve_tls_certificate_expires_seconds";
    /// Calls in progress.
    pub const CALLS: &str = "deltaserve_calls_in_progress";
    /// Requests whose delta was there.
    pub const CACHE_HITS: &str = "deltaserve_cache_hits_total";
    /// Requests whose delta was not there.
    pub const CACHE_MISSES: &str = "deltaserve_cache_misses_total";
    /// Deltas evicted.
    pub const CACHE_EVICTIONS: &str = "deltaserve_cache_evictions_total";
    /// Bytes of deltas, by `tier`.
    pub const CACHE_BYTES: &str = "deltaserve_cache_bytes";
    /// Deltas in memory.
    pub const RESIDENT_DELTAS: &str = "deltaserve_resident_deltas";
    /// Time of loading a delta.
    pub const LOAD_SECONDS: &str = "deltaserve_delta_load_seconds";
    /// Events of the audit log, by `outcome`.
    pub const AUDIT_EVENTS: &str = "deltaserve_audit_events_total";
    /// Resident memory of the process.
    pub const PROCESS_BYTES: &str = "deltaserve_process_resident_bytes";
    /// Most resident memory of the process so far.
    pub const PROCESS_PEAK_BYTES: &str = "deltaserve_process_peak_resident_bytes";
    /// Time from the start of the process's work to its first answer.
    pub const START_SECONDS: &str = "deltaserve_start_seconds";
    /// Always 1; the label `version` tells.
    pub const BUILD_INFO: &str = "deltaserve_build_info";
}

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

const BATCH_ROWS: &str = "deltaserve_batch_rows";
const DISTINCT_DELTAS: &str = "deltaserve_step_distinct_deltas";
const TRAIN_SHARED_JOBS: &str = "deltaserve_train_shared_pass_jobs";
const TRAIN_YIELDED: &str = "deltaserve_train_yielded_seconds_total";

/// Every metric: name, kind, meaning. `engine` and `train` make theirs in their own `metrics.rs`.
const METRICS: &[(&str, Kind, &str)] = &[
    (names::REQUESTS, Kind::Counter, "Calls that ended, by method and outcome (status code)."),
    (names::REQUEST_SECONDS, Kind::Histogram, "Time of calls by method; of streams, to their end."),
    (names::CALLS, Kind::Gauge, "Calls in progress."),
    (
        names::REFUSALS,
        Kind::Counter,
        "Calls refused at a bound, by reason: calls, places, bulk_places, tenant_share, or a tenant's limit (tenant_concurrency, \
         tenant_rate, tenant_tokens, tenant_deltas, tenant_stored_bytes, ...).",
    ),
    (names::AUDIT_EVENTS, Kind::Counter, "Events of the audit log, by outcome: written, lost."),
    (
        names::ACCESS_REFUSALS,
        Kind::Counter,
        "Calls refused because of who made them, by reason: no_credentials, bad_credentials, permission, tenant, unknown_method.",
    ),
    (
        names::ACCESS_RELOADS,
        Kind::Counter,
        "Files of credentials and certificates that changed, by outcome: done, failed (what was read before is in force).",
    ),
    (
        names::TLS_FAILURES,
        Kind::Counter,
        "TLS handshakes that came to nothing, by reason: failed, timeout, crowded (made room for newer ones).",
    ),
    (names::TLS_EXPIRES, Kind::Gauge, "Seconds until the server's certificate runs out; negative behind it."),
    (
        "deltaserve_queue_wait_seconds",
        Kind::Histogram,
        "Time from a sequence's arrival to its first step, of those that have had one.",
    ),
    ("deltaserve_waiting_tenants", Kind::Gauge, "Tenants with sequences that wait for their first step."),
    ("deltaserve_queue_depth", Kind::Gauge, "Waiting work by queue: engine, admission."),
    ("deltaserve_tokens_total", Kind::Counter, "Tokens by kind: prompt, completion."),
    ("deltaserve_time_to_first_token_seconds", Kind::Histogram, "Time from a request's arrival to its first token."),
    ("deltaserve_inter_token_seconds", Kind::Histogram, "Time between two tokens of a sequence."),
    ("deltaserve_step_seconds", Kind::Histogram, "Time of engine steps."),
    (BATCH_ROWS, Kind::Histogram, "Rows (tokens) of engine steps."),
    (DISTINCT_DELTAS, Kind::Histogram, "Distinct deltas of engine steps."),
    ("deltaserve_running_sequences", Kind::Gauge, "Sequences in the batch."),
    ("deltaserve_constraint_bytes", Kind::Gauge, "Bytes of the states of constrained outputs that have begun, about."),
    ("deltaserve_preemptions_total", Kind::Counter, "Sequences put back because the key-value cache was full."),
    (
        "deltaserve_draft_tokens_total",
        Kind::Counter,
        "Tokens computed ahead, by outcome: accepted and rejected guesses (speculative decoding), forced (a constraint allowed no other).",
    ),
    (
        "deltaserve_kv_pages",
        Kind::Gauge,
        "Pages of the key-value cache by state: used, cached (nobody holds them, they may be found again), free.",
    ),
    (
        "deltaserve_prefix_cache_tokens_total",
        Kind::Counter,
        "Tokens of generating sequences that began, by outcome: hit (their keys and values were cached), miss.",
    ),
    ("deltaserve_prefix_cache_evictions_total", Kind::Counter, "Cached pages of the key-value cache that made room."),
    (
        "deltaserve_kv_integrity_failures_total",
        Kind::Counter,
        "Times that the idle engine found the key-value cache damaged, and emptied it.",
    ),
    (names::CACHE_HITS, Kind::Counter, "Requests whose delta was there."),
    (names::CACHE_MISSES, Kind::Counter, "Requests whose delta was not there."),
    (names::CACHE_EVICTIONS, Kind::Counter, "Deltas evicted."),
    (names::CACHE_BYTES, Kind::Gauge, "Bytes of deltas by tier; evicted but leased ones included."),
    (names::RESIDENT_DELTAS, Kind::Gauge, "Deltas in memory; evicted but leased ones included."),
    (
        "deltaserve_delta_load_failures_total",
        Kind::Counter,
        "Loads of deltas by outcome: failed, refused (the last one failed a moment ago, the store was not asked).",
    ),
    (
        names::LOAD_SECONDS,
        Kind::Histogram,
        "Time of loading a delta: reading and decoding it, and waiting for room and for a turn.",
    ),
    ("deltaserve_train_step_seconds", Kind::Histogram, "Time of optimizer steps."),
    ("deltaserve_train_loss", Kind::Gauge, "Loss of the last optimizer step, by slot (0 to 7) of the running job."),
    ("deltaserve_train_tokens_total", Kind::Counter, "Tokens trained on."),
    (TRAIN_YIELDED, Kind::Gauge, "Seconds that training gave to serving; only grows."),
    ("deltaserve_train_floor_seconds", Kind::Gauge, "Seconds that serving waited for training's floor; only grows."),
    (
        "deltaserve_train_slowdown",
        Kind::Gauge,
        "By what share the p99 of the time between steps per sequence is higher beside training than without, \
         as last measured; NaN: not measured.",
    ),
    (
        "deltaserve_train_inter_token_p99_seconds",
        Kind::Gauge,
        "p99 of the time between steps per sequence (of one token, or several with drafts) while a job trains, \
         as last measured, and that of such steps without (training: on, off); NaN: not measured.",
    ),
    ("deltaserve_train_duty", Kind::Gauge, "Share of the time that training may compute at while serving is busy."),
    (
        "deltaserve_train_shared_passes_total",
        Kind::Counter,
        "Training passes that several jobs shared, by outcome: done, apart (it failed, and was done job by job).",
    ),
    (TRAIN_SHARED_JOBS, Kind::Histogram, "Jobs of a shared training pass."),
    ("deltaserve_train_jobs", Kind::Gauge, "Jobs that have not ended, by state."),
    ("deltaserve_train_jobs_ended_total", Kind::Counter, "Jobs that ended, by terminal state."),
    (
        "deltaserve_store_corrupt_blobs",
        Kind::Gauge,
        "Stored blobs that were found missing or changed, and not healed since.",
    ),
    ("deltaserve_store_repairs_total", Kind::Counter, "Rows of the store that were put right at start."),
    (names::START_SECONDS, Kind::Gauge, "Time from the start of the server to its readiness: loading and verifying."),
    (names::PROCESS_BYTES, Kind::Gauge, "Resident memory of the process, as the system says; Linux only."),
    (names::PROCESS_PEAK_BYTES, Kind::Gauge, "Most resident memory of the process since its start; Linux only."),
    (names::BUILD_INFO, Kind::Gauge, "Always 1; the label version tells."),
];

const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];
const COUNTS: &[f64] = &[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];

/// Form of the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error. `filter` is in `EnvFilter`'s form (`info`, `deltaserve=debug,warn`).
///
/// # Errors
/// If the filter cannot be read. A logger that is there already stays.
pub fn init_logs(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let registry = tracing_subscriber::registry().with(EnvFilter::try_new(filter)?);
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let installed = match format {
        LogFormat::Text => registry.with(layer.with_target(false)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    };
    if installed.is_err() {
        tracing::debug!("a logger is installed already");
    }
    Ok(())
}

/// Installs the metrics recorder of this process and describes every metric.
///
/// # Errors
/// If another recorder is installed.
pub fn init_metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = builder()?.install_recorder()?;
    describe();
    metrics::gauge!(names::BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}

/// Sets the gauges of the process's memory to what they are now; nothing where the system does not tell.
pub fn note_process_memory() {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
    for (name, key) in [(names::PROCESS_BYTES, "VmRSS"), (names::PROCESS_PEAK_BYTES, "VmHWM")] {
        if let Some(bytes) = status_bytes(&status, key) {
            metrics::gauge!(name).set(bytes);
        }
    }
}

/// A line of /proc/self/status that is in kB.
fn status_bytes(status: &str, key: &str) -> Option<f64> {
    let value = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: f64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0)
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)?
        .set_buckets_for_metric(Matcher::Full(BATCH_ROWS.into()), COUNTS)?
        .set_buckets_for_metric(Matcher::Full(DISTINCT_DELTAS.into()), COUNTS)?
        .set_buckets_for_metric(Matcher::Full(TRAIN_SHARED_JOBS.into()), COUNTS)
}

fn describe() {
    for (name, kind, meaning) in METRICS {
        match kind {
            Kind::Counter => metrics::describe_counter!(*name, *meaning),
            Kind::Gauge => metrics::describe_gauge!(*name, *meaning),
            Kind::Histogram => metrics::describe_histogram!(*name, *meaning),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn histograms_are_exported_as_buckets_with_their_meaning() -> Result<(), BuildError> {
        let recorder = builder()?.build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            describe();
            metrics::histogram!(BATCH_ROWS).record(3.0);
            metrics::histogram!("deltaserve_step_seconds").record(0.0015);
        });
        let text = handle.render();
        assert!(text.contains("deltaserve_batch_rows_bucket{le=\"4\"} 1"), "{text}");
        assert!(text.contains("deltaserve_step_seconds_bucket{le=\"0.002\"} 1"), "{text}");
        assert!(text.contains("# HELP deltaserve_batch_rows Rows (tokens) of engine steps."), "{text}");
        Ok(())
    }

    #[test]
    fn the_memory_of_the_process_is_read_from_the_systems_words() {
        let status = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t    1024 kB\nThreads:\t3\n";
        assert_eq!(status_bytes(status, "VmRSS"), Some(1_048_576.0));
        assert_eq!(status_bytes(status, "VmHWM"), Some(2_097_152.0));
        assert_eq!((status_bytes(status, "Threads"), status_bytes(status, "VmPeak")), (None, None));
    }

    #[test]
    fn the_dashboard_asks_for_metrics_that_there_are() {
        let dashboard = include_str!("../deploy/grafana/dashboard.json");
        let of_a_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let asked: BTreeSet<&str> = dashboard
            .match_indices("deltaserve_")
            .map(|(at, _)| &dashboard[at..])
            .map(|rest| &rest[..rest.find(|c| !of_a_name(c)).unwrap_or(rest.len())])
            .collect();
        assert!(asked.len() > 20, "{asked:?}");
        for name in asked {
            let is = |(known, kind, _): &(&str, Kind, &str)| match kind {
                Kind::Histogram => name.strip_prefix(known).is_some_and(|p| ["_bucket", "_sum", "_count"].contains(&p)),
                Kind::Counter | Kind::Gauge => name == *known,
            };
            assert!(METRICS.iter().any(is), "{name}");
        }
    }

    #[test]
    fn names_follow_their_kind() {
        for (name, kind, meaning) in METRICS {
            assert!(name.starts_with("deltaserve_") && meaning.ends_with('.'), "{name}");
            let total = name.ends_with("_total") && *name != TRAIN_YIELDED;
            assert_eq!(total, *kind == Kind::Counter, "{name}");
        }
    }
}
