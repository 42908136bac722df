//! Holding on to the base, and keeping several of the best evaluations, through the API.

use deltaserve::grpc::proto;
use proto::{JobState, job_event::Body};
use tonic::Code;

use crate::{classify_file::cli, support::*};

/// Evaluated every four steps; what happens in a step does not depend on how many there are.
fn evaluated(name: &str, steps: u32, of: impl FnOnce(&mut proto::HyperParameters)) -> proto::TrainingSpec {
    let plain = spec(name, proto::Task::CausalLm, stories(30), steps);
    let mut hyper = proto::HyperParameters {
        eval_every: Some(4),
        schedule: proto::Schedule::Constant.into(),
        warmup_ratio: Some(0.0),
        ..plain.hyper.unwrap_or_default()
    };
    of(&mut hyper);
    let validation = Some(proto::training_spec::Validation::ValidationFraction(0.2));
    proto::TrainingSpec { hyper: Some(hyper), validation, ..plain }
}

async fn publish(client: &Client, id: &str, name: &str, step: Option<u32>) -> Result<proto::Delta, tonic::Status> {
    let request = proto::PublishCheckpointRequest { id: id.into(), name: name.into(), policy: None, step };
    let reply = client.training().publish_checkpoint(client.request(request)).await?;
    Ok(reply.into_inner().delta.expect("a delta"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_best_evaluations_are_published_by_their_step_also_after_a_restart() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let job = client.create_job(evaluated("best", 24, |h| h.keep_best = Some(3)), "").await.expect("a job");
    assert_eq!(job.resolved.as_ref().map(|r| r.keep_best), Some(3));
    let events = client.events(&job.id, 0).await.expect("a watch");
    let mut evals: Vec<(f64, u32)> = events
        .iter()
        .filter_map(|e| if let Some(Body::Eval(e)) = &e.body { Some((e.loss, e.step)) } else { None })
        .collect();
    assert_eq!(evals.len(), 6, "{events:?}");
    evals.sort_by(|a, b| a.0.total_cmp(&b.0)); // of equal ones the earlier first
    let best = client.ended(&job.id).await.result.and_then(|r| r.best_eval).expect("an evaluation");
    assert_eq!(best.step, evals[0].1);
    let kept: Vec<&proto::Checkpoint> = events
        .iter()
        .filter_map(|e| if let Some(Body::Checkpoint(c)) = &e.body { Some(c) } else { None })
        .filter(|c| c.best)
        .collect();
    let told: Vec<(f64, u32)> = kept.iter().map(|c| (c.figure.unwrap_or_default(), c.step)).collect();
    assert_eq!(told, evals[1..3], "{events:?}");
    assert!(kept.iter().all(|c| c.blob.len() == 64), "{kept:?}");

    // the same weights as those of a job that ends there
    let step = told[0].1;
    let next = publish(client, &job.id, "next", Some(step)).await.expect("it is published");
    assert!(next.origin.ends_with(&format!("{}@{step}", job.id)), "{}", next.origin);
    let straight = client.create_job(evaluated("straight", step, |h| h.keep_last = true), "").await.expect("a job");
    assert_eq!(client.ended(&straight.id).await.state(), JobState::Succeeded);
    let files = client.download("next").await.expect("its files");
    assert!(files == client.download("straight").await.expect("its files"), "other weights than those of step {step}");
    assert!(files != client.download("best").await.expect("its files"));
    running.stop().await;

    let running = world.start().await;
    let client = &running.client;
    assert_eq!(publish(client, &job.id, "again", Some(step)).await.expect("it is kept").id, next.id);
    let said = client.generate(ask("again", "the red cat", 8)).await.expect("it is served");
    assert_eq!(said.finished.served_by.unwrap_or_default().id, next.id);
    let done = cli(&running, &["jobs", "publish", &job.id, "third", "--step", &told[1].1.to_string()]).await;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let third = client.download("third").await.expect("its files");
    assert!(third != files && !third.files.is_empty());
    // 5 is between two evaluations
    let error = publish(client, &job.id, "none", Some(5)).await.expect_err("no such step");
    assert_eq!(kind(&error), (Code::NotFound, "NOT_FOUND".into()));
    let mut there: Vec<u32> = told.iter().map(|(_, step)| *step).collect();
    there.sort_unstable();
    let there = format!("no checkpoint of step 5; it has those of {}, {}", there[0], there[1]);
    assert!(error.message().contains(&there), "{error:?}");
    let error = publish(client, &job.id, "none", None).await.expect_err("it goes on from nothing");
    assert_eq!(kind(&error), (Code::FailedPrecondition, "JOB_STATE".into()));
    assert!(error.message().contains(&step.to_string()), "{error:?}");
    let error = publish(&client.tenant("other"), &job.id, "none", Some(step)).await.expect_err("not theirs");
    assert!(kind(&error).0 == Code::NotFound && error.message().contains("no job"), "{error:?}");
    let error = publish(client, &straight.id, "none", Some(step)).await.expect_err("it kept none");
    assert!(kind(&error).0 == Code::NotFound && error.message().contains("it has none"), "{error:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_keeps_the_same_ones() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let spec = |name: &str| {
        evaluated(name, 400, |h| (h.keep_best, h.learning_rate, h.kl_to_base) = (Some(4), Some(2e-2), Some(0.05)))
    };
    let kept = async |id: &str| {
        let events = client.events(id, 0).await.expect("a watch");
        let all =
            events.into_iter().filter_map(|e| if let Some(Body::Checkpoint(c)) = e.body { Some(c) } else { None });
        all.filter(|c| c.best).map(|c| (c.step, c.figure.map(f64::to_bits), c.blob)).collect::<Vec<_>>()
    };
    let straight = client.create_job(spec("straight"), "").await.expect("a job");
    let expected = kept(&straight.id).await;
    assert_eq!(expected.len(), 3, "{expected:?}");
    let job = client.create_job(spec("paused"), "").await.expect("a job");
    eventually("it has evaluations", async || client.job(&job.id).await.is_ok_and(|j| j.step > 20)).await;
    let paused = client.pause(&job.id).await.expect("a pause");
    assert!(paused.state() == JobState::Paused && paused.step < 400, "{paused:?}");
    client.resume(&job.id).await.expect("it goes on");
    assert_eq!(kept(&job.id).await, expected, "paused at step {}", paused.step);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_holds_on_to_the_base_tells_how_far_it_is() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let told = async |kl: Option<f64>| {
        let spec = evaluated("held", 12, |h| h.kl_to_base = kl);
        let job = client.create_job(spec, "").await.expect("a job");
        assert_eq!(job.resolved.as_ref().map(|r| r.kl_to_base), Some(kl.unwrap_or_default()));
        let events = client.events(&job.id, 0).await.expect("a watch");
        assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded, "{events:?}");
        let metrics =
            events.iter().filter_map(|e| if let Some(Body::Metrics(m)) = &e.body { Some(m.kl) } else { None });
        metrics.collect::<Vec<_>>()
    };
    assert!(told(None).await.iter().all(Option::is_none));
    let kl: Vec<f64> = told(Some(0.3)).await.into_iter().map(|kl| kl.expect("it is told")).collect();
    assert!(kl[0].abs() < 1e-4 && kl.last().is_some_and(|last| *last > 1e-4), "{kl:?}");
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("stories.jsonl");
    std::fs::write(&file, stories(20)).expect("a file");
    let wishes = ["--plan", "--kl-to-base", "0.3", "--keep-best", "2", "--validation-fraction", "0.2"];
    let file = file.to_string_lossy().into_owned();
    let args: Vec<&str> = ["train", "held", "--file", &file].into_iter().chain(wishes).collect();
    let said = cli(&running, &args).await;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(text.contains("0.3 times the divergence") && text.contains("2 best evaluations by loss"), "{text}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_holds_on_to_the_base_on_texts_of_its_own() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let texts = "{\"text\": \"a green dog sat\"}\n{\"text\": \"so it goes\"}\n{\"text\": \"one two three\"}\n";
    let id = client.upload_dataset("general", texts).await;
    let dataset = || proto::TrainingData { source: Some(proto::training_data::Source::DatasetId(id.clone())) };
    let wanted = |kl: Option<f64>| proto::TrainingSpec {
        replay: Some(dataset()),
        ..evaluated("held", 12, |h| h.kl_to_base = kl)
    };
    let job = client.create_job(wanted(Some(0.3)), "").await.expect("a job");
    assert_eq!(job.resolved.as_ref().map(|r| (r.kl_to_base, r.replay_examples)), Some((0.3, 3)));
    let events = client.events(&job.id, 0).await.expect("a watch");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded, "{events:?}");
    let told = events.iter().filter_map(|e| if let Some(Body::Metrics(m)) = &e.body { m.kl } else { None });
    let told: Vec<f64> = told.collect();
    assert!(told[0].abs() < 1e-4 && told.last().is_some_and(|last| *last > 1e-5), "{told:?}");
    for kl in [None, Some(0.0)] {
        let error = client.create_job(wanted(kl), "").await.expect_err("refused");
        expect_invalid(&error, "spec.replay", &["hyper.kl_to_base"]);
    }
    let inline = |text: &str| proto::TrainingData { source: Some(proto::training_data::Source::Jsonl(text.into())) };
    let bad = proto::TrainingSpec { replay: Some(inline("{\"text\": 1}\n")), ..wanted(Some(0.3)) };
    let said = client.create_job(bad, "").await.expect_err("refused").message().to_owned();
    assert!(said.contains("spec.replay line 1 /text"), "{said}");
    let dir = tempfile::tempdir().expect("a folder");
    let [file, general] = [("stories.jsonl", stories(20)), ("general.jsonl", texts.to_owned())].map(|(name, text)| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_string_lossy().into_owned()
    });
    let args = ["train", "held", "--file", &file, "--plan", "--kl-to-base", "0.3", "--kl-texts", &general];
    let text = String::from_utf8_lossy(&cli(&running, &args).await.stdout).into_owned();
    assert!(text.contains("0.3 times the divergence from it on 3 texts"), "{text}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_had_together_is_refused_by_name() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let refused = async |spec: proto::TrainingSpec| client.create_job(spec, "").await.expect_err("refused");
    for most in [0, 9] {
        let error = refused(evaluated("many", 8, |h| h.keep_best = Some(most))).await;
        expect_invalid(&error, "spec.hyper.keep_best", &["1 to 8"]);
    }
    for kl in [-0.1, f64::NAN, f64::INFINITY, 1000.5] {
        expect_invalid(&refused(evaluated("far", 8, |h| h.kl_to_base = Some(kl))).await, "spec.hyper.kl_to_base", &[]);
    }
    let none = proto::TrainingSpec { validation: None, ..evaluated("none", 8, |h| h.keep_best = Some(2)) };
    expect_invalid(&refused(none).await, "spec.hyper.keep_best", &["validation_fraction"]);
    let both = evaluated("both", 8, |h| (h.keep_best, h.keep_last) = (Some(2), true));
    expect_invalid(&refused(both).await, "spec.hyper.keep_best", &["keep_last"]);
    let full = proto::method_part::Part::Full(proto::FullTuning {});
    let methods = vec![proto::MethodPart { part: Some(full) }];
    let full = proto::TrainingSpec { methods, ..evaluated("full", 8, |h| h.keep_best = Some(2)) };
    expect_invalid(&refused(full).await, "spec.hyper.keep_best", &["full fine-tuning"]);
    let mut kinds = spec("kinds", proto::Task::SeqCls, labelled(20), 8);
    kinds.hyper.as_mut().expect("hyper").kl_to_base = Some(0.1);
    expect_invalid(&refused(kinds).await, "spec.hyper.kl_to_base", &["no head for seq_cls"]);
    let pair = |i: usize| format!("{{\"prompt\": \"say {i}\", \"chosen\": \"yes\", \"rejected\": \"no\"}}\n");
    let mut pairs = spec("pairs", proto::Task::CausalLm, (0..8).map(pair).collect(), 8);
    pairs.hyper.as_mut().expect("hyper").kl_to_base = Some(0.1);
    pairs.preference = Some(proto::Preference { method: proto::PreferenceMethod::Dpo.into(), ..Default::default() });
    expect_invalid(&refused(pairs).await, "spec.hyper.kl_to_base", &["dpo", "preference.beta"]);
    running.stop().await;
}
