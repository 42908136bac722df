//! Laws of evaluation by generation: answers are those of the engine for what would be published, figures are those of these
//! answers, they choose and stop as other figures do, and a run may stop in the midst of them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    encode::Encoded,
    full_laws::kept,
    generate::{Answering, Question, Quiz},
    laws::{examples, finish, hyper, input, lora, positions, tiny},
    method_laws::all,
    resume_laws::{assert_goes_on, busy},
    run::{Advance, Outcome, Run, RunInput, Trained},
    worst::Decoder,
};
use crate::{
    admission::{
        params::Sampling,
        train_params::{EvalEvent, EvalMetric, JobEventBody, MethodPart, ResolvedGeneration, ResolvedTraining},
    },
    delta::{Delta, Task},
    engine::{EngineConfig, Event, Generate, HeldDelta, Request, Work, spawn},
    ids::DeltaId,
    measures::Texts,
    model::{Base, LoadOptions, write_folder},
    pacing::Pacer,
};

/// Greedy answers of the engine, all at once.
fn served(base: &Arc<Base>, delta: Option<&Arc<Delta>>, quiz: &Quiz) -> Vec<Vec<u32>> {
    let pacer = Arc::new(Pacer::new(Duration::from_millis(1), 0.0));
    let (engine, thread) = spawn(Arc::clone(base), EngineConfig::default(), pacer).unwrap();
    let ask = |q: &Question| {
        let work = Work::Generate(Generate {
            sampling: Sampling::default(),
            max_new_tokens: q.most,
            stop_tokens: quiz.stop.to_vec(),
            logprobs: None,
            beams: None,
            speculation: None,
        });
        let (events, receiver) = mpsc::channel(work.events());
        let request = Request {
            tenant: None,
            weight: 1,
            priority: 0,
            id: 0,
            source: q.source.clone(),
            tokens: q.prompt.clone(),
            token_types: None,
            delta: delta.map(|delta| HeldDelta::new(DeltaId::from_bytes([1; 32]), Arc::clone(delta), ())),
            work,
            constraint: None,
            deadline: None,
            events,
            permit: None,
            arrived: Instant::now(),
        };
        engine.submit(request).unwrap();
        receiver
    };
    let asked: Vec<_> = quiz.questions.iter().map(ask).collect();
    let read = |mut events: mpsc::Receiver<Event>| {
        let mut said = Vec::new();
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Token(token, _) => said.push(token.id),
                Event::Finished(_) => {}
                other => panic!("{other:?}"),
            }
        }
        said
    };
    let said = asked.into_iter().map(read).collect();
    engine.shutdown(Duration::ZERO);
    thread.join().unwrap();
    said
}

/// Answers of the weights under training.
fn answered(run: &Run, base: &Arc<Base>, quiz: &Quiz) -> Vec<Vec<u32>> {
    let t = run.trainable();
    let (own, delta) = (t.detached_base(base).unwrap(), Arc::new(t.detached().unwrap()));
    let mut answering = Answering::new(own, delta, quiz).unwrap();
    while answering.advance(quiz, None).unwrap() {}
    answering.said().to_vec()
}

/// `n` prompts of all lengths from 1 on, with different bounds.
fn quiz(base: &Base, n: usize, stop: &[u32]) -> Quiz {
    let tokens =
        |i: usize| -> Vec<u32> { (0..1 + (i * 7) % 23).map(|j| (3 + (i * 31 + j * 17) % 120) as u32).collect() };
    let question = |i: usize| {
        let (prompt, source) = if base.arch.is_encoder_decoder() { (vec![0], tokens(i)) } else { (tokens(i), vec![]) };
        Question { prompt, source, gold: String::new(), most: 1 + (i * 5) % 14 }
    };
    Quiz { questions: (0..n).map(question).collect(), stop: stop.into() }
}

/// A run after a few steps that change much.
fn begun(base: &Arc<Base>, task: Task, methods: &[MethodPart]) -> Run {
    let resolved = ResolvedTraining { learning_rate: 3e-2, ..hyper(9) };
    let mut run = Run::new(Arc::clone(base), None, input(base, task, methods, resolved)).unwrap();
    while run.step() < 5 {
        assert!(matches!(run.advance(), Advance::More(_)), "it goes on");
    }
    run
}

fn task_of(family: &str) -> Task {
    if family == "t5" { Task::Seq2Seq } else { Task::CausalLm }
}

