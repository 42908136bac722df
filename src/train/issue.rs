//! Problems of a training data set: one list of all of them, capped, each with a line, a stable code and a JSON pointer.
//!
//! It never decides what to do about them; [`Report::is_ok`] says whether any is an error.

use crate::admission::params::Violation;

/// Most problems that one report lists.
pub const MAX_ISSUES: usize = 1000;

/// Whether a problem stops the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The job is refused.
    Error,
    /// The job runs; the user should know.
    Warning,
}

/// What kind of problem it is; the names are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    /// The line is not JSON.
    NotJson,
    /// The line is not UTF-8.
    NotUtf8,
    /// No examples at all.
    EmptyFile,
    /// Fewer examples than training needs.
    TooFewExamples,
    /// The fields match no known format.
    UnknownFormat,
    /// The line has another format than the first one.
    MixedFormats,
    /// A field of the format is absent.
    MissingField,
    /// A field has another JSON type.
    WrongType,
    /// A role that conversations do not have.
    BadRole,
    /// User and assistant do not take turns.
    RolesNotAlternating,
    /// A conversation without an assistant message.
    NoAssistant,
    /// The base has no chat template, or its template refused the conversation.
    ChatTemplate,
    /// No token of the example carries loss.
    NoSupervisedToken,
    /// Longer than the maximum length; it was cut.
    TooLong,
    /// Nothing to learn in this completion.
    EmptyCompletion,
    /// Nothing to read in this text.
    EmptyText,
    /// A label that is not among the given ones.
    LabelUnknown,
    /// As many tags as words are needed.
    TagLengthMismatch,
    /// The same example as an earlier line.
    Duplicate,
    /// All completions are equal.
    IdenticalCompletions,
    /// All labels are equal: there is nothing to tell apart.
    OneLabel,
    /// The example is in the training data, too.
    TrainValidOverlap,
    /// The format does not fit the task, or the base cannot be trained on it.
    WrongTask,
    /// The tokenizer failed on it.
    Tokenizer,
    /// The preferred answer is the rejected one.
    SameAnswers,
}

impl Code {
    /// The stable name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotJson => "NOT_JSON",
            Self::NotUtf8 => "NOT_UTF8",
            Self::EmptyFile => "EMPTY_FILE",
            Self::TooFewExamples => "TOO_FEW_EXAMPLES",
            Self::UnknownFormat => "UNKNOWN_FORMAT",
            Self::MixedFormats => "MIXED_FORMATS",
            Self::MissingField => "MISSING_FIELD",
            Self::WrongType => "WRONG_TYPE",
            Self::BadRole => "BAD_ROLE",
            Self::RolesNotAlternating => "ROLES_NOT_ALTERNATING",
            Self::NoAssistant => "NO_ASSISTANT",
            Self::ChatTemplate => "CHAT_TEMPLATE",
            Self::NoSupervisedToken => "NO_SUPERVISED_TOKEN",
            Self::TooLong => "TOO_LONG",
            Self::EmptyCompletion => "EMPTY_COMPLETION",
            Self::EmptyText => "EMPTY_TEXT",
            Self::LabelUnknown => "LABEL_UNKNOWN",
            Self::TagLengthMismatch => "TAG_LENGTH_MISMATCH",
            Self::Duplicate => "DUPLICATE",
            Self::IdenticalCompletions => "IDENTICAL_COMPLETIONS",
            Self::OneLabel => "ONE_LABEL",
            Self::TrainValidOverlap => "TRAIN_VALID_OVERLAP",
            Self::WrongTask => "WRONG_TASK",
            Self::Tokenizer => "TOKENIZER",
            Self::SameAnswers => "SAME_ANSWERS",
        }
    }
}

/// One problem.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Issue {
    /// Whether it stops the job.
    pub severity: Severity,
    /// Its kind.
    pub code: Code,
    /// Line in the file, counting from 1; 0 = the whole file.
    pub line: u64,
    /// Where in the line's JSON (RFC 6901); empty = the whole line.
    pub pointer: String,
    /// What is wrong and what is accepted.
    pub message: String,
}

/// Everything that is wrong with a data set.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// The problems, errors and warnings, in the order found; at most [`MAX_ISSUES`].
    pub issues: Vec<Issue>,
    /// There were more than are listed.
    pub truncated: bool,
    /// Errors in all, listed or not.
    pub errors: u64,
    /// Warnings in all, listed or not.
    pub warnings: u64,
}

impl Report {
    /// Whether the data can be trained on.
    pub fn is_ok(&self) -> bool {
        self.errors == 0
    }

    /// Adds an error.
    pub fn error(&mut self, code: Code, line: u64, pointer: impl Into<String>, message: impl Into<String>) {
        self.errors += 1;
        self.push(Issue { severity: Severity::Error, code, line, pointer: pointer.into(), message: message.into() });
    }

    /// Adds a warning.
    pub fn warn(&mut self, code: Code, line: u64, pointer: impl Into<String>, message: impl Into<String>) {
        self.warnings += 1;
        self.push(Issue { severity: Severity::Warning, code, line, pointer: pointer.into(), message: message.into() });
    }

    /// Appends another report.
    pub fn merge(&mut self, other: Report) {
        self.errors += other.errors;
        self.warnings += other.warnings;
        self.truncated |= other.truncated;
        for issue in other.issues {
            self.push(issue);
        }
    }

    /// The errors as field violations; `field` names the request's data field (`train`, `validation`).
    pub fn violations(&self, field: &str) -> Vec<Violation> {
        let errors = self.issues.iter().filter(|i| i.severity == Severity::Error);
        errors
            .map(|i| Violation {
                field: match i.line {
                    0 => field.to_owned(),
                    n => format!("{field} line {n} {}", i.pointer).trim_end().to_owned(),
                },
                code: i.code.as_str().to_owned(),
                message: i.message.clone(),
            })
            .collect()
    }

    // An error that comes after a flood of warnings must still be seen: it takes the place of the last warning.
    fn push(&mut self, issue: Issue) {
        if self.issues.len() < MAX_ISSUES {
            self.issues.push(issue);
            return;
        }
        self.truncated = true;
        if issue.severity == Severity::Error
            && let Some(at) = self.issues.iter().rposition(|i| i.severity == Severity::Warning)
        {
            self.issues.remove(at);
            self.issues.push(issue);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_capped_and_never_hides_its_errors_behind_warnings() {
        let mut r = Report::default();
        for line in 1..=(MAX_ISSUES as u64 + 5) {
            r.warn(Code::Duplicate, line, "", "same as before");
        }
        assert!(r.is_ok() && r.truncated);
        r.error(Code::NotJson, 9999, "", "bad");
        assert_eq!((r.issues.len(), r.errors, r.warnings), (MAX_ISSUES, 1, MAX_ISSUES as u64 + 5));
        assert_eq!(r.violations("train").len(), 1);
        assert_eq!(r.violations("train")[0].field, "train line 9999");
        assert_eq!(serde_json::to_value(Code::NotJson).unwrap(), Code::NotJson.as_str());
    }
}
