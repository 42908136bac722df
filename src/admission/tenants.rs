//! Limits of one tenant's calls, and its share beside others: how many in progress, how many per second, which weight.
//!
//! What is remembered of a tenant is a count and a time, for as long as it has calls or is above its rate; of tenants that
//! have none, never more than [`MAX_IDLE`].

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use parking_lot::Mutex;

use super::params::{ServeError, TenantLimit};
use crate::{ids::TenantId, telemetry::names};

/// A tenant that has as many calls as it may tries again after so long.
const BUSY_RETRY: Duration = Duration::from_secs(1);
/// Most tenants that are remembered while they have no call.
const MAX_IDLE: usize = 1 << 16;

/// So many calls per second, in the long run, and so many at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Per second, over 0.
    pub per_second: f64,
    /// At once, at least 1.
    pub burst: u32,
}

/// Limits of each tenant, and weights of some.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TenantLimits {
    /// Calls in progress; `None` = no limit.
    pub max_concurrent: Option<usize>,
    /// Calls per second; `None` = no limit.
    pub rate: Option<Rate>,
    /// Shares of the engine's service; 1 for those that are not named.
    pub weights: HashMap<TenantId, u32>,
}

#[derive(Debug, Default)]
struct State {
    /// Calls in progress.
    calls: usize,
    /// Where the generic cell rate algorithm stands: when the bucket is full again, since the start.
    full: Duration,
}

/// All tenants' calls.
#[derive(Debug)]
pub(super) struct Tenants {
    limits: TenantLimits,
    start: Instant,
    all: Arc<Mutex<HashMap<TenantId, State>>>,
}

/// A call in progress; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Entered {
    tenant: TenantId,
    all: Arc<Mutex<HashMap<TenantId, State>>>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        let Some(state) = all.get_mut(&self.tenant) else { return };
        state.calls = state.calls.saturating_sub(1);
        // one without a rate says nothing once it has no calls; others are looked through when there are many
        if state.calls == 0 && state.full == Duration::ZERO {
            all.remove(&self.tenant);
        }
    }
}

impl Tenants {
    pub(super) fn new(limits: TenantLimits) -> Self {
        Self { limits, start: Instant::now(), all: Arc::default() }
    }

    /// The limits.
    pub(super) fn limits(&self) -> &TenantLimits {
        &self.limits
    }

    /// A tenant's share of the engine's service beside others.
    pub(super) fn weight(&self, tenant: &TenantId) -> u32 {
        self.limits.weights.get(tenant).copied().unwrap_or(1)
    }

    /// Counts one more call of a tenant; `None` where there are no limits.
    ///
    /// # Errors
    /// [`ServeError::TenantLimit`].
    pub(super) fn enter(&self, tenant: &TenantId) -> Result<Option<Entered>, ServeError> {
        self.enter_at(tenant, self.start.elapsed())
    }

    /// As [`Self::enter`], at a time since the start.
    fn enter_at(&self, tenant: &TenantId, now: Duration) -> Result<Option<Entered>, ServeError> {
        let TenantLimits { max_concurrent, rate, .. } = &self.limits;
        if max_concurrent.is_none() && rate.is_none() {
            return Ok(None);
        }
        let mut all = self.all.lock();
        if !all.contains_key(tenant) && all.len() >= MAX_IDLE {
            make_room(&mut all, now);
        }
        let state = all.entry(tenant.clone()).or_default();
        if let Some(most) = max_concurrent.filter(|most| state.calls >= *most) {
            return Err(refused("tenant_concurrency", TenantLimit::Concurrency(most), BUSY_RETRY));
        }
        if let Some(Rate { per_second, burst }) = *rate {
            // a full bucket has `burst` calls in it, and gets another each `each`
            let each = Duration::from_secs_f64(1.0 / per_second);
            let full = state.full.max(now) + each;
            let earliest = full.saturating_sub(each.saturating_mul(burst));
            if earliest > now {
                return Err(refused("tenant_rate", TenantLimit::Rate(per_second, burst), earliest - now));
            }
            state.full = full;
        }
        state.calls += 1;
        Ok(Some(Entered { tenant: tenant.clone(), all: Arc::clone(&self.all) }))
    }
}

/// Counts a refusal.
fn refused(reason: &'static str, limit: TenantLimit, retry: Duration) -> ServeError {
    counter!(names::REFUSALS, "reason" => reason).increment(1);
    ServeError::TenantLimit { limit, retry }
}

