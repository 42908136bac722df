//! Preferences through the API: DPO, ORPO and KTO, from the request to what is served.

use deltaserve::grpc::proto;
use proto::{PreferenceMethod as Method, job_event::Body};
use serde_json::{Value, json};

use crate::support::*;

const METHODS: [Method; 3] = [Method::Dpo, Method::Orpo, Method::Kto];

/// The same words, in upper case where they are preferred.
fn answers(i: usize) -> (String, String, String) {
    let word = ["cat", "dog", "cow", "ant", "bee"][i % 5];
    let line = format!("{word} {}", ["runs", "naps", "eats"][i % 3]);
    (format!("say {i} "), line.to_uppercase(), line)
}

fn rows(method: Method, range: std::ops::Range<usize>) -> String {
    let row = |i: usize| {
        let (prompt, chosen, rejected) = answers(i);
        match method {
            Method::Kto if i.is_multiple_of(2) => json!({"prompt": prompt, "completion": chosen, "label": true}),
            Method::Kto => json!({"prompt": prompt, "completion": rejected, "label": false}),
            _ => json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}),
        }
    };
    range.map(|i| format!("{}\n", row(i))).collect()
}

fn inline(jsonl: String) -> proto::TrainingData {
    proto::TrainingData { source: Some(proto::training_data::Source::Jsonl(jsonl)) }
}

