//! When the tokens of a streamed answer came.

/// The chunks of one answer after its first, with the time before each.
///
/// A chunk may bring several tokens. The time between two chunks is spread evenly over the tokens of the later one, so that the
/// times between tokens (ITL) of an answer add up to the time from its first chunk to its last. Tokens that came together with
/// the first one have no time before them, and are in no figure of ITL.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::cli) struct Chunks {
    first: Option<(f64, u32)>,
    last: f64,
    /// Seconds since the chunk before, and tokens.
    later: Vec<(f32, u32)>,
}

impl Chunks {
    /// A chunk with so many tokens came, so many seconds after the beginning. One without tokens is none.
    pub(super) fn came(&mut self, seconds: f64, tokens: u32) {
        if tokens == 0 {
            return;
        }
        match self.first {
            None => self.first = Some((seconds, tokens)),
            Some(_) => self.later.push(((seconds - self.last) as f32, tokens)),
        }
        self.last = seconds;
    }

    /// Seconds to the first token.
    pub(in crate::cli) fn first(&self) -> Option<f64> {
        self.first.map(|(seconds, _)| seconds)
    }

    /// Tokens.
    pub(super) fn tokens(&self) -> u64 {
        let later: u64 = self.later.iter().map(|(_, n)| u64::from(*n)).sum();
        later + self.first.map_or(0, |(_, n)| u64::from(n))
    }

    /// Seconds before each token that did not come with the first one.
    pub(in crate::cli) fn between_tokens(&self) -> impl Iterator<Item = f32> + '_ {
        self.later.iter().flat_map(|(seconds, n)| std::iter::repeat_n(seconds / *n as f32, *n as usize))
    }

    /// Seconds before each chunk but the first: the pauses that a reader sees.
    pub(super) fn pauses(&self) -> impl Iterator<Item = f32> + '_ {
        self.later.iter().map(|(seconds, _)| *seconds)
    }

    /// Mean of [`Self::between_tokens`].
    pub(super) fn mean_between(&self) -> Option<f32> {
        let tokens: u64 = self.later.iter().map(|(_, n)| u64::from(*n)).sum();
        let (first, _) = self.first?;
        (tokens > 0).then(|| ((self.last - first) / tokens as f64) as f32)
    }

    /// When chunks came, in seconds, and how many tokens each brought.
    pub(super) fn times(&self) -> impl Iterator<Item = (f64, u32)> + '_ {
        let first = self.first.into_iter();
        let mut now = self.first.map_or(0.0, |(seconds, _)| seconds);
        first.chain(self.later.iter().map(move |(seconds, n)| {
            now += f64::from(*seconds);
            (now, *n)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_between_tokens_add_up_to_the_time_between_chunks() {
        let mut chunks = Chunks::default();
        assert_eq!((chunks.first(), chunks.mean_between(), chunks.tokens()), (None, None, 0));
        for (seconds, tokens) in [(0.5, 2), (0.75, 1), (0.8, 0), (1.75, 4)] {
            chunks.came(seconds, tokens);
        }
        assert_eq!((chunks.first(), chunks.tokens()), (Some(0.5), 7));
        // the first two tokens came at once; then one after 0.25 s, and four after 1 s, 0.25 s each
        assert_eq!(chunks.between_tokens().collect::<Vec<_>>(), [0.25; 5]);
        assert_eq!(chunks.pauses().collect::<Vec<_>>(), [0.25, 1.0]);
        assert_eq!(chunks.between_tokens().sum::<f32>(), 1.25);
        assert_eq!(chunks.mean_between(), Some(0.25));
        assert_eq!(chunks.times().collect::<Vec<_>>(), [(0.5, 2), (0.75, 1), (1.75, 4)]);
    }

    #[test]
    fn chunks_of_several_tokens_weigh_as_many() {
        let mut chunks = Chunks::default();
        for (seconds, tokens) in [(1.0, 1), (1.1, 1), (2.0, 9)] {
            chunks.came(seconds, tokens);
        }
        let all: Vec<f32> = chunks.between_tokens().collect();
        assert_eq!(all.len(), 10);
        assert!(all.iter().all(|gap| (gap - 0.1).abs() < 1e-6), "{all:?}");
        assert!((f64::from(all.iter().sum::<f32>()) - 1.0).abs() < 1e-6);
        assert!(chunks.mean_between().is_some_and(|mean| (mean - 0.1).abs() < 1e-6));
        // a single chunk has no time between tokens
        let mut whole = Chunks::default();
        whole.came(3.0, 20);
        assert_eq!((whole.first(), whole.tokens(), whole.mean_between()), (Some(3.0), 20, None));
        assert_eq!(whole.between_tokens().count(), 0);
    }
}
