//! The base's vocabulary as the library takes it.

use std::sync::Arc;

use llguidance::{
    ParserFactory,
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};

use crate::text::{TextModel, TokenBytes};

/// Longest token that the library's tree takes.
const MAX_TOKEN_BYTES: usize = 1000;

/// Which token is which text, and what compiles grammars over them.
pub(super) struct Vocabulary {
    pub(super) factory: ParserFactory,
    /// Tokens, rounded up to whole words of 32 bits.
    pub(super) size: u32,
    /// Bits of the tokens that have a text.
    pub(super) text: Vec<u32>,
    /// Where decoders drop the first space, the tokens that then have no text; each token has a second id, `size` further on, for
    /// what is left of it.
    pub(super) blanks: Option<Vec<u32>>,
}

impl Vocabulary {
    /// Of a base whose outputs `ends` end. Takes a while.
    pub(super) fn new(text: &TextModel, ends: &[u32]) -> Result<Self, String> {
        let TokenBytes { mut words, drops_space } = text.token_bytes().map_err(|e| e.to_string())?;
        for (id, word) in (0u32..).zip(&mut words) {
            if ends.contains(&id) || word.len() > MAX_TOKEN_BYTES {
                word.clear();
            }
        }
        Self::of(words, drops_space)
    }

    fn of(mut words: Vec<Vec<u8>>, drops_space: bool) -> Result<Self, String> {
        words.resize(words.len().next_multiple_of(32), Vec::new());
        let size = words.len() as u32;
        let bit = |(i, word): (usize, &Vec<u8>)| u32::from(!word.is_empty()) << i;
        let text = words.chunks(32).map(|chunk| chunk.iter().enumerate().map(bit).sum()).collect();
        let mut blanks = None;
        if drops_space {
            let rest = |word: &Vec<u8>| word.strip_prefix(b" ").unwrap_or(word).to_vec();
            let first: Vec<Vec<u8>> = words.iter().map(rest).collect();
            blanks = Some((0..size).filter(|id| words[*id as usize] == b" ").collect());
            words.extend(first);
        }
        // an id of its own for the end: which tokens end an output differs between requests
        words.push(Vec::new());
        let end = words.len() as u32 - 1;
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(|e| e.to_string())?;
        Ok(Self { factory, size, text, blanks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_a_bit_and_where_a_space_is_dropped_a_second_id() {
        let words: Vec<Vec<u8>> = [" a", "a", "", " ", "b"].iter().map(|w| w.as_bytes().to_vec()).collect();
        let plain = Vocabulary::of(words.clone(), false).expect("a vocabulary");
        assert_eq!((plain.size, &plain.text[..], &plain.blanks), (32, &[0b11011][..], &None));
        assert_eq!(plain.factory.tok_env().tok_trie().vocab_size(), 33);
        let dropping = Vocabulary::of(words, true).expect("a vocabulary");
        assert_eq!((dropping.size, &dropping.text[..], &dropping.blanks), (32, &[0b11011][..], &Some(vec![3])));
        let env = dropping.factory.tok_env();
        let trie = env.tok_trie();
        assert_eq!(trie.vocab_size(), 65);
        let second: Vec<&[u8]> = (32..37).map(|id| trie.token(id)).collect();
        assert_eq!(second, [&b"a"[..], b"a", b"", b"", b"b"]);
    }
}
