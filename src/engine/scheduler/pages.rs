//! The scheduler's pages: what a sequence needs, takes, shares and gives back.
//!
//! A sequence has the pages of what its delta puts ahead of all rows (a prefix), those of its own rows, branch by branch,
//! and those of its source. The first are the same for all sequences of a delta and are filled once; of the second,
//! whole pages of the same beginning are the same. Both are found by their names. A share only writes to positions behind
//! those that were computed, and a page gets its name when all of its positions were: so a page that anybody else can
//! read is never written.

use std::sync::Arc;

use super::{Entry, Scheduler, SeqId, Share, StepPlan};
use crate::kv::{PAGE_SIZE, PageKey, PageOwner, PagePool, PageTable, pages_for};

impl Entry {
    /// Names of the pages that it may begin behind: its last known position is always computed, since its numbers are
    /// what is asked for.
    pub(super) fn wanted(&self) -> &[PageKey] {
        let most = self.total.saturating_sub(1) / PAGE_SIZE;
        self.names.rows.get(..most).unwrap_or(&self.names.rows)
    }
}

impl Scheduler {
    /// Pages that a waiting sequence takes from the pool to begin: what others hold already costs nothing.
    pub(super) fn need(&self, e: &Entry) -> usize {
        if self.limits.pages.is_none() {
            return 0;
        }
        let own = if e.starts_over { e.width * pages_for(e.most) } else { pages_for(e.total) };
        let held = self.pool.find(e.wanted()).held;
        own.saturating_sub(held) + missing_ahead(&self.pool, e) + pages_for(e.memory_slots())
    }

    /// Positions of a waiting sequence that it begins behind, because they are there.
    pub(super) fn there(&self, e: &Entry) -> usize {
        if self.limits.pages.is_some() { self.pool.find(e.wanted()).pages * PAGE_SIZE } else { 0 }
    }

    /// Cache slots of a running sequence's branch: the reserved ones, then those of its first positions; empty for a base
    /// without a cache.
    pub(in crate::engine) fn slots(&self, id: SeqId, branch: usize, positions: usize) -> Arc<[u32]> {
        match self.running.get(&id).and_then(|e| e.branches.get(branch).map(|pages| (e, pages))) {
            Some((entry, pages)) if self.limits.pages.is_some() => {
                entry.prefix.each_slot(entry.reserved).chain(pages.each_slot(positions)).collect()
            }
            _ => [].into(),
        }
    }

    /// Cache slots of a running sequence's source: the reserved ones, then those of its positions.
    pub(in crate::engine) fn memory_slots(&self, id: SeqId) -> Arc<[u32]> {
        self.running.get(&id).map_or_else(|| [].into(), |entry| entry.memory.slots(entry.memory_slots()))
    }

    /// How many of a sequence's slots, from the first, all of its branches have in common: nobody writes to these once
    /// there are several.
    pub(in crate::engine) fn common(&self, id: SeqId) -> usize {
        self.running.get(&id).map_or(0, |e| e.reserved + e.given / PAGE_SIZE * PAGE_SIZE)
    }

    /// Takes the pages of branches that are no more.
    pub(in crate::engine) fn trim(&mut self, id: SeqId) {
        let Some(entry) = self.running.get_mut(&id) else { return };
        while entry.branches.len() > entry.open {
            entry.branches.pop().into_iter().for_each(|mut pages| self.pool.release(&mut pages));
        }
    }

    /// A share was computed: pages that are whole now get their names, and others find them. `more` are names of its
    /// sequence's next pages. Returns the pages that can be found from now on.
    pub(in crate::engine) fn publish(&mut self, share: &Share, more: Vec<PageKey>) -> Vec<u32> {
        let Some(entry) = self.running.get_mut(&share.id) else { return vec![] };
        entry.names.rows.extend(more);
        let mut out = Vec::new();
        if share.keys_due && !entry.names.ahead.is_empty() {
            // they have had their names since they were taken
            out.extend(entry.prefix.pages());
        }
        let Some(pages) = entry.branches.first() else { return out };
        let whole = ((share.context + share.len) / PAGE_SIZE).min(entry.names.rows.len());
        for (at, key) in entry.names.rows.iter().enumerate().take(whole).skip(entry.published) {
            out.extend(pages.page(at).filter(|page| self.pool.publish(*page, *key)));
        }
        entry.published = entry.published.max(whole);
        out
    }

    /// A share's step failed: nobody may find what it should have filled.
    pub(in crate::engine) fn spoil(&mut self, share: &Share) {
        let Some(entry) = self.running.get(&share.id).filter(|_| share.keys_due) else { return };
        entry.prefix.pages().for_each(|page| self.pool.forget(page));
    }

    /// Remembers a checksum of what a page that can be found holds.
    pub(in crate::engine) fn seal(&mut self, page: u32, checksum: u64) {
        self.pool.seal(page, checksum);
    }

    /// The next `n` pages with a checksum, in turns.
    pub(in crate::engine) fn sealed(&mut self, n: usize) -> Vec<(u32, u64)> {
        self.pool.sealed(n)
    }

