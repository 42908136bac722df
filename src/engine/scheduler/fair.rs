//! Whose turn it is: a counter of service per tenant, and the order in which waiting sequences come.
//!
//! Virtual token counters, as S-LoRA has them: what is served to a tenant, input tokens once and generated ones
//! [`OUTPUT`] times, over its weight, is added to its counter, and the tenant with the smallest one comes next. Within a
//! tenant the higher priority comes first, then the earlier arrival.
//!
//! Who begins to wait again has no credit from the time when it asked for nothing: its counter is lifted. Where nobody
//! waits, all have what they asked for, and it is lifted to the largest counter there is. Else it is lifted to the virtual
//! time, the counter of a tenant that always had an even share, within the counters of those that wait. S-LoRA lifts to
//! their least one; then a stream of ever new tenants, each of which comes in at the least, could keep back for ever a
//! tenant whose counter is ahead of it. Virtual time passes them.
//!
//! Counters of tenants that went away are dropped as soon as they say nothing more, and there are never more than
//! [`MAX_IDLE`] of them. Everything is integers, and nothing depends on the order of a hash map.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, btree_set::Iter},
};

use super::SeqId;
use crate::ids::TenantId;

/// Generated tokens count so many times.
pub(super) const OUTPUT: u64 = 2;
/// Counts per token of a tenant of weight 1, so that weights divide finely.
const SCALE: u64 = 1 << 20;
/// Most counters of tenants that have nothing here.
const MAX_IDLE: usize = 1024;

/// Who is charged; requests without a tenant are one.
pub(super) type Payer = Option<TenantId>;

#[derive(Debug)]
struct Account {
    counter: u64,
    weight: u64,
    /// Those that wait to begin, in the order in which they will.
    waiting: BTreeSet<(Reverse<i32>, SeqId)>,
    /// Those that have begun.
    begun: usize,
}

impl Account {
    fn is_active(&self) -> bool {
        self.begun > 0 || !self.waiting.is_empty()
    }
}

/// What `tokens` come to for a weight.
fn scaled(tokens: u64, weight: u64) -> u64 {
    tokens.saturating_mul(SCALE) / weight.max(1)
}

/// The counters of all tenants.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    all: BTreeMap<Payer, Account>,
    /// Virtual time.
    clock: u64,
    /// Sum of the weights of those that wait or have begun.
    weights: u64,
    /// Sequences that wait.
    waiting: usize,
    /// Accounts that have none here.
    idle: usize,
}

