//! Heads of every problem type: trained, published, served in one batch, downloaded and read again.

use deltaserve::grpc::proto;
use serde_json::json;

use crate::support::*;

fn lines(rows: usize, line: impl Fn(usize) -> serde_json::Value) -> String {
    (0..rows).map(|i| format!("{}\n", line(i))).collect()
}

fn colours(i: usize) -> serde_json::Value {
    let labels: &[&str] = [&["red"][..], &["red", "blue"], &["blue"], &[]][i % 4];
    let text = if labels.is_empty() { "nothing".to_owned() } else { labels.join(" and ") };
    json!({"text": text, "labels": labels})
}

fn sizes(i: usize) -> serde_json::Value {
    let (text, label) = [("tiny", -1.5), ("huge", 2.0)][i % 2];
    json!({"text": text, "label": label})
}

fn spec_of(name: &str, problem: proto::ProblemType, jsonl: String) -> proto::TrainingSpec {
    let mut spec = spec(name, proto::Task::SeqCls, jsonl, 150);
    spec.problem_type = problem.into();
    spec.hyper.as_mut().expect("hyper").learning_rate = Some(0.01);
    spec
}

fn probability(result: &proto::Classification, label: &str) -> f32 {
    result.labels.iter().find(|l| l.label == label).map_or(f32::NAN, |l| l.probability)
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_of_labels_and_numbers_are_learned_and_told_apart_by_their_files() {
    let world = World::encoder();
    let running = world.start().await;
    let client = &running.client;
    let many = spec_of("colours", proto::ProblemType::MultiLabel, lines(16, colours));
    let number = spec_of("size", proto::ProblemType::Regression, lines(16, sizes));
    for spec in [many, number] {
        let job = client.create_job(spec, "").await.expect("a job");
        assert_eq!(client.ended(&job.id).await.state(), proto::JobState::Succeeded);
    }
    for (from, to) in [("colours", "colours-copy"), ("size", "size-copy")] {
        let files = client.download(from).await.expect("its files");
        client.upload(to, &files).await.expect("an upload");
    }
    for (colours, size) in [("colours", "size"), ("colours-copy", "size-copy")] {
        let texts = ["red and blue", "nothing", "blue"];
        // at once: rows of different heads meet in a step
        let (sets, numbers) = tokio::join!(client.classify(colours, &texts), client.classify(size, &["tiny", "huge"]));
        let (sets, numbers) = (sets.expect("a reply"), numbers.expect("a reply"));
        assert_eq!(sets.problem_type, "multi_label_classification");
        let applies: Vec<_> =
            sets.results.iter().map(|r| ["red", "blue"].map(|label| probability(r, label) >= 0.5)).collect();
        assert_eq!(applies, [[true, true], [false, false], [false, true]], "{sets:?}");
        assert_eq!(numbers.problem_type, "regression");
        let values: Vec<f32> = numbers.results.iter().map(|r| r.value.expect("a number")).collect();
        assert!((values[0] + 1.5).abs() < 0.5 && (values[1] - 2.0).abs() < 0.5, "{values:?}");
        assert!(numbers.results.iter().all(|r| r.labels.is_empty()));
    }
    let info = client.delta("size").await.expect("it is there").delta.unwrap_or_default();
    assert_eq!(info.problem_type, "regression");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_of_another_problem_are_named_with_their_lines() {
    let world = World::encoder();
    let running = world.start().await;
    let refused = async |spec: proto::TrainingSpec| {
        running.client.create_job(spec, "").await.expect_err("refused").message().to_owned()
    };
    let said = refused(spec_of("x", proto::ProblemType::SingleLabel, lines(4, colours))).await;
    assert!(said.contains("spec.data line 1") && said.contains("single_label_classification"), "{said}");
    let mut known = spec_of("x", proto::ProblemType::MultiLabel, lines(4, colours));
    known.labels = vec!["red".into(), "green".into()];
    let said = refused(known).await;
    assert!(said.contains("spec.data line 2 /labels/1: is \"blue\"; accepted are red, green"), "{said}");
    let words = lines(4, |i| json!({"text": "a", "label": if i == 2 { json!("big") } else { json!(i) }}));
    let said = refused(spec_of("x", proto::ProblemType::Regression, words)).await;
    assert!(said.contains("spec.data line 3 /label: is \"big\"; a regression needs a number"), "{said}");
    let mut tags = spec_of("x", proto::ProblemType::MultiLabel, lines(4, colours));
    tags.task = proto::Task::CausalLm.into();
    assert!(!refused(tags).await.is_empty());
    running.stop().await;
}
