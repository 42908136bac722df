//! Answers that are compared or judged: texts, or turns that follow a conversation.

use serde_json::Value;

use super::{Example, Fields, Said, kind};
use crate::{admission::params::ChatMessage, train::issue::Code};

impl Fields<'_> {
    pub(super) fn pair(&mut self) -> Option<Example> {
        let prompt = self.said("prompt");
        let (chosen, rejected) = (self.answer("chosen", prompt.as_ref()), self.answer("rejected", prompt.as_ref()));
        let (prompt, chosen, rejected) = (prompt?, chosen?, rejected?);
        if chosen == rejected {
            self.error(Code::SameAnswers, "/rejected", "is the same as chosen: there is nothing to prefer");
            return None;
        }
        Some(Example::Pair { prompt, chosen, rejected })
    }

    pub(super) fn rated(&mut self) -> Option<Example> {
        let prompt = self.said("prompt");
        let (completion, good) = (self.answer("completion", prompt.as_ref()), self.verdict());
        Some(Example::Rated { prompt: prompt?, completion: completion?, good: good? })
    }

    fn verdict(&mut self) -> Option<bool> {
        match self.value("label")? {
            Value::Bool(good) => Some(*good),
            other => {
                let message = format!("is {}; true (a good answer) or false is needed", kind(other));
                self.error(Code::WrongType, "/label", message);
                None
            }
        }
    }

    /// A text, or a conversation that ends with the user.
    fn said(&mut self, field: &str) -> Option<Said> {
        match self.value(field)? {
            Value::String(text) => Some(Said::Text(text.clone())),
            Value::Array(_) => {
                let turns = self.message_list(field)?;
                let skip = usize::from(turns.first().is_some_and(|m| m.role == "system"));
                let in_turn = self.take_turns(field, &turns, skip, "user");
                if in_turn && turns.last().is_none_or(|m| m.role != "user") {
                    self.error(Code::RolesNotAlternating, &format!("/{field}"), "must end with a message of the user");
                    return None;
                }
                in_turn.then_some(Said::Turns(turns))
            }
            other => self.not_said(field, other),
        }
    }

    /// An answer in the form of its prompt: a text that is not empty, or turns from the assistant's first to its last.
    fn answer(&mut self, field: &str, prompt: Option<&Said>) -> Option<Said> {
        match (self.value(field)?, prompt) {
            (Value::String(text), None | Some(Said::Text(_))) => {
                if text.trim().is_empty() {
                    let message = "is empty: there is nothing to learn";
                    self.error(Code::EmptyCompletion, &format!("/{field}"), message);
                    return None;
                }
                Some(Said::Text(text.clone()))
            }
            (Value::Array(_), None | Some(Said::Turns(_))) => {
                let turns = self.message_list(field)?;
                self.answers_in_turn(field, &turns).then_some(Said::Turns(turns))
            }
            (Value::String(_) | Value::Array(_), Some(other)) => {
                let form = if matches!(other, Said::Text(_)) { "a string" } else { "an array of messages" };
                let message = format!("has another form than the prompt, which is {form}");
                self.error(Code::WrongType, &format!("/{field}"), message);
                None
            }
            (other, _) => self.not_said(field, other),
        }
    }

    fn answers_in_turn(&mut self, field: &str, turns: &[ChatMessage]) -> bool {
        let in_turn = self.take_turns(field, turns, 0, "assistant");
        if in_turn && turns.last().is_none_or(|m| m.role != "assistant") {
            self.error(Code::NoAssistant, &format!("/{field}"), "must end with a message of the assistant");
            return false;
        }
        in_turn
    }

    fn not_said<T>(&mut self, field: &str, value: &Value) -> Option<T> {
        let message = format!("is {}, a string or an array of messages is needed", kind(value));
        self.error(Code::WrongType, &format!("/{field}"), message);
        None
    }
}
