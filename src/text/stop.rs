//! Stop texts: ends a stream at the first of several texts, and holds back what may become one.

/// What [`StopStrings::push`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that may be sent: it is before any stop text.
    pub text: String,
    /// Index of the stop text that appeared; nothing may be pushed after it.
    pub matched: Option<usize>,
}

/// Watches a stream of text for stop texts. Of several, the one that is complete first wins, and among those the one
/// that began first; so how the stream is cut into pieces changes nothing.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Watches for these texts; empty ones are left out.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        self.held.push_str(piece);
        let hits = self.stops.iter().enumerate().filter(|(_, s)| !s.is_empty());
        let hits = hits.filter_map(|(i, s)| self.held.find(s.as_str()).map(|at| (at + s.len(), at, i)));
        if let Some((_, start, index)) = hits.min() {
            self.held.truncate(start);
            return StopOutcome { text: std::mem::take(&mut self.held), matched: Some(index) };
        }
        let rest = self.held.split_off(self.sendable());
        let text = std::mem::replace(&mut self.held, rest);
        StopOutcome { text, matched: None }
    }

    /// The end of the stream: what was held back turned out not to be a stop text.
    pub fn finish(self) -> String {
        self.held
    }

    /// Where the longest end of the held text that begins a stop text starts.
    fn sendable(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let begins = |end: &str| self.stops.iter().any(|s| s.starts_with(end));
        let starts = self.held.char_indices().map(|(at, _)| at).skip_while(|at| *at < from);
        starts.into_iter().find(|&at| begins(&self.held[at..])).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(stops: &[String], pieces: &[&str]) -> (String, Option<usize>) {
        let mut watch = StopStrings::new(stops.to_vec());
        let mut out = String::new();
        for piece in pieces {
            let outcome = watch.push(piece);
            out.push_str(&outcome.text);
            if outcome.matched.is_some() {
                return (out, outcome.matched);
            }
        }
        out.push_str(&watch.finish());
        (out, None)
    }

    /// The law, letter by letter: the first end of a stop text, then its earliest start.
    fn reference(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let done = stops.iter().enumerate().filter(|(_, s)| !s.is_empty());
            let done = done.filter(|(_, s)| text.as_bytes()[..end].ends_with(s.as_bytes()));
            if let Some((start, i)) = done.map(|(i, s)| (end - s.len(), i)).min() {
                return (text[..start].to_owned(), Some(i));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn the_cut_into_pieces_changes_nothing(
            stops in proptest::collection::vec("[abé]{0,4}", 0..4),
            pieces in proptest::collection::vec("[abcé]{0,5}", 0..8),
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(whole(&stops, &pieces), reference(&stops, &pieces.concat()));
        }
    }

    #[test]
    fn a_partial_match_is_held_back_and_released() {
        let mut watch = StopStrings::new(vec!["END".into()]);
        assert_eq!(watch.push("the E").text, "the ");
        assert_eq!(watch.push("N").text, "");
        assert_eq!(watch.push("x").text, "ENx");
        assert_eq!(watch.push("EEND!"), StopOutcome { text: "E".into(), matched: Some(0) });
    }

    #[test]
    fn without_stop_texts_nothing_is_held() {
        assert_eq!(
            StopStrings::new(vec![String::new()]).push("abc"),
            StopOutcome { text: "abc".into(), matched: None }
        );
    }
}
