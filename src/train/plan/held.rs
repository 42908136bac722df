//! The held text of a language-modelling job.

use super::{Inputs, violation};
use crate::{
    admission::params::Violation,
    train::{
        dataset::Dataset,
        encode::{Encoded, TextCodec, encode},
        validate::{LabelSet, check_validation},
    },
};

/// Its examples, if there is one; problems of its lines, or of the task, are added to the others.
pub(super) fn examples(
    inputs: &Inputs<'_>,
    codec: &TextCodec,
    max_length: usize,
    problems: &mut Vec<Violation>,
) -> Vec<Encoded> {
    let (Some(bytes), task) = (inputs.forgetting, inputs.params.task) else { return Vec::new() };
    if !task.generates() {
        problems.push(violation("forgetting", format!("is for language modelling, this job is {}", task.as_str())));
        return Vec::new();
    }
    let (data, mut report) = Dataset::parse(bytes);
    let none = LabelSet::default();
    check_validation(&data, &Dataset::default(), task, &none, &mut report);
    let held = encode(&data, codec, &none, max_length, &mut report);
    problems.extend(report.violations("forgetting"));
    held
}
