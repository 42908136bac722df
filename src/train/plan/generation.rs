//! What evaluations generate: whether prompts are answered, which ones, and how long answers may be.

use std::collections::HashSet;

use rand::seq::SliceRandom as _;

use super::violation;
use crate::{
    admission::{
        params::Violation,
        train_params::{EvalMetric, ResolvedGeneration, TrainParams, Validation},
    },
    train::{
        batches::{Stream, rng},
        dataset::{Dataset, Format},
        encode::{Encoded, TextCodec},
        generate::{MAX_GOLD_TOKENS, Question, Quiz},
        spec::BaseShape,
    },
};

/// Validation examples that are answered unless the request says otherwise.
const EXAMPLES: u32 = 100;
/// New tokens beyond the longest gold answer: one that is longer than it should be is seen to be.
const MARGIN: usize = 8;

/// The field that asks for answers, if one does.
fn asking(params: &TrainParams, metric: EvalMetric) -> Option<&'static str> {
    match metric.is_of_answers() {
        true => Some("hyper.eval_metric"),
        false => params.hyper.generation.wanted.then_some("hyper.eval_generate"),
    }
}

/// Whether evaluations answer prompts; `format` is that of the examples for evaluation. Adds what stands against it, and
/// bounds without answers, to the problems.
pub(super) fn is_wanted(
    params: &TrainParams,
    metric: EvalMetric,
    format: Option<Format>,
    problems: &mut Vec<Violation>,
) -> bool {
    // a figure that was refused says nothing of what is wanted
    if problems.iter().any(|p| p.field == "hyper.eval_metric") {
        return false;
    }
    let asked = &params.hyper.generation;
    let Some(field) = asking(params, metric) else {
        let bounds = [("eval_new_tokens", asked.new_tokens), ("eval_examples", asked.examples)];
        for (name, _) in bounds.iter().filter(|(_, given)| given.is_some()) {
            let message =
                "is for evaluations that answer prompts: eval_generate, or eval_metric exact_match, bleu or rouge_l";
            problems.push(violation(&format!("hyper.{name}"), message));
        }
        return false;
    };
    let needs = "needs prompts to answer, {prompt, completion} or {messages}";
    let message = match format {
        _ if !params.task.generates() => format!("{needs}; this job is {}", params.task.as_str()),
        _ if params.preference.is_some() => format!("{needs}; this job learns preferences"),
        _ if params.validation.is_none() => {
            "needs examples for evaluation: validation_data or validation_fraction".to_owned()
        }
        Some(Format::PromptCompletion | Format::Messages) => return true,
        Some(other) => format!("{needs}; the examples for evaluation are {}", other.as_str()),
        None => return false, // there are no good lines
    };
    problems.push(violation(field, message));
    false
}

/// What the questions are made of.
pub(super) struct Asks<'a> {
    pub(super) params: &'a TrainParams,
    pub(super) metric: EvalMetric,
    pub(super) codec: &'a TextCodec,
    pub(super) base: BaseShape<'a>,
    /// Positions that virtual tokens leave.
    pub(super) room: usize,
}

/// A quiz, its bounds, and what is to be said of it.
pub(super) type Asked = (Quiz, ResolvedGeneration, Option<Violation>);

