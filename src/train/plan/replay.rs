//! The texts that the divergence from the base is taken on.

use super::{Inputs, violation};
use crate::{
    admission::params::Violation,
    delta::Task,
    train::{
        dataset::{Dataset, Format},
        encode::{Encoded, TextCodec, encode},
        validate::{LabelSet, check_common},
    },
};

/// They, if there are some; problems of their lines, and what they cannot be had with, are added to the others, and
/// warnings of their lines (those that are cut) to the plan's.
pub(super) fn examples(
    inputs: &Inputs<'_>,
    codec: &TextCodec,
    max_length: usize,
    problems: &mut Vec<Violation>,
    warnings: &mut Vec<Violation>,
) -> Vec<Encoded> {
    let Some(bytes) = inputs.replay else { return Vec::new() };
    let params = inputs.params;
    if params.hyper.kl_to_base.is_none_or(|kl| kl == 0.0) {
        let message =
            "has texts that hyper.kl_to_base is taken on, and that is 0: set it above 0, or leave the texts out";
        problems.push(violation("replay", message));
        return Vec::new();
    }
    if !params.task.generates() {
        return Vec::new(); // kl_to_base itself is refused
    }
    let (data, mut report) = Dataset::parse(bytes);
    if let (Task::Seq2Seq, Some(format)) = (params.task, data.format.filter(|f| *f != Format::PromptCompletion)) {
        let message = format!(
            "has {} lines; hyper.kl_to_base needs the source of each text on an encoder-decoder: {{prompt, completion}}",
            format.as_str()
        );
        problems.push(violation("replay", message));
        return Vec::new();
    }
    let none = LabelSet::default();
    check_common(&data, params.task, &none, &mut report);
    let texts = encode(&data, codec, &none, max_length, &mut report);
    problems.extend(report.violations("replay"));
    warnings.extend(super::warnings("replay", &report));
    texts
}

#[cfg(test)]
mod tests {
    use super::super::{
        BaseInfo, Prepared, prepare,
        tests::{lora, params},
    };
    use super::*;
    use crate::{
        admission::train_params::{ResolvedTraining, TrainParams},
        train::{
            encode::tests::byte_codec,
            spec::{BaseShape, tests::table},
        },
    };

    fn plan(params: &TrainParams, train: &str, replay: Option<&str>) -> Result<Prepared, Vec<Violation>> {
        let sites = table(true);
        let encoder_decoder = params.task == Task::Seq2Seq;
        let shape =
            BaseShape { sites: &sites, hidden: 8, vocab: 300, causal: true, encoder_decoder, inner: None, base: None };
        let inputs = Inputs {
            params,
            train: train.as_bytes(),
            validation: None,
            forgetting: None,
            replay: replay.map(str::as_bytes),
            start: None,
        };
        let start = encoder_decoder.then_some(0);
        prepare(inputs, BaseInfo { shape, max_positions: 64 }, &byte_codec(true).with_decoder_start(start))
    }

    fn holds(task: Task, kl: Option<f64>) -> TrainParams {
        let mut wanted = params(task, lora());
        wanted.hyper.kl_to_base = kl;
        wanted
    }

    const TEXTS: &str = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
    const PAIRS: &str = "{\"prompt\": \"p\", \"completion\": \"a\"}\n{\"prompt\": \"q\", \"completion\": \"b\"}\n";

    #[test]
    fn they_are_counted_cut_with_a_warning_and_in_the_estimate() {
        let wanted = holds(Task::CausalLm, Some(0.5));
        let alone = plan(&wanted, TEXTS, None).unwrap();
        assert!(alone.replay.is_empty() && alone.reply.resolved.replay_examples == 0);
        // plain texts go in pieces, as the job's own do
        let long = "long ".repeat(60);
        let pieces = plan(&wanted, TEXTS, Some(&format!("{TEXTS}{{\"text\": \"{long}\"}}\n"))).unwrap();
        assert!(pieces.replay.len() > 3 && pieces.reply.resolved.replay_examples as usize == pieces.replay.len());
        let row = |text: &str| format!("{{\"prompt\": \"p\", \"completion\": \" {text}\"}}\n");
        let with = plan(&wanted, TEXTS, Some(&(row("short") + &row("words") + &row(&long)))).unwrap();
        assert_eq!((with.replay.len(), with.reply.resolved.replay_examples), (3, 3));
        assert!((40..=64).contains(&with.replay[2].tokens.len()), "{:?}", with.replay[2]);
        let told = |w: &Violation| w.field.starts_with("replay line 3") && w.code == "TOO_LONG";
        assert!(with.reply.warnings.iter().any(told), "{:?}", with.reply.warnings);
        assert!(with.reply.memory.activations > alone.reply.memory.activations, "they are longer than the examples");
        assert_eq!(with.train, alone.train);
        // a record without them is what it was
        let stored = serde_json::to_string(&alone.reply.resolved).unwrap();
        assert!(!stored.contains("replay"), "{stored}");
        assert_eq!(serde_json::from_str::<ResolvedTraining>(&stored).unwrap(), alone.reply.resolved);
        assert_eq!(plan(&holds(Task::Seq2Seq, Some(0.5)), PAIRS, Some(PAIRS)).unwrap().replay.len(), 2);
    }

    #[test]
    fn what_they_cannot_be_is_refused_by_name() {
        let refused = |params: TrainParams, train: &str, replay: &str| {
            let found = plan(&params, train, Some(replay)).unwrap_err();
            let one = found.iter().find(|v| v.field.starts_with("replay")).unwrap_or_else(|| panic!("{found:?}"));
            (one.field.clone(), one.code.clone(), one.message.clone())
        };
        for kl in [None, Some(0.0)] {
            let (field, _, message) = refused(holds(Task::CausalLm, kl), TEXTS, TEXTS);
            assert!(field == "replay" && message.contains("hyper.kl_to_base"), "{field} {message}");
        }
        let (field, code, _) = refused(holds(Task::CausalLm, Some(1.0)), TEXTS, "");
        assert_eq!((field.as_str(), code.as_str()), ("replay", "EMPTY_FILE"));
        let (field, code, _) = refused(holds(Task::CausalLm, Some(1.0)), TEXTS, "{\"text\": 1}\n");
        assert_eq!((field.as_str(), code.as_str()), ("replay line 1 /text", "WRONG_TYPE"));
        let (field, _, message) = refused(holds(Task::Seq2Seq, Some(1.0)), PAIRS, TEXTS);
        assert!(
            field == "replay" && message.contains("source") && message.contains("{prompt, completion}"),
            "{message}"
        );
        let labels = "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"b\", \"label\": \"y\"}\n";
        let found = plan(&holds(Task::SeqCls, Some(1.0)), labels, Some(TEXTS)).unwrap_err();
        assert_eq!(found.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(), ["hyper.kl_to_base"]);
    }
}