impl Accounts {
    /// Whether nothing is remembered.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty() && (self.weights, self.waiting, self.idle) == (0, 0, 0)
    }

    /// Tokens that a tenant was charged, over its weight, from where its counter began.
    #[cfg(test)]
    pub(super) fn counter(&self, payer: &Payer) -> Option<f64> {
        self.all.get(payer).map(|a| a.counter as f64 / SCALE as f64)
    }

    /// How many tenants are remembered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Tenants with sequences that wait to begin.
    pub(super) fn waiting_tenants(&self) -> usize {
        self.all.values().filter(|a| !a.waiting.is_empty()).count()
    }

    /// A sequence begins to wait.
    pub(super) fn join(&mut self, payer: &Payer, weight: u32, (priority, id): (i32, SeqId)) {
        let others = self.waiting > 0;
        let lift = if others { self.base() } else { self.all.values().map(|a| a.counter).max().unwrap_or(0) };
        let known = self.all.get(payer).map(Account::is_active);
        self.idle -= usize::from(known == Some(false));
        let blank = Account { counter: 0, weight: 1, waiting: BTreeSet::new(), begun: 0 };
        let account = self.all.entry(payer.clone()).or_insert(blank);
        if known != Some(true) {
            account.weight = u64::from(weight.max(1));
            self.weights += account.weight;
        }
        if account.waiting.is_empty() {
            account.counter = account.counter.max(lift);
        }
        if !others {
            self.clock = account.counter;
        }
        self.waiting += usize::from(account.waiting.insert((Reverse(priority), id)));
        if self.idle > MAX_IDLE {
            self.drop_idle();
        }
    }

    /// Where a newcomer's counter begins, while others wait.
    fn base(&self) -> u64 {
        let mut counters = self.all.values().filter(|a| !a.waiting.is_empty()).map(|a| a.counter);
        let Some(first) = counters.next() else { return self.clock };
        let (least, most) = counters.fold((first, first), |(least, most), c| (least.min(c), most.max(c)));
        self.clock.clamp(least, most)
    }

    /// A sequence that waits begins.
    pub(super) fn begin(&mut self, payer: &Payer, at: (i32, SeqId)) {
        if let Some(account) = self.all.get_mut(payer) {
            account.begun += 1;
        }
        self.unwait(payer, at);
        self.forget();
    }

    /// A sequence that waits goes away.
    pub(super) fn give_up(&mut self, payer: &Payer, at: (i32, SeqId)) {
        self.unwait(payer, at);
        self.leave(payer);
        self.forget();
    }

    /// A sequence that has begun goes away.
    pub(super) fn end(&mut self, payer: &Payer) {
        if let Some(account) = self.all.get_mut(payer) {
            account.begun = account.begun.saturating_sub(1);
        }
        self.leave(payer);
    }

    fn unwait(&mut self, payer: &Payer, (priority, id): (i32, SeqId)) {
        if let Some(account) = self.all.get_mut(payer) {
            self.waiting -= usize::from(account.waiting.remove(&(Reverse(priority), id)));
        }
    }

    /// Drops an account that has nothing here any more, unless its counter is ahead of where it would begin anew.
    fn leave(&mut self, payer: &Payer) {
        let Some(account) = self.all.get(payer).filter(|a| !a.is_active()) else { return };
        self.weights = self.weights.saturating_sub(account.weight);
        if self.waiting > 0 && account.counter > self.base() {
            self.idle += 1;
        } else {
            self.all.remove(payer);
        }
    }

    /// Where nobody waits, idle accounts say nothing: whoever comes next is lifted over all that are here.
    fn forget(&mut self) {
        if self.waiting == 0 && self.idle > 0 {
            self.all.retain(|_, a| a.is_active());
            self.idle = 0;
        }
    }

    /// Drops the half of the idle accounts that are ahead the least.
    fn drop_idle(&mut self) {
        let mut idle: Vec<(u64, Payer)> =
            self.all.iter().filter(|(_, a)| !a.is_active()).map(|(payer, a)| (a.counter, payer.clone())).collect();
        idle.sort_unstable();
        for (_, payer) in idle.into_iter().take(MAX_IDLE / 2) {
            self.all.remove(&payer);
            self.idle -= 1;
        }
    }

    /// So many tokens were served to a tenant; generated ones count [`OUTPUT`] times.
    pub(super) fn charge(&mut self, payer: &Payer, tokens: u64) {
        if let Some(account) = self.all.get_mut(payer) {
            account.counter = account.counter.saturating_add(scaled(tokens, account.weight));
            self.clock = self.clock.saturating_add(scaled(tokens, self.weights));
        }
    }

    /// The first `most` of those that wait and that `may` begin, in the order in which they do if each is charged `cost` when it
    /// does. `may` is asked in this order, of each once; who may not is charged nothing, and those behind it move up.
    pub(super) fn line(
        &self,
        most: usize,
        mut may: impl FnMut(SeqId) -> bool,
        cost: impl Fn(SeqId) -> u64,
    ) -> Vec<SeqId> {
        let mut lines: Vec<_> = self.all.values().map(|a| (a.weight, a.begun, a.counter, a.waiting.iter())).collect();
        // of equal counters, that of the tenant with fewer under way: a flood gives way to a single one
        let head = |(at, (_, begun, counter, line)): (usize, &mut (u64, usize, u64, Iter<'_, _>))| {
            line.next().map(|(_, id): &(Reverse<i32>, SeqId)| Reverse((*counter, *begun, *id, at)))
        };
        let mut heads: BinaryHeap<_> = lines.iter_mut().enumerate().filter_map(head).collect();
        let mut out = Vec::with_capacity(most.min(self.waiting));
        while out.len() < most {
            let Some(Reverse((_, _, id, at))) = heads.pop() else { break };
            let Some(line) = lines.get_mut(at) else { continue };
            if may(id) {
                out.push(id);
                line.1 += 1;
                line.2 = line.2.saturating_add(scaled(cost(id), line.0));
            }
            heads.extend(head((at, line)));
        }
        out
    }
}