impl Asks<'_> {
    /// Questions of the examples for evaluation, whose lines are in `data`.
    ///
    /// # Errors
    /// No prompt that can be answered; bounds beyond the context; lines that the tokenizer refuses, or whose gold answers have
    /// more than [`MAX_GOLD_TOKENS`].
    pub(super) fn quiz(&self, data: &Dataset, validation: &[Encoded]) -> Result<Asked, Vec<Violation>> {
        let (room, asked) = (self.room, &self.params.hyper.generation);
        let most = room.saturating_sub(1).max(1);
        if let Some(n) = asked.new_tokens.filter(|n| *n as usize > most) {
            let message = format!("is {n}; accepted is 1 to {most} (the room for a prompt and its answer is {room})");
            return Err(vec![violation("hyper.eval_new_tokens", message)]);
        }
        let lines: HashSet<u64> = validation.iter().map(|e| e.line).collect();
        let (mut questions, mut longest, mut left_out, mut refused) = (Vec::new(), 0, 0, Vec::new());
        for row in data.rows.iter().filter(|row| lines.contains(&row.line)) {
            match self.codec.ask(&row.example) {
                Ok(Some(q)) if q.gold_tokens > MAX_GOLD_TOKENS + 1 => {
                    let message = format!(
                        "has an answer of {} tokens; generated answers are scored against at most {MAX_GOLD_TOKENS}",
                        q.gold_tokens - 1
                    );
                    refused.push(self.line(row.line, message));
                }
                Ok(Some(q))
                    if q.prompt.len() < room
                        && q.source.len() <= room
                        && q.source.is_empty() != self.base.encoder_decoder =>
                {
                    longest = longest.max(q.gold_tokens);
                    questions.push(Question { prompt: q.prompt, source: q.source, gold: q.gold, most: 1 });
                }
                Ok(_) => left_out += 1,
                Err(e) => refused.push(self.line(row.line, e)),
            }
        }
        if !refused.is_empty() {
            return Err(refused);
        }
        let why = format!(
            "a conversation that the user ends, an empty prompt, or one that leaves no room in the context of {room}"
        );
        if questions.is_empty() {
            let field = asking(self.params, self.metric).unwrap_or("hyper.eval_generate");
            let message =
                format!("needs prompts to answer; the {left_out} examples for evaluation have none: each is {why}");
            return Err(vec![violation(field, message)]);
        }
        let new_tokens = asked.new_tokens.map_or(longest + MARGIN, |n| n as usize).min(most);
        questions.iter_mut().for_each(|q| q.most = new_tokens.min(room - q.prompt.len()));
        let questions = self.drawn(questions);
        let used = ResolvedGeneration { new_tokens: new_tokens as u32, examples: questions.len() as u32 };
        let warning = (left_out > 0).then(|| Violation {
            field: "validation".to_owned(),
            code: "NOT_ANSWERED".to_owned(),
            message: format!("has {left_out} examples that no evaluation answers: {why}"),
        });
        Ok((Quiz { questions: questions.into(), stop: self.codec.eos.clone().into() }, used, warning))
    }

    /// What is wrong with a line of the examples for evaluation.
    fn line(&self, line: u64, message: String) -> Violation {
        let data = if matches!(self.params.validation, Some(Validation::Fraction(_))) { "data" } else { "validation" };
        violation(&format!("{data} line {line}"), message)
    }

    /// The first of the questions in an order that the seed decides; they are in their old order again.
    fn drawn(&self, questions: Vec<Question>) -> Vec<Question> {
        let hyper = &self.params.hyper;
        let mut order: Vec<usize> = (0..questions.len()).collect();
        order.shuffle(&mut rng(hyper.seed.unwrap_or(0), Stream::Questions));
        order.truncate(hyper.generation.examples.unwrap_or(EXAMPLES) as usize);
        let chosen: HashSet<usize> = order.into_iter().collect();
        questions.into_iter().enumerate().filter(|(i, _)| chosen.contains(i)).map(|(_, question)| question).collect()
    }
}

/// Bytes of the cache that answers take, where a delta adds `ahead` positions.
pub(super) fn cache_bytes(base: BaseShape<'_>, quiz: &Quiz, ahead: usize) -> u64 {
    const F32: usize = 4;
    let slot = base.base.map_or(0, |b| 2 * b.arch.layers * b.arch.kv_width() * F32);
    (slot * quiz.slots(ahead)) as u64
}

#[cfg(test)]
mod tests {
    use super::super::{
        Prepared,
        tests::{lora, params, run},
    };
    use super::*;
    use crate::{
        admission::train_params::{GenerationParams, PreferenceMethod, PreferenceParams},
        delta::{Problem, Task},
    };

    fn pairs(lines: std::ops::Range<usize>) -> String {
        let answer = |i: usize| "y".repeat(1 + i % 5);
        lines.map(|i| format!("{{\"prompt\": \"p{i}\", \"completion\": \"{}\"}}\n", answer(i))).collect()
    }

    fn by(metric: &str, validation: Option<Validation>) -> TrainParams {
        let mut p = TrainParams { validation, ..params(Task::CausalLm, lora()) };
        p.hyper.eval_metric = Some(metric.into());
        p
    }

    fn held() -> Option<Validation> {
        Some(Validation::Data(crate::admission::train_params::TrainData::Jsonl(String::new())))
    }

    fn bounds(p: &Prepared) -> Option<(u32, u32)> {
        p.reply.resolved.generation.map(|g| (g.new_tokens, g.examples))
    }

