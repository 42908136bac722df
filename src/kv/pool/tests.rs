//! The pool's laws, on random moves: its books add up after each, and what is found under a name is what was put there.

use proptest::prelude::*;

use super::*;
use crate::{
    ids::{DeltaId, TenantId},
    kv::PageKeys,
    rows::Ahead,
};

/// Names of the pages of a text; texts share their first pages with others of the same stem.
fn names(stem: u32, text: u32, shared: usize, pages: usize) -> Vec<PageKey> {
    let tenant = TenantId::new("t").expect("a name");
    let tokens: Vec<u32> =
        (0..pages * PAGE_SIZE).map(|at| if at < shared * PAGE_SIZE { stem } else { 100 + text }).collect();
    let delta = Some(DeltaId::from_bytes([stem as u8; 32]));
    PageKeys::new(&tenant, delta, Ahead::default()).next(&tokens, tokens.len())
}

/// One move of one of some holders.
#[derive(Debug, Clone)]
enum Move {
    /// Begins a text: takes what is there, covers the rest, fills it and gives it names.
    Begin {
        stem: u32,
        shared: usize,
        pages: usize,
        named: usize,
    },
    /// Takes more pages and writes to them.
    Extend(usize),
    /// Another holder goes on from its first pages.
    Fork {
        to: usize,
        pages: usize,
    },
    Release,
    /// Names go, of a page or of all.
    Forget(u32),
    Reset,
}

fn moves() -> impl Strategy<Value = Vec<(usize, Move)>> {
    let begin = (0u32..3, 0usize..4, 0usize..6, 0usize..6).prop_map(|(stem, shared, pages, named)| Move::Begin {
        stem,
        shared,
        pages,
        named,
    });
    let one = prop_oneof![
        6 => begin,
        3 => (0usize..100).prop_map(Move::Extend),
        2 => (0usize..4, 0usize..4).prop_map(|(to, pages)| Move::Fork { to, pages }),
        4 => Just(Move::Release),
        1 => (0u32..16).prop_map(Move::Forget),
        1 => Just(Move::Reset),
    ];
    proptest::collection::vec((0usize..4, one), 0..80)
}

/// The pool, four holders, and what was last written to each page.
struct World {
    pool: PagePool,
    tables: Vec<PageTable>,
    written: Vec<Option<PageKey>>,
}

impl World {
    fn new(total: usize) -> Self {
        let tables = (0..4).map(|_| PageTable::default()).collect();
        Self { pool: PagePool::new(total), tables, written: vec![None; total] }
    }

    /// Nobody else may read what is written.
    fn write(&mut self, page: u32, what: Option<PageKey>) -> Result<(), TestCaseError> {
        prop_assert!(self.pool.is_private(page), "page {page} is written and not its holder's alone");
        self.written[page as usize] = what;
        Ok(())
    }

