//! JSON schemas before they are compiled: what the library would pass over is refused by its place.

use llguidance::JsonCompileOptions;
use serde_json::{Map, Value};

use crate::admission::params::{MAX_REGEX_BYTES, Violation};

/// Keywords whose value is one schema.
const SCHEMA: [&str; 3] = ["additionalProperties", "additionalItems", "items"];
/// Keywords whose value is a list of schemas.
const SCHEMAS: [&str; 5] = ["allOf", "anyOf", "oneOf", "prefixItems", "items"];
/// Keywords whose value is schemas by name.
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Other keywords that are kept to.
const KEPT: [&str; 18] = [
    "type",
    "enum",
    "const",
    "$ref",
    "required",
    "format",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
];
/// Keywords that bound nothing.
const NOTES: [&str; 14] = [
    "$schema",
    "$id",
    "id",
    "$anchor",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentMediaType",
    "contentEncoding",
];

/// White space between the parts of a value: one space, or a line's end with the next line's indentation. A model that likes
/// white space could otherwise say nothing else.
const SPACE: &str = r"( |\r?\n[ \t]{0,40})";

/// Most problems that are told.
const TOLD: usize = 20;

/// The schema as the library takes it.
///
/// # Errors
/// Text that is no JSON object, keywords that would not be kept to, texts in it that are too long.
pub(super) fn parse(text: &str) -> Result<Value, Vec<Violation>> {
    let at = "options.json_schema";
    let problem = |message: String| vec![Violation { field: at.into(), code: String::new(), message }];
    let mut schema: Value = serde_json::from_str(text).map_err(|e| problem(format!("is not JSON: {e}")))?;
    if !schema.is_object() {
        return Err(problem("must be a JSON object".into()));
    }
    let mut problems = Vec::new();
    check(&schema, "#", &mut problems);
    if !problems.is_empty() {
        problems.truncate(TOLD);
        return Err(problems.into_iter().flat_map(problem).collect());
    }
    options().apply_to(&mut schema);
    Ok(schema)
}

/// The schema of any object.
pub(super) fn object() -> Value {
    let mut schema = serde_json::json!({"type": "object"});
    options().apply_to(&mut schema);
    schema
}

fn options() -> JsonCompileOptions {
    JsonCompileOptions { whitespace_pattern: Some(SPACE.into()), ..JsonCompileOptions::default() }
}

/// As deep as the JSON's nesting, which its parser bounds.
fn check(schema: &Value, at: &str, problems: &mut Vec<String>) {
    // whatever else stands where a schema should, the library names
    let Some(schema) = schema.as_object() else { return };
    for (keyword, value) in schema {
        let keyword = keyword.as_str();
        let here = format!("{at}/{keyword}");
        match value {
            Value::Array(all) if SCHEMAS.contains(&keyword) => {
                all.iter().enumerate().for_each(|(i, each)| check(each, &format!("{here}/{i}"), problems));
            }
            _ if SCHEMA.contains(&keyword) => check(value, &here, problems),
            Value::Object(all) if NAMED.contains(&keyword) => check_named(all, &here, problems),
            _ if NAMED.contains(&keyword) || SCHEMAS.contains(&keyword) => {}
            _ if NOTES.contains(&keyword) => {}
            _ if KEPT.contains(&keyword) => check_texts(value, &here, problems),
            _ => problems.push(format!("{here}: the keyword {keyword:?} is not supported")),
        }
    }
}

fn check_named(all: &Map<String, Value>, at: &str, problems: &mut Vec<String>) {
    for (name, schema) in all {
        check_text(name, at, problems);
        check(schema, &format!("{at}/{name}"), problems);
    }
}

/// Constants, patterns and names.
fn check_texts(value: &Value, at: &str, problems: &mut Vec<String>) {
    match value {
        Value::String(text) => check_text(text, at, problems),
        Value::Array(all) => all.iter().for_each(|each| check_texts(each, at, problems)),
        Value::Object(all) => all.iter().for_each(|(name, each)| {
            check_text(name, at, problems);
            check_texts(each, at, problems);
        }),
        _ => {}
    }
}

/// Combinations of schemas may copy a text many times.
fn check_text(text: &str, at: &str, problems: &mut Vec<String>) {
    if text.len() > MAX_REGEX_BYTES {
        problems.push(format!("{at}: has a text of {} bytes; accepted are up to {MAX_REGEX_BYTES}", text.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        parse(text).err().unwrap_or_default().into_iter().map(|v| v.message).collect()
    }

    #[test]
    fn keywords_that_would_not_be_kept_to_are_named_with_their_place() {
        let schema = r#"{"type": "object", "x-guidance": {"lenient": true}, "properties": {
            "not": {"not": {}}, "a": {"anyOf": [{"type": "string"}, {"minlength": 3}]}, "b": {"items": [{"if": true}]}}}"#;
        let got = problems(schema);
        let expected = [
            "#/x-guidance: the keyword \"x-guidance\" is not supported",
            "#/properties/not/not: the keyword \"not\" is not supported",
            "#/properties/a/anyOf/1/minlength: the keyword \"minlength\" is not supported",
            "#/properties/b/items/0/if: the keyword \"if\" is not supported",
        ];
        assert_eq!(got, expected);
        assert_eq!(problems(r#"{"$defs": {"a": {"uniqueItems": true}}}"#).len(), 1);
        assert_eq!(
            problems(&format!("{{{}}}", (0..99).map(|i| format!("\"k{i}\":1")).collect::<Vec<_>>().join(","))).len(),
            TOLD
        );
    }

    #[test]
    fn notes_and_constants_are_no_schemas() {
        let schema = r#"{"title": "t", "description": "d", "default": {"not": 1}, "examples": [{"if": 1}], "deprecated": true,
            "enum": [{"not": 1}], "$schema": "https://json-schema.org/draft/2020-12/schema"}"#;
        assert!(problems(schema).is_empty(), "{:?}", problems(schema));
    }

    #[test]
    fn what_is_no_schema_is_said() {
        assert!(problems("{").concat().contains("is not JSON"));
        for text in ["true", "[]", "1", "null"] {
            assert_eq!(problems(text), ["must be a JSON object"]);
        }
        let long = "x".repeat(MAX_REGEX_BYTES + 1);
        for schema in [
            format!(r#"{{"const": "{long}"}}"#),
            format!(r#"{{"enum": [[{{"{long}": 1}}]]}}"#),
            format!(r#"{{"properties": {{"{long}": {{}}}}}}"#),
        ] {
            assert!(problems(&schema).concat().contains("4097 bytes"), "{:?}", problems(&schema));
        }
        assert!(problems(&"[".repeat(5000)).concat().contains("recursion"));
    }
}