    #[test]
    fn prompts_of_the_examples_for_evaluation_are_asked() {
        let p = run(&by("rouge_l", held()), &pairs(0..4), Some(&pairs(10..18))).unwrap();
        // five letters, the end, and the margin
        assert_eq!(bounds(&p), Some((14, 8)));
        assert_eq!((p.reply.resolved.eval_metric, &*p.quiz.stop), (EvalMetric::RougeL, &[2u32][..]));
        let q = &p.quiz.questions[0];
        let tokens: Vec<u32> = std::iter::once(1).chain("p10".bytes().map(|b| 10 + u32::from(b))).collect();
        assert_eq!((q.prompt.clone(), q.gold.as_str(), q.most), (tokens, "y", 14));
        assert!(p.validation[0].tokens.starts_with(&q.prompt), "what is asked is what is learned from");

        let mut few = by("loss", Some(Validation::Fraction(0.5)));
        assert!(bounds(&run(&few, &pairs(0..20), None).unwrap()).is_none(), "only where it is asked for");
        few.hyper.generation = GenerationParams { wanted: true, new_tokens: Some(62), examples: Some(4) };
        let p = run(&few, &pairs(0..20), None).unwrap();
        assert_eq!((bounds(&p), p.quiz.questions.len(), p.validation.len()), (Some((62, 4)), 4, 10));
        let said = |p: &Prepared| p.quiz.questions.to_vec();
        let answer_at = |e: &Encoded| e.learned().iter().position(|learn| *learn);
        let asks = |e: &Encoded, q: &Question| e.tokens.starts_with(&q.prompt) && answer_at(e) == Some(q.prompt.len());
        let of_validation = |q: &Question| p.validation.iter().any(|e| asks(e, q));
        assert!(said(&p).iter().all(of_validation));
        // the context of 64 less the prompt
        assert!(said(&p).iter().all(|q| q.most == 62usize.min(64 - q.prompt.len())));
        assert_eq!(said(&p), said(&run(&few, &pairs(0..20), None).unwrap()), "the same each time");
        let all = |n| {
            let mut p = few.clone();
            p.hyper.generation.examples = Some(n);
            run(&p, &pairs(0..20), None).unwrap().quiz.questions.to_vec()
        };
        assert!(all(6).len() == 6 && said(&p).iter().all(|q| all(6).contains(q)), "more of them are more of the same");
        assert_eq!(all(100).len(), 10);
    }

