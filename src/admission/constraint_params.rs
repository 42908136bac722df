//! What a request says an output must be.

use super::{check::Problems, params::GenerateParams};

/// Longest JSON schema, bytes.
const MAX_SCHEMA_BYTES: usize = 64 << 10;
/// Longest regular expression, bytes: what they cost grows faster than they do.
pub const MAX_REGEX_BYTES: usize = 4 << 10;
/// Longest grammar, bytes.
const MAX_LARK_BYTES: usize = 16 << 10;
/// Most texts to choose from.
const MAX_CHOICES: usize = 1000;
/// Longest of them, bytes.
const MAX_CHOICE_BYTES: usize = 1024;
/// Longest of them together, bytes.
const MAX_CHOICES_BYTES: usize = 64 << 10;

/// What an output must be, from its first character to its last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConstraintParams {
    /// JSON that is valid by this schema.
    JsonSchema(String),
    /// A JSON object.
    JsonObject,
    /// A text that matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this language, as a grammar in Lark's notation.
    Lark(String),
}

impl ConstraintParams {
    /// The field that it comes in.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "options.json_schema",
            Self::JsonObject => "options.json_object",
            Self::Regex(_) => "options.regex",
            Self::Choice(_) => "options.choice",
            Self::Lark(_) => "options.lark_grammar",
        }
    }

    fn check(&self, problems: &mut Problems) {
        let mut size = |text: &str, most: usize| {
            problems.require((1..=most).contains(&text.len()), self.field(), || {
                format!("is {} bytes long; accepted are 1 to {most}", text.len())
            });
        };
        match self {
            Self::JsonSchema(schema) => size(schema, MAX_SCHEMA_BYTES),
            Self::JsonObject => {}
            Self::Regex(regex) => size(regex, MAX_REGEX_BYTES),
            Self::Lark(grammar) => size(grammar, MAX_LARK_BYTES),
            Self::Choice(texts) => check_choice(texts, problems),
        }
    }
}

fn check_choice(texts: &[String], problems: &mut Problems) {
    let at = "options.choice.texts";
    let (count, bytes) = (texts.len(), texts.iter().map(String::len).sum::<usize>());
    problems.require((1..=MAX_CHOICES).contains(&count), at, || {
        format!("has {count} entries; accepted are 1 to {MAX_CHOICES}")
    });
    problems.require(bytes <= MAX_CHOICES_BYTES, at, || {
        format!("are {bytes} bytes together; accepted are up to {MAX_CHOICES_BYTES}")
    });
    for (i, text) in texts.iter().enumerate().take(MAX_CHOICES) {
        problems.require((1..=MAX_CHOICE_BYTES).contains(&text.len()), &format!("{at}[{i}]"), || {
            format!("is {} bytes long; accepted are 1 to {MAX_CHOICE_BYTES}", text.len())
        });
    }
}

impl GenerateParams {
    /// Sizes, and what does not go with a constraint.
    pub(super) fn check_constraint(&self, problems: &mut Problems) {
        let Some(constraint) = &self.constraint else { return };
        constraint.check(problems);
        let given = constraint.field();
        problems.require(self.beams.is_none(), "options.num_beams", || {
            format!("does not go with {given}: beams are not constrained")
        });
        problems.require(!self.ignore_eos, "options.ignore_eos", || {
            format!("does not go with {given}, which says where an output may end")
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::params::ServeError;

    fn fields(constraint: &ConstraintParams) -> Vec<String> {
        let mut problems = Problems::default();
        constraint.check(&mut problems);
        match problems.finish() {
            Ok(()) => vec![],
            Err(ServeError::Invalid(all)) => all.into_iter().map(|v| v.field).collect(),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn what_is_empty_or_too_long_is_named() {
        use ConstraintParams as C;
        let long = |n: usize| "x".repeat(n);
        for fine in [C::JsonSchema("{}".into()), C::JsonObject, C::Regex(long(4096)), C::Choice(vec!["a".into()])] {
            assert!(fields(&fine).is_empty(), "{fine:?}");
        }
        assert_eq!(fields(&C::JsonSchema(String::new())), ["options.json_schema"]);
        assert_eq!(fields(&C::JsonSchema(long((64 << 10) + 1))), ["options.json_schema"]);
        assert_eq!(fields(&C::Regex(long(4097))), ["options.regex"]);
        assert_eq!(fields(&C::Lark(long((16 << 10) + 1))), ["options.lark_grammar"]);
        assert_eq!(fields(&C::Choice(vec![])), ["options.choice.texts"]);
        assert_eq!(fields(&C::Choice(vec![long(1); 1001])), ["options.choice.texts"]);
        assert_eq!(fields(&C::Choice(vec![long(1024); 65])), ["options.choice.texts"]);
        let mixed = C::Choice(vec![long(1), String::new(), long(1025)]);
        assert_eq!(fields(&mixed), ["options.choice.texts[1]", "options.choice.texts[2]"]);
    }
}
