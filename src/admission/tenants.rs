//! Each tenant's calls, and its share beside others: how many in progress, how many calls and tokens per second, which
//! weight; and whether it takes calls at all.
//!
//! What is remembered of a tenant is a count and two times, for as long as it has calls or is above its rates; of tenants
//! that have none, never more than [`MAX_IDLE`].

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    limits_file::Quotas,
    params::{Rate, ServeError, TenantLimit},
};
use crate::{ids::TenantId, telemetry::names};

/// A tenant that has as many calls as it may tries again after so long.
const BUSY_RETRY: Duration = Duration::from_secs(1);
/// Most tenants that are remembered while they have no call.
const MAX_IDLE: usize = 1 << 16;

/// Limits of each tenant, and weights of some.
#[derive(Debug, Clone, Default)]
pub struct TenantLimits {
    /// Limits.
    pub quotas: Quotas,
    /// Shares of the engine's service; 1 for those that are not named.
    pub weights: HashMap<TenantId, u32>,
}

#[derive(Debug, Default)]
struct State {
    /// Calls in progress.
    calls: usize,
    /// Where the generic cell rate algorithm of calls stands: when the bucket is full again, since the start.
    full: Duration,
    /// That of tokens: they are taken when they are read and generated, so that it may be in debt.
    tokens: Duration,
    /// It takes no calls.
    closed: bool,
}

impl State {
    /// Whether it says anything.
    fn is_idle(&self) -> bool {
        self.calls == 0 && !self.closed
    }

    /// When it says nothing any more, once it is idle.
    fn until(&self) -> Duration {
        self.full.max(self.tokens)
    }
}

#[derive(Debug)]
struct Shared {
    all: Mutex<HashMap<TenantId, State>>,
    /// A tenant that is closed has no more calls.
    left: Notify,
    start: Instant,
}

/// All tenants' calls.
#[derive(Debug)]
pub(super) struct Tenants {
    limits: TenantLimits,
    shared: Arc<Shared>,
}

/// A call in progress; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Entered {
    tenant: TenantId,
    shared: Arc<Shared>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut all = self.shared.all.lock();
        let Some(state) = all.get_mut(&self.tenant) else { return };
        state.calls = state.calls.saturating_sub(1);
        if state.calls == 0 && state.closed {
            self.shared.left.notify_waiters();
        }
        // one without a rate says nothing once it has no calls; others are looked through when there are many
        if state.is_idle() && state.until() == Duration::ZERO {
            all.remove(&self.tenant);
        }
    }
}

/// A tenant that takes no calls until this is dropped.
#[derive(Debug)]
pub(super) struct Closed {
    tenant: TenantId,
    shared: Arc<Shared>,
}

impl Drop for Closed {
    fn drop(&mut self) {
        let mut all = self.shared.all.lock();
        let Some(state) = all.get_mut(&self.tenant) else { return };
        state.closed = false;
        if state.is_idle() && state.until() == Duration::ZERO {
            all.remove(&self.tenant);
        }
    }
}

impl Closed {
    /// Waits until the tenant has no calls; false if it still has some after so long.
    pub(super) async fn left(&self, within: Duration) -> bool {
        let gone = async {
            loop {
                let mut left = std::pin::pin!(self.shared.left.notified());
                left.as_mut().enable();
                if self.shared.all.lock().get(&self.tenant).is_none_or(|state| state.calls == 0) {
                    return;
                }
                left.await;
            }
        };
        tokio::time::timeout(within, gone).await.is_ok()
    }
}

/// Takes a tenant's tokens as they are read and generated.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    tenant: TenantId,
    rate: Rate,
    shared: Arc<Shared>,
}

impl Meter {
    /// Takes so many; what is not there is owed.
    pub(super) fn take(&self, tokens: u64) {
        self.take_at(tokens, self.shared.start.elapsed());
    }

    fn take_at(&self, tokens: u64, now: Duration) {
        if tokens == 0 {
            return;
        }
        let mut all = self.shared.all.lock();
        if !all.contains_key(&self.tenant) && all.len() >= MAX_IDLE {
            make_room(&mut all, now);
        }
        let state = all.entry(self.tenant.clone()).or_default();
        state.tokens = state.tokens.max(now).saturating_add(time_of(self.rate.per_second, tokens as f64));
    }
}

/// The time in which a rate gives so much.
fn time_of(per_second: f64, amount: f64) -> Duration {
    Duration::try_from_secs_f64(amount / per_second).unwrap_or(Duration::MAX)
}

/// How much of a rate's burst is in use.
fn in_use(rate: Rate, full: Duration, now: Duration) -> f64 {
    full.saturating_sub(now).as_secs_f64() * rate.per_second
}