    /// Frees all pages, cached and lost ones, too. Only while nothing runs.
    pub(in crate::engine) fn reset_pages(&mut self) {
        debug_assert!(self.running.is_empty());
        self.pool.reset();
    }

    /// Takes the names of an owner's pages: nobody finds them any more.
    pub(in crate::engine) fn forget_pages(&mut self, owner: PageOwner) {
        self.pool.forget_owner(owner);
    }

    /// Every page is free, cached or held by as many as there are, nobody who waits holds one, and what several can read
    /// lies ahead of what any of them will write.
    ///
    /// # Errors
    /// Says what is wrong.
    pub(in crate::engine) fn check(&self) -> Result<(), String> {
        if let Some((id, _)) = self.waiting.iter().find(|(_, e)| tables(e).any(|pages| !pages.is_empty())) {
            return Err(format!("sequence {id} waits and holds pages"));
        }
        for (id, e) in &self.running {
            let own = e.branches.iter().take(e.open).flat_map(|pages| pages.pages().skip(e.computed / PAGE_SIZE));
            if let Some(page) = own.chain(e.memory.pages()).find(|page| !self.pool.is_private(*page)) {
                return Err(format!("sequence {id} will write to page {page}, which is not its own alone"));
            }
        }
        self.pool.check(self.running.values().flat_map(tables))
    }

    /// Takes a page that no table names.
    #[cfg(test)]
    pub(in crate::engine) fn lose_a_page(&mut self) {
        let mut lost = PageTable::default();
        assert!(self.pool.cover(&mut lost, 1));
    }

    /// Makes a sequence's pages cover its positions, at the cost of younger sequences. `false`: it has to wait, because
    /// only older ones hold pages.
    pub(super) fn cover(&mut self, id: SeqId, plan: &mut StepPlan) -> bool {
        loop {
            let Some(entry) = self.running.get_mut(&id) else { return false };
            let total = entry.total;
            if self.limits.pages.is_none() {
                entry.branches.resize_with(entry.open.max(entry.branches.len()), PageTable::default);
                return true;
            }
            while entry.branches.len() < entry.open {
                // a new beam reads the prompt's whole pages where the first one has them
                let first = entry.branches.first();
                let pages = first.map(|first| self.pool.fork(first, entry.given / PAGE_SIZE)).unwrap_or_default();
                entry.branches.push(pages);
            }
            let mut open = entry.branches.iter_mut().take(entry.open);
            if open.all(|pages| self.pool.cover(pages, total)) {
                return true;
            }
            match self.running.iter().map(|(id, e)| (e.ticket, *id)).max() {
                Some((_, youngest)) if youngest != id => self.preempt(youngest, plan),
                _ => return false,
            }
        }
    }
}

/// All page tables of a sequence.
fn tables(e: &Entry) -> impl Iterator<Item = &PageTable> {
    e.branches.iter().chain([&e.memory, &e.prefix])
}

/// Pages that the slots ahead of a waiting sequence's positions take from the pool. All of them are there, or all are
/// filled anew.
fn missing_ahead(pool: &PagePool, e: &Entry) -> usize {
    let all = pages_for(e.reserved);
    let found = pool.find(&e.names.ahead);
    if found.pages == all { all.saturating_sub(found.held) } else { all }
}

/// Takes the pages that a sequence begins with, the first of them from what is there. `false`, and it takes none, where
/// there are too few.
pub(super) fn begin(pool: &mut PagePool, entry: &mut Entry) -> bool {
    let ahead = pages_for(entry.reserved);
    entry.keys_due = ahead > 0;
    if ahead > 0 && pool.find(&entry.names.ahead).pages == ahead {
        entry.keys_due = pool.take(&mut entry.prefix, &entry.names.ahead) != ahead;
    }
    let mut pages = entry.branches.pop().unwrap_or_default();
    let there = pool.take(&mut pages, entry.wanted());
    entry.branches.insert(0, pages);
    (entry.computed, entry.published) = (there * PAGE_SIZE, there);
    let (own, memory) = (entry.total, entry.memory_slots());
    let fits = pool.cover(&mut entry.prefix, entry.reserved)
        && pool.cover(&mut entry.memory, memory)
        && entry.branches.iter_mut().all(|pages| pool.cover(pages, own));
    if !fits {
        release(pool, entry);
    } else if entry.keys_due {
        // those who begin in the same step find them: in each layer they are filled before anybody reads them
        for (page, key) in entry.prefix.pages().zip(&entry.names.ahead) {
            pool.publish(page, *key);
        }
    }
    fits
}

/// Takes all pages of a sequence back; it begins anew.
pub(super) fn release(pool: &mut PagePool, entry: &mut Entry) {
    entry.branches.iter_mut().rev().for_each(|pages| pool.release(pages));
    entry.branches.truncate(1);
    pool.release(&mut entry.memory);
    // last, so that what all sequences of a delta need makes room last
    pool.release(&mut entry.prefix);
    (entry.computed, entry.published, entry.keys_due) = (0, 0, false);
}
