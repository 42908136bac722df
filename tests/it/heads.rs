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
    client.upload("one", &world.classifier(3, &["a", "b", "c"])).await.expect("an upload");
    for (from, to) in [("colours", "colours-copy"), ("size", "size-copy")] {
        let files = client.download(from).await.expect("its files");
        client.upload(to, &files).await.expect("an upload");
    }
    for (colours, size) in [("colours", "size"), ("colours-copy", "size-copy")] {
        let texts = ["red and blue", "nothing", "blue"];
        // at once: rows of different heads meet in a step
        let (sets, numbers, one) = tokio::join!(
            client.classify(colours, &texts),
            client.classify(size, &["tiny", "huge"]),
            client.classify("one", &["red"])
        );
        let (sets, numbers, one) = (sets.expect("a reply"), numbers.expect("a reply"), one.expect("a reply"));
        let sum: f32 = one.results[0].labels.iter().map(|l| l.probability).sum();
        assert!(one.problem_type == "single_label_classification" && (sum - 1.0).abs() < 1e-5, "{one:?}");
        assert_eq!(sets.problem_type, "multi_label_classification");
        let applies: Vec<_> =
            sets.results.iter().map(|r| ["red", "blue"].map(|label| probability(r, label) >= 0.5)).collect();
        assert_eq!(applies, [[true, true], [false, false], [false, true]], "{sets:?}");
        assert_eq!(numbers.problem_type, "regression");
        let values: Vec<f32> = numbers.results.iter().map(|r| r.value.expect("a number")).collect();
        assert!((values[0] + 1.5).abs() < 0.5 && (values[1] - 2.0).abs() < 0.5, "{values:?}");
        assert!(numbers.results.iter().all(|r| r.labels.is_empty()));
    }
    let inputs = vec![proto::ClassifyInput { text: "blue".into(), ..Default::default() }];
    let request = proto::ClassifyRequest { delta: "colours".into(), inputs, threshold: 0.5, ..Default::default() };
    let reply = client.inference().classify(client.request(request)).await.expect("a reply").into_inner();
    let labels: Vec<&str> = reply.results[0].labels.iter().map(|l| l.label.as_str()).collect();
    assert_eq!(labels, ["blue"], "only what applies");
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
    let words = lines(4, |i| json!({"text": "a", "label": if i == 2 { json!("NaN") } else { json!(i) }}));
    let said = refused(spec_of("x", proto::ProblemType::Regression, words)).await;
    assert!(said.contains("spec.data line 3 /label: is \"NaN\"; a regression needs a number"), "{said}");
    let bare = "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\", \"label\": NaN}\n".to_owned();
    assert!(refused(spec_of("x", proto::ProblemType::Regression, bare)).await.contains("spec.data line 2"));
    let huge = "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\", \"label\": 1e300}\n".to_owned();
    assert!(refused(spec_of("x", proto::ProblemType::Regression, huge)).await.contains("spec.data line 2 /label"));
    let mut tags = spec_of("x", proto::ProblemType::MultiLabel, lines(4, colours));
    tags.task = proto::Task::TokenCls.into();
    assert!(refused(tags).await.contains("spec.problem_type"));
    let mut smooth = spec_of("x", proto::ProblemType::MultiLabel, lines(4, colours));
    smooth.hyper.as_mut().expect("hyper").label_smoothing = Some(0.1);
    assert!(refused(smooth).await.contains("spec.hyper.label_smoothing"));
    let mut few = spec_of("x", proto::ProblemType::Regression, lines(4, sizes));
    few.k_per_class = Some(1);
    assert!(refused(few).await.contains("spec.k_per_class"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_model_says_what_its_head_is_and_a_head_goes_on_for_the_same_problem_only() {
    let mut world = World::encoder();
    let running = world.start().await;
    let client = &running.client;
    let mut whole = spec_of("whole", proto::ProblemType::MultiLabel, lines(16, colours));
    whole.methods = vec![proto::MethodPart { part: Some(proto::method_part::Part::Full(proto::FullTuning {})) }];
    whole.hyper.as_mut().expect("hyper").max_steps = Some(2);
    let job = client.create_job(whole, "").await.expect("a job");
    let model = client.ended(&job.id).await.result.expect("it ends well").model.expect("a model");
    let mut first = spec_of("colours", proto::ProblemType::MultiLabel, lines(8, colours));
    first.hyper.as_mut().expect("hyper").max_steps = Some(2);
    let job = client.create_job(first.clone(), "").await.expect("a job");
    assert_eq!(client.ended(&job.id).await.state(), proto::JobState::Succeeded);
    let one = lines(8, |i| json!({"text": "a", "label": if i % 2 == 0 { "red" } else { "blue" }}));
    let other = proto::TrainingSpec { problem_type: 0, ..spec_of("one", proto::ProblemType::SingleLabel, one) };
    for (spec, head) in [(first, true), (other, false)] {
        let mut spec = proto::TrainingSpec { methods: vec![], from_delta: "colours@1".into(), ..spec };
        spec.hyper.as_mut().expect("hyper").max_steps = Some(1);
        let job = client.create_job(spec, "").await.expect("a job");
        let from = job.resolved.expect("resolved").started_from.expect("it says where it starts");
        assert_eq!(from.head, head);
        assert_eq!(client.ended(&job.id).await.state(), proto::JobState::Succeeded);
    }
    assert_eq!(client.classify("one", &["a"]).await.expect("a reply").problem_type, "single_label_classification");
    assert_eq!(client.classify("colours", &["a"]).await.expect("a reply").problem_type, "multi_label_classification");
    running.stop().await;

    world.config.base.source = world.data_dir().join(&model.path).display().to_string();
    world.config.data_dir = world.data_dir().with_file_name("other-data");
    let served = world.start().await;
    let reply = served.client.classify("", &["red"]).await.expect("the base has a head");
    assert_eq!(reply.problem_type, "multi_label_classification");
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_held_text_loses_is_told() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let held = |jsonl: String| proto::TrainingData { source: Some(proto::training_data::Source::Jsonl(jsonl)) };
    let mut learns = spec("style", proto::Task::CausalLm, stories(16), 30);
    learns.forgetting = Some(held(stories(4)));
    let job = client.create_job(learns.clone(), "").await.expect("a job");
    let events = client.events(&job.id, 0).await.expect("a watch");
    let told: Vec<_> = (events.iter())
        .filter_map(|e| if let Some(proto::job_event::Body::Forgetting(f)) = &e.body { Some(*f) } else { None })
        .collect();
    let [f] = told[..] else { panic!("{events:?}") };
    assert!(f.step == 30 && f.forgetting == f.delta_loss - f.base_loss && f.forgetting < -0.1, "{f:?}");
    learns.forgetting = Some(held("{\"text\": 1}\n".into()));
    let said = client.create_job(learns, "").await.expect_err("refused").message().to_owned();
    assert!(said.contains("spec.forgetting line 1 /text"), "{said}");
    running.stop().await;
    let world = World::encoder();
    let running = world.start().await;
    let mut labels = spec("mood", proto::Task::SeqCls, labelled(8), 1);
    labels.forgetting = Some(held(stories(4)));
    assert!(running.client.create_job(labels, "").await.expect_err("refused").message().contains("spec.forgetting"));
    running.stop().await;
}
