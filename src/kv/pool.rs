//! Page bookkeeping of the key-value cache: which pages are free, who holds which, and which can be found again. No
//! tensors.
//!
//! A page is in one of three states. **Held**: tables name it, one or several. **Cached**: nobody holds it, but it has a
//! name ([`PageKey`]) by which whoever needs what it holds finds it. **Free**: neither. Who takes a page gets a free one,
//! or else the cached one that was let go of longest ago: what is cached is never in anybody's way.
//!
//! A page gets a name only when it is whole, and from then on nobody writes to it: that is its holders' part of the
//! bargain, and what makes it safe to share.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{PageKey, PageOwner};

/// Positions in a page.
pub const PAGE_SIZE: usize = 16;

/// Pages that hold `positions`.
pub fn pages_for(positions: usize) -> usize {
    positions.div_ceil(PAGE_SIZE)
}

/// The pages of one sequence, in order of position. It comes from a [`PagePool`] and must go back to it.
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<u32>,
}

impl PageTable {
    /// Number of pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The page that holds positions from `at * PAGE_SIZE` on.
    pub fn page(&self, at: usize) -> Option<u32> {
        self.pages.get(at).copied()
    }

    /// Its pages, in order of position.
    pub fn pages(&self) -> impl Iterator<Item = u32> {
        self.pages.iter().copied()
    }

    /// Cache slots of positions `0..positions`, which must be covered; uncovered ones are left out.
    pub fn slots(&self, positions: usize) -> Arc<[u32]> {
        self.each_slot(positions).collect()
    }

    /// As [`Self::slots`], one by one.
    pub fn each_slot(&self, positions: usize) -> impl Iterator<Item = u32> {
        debug_assert!(positions <= self.pages.len() * PAGE_SIZE);
        let size = PAGE_SIZE as u32;
        self.pages.iter().flat_map(move |p| p * size..(p + 1) * size).take(positions)
    }
}

/// What is there of a run of pages, from the first on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Pages that are there.
    pub pages: usize,
    /// How many of them are held: taking those takes nothing from anybody.
    pub held: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Page {
    holders: u32,
    key: Option<PageKey>,
    /// Of what it holds, taken when it got its name.
    checksum: Option<u64>,
    /// When the last holder let go of it; its place in `cached`.
    since: u64,
}

/// All pages of a cache.
#[derive(Debug)]
pub struct PagePool {
    pages: Vec<Page>,
    free: Vec<u32>,
    named: HashMap<PageKey, u32>,
    /// Named pages that nobody holds, longest let go of first.
    cached: BTreeMap<u64, u32>,
    clock: u64,
    evictions: u64,
    /// The page after the last one that [`Self::sealed`] told of.
    audited: usize,
}

impl PagePool {
    /// A pool of `total` free pages.
    pub fn new(total: usize) -> Self {
        let mut pool = Self {
            pages: vec![Page::default(); total],
            free: vec![],
            named: HashMap::new(),
            cached: BTreeMap::new(),
            clock: 0,
            evictions: 0,
            audited: 0,
        };
        pool.reset();
        pool
    }

    /// Frees everything, whoever holds it: all tables must be forgotten.
    pub fn reset(&mut self) {
        self.pages.fill(Page::default());
        // taken from the end, so low pages go first
        self.free = (0..self.pages.len() as u32).rev().collect();
        self.named.clear();
        self.cached.clear();
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.pages.len()
    }

    /// Pages that nobody holds and nobody can find.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that nobody holds, but that can be found.
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// Pages that can be had: free and cached ones.
    pub fn available(&self) -> usize {
        self.free() + self.cached()
    }

    /// Pages that are held.
    pub fn used(&self) -> usize {
        self.total().saturating_sub(self.available())
    }

    /// Cached pages that had to make room, ever.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Whether a page is free to be written by its only holder: one table names it, and nobody else can find it.
    pub fn is_private(&self, page: u32) -> bool {
        self.pages.get(page as usize).is_some_and(|p| p.holders == 1 && p.key.is_none())
    }

