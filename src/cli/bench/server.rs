//! What the server says of itself before, during and after a load: residency and load by `GetServerInfo`, and its metrics.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::metrics::{self, Scrape};
use crate::{cli::client::Client, grpc::proto};

/// How often the server is asked while a load runs.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the server said. Counts are of all its callers, from the end of the warm-up to the end of the load.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct ServerFigures {
    /// Requests whose delta was in memory.
    pub(super) hits: u64,
    /// Requests that had to load it.
    pub(super) misses: u64,
    /// Hits of both.
    pub(super) hit_rate: Option<f64>,
    pub(super) evictions: u64,
    /// Bytes of deltas in memory at the end, and the most that were seen.
    pub(super) resident_bytes: u64,
    pub(super) peak_resident_bytes: u64,
    pub(super) budget_bytes: u64,
    /// Deltas in memory at the end.
    pub(super) resident: u64,
    /// The most that were seen, once a second.
    pub(super) peak_running: u32,
    pub(super) peak_queued: u32,
    pub(super) peak_kv_positions: u32,
    /// With `--metrics`, by name and labels: what counters and histograms' sums and counts grew by, and what gauges were at the
    /// end.
    pub(super) metrics: BTreeMap<String, f64>,
}

#[derive(Debug, Clone, Default)]
struct Seen {
    residency: proto::Residency,
    metrics: Option<Scrape>,
}

/// Watches a server while a load runs.
#[derive(Debug)]
pub(super) struct Watch {
    over: CancellationToken,
    task: JoinHandle<Option<ServerFigures>>,
}

impl Watch {
    /// Begins after the warm-up. Without one, the server has been asked when this returns, so that no request is missed.
    pub(super) async fn start(client: Client, metrics: Option<String>, warmup: Duration) -> Self {
        let mut peaks = ServerFigures::default();
        let before = match warmup.is_zero() {
            true => Some(see(&client, metrics.as_deref(), &mut peaks).await),
            false => None,
        };
        let over = CancellationToken::new();
        let begin = Instant::now() + warmup;
        let task = tokio::spawn(watch(client, metrics, (begin, before), over.clone()));
        Self { over, task }
    }

    /// Ends it. Nothing where the server stopped answering, or the load ended before its warm-up did.
    pub(super) async fn finish(self) -> Option<ServerFigures> {
        self.over.cancel();
        self.task.await.ok().flatten()
    }
}

/// Watches from a moment on, or from what was seen already.
async fn watch(
    client: Client,
    url: Option<String>,
    (begin, before): (Instant, Option<Option<Seen>>),
    over: CancellationToken,
) -> Option<ServerFigures> {
    let mut peaks = ServerFigures::default();
    let before = match before {
        Some(before) => before?,
        None => {
            tokio::select! {
                () = over.cancelled() => return None,
                () = tokio::time::sleep_until(begin.into()) => {}
            }
            see(&client, url.as_deref(), &mut peaks).await?
        }
    };
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + INTERVAL, INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = over.cancelled() => break,
            _ = ticks.tick() => {
                // a question that is not answered in time is one peak less
                let _ = see(&client, None, &mut peaks).await;
            }
        }
    }
    let after = see(&client, url.as_deref(), &mut peaks).await?;
    Some(compare(peaks, &before, &after))
}

async fn see(client: &Client, url: Option<&str>, peaks: &mut ServerFigures) -> Option<Seen> {
    let mut server = client.server();
    let asked = tokio::time::timeout(PATIENCE, server.get_server_info(proto::GetServerInfoRequest {}));
    let info = asked.await.ok()?.ok()?.into_inner();
    let (residency, load) = (info.residency.unwrap_or_default(), info.load.unwrap_or_default());
    peaks.peak_resident_bytes = peaks.peak_resident_bytes.max(residency.bytes);
    peaks.peak_running = peaks.peak_running.max(load.running);
    peaks.peak_queued = peaks.peak_queued.max(load.queued);
    peaks.peak_kv_positions = peaks.peak_kv_positions.max(load.kv_positions_used);
    let metrics = match url {
        Some(url) => Some(metrics::scrape(url).await.ok()?),
        None => None,
    };
    Some(Seen { residency, metrics })
}

fn compare(peaks: ServerFigures, before: &Seen, after: &Seen) -> ServerFigures {
    let (then, now) = (&before.residency, &after.residency);
    let (hits, misses) = (now.hits.saturating_sub(then.hits), now.misses.saturating_sub(then.misses));
    ServerFigures {
        hits,
        misses,
        hit_rate: (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64),
        evictions: now.evictions.saturating_sub(then.evictions),
        resident_bytes: now.bytes,
        budget_bytes: now.budget_bytes,
        resident: now.resident,
        metrics: match (&before.metrics, &after.metrics) {
            (Some(before), Some(after)) => after.since(before),
            _ => BTreeMap::new(),
        },
        ..peaks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_the_load_and_levels_those_of_its_end() {
        let residency = |hits, misses, evictions, bytes| proto::Residency {
            hits,
            misses,
            evictions,
            bytes,
            budget_bytes: 100,
            resident: 3,
            ..Default::default()
        };
        let seen = |residency, text: &str| Seen { residency, metrics: Some(Scrape::parse(text).expect("metrics")) };
        let before = seen(residency(10, 5, 1, 70), "# TYPE a counter\na 4\n");
        let after = seen(residency(40, 15, 4, 60), "# TYPE a counter\na 9\n");
        let peaks = ServerFigures { peak_resident_bytes: 90, peak_running: 7, ..Default::default() };
        let got = compare(peaks, &before, &after);
        assert_eq!((got.hits, got.misses, got.evictions, got.hit_rate), (30, 10, 3, Some(0.75)));
        assert_eq!((got.resident_bytes, got.peak_resident_bytes, got.peak_running), (60, 90, 7));
        assert_eq!(got.metrics.get("a"), Some(&5.0));
        // nothing was asked for
        assert_eq!(compare(ServerFigures::default(), &after, &after).hit_rate, None);
    }
}