    #[test]
    fn what_has_no_prompt_to_answer_is_left_out_or_refused_by_name() {
        let turn = |role: &str, text: &str| format!("{{\"role\": \"{role}\", \"content\": \"{text}\"}}");
        let (asks, says) = (turn("user", "q"), turn("assistant", "a"));
        let ends = |last: &str| format!("{{\"messages\": [{asks}, {says}, {last}]}}\n");
        let answered = format!("{{\"messages\": [{asks}, {says}]}}\n");
        let open = ends(&turn("user", "r"));
        let p = run(&by("bleu", held()), &pairs(0..4), Some(&(answered + &open))).unwrap();
        assert_eq!(p.quiz.questions.len(), 1);
        let told = |w: &&Violation| w.code == "NOT_ANSWERED" && w.message.starts_with("has 1 example");
        assert!(p.reply.warnings.iter().any(|w| told(&w)), "{:?}", p.reply.warnings);
        let refused = |p: &TrainParams, train: &str, validation: Option<&str>| {
            let found = run(p, train, validation).unwrap_err();
            assert_eq!(found.len(), 1, "{found:?}");
            (found[0].field.clone(), found[0].message.clone())
        };
        let (field, message) = refused(&by("bleu", held()), &pairs(0..4), Some(&open));
        assert!(field == "hyper.eval_metric" && message.contains("a conversation that the user ends"), "{message}");
        let texts = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n{\"text\": \"three\"}\n";
        let (field, message) = refused(&by("exact_match", held()), &pairs(0..4), Some(texts));
        assert!(field == "hyper.eval_metric" && message.ends_with("examples for evaluation are text"), "{message}");
        let (field, message) = refused(&by("exact_match", Some(Validation::Fraction(0.4))), texts, None);
        assert!(field == "hyper.eval_metric" && message.contains("{prompt, completion}"), "{message}");
        let (field, message) = refused(&by("rouge_l", None), &pairs(0..4), None);
        assert!(field == "hyper.eval_metric" && message.contains("validation_fraction"), "{message}");

        let also = |mut p: TrainParams| {
            p.hyper.eval_metric = None;
            p.hyper.generation.wanted = true;
            p
        };
        let labels = "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"b\", \"label\": \"y\"}\n".repeat(4);
        for (problem, data) in [
            (Problem::SingleLabel, labels.clone()),
            (Problem::Regression, labels.replace("\"x\"", "1.5").replace("\"y\"", "2.5")),
        ] {
            let mut p = TrainParams { problem, ..params(Task::SeqCls, lora()) };
            p.validation = Some(Validation::Fraction(0.5));
            p.hyper.eval_metric = Some("rouge_l".into());
            let (field, message) = refused(&p, &data, None);
            assert!(field == "hyper.eval_metric" && message.contains("evaluations of this task have"), "{message}");
            let (field, message) = refused(&also(p), &data, None);
            assert!(field == "hyper.eval_generate" && message.contains("this job is seq_cls"), "{message}");
        }
        let mut p = by("bleu", Some(Validation::Fraction(0.5)));
        p.preference = Some(PreferenceParams::of(PreferenceMethod::Dpo));
        let answers = (0..6).map(|i| format!("{{\"prompt\": \"p{i}\", \"chosen\": \"yes\", \"rejected\": \"n\"}}\n"));
        let answers: String = answers.collect();
        let (field, message) = refused(&p, &answers, None);
        assert!(field == "hyper.eval_metric" && message.contains("reward_accuracy"), "{message}");
        let (field, message) = refused(&also(p), &answers, None);
        assert!(field == "hyper.eval_generate" && message.contains("preferences"), "{message}");
        let (field, message) = refused(&also(by("loss", None)), &pairs(0..4), None);
        assert!(field == "hyper.eval_generate" && message.contains("validation_fraction"), "{message}");
    }

    #[test]
    fn a_gold_answer_beyond_the_bound_is_refused_by_line() {
        let line = |n: usize| format!("{{\"prompt\": \"p\", \"completion\": \"{}\"}}\n", "y".repeat(n));
        let (fits, long) = (line(MAX_GOLD_TOKENS), line(MAX_GOLD_TOKENS + 1));
        let held_out = pairs(10..14) + &fits;
        assert_eq!(bounds(&run(&by("rouge_l", held()), &pairs(0..4), Some(&held_out)).unwrap()), Some((63, 5)));
        let found = run(&by("rouge_l", held()), &pairs(0..4), Some(&(held_out + &long))).unwrap_err();
        let message = "has an answer of 4097 tokens; generated answers are scored against at most 4096";
        assert_eq!(found, [violation("validation line 6", message)]);
        // where nothing is answered, it is a long example as any other
        assert!(run(&by("loss", held()), &pairs(0..4), Some(&long)).is_ok());
        let drawn = by("bleu", Some(Validation::Fraction(0.5)));
        let found = run(&drawn, &(pairs(0..1) + &long.repeat(19)), None).unwrap_err();
        assert!(found.iter().all(|v| v.field.starts_with("data line ") && v.message == message), "{found:?}");
    }

    #[test]
    fn bounds_need_answers_and_keep_to_the_context() {
        let mut p = by("loss", held());
        p.hyper.generation = GenerationParams { wanted: false, new_tokens: Some(4), examples: Some(4) };
        let found = run(&p, &pairs(0..4), Some(&pairs(10..14))).unwrap_err();
        let fields: Vec<&str> = found.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(fields, ["hyper.eval_new_tokens", "hyper.eval_examples"]);
        assert!(found[0].message.contains("eval_generate"), "{found:?}");
        p.hyper.generation = GenerationParams { wanted: true, new_tokens: Some(64), examples: None };
        let found = run(&p, &pairs(0..4), Some(&pairs(10..14))).unwrap_err();
        assert_eq!(found[0].field, "hyper.eval_new_tokens");
        assert!(found[0].message.contains("1 to 63"), "{found:?}");
        p.hyper.generation.new_tokens = Some(63);
        assert_eq!(bounds(&run(&p, &pairs(0..4), Some(&pairs(10..14))).unwrap()), Some((63, 4)));
    }
}
