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

/// Its examples, if there is one; problems of its lines, or of the task, are added to the others, and
/// warnings of its lines to the plan's.
pub(super) fn examples(
    inputs: &Inputs<'_>,
    codec: &TextCodec,
    max_length: usize,
    problems: &mut Vec<Violation>,
    warnings: &mut Vec<Violation>,
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
    warnings.extend(super::warnings("forgetting", &report));
    held
}

#[cfg(test)]
mod tests {
    use super::super::{
        BaseInfo, prepare,
        tests::{lora, params},
    };
    use super::*;
    use crate::{
        delta::Task,
        train::{
            encode::tests::byte_codec,
            spec::{BaseShape, tests::table},
        },
    };

    #[test]
    fn a_held_line_that_is_cut_is_told_in_the_plan() {
        let sites = table(true);
        let shape = BaseShape {
            sites: &sites,
            hidden: 8,
            vocab: 300,
            causal: true,
            encoder_decoder: false,
            inner: None,
            base: None,
        };
        let (params, train) = (params(Task::CausalLm, lora()), "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
        let row = |text: &str| format!("{{\"prompt\": \"p\", \"completion\": \" {text}\"}}\n");
        let long = row("short") + &row(&"long ".repeat(60));
        let inputs = Inputs {
            params: &params,
            train: train.as_bytes(),
            validation: None,
            forgetting: Some(long.as_bytes()),
            replay: None,
            start: None,
        };
        let plan = prepare(inputs, BaseInfo { shape, max_positions: 64 }, &byte_codec(true)).unwrap();
        let told = |w: &&Violation| w.field.starts_with("forgetting line 2") && w.code == "TOO_LONG";
        assert!(plan.reply.warnings.iter().any(|w| told(&w)), "{:?}", plan.reply.warnings);
    }
}
