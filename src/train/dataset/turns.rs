//! Conversations.

use serde_json::Value;

use super::{Example, Fields, kind};
use crate::{admission::params::ChatMessage, train::issue::Code};

impl Fields<'_> {
    pub(super) fn messages(&mut self) -> Option<Example> {
        let messages = self.message_list("messages")?;
        let before = self.report.errors;
        self.check_turns(&messages);
        (self.report.errors == before).then_some(Example::Messages(messages))
    }

    /// The messages of a field, each good by itself.
    pub(super) fn message_list(&mut self, field: &str) -> Option<Vec<ChatMessage>> {
        let list = self.array(field)?;
        let messages: Vec<_> =
            list.iter().enumerate().filter_map(|(i, value)| self.message(&format!("/{field}/{i}"), value)).collect();
        (messages.len() == list.len()).then_some(messages)
    }

    fn message(&mut self, at: &str, value: &Value) -> Option<ChatMessage> {
        let Value::Object(object) = value else {
            let message = format!("is {}, an object with role and content is needed", kind(value));
            self.error(Code::WrongType, at, message);
            return None;
        };
        let mut text = |field: &str| match object.get(field) {
            Some(Value::String(s)) => Some(s.clone()),
            Some(other) => {
                let message = format!("is {}, a string is needed", kind(other));
                self.error(Code::WrongType, &format!("{at}/{field}"), message);
                None
            }
            None => {
                self.error(Code::MissingField, &format!("{at}/{field}"), "is missing");
                None
            }
        };
        let (role, content) = (text("role"), text("content"));
        let (role, content) = (role?, content?);
        if !matches!(role.as_str(), "system" | "user" | "assistant") {
            let message = format!("is {role:?}; accepted are system, user, assistant");
            self.error(Code::BadRole, &format!("{at}/role"), message);
            return None;
        }
        if role == "assistant" && content.trim().is_empty() {
            self.error(Code::EmptyCompletion, &format!("{at}/content"), "is empty: there is nothing to learn");
            return None;
        }
        Some(ChatMessage { role, content })
    }

    /// At most one system message, first; then user and assistant in turn, and at least one assistant.
    fn check_turns(&mut self, messages: &[ChatMessage]) {
        let skip = usize::from(messages.first().is_some_and(|m| m.role == "system"));
        if self.take_turns("messages", messages, skip, "user") && !messages.iter().any(|m| m.role == "assistant") {
            self.error(Code::NoAssistant, "/messages", "has no assistant message: there is nothing to learn");
        }
    }

    /// Whether user and assistant take turns after the first `skip` messages of a field, beginning with this role.
    pub(super) fn take_turns(&mut self, field: &str, messages: &[ChatMessage], skip: usize, first: &str) -> bool {
        let starts = usize::from(first == "assistant");
        for (i, m) in messages.iter().enumerate().skip(skip) {
            let want = ["user", "assistant"][(i - skip + starts) % 2];
            if m.role != want {
                let message = format!("is {:?} where {want:?} is due: user and assistant must take turns", m.role);
                self.error(Code::RolesNotAlternating, &format!("/{field}/{i}/role"), message);
                return false;
            }
        }
        true
    }
}