fn wanted(name: &str, task: proto::Task, method: Method) -> proto::TrainingSpec {
    let held = inline(rows(method, 40..52));
    let mut spec = spec(name, task, rows(method, 0..40), 60);
    spec.validation = Some(proto::training_spec::Validation::ValidationData(held));
    spec.preference = Some(proto::Preference { method: method.into(), ..Default::default() });
    let hyper = spec.hyper.as_mut().expect("hyper");
    (hyper.eval_every, hyper.eval_metric) = (Some(20), Some("reward_accuracy".into()));
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn preferred_answers_become_likelier_than_the_others() {
    for (config, task) in [
        (deltaserve::model::testing::tiny_llama(), proto::Task::CausalLm),
        (deltaserve::model::testing::tiny_t5(), proto::Task::Seq2seq),
    ] {
        let world = World::of(config, 7);
        let running = world.start().await;
        let client = &running.client;
        for method in METHODS {
            let name = method.as_str_name().to_lowercase();
            let mut spec = wanted(&name, task, method);
            spec.forgetting = (task == proto::Task::CausalLm).then(|| inline(stories(4)));
            let held = spec.forgetting.is_some();
            let job = client.create_job(spec, "").await.expect("a job");
            let resolved = job.resolved.clone().expect("resolved");
            let p = resolved.preference.expect("its preference");
            assert_eq!((p.method(), p.beta, resolved.eval_metric.as_str()), (method, 0.1, "reward_accuracy"));
            let events = client.events(&job.id, 0).await.expect("a watch");
            let metrics =
                events.iter().find_map(|e| if let Some(Body::Metrics(m)) = &e.body { Some(*m) } else { None });
            let start = match method {
                Method::Dpo => Some(std::f64::consts::LN_2),
                Method::Kto => Some(0.5),
                _ => None,
            };
            let first = metrics.expect("metrics").loss;
            assert!(start.is_none_or(|start| (first - start).abs() < 1e-4), "{name}: {first}");
            assert!(events.iter().any(|e| matches!(&e.body, Some(Body::Forgetting(_)))) == held, "{name}");
            let worst = |e: &proto::JobEvent| matches!(&e.body, Some(Body::Worst(w)) if w.examples.len() == 10);
            assert!(events.iter().any(worst), "{name}");
            let ended = client.ended(&job.id).await;
            assert_eq!(ended.state(), proto::JobState::Succeeded, "{name}: {ended:?}");
            let best = ended.result.and_then(|r| r.best_eval).expect("an evaluation");
            assert_eq!((best.reward_accuracy, best.perplexity), (Some(1.0), None), "{name}: {best:?}");
            assert!(best.reward_margin.is_some_and(|m| m > 0.0), "{name}: {best:?}");
            // on the rows that were held out, by the calls that serve
            for i in 40..52 {
                let (prompt, chosen, rejected) = answers(i);
                let gap = async |delta: &str| {
                    let chosen = score(client, delta, scored(&prompt, &chosen)).await.expect("a score");
                    chosen - score(client, delta, scored(&prompt, &rejected)).await.expect("a score")
                };
                let (before, after) = (gap("").await, gap(&name).await);
                assert!(after > 0.0 && after > before, "{name}: {prompt} {before} {after}");
            }
        }
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_and_a_published_checkpoint_change_nothing() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    for method in [Method::Dpo, Method::Kto] {
        let of = |name: &str| {
            let mut spec = wanted(name, proto::Task::CausalLm, method);
            let hyper = spec.hyper.as_mut().expect("hyper");
            (hyper.max_steps, hyper.checkpoint_every) = (Some(300), Some(5));
            spec
        };
        let straight = client.create_job(of("straight"), "").await.expect("a job");
        assert_eq!(client.ended(&straight.id).await.state(), proto::JobState::Succeeded);
        let job = client.create_job(of("paused"), "").await.expect("a job");
        eventually("it trains", async || client.job(&job.id).await.expect("the job").step >= 10).await;
        let request = client.request(proto::PauseJobRequest { id: job.id.clone() });
        let paused = client.training().pause_job(request).await.expect("a pause").into_inner().job.expect("a job");
        assert_eq!(paused.state(), proto::JobState::Paused, "{paused:?}");
        let request = proto::PublishCheckpointRequest { id: job.id.clone(), name: "half".into(), ..Default::default() };
        let half = client.training().publish_checkpoint(client.request(request)).await.expect("published");
        assert_eq!(half.into_inner().delta.expect("a delta").name, "half");
        let request = client.request(proto::ResumeJobRequest { id: job.id.clone() });
        client.training().resume_job(request).await.expect("it goes on");
        assert_eq!(client.ended(&job.id).await.state(), proto::JobState::Succeeded);
        let weights = async |name: &str| {
            let files = client.download(name).await.expect("its files").files;
            files
                .into_iter()
                .filter(|(file, _)| file.ends_with(".safetensors"))
                .map(|(_, data)| data)
                .collect::<Vec<_>>()
        };
        let (a, b, c) = (weights("straight").await, weights("paused").await, weights("half").await);
        assert!(a == b && !a.is_empty() && a != c, "{method:?}: the same bytes");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn examples_as_messages_are_read_as_lines_are() {
    use proto::example::Example as Form;
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    for method in METHODS {
        let one = |i: usize| {
            let (prompt, chosen, rejected) = answers(i);
            match method {
                Method::Kto => {
                    let (completion, label) = if i.is_multiple_of(2) { (chosen, true) } else { (rejected, false) };
                    Form::Rated(proto::RatedCompletion { prompt, completion, label })
                }
                _ => Form::Preferred(proto::PreferencePair { prompt, chosen, rejected }),
            }
        };
        let examples = (0..40).map(|i| proto::Example { example: Some(one(i)) }).collect();
        let source = proto::training_data::Source::Examples(proto::Examples { examples });
        let lines = wanted("style", proto::Task::CausalLm, method);
        let messages =
            proto::TrainingSpec { data: Some(proto::TrainingData { source: Some(source) }), ..lines.clone() };
        let plan = async |spec: proto::TrainingSpec| {
            let request = client.request(proto::PlanRequest { spec: Some(spec) });
            client.training().plan(request).await.expect("a plan").into_inner()
        };
        let (a, b) = (plan(lines).await, plan(messages).await);
        assert_eq!(a, b);
        assert_eq!((a.train_examples, a.validation_examples, a.warnings.len()), (40, 12, 0), "{:?}", a.warnings);
        assert!(a.supervised_tokens > 0 && a.train_tokens > a.supervised_tokens && a.memory.is_some());
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_learned_is_refused_by_name() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let refused = async |spec: proto::TrainingSpec| client.create_job(spec, "").await.expect_err("refused");
    let with = |method: Method, change: &dyn Fn(&mut proto::TrainingSpec)| {
        let mut spec = wanted("style", proto::Task::CausalLm, method);
        change(&mut spec);
        spec
    };
    let number = |spec: &mut proto::TrainingSpec, set: &dyn Fn(&mut proto::Preference)| {
        spec.preference.as_mut().into_iter().for_each(set);
    };
    let out_of_range = with(Method::Dpo, &|s| {
        number(s, &|p| (p.beta, p.label_smoothing, p.desirable_weight) = (Some(0.0), Some(0.5), Some(1.0)));
        s.hyper.as_mut().expect("hyper").label_smoothing = Some(0.1);
    });
    let status = refused(out_of_range).await;
    expect_invalid(&status, "spec.preference.beta", &["is 0", "100"]);
    expect_invalid(&status, "spec.preference.label_smoothing", &["is 0.5"]);
    expect_invalid(&status, "spec.preference.desirable_weight", &["is for kto", "dpo"]);
    expect_invalid(&status, "spec.hyper.label_smoothing", &["preference.label_smoothing"]);
    let status = refused(with(Method::Unspecified, &|_| ())).await;
    expect_invalid(&status, "spec.preference.method", &["dpo, orpo or kto"]);
    let status = refused(with(Method::Orpo, &|s| s.task = proto::Task::SeqCls.into())).await;
    expect_invalid(&status, "spec.preference", &["orpo", "seq_cls"]);
    let status =
        refused(with(Method::Kto, &|s| s.hyper.as_mut().expect("hyper").eval_metric = Some("perplexity".into()))).await;
    expect_invalid(&status, "eval_metric", &["loss, reward_accuracy, reward_margin"]);

    let data = |method: Method, lines: &[Value]| {
        let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
        with(method, &|s| s.data = Some(inline(text.clone())))
    };
    let good = json!({"prompt": "a", "chosen": "b", "rejected": "c"});
    let long = "x".repeat(400);
    let status = refused(data(
        Method::Dpo,
        &[
            good.clone(),
            json!({"prompt": "a", "chosen": "b", "rejected": "b"}),
            json!({"prompt": "a", "chosen": "b"}),
            json!({"prompt": "a", "chosen": 1, "rejected": ""}),
            json!({"prompt": "a", "completion": "b"}),
        ],
    ))
    .await;
    expect_invalid(&status, "line 2 /rejected", &["SAME_ANSWERS"]);
    expect_invalid(&status, "line 3 /rejected", &["MISSING_FIELD"]);
    expect_invalid(&status, "line 4 /chosen", &["WRONG_TYPE"]);
    expect_invalid(&status, "line 4 /rejected", &["EMPTY_COMPLETION"]);
    expect_invalid(&status, "line 5", &["MIXED_FORMATS"]);
    let same = json!({"prompt": "a", "chosen": format!("{long}b"), "rejected": format!("{long}c")});
    let hopeless = json!({"prompt": long, "chosen": "b", "rejected": "c"});
    let chat = json!({"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}]});
    let status = refused(data(Method::Orpo, &[good.clone(), same, hopeless, chat])).await;
    expect_invalid(&status, "line 2", &["SAME_ANSWERS"]);
    expect_invalid(&status, "line 3", &["NO_SUPERVISED_TOKEN"]);
    expect_invalid(&status, "line 4", &["CHAT_TEMPLATE"]);
    let rated = json!({"prompt": "a", "completion": "b", "label": true});
    let status =
        refused(data(Method::Kto, &[rated.clone(), json!({"prompt": "a", "completion": "b", "label": 1})])).await;
    expect_invalid(&status, "line 2 /label", &["WRONG_TYPE", "true"]);
    let status = refused(data(Method::Kto, &[good.clone(), good.clone()])).await;
    expect_invalid(&status, "data", &["WRONG_TASK", "label: true or false"]);
    let status = refused(data(Method::Dpo, &[rated.clone(), rated])).await;
    expect_invalid(&status, "data", &["WRONG_TASK", "{prompt, chosen, rejected}"]);
    let plain = spec("style", proto::Task::CausalLm, format!("{good}\n{good}\n"), 2);
    expect_invalid(&refused(plain).await, "data", &["WRONG_TASK", "set preference"]);
    running.stop().await;

    let world = World::encoder();
    let running = world.start().await;
    let status = running.client.create_job(wanted("style", proto::Task::CausalLm, Method::Dpo), "").await;
    expect_invalid(&status.expect_err("an encoder"), "task", &["causal_lm", "encoder"]);
    running.stop().await;
}