#[test]
fn answers_are_those_of_the_engine_for_what_would_be_published() {
    let with = |part: MethodPart| [lora(), vec![part]].concat();
    for family in ["llama", "gpt2", "t5", "gemma2"] {
        let (base, task) = (tiny(family), task_of(family));
        let cases = [
            ("lora", lora()),
            ("prefix", vec![positions::prefix(3)]),
            ("prefixes everywhere", vec![positions::everywhere(3)]),
            ("projected prefix", vec![positions::projected(2)]),
            ("prompt", vec![positions::prompt(3)]),
            ("p-tuning", vec![positions::p_tuning(3)]),
            ("lora and prompt", with(positions::prompt(2))),
        ];
        let few = quiz(&base, 9, &[]);
        let bare = served(&base, None, &few);
        for (what, methods) in cases.into_iter().take(if family == "gemma2" { 3 } else { 7 }) {
            let run = begun(&base, task, &methods);
            let delta = Arc::new(run.delta().unwrap());
            let want = served(&base, Some(&delta), &few);
            // the tiny Gemma says its own last token again, whatever is trained in a few steps
            assert!(want != bare || family == "gemma2", "{family} {what}: it changes nothing");
            assert!(want.iter().zip(&*few.questions).all(|(said, q)| said.len() == q.most));
            assert_eq!(answered(&run, &base, &few), want, "{family} {what}");
            // an end in the midst of others
            let stop = want.iter().find(|said| said.len() > 4).map(|said| said[2]).unwrap();
            let stopped = quiz(&base, 9, &[stop]);
            let ended = served(&base, Some(&delta), &stopped);
            assert!(ended.iter().zip(&want).any(|(a, b)| a.len() < b.len()), "{family} {what}");
            assert_eq!(answered(&run, &base, &stopped), ended, "{family} {what}, ended by {stop}");
        }
    }
}

#[test]
fn every_method_and_several_groups_are_answered_as_the_engine_does() {
    for family in ["llama", "t5"] {
        let base = tiny(family);
        let few = quiz(&base, 5, &[]);
        for (what, methods) in all() {
            let run = begun(&base, task_of(family), &methods);
            let want = served(&base, Some(&Arc::new(run.delta().unwrap())), &few);
            assert_eq!(answered(&run, &base, &few), want, "{family} {what}");
        }
        let (run, many) = (begun(&base, task_of(family), &lora()), quiz(&base, 70, &[]));
        let want = served(&base, Some(&Arc::new(run.delta().unwrap())), &many);
        assert_eq!(answered(&run, &base, &many), want, "{family}, 70 prompts");
    }
}

#[test]
fn a_model_under_full_fine_tuning_answers_as_the_folder_that_it_becomes() {
    for family in ["llama", "t5"] {
        let (dir, base) = kept(family);
        let run = begun(&base, task_of(family), &[MethodPart::Full]);
        let t = run.trainable();
        let model = t.model(&t.snapshot().unwrap()).unwrap().expect("a model");
        write_folder(&base, &model, &dir.path().join("out")).unwrap();
        let made = Arc::new(Base::load(&dir.path().join("out"), &LoadOptions::default()).unwrap());
        let few = quiz(&base, 9, &[]);
        let want = served(&made, None, &few);
        assert_eq!(answered(&run, &base, &few), want, "{family}");
        assert_ne!(served(&base, None, &few), want, "{family}: the resident base is as it was");
    }
}

fn text(ids: &[u32]) -> String {
    ids.iter().map(|id| format!(" {id}")).collect()
}

/// With validation examples whose first two tokens (of an encoder-decoder, whose sources) ask for the others.
fn asking(input: RunInput, eval_metric: EvalMetric) -> RunInput {
    let validation = examples(input.resolved.task, 9);
    let question = |e: &Encoded| {
        let (prompt, rest) = e.tokens.split_at(if e.source.is_empty() { 2 } else { 1 });
        Question { prompt: prompt.to_vec(), source: e.source.clone(), gold: text(rest), most: rest.len() + 1 }
    };
    let quiz = Quiz { questions: validation.iter().map(question).collect(), stop: Arc::from([2]) };
    let generation = Some(ResolvedGeneration { new_tokens: 9, examples: 9 });
    let resolved = ResolvedTraining { eval_metric, generation, ..input.resolved };
    RunInput { resolved, validation, quiz, decoder: Decoder::new(text), ..input }
}

fn ended(base: &Arc<Base>, input: RunInput) -> (Vec<EvalEvent>, Vec<JobEventBody>, Trained) {
    let (events, outcome) = finish(Run::new(Arc::clone(base), None, input).unwrap());
    let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
    let evals = events.iter().filter_map(|e| if let JobEventBody::Eval(e) = e { Some(e.clone()) } else { None });
    (evals.collect(), events, *end)
}

#[test]
fn figures_are_those_of_the_texts_that_serving_gives() {
    for (family, learns) in [("llama", true), ("t5", false)] {
        let base = tiny(family);
        let resolved = ResolvedTraining { eval_every: 60, keep_last: true, ..hyper(120) };
        // another figure decides; answers are told all the same
        let of = asking(input(&base, task_of(family), &lora(), resolved), EvalMetric::Loss);
        let quiz = of.quiz.clone();
        let (evals, _, end) = ended(&base, of);
        assert_eq!((evals.len(), end.best_eval.as_ref()), (2, evals.last()));
        let delta = Arc::new(end.delta);
        let mut texts = Texts::default();
        for (question, said) in quiz.questions.iter().zip(served(&base, Some(&delta), &quiz)) {
            texts.add(&text(&said), &[question.gold.as_str()]);
        }
        let figures = [EvalMetric::ExactMatch, EvalMetric::Bleu, EvalMetric::RougeL].map(|m| m.of(&evals[1]));
        assert_eq!(figures, [texts.exact_match(), texts.bleu(), texts.rouge_l()].map(Some), "{family}");
        assert!(!learns || texts.rouge_l() > 0.0, "something is right: {texts:?}");
        assert!(evals.iter().all(|e| e.perplexity == Some(e.loss.exp())), "the loss is there as ever");
    }
}