/// What a tenant uses of what is limited by time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct InUse {
    /// Calls in progress.
    pub(super) calls: usize,
    /// Calls that count against the burst.
    pub(super) rate: f64,
    /// Tokens that count against the burst; more than that are a debt.
    pub(super) tokens: f64,
}

impl Tenants {
    pub(super) fn new(limits: TenantLimits) -> Self {
        let shared = Shared { all: Mutex::default(), left: Notify::new(), start: Instant::now() };
        Self { limits, shared: Arc::new(shared) }
    }

    /// The limits.
    pub(super) fn limits(&self) -> &TenantLimits {
        &self.limits
    }

    /// A tenant's share of the engine's service beside others.
    pub(super) fn weight(&self, tenant: &TenantId) -> u32 {
        self.limits.weights.get(tenant).copied().unwrap_or(1)
    }

    /// What a tenant uses now.
    pub(super) fn in_use(&self, tenant: &TenantId) -> InUse {
        let (quota, now) = (self.limits.quotas.of(tenant), self.shared.start.elapsed());
        let all = self.shared.all.lock();
        let Some(state) = all.get(tenant) else { return InUse::default() };
        InUse {
            calls: state.calls,
            rate: quota.rate.map_or(0.0, |rate| in_use(rate, state.full, now)),
            tokens: quota.tokens.map_or(0.0, |rate| in_use(rate, state.tokens, now)),
        }
    }

    /// What takes a tenant's tokens; `None` where they are not limited.
    pub(super) fn meter(&self, tenant: &TenantId) -> Option<Meter> {
        let rate = self.limits.quotas.of(tenant).tokens?;
        Some(Meter { tenant: tenant.clone(), rate, shared: Arc::clone(&self.shared) })
    }

    /// Takes no calls of a tenant from now on; `None` if it is closed already.
    pub(super) fn close(&self, tenant: &TenantId) -> Option<Closed> {
        let mut all = self.shared.all.lock();
        let state = all.entry(tenant.clone()).or_default();
        let was = std::mem::replace(&mut state.closed, true);
        (!was).then(|| Closed { tenant: tenant.clone(), shared: Arc::clone(&self.shared) })
    }

    /// Whether a tenant takes calls.
    ///
    /// # Errors
    /// [`ServeError::TenantDeleting`].
    pub(super) fn check_open(&self, tenant: &TenantId) -> Result<(), ServeError> {
        match self.shared.all.lock().get(tenant) {
            Some(state) if state.closed => Err(ServeError::deleting()),
            _ => Ok(()),
        }
    }

    /// Counts one more call of a tenant.
    ///
    /// # Errors
    /// [`ServeError::TenantLimit`], [`ServeError::TenantDeleting`].
    pub(super) fn enter(&self, tenant: &TenantId) -> Result<Entered, ServeError> {
        self.enter_at(tenant, self.shared.start.elapsed())
    }

