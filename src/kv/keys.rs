//! Names of pages: what a page of keys and values holds, as a digest. Two pages of one name hold the same numbers.

use sha2::{Digest, Sha256};

use super::{PAGE_SIZE, pages_for};
use crate::{
    ids::{DeltaId, TenantId},
    rows::Ahead,
};

/// What a page holds: SHA-256 over whose it is, the delta that it was computed with, and everything from the sequence's
/// beginning to the page's end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageKey {
    digest: [u8; 32],
    owner: PageOwner,
}

/// Whose pages they are: a part of a digest over the tenant's name. It tells what to forget with a tenant, and nothing
/// else: who may find a page is in the page's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageOwner(u64);

impl PageOwner {
    /// A tenant's.
    pub fn of(tenant: &TenantId) -> Self {
        let digest = Sha256::digest(tenant.as_str());
        Self(digest.iter().take(8).fold(0, |sum, byte| (sum << 8) | u64::from(*byte)))
    }
}

impl PageKey {
    /// Whose page it is.
    pub fn owner(&self) -> PageOwner {
        self.owner
    }
}

impl std::fmt::Debug for PageKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageKey({})", hex::encode(&self.digest[..6]))
    }
}

/// Names the pages of one sequence, in order. Every part of what is digested has a tag or a length before it, so that no
/// two sequences of parts read the same.
///
/// A tenant's pages are found by its own requests only, also those of the bare base: how fast a prompt is read would
/// otherwise tell one tenant what another has asked.
#[derive(Debug, Clone)]
pub struct PageKeys {
    root: PageKey,
    last: PageKey,
    /// Whole pages of rows that were named.
    named: usize,
    ahead: Ahead,
    /// From which row on which delta acts, as long as no page of such rows was named.
    acts: Option<(usize, DeltaId)>,
}

impl PageKeys {
    /// Of a sequence of this tenant with this delta (`None`: its keys and values are the bare base's), which puts so much
    /// ahead of the tokens.
    pub fn new(tenant: &TenantId, delta: Option<DeltaId>, ahead: Ahead) -> Self {
        let mut h = Sha256::new();
        h.update(b"deltaserve/kv-page/v1\0");
        h.update((tenant.as_str().len() as u64).to_le_bytes());
        h.update(tenant.as_str());
        match delta {
            None => h.update([0]),
            Some(id) => {
                h.update([1]);
                h.update(id.as_bytes());
            }
        }
        let Ahead { rows, keys, shift, pinned } = ahead;
        h.update((rows as u64).to_le_bytes());
        h.update((keys as u64).to_le_bytes());
        h.update((shift as i64).to_le_bytes());
        h.update([u8::from(pinned)]);
        let root = PageKey { digest: h.finalize().into(), owner: PageOwner::of(tenant) };
        Self { root, last: root, named: 0, ahead, acts: None }
    }

    /// Of a sequence of this tenant whose delta acts from row `from` on: whole pages of the rows ahead of it are those of the bare
    /// base.
    pub fn acting_from(tenant: &TenantId, from: usize, delta: DeltaId) -> Self {
        Self { acts: Some((from, delta)), ..Self::new(tenant, None, Ahead::default()) }
    }

    /// Names of the pages of keys and values that the delta puts ahead of all rows; the last may be partly filled.
    pub fn ahead(&self) -> Vec<PageKey> {
        (0..pages_for(self.ahead.keys)).map(|at| digest(b'k', self.root, at, &[])).collect()
    }

    /// Names of whole pages within the first `rows` rows of a sequence of these tokens, which were not named before.
    /// Virtual rows count as rows and are no tokens.
    pub fn next(&mut self, tokens: &[u32], rows: usize) -> Vec<PageKey> {
        let virtual_rows = self.ahead.rows;
        let whole = rows.min(virtual_rows.saturating_add(tokens.len())) / PAGE_SIZE;
        let mut out = Vec::with_capacity(whole.saturating_sub(self.named));
        while self.named < whole {
            let token = |row: usize| row.saturating_sub(virtual_rows);
            let (from, to) = (self.named * PAGE_SIZE, (self.named + 1) * PAGE_SIZE);
            let own = tokens.get(token(from)..token(to)).unwrap_or_default();
            if let Some((first, delta)) = self.acts.take_if(|(first, _)| to > *first) {
                self.last = activation(self.last, first, delta);
            }
            self.last = digest(b'r', self.last, self.named, own);
            self.named += 1;
            out.push(self.last);
        }
        out
    }
}

/// What pages from that of row `first` on go on from, where a delta acts from there.
fn activation(parent: PageKey, first: usize, delta: DeltaId) -> PageKey {
    let mut h = Sha256::new();
    h.update([b'a']);
    h.update(parent.digest);
    h.update((first as u64).to_le_bytes());
    h.update(delta.as_bytes());
    PageKey { digest: h.finalize().into(), owner: parent.owner }
}