    /// Makes a table cover `positions`; takes all pages that this needs, or none and returns `false`. Their contents are
    /// nobody's.
    #[must_use]
    pub fn cover(&mut self, table: &mut PageTable, positions: usize) -> bool {
        let missing = pages_for(positions).saturating_sub(table.len());
        if missing > self.available() {
            return false;
        }
        for _ in 0..missing {
            let Some(page) = self.one() else { return false };
            table.pages.push(page);
        }
        true
    }

    /// A page for one holder, at the cost of the cached one that was let go of longest ago if none is free.
    fn one(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let page = *self.cached.first_key_value()?.1;
                self.forget(page);
                self.evictions += 1;
                self.free.pop()?
            }
        };
        self.pages.get_mut(page as usize)?.holders = 1;
        Some(page)
    }

    /// How many of these pages are there, from the first to the first that is missing.
    pub fn find(&self, keys: &[PageKey]) -> Found {
        let mut found = Found::default();
        for page in self.run(keys) {
            found.pages += 1;
            found.held += usize::from(self.pages.get(page as usize).is_some_and(|p| p.holders > 0));
        }
        found
    }

    fn run(&self, keys: &[PageKey]) -> impl Iterator<Item = u32> {
        keys.iter().map_while(|key| self.named.get(key).copied())
    }

    /// Appends those of these pages that are there, from the first to the first that is missing, to a table; how many.
    pub fn take(&mut self, table: &mut PageTable, keys: &[PageKey]) -> usize {
        let run: Vec<u32> = self.run(keys).collect();
        run.iter().for_each(|page| self.hold(*page, table));
        run.len()
    }

    /// A table that begins with the first pages of another: both hold them.
    pub fn fork(&mut self, from: &PageTable, pages: usize) -> PageTable {
        let mut table = PageTable::default();
        from.pages.iter().take(pages).for_each(|page| self.hold(*page, &mut table));
        table
    }

    fn hold(&mut self, page: u32, table: &mut PageTable) {
        let Some(p) = self.pages.get_mut(page as usize) else { return };
        if p.holders == 0 {
            self.cached.remove(&p.since);
        }
        p.holders += 1;
        table.pages.push(page);
    }

    /// Takes all pages of a table back. What has a name stays to be found. The last page goes first, so that of a chain
    /// the end makes room before what it goes on from.
    pub fn release(&mut self, table: &mut PageTable) {
        self.shrink(table, 0);
    }

    /// Takes the pages of a table back that only lie behind so many positions, as [`Self::release`] does.
    pub fn shrink(&mut self, table: &mut PageTable, positions: usize) {
        while table.len() > pages_for(positions) {
            let Some(page) = table.pages.pop() else { return };
            let Some(p) = self.pages.get_mut(page as usize).filter(|p| p.holders > 0) else {
                debug_assert!(false, "page {page} is released twice");
                continue;
            };
            p.holders -= 1;
            if p.holders > 0 {
                continue;
            }
            if p.key.is_some() {
                self.clock += 1;
                p.since = self.clock;
                self.cached.insert(self.clock, page);
            } else {
                self.free.push(page);
            }
        }
    }

    /// Gives a page that is held and whole its name: from now on others find it and nobody writes to it. `false` where it
    /// has a name, or another page has this one.
    pub fn publish(&mut self, page: u32, key: PageKey) -> bool {
        if self.named.contains_key(&key) {
            return false;
        }
        let Some(p) = self.pages.get_mut(page as usize).filter(|p| p.holders > 0 && p.key.is_none()) else {
            return false;
        };
        p.key = Some(key);
        self.named.insert(key, page);
        true
    }

    /// Remembers a checksum of what a named page holds.
    pub fn seal(&mut self, page: u32, checksum: u64) {
        if let Some(p) = self.pages.get_mut(page as usize).filter(|p| p.key.is_some()) {
            p.checksum = Some(checksum);
        }
    }

    /// The next `n` pages with a checksum, in turns.
    pub fn sealed(&mut self, n: usize) -> Vec<(u32, u64)> {
        let total = self.pages.len();
        let mut out = Vec::with_capacity(n.min(total));
        for _ in 0..total {
            if out.len() == n {
                break;
            }
            let at = self.audited % total;
            self.audited = at + 1;
            out.extend(self.pages[at].checksum.map(|checksum| (at as u32, checksum)));
        }
        out
    }

    /// Takes a page's name: whoever holds it keeps it, nobody finds it any more.
    pub fn forget(&mut self, page: u32) {
        let Some(p) = self.pages.get_mut(page as usize) else { return };
        let Some(key) = p.key.take() else { return };
        p.checksum = None;
        self.named.remove(&key);
        if p.holders == 0 && self.cached.remove(&p.since).is_some() {
            self.free.push(page);
        }
    }

    /// Takes the names of all pages of an owner, as [`Self::forget`] does; how many.
    pub fn forget_owner(&mut self, owner: PageOwner) -> usize {
        let own = self.named.iter().filter(|(key, _)| key.owner() == owner);
        let pages: Vec<u32> = own.map(|(_, page)| *page).collect();
        pages.iter().for_each(|page| self.forget(*page));
        pages.len()
    }

    /// Every page is free, cached or held by as many as these tables say, and every name leads to the page that has it.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check<'a>(&self, tables: impl IntoIterator<Item = &'a PageTable>) -> Result<(), String> {
        let total = self.total();
        let mut holders = vec![0; total];
        let mut last = vec![0; total]; // the number of the last table that named it, from 1 on
        for (n, table) in tables.into_iter().enumerate() {
            for &page in &table.pages {
                let at = page as usize;
                if at >= total {
                    return Err(format!("page {page} of {total} does not exist"));
                }
                if last[at] == n + 1 {
                    return Err(format!("page {page} is twice in a table"));
                }
                last[at] = n + 1;
                holders[at] += 1;
            }
        }
        for (page, (p, tables)) in self.pages.iter().zip(&holders).enumerate() {
            if p.holders != *tables {
                return Err(format!("page {page} has {} holders and is in {tables} tables", p.holders));
            }
        }
        self.check_idle()?;
        for (key, &page) in &self.named {
            if self.pages.get(page as usize).is_none_or(|p| p.key != Some(*key)) {
                return Err(format!("{key:?} leads to page {page}, which has another name"));
            }
        }
        match self.pages.iter().filter(|p| p.key.is_some()).count() {
            n if n != self.named.len() => Err(format!("{n} pages have names, {} can be found", self.named.len())),
            _ => Ok(()),
        }
    }

    /// The pages that nobody holds are all free or cached, once.
    fn check_idle(&self) -> Result<(), String> {
        let mut seen = vec![false; self.total()];
        let free = self.free.iter().map(|page| (*page, None));
        let cached = self.cached.iter().map(|(since, page)| (*page, Some(*since)));
        for (page, since) in free.chain(cached) {
            let Some(p) = self.pages.get(page as usize) else {
                return Err(format!("page {page} of {} does not exist", self.total()));
            };
            if std::mem::replace(&mut seen[page as usize], true) {
                return Err(format!("page {page} is counted twice"));
            }
            if p.holders > 0 {
                return Err(format!("page {page} is held and can be had"));
            }
            if p.key.is_some() != since.is_some() || since.is_some_and(|since| since != p.since) {
                return Err(format!("page {page} is not where its name says"));
            }
        }
        match self.pages.iter().zip(&seen).filter(|(p, seen)| p.holders == 0 && !**seen).count() {
            0 => Ok(()),
            lost => Err(format!("{lost} of {} pages are lost", self.total())),
        }
    }
}

#[cfg(test)]
mod tests;