#[test]
fn figures_of_answers_choose_the_best_and_end_a_job_without_gain() {
    let base = tiny("llama");
    for metric in [EvalMetric::ExactMatch, EvalMetric::Bleu, EvalMetric::RougeL] {
        let resolved = ResolvedTraining { eval_every: 2, patience: 2, min_delta: 200.0, ..hyper(30) };
        let (evals, events, end) = ended(&base, asking(input(&base, Task::CausalLm, &lora(), resolved), metric));
        assert_eq!(evals.len(), 3, "no figure gains 200: {evals:?}");
        let early = |e: &JobEventBody| match e {
            JobEventBody::Log(note) => note.code == "EARLY_STOP" && note.message.contains(metric.as_str()),
            _ => false,
        };
        assert!(events.iter().any(early), "{events:?}");
        let most = evals.iter().filter_map(|e| metric.of(e)).fold(f64::MIN, f64::max);
        assert_eq!(end.best_eval.and_then(|e| metric.of(&e)), Some(most));
        // more is better, and of equal ones a lower loss
        let worth = |e: &EvalEvent| (metric.of(e).unwrap(), -e.loss);
        let mut best = (f64::MIN, f64::MIN);
        for e in &evals {
            assert_eq!(e.best, worth(e) > best, "{metric:?} {evals:?}");
            best = if e.best { worth(e) } else { best };
        }
    }
}

#[test]
fn an_evaluation_computes_one_forward_a_turn() {
    let base = tiny("llama");
    let resolved = ResolvedTraining { eval_every: 1, ..hyper(2) };
    let mut of = asking(input(&base, Task::CausalLm, &lora(), resolved), EvalMetric::RougeL);
    of.quiz.stop = Arc::from([]);
    let most = of.quiz.questions.iter().map(|q| q.most).max().unwrap();
    let mut run = Run::new(Arc::clone(&base), None, of).unwrap();
    while run.step() < 1 {
        run.advance();
    }
    let mut turns = 1;
    while let Advance::More(events) = run.advance() {
        if events.iter().any(|e| matches!(e, JobEventBody::Eval(_))) {
            break;
        }
        turns += 1;
    }
    // the losses, a token of all answers at a time, and the figures
    assert_eq!((turns, run.step()), (1 + most + 1, 1));
}

#[test]
fn a_run_may_stop_in_the_midst_of_its_answers() {
    let resolved = || ResolvedTraining { eval_every: 2, patience: 3, min_delta: 0.5, ..busy(6) };
    let base = tiny("llama");
    let of = || asking(input(&base, Task::CausalLm, &lora(), resolved()), EvalMetric::RougeL);
    assert_goes_on(&base, "answers", &[], &of);
    for (family, methods) in [("gpt2", positions::prefix(3)), ("t5", positions::prompt(3))] {
        let base = tiny(family);
        let of = || {
            let input = input(&base, task_of(family), std::slice::from_ref(&methods), resolved());
            asking(input, EvalMetric::ExactMatch)
        };
        assert_goes_on(&base, family, &[6, 8, 14], &of);
    }
}

#[test]
fn a_checkpoint_belongs_to_its_questions_where_answers_decide() {
    let base = tiny("llama");
    let of = |metric| asking(input(&base, Task::CausalLm, &lora(), busy(6)), metric);
    let bytes = |input: RunInput| {
        let mut run = Run::new(Arc::clone(&base), None, input).unwrap();
        while run.step() < 2 {
            run.advance();
        }
        run.to_bytes().unwrap().unwrap()
    };
    let decides = bytes(of(EvalMetric::Bleu));
    let says =
        |input: &RunInput, bytes: &[u8]| input.check_resumes(bytes, &base.fingerprint).map_err(|e| e.to_string());
    assert_eq!(says(&of(EvalMetric::Bleu), &decides), Ok(2));
    let mut other = of(EvalMetric::Bleu);
    let mut questions = other.quiz.questions.to_vec();
    questions[3].gold.push('!');
    other.quiz.questions = questions.into();
    assert!(says(&other, &decides).unwrap_err().contains("other examples"));
    let shorter = |input: RunInput| {
        let generation = Some(ResolvedGeneration { new_tokens: 4, examples: 9 });
        RunInput { resolved: ResolvedTraining { generation, ..input.resolved }, ..input }
    };
    assert!(says(&shorter(of(EvalMetric::Bleu)), &decides).unwrap_err().contains("other hyper-parameters"));
    let told = bytes(of(EvalMetric::Loss));
    assert_eq!(says(&shorter(of(EvalMetric::Loss)), &told), Ok(2), "what is only told changes no weights");
}
