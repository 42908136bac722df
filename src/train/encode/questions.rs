//! Prompts as serving reads them: what an evaluation that generates asks.

use super::{ChatCodec, TextCodec};
use crate::train::dataset::Example;

/// A prompt with its right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::train) struct Asked {
    /// Token ids that are continued; of an encoder-decoder, the start of its output.
    pub(in crate::train) prompt: Vec<u32>,
    /// What an encoder-decoder's encoder reads; else empty.
    pub(in crate::train) source: Vec<u32>,
    /// The right answer.
    pub(in crate::train) gold: String,
    /// Tokens of the right answer, with one that ends it.
    pub(in crate::train) gold_tokens: usize,
}

impl TextCodec {
    /// What is asked of an example: the prompt whose completion is known, or a conversation up to the assistant's last turn.
    /// `None` where there is no such thing, or nothing to read.
    ///
    /// # Errors
    /// The tokenizer's or the chat template's message.
    pub(in crate::train) fn ask(&self, example: &Example) -> Result<Option<Asked>, String> {
        let (tokens, gold) = match example {
            Example::PromptCompletion { prompt, completion } => ((self.encode)(prompt, true)?, completion),
            Example::Messages(messages) => {
                let (Some(chat), Some((last, before))) = (&self.chat, messages.split_last()) else { return Ok(None) };
                if last.role != "assistant" {
                    return Ok(None);
                }
                let ChatCodec { guard, render, encode } = chat;
                let (guarded, marked) = guard(before);
                (encode(&render(&guarded, true)?, &marked)?, &last.content)
            }
            _ => return Ok(None),
        };
        if tokens.is_empty() {
            return Ok(None);
        }
        let gold_tokens = self.plain(gold)?.len() + 1;
        let (prompt, source) = match self.decoder_start {
            Some(start) => (vec![start], tokens),
            None => (tokens, Vec::new()),
        };
        Ok(Some(Asked { prompt, source, gold: gold.clone(), gold_tokens }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::params::ChatMessage,
        train::{
            dataset::Dataset,
            encode::{encode, tests::byte_codec},
            validate::LabelSet,
        },
    };

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(|b| 10 + u32::from(b)).collect()
    }

    #[test]
    fn prompts_are_read_as_they_are_served() {
        let codec = byte_codec(true);
        let pair = Example::PromptCompletion { prompt: "ab".into(), completion: " cd ".into() };
        let asked = codec.ask(&pair).unwrap().unwrap();
        assert_eq!((asked.prompt, asked.source), ([vec![1], ids("ab")].concat(), vec![]));
        assert_eq!((asked.gold.as_str(), asked.gold_tokens), (" cd ", 5));
        let to_encode = byte_codec(true).with_decoder_start(Some(3));
        let asked = to_encode.ask(&pair).unwrap().unwrap();
        assert_eq!((asked.prompt, asked.source), (vec![3], [vec![1], ids("ab")].concat()));
        let nothing = Example::PromptCompletion { prompt: String::new(), completion: "c".into() };
        assert_eq!(byte_codec(false).ask(&nothing), Ok(None), "there is no token to continue");
        assert_eq!(codec.ask(&Example::Text("ab".into())), Ok(None));
    }

    #[test]
    fn a_conversation_is_asked_for_its_last_answer_behind_what_training_reads() {
        let codec = byte_codec(false);
        let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
        let mut turns =
            vec![message("user", "q"), message("assistant", "x"), message("user", "r"), message("assistant", "yes")];
        let asked = codec.ask(&Example::Messages(turns.clone())).unwrap().unwrap();
        assert_eq!((asked.prompt.clone(), asked.gold.as_str()), (ids("<u>q\n<a>x\n<u>r\n<a>"), "yes"));
        let line = r#"{"messages": [{"role":"user","content":"q"},{"role":"assistant","content":"x"},
            {"role":"user","content":"r"},{"role":"assistant","content":"yes"}]}"#
            .replace('\n', " ");
        let (data, mut report) = Dataset::parse(line.as_bytes());
        let trained = encode(&data, &codec, &LabelSet::new(vec![]), 64, &mut report);
        assert!(report.is_ok() && trained[0].tokens.starts_with(&asked.prompt), "{report:?}");
        turns.pop();
        assert_eq!(codec.ask(&Example::Messages(turns)), Ok(None), "the user has the last word");
    }
}
