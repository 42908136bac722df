//! Classify: labels of texts, or of their tokens, by the head of the delta or of the base.

use std::time::Instant;

use super::{
    encode::Row,
    params::{
        Classification, ClassifyInput, ClassifyParams, ClassifyReply, DeltaChoice, LabelScore, ServeError, TokenLabel,
    },
    service::{Admitted, Input, Service, text_error},
};
use crate::{
    delta::{Problem, Task},
    engine::{Output, Work},
    ids::TenantId,
    text::{Encoded, TextModel},
};

impl Service {
    /// Labels of texts: of each text, or of each of its tokens or words, as the head's task says.
    ///
    /// # Errors
    /// Every kind of [`ServeError`].
    pub async fn classify(&self, tenant: &TenantId, params: ClassifyParams) -> Result<ClassifyReply, ServeError> {
        let arrived = Instant::now();
        params.check()?;
        let arch = &self.parts().base.arch;
        if arch.is_encoder_decoder() {
            return Err(ServeError::WrongTask(format!("the base is {}, which does not classify", arch.kind())));
        }
        let _call = self.enter(tenant)?;
        let admitted = self.admit(tenant, &params.delta, arrived, params.timeout).await?;
        let admitted = admitted.with_priority(params.priority);
        let (task, problem, labels) = self.head(&params.delta, &admitted)?;
        let inputs = params.inputs.clone();
        let room = params.truncate.then(|| self.room(&admitted));
        let encoded = self.blocking(move |parts| encode(&parts.text, &inputs, task, room)).await?;
        check_size(task, problem, &encoded, &labels, self.parts().limits.max_message_bytes)?;
        // a tokenizer may number the second text although the base knows one kind only (RoBERTa)
        let kinds = self.parts().base.arch.token_types as u32;
        // words of which nothing is left have no row; each is answered without a label
        let asked = encoded.iter().zip(&params.inputs).enumerate();
        let rows = asked.filter(|(_, ((e, _), input))| !is_blank(e, input)).map(|(at, ((e, _), _))| Row {
            at,
            input: Input {
                source: vec![],
                tokens: e.ids.clone(),
                types: (kinds > 0).then(|| e.type_ids.iter().map(|t| (*t).min(kinds - 1)).collect()),
            },
            work: if task == Task::TokenCls { Work::ClassifyTokens } else { Work::Classify },
        });
        let results = self.run(rows.collect(), &admitted).await?;
        let ClassifyParams { inputs, threshold, .. } = params;
        let outputs = results.outputs;
        let read = move |_: &_| classifications(outputs, &encoded, &inputs, (problem, threshold), &labels);
        Ok(ClassifyReply {
            results: self.blocking(read).await?,
            problem: (task == Task::SeqCls).then_some(problem),
            served_by: admitted.served_by(),
            usage: results.usage,
            timings: results.timings,
        })
    }

    /// Which head answers, how its outputs are read, and its label names.
    fn head(&self, reference: &DeltaChoice, admitted: &Admitted) -> Result<(Task, Problem, Vec<String>), ServeError> {
        let base = &self.parts().base;
        if let Some(lease) = &admitted.lease {
            let spec = &lease.delta().spec;
            if lease.delta().head().is_some() || !spec.labels.is_empty() {
                let task = if spec.task == Task::TokenCls { Task::TokenCls } else { Task::SeqCls };
                return Ok((task, spec.problem, spec.labels.clone()));
            }
            let task = spec.task.as_str();
            return Err(ServeError::WrongTask(format!(
                "delta {reference:?} is for {task} and has no classification head"
            )));
        }
        match &base.arch.head {
            Some(head) if base.transformer.has_head() => Ok((head.task, head.problem, head.labels.clone())),
            _ => Err(ServeError::WrongTask("the base has no classification head; name a delta that brings one".into())),
        }
    }
}

/// Most numbers that a call's token heads may give: they are all in memory before the best are taken.
const MAX_NUMBERS: usize = 1 << 26;

