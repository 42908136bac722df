//! What a sequence may say next, where its request bounds that: asked for before a token is chosen, told what was chosen.
//! Texts, grammars and vocabularies are behind [`Constraint`]; here are sets of token ids alone.
//!
//! Where only one token may come, it will (it is *forced*), whatever the model says: so the constraint is told of it at once, and
//! asked what may come behind it, until there is a choice again. What is known so is told to the sequence token by token, as if
//! the constraint had been asked each time; an error, too, comes where it would have come.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

/// Most forced tokens that are found out at once: each takes as much work as a token that is chosen does.
const FORCED: usize = 32;

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

    /// Its only token, if it has just one.
    pub fn only(&self) -> Option<u32> {
        let mut words = (0u32..).zip(&self.words).filter(|(_, word)| **word != 0);
        let (at, word) = words.next().filter(|(_, word)| word.is_power_of_two())?;
        words.next().is_none().then(|| 32 * at + word.trailing_zeros())
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
    /// Tokens that have to come next, which `state` was told of.
    forced: VecDeque<u32>,
    /// What it said when it was told of the last of them, if nothing is to come behind that.
    ended: Option<Result<bool, String>>,
    /// What it said of the token behind them.
    beyond: Option<(TokenSet, Result<bool, String>)>,
}

#[derive(Debug)]
enum State {
    /// Its sequence has not begun.
    Due(Arc<dyn ConstraintFactory>),
    Begun(Box<dyn Constraint>),
}

impl Constrained {
    pub(super) fn new(factory: Arc<dyn ConstraintFactory>) -> Self {
        Self {
            state: State::Due(factory),
            allowed: TokenSet::default(),
            known: false,
            over: false,
            forced: VecDeque::new(),
            ended: None,
            beyond: None,
        }
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
        if let Some(token) = self.forced.front() {
            self.allowed.insert(*token);
            self.known = true;
            return Ok(true);
        }
        let looked = match self.beyond.take() {
            Some((allowed, looked)) => {
                self.allowed = allowed;
                looked
            }
            None => ask(constraint.as_mut(), &mut self.allowed, stop_tokens),
        };
        self.known = looked.is_ok();
        if looked == Ok(true) {
            self.look_beyond(stop_tokens);
        }
        looked
    }

    /// Goes on behind what may come next, as long as that is one token alone. Tokens that end the output are not gone behind.
    fn look_beyond(&mut self, stop_tokens: &[u32]) {
        let State::Begun(constraint) = &mut self.state else { return };
        let mut only = self.allowed.only();
        while let Some(token) = only.filter(|token| !stop_tokens.contains(token) && self.forced.len() < FORCED) {
            self.forced.push_back(token);
            self.beyond = None;
            match guarded(|| constraint.accept(token)) {
                Ok(false) => {}
                ended => {
                    self.ended = Some(ended);
                    return;
                }
            }
            let mut allowed = TokenSet::default();
            let looked = ask(constraint.as_mut(), &mut allowed, stop_tokens);
            only = allowed.only().filter(|_| looked == Ok(true));
            self.beyond = Some((allowed, looked));
        }
    }

    /// Tokens that have to come next, as far as that is known: since the last [`Self::look`], the first is the only one allowed.
    pub(super) fn forced(&self) -> impl Iterator<Item = u32> + '_ {
        self.forced.iter().copied()
    }

    /// Goes on behind a token; whether the output ends with it.
    pub(super) fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.known = false;
        let State::Begun(constraint) = &mut self.state else { return Err("it has not begun".into()) };
        match self.forced.pop_front() {
            None => guarded(|| constraint.accept(token)),
            Some(forced) if forced != token => Err(format!("token {token} came where only {forced} may come")),
            Some(_) if self.forced.is_empty() => self.ended.take().unwrap_or(Ok(false)),
            Some(_) => Ok(false),
        }
    }
}

