//! What a sequence may say next, where its request bounds that: asked for before a token is chosen, told what was chosen.
//! Texts, grammars and vocabularies are behind [`Constraint`]; here are sets of token ids alone.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

/// Token ids, as bits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenSet {
    /// Token `i` is bit `i % 32` of word `i / 32`.
    words: Vec<u32>,
}

impl TokenSet {
    /// Takes the place of what was in it; token `i` is bit `i % 32` of word `i / 32`.
    pub fn assign(&mut self, words: impl IntoIterator<Item = u32>) {
        self.words.clear();
        self.words.extend(words);
    }

    /// Puts a token into it.
    pub fn insert(&mut self, id: u32) {
        let at = (id / 32) as usize;
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        self.words[at] |= 1 << (id % 32);
    }

    /// Whether a token is in it.
    pub fn contains(&self, id: u32) -> bool {
        self.words.get((id / 32) as usize).is_some_and(|word| (word >> (id % 32)) & 1 == 1)
    }

    /// Its tokens, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let of_word = |(i, word): (u32, &u32)| {
            let word = *word;
            (0..32).filter(move |bit| (word >> bit) & 1 == 1).map(move |bit| 32 * i + bit)
        };
        (0u32..).zip(&self.words).filter(|(_, word)| **word != 0).flat_map(of_word)
    }

    /// Whether no token is in it.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }
}

/// Whether an output may end where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It has to go on.
    No,
    /// It may.
    May,
    /// Nothing can follow.
    Must,
}

/// Bounds one sequence's output. Its state is that after the tokens accepted so far.
///
/// Both calls are made on the engine's threads between steps: their work is to be small and bounded. An error, or a panic, ends
/// this sequence only.
pub trait Constraint: Send + Sync + std::fmt::Debug {
    /// Puts what may come next into `allowed`, which is empty. Tokens that end an output do not belong there: the engine adds
    /// them where the output may end. With [`Ending::No`], there is at least one token.
    ///
    /// # Errors
    /// The constraint cannot be kept, in words for the caller.
    fn allowed(&mut self, allowed: &mut TokenSet) -> Result<Ending, String>;

    /// Goes on behind a token that was allowed. Whether nothing can follow, as far as that is known without looking at all
    /// tokens.
    ///
    /// # Errors
    /// The constraint cannot be kept, in words for the caller.
    fn accept(&mut self, token: u32) -> Result<bool, String>;

    /// About how many bytes of memory its state takes now.
    fn bytes(&self) -> u64;
}

/// Makes the constraints of outputs, each when its output begins: one that waits takes no memory for its state.
pub trait ConstraintFactory: Send + Sync + std::fmt::Debug {
    /// About how many bytes of memory a constraint takes when it begins.
    fn bytes(&self) -> u64;

    /// One output's, at its beginning. Called on the engine's threads: a copy, no more.
    fn begin(&self) -> Box<dyn Constraint>;
}

/// A sequence's constraint and what it said of the next token.
#[derive(Debug)]
pub(super) struct Constrained {
    state: State,
    allowed: TokenSet,
    /// Whether `allowed` is that of the next token.
    known: bool,
    /// Whether the sequence ends without another token: nothing is left to say, or it cannot be known what.
    over: bool,
}

#[derive(Debug)]
enum State {
    /// Its sequence has not begun.
    Due(Arc<dyn ConstraintFactory>),
    Begun(Box<dyn Constraint>),
}

impl Constrained {
    pub(super) fn new(factory: Arc<dyn ConstraintFactory>) -> Self {
        Self { state: State::Due(factory), allowed: TokenSet::default(), known: false, over: false }
    }

    /// Whether it has a state of its own.
    pub(super) fn has_begun(&self) -> bool {
        matches!(self.state, State::Begun(_))
    }

    /// About how many bytes of memory its state takes, or will take when it begins.
    pub(super) fn bytes(&self) -> u64 {
        match &self.state {
            State::Due(factory) => factory.bytes(),
            State::Begun(constraint) => constraint.bytes(),
        }
    }

    /// Whether it is not known yet what may come next.
    pub(super) fn is_due(&self) -> bool {
        !self.known
    }

    /// What may come next, tokens that end the output included; as of the last [`Self::look`]. `None`: nothing is chosen any more.
    pub(super) fn allowed(&self) -> Option<&TokenSet> {
        (!self.over).then_some(&self.allowed)
    }

    /// Finds out what may come next, at the beginning of its sequence also with what. `false`: nothing, the output ends here.
    pub(super) fn look(&mut self, stop_tokens: &[u32]) -> Result<bool, String> {
        let looked = self.look_on(stop_tokens);
        self.over = !matches!(looked, Ok(true));
        looked
    }