/// Refuses, before anything is computed, what would be too much to hold or to answer.
fn check_size(
    task: Task,
    problem: Problem,
    encoded: &[(Encoded, bool)],
    labels: &[String],
    max_message_bytes: u64,
) -> Result<(), ServeError> {
    if task == Task::TokenCls {
        let tokens: usize = encoded.iter().map(|(e, _)| e.ids.len()).sum();
        if tokens.saturating_mul(labels.len()) > MAX_NUMBERS {
            let l = labels.len();
            let message =
                format!("{tokens} tokens by {l} labels; at most {MAX_NUMBERS} scores a call: send fewer inputs");
            return Err(ServeError::field("inputs", message));
        }
    } else if problem != Problem::Regression {
        /// A label's index, probability and framing on the wire.
        const FRAME: usize = 12;
        let each: usize = labels.iter().map(|label| label.len() + FRAME).sum();
        let all = encoded.len().saturating_mul(each) as u64;
        if all > max_message_bytes {
            let n = encoded.len();
            let message = format!(
                "{n} inputs with all {} labels make an answer of {all} bytes; at most {max_message_bytes}: send fewer inputs",
                labels.len()
            );
            return Err(ServeError::field("inputs", message));
        }
    }
    Ok(())
}

/// What each input is found to be, from the outputs of those that are not blank.
fn classifications(
    outputs: Vec<Output>,
    encoded: &[(Encoded, bool)],
    inputs: &[ClassifyInput],
    (problem, threshold): (Problem, f32),
    names: &[String],
) -> Result<Vec<Classification>, ServeError> {
    let mut outputs = outputs.into_iter();
    let one = |((encoded, cut), input): (&(Encoded, bool), &ClassifyInput)| {
        let output = if is_blank(encoded, input) { Some(Output::TokenLogits(vec![])) } else { outputs.next() };
        let output = output.ok_or_else(|| ServeError::Internal("an output is missing".into()))?;
        let (labels, tokens, value) = match output {
            Output::Logits(logits) => {
                let (mut labels, value) = read(&logits, problem, names);
                labels.retain(|l| l.probability >= threshold);
                (labels, vec![], value)
            }
            Output::TokenLogits(rows) => (vec![], token_labels(&rows, encoded, input, names), None),
            _ => return Err(ServeError::Internal("the engine mixed up its work".into())),
        };
        let tokens_read = encoded.ids.len() as u32;
        Ok(Classification { labels, tokens, value, tokens_read, cut: *cut })
    };
    encoded.iter().zip(inputs).map(one).collect()
}

/// Tokens of each input, and whether it was cut to `room`.
fn encode(
    text: &TextModel,
    inputs: &[ClassifyInput],
    task: Task,
    room: Option<usize>,
) -> Result<Vec<(Encoded, bool)>, ServeError> {
    let one = |(i, input): (usize, &ClassifyInput)| {
        let field = format!("inputs[{i}]");
        let encoded = match input {
            ClassifyInput::Text { text: first, pair } => text.encode_pair(first, pair.as_deref()),
            ClassifyInput::Words(_) if task != Task::TokenCls => {
                return Err(ServeError::field(format!("{field}.words"), "the head labels whole texts; give text"));
            }
            ClassifyInput::Words(words) => text.encode_words(words),
        };
        let mut encoded = encoded.map_err(|e| text_error(&field, &e))?;
        let cut = room.is_some_and(|room| encoded.cut(room));
        Ok((encoded, cut))
    };
    inputs.iter().enumerate().map(one).collect()
}

