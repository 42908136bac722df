//! Logs and metrics: how they leave the process, and the name and meaning of every metric.
//!
//! Labels are of bounded number: methods of the protocol, status codes, tiers, kinds. Tenants choose names of deltas,
//! datasets and jobs, so those are never labels.

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{EnvFilter, filter::ParseError, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// Names of metrics.
pub mod names {
    /// Calls by `method` and `outcome`.
    pub const REQUESTS: &str = "deltaserve_requests_total";
    /// Time of calls by `method`, streams to their end.
    pub const REQUEST_SECONDS: &str = "deltaserve_request_seconds";
    /// Calls in progress.
    pub const CALLS: &str = "deltaserve_calls_in_progress";
    /// Waiting work by `queue`.
    pub const QUEUE_DEPTH: &str = "deltaserve_queue_depth";
    /// Tokens by `kind`: `prompt`, `completion`.
    pub const TOKENS: &str = "deltaserve_tokens_total";
    /// Time to first token.
    pub const FIRST_TOKEN_SECONDS: &str = "deltaserve_time_to_first_token_seconds";
    /// Time between tokens.
    pub const INTER_TOKEN_SECONDS: &str = "deltaserve_inter_token_seconds";
    /// Time of engine steps.
    pub const STEP_SECONDS: &str = "deltaserve_step_seconds";
    /// Rows of engine steps.
    pub const STEP_ROWS: &str = "deltaserve_step_rows";
    /// Sequences of engine steps.
    pub const STEP_SEQUENCES: &str = "deltaserve_step_sequences";
    /// Distinct deltas of engine steps.
    pub const STEP_DELTAS: &str = "deltaserve_step_deltas";
    /// Sequences put back to make room.
    pub const PREEMPTIONS: &str = "deltaserve_preemptions_total";
    /// Key-value positions in use.
    pub const KV_USED: &str = "deltaserve_kv_positions_used";
    /// Key-value positions in all.
    pub const KV_TOTAL: &str = "deltaserve_kv_positions_total";
    /// Requests whose delta was there, by `tier`.
    pub const CACHE_HITS: &str = "deltaserve_cache_hits_total";
    /// Requests whose delta was not there, by `tier`.
    pub const CACHE_MISSES: &str = "deltaserve_cache_misses_total";
    /// Deltas evicted, by `tier`.
    pub const CACHE_EVICTIONS: &str = "deltaserve_cache_evictions_total";
    /// Bytes of deltas, by `tier`.
    pub const CACHE_BYTES: &str = "deltaserve_cache_bytes";
    /// Deltas in memory.
    pub const CACHE_DELTAS: &str = "deltaserve_cache_deltas";
    /// Time of loading a delta, by `tier` it came from.
    pub const LOAD_SECONDS: &str = "deltaserve_load_seconds";
    /// Optimizer steps' time.
    pub const TRAIN_STEP_SECONDS: &str = "deltaserve_train_step_seconds";
    /// Loss of the last optimizer step of the running job.
    pub const TRAIN_LOSS: &str = "deltaserve_train_loss";
    /// Tokens trained on.
    pub const TRAIN_TOKENS: &str = "deltaserve_train_tokens_total";
    /// Time that training gave to serving.
    pub const TRAIN_YIELDED_SECONDS: &str = "deltaserve_train_yielded_seconds_total";
    /// Jobs that ended, by terminal `state`.
    pub const TRAIN_JOBS: &str = "deltaserve_train_jobs_total";
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

/// Every metric: name, kind, meaning.
const METRICS: &[(&str, Kind, &str)] = &[
    (names::REQUESTS, Kind::Counter, "Calls that ended, by method and outcome (status code)."),
    (names::REQUEST_SECONDS, Kind::Histogram, "Time of calls by method; of streams, to their end."),
    (names::CALLS, Kind::Gauge, "Calls in progress."),
    (names::QUEUE_DEPTH, Kind::Gauge, "Waiting work by queue: admission (requests for the engine), train (jobs)."),
    (names::TOKENS, Kind::Counter, "Tokens by kind: prompt, completion."),
    (names::FIRST_TOKEN_SECONDS, Kind::Histogram, "Time from a request's arrival to its first token."),
    (names::INTER_TOKEN_SECONDS, Kind::Histogram, "Time between two tokens of a sequence."),
    (names::STEP_SECONDS, Kind::Histogram, "Time of engine steps."),
    (names::STEP_ROWS, Kind::Histogram, "Rows (tokens) of engine steps."),
    (names::STEP_SEQUENCES, Kind::Histogram, "Sequences of engine steps."),
    (names::STEP_DELTAS, Kind::Histogram, "Distinct deltas of engine steps."),
    (names::PREEMPTIONS, Kind::Counter, "Sequences put back to be recomputed because the key-value cache was full."),
    (names::KV_USED, Kind::Gauge, "Positions of the key-value cache in use."),
    (names::KV_TOTAL, Kind::Gauge, "Positions of the key-value cache."),
    (names::CACHE_HITS, Kind::Counter, "Requests whose delta was there, by tier."),
    (names::CACHE_MISSES, Kind::Counter, "Requests whose delta was not there, by tier."),
    (names::CACHE_EVICTIONS, Kind::Counter, "Deltas evicted, by tier."),
    (names::CACHE_BYTES, Kind::Gauge, "Bytes of deltas by tier; evicted but leased ones included."),
    (names::CACHE_DELTAS, Kind::Gauge, "Deltas by tier."),
    (names::LOAD_SECONDS, Kind::Histogram, "Time of loading a delta, by the tier it came from."),
    (names::TRAIN_STEP_SECONDS, Kind::Histogram, "Time of optimizer steps."),
    (names::TRAIN_LOSS, Kind::Gauge, "Loss of the running job's last optimizer step."),
    (names::TRAIN_TOKENS, Kind::Counter, "Tokens trained on."),
    (names::TRAIN_YIELDED_SECONDS, Kind::Counter, "Seconds that training gave to serving."),
    (names::TRAIN_JOBS, Kind::Counter, "Jobs that ended, by terminal state."),
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
    let layer = fmt::layer().with_writer(std::io::stderr);
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

fn builder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)?
        .set_buckets_for_metric(Matcher::Prefix("deltaserve_step_".into()), COUNTS)?
        .set_buckets_for_metric(Matcher::Full(names::STEP_SECONDS.into()), SECONDS)
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
    use super::*;

    #[test]
    fn histograms_are_exported_as_buckets_with_their_meaning() -> Result<(), BuildError> {
        let recorder = builder()?.build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            describe();
            metrics::histogram!(names::STEP_ROWS).record(3.0);
            metrics::histogram!(names::STEP_SECONDS).record(0.0015);
        });
        let text = handle.render();
        assert!(text.contains("deltaserve_step_rows_bucket{le=\"4\"} 1"), "{text}");
        assert!(text.contains("deltaserve_step_seconds_bucket{le=\"0.002\"} 1"), "{text}");
        assert!(text.contains("# HELP deltaserve_step_rows Rows (tokens) of engine steps."), "{text}");
        Ok(())
    }

    #[test]
    fn names_follow_their_kind() {
        for (name, kind, meaning) in METRICS {
            assert!(name.starts_with("deltaserve_") && meaning.ends_with('.'), "{name}");
            let total = name.ends_with("_total") && *name != names::KV_TOTAL;
            assert_eq!(total, *kind == Kind::Counter, "{name}");
        }
    }
}
