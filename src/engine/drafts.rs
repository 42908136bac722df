//! Drafts: what a sequence is guessed to say next. Whoever guesses, it only costs time: the tokens are those of the sequence's own
//! sampler, and a draft is taken where it is the token that was chosen.
//!
//! A sequence guesses in every step, which costs microseconds, and compares its first guess with the token that came, also where it
//! was not computed. So it knows how likely its guesses are right, at the cost of no row, and the scheduler has none computed that
//! are not worth it: where a text is new, drafts stop, and where it begins to repeat itself they come back and get longer.

use super::scheduler::Chance;
use crate::admission::params::NgramSpeculation;

/// Last tokens of a text that are searched: a guess costs some microseconds at most, however long the text is.
const WINDOW: usize = 8192;
/// Most bytes of logits that the drafts of a step have.
const LOGIT_BYTES: usize = 64 << 20;

/// What a step takes whatever its rows are, in rows of the time that one more takes: weights are read once for all of them. On CPUs
/// it was some 4 (codes of 8 bits, small bases) to 16 (f32); a guess that is a little off costs little.
pub(super) const FREE_ROWS: usize = 6;

/// Most drafts of a step on a base of this vocabulary: each has a row of f32 logits.
pub(super) fn most(vocab: usize) -> usize {
    (LOGIT_BYTES / (size_of::<f32>() * vocab.max(1))).max(1)
}

/// Guesses the next tokens from those of a source (of an encoder-decoder; else none) and those known so far.
pub(super) type Guess = fn(&[u32], &[u32], &NgramSpeculation) -> Vec<u32>;

/// A sequence's drafts, and what came of earlier ones.
#[derive(Debug)]
pub(super) struct Drafts {
    how: NgramSpeculation,
    /// Of the next step.
    tokens: Vec<u32>,
    /// How likely the next one is right.
    chance: Chance,
    /// Drafts that were computed.
    pub(super) drafted: u32,
    /// Those of them that were chosen, and gave a token more each.
    pub(super) accepted: u32,
}

impl Drafts {
    pub(super) fn new(how: NgramSpeculation) -> Self {
        Self { how, tokens: vec![], chance: Chance::EVEN, drafted: 0, accepted: 0 }
    }

    /// Guesses what follows these tokens.
    pub(super) fn guess(&mut self, guess: Guess, source: &[u32], tokens: &[u32]) {
        self.tokens = guess(source, tokens, &self.how);
        self.tokens.truncate(self.how.tokens as usize);
    }

    /// There are none for the next step: it is known what comes, or that the first of them is wrong.
    pub(super) fn clear(&mut self) {
        self.tokens.clear();
    }

    /// Tokens were said where `drafted` of the guesses were computed: the first guess was right or wrong in any case, each other if
    /// it was computed and those before it were right.
    pub(super) fn learn(&mut self, drafted: usize, said: &[u32]) {
        for (guess, said) in self.tokens.iter().zip(said).take(drafted.max(1)) {
            let right = guess == said;
            self.chance = self.chance.with(right);
            if !right {
                break;
            }
        }
        self.tokens.clear();
    }

    /// How likely the first of them is right, and each further one if those before it are.
    pub(super) fn chance(&self) -> Chance {
        self.chance
    }