/// Words whose every character the tokenizer drops.
fn is_blank(encoded: &Encoded, input: &ClassifyInput) -> bool {
    encoded.ids.is_empty() && matches!(input, ClassifyInput::Words(_))
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

fn score(index: usize, probability: f32, labels: &[String]) -> LabelScore {
    let label = labels.get(index).cloned().unwrap_or_else(|| format!("LABEL_{index}"));
    LabelScore { label, index: index as u32, probability }
}

/// Outputs of a text head: labels with probabilities, or a number.
fn read(outputs: &[f32], problem: Problem, labels: &[String]) -> (Vec<LabelScore>, Option<f32>) {
    match problem {
        Problem::SingleLabel => (ranked(outputs, labels), None),
        Problem::MultiLabel => (sorted(sigmoid(outputs), labels), None),
        Problem::Regression => (vec![], outputs.first().copied()),
    }
}

/// All labels, best first.
fn ranked(logits: &[f32], labels: &[String]) -> Vec<LabelScore> {
    sorted(softmax(logits), labels)
}

/// The probability of each label by itself.
fn sigmoid(logits: &[f32]) -> Vec<f32> {
    logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect()
}

/// All labels with these probabilities, best first.
fn sorted(probabilities: Vec<f32>, labels: &[String]) -> Vec<LabelScore> {
    let mut all: Vec<LabelScore> = probabilities.into_iter().enumerate().map(|(i, p)| score(i, p, labels)).collect();
    all.sort_by(|a, b| b.probability.total_cmp(&a.probability).then(a.index.cmp(&b.index)));
    all
}

/// The most probable label; the first of equals.
fn best(logits: &[f32], labels: &[String]) -> Option<LabelScore> {
    let of_equals = |a: &(usize, &f32), b: &(usize, &f32)| a.1.total_cmp(b.1).then(b.0.cmp(&a.0));
    let (index, _) = logits.iter().enumerate().max_by(of_equals)?;
    Some(score(index, softmax(logits)[index], labels))
}

/// The best label of every word piece of the first text, or of every word; special tokens have none.
fn token_labels(rows: &[Vec<f32>], encoded: &Encoded, input: &ClassifyInput, labels: &[String]) -> Vec<TokenLabel> {
    let best = |row: &Vec<f32>| best(row, labels);
    let text = match input {
        ClassifyInput::Text { text, .. } => text,
        ClassifyInput::Words(words) => return word_labels(rows, encoded, words, best),
    };
    let mut out = Vec::new();
    for (i, logits) in rows.iter().enumerate() {
        let (Some(0), Some(&(start, end))) = (encoded.sources.get(i).copied().flatten(), encoded.offsets.get(i)) else {
            continue;
        };
        let Some(best) = best(logits) else { continue };
        let text = text.get(start..end).unwrap_or_default().to_owned();
        out.push(TokenLabel { start: start as u32, end: end as u32, text, label: Some(best) });
    }
    out
}

/// One label per word: that of its first token, which is what training supervises.
fn word_labels(
    rows: &[Vec<f32>],
    encoded: &Encoded,
    words: &[String],
    best: impl Fn(&Vec<f32>) -> Option<LabelScore>,
) -> Vec<TokenLabel> {
    let mut first: Vec<Option<usize>> = vec![None; words.len()];
    for (row, word) in encoded.words.iter().enumerate().take(rows.len()) {
        let text = encoded.sources.get(row).copied().flatten().and(*word);
        if let Some(place) = text.and_then(|w| first.get_mut(w as usize)) {
            place.get_or_insert(row);
        }
    }
    let mut start = 0;
    let mut out = Vec::with_capacity(words.len());
    for (word, row) in words.iter().zip(first) {
        let end = start + word.len();
        let label = row.and_then(|row| best(&rows[row]));
        out.push(TokenLabel { start: start as u32, end: end as u32, text: word.clone(), label });
        start = end + 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_first_of_the_ranked() {
        let labels = ["a".to_owned(), "b".to_owned()];
        for logits in [vec![1.0, 3.0, 2.0], vec![2.0, 2.0, 1.0], vec![-1e9, -1e9], vec![0.5]] {
            assert_eq!(best(&logits, &labels), ranked(&logits, &labels).into_iter().next());
        }
        assert_eq!(best(&[], &labels), None);
    }

    #[test]
    fn answers_that_nobody_could_hold_are_refused_before_they_are_computed() {
        let encoded = |tokens: usize| (Encoded { ids: vec![1; tokens], ..Encoded::default() }, false);
        let labels: Vec<String> = (0..10_000).map(|i| format!("label {i}")).collect();
        let refused =
            |task, problem, inputs: &[(Encoded, bool)]| match check_size(task, problem, inputs, &labels, 1 << 24) {
                Ok(()) => None,
                Err(e) => Some(e.to_string()),
            };
        let many: Vec<_> = (0..200).map(|_| encoded(512)).collect();
        let single = Problem::SingleLabel;
        assert!(refused(Task::TokenCls, single, &many).is_some_and(|m| m.contains("102400 tokens by 10000 labels")));
        assert_eq!(refused(Task::TokenCls, single, &many[..10]), None);
        assert!(
            refused(Task::SeqCls, single, &many).is_some_and(|m| m.contains("200 inputs") && m.contains("16777216"))
        );
        assert_eq!(refused(Task::SeqCls, single, &many[..10]), None);
        assert_eq!(refused(Task::SeqCls, Problem::Regression, &many), None);
    }

    #[test]
    fn labels_are_ranked_and_their_probabilities_sum_to_one() {
        let labels = ["a".to_owned(), "b".to_owned()];
        let out = ranked(&[1.0, 3.0, 2.0], &labels);
        let names: Vec<_> = out.iter().map(|l| l.label.as_str()).collect();
        assert_eq!(names, ["b", "LABEL_2", "a"]);
        assert!((out.iter().map(|l| l.probability).sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(softmax(&[1000.0, 0.0])[0] > 0.999, "large logits do not overflow");
        let each = sorted(sigmoid(&[-1000.0, 0.0, 1000.0]), &labels);
        let each: Vec<_> = each.iter().map(|l| (l.index, l.probability)).collect();
        assert_eq!(each, [(2, 1.0), (1, 0.5), (0, 0.0)]);
    }

    /// `[CLS] san francisco(2 pieces) '' is [SEP]`, cut ahead of `is`.
    fn words() -> (Encoded, Vec<String>) {
        let encoded = Encoded {
            ids: vec![1, 10, 11, 12, 13, 2],
            type_ids: vec![0; 6],
            offsets: vec![(0, 0), (0, 3), (0, 4), (4, 9), (0, 2), (0, 0)],
            sources: vec![None, Some(0), Some(0), Some(0), Some(0), None],
            words: vec![None, Some(0), Some(1), Some(1), Some(3), None],
        };
        (encoded, ["san", "francisco", "", "is"].map(str::to_owned).to_vec())
    }

    #[test]
    fn a_word_has_the_label_of_its_first_token_and_none_without_one() {
        let (mut encoded, words) = words();
        let labels = ["O".to_owned(), "B".to_owned()];
        let rows: Vec<Vec<f32>> = [0, 1, 1, 0, 0, 0].iter().map(|&b| vec![1.0 - b as f32, b as f32]).collect();
        let input = ClassifyInput::Words(words);
        let names = |encoded: &Encoded, rows: &[Vec<f32>]| -> Vec<Option<String>> {
            token_labels(rows, encoded, &input, &labels).into_iter().map(|t| t.label.map(|l| l.label)).collect()
        };
        let (b, o) = (Some("B".to_owned()), Some("O".to_owned()));
        assert_eq!(names(&encoded, &rows), [b.clone(), b.clone(), None, o]);
        let all = token_labels(&rows, &encoded, &input, &labels);
        assert_eq!((all[1].start, all[1].end, all[3].start, all[3].text.as_str()), (4, 13, 15, "is"));
        assert!(encoded.cut(5) && !encoded.cut(5));
        assert_eq!((encoded.ids.clone(), encoded.words.last()), (vec![1, 10, 11, 12, 2], Some(&None)));
        assert_eq!(names(&encoded, &rows[..5]), [b.clone(), b, None, None]);
        assert!(encoded.cut(0) && encoded.ids == [1, 2], "special tokens stay");
    }
}
