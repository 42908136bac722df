//! Page bookkeeping of the key-value cache: which pages are free and which sequence holds which. No tensors.

use std::sync::Arc;

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

    /// Cache slots of positions `0..positions`, which must be covered; uncovered ones are left out.
    pub fn slots(&self, positions: usize) -> Arc<[u32]> {
        debug_assert!(positions <= self.pages.len() * PAGE_SIZE);
        let size = PAGE_SIZE as u32;
        self.pages.iter().flat_map(|p| p * size..(p + 1) * size).take(positions).collect()
    }
}

/// All pages of a cache.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    taken: Vec<bool>,
}

impl PagePool {
    /// A pool of `total` free pages.
    pub fn new(total: usize) -> Self {
        // taken from the end, so low pages go first
        Self { free: (0..total as u32).rev().collect(), taken: vec![false; total] }
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.taken.len()
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that sequences hold.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// Makes a table cover `positions`; takes all pages that this needs, or none and returns `false`.
    #[must_use]
    pub fn cover(&mut self, table: &mut PageTable, positions: usize) -> bool {
        let missing = pages_for(positions).saturating_sub(table.len());
        if missing > self.free.len() {
            return false;
        }
        for page in self.free.split_off(self.free.len() - missing).into_iter().rev() {
            self.taken[page as usize] = true;
            table.pages.push(page);
        }
        true
    }

    /// Takes all pages of a table back.
    pub fn release(&mut self, table: &mut PageTable) {
        for page in table.pages.drain(..) {
            debug_assert!(self.taken[page as usize], "page {page} is released twice");
            self.taken[page as usize] = false;
            self.free.push(page);
        }
    }

    /// Free and held pages are all pages, and none is counted twice.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check<'a>(&self, tables: impl IntoIterator<Item = &'a PageTable>) -> Result<(), String> {
        let mut seen = vec![false; self.total()];
        let held = tables.into_iter().flat_map(|t| t.pages.iter().map(|p| (*p, true)));
        for (page, held) in held.chain(self.free.iter().map(|p| (*p, false))) {
            match seen.get_mut(page as usize) {
                None => return Err(format!("page {page} of {} does not exist", self.total())),
                Some(seen) if *seen => return Err(format!("page {page} is counted twice")),
                Some(seen) => *seen = true,
            }
            if self.taken[page as usize] != held {
                return Err(format!("page {page} is marked {}taken", if held { "not " } else { "" }));
            }
        }
        match seen.iter().filter(|s| !**s).count() {
            0 => Ok(()),
            lost => Err(format!("{lost} of {} pages are lost", self.total())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn free_and_held_pages_are_all_pages(
            total in 0usize..12,
            moves in proptest::collection::vec((0usize..4, 0usize..100, any::<bool>()), 0..60),
        ) {
            let mut pool = PagePool::new(total);
            let mut tables: Vec<PageTable> = (0..4).map(|_| PageTable::default()).collect();
            for (who, positions, release) in moves {
                let before = (pool.free(), tables[who].len());
                if release {
                    pool.release(&mut tables[who]);
                    prop_assert_eq!(pool.free(), before.0 + before.1);
                } else if pool.cover(&mut tables[who], positions) {
                    prop_assert_eq!(tables[who].len(), before.1.max(pages_for(positions)));
                } else {
                    prop_assert_eq!((pool.free(), tables[who].len()), before);
                    prop_assert!(pages_for(positions) - before.1 > before.0);
                }
                prop_assert_eq!(pool.free() + pool.used(), total);
                prop_assert_eq!(pool.check(&tables), Ok(()));
            }
        }
    }

    #[test]
    fn slots_follow_the_pages_in_order() {
        let mut pool = PagePool::new(4);
        let (mut a, mut b) = (PageTable::default(), PageTable::default());
        assert!(pool.cover(&mut a, 1) && pool.cover(&mut b, 16) && pool.cover(&mut a, 17));
        let slots: Vec<u32> = a.slots(18).to_vec();
        assert_eq!(slots[..16], (0..16).collect::<Vec<_>>()[..]);
        assert_eq!(slots[16..], [32, 33]);
    }

    #[test]
    fn check_finds_lost_and_doubled_pages() {
        let mut pool = PagePool::new(3);
        let mut table = PageTable::default();
        assert!(pool.cover(&mut table, 20));
        assert_eq!(pool.check([]), Err("2 of 3 pages are lost".into()));
        assert!(pool.check([&table, &table]).is_err_and(|e| e.ends_with("counted twice")));
        table.pages.push(9);
        assert!(pool.check([&table]).is_err_and(|e| e.ends_with("does not exist")));
    }
}