/// Puts what may come next into `allowed`, which is empty; `false`: the output ends here.
fn ask(constraint: &mut dyn Constraint, allowed: &mut TokenSet, stop_tokens: &[u32]) -> Result<bool, String> {
    let ending = guarded(|| constraint.allowed(allowed))?;
    if ending == Ending::May {
        stop_tokens.iter().for_each(|id| allowed.insert(*id));
    }
    match ending {
        Ending::Must => Ok(false),
        // it may end and cannot say so with a token
        Ending::May if allowed.is_empty() => Ok(false),
        Ending::No if allowed.is_empty() => Err("no token may come next".into()),
        Ending::No | Ending::May => Ok(true),
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
        assert_eq!(set.only(), None);
        set.assign([0, 0, 0b100, 0]);
        assert_eq!(set.only(), Some(66));
        set.assign([0, 1, 1]);
        assert_eq!(set.only(), None);
        set.assign([0b101, 0]);
        assert_eq!(set.only(), None);
        let all: Vec<u32> = (0..2000).filter(|id| set.contains(*id)).collect();
        assert_eq!(all, [0, 2]);
        set.assign([0, 0]);
        assert!(set.is_empty() && set.only().is_none());
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

    /// Says what may come after so many tokens, and what became of each; counts how often it is asked.
    #[derive(Debug, Clone)]
    struct Line {
        sets: Vec<(Ending, Vec<u32>)>,
        accepts: fn(usize) -> Result<bool, String>,
        at: usize,
        asked: Arc<std::sync::atomic::AtomicUsize>,
    }

    impl Line {
        fn new(sets: &[(Ending, &[u32])], accepts: fn(usize) -> Result<bool, String>) -> Self {
            let sets = sets.iter().map(|(ending, ids)| (*ending, ids.to_vec())).collect();
            Self { sets, accepts, at: 0, asked: Arc::default() }
        }

        fn asked(&self) -> usize {
            self.asked.load(std::sync::atomic::Ordering::Relaxed)
        }
    }

    impl Constraint for Line {
        fn allowed(&mut self, allowed: &mut TokenSet) -> Result<Ending, String> {
            self.asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let (ending, ids) = self.sets.get(self.at).cloned().ok_or("it is over")?;
            ids.into_iter().for_each(|id| allowed.insert(id));
            Ok(ending)
        }

        fn accept(&mut self, token: u32) -> Result<bool, String> {
            assert!(self.sets[self.at].1.contains(&token), "a broken promise");
            self.at += 1;
            (self.accepts)(self.at)
        }

        fn bytes(&self) -> u64 {
            1
        }
    }

    impl ConstraintFactory for Line {
        fn bytes(&self) -> u64 {
            1
        }

        fn begin(&self) -> Box<dyn Constraint> {
            Box::new(self.clone())
        }
    }

    /// What is allowed and what is forced before each token, and what came of the last token or look.
    #[allow(clippy::type_complexity, reason = "of one test")]
    fn told(line: &Line, stops: &[u32], tokens: &[u32]) -> (Vec<(Vec<u32>, Vec<u32>)>, Result<bool, String>) {
        let mut constrained = Constrained::new(Arc::new(line.clone()));
        let mut seen = vec![];
        for token in tokens {
            match constrained.look(stops) {
                Ok(true) => {}
                other => return (seen, other),
            }
            let allowed = constrained.allowed().map(|all| all.iter().collect()).unwrap_or_default();
            seen.push((allowed, constrained.forced().collect()));
            match constrained.accept(*token) {
                Ok(false) => assert!(constrained.is_due()),
                other => return (seen, other),
            }
        }
        let last = constrained.look(stops);
        (seen, last)
    }

    const NO: Ending = Ending::No;

    #[test]
    fn tokens_without_a_choice_are_known_ahead_and_told_one_by_one() {
        let line = Line::new(&[(NO, &[5]), (NO, &[6]), (NO, &[7, 8]), (NO, &[9]), (NO, &[1, 2])], |_| Ok(false));
        let (seen, last) = told(&line, &[], &[5, 6, 8, 9]);
        let expected: [(&[u32], &[u32]); 4] = [(&[5], &[5, 6]), (&[6], &[6]), (&[7, 8], &[]), (&[9], &[9])];
        assert_eq!(seen, expected.map(|(allowed, forced)| (allowed.to_vec(), forced.to_vec())));
        assert_eq!((last, line.asked()), (Ok(true), 5), "it is asked once for each token");
        // many: some at a time
        let long = vec![(NO, &[3][..]); 100];
        let line = Line::new(&long, |_| Ok(false));
        let (seen, last) = told(&line, &[], &[3; 100]);
        assert_eq!(seen.len(), 100);
        assert!(seen.iter().all(|(allowed, forced)| *allowed == [3] && (1..=FORCED).contains(&forced.len())));
        assert_eq!((last, line.asked()), (Err("it is over".into()), 101));
    }

    #[test]
    fn ends_and_errors_come_where_they_would_have_come() {
        let all: [(Ending, &[u32]); 3] = [(NO, &[5]), (NO, &[6]), (NO, &[7])];
        let ended =
            |accepts: fn(usize) -> Result<bool, String>, sets: &[(Ending, &[u32])], stops: &[u32], tokens: &[u32]| {
                let (seen, last) = told(&Line::new(sets, accepts), stops, tokens);
                (seen.len(), last)
            };
        assert_eq!(ended(|at| Ok(at == 2), &all, &[], &[5, 6, 7]), (2, Ok(true)), "the second token ends it");
        let broken = |at: usize| if at == 3 { Err("no".to_owned()) } else { Ok(false) };
        assert_eq!(ended(broken, &all, &[], &[5, 6, 7]), (3, Err("no".into())));
        let panics = |at: usize| if at == 2 { panic!("it breaks") } else { Ok(false) };
        assert_eq!(ended(panics, &all, &[], &[5, 6, 7]), (2, Err("it broke".into())));
        let must: [(Ending, &[u32]); 2] = [(NO, &[5]), (Ending::Must, &[])];
        assert_eq!(ended(|_| Ok(false), &must, &[], &[5, 6]), (1, Ok(false)));
        // where it may end, a stop token is a choice; alone it is none, and nothing comes behind it
        let may: [(Ending, &[u32]); 2] = [(NO, &[5]), (Ending::May, &[6])];
        let (seen, _) = told(&Line::new(&may, |_| Ok(false)), &[1], &[5, 6]);
        assert_eq!(seen, [(vec![5], vec![5]), (vec![1, 6], vec![])]);
        let only: [(Ending, &[u32]); 2] = [(NO, &[5]), (Ending::May, &[])];
        let (seen, _) = told(&Line::new(&only, |_| Ok(false)), &[1], &[5]);
        assert_eq!(seen, [(vec![5], vec![5])]);
        // a stop token that a constraint takes for text
        let (seen, _) = told(&Line::new(&all, |_| Ok(false)), &[6], &[5]);
        assert_eq!(seen, [(vec![5], vec![5])]);
    }

    #[test]
    fn another_token_than_the_only_one_is_an_error() {
        let mut constrained = Constrained::new(Arc::new(Line::new(&[(NO, &[5]), (NO, &[6, 7])], |_| Ok(false))));
        assert_eq!(constrained.look(&[]), Ok(true));
        assert!(constrained.accept(6).is_err());
    }
}
