//! Evaluations that answer prompts, through the API and the command line: what they say is what serving says of the version
//! that is published.

use std::fs;

use deltaserve::{grpc::proto, model::testing::tiny_t5};
use proto::job_event::Body;
use serde_json::{Value, json};

use crate::{classify_file::cli, support::*};

/// Prompts of one of two letters, each with a word of its own.
fn answers(rows: usize) -> String {
    let row = |i: usize| {
        let (letter, word) = [("a", "yes"), ("z", "no")][i % 2];
        json!({"prompt": letter.repeat(3 + i / 2), "completion": word})
    };
    (0..rows).map(|i| format!("{}\n", row(i))).collect()
}

fn evaluated(name: &str, task: proto::Task, rows: String, steps: u32) -> proto::TrainingSpec {
    let source = proto::training_data::Source::Jsonl(rows.clone());
    let data = proto::TrainingData { source: Some(source) };
    let validation = Some(proto::training_spec::Validation::ValidationData(data));
    proto::TrainingSpec { validation, ..spec(name, task, rows, steps) }
}

async fn evals(client: &Client, job: &str) -> Vec<proto::EvalResult> {
    let events = client.events(job, 0).await.expect("a watch");
    events.iter().filter_map(|e| if let Some(Body::Eval(e)) = &e.body { Some(*e) } else { None }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_chooses_by_its_answers_and_tells_what_the_published_version_scores() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let mut spec = evaluated("answers", proto::Task::CausalLm, answers(8), 400);
    let hyper = spec.hyper.as_mut().expect("hyper");
    (hyper.eval_metric, hyper.eval_every, hyper.learning_rate) = (Some("exact_match".into()), Some(50), Some(1e-2));
    let job = client.create_job(spec, "").await.expect("a job");
    let resolved = job.resolved.clone().expect("resolved");
    // three letters, the end, and eight more
    assert_eq!(
        (resolved.eval_metric.as_str(), resolved.eval_examples, resolved.eval_new_tokens),
        ("exact_match", 8, 12)
    );
    let evals = evals(client, &job.id).await;
    assert_eq!(evals.len(), 8, "{evals:?}");
    assert!(evals.iter().all(|e| e.exact_match.is_some() && e.bleu.is_some() && e.rouge_l.is_some()), "{evals:?}");
    assert!(evals.iter().all(|e| e.perplexity.is_some()), "the loss is evaluated as ever: {evals:?}");
    let ended = client.ended(&job.id).await;
    assert_eq!(ended.state(), proto::JobState::Succeeded, "{ended:?}");
    let best = ended.result.and_then(|r| r.best_eval).expect("an evaluation");
    let most = evals.iter().filter_map(|e| e.exact_match).fold(0.0, f64::max);
    assert_eq!(best.exact_match, Some(most));
    assert!(most >= 0.75, "it learns two words: {evals:?}");

    let dir = tempfile::tempdir().expect("a folder");
    let (from, to) = (dir.path().join("rows.jsonl"), dir.path().join("said.jsonl"));
    fs::write(&from, answers(8)).expect("rows are written");
    let (from, to) = (from.to_str().expect("UTF-8"), to.to_str().expect("UTF-8"));
    let done = cli(&running, &["generate", "-d", "answers", "--file", from, "--out", to, "-m", "12", "--json"]).await;
    assert!(done.status.success(), "{done:?}");
    let scores: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    for (name, of_job) in [("exact_match", best.exact_match), ("bleu", best.bleu), ("rouge_l", best.rouge_l)] {
        let (served, of_job) = (scores[name].as_f64().expect("a number"), of_job.expect("a number"));
        assert!((served - of_job).abs() < 1e-9, "{name}: {of_job} in the evaluation, {served} of what is served");
    }
    let told = cli(&running, &["jobs", "watch", &job.id]).await;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(["exact match", "BLEU", "ROUGE-L"].iter().all(|name| told.contains(name)), "{told}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_may_be_told_where_another_figure_decides() {
    let world = World::of(tiny_t5(), 7);
    let running = world.start().await;
    let client = &running.client;
    let mut spec = evaluated("answers", proto::Task::Seq2seq, answers(8), 2);
    let hyper = spec.hyper.as_mut().expect("hyper");
    (hyper.eval_generate, hyper.eval_examples, hyper.eval_new_tokens) = (true, Some(3), Some(5));
    let job = client.create_job(spec, "").await.expect("a job");
    let resolved = job.resolved.clone().expect("resolved");
    assert_eq!((resolved.eval_metric.as_str(), resolved.eval_examples, resolved.eval_new_tokens), ("loss", 3, 5));
    let told = evals(client, &job.id).await;
    assert!(!told.is_empty() && told.iter().all(|e| e.rouge_l.is_some_and(|x| (0.0..=1.0).contains(&x))), "{told:?}");
    let plain = client.create_job(evaluated("plain", proto::Task::Seq2seq, answers(8), 2), "").await.expect("a job");
    let resolved = plain.resolved.clone().expect("resolved");
    assert_eq!((resolved.eval_examples, resolved.eval_new_tokens), (0, 0));
    assert!(evals(client, &plain.id).await.iter().all(|e| e.rouge_l.is_none() && e.exact_match.is_none()));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_bounds_answers_and_its_plan_tells_the_bounds() {
    let world = World::new();
    let running = world.start().await;
    let dir = tempfile::tempdir().expect("a folder");
    let rows = dir.path().join("rows.jsonl");
    fs::write(&rows, answers(8)).expect("rows are written");
    let rows = rows.to_str().expect("UTF-8");
    let asked = ["train", "answers", "--file", rows, "--validation", rows, "--plan", "--eval-metric"];
    let bounds = ["--eval-examples", "3", "--eval-new-tokens", "5"];
    let plan = cli(&running, &[&asked[..], &["rouge_l"], &bounds].concat()).await;
    let said = String::from_utf8_lossy(&plan.stdout).into_owned();
    assert!(said.contains("evaluation  3 prompts answered, up to 5 new tokens each"), "{plan:?}");
    let refused = cli(&running, &[&asked[..], &["loss"], &bounds].concat()).await;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("eval_examples") && said.contains("eval_generate"), "{said}");
    let told = cli(&running, &[&asked[..], &["loss", "--eval-generate"], &bounds].concat()).await;
    assert!(String::from_utf8_lossy(&told.stdout).contains("3 prompts answered"), "{told:?}");
    running.stop().await;
}