    fn look_on(&mut self, stop_tokens: &[u32]) -> Result<bool, String> {
        self.allowed.assign([]);
        if let State::Due(factory) = &self.state {
            // what it was compiled to may go once all that wait for it have begun
            self.state = State::Begun(guarded(|| Ok(factory.begin()))?);
        }
        let State::Begun(constraint) = &mut self.state else { return Err("it has not begun".into()) };
        let allowed = &mut self.allowed;
        let ending = guarded(|| constraint.allowed(allowed))?;
        if ending == Ending::May {
            stop_tokens.iter().for_each(|id| self.allowed.insert(*id));
        }
        self.known = true;
        match ending {
            Ending::Must => Ok(false),
            // it may end and cannot say so with a token
            Ending::May if self.allowed.is_empty() => Ok(false),
            Ending::No if self.allowed.is_empty() => Err("no token may come next".into()),
            Ending::No | Ending::May => Ok(true),
        }
    }

    /// Goes on behind a token; whether the output ends with it.
    pub(super) fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.known = false;
        let State::Begun(constraint) = &mut self.state else { return Err("it has not begun".into()) };
        guarded(|| constraint.accept(token))
    }
}

/// A panic is an error of the sequence that it is about.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("it broke".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Says(Vec<u32>, Result<Ending, String>);

    impl Constraint for Says {
        fn allowed(&mut self, allowed: &mut TokenSet) -> Result<Ending, String> {
            self.0.iter().for_each(|id| allowed.insert(*id));
            self.1.clone()
        }

        fn accept(&mut self, token: u32) -> Result<bool, String> {
            assert!(self.0.contains(&token), "a broken promise");
            Ok(true)
        }

        fn bytes(&self) -> u64 {
            2
        }
    }

    impl ConstraintFactory for Says {
        fn bytes(&self) -> u64 {
            1
        }

        fn begin(&self) -> Box<dyn Constraint> {
            Box::new(Self(self.0.clone(), self.1.clone()))
        }
    }

    #[test]
    fn a_set_has_what_was_put_into_it_and_nothing_else() {
        let mut set = TokenSet::default();
        assert!(set.is_empty() && !set.contains(0));
        for id in [0, 31, 32, 1000] {
            set.insert(id);
        }
        let all: Vec<u32> = (0..2000).filter(|id| set.contains(*id)).collect();
        assert_eq!(all, [0, 31, 32, 1000]);
        assert_eq!(set.iter().collect::<Vec<_>>(), all);
        set.assign([0b101, 0]);
        let all: Vec<u32> = (0..2000).filter(|id| set.contains(*id)).collect();
        assert_eq!(all, [0, 2]);
        set.assign([0, 0]);
        assert!(set.is_empty());
    }

    #[test]
    fn stop_tokens_are_allowed_where_the_output_may_end_and_nowhere_else() {
        let looked = |says: Says, stops: &[u32]| {
            let mut constrained = Constrained::new(Arc::new(says));
            assert!(constrained.is_due() && !constrained.has_begun() && constrained.bytes() == 1);
            let goes_on = constrained.look(stops);
            assert!(constrained.has_begun() && constrained.bytes() == 2, "its state is there from the first look on");
            assert_eq!(constrained.allowed().is_some(), goes_on == Ok(true));
            (goes_on, constrained.allowed.iter().collect::<Vec<_>>())
        };
        assert_eq!(looked(Says(vec![5], Ok(Ending::No)), &[1, 40]), (Ok(true), vec![5]));
        assert_eq!(looked(Says(vec![5], Ok(Ending::May)), &[1, 40]), (Ok(true), vec![1, 5, 40]));
        assert_eq!(looked(Says(vec![], Ok(Ending::May)), &[1]), (Ok(true), vec![1]));
        assert_eq!(looked(Says(vec![], Ok(Ending::May)), &[]).0, Ok(false), "it has no token to end with");
        assert_eq!(looked(Says(vec![], Ok(Ending::Must)), &[1]).0, Ok(false));
        assert!(looked(Says(vec![], Ok(Ending::No)), &[1]).0.is_err());
        assert_eq!(looked(Says(vec![], Err("no".into())), &[1]).0, Err("no".into()));
    }

    #[test]
    fn a_token_makes_the_next_look_due_and_a_panic_is_an_error() {
        let mut constrained = Constrained::new(Arc::new(Says(vec![5], Ok(Ending::No))));
        assert_eq!(constrained.look(&[]), Ok(true));
        assert!(!constrained.is_due());
        assert_eq!(constrained.accept(5), Ok(true));
        assert!(constrained.is_due());
        assert!(constrained.accept(6).is_err());
    }
}