fn digest(kind: u8, parent: PageKey, at: usize, tokens: &[u32]) -> PageKey {
    let mut h = Sha256::new();
    h.update([kind]);
    h.update(parent.digest);
    h.update((at as u64).to_le_bytes());
    h.update((tokens.len() as u64).to_le_bytes());
    tokens.iter().for_each(|token| h.update(token.to_le_bytes()));
    PageKey { digest: h.finalize().into(), owner: parent.owner }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("a name")
    }

    fn of(name: &str, delta: Option<u8>, ahead: Ahead, tokens: &[u32]) -> Vec<PageKey> {
        let delta = delta.map(|n| DeltaId::from_bytes([n; 32]));
        PageKeys::new(&tenant(name), delta, ahead).next(tokens, ahead.rows + tokens.len())
    }

    #[test]
    fn names_are_of_whole_pages_and_come_once_however_they_are_asked_for() {
        let tokens: Vec<u32> = (0..70).collect();
        for rows in [0, 3, 16, 20, 40] {
            let ahead = Ahead { rows, ..Ahead::default() };
            let whole = of("a", None, ahead, &tokens);
            assert_eq!(whole.len(), (rows + 70) / PAGE_SIZE);
            let mut keys = PageKeys::new(&tenant("a"), None, ahead);
            let parts: Vec<PageKey> =
                [0, 1, 15, 16, 16, 17, 50, 33, 500].into_iter().flat_map(|rows| keys.next(&tokens, rows)).collect();
            assert_eq!(parts, whole);
            assert_eq!(whole.iter().collect::<HashSet<_>>().len(), whole.len(), "pages of virtual rows only, too");
            let prefix = of("a", None, ahead, &tokens[..40]);
            assert_eq!(prefix, whole[..prefix.len()], "what comes later does not count");
        }
    }

    #[test]
    fn whatever_changes_keys_or_who_may_see_them_changes_every_name() {
        let tokens: Vec<u32> = (0..48).collect();
        let plain = Ahead::default();
        let mut seen: HashSet<PageKey> = HashSet::new();
        let mut apart = |keys: Vec<PageKey>| {
            assert!(!keys.is_empty());
            keys.into_iter().for_each(|key| assert!(seen.insert(key), "{key:?} is there already"));
        };
        apart(of("a", None, plain, &tokens));
        apart(of("b", None, plain, &tokens));
        apart(of("ab", None, plain, &tokens));
        apart(of("a", Some(1), plain, &tokens));
        apart(of("a", Some(2), plain, &tokens));
        apart(of("b", Some(1), plain, &tokens));
        let others = [
            Ahead { keys: 3, ..plain },
            Ahead { keys: 3, shift: 3, ..plain },
            Ahead { keys: 3, pinned: true, ..plain },
            Ahead { rows: 3, ..plain },
            Ahead { rows: 3, shift: -3, ..plain },
        ];
        for ahead in others {
            apart(of("a", Some(1), ahead, &tokens));
        }
        // one other token: all pages from there on
        let (mut first, mut later) = (tokens.clone(), tokens.clone());
        (first[0], later[20]) = (99, 99);
        apart(of("a", None, plain, &first));
        let later = of("a", None, plain, &later);
        assert_eq!(later[0], of("a", None, plain, &tokens)[0]);
        apart(later[1..].to_vec());
        // the same tokens one page later
        apart(of("a", None, plain, &[&[7; 16], &tokens[..]].concat()));
    }

    #[test]
    fn pages_ahead_of_an_activation_are_the_bases_and_those_behind_it_nobody_elses() {
        let tokens: Vec<u32> = (0..80).collect();
        let plain = of("a", None, Ahead::default(), &tokens);
        let acting = |name, from, delta: u8| {
            let mut keys = PageKeys::acting_from(&tenant(name), from, DeltaId::from_bytes([delta; 32]));
            // however they are asked for
            [10, 33, 64, 80].into_iter().flat_map(|rows| keys.next(&tokens, rows)).collect::<Vec<_>>()
        };
        let mut others: HashSet<PageKey> = of("a", Some(1), Ahead::default(), &tokens).into_iter().collect();
        for (from, shared) in [(0, 0), (1, 0), (15, 0), (16, 1), (40, 2), (47, 2), (48, 3), (79, 4), (80, 5), (500, 5)]
        {
            for delta in [1, 2] {
                let keys = acting("a", from, delta);
                assert_eq!((keys.len(), &keys[..shared]), (5, &plain[..shared]), "from {from}");
                assert!(keys[shared..].iter().all(|key| !plain.contains(key) && others.insert(*key)), "from {from}");
            }
        }
        assert!(acting("b", 40, 1).iter().all(|key| !plain.contains(key) && !others.contains(key)));
    }

    #[test]
    fn pages_ahead_of_all_rows_are_the_deltas_whatever_the_tokens() {
        let ahead = |keys| Ahead { keys, ..Ahead::default() };
        let keys =
            |name, n, delta: u8| PageKeys::new(&tenant(name), Some(DeltaId::from_bytes([delta; 32])), ahead(n)).ahead();
        assert_eq!([0, 1, 16, 17, 40].map(|n| keys("a", n, 1).len()), [0, 1, 1, 2, 3]);
        let mut with_rows = PageKeys::new(&tenant("a"), Some(DeltaId::from_bytes([1; 32])), ahead(20));
        let rows = with_rows.next(&[5; 64], 64);
        assert_eq!(with_rows.ahead(), keys("a", 20, 1));
        let all = [rows, keys("a", 20, 1), keys("a", 20, 2), keys("b", 20, 1)].concat();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    }
}
