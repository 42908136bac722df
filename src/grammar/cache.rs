//! Compiled grammars by what they were compiled of, within bounds: requests repeat theirs.

use std::{collections::HashMap, sync::Arc};

use sha2::{Digest as _, Sha256};

use super::Grammar;
use crate::admission::params::ConstraintParams;

/// Most grammars kept.
const GRAMMARS: usize = 256;
/// Most bytes of all of them, as far as they are known.
const BYTES: u64 = 64 << 20;

/// A digest of a constraint.
pub(super) type Key = [u8; 32];

/// What a constraint is found by.
pub(super) fn key(constraint: &ConstraintParams) -> Key {
    let mut digest = Sha256::new();
    digest.update(constraint.field());
    let texts = match constraint {
        ConstraintParams::JsonObject => &[],
        ConstraintParams::JsonSchema(text) | ConstraintParams::Regex(text) | ConstraintParams::Lark(text) => {
            std::slice::from_ref(text)
        }
        ConstraintParams::Choice(texts) => texts.as_slice(),
    };
    for text in texts {
        digest.update((text.len() as u64).to_le_bytes());
        digest.update(text);
    }
    digest.finalize().into()
}

/// The grammars used last.
#[derive(Default)]
pub(super) struct Cache {
    kept: HashMap<Key, Kept>,
    bytes: u64,
    clock: u64,
}

struct Kept {
    grammar: Arc<Grammar>,
    bytes: u64,
    used: u64,
}

impl Cache {
    pub(super) fn get(&mut self, key: &Key) -> Option<Arc<Grammar>> {
        self.clock += 1;
        let kept = self.kept.get_mut(key)?;
        kept.used = self.clock;
        Some(Arc::clone(&kept.grammar))
    }

    /// Keeps a grammar of about so many bytes, unless it alone is too large; those that were not used longest make room.
    pub(super) fn put(&mut self, key: Key, grammar: Arc<Grammar>, bytes: u64) {
        if bytes > BYTES {
            return;
        }
        self.clock += 1;
        let kept = Kept { grammar, bytes, used: self.clock };
        self.bytes += bytes;
        self.bytes -= self.kept.insert(key, kept).map_or(0, |before| before.bytes);
        while self.bytes > BYTES || self.kept.len() > GRAMMARS {
            let Some(oldest) = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(key, _)| *key) else { return };
            self.bytes -= self.kept.remove(&oldest).map_or(0, |kept| kept.bytes);
        }
    }

    /// Lets those go that nobody uses: letting go of the others would free nothing.
    pub(super) fn free(&mut self) {
        self.kept.retain(|_, kept| Arc::strong_count(&kept.grammar) > 1);
        self.bytes = self.kept.values().map(|kept| kept.bytes).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::tests::grammars;

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let grammar = grammars().compile(&ConstraintParams::Regex("a".into())).expect("compiles");
        let mut cache = Cache::default();
        let key = |i: usize| key(&ConstraintParams::Regex(i.to_string()));
        for i in 0..GRAMMARS {
            cache.put(key(i), Arc::clone(&grammar), 10);
        }
        assert!(cache.get(&key(0)).is_some());
        cache.put(key(GRAMMARS), Arc::clone(&grammar), 10);
        assert_eq!((cache.kept.len(), cache.bytes), (GRAMMARS, 10 * GRAMMARS as u64));
        assert!(cache.get(&key(0)).is_some() && cache.get(&key(1)).is_none());
        cache.put(key(0), Arc::clone(&grammar), BYTES);
        assert_eq!((cache.kept.len(), cache.bytes), (1, BYTES), "all else made room for it");
        cache.put(key(9), Arc::clone(&grammar), BYTES + 1);
        assert!(cache.get(&key(9)).is_none() && cache.get(&key(0)).is_some());
    }

    #[test]
    fn keys_tell_kinds_and_texts_apart() {
        use ConstraintParams as C;
        let text = |t: &str| t.to_owned();
        let all = [
            C::JsonObject,
            C::Regex(text("{}")),
            C::Lark(text("{}")),
            C::JsonSchema(text("{}")),
            C::Choice(vec![text("a"), text("b")]),
            C::Choice(vec![text("ab")]),
            C::Choice(vec![text("b"), text("a")]),
        ];
        let keys: std::collections::HashSet<Key> = all.iter().map(key).collect();
        assert_eq!(keys.len(), all.len());
    }
}