    fn go(&mut self, who: usize, step: Move, n: u32) -> Result<(), TestCaseError> {
        match step {
            Move::Begin { stem, shared, pages, named } => {
                let mut table = std::mem::take(&mut self.tables[who]);
                self.pool.release(&mut table);
                let keys = names(stem, n, shared, pages);
                let (found, before) = (self.pool.find(&keys), self.pool.available());
                prop_assert!(found.held <= found.pages && found.pages <= pages);
                let taken = self.pool.take(&mut table, &keys);
                prop_assert_eq!(taken, found.pages);
                prop_assert_eq!(self.pool.available(), before - (found.pages - found.held), "held ones cost nothing");
                for (page, key) in table.pages().zip(&keys) {
                    prop_assert_eq!(self.written[page as usize], Some(*key), "what was found is what was named");
                }
                let fits = self.pool.cover(&mut table, pages * PAGE_SIZE);
                prop_assert_eq!(fits, pages - found.held <= before);
                let own: Vec<u32> = table.pages().skip(taken).collect();
                for (at, page) in own.into_iter().enumerate() {
                    self.write(page, keys.get(taken + at).copied())?;
                    if at < named {
                        prop_assert!(self.pool.publish(page, keys[taken + at]) || self.pool.find(&keys).pages > taken);
                        self.pool.seal(page, 7);
                    }
                }
                self.tables[who] = table;
            }
            Move::Extend(positions) => {
                let (before, len) = (self.pool.available(), self.tables[who].len());
                let fits = self.pool.cover(&mut self.tables[who], positions);
                prop_assert_eq!(fits, pages_for(positions).saturating_sub(len) <= before, "cached pages make room");
                let want = if fits { len.max(pages_for(positions)) } else { len };
                prop_assert_eq!(self.tables[who].len(), want, "all or none");
                let own: Vec<u32> = self.tables[who].pages().skip(len).collect();
                own.into_iter().try_for_each(|page| self.write(page, None))?;
            }
            Move::Fork { to, pages } if to != who => {
                let mut table = std::mem::take(&mut self.tables[to]);
                self.pool.release(&mut table);
                let before = self.pool.available();
                self.tables[to] = self.pool.fork(&self.tables[who], pages);
                prop_assert_eq!(self.pool.available(), before, "a fork takes no page");
                let shared = pages.min(self.tables[who].len());
                prop_assert_eq!(
                    self.tables[to].pages().collect::<Vec<_>>(),
                    self.tables[who].pages().take(shared).collect::<Vec<_>>()
                );
            }
            Move::Fork { .. } => {}
            Move::Release => self.pool.release(&mut self.tables[who]),
            Move::Forget(page) => self.pool.forget(page),
            Move::Reset => {
                self.tables.iter_mut().for_each(|t| *t = PageTable::default());
                self.pool.reset();
                prop_assert_eq!(self.pool.free(), self.pool.total());
            }
        }
        prop_assert_eq!(self.pool.check(&self.tables), Ok(()));
        prop_assert_eq!(self.pool.free() + self.pool.cached() + self.pool.used(), self.pool.total());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn free_cached_and_held_pages_are_all_pages_and_names_lead_to_what_was_named(
        total in 0usize..16, moves in moves(),
    ) {
        let mut world = World::new(total);
        for (n, (who, step)) in moves.into_iter().enumerate() {
            world.go(who, step, n as u32)?;
        }
        // in the end everything can be had
        let mut tables = std::mem::take(&mut world.tables);
        tables.iter_mut().for_each(|table| world.pool.release(table));
        prop_assert_eq!(world.pool.available(), total);
        let mut all = PageTable::default();
        prop_assert!(world.pool.cover(&mut all, total * PAGE_SIZE));
        prop_assert_eq!(world.pool.check([&all]), Ok(()));
        prop_assert_eq!((world.pool.cached(), world.pool.named.len()), (0, 0));
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

/// Takes pages for a text, gives all of them names, and lets go of them.
fn cache(pool: &mut PagePool, keys: &[PageKey]) {
    let mut table = PageTable::default();
    assert!(pool.cover(&mut table, keys.len() * PAGE_SIZE));
    keys.iter().zip(table.pages()).for_each(|(key, page)| assert!(pool.publish(page, *key)));
    pool.release(&mut table);
}

#[test]
fn the_longest_unused_makes_room_first_and_a_chain_loses_its_end_first() {
    let mut pool = PagePool::new(6);
    let (old, new) = (names(1, 1, 0, 3), names(2, 2, 0, 3));
    cache(&mut pool, &old);
    cache(&mut pool, &new);
    assert_eq!((pool.free(), pool.cached(), pool.evictions()), (0, 6, 0));
    // used again: now the other one is the oldest
    let mut table = PageTable::default();
    assert_eq!(pool.take(&mut table, &old), 3);
    pool.release(&mut table);
    let mut taker = PageTable::default();
    for (pages, left) in [(1, (3, 2)), (2, (3, 1)), (3, (3, 0)), (4, (2, 0)), (6, (0, 0))] {
        assert!(pool.cover(&mut taker, pages * PAGE_SIZE));
        assert_eq!((pool.find(&old).pages, pool.find(&new).pages), left);
        assert_eq!(pool.evictions(), pages as u64);
    }
    assert!(!pool.cover(&mut taker, 7 * PAGE_SIZE));
}

#[test]
fn free_pages_go_before_cached_ones_and_held_ones_never() {
    let mut pool = PagePool::new(5);
    let keys = names(1, 1, 0, 2);
    cache(&mut pool, &keys);
    let (mut reader, mut taker) = (PageTable::default(), PageTable::default());
    assert!(pool.cover(&mut taker, 3 * PAGE_SIZE));
    assert_eq!(pool.find(&keys), Found { pages: 2, held: 0 });
    assert_eq!(pool.take(&mut reader, &keys[..1]), 1);
    assert_eq!(pool.find(&keys), Found { pages: 2, held: 1 });
    assert!(pool.cover(&mut taker, 4 * PAGE_SIZE));
    assert_eq!(pool.find(&keys), Found { pages: 1, held: 1 });
    assert!(!pool.cover(&mut taker, 5 * PAGE_SIZE), "what is held stays");
    assert_eq!(pool.check([&reader, &taker]), Ok(()));
}

#[test]
fn one_name_leads_to_one_page() {
    let mut pool = PagePool::new(3);
    let keys = names(1, 1, 0, 1);
    let mut tables = [PageTable::default(), PageTable::default()];
    tables.iter_mut().for_each(|t| assert!(pool.cover(t, PAGE_SIZE)));
    let pages = [0, 1].map(|i: usize| tables[i].page(0).expect("covered"));
    assert!(pool.publish(pages[0], keys[0]) && !pool.publish(pages[1], keys[0]), "the second one stays private");
    assert!(!pool.publish(pages[0], names(2, 2, 0, 1)[0]), "a page has one name");
    assert!(!pool.publish(2, names(2, 2, 0, 1)[0]), "nobody holds it");
    assert!(pool.is_private(pages[1]) && !pool.is_private(pages[0]));
    tables.iter_mut().for_each(|t| pool.release(t));
    assert_eq!((pool.free(), pool.cached()), (2, 1));
    pool.forget(pages[0]);
    assert_eq!((pool.free(), pool.cached(), pool.find(&keys).pages), (3, 0, 0));
}

#[test]
fn an_owners_pages_are_forgotten_and_nobody_elses() {
    let of = |name: &str| {
        let tenant = TenantId::new(name).expect("a name");
        PageKeys::new(&tenant, None, Ahead::default()).next(&[7; 2 * PAGE_SIZE], 2 * PAGE_SIZE)
    };
    let (mut pool, mine, others) = (PagePool::new(6), of("mine"), of("other"));
    cache(&mut pool, &mine);
    cache(&mut pool, &others);
    let mut reader = PageTable::default();
    assert_eq!(pool.take(&mut reader, &mine[..1]), 1);
    let owner = PageOwner::of(&TenantId::new("mine").expect("a name"));
    assert_eq!((pool.forget_owner(owner), pool.forget_owner(owner)), (2, 0));
    assert_eq!((pool.find(&mine).pages, pool.find(&others).pages, pool.cached()), (0, 2, 2));
    assert_eq!(pool.check([&reader]), Ok(()));
    pool.release(&mut reader);
    assert_eq!((pool.free(), pool.check([])), (4, Ok(())), "who held a page keeps it, and it comes back");
}

#[test]
fn checksums_come_in_turns_and_go_with_the_name() {
    let mut pool = PagePool::new(4);
    let keys = names(1, 1, 0, 3);
    cache(&mut pool, &keys);
    assert!(pool.sealed(2).is_empty());
    (0..4).for_each(|page| pool.seal(page, u64::from(page) + 10)); // page 3 has no name
    assert_eq!([pool.sealed(2), pool.sealed(2)], [vec![(0, 10), (1, 11)], vec![(2, 12), (0, 10)]]);
    pool.forget(1);
    assert_eq!(pool.sealed(9).len(), 2);
}

#[test]
fn check_finds_what_does_not_add_up() {
    let books = || {
        let mut pool = PagePool::new(4);
        cache(&mut pool, &names(1, 1, 0, 1));
        let mut table = PageTable::default();
        assert!(pool.cover(&mut table, 20));
        assert_eq!(pool.check([&table]), Ok(()));
        (pool, table)
    };
    let wrong = |meddle: &dyn Fn(&mut PagePool, &mut PageTable), what: &str| {
        let (mut pool, mut table) = books();
        meddle(&mut pool, &mut table);
        assert!(pool.check([&table]).is_err_and(|e| e.contains(what)), "{what}: {:?}", pool.check([&table]));
    };
    wrong(&|_, t| t.pages.push(9), "does not exist");
    wrong(&|_, t| t.pages.push(t.pages[0]), "twice in a table");
    wrong(&|_, t| _ = t.pages.pop(), "1 holders and is in 0 tables");
    wrong(&|p, _| _ = p.free.pop(), "lost");
    wrong(&|p, _| p.free.push(p.free[0]), "counted twice");
    wrong(&|p, t| p.free.push(t.pages[0]), "held and can be had");
    wrong(&|p, _| p.cached.clear(), "lost");
    wrong(&|p, _| p.named.clear(), "1 pages have names, 0 can be found");
    wrong(&|p, _| p.named.values_mut().for_each(|page| *page = 3), "another name");
    wrong(
        &|p, _| p.cached = p.cached.iter().map(|(since, page)| (since + 1, *page)).collect(),
        "not where its name says",
    );
    let (mut pool, _) = books();
    pool.reset();
    assert_eq!((pool.check([]), pool.free()), (Ok(()), 4));
}