    /// As [`Self::enter`], at a time since the start.
    fn enter_at(&self, tenant: &TenantId, now: Duration) -> Result<Entered, ServeError> {
        let quota = self.limits.quotas.of(tenant);
        let mut all = self.shared.all.lock();
        if !all.contains_key(tenant) && all.len() >= MAX_IDLE {
            make_room(&mut all, now);
        }
        let state = all.entry(tenant.clone()).or_default();
        if state.closed {
            return Err(ServeError::deleting());
        }
        if let Some(most) = quota.max_concurrent.filter(|most| state.calls >= *most) {
            return Err(refused("tenant_concurrency", TenantLimit::Concurrency(most), BUSY_RETRY));
        }
        if let Some(Rate { per_second, burst }) = quota.tokens {
            // one of the burst at least must be there, or all that was owed be paid
            let earliest = state.tokens.saturating_sub(time_of(per_second, f64::from(burst) - 1.0));
            if earliest > now {
                return Err(refused("tenant_tokens", TenantLimit::Tokens(per_second, burst), earliest - now));
            }
        }
        if let Some(Rate { per_second, burst }) = quota.rate {
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
        Ok(Entered { tenant: tenant.clone(), shared: Arc::clone(&self.shared) })
    }
}

/// Counts a refusal.
fn refused(reason: &'static str, limit: TenantLimit, retry: Duration) -> ServeError {
    counter!(names::REFUSALS, "reason" => reason).increment(1);
    ServeError::TenantLimit { limit, retry: Some(retry) }
}

/// Forgets tenants without calls: those with full buckets, and if these are few, the half that will have them soonest.
fn make_room(all: &mut HashMap<TenantId, State>, now: Duration) {
    all.retain(|_, state| !state.is_idle() || state.until() > now);
    let mut idle: Vec<Duration> = all.values().filter(|state| state.is_idle()).map(State::until).collect();
    if idle.len() < MAX_IDLE / 2 {
        return;
    }
    let half = idle.len() / 2;
    let (_, middle, _) = idle.select_nth_unstable(half);
    let middle = *middle;
    all.retain(|_, state| !state.is_idle() || state.until() > middle);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::params::Quota;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).unwrap()
    }

    fn tenants(max_concurrent: Option<usize>, rate: Option<(f64, u32)>) -> Tenants {
        let rate = rate.map(|(per_second, burst)| Rate { per_second, burst });
        of(Quota { max_concurrent, rate, ..Quota::default() })
    }

    fn of(quota: Quota) -> Tenants {
        Tenants::new(TenantLimits { quotas: Quotas::new(quota), ..TenantLimits::default() })
    }

    fn retry(refused: Result<Entered, ServeError>) -> (&'static str, Duration) {
        match refused {
            Err(e @ ServeError::TenantLimit { retry: Some(retry), .. }) => (e.reason(), retry),
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
        assert!(all.shared.all.lock().is_empty(), "nothing is remembered of who has no calls");
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
            assert!(all.shared.all.lock().len() <= MAX_IDLE + 1);
        }
        assert_eq!(retry(all.enter_at(&tenant("held"), Duration::from_secs(1))).0, "TENANT_CONCURRENCY");
        let last = tenant(&format!("t{}", 3 * MAX_IDLE - 1));
        assert_eq!(retry(all.enter_at(&last, Duration::from_secs(1))).0, "TENANT_RATE", "the newest are kept");
        drop(held);
    }

    #[test]
    fn without_limits_nothing_is_remembered_of_calls_that_ended_and_weights_are_one_unless_named() {
        let weights = HashMap::from([(tenant("gold"), 5)]);
        let all = Tenants::new(TenantLimits { weights, ..TenantLimits::default() });
        let calls: Vec<Entered> = (0..100).map(|_| all.enter(&tenant("a")).unwrap()).collect();
        assert_eq!(all.in_use(&tenant("a")), InUse { calls: 100, ..InUse::default() });
        drop(calls);
        assert!(all.shared.all.lock().is_empty() && all.meter(&tenant("a")).is_none());
        assert_eq!([all.weight(&tenant("gold")), all.weight(&tenant("a"))], [5, 1]);
    }

    #[test]
    fn tokens_are_taken_when_they_come_and_a_debt_is_paid_before_the_next_call() {
        let all = of(Quota { tokens: Some(Rate { per_second: 10.0, burst: 20 }), ..Quota::default() });
        let (a, b) = (tenant("a"), tenant("b"));
        let at = |seconds: f64| all.enter_at(&a, Duration::from_secs_f64(seconds));
        let meter = all.meter(&a).unwrap();
        let take = |tokens, seconds: f64| meter.take_at(tokens, Duration::from_secs_f64(seconds));
        assert!(at(1.0).is_ok(), "a call may ask for any number");
        take(19, 1.0);
        assert!(at(1.0).is_ok(), "one of twenty is left");
        // 50 in all: 30 over the burst, and one must be there again
        take(31, 1.0);
        let (reason, wait) = retry(at(1.0));
        assert_eq!(reason, "TENANT_TOKENS");
        assert!((wait.as_secs_f64() - 3.1).abs() < 1e-6, "{wait:?}");
        assert!(at(1.0 + 3.0).is_err() && at(1.0 + 3.11).is_ok());
        assert!(all.enter_at(&b, Duration::from_secs(1)).is_ok(), "it is nobody else's debt");
        // after a long rest the burst is there again, and no more
        take(20, 1000.0);
        assert!(at(1000.0).is_err() && at(1000.11).is_ok());
        take(0, 1000.0);
        assert!(at(1000.11).is_ok(), "nothing costs nothing");
        take(u64::MAX, 1001.0);
        assert!(at(2000.0).is_err(), "a debt that nobody pays does not overflow");
    }

    #[tokio::test]
    async fn a_closed_tenant_takes_no_calls_and_is_waited_for() {
        let all = Arc::new(tenants(None, None));
        let (a, b) = (tenant("a"), tenant("b"));
        let call = all.enter(&a).unwrap();
        let closed = all.close(&a).unwrap();
        assert!(all.close(&a).is_none(), "once at a time");
        assert!(matches!(all.enter(&a), Err(ServeError::TenantDeleting(_))));
        assert!(all.check_open(&a).is_err() && all.check_open(&b).is_ok() && all.enter(&b).is_ok());
        assert!(!closed.left(Duration::from_millis(20)).await);
        let waits = tokio::spawn(async move { (closed.left(Duration::from_secs(60)).await, closed) });
        tokio::task::yield_now().await;
        drop(call);
        let (left, closed) = waits.await.unwrap();
        assert!(left && all.check_open(&a).is_err());
        drop(closed);
        assert!(all.enter(&a).is_ok());
        assert!(all.shared.all.lock().is_empty(), "nothing is remembered of it");
    }
}
