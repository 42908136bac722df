//! Evaluations of a job through the API: figures of the task, the one that decides, early stopping, few examples.

use deltaserve::grpc::proto;
use proto::job_event::Body;
use serde_json::json;

use crate::support::*;

fn moods(rows: usize) -> String {
    let line = |i: usize| {
        let (day, label) = [("good", "up"), ("bad", "down")][i % 2];
        json!({"text": format!("{day} day {i}"), "label": label})
    };
    (0..rows).map(|i| format!("{}\n", line(i))).collect()
}

fn validated(name: &str, task: proto::Task, train: String, held: String) -> proto::TrainingSpec {
    let source = proto::training_data::Source::Jsonl(held);
    let data = proto::TrainingData { source: Some(source) };
    proto::TrainingSpec {
        validation: Some(proto::training_spec::Validation::ValidationData(data)),
        ..spec(name, task, train, 400)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_gain_ends_early_and_the_chosen_figure_decides() {
    let world = World::encoder();
    let running = world.start().await;
    let client = &running.client;
    let mut spec = validated("mood", proto::Task::SeqCls, moods(16), moods(6));
    spec.k_per_class = Some(4);
    let hyper = spec.hyper.as_mut().expect("hyper");
    (hyper.eval_metric, hyper.patience, hyper.min_delta) = (Some("mcc".into()), Some(2), Some(3.0));
    (hyper.eval_every, hyper.label_smoothing) = (Some(1), Some(0.1));
    let job = client.create_job(spec, "").await.expect("a job");
    let resolved = job.resolved.clone().expect("resolved");
    assert_eq!((resolved.eval_metric.as_str(), resolved.patience, resolved.label_smoothing), ("mcc", 2, 0.1));
    let events = client.events(&job.id, 0).await.expect("a watch");
    let evals: Vec<_> =
        events.iter().filter_map(|e| if let Some(Body::Eval(e)) = &e.body { Some(*e) } else { None }).collect();
    assert_eq!(evals.len(), 3, "mcc cannot gain 3: {evals:?}");
    assert!(evals.iter().all(|e| e.mcc.is_some() && e.macro_f1.is_some() && e.span_f1.is_none()));
    let early = |e: &proto::JobEvent| matches!(&e.body, Some(Body::Log(n)) if n.code == "EARLY_STOP" && n.message.contains("mcc"));
    assert!(events.iter().any(early), "{events:?}");
    let ended = client.ended(&job.id).await;
    assert_eq!(ended.state(), proto::JobState::Succeeded);
    assert_eq!(client.job(&job.id).await.expect("the job").step, 3);
    let best = evals.iter().map(|e| e.mcc.unwrap_or_default()).fold(f64::MIN, f64::max);
    assert_eq!(ended.result.and_then(|r| r.best_eval).and_then(|e| e.mcc), Some(best));

    // what is learned is the opposite of what is held: the first evaluation is the best, the last is kept where asked for
    let turned: String =
        moods(16).replace("\"up\"", "\"?\"").replace("\"down\"", "\"up\"").replace("\"?\"", "\"down\"");
    let mut steps = Vec::new();
    for keep_last in [false, true] {
        let mut spec = validated("kept", proto::Task::SeqCls, turned.clone(), moods(6));
        let hyper = spec.hyper.as_mut().expect("hyper");
        (hyper.eval_every, hyper.max_steps, hyper.keep_last) = (Some(10), Some(60), keep_last);
        hyper.eval_metric = Some("loss".into());
        let job = client.create_job(spec, "").await.expect("a job");
        assert_eq!(job.resolved.expect("resolved").keep_last, keep_last);
        let events = client.events(&job.id, 0).await.expect("a watch");
        let best = |e: &proto::JobEvent| if let Some(Body::Eval(e)) = &e.body { Some(e.best) } else { None };
        let best: Vec<bool> = events.iter().filter_map(best).collect();
        assert_eq!((best.len(), best.iter().all(|b| *b)), (6, keep_last), "{best:?}");
        let result = client.ended(&job.id).await.result.expect("a result");
        steps.push(result.best_eval.expect("an evaluation").step);
    }
    assert!(steps[0] < 60 && steps[1] == 60, "{steps:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wishes_that_an_evaluation_cannot_fulfil_are_named() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let refused =
        async |spec: proto::TrainingSpec| client.create_job(spec, "").await.expect_err("refused").message().to_owned();
    let mut other = validated("style", proto::Task::CausalLm, stories(8), stories(2));
    other.hyper.as_mut().expect("hyper").eval_metric = Some("mcc".into());
    let said = refused(other.clone()).await;
    assert!(said.contains("spec.hyper.eval_metric") && said.contains("loss, perplexity, exact_match"), "{said}");
    other.hyper.as_mut().expect("hyper").eval_metric = Some("bleu".into());
    let said = refused(other).await;
    assert!(said.contains("spec.hyper.eval_metric") && said.contains("needs prompts to answer"), "{said}");
    let mut bounded = validated("style", proto::Task::CausalLm, stories(8), stories(2));
    bounded.hyper.as_mut().expect("hyper").eval_examples = Some(0);
    assert!(refused(bounded).await.contains("spec.hyper.eval_examples: is 0"));
    let mut without = spec("style", proto::Task::CausalLm, stories(8), 10);
    without.hyper.as_mut().expect("hyper").patience = Some(2);
    assert!(refused(without).await.contains("spec.hyper.patience: needs examples for evaluation"));
    let mut few = spec("mood", proto::Task::SeqCls, moods(7), 10);
    few.k_per_class = Some(4);
    assert!(refused(few).await.contains("\"down\" has 3"));
    let mut smooth = spec("style", proto::Task::CausalLm, stories(8), 10);
    smooth.hyper.as_mut().expect("hyper").label_smoothing = Some(1.0);
    assert!(refused(smooth).await.contains("label_smoothing"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_are_judged_by_their_spans_and_encoder_decoders_by_their_loss() {
    let evals = async |client: &Client, spec: proto::TrainingSpec| {
        let job = client.create_job(spec, "").await.expect("a job");
        let events = client.events(&job.id, 0).await.expect("a watch");
        let evals = events.iter().filter_map(|e| if let Some(Body::Eval(e)) = &e.body { Some(*e) } else { None });
        (job.resolved.expect("resolved").eval_metric, evals.collect::<Vec<_>>())
    };
    let tagged = |rows: usize| -> String {
        let line = |i: usize| json!({"tokens": ["go", format!("to{i}"), "x"], "labels": ["O", "B-way", "I-way"]});
        (0..rows).map(|i| format!("{}\n", line(i))).collect()
    };
    let short = |mut spec: proto::TrainingSpec| {
        spec.hyper.as_mut().expect("hyper").max_steps = Some(2);
        spec
    };
    let world = World::encoder();
    let running = world.start().await;
    let (metric, of) =
        evals(&running.client, short(validated("way", proto::Task::TokenCls, tagged(8), tagged(2)))).await;
    assert_eq!(metric, "span_f1");
    assert!(!of.is_empty() && of.iter().all(|e| e.span_f1.is_some() && e.span_precision.is_some()), "{of:?}");
    running.stop().await;
    let pairs = |rows: usize| -> String {
        (0..rows)
            .map(|i| format!("{}\n", json!({"prompt": format!("say {i}"), "completion": format!("{i}")})))
            .collect()
    };
    let world = World::of(deltaserve::model::testing::tiny_t5(), 7);
    let running = world.start().await;
    let (metric, of) = evals(&running.client, short(validated("say", proto::Task::Seq2seq, pairs(8), pairs(2)))).await;
    assert_eq!(metric, "loss");
    assert!(!of.is_empty() && of.iter().all(|e| e.perplexity.is_some() && e.accuracy.is_none()), "{of:?}");
    running.stop().await;
}

/// Words that the job's task says little of are told by line, with the label that was given and the one that is likely.
#[tokio::test(flavor = "multi_thread")]
async fn the_examples_with_the_highest_loss_are_told_by_line() {
    let world = World::encoder();
    let running = world.start().await;
    let client = &running.client;
    let worst = async |spec: proto::TrainingSpec| {
        let job = client.create_job(spec, "").await.expect("a job");
        let events = client.events(&job.id, 0).await.expect("a watch");
        let told =
            events.iter().filter_map(|e| if let Some(Body::Worst(w)) = &e.body { Some(w.clone()) } else { None });
        (job.id, told.collect::<Vec<_>>())
    };
    let text = labelled(40);
    let mut lines: Vec<&str> = text.lines().collect();
    let wrong = lines[16].replace("first", "last");
    lines[16] = &wrong;
    let data = "\n".to_owned() + &lines.join("\n");
    let mut of_training = spec("kinds", proto::Task::SeqCls, data, 60);
    let (_, none) = worst(of_training.clone()).await;
    assert!(none.is_empty(), "a pass over the training data is asked for");
    of_training.hyper.as_mut().expect("hyper").worst_examples = Some(2);
    let (id, told) = worst(of_training).await;
    let [one] = &told[..] else { panic!("{told:?}") };
    assert_eq!((one.step, one.held_out, one.of_validation, one.examples.len()), (60, false, false, 2));
    let top = &one.examples[0];
    // the first line of the file is empty
    assert_eq!((top.line, top.label.as_str(), top.predicted.as_str()), (18, "last", "first"), "{told:?}");
    assert!(top.loss > one.examples[1].loss && top.text.starts_with("aaa"), "{told:?}");
    let said = crate::classify_file::cli(&running, &["jobs", "get", &id, "--worst"]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("last (model: first)") && said.contains("18"), "{said}");

    let held = validated("kinds", proto::Task::SeqCls, labelled(40), format!("{}\n", lines[..20].join("\n")));
    let (_, told) = worst(held).await;
    let last = told.last().expect("told with the best evaluation");
    assert!(last.held_out && last.of_validation && last.examples.len() == 10, "{last:?}");
    assert_eq!(last.examples[0].line, 17, "{last:?}");
    running.stop().await;
}