    /// The drafts of the next step.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// Prompt lookup: finds the longest run of last tokens, within bounds, that came before, in the tokens or else in the source, there
/// where it came last, and says what followed. What follows the end of the tokens is what was guessed to: a run that overlaps
/// its own repetition is repeated on (as LZ77 copies). What is further than [`WINDOW`] tokens from an end is not searched.
pub(super) fn lookup(source: &[u32], tokens: &[u32], how: &NgramSpeculation) -> Vec<u32> {
    let [source, tokens] = [source, tokens].map(|text| &text[text.len().saturating_sub(WINDOW)..]);
    let wanted = how.tokens as usize;
    let own = latest(tokens, tokens, how);
    let other = latest(source, tokens, how).filter(|(_, len)| own.is_none_or(|(_, own)| *len > own));
    if let Some((at, _)) = other {
        return source.iter().skip(at).take(wanted).copied().collect();
    }
    let Some((at, _)) = own else { return vec![] };
    tokens[at..].iter().cycle().take(wanted).copied().collect()
}

/// Behind which of its tokens, the last one not counted, a text has the longest run of the last of `tokens` that is within bounds,
/// and how long it is; the latest place of several.
fn latest(text: &[u32], tokens: &[u32], how: &NgramSpeculation) -> Option<(usize, usize)> {
    let (longest, shortest) = (how.longest as usize, how.shortest as usize);
    let last = *tokens.last()?;
    let mut best: Option<(usize, usize)> = None;
    for at in (1..text.len()).rev().filter(|at| text[at - 1] == last) {
        let pairs = text[..at].iter().rev().zip(tokens.iter().rev());
        let len = pairs.take(longest).take_while(|(a, b)| a == b).count();
        if len >= shortest && best.is_none_or(|(_, found)| len > found) {
            best = Some((at, len));
        }
        if len == longest {
            break;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn how(tokens: u32, longest: u32, shortest: u32) -> NgramSpeculation {
        NgramSpeculation { tokens, longest, shortest }
    }

    #[test]
    fn what_followed_the_longest_run_where_it_came_last_is_guessed() {
        let said = |tokens: &[u32], how: NgramSpeculation| lookup(&[], tokens, &how);
        assert_eq!(said(&[1, 2, 3, 9, 2, 3, 8, 7, 1, 2, 3], how(3, 4, 1)), [9, 2, 3], "three tokens, not two");
        assert_eq!(said(&[1, 2, 3, 9, 2, 3, 8, 7, 1, 2, 3], how(3, 2, 1)), [8, 7, 1], "two: the later place");
        assert_eq!(said(&[5, 6, 5], how(4, 4, 1)), [6, 5, 6, 5], "it repeats on");
        assert_eq!(said(&[5, 5], how(3, 4, 1)), [5, 5, 5]);
        assert_eq!(said(&[5, 6, 5], how(4, 4, 2)), [0; 0], "one token is too short a run");
        assert_eq!(said(&[5, 6, 7], how(4, 4, 1)), [0; 0]);
        assert_eq!(said(&[5], how(4, 4, 1)), [0; 0]);
        assert_eq!(said(&[], how(4, 4, 1)), [0; 0]);
    }

    #[test]
    fn a_source_is_read_where_it_has_a_longer_run() {
        let source = [4, 1, 2, 3, 8];
        assert_eq!(lookup(&source, &[1, 2], &how(2, 4, 1)), [3, 8]);
        assert_eq!(lookup(&source, &[1, 2], &how(9, 4, 1)), [3, 8], "it ends");
        assert_eq!(lookup(&source, &[2, 9, 2], &how(2, 4, 1)), [9, 2], "of equal ones, the output's");
        assert_eq!(lookup(&source, &[2, 9, 1, 2], &how(1, 4, 1)), [3]);
        assert_eq!(lookup(&source, &[8], &how(2, 4, 1)), [0; 0], "nothing follows");
    }

    #[test]
    fn what_was_said_long_ago_is_not_searched() {
        // each token once, but the last two
        let text = |between: u32| [vec![1, 2, 3], (4..4 + between).collect(), vec![1, 2]].concat();
        let window = WINDOW as u32;
        for source in [vec![], text(window)] {
            assert_eq!(lookup(&source, &text(window - 5), &how(2, 4, 2)), [3, 4], "the whole text is within bounds");
            assert_eq!(lookup(&source, &text(window - 4), &how(2, 4, 2)), [0; 0]);
        }
        let source = |more: usize| [vec![1, 2, 3], vec![9; more]].concat();
        assert_eq!(lookup(&source(WINDOW - 3), &[1, 2], &how(2, 4, 2)), [3, 9]);
        assert_eq!(lookup(&source(WINDOW - 2), &[1, 2], &how(2, 4, 2)), [0; 0]);
    }

    #[test]
    fn what_came_of_guesses_is_learned_whether_they_were_computed_or_not() {
        let guess: Guess = |_, _, _| vec![1, 2, 3];
        let after = |drafted: usize, said: &[u32]| {
            let mut drafts = Drafts::new(how(4, 4, 1));
            drafts.guess(guess, &[], &[]);
            drafts.learn(drafted, said);
            assert_eq!(drafts.tokens(), [0; 0], "a guess is judged once");
            let chance = drafts.chance();
            drafts.learn(3, &[9, 9]);
            assert_eq!(drafts.chance(), chance);
            chance
        };
        let seen = |outcomes: &[bool]| outcomes.iter().fold(Chance::EVEN, |chance, right| chance.with(*right));
        assert_eq!(after(0, &[1]), seen(&[true]), "not computed, and right");
        assert_eq!(after(0, &[4]), seen(&[false]));
        assert_eq!(after(3, &[1, 2, 3, 7]), seen(&[true; 3]));
        assert_eq!(after(2, &[1, 2, 3]), seen(&[true; 2]), "the third was not computed");
        assert_eq!(after(3, &[1, 5]), seen(&[true, false]));
        assert_eq!(after(3, &[1]), seen(&[true]), "the output ended there");
        assert_eq!(after(3, &[]), Chance::EVEN);
    }

    /// Of a text that is new a sequence computes few drafts, however long it is, and of one that repeats itself all but the first few.
    #[test]
    fn guesses_that_are_wrong_stop_being_computed_and_come_back_when_they_are_right() {
        // alone in its steps: how many drafts are computed, and how many of them are right
        let run = |drafts: &mut Drafts, text: &mut dyn FnMut(usize) -> u32, tokens: usize| {
            let (mut said, mut drafted, mut right) = (vec![], 0, 0);
            while said.len() < tokens {
                drafts.guess(lookup, &[], &said);
                let mut odds = drafts.chance();
                let mut count = 0;
                while count < drafts.tokens().len() && odds.pays(1 + count, FREE_ROWS) {
                    (count, odds) = (count + 1, odds.and(drafts.chance()));
                }
                let guesses = drafts.tokens()[..count].to_vec();
                let from = said.len();
                said.push(text(from));
                for guess in guesses {
                    if said.last() != Some(&guess) {
                        break;
                    }
                    right += 1;
                    said.push(text(said.len()));
                }
                drafted += count;
                drafts.learn(count, &said[from..]);
            }
            (drafted, right)
        };
        // 16 tokens in no order (xorshift, Marsaglia 2003): each was there before, and guesses say little
        let mut state = 2_463_534_242u32;
        let mut new = |_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state % 16
        };
        let mut repeats = |at: usize| at as u32 % 7;
        let mut drafts = Drafts::new(how(8, 4, 1));
        let (drafted, _) = run(&mut drafts, &mut new, 400);
        assert!(drafted < 80, "{drafted} for 400 tokens");
        let (drafted, right) = run(&mut drafts, &mut repeats, 400);
        assert!(right > 300 && right * 10 > drafted * 9, "{right} of {drafted} for 400 tokens");
    }

    #[test]
    fn drafts_of_a_large_vocabulary_are_fewer() {
        assert_eq!([most(1 << 15), most(1 << 18), most(usize::MAX / 8)], [512, 64, 1]);
        assert!([50_257, 151_936, 262_144].iter().all(|vocab| most(*vocab) * vocab * 4 <= LOGIT_BYTES));
    }

    proptest! {
        /// However the texts are, guesses are tokens that were there, and of a text that is one run repeated they are right.
        #[test]
        fn guesses_are_of_what_was_said(
            source in proptest::collection::vec(0u32..4, 0..12),
            tokens in proptest::collection::vec(0u32..4, 0..40),
            count in 1u32..17, longest in 1u32..17, shortest in 1u32..17,
        ) {
            let how = how(count, longest, shortest.min(longest));
            let guessed = lookup(&source, &tokens, &how);
            prop_assert!(guessed.len() <= count as usize);
            prop_assert!(guessed.iter().all(|t| tokens.contains(t) || source.contains(t)));
            let period = tokens.len().max(1);
            let long: Vec<u32> = tokens.iter().cycle().take(3 * tokens.len()).copied().collect();
            let next: Vec<u32> = tokens.iter().cycle().take(count as usize).copied().collect();
            if period <= 16 && !tokens.is_empty() {
                let exact = NgramSpeculation { tokens: count, longest: 16, shortest: 1 };
                prop_assert_eq!(lookup(&[], &long, &exact), next);
            }
        }
    }
}