/// Forgets tenants without calls: those with a full bucket, and if these are few, the half that will have one soonest.
fn make_room(all: &mut HashMap<TenantId, State>, now: Duration) {
    all.retain(|_, state| state.calls > 0 || state.full > now);
    let mut idle: Vec<Duration> = all.values().filter(|state| state.calls == 0).map(|state| state.full).collect();
    if idle.len() < MAX_IDLE / 2 {
        return;
    }
    let half = idle.len() / 2;
    let (_, middle, _) = idle.select_nth_unstable(half);
    let middle = *middle;
    all.retain(|_, state| state.calls > 0 || state.full > middle);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).unwrap()
    }

    fn tenants(max_concurrent: Option<usize>, rate: Option<(f64, u32)>) -> Tenants {
        let rate = rate.map(|(per_second, burst)| Rate { per_second, burst });
        Tenants::new(TenantLimits { max_concurrent, rate, ..TenantLimits::default() })
    }

    fn retry(refused: Result<Option<Entered>, ServeError>) -> (&'static str, Duration) {
        match refused {
            Err(e @ ServeError::TenantLimit { retry, .. }) => (e.reason(), retry),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn calls_over_the_bound_are_refused_until_one_ends_and_others_are_not_touched() {
        let all = tenants(Some(2), None);
        let (a, b) = (tenant("a"), tenant("b"));
        let first = all.enter(&a).unwrap();
        let second = all.enter(&a).unwrap();
        assert_eq!(retry(all.enter(&a)), ("TENANT_CONCURRENCY", BUSY_RETRY));
        let other = all.enter(&b).unwrap();
        drop(first);
        let third = all.enter(&a).unwrap();
        assert_eq!(retry(all.enter(&a)).0, "TENANT_CONCURRENCY");
        drop((second, third, other));
        assert!(all.all.lock().is_empty(), "nothing is remembered of who has no calls");
    }

    #[test]
    fn a_rate_admits_its_burst_at_once_and_then_one_each_time() {
        for (per_second, burst) in [(2.0, 1), (5.0, 3), (0.5, 2), (1000.0, 50)] {
            let all = tenants(None, Some((per_second, burst)));
            let (a, each) = (tenant("a"), 1.0 / per_second);
            let at = |seconds: f64| all.enter_at(&a, Duration::from_secs_f64(seconds));
            (0..burst).for_each(|i| assert!(at(10.0).is_ok(), "{i} of {burst} at {per_second}"));
            let (reason, wait) = retry(at(10.0));
            assert_eq!(reason, "TENANT_RATE");
            assert!((wait.as_secs_f64() - each).abs() < 1e-6, "{wait:?}");
            // not before, and then as told; a refusal costs nothing
            assert!(at(10.0 + each * 0.9).is_err());
            assert!(at(10.0 + wait.as_secs_f64()).is_ok());
            assert!(at(10.0 + wait.as_secs_f64()).is_err());
            assert!(all.enter_at(&tenant("b"), Duration::from_secs(10)).is_ok());
            // after a long rest the burst is there again, and no more
            (0..burst).for_each(|_| assert!(at(10_000.0).is_ok()));
            assert!(at(10_000.0).is_err());
        }
    }

    #[test]
    fn refusals_are_counted_by_reason_and_name_no_tenant() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            let (both, a) = (tenants(Some(1), Some((0.001, 2))), tenant("acme"));
            let call = both.enter(&a).unwrap();
            assert!(both.enter(&a).is_err());
            drop(call);
            assert!(both.enter(&a).is_ok());
            assert!((0..3).all(|_| both.enter(&a).is_err()));
        });
        let text = handle.render();
        let count = |reason: &str| format!("{}{{reason=\"{reason}\"}}", names::REFUSALS);
        assert!(text.contains(&format!("{} 1\n", count("tenant_concurrency"))), "{text}");
        assert!(text.contains(&format!("{} 3\n", count("tenant_rate"))), "{text}");
        assert!(!text.contains("acme"), "{text}");
    }

    #[test]
    fn in_the_long_run_no_more_than_the_rate_passes() {
        let all = tenants(None, Some((10.0, 4)));
        let a = tenant("a");
        let passed = (0..10_000).filter(|i| all.enter_at(&a, Duration::from_millis(*i)).is_ok()).count();
        assert!((100..=104).contains(&passed), "{passed} in ten seconds");
    }

    #[test]
    fn ever_new_tenants_take_bounded_memory() {
        let all = tenants(Some(1), Some((0.001, 1)));
        let held = all.enter_at(&tenant("held"), Duration::ZERO).unwrap();
        for i in 0..3 * MAX_IDLE {
            drop(all.enter_at(&tenant(&format!("t{i}")), Duration::from_micros(i as u64)).unwrap());
            assert!(all.all.lock().len() <= MAX_IDLE + 1);
        }
        assert_eq!(retry(all.enter_at(&tenant("held"), Duration::from_secs(1))).0, "TENANT_CONCURRENCY");
        let last = tenant(&format!("t{}", 3 * MAX_IDLE - 1));
        assert_eq!(retry(all.enter_at(&last, Duration::from_secs(1))).0, "TENANT_RATE", "the newest are kept");
        drop(held);
    }

    #[test]
    fn without_limits_nothing_is_remembered_and_weights_are_one_unless_named() {
        let weights = HashMap::from([(tenant("gold"), 5)]);
        let all = Tenants::new(TenantLimits { weights, ..TenantLimits::default() });
        assert!((0..100).all(|_| all.enter(&tenant("a")).is_ok_and(|entered| entered.is_none())));
        assert!(all.all.lock().is_empty());
        assert_eq!([all.weight(&tenant("gold")), all.weight(&tenant("a"))], [5, 1]);
    }
}
