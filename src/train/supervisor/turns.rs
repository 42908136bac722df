//! Turns of tenants: whose job starts next where more wait than may run.
//!
//! Start-time fair queueing (Goyal et al. 1996) over starts of jobs: a start costs a tenant one over its weight, and who has the
//! least behind it is next. A tenant that comes anew begins where the clock is, so that having been away earns no credit, and no
//! stream of new tenants keeps those back that wait. The clock goes by one over the weights of all who wait per start.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use crate::ids::TenantId;

/// What a start costs a tenant of weight 1.
const START: u64 = 1 << 20;

/// Who has started how much.
#[derive(Debug)]
pub(super) struct Turns {
    /// Of those that have another weight than 1.
    weights: Arc<HashMap<TenantId, u32>>,
    clock: u64,
    /// Of tenants that wait or are ahead of the clock.
    behind: HashMap<TenantId, u64>,
}

impl Turns {
    pub(super) fn new(weights: Arc<HashMap<TenantId, u32>>) -> Self {
        Self { weights, clock: 0, behind: HashMap::new() }
    }

    fn weight(&self, tenant: &TenantId) -> u64 {
        u64::from(self.weights.get(tenant).copied().unwrap_or(1).max(1))
    }

    /// The first of a tenant's jobs waits.
    pub(super) fn arrives(&mut self, tenant: &TenantId) {
        let behind = self.behind.entry(tenant.clone()).or_default();
        *behind = self.clock.max(*behind);
    }

    /// The place of a tenant with so many jobs that run: the least is next. Of its share of what runs first, then of its turn.
    pub(super) fn place(&self, tenant: &TenantId, running: usize) -> (u64, u64) {
        let share = (running as u64).saturating_mul(START) / self.weight(tenant);
        (share, self.behind.get(tenant).copied().unwrap_or(self.clock))
    }

    /// A job of this tenant starts; these have jobs that wait still.
    pub(super) fn starts<'a>(&mut self, tenant: &TenantId, waiting: impl Iterator<Item = &'a TenantId>) {
        let waiting: HashSet<&TenantId> = waiting.collect();
        let others = waiting.iter().filter(|other| **other != tenant).map(|other| self.weight(other)).sum::<u64>();
        let own = self.weight(tenant);
        *self.behind.entry(tenant.clone()).or_insert(self.clock) += START / own;
        self.clock += START / (own + others);
        let clock = self.clock;
        self.behind.retain(|tenant, behind| *behind > clock || waiting.contains(tenant));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).unwrap()
    }

    /// A queue before one place: whose jobs start, in their order.
    struct Queue(Turns, VecDeque<TenantId>);

    impl Queue {
        fn of(weights: &[(&str, u32)]) -> Self {
            let weights = weights.iter().map(|(name, weight)| (tenant(name), *weight)).collect();
            Self(Turns::new(Arc::new(weights)), VecDeque::new())
        }

        fn put(&mut self, name: &str, jobs: usize) {
            for _ in 0..jobs {
                if !self.1.contains(&tenant(name)) {
                    self.0.arrives(&tenant(name));
                }
                self.1.push_back(tenant(name));
            }
        }

        fn start(&mut self) -> String {
            let place = |(i, tenant): (usize, &TenantId)| (self.0.place(tenant, 0), i);
            let at = self.1.iter().enumerate().map(place).min().expect("one waits").1;
            let next = self.1.remove(at).expect("it is there");
            self.0.starts(&next, self.1.iter());
            next.to_string()
        }

        fn starts(&mut self, n: usize) -> String {
            (0..n).map(|_| self.start()).collect()
        }
    }

    #[test]
    fn one_tenants_many_jobs_keep_nobody_waiting() {
        let mut queue = Queue::of(&[]);
        queue.put("a", 10);
        assert_eq!(queue.starts(3), "aaa");
        queue.put("b", 2);
        queue.put("c", 1);
        // who comes is level with who has had all of the past to itself
        assert_eq!(queue.starts(10), "abcabaaaaa".to_owned());
        assert!(queue.0.behind.len() <= 1, "who is gone is forgotten: {:?}", queue.0);
    }

    #[test]
    fn weights_are_shares() {
        let mut queue = Queue::of(&[("a", 3)]);
        queue.put("b", 20);
        queue.put("a", 20);
        let starts = queue.starts(12);
        assert_eq!(starts.matches('a').count(), 9, "{starts}");
        // and of places
        assert!(queue.0.place(&tenant("a"), 2) < queue.0.place(&tenant("b"), 1));
        assert!(queue.0.place(&tenant("a"), 4) > queue.0.place(&tenant("b"), 1));
    }

    #[test]
    fn no_stream_of_new_tenants_keeps_one_waiting() {
        let mut queue = Queue::of(&[]);
        queue.put("a", 30);
        let mut had = 0;
        for i in 0..40 {
            queue.put(&format!("n{i}"), 1);
            had += usize::from(queue.start() == "a");
        }
        // each new one waits for as long as it does, so that more and more share
        assert!(had >= 6, "{had}");
        assert!(queue.0.behind.len() <= 41);
    }

    #[test]
    fn having_been_away_earns_no_credit() {
        let mut queue = Queue::of(&[]);
        queue.put("a", 1);
        queue.put("b", 50);
        queue.starts(31);
        queue.put("a", 10);
        let starts = queue.starts(10);
        assert!((4..=6).contains(&starts.matches('a').count()), "{starts}");
    }
}
