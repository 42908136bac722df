//! Full fine-tuning through the API: a model of its own, to be had and to be served; no delta, and the base as it was.

use deltaserve::grpc::proto;
use proto::{JobState, download_model_response::Message, method_part::Part};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::support::*;

fn full(name: &str) -> proto::TrainingSpec {
    let mut spec = spec(name, proto::Task::CausalLm, stories(24), 30);
    spec.methods = vec![proto::MethodPart { part: Some(Part::Full(proto::FullTuning {})) }];
    spec.hyper.as_mut().expect("hyper").learning_rate = Some(1e-3);
    spec
}

/// Of a text like those that are trained on.
async fn likelihood(client: &Client) -> f64 {
    score(client, "", scored("the red cat", " sat on mat")).await.expect("a score")
}

async fn download(client: &Client, id: &str, folder: &std::path::Path) -> Result<proto::ModelResult, tonic::Status> {
    let request = client.request(proto::DownloadModelRequest { id: id.into() });
    let mut stream = client.training().download_model(request).await?.into_inner();
    let mut model = None;
    std::fs::create_dir_all(folder).expect("a folder");
    while let Some(reply) = stream.message().await? {
        match reply.message {
            Some(Message::Model(m)) => model = Some(m),
            Some(Message::Chunk(chunk)) => {
                use std::io::Write as _;
                let path = folder.join(&chunk.file);
                let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
                file.and_then(|mut f| f.write_all(&chunk.data)).expect("it is written");
            }
            None => {}
        }
    }
    Ok(model.expect("the model comes first"))
}

#[tokio::test(flavor = "multi_thread")]
async fn full_fine_tuning_makes_a_model_that_can_be_downloaded_and_served() {
    let mut world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let before = client.text("", "the red cat", 24).await;
    let knew = likelihood(client).await;
    let job = client.create_job(full("whole"), "").await.expect("a job");
    let end = client.ended(&job.id).await;
    assert_eq!(end.state(), JobState::Succeeded, "{:?}", end.failure);
    let result = end.result.expect("a result");
    let model = result.model.clone().expect("a model");
    assert_eq!((result.number, result.id.as_str()), (0, ""));
    assert_eq!(client.text("", "the red cat", 24).await, before, "the resident base");
    assert_eq!(client.delta("whole").await.expect_err("no delta").code(), Code::NotFound);

    let other = client.tenant("other");
    let copy = world.data_dir().with_file_name("copy");
    assert_eq!(download(&other, &job.id, &copy).await.expect_err("another tenant's").code(), Code::NotFound);
    assert_eq!(download(client, &job.id, &copy).await.expect("its files"), model);
    let kept = world.data_dir().join(&model.path);
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert_eq!(std::fs::read(copy.join(file)).ok(), std::fs::read(kept.join(file)).ok(), "{file}");
        assert!(kept.join(file).is_file(), "{file}");
    }
    running.stop().await;

    world.config.data_dir = copy.with_file_name("other-data");
    world.config.base.source = copy.display().to_string();
    let served = world.start().await;
    let info = served.client.info().await.expect("info");
    assert_eq!(info.base.unwrap_or_default().fingerprint, model.fingerprint);
    let knows = likelihood(&served.client).await;
    assert!(knows > 0.5 * knew, "it learned: {knew}, then {knows}"); // natural logarithms, below zero
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_fit_is_refused_with_the_numbers() {
    let mut world = World::new();
    world.config.train.max_bytes = Some(1000);
    let running = world.start().await;
    let client = &running.client;
    let refused = client.create_job(full("whole"), "").await.expect_err("it does not fit");
    let reason = refused.get_error_details().error_info().map(|i| i.reason.clone()).unwrap_or_default();
    assert_eq!((refused.code(), reason.as_str()), (Code::FailedPrecondition, "NOT_ENOUGH_MEMORY"));
    assert!(refused.message().contains("1000 is all"), "{}", refused.message());
    client.create_job(spec("small", proto::Task::CausalLm, stories(8), 2), "").await.expect("a delta fits");
    running.stop().await;
}

async fn delete(client: &Client, id: &str) -> Result<(), tonic::Status> {
    client.training().delete_model(client.request(proto::DeleteModelRequest { id: id.into() })).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_stays_over_a_restart_until_it_is_deleted() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let mut short = full("whole");
    short.hyper.as_mut().expect("hyper").max_steps = Some(2);
    let job = client.create_job(short, "").await.expect("a job");
    let model = client.ended(&job.id).await.result.and_then(|r| r.model).expect("a model");
    let delta = client.create_job(spec("small", proto::Task::CausalLm, stories(8), 2), "").await.expect("a job");
    client.ended(&delta.id).await;
    running.stop().await;

    let running = world.start().await;
    let client = &running.client;
    let copy = world.data_dir().with_file_name("copy");
    assert_eq!(download(client, &job.id, &copy).await.expect("it is still there"), model);
    for id in [delta.id.as_str(), "nothing"] {
        assert_eq!(download(client, id, &copy).await.expect_err("no model").code(), Code::NotFound);
        assert_eq!(delete(client, id).await.expect_err("no model").code(), Code::NotFound);
    }
    assert_eq!(delete(&client.tenant("other"), &job.id).await.expect_err("another's").code(), Code::NotFound);
    assert!(world.data_dir().join(&model.path).is_dir());
    delete(client, &job.id).await.expect("it goes");
    assert!(!world.data_dir().join(&model.path).exists());
    assert_eq!(download(client, &job.id, &copy).await.expect_err("gone").code(), Code::NotFound);
    assert_eq!(delete(client, &job.id).await.expect_err("gone").code(), Code::NotFound);
    assert_eq!(client.job(&job.id).await.expect("its record stays").state(), JobState::Succeeded);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_with_its_key_finds_the_job_though_its_data_and_delta_are_gone() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    client.upload("old", &world.delta(1)).await.expect("an upload");
    let dataset = client.upload_dataset("texts", &stories(8)).await;
    let mut next = spec("new", proto::Task::CausalLm, String::new(), 1);
    next.data = Some(proto::TrainingData { source: Some(proto::training_data::Source::DatasetId(dataset.clone())) });
    (next.methods, next.from_delta) = (vec![], "old".into());
    let first = client.create_job(next.clone(), "key").await.expect("a job");
    client.ended(&first.id).await;
    let request = client.request(proto::DeleteDatasetRequest { id: dataset });
    client.training().delete_dataset(request).await.expect("the data goes");
    let request = client.request(proto::DeleteDeltaRequest { name: "old".into(), expected_id: None });
    client.deltas().delete_delta(request).await.expect("the delta goes");
    assert_eq!(client.create_job(next.clone(), "key").await.expect("the same job").id, first.id);
    assert_eq!(client.create_job(next.clone(), "other").await.expect_err("no data").code(), Code::NotFound);
    next.output_name = "newer".into();
    assert_eq!(client.create_job(next, "key").await.expect_err("another request").code(), Code::AlreadyExists);
    running.stop().await;
}
