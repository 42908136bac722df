//! Tenants as wholes: what one may have, what is recorded of what it changes, and that nothing is left of one that was deleted.

use std::{collections::HashMap, path::Path, time::Duration};

use deltaserve::{audit::AuditConfig, grpc::proto};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::*;

/// Tokens of a sequence that does not come to its end by itself.
const MANY: u32 = 16_000;

/// A tenant's limits and uses, by name.
async fn quota(client: &Client) -> HashMap<String, proto::Quota> {
    let reply = client.tenants().get_quota(client.request(proto::GetQuotaRequest {})).await;
    let reply = reply.expect("a quota").into_inner();
    assert_eq!(reply.tenant, client.tenant);
    reply.quotas.into_iter().map(|q| (q.name.clone(), q)).collect()
}

async fn delete(client: &Client, tenant: &str) -> Result<proto::DeleteTenantResponse, Status> {
    let request = client.request(proto::DeleteTenantRequest { tenant: tenant.into() });
    Ok(timely("a deletion", client.tenants().delete_tenant(request)).await?.into_inner())
}

async fn dataset(client: &Client, jsonl: &str) -> Result<proto::Dataset, Status> {
    use proto::upload_dataset_request::Message;
    let header = Message::Header(proto::DatasetHeader { name: "zebra rows".into() });
    let messages = [header, Message::Data(jsonl.as_bytes().to_vec().into())];
    let messages = messages.map(|m| proto::UploadDatasetRequest { message: Some(m) });
    let request = client.request(futures::stream::iter(messages));
    Ok(client.training().upload_dataset(request).await?.into_inner().dataset.expect("a dataset"))
}

/// A job that does not end by itself.
fn endless(name: &str) -> proto::TrainingSpec {
    let mut spec = spec(name, proto::Task::CausalLm, stories(64), 1_000_000);
    spec.hyper.as_mut().expect("hyper").batch_size = Some(1);
    spec
}

/// What a refusal says of the limit: its name, value and what is used; and whether waiting is advised.
#[track_caller]
fn refused(status: &Status, reason: &str) -> (String, i64, Option<u64>, bool) {
    assert_eq!(kind(status), (Code::ResourceExhausted, reason.to_owned()), "{status:?}");
    let details = status.get_error_details();
    let violation = details.quota_failure().and_then(|q| q.violations.first().cloned()).expect("a QuotaFailure");
    let used = violation.quota_dimensions.get("used").and_then(|n| n.parse().ok());
    let waits = details.retry_info().and_then(|r| r.retry_delay).is_some_and(|delay| !delay.is_zero());
    (violation.quota_id, violation.quota_value, used, waits)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_may_store_is_bounded_told_and_freed_by_deleting() {
    let mut world = World::new();
    let tenants = &mut world.config.tenants;
    (tenants.max_deltas, tenants.max_versions, tenants.max_dataset_bytes) = (Some(1), Some(2), Some(100));
    let running = world.start().await;
    let (one, other) = (running.client.tenant("one"), running.client.tenant("other"));
    one.upload("a", &world.delta(1)).await.expect("the first");
    let full = one.upload("b", &world.delta(2)).await.expect_err("a second name");
    assert_eq!(refused(&full, "TENANT_DELTAS"), ("deltas".into(), 1, Some(1), false));
    one.upload("a", &world.delta(2)).await.expect("a second version");
    let full = one.upload("a", &world.delta(3)).await.expect_err("a third version");
    assert_eq!(refused(&full, "TENANT_VERSIONS"), ("versions".into(), 2, Some(2), false));
    assert!(full.message().contains("2 versions of deltas") && !full.message().contains("one"), "{full:?}");
    one.upload("a", &world.delta(1)).await.expect("what is there costs nothing");
    other.upload("b", &world.delta(2)).await.expect("each has its own");

    let row = json!({"text": "x".repeat(60)}).to_string() + "\n";
    let kept = dataset(&one, &row).await.expect("the first");
    let full = dataset(&one, &row).await.expect_err("the second");
    assert_eq!(refused(&full, "TENANT_DATASET_BYTES"), ("dataset_bytes".into(), 100, Some(row.len() as u64), false));

    let told = quota(&one).await;
    let of = |name: &str| (told[name].limit, told[name].used);
    assert_eq!((of("deltas"), of("versions")), ((Some(1.0), 1.0), (Some(2.0), 2.0)));
    assert_eq!((of("dataset_bytes"), of("train_jobs")), ((Some(100.0), row.len() as f64), (None, 0.0)));
    assert!(of("stored_bytes").0.is_none() && of("stored_bytes").1 > 0.0);
    assert_eq!(told.len(), 10);

    let request = one.request(proto::DeleteDeltaRequest { name: "a".into(), expected_id: None });
    one.deltas().delete_delta(request).await.expect("deleted");
    let request = one.request(proto::DeleteDatasetRequest { id: kept.id });
    one.training().delete_dataset(request).await.expect("deleted");
    one.upload("b", &world.delta(2)).await.expect("there is room");
    dataset(&one, &row).await.expect("there is room");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_charged_as_they_come_and_a_debt_is_refused_until_it_is_paid() {
    let mut world = World::new();
    world.config.tenants.tokens = Some((2.0, 5));
    let running = world.start().await;
    let (writes, reads, other) =
        (running.client.tenant("writes"), running.client.tenant("reads"), running.client.tenant("other"));
    // 4 tokens read and 40 written, of which 5 are free
    assert_eq!(writes.generate(ask("", "once", 40)).await.expect("the first").ids.len(), 40);
    let debt = writes.generate(ask("", "once", 1)).await.expect_err("in debt");
    assert_eq!(refused(&debt, "TENANT_TOKENS"), ("tokens_per_second".into(), 2, None, true));
    score(&reads, "", scored("once", " upon a time there was a cat")).await.expect("the first");
    let debt = score(&reads, "", scored("once", " upon")).await.expect_err("in debt");
    refused(&debt, "TENANT_TOKENS");
    assert!(other.generate(ask("", "once", 1)).await.is_ok(), "it is nobody else's debt");
    assert!(writes.info().await.is_ok(), "questions cost nothing");
    let told = quota(&writes).await.remove("tokens_per_second").expect("told");
    assert_eq!((told.limit, told.burst), (Some(2.0), Some(5)));
    assert!(told.used > 5.0 && told.used <= 44.0, "{told:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_own_deltas_make_room_in_its_share_of_the_memory() {
    let mut world = World::long();
    world.config.tenants.max_resident_bytes = Some(world.delta_bytes() * 3 / 2);
    let running = world.start().await;
    let (one, other) = (running.client.tenant("one"), running.client.tenant("other"));
    for (name, seed) in [("a", 1), ("b", 2)] {
        one.upload(name, &world.delta(seed)).await.expect("an upload");
    }
    other.upload("c", &world.delta(3)).await.expect("an upload");
    other.text("c", "once", 2).await;
    for name in ["a", "b", "a"] {
        one.text(name, "once", 2).await;
        let told = quota(&one).await.remove("resident_bytes").expect("told");
        assert!(told.used > 0.0 && Some(told.used) <= told.limit, "{told:?}");
    }
    let meta = other.delta("c").await.expect("the delta").delta.unwrap_or_default();
    assert!(meta.resident_bytes > 0, "another tenant's stays");
    let stream = one.stream(ask("a", "once", MANY)).await.expect("admitted");
    let full = one.generate(ask("b", "once", 2)).await.expect_err("the one in use cannot go");
    let (name, _, used, waits) = refused(&full, "TENANT_RESIDENT_BYTES");
    assert!(name == "resident_bytes" && used.is_some_and(|used| used > 0) && waits);
    assert!(other.generate(ask("c", "once", 2)).await.is_ok());
    drop(stream);
    eventually("there is room", async || one.generate(ask("b", "once", 2)).await.is_ok()).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_in_progress_are_bounded_by_the_file_of_limits_for_those_whom_it_names() {
    let mut world = World::new();
    let file = world.data_dir().with_file_name("limits.json");
    std::fs::write(&file, json!({"tenants": {"one": {"max_train_jobs": 1}}}).to_string()).expect("written");
    world.config.tenants.file = Some(file);
    let running = world.start().await;
    let (one, other) = (running.client.tenant("one"), running.client.tenant("other"));
    let job = one.create_job(endless("a"), "").await.expect("the first");
    let full = one.create_job(endless("b"), "").await.expect_err("the second");
    assert_eq!(refused(&full, "TENANT_TRAIN_JOBS"), ("train_jobs".into(), 1, Some(1), true));
    for name in ["a", "b"] {
        let short = spec(name, proto::Task::CausalLm, stories(8), 2);
        other.create_job(short, "").await.expect("it is not named");
    }
    let request = one.request(proto::CancelJobRequest { id: job.id });
    one.training().cancel_job(request).await.expect("a cancel");
    let short = || spec("c", proto::Task::CausalLm, stories(8), 2);
    eventually("there is room", async || one.create_job(short(), "").await.is_ok()).await;
    running.stop().await;
}

/// Files below a folder that have these bytes in them or in their names.
fn with(dir: &Path, marker: &[u8], found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            with(&path, marker, found);
            continue;
        }
        let has = |bytes: &[u8]| bytes.windows(marker.len()).any(|w| w == marker);
        // what is removed at this moment is not there
        if std::fs::read(&path).is_ok_and(|bytes| has(&bytes)) || has(path.to_string_lossy().as_bytes()) {
            found.push(path.display().to_string());
        }
    }
}

fn marked(world: &World) -> Vec<String> {
    let mut found = Vec::new();
    with(&world.data_dir(), b"zebra", &mut found);
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_tenant_ends_at_once_and_nothing_of_it_is_left() {
    let world = World::long();
    let running = world.start().await;
    let (mine, other) = (running.client.tenant("zebra-works"), running.client.tenant("other"));
    for seed in 1..4 {
        mine.upload("zebra-style", &world.delta(seed)).await.expect("an upload");
    }
    other.upload("style", &world.delta(3)).await.expect("the same bytes");
    let said = other.text("style", "once", 8).await;
    dataset(&mine, &(json!({"text": "zebra ".repeat(20)}).to_string() + "\n")).await.expect("an upload");
    let short = spec("zebra-trained", proto::Task::CausalLm, stories(8), 2);
    let done = mine.create_job(short, "").await.expect("a job");
    mine.events(&done.id, 0).await.expect("it ends");
    // text with the mark in the request of a job that runs, and a stream that goes on
    let job = mine.create_job(endless("zebra-never"), "zebra-key").await.expect("a job");
    eventually("it runs", async || mine.job(&job.id).await.is_ok_and(|j| j.step > 0)).await;
    let mut stream = mine.stream(ask("zebra-style", "once", MANY)).await.expect("admitted");
    stream.message().await.expect("a piece").expect("a piece");
    assert!(!marked(&world).is_empty());

    for tenant in ["zebra-works", "nobody", "../x"] {
        let refused = delete(&other, tenant).await.expect_err("it is not theirs");
        let wanted = if tenant == "../x" { Code::InvalidArgument } else { Code::PermissionDenied };
        assert_eq!(refused.code(), wanted, "{refused:?}");
    }
    let deleted = delete(&mine, "zebra-works").await.expect("deleted");
    assert_eq!((deleted.deltas, deleted.versions, deleted.datasets, deleted.jobs), (2, 4, 1, 2));
    assert_eq!((deleted.models, deleted.blobs_left), (0, 0));
    let ended = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if it were complete"),
            Err(status) => break status,
        }
    };
    assert_eq!(kind(&ended), (Code::Unavailable, "TENANT_DELETING".into()));
    eventually("no file has it", async || marked(&world).is_empty()).await;
    assert_eq!(mine.job(&job.id).await.expect_err("gone").code(), Code::NotFound);
    assert_eq!((mine.list().await.len(), mine.jobs().await.len()), (0, 0));
    assert_eq!(mine.generate(ask("zebra-style", "once", 2)).await.expect_err("gone").code(), Code::NotFound);
    assert!(quota(&mine).await.values().all(|q| q.used == 0.0));

    assert_eq!(other.text("style", "once", 8).await, said, "others have all of theirs");
    assert_eq!(delete(&mine, "zebra-works").await.expect("again"), proto::DeleteTenantResponse::default());
    let again = mine.upload("zebra-style", &world.delta(1)).await.expect("the name is free");
    assert_eq!(again.number, 1);
    assert!(mine.generate(ask("zebra-style", "once", 2)).await.is_ok());
    running.stop().await;
    // and it stays so after a restart
    let running = world.start().await;
    assert_eq!(running.client.tenant("zebra-works").list().await.len(), 1);
    running.stop().await;
}

/// The events of a log, each as its action, phase, code and object.
fn events(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("a log");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_changes_something_is_recorded_with_the_versions_before_and_after() {
    let mut world = World::new();
    let path = world.data_dir().with_file_name("audit.jsonl");
    world.config.audit = AuditConfig { file: Some(path.clone()), required: true };
    let running = world.start().await;
    let client = running.client.tenant("acme");
    let first = client.upload("style", &world.delta(1)).await.expect("an upload");
    let second = client.upload("style", &world.delta(2)).await.expect("a replacement");
    client.promote("style", "1").await.expect("promoted");
    client.upload("not a name", &world.delta(1)).await.expect_err("refused");
    client.text("style", "once", 2).await;
    let rows = dataset(&client, &stories(4)).await.expect("a dataset");
    let job = client.create_job(spec("trained", proto::Task::CausalLm, stories(8), 2), "").await.expect("a job");
    let made = client.ended(&job.id).await.result.expect("a result");
    let request = client.request(proto::DeleteDeltaRequest { name: "style".into(), expected_id: None });
    client.deltas().delete_delta(request).await.expect("deleted");
    let request = client.request(proto::DeleteDeltaRequest { name: "style".into(), expected_id: None });
    client.deltas().delete_delta(request).await.expect_err("gone");
    delete(&client, "acme").await.expect("deleted");
    running.stop().await;

    let events = events(&path);
    let ends: Vec<&Value> = events.iter().filter(|e| e["phase"] == "end").collect();
    assert_eq!(events.len(), 2 * ends.len(), "each is announced and has ended");
    let named = |action: &str| ends.iter().filter(|e| e["action"] == action).copied().collect::<Vec<_>>();
    let version = |n: u64, id: &str| json!({"number": n, "id": id});
    let uploads = named("Upload");
    assert_eq!(uploads.len(), 3);
    assert_eq!((&uploads[0]["before"], &uploads[0]["after"]), (&Value::Null, &version(1, &first.id)));
    assert_eq!((&uploads[1]["before"], &uploads[1]["after"]), (&version(1, &first.id), &version(2, &second.id)));
    assert_eq!((&uploads[2]["code"], &uploads[2]["reason"]), (&json!("invalid_argument"), &json!("INVALID_REQUEST")));
    let moved = named("SetAlias")[0];
    assert_eq!((&moved["before"], &moved["after"]), (&version(2, &second.id), &version(1, &first.id)));
    assert_eq!(
        (&named("UploadDataset")[0]["object"], &named("CreateJob")[0]["object"]),
        (&json!(rows.id), &json!(job.id))
    );
    let published = named("JobPublish")[0];
    assert_eq!((&published["object"], &published["job"]), (&json!("trained"), &json!(job.id)));
    assert_eq!(published["after"], version(1, &made.id));
    let gone = named("DeleteDelta");
    assert_eq!((&gone[0]["before"], &gone[0]["code"]), (&version(1, &first.id), &json!("ok")));
    assert_eq!((&gone[1]["object"], &gone[1]["reason"]), (&json!("style"), &json!("DELTA_NOT_FOUND")));
    assert_eq!(
        (&named("DeleteTenant")[0]["object"], &named("DeleteTenant")[0]["code"]),
        (&json!("acme"), &json!("ok"))
    );
    assert!(ends.iter().all(|e| e["tenant"] == "acme" && e["time"].as_str().is_some_and(|t| t.ends_with('Z'))));
    let from = |e: &Value| e["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:"));
    assert!(ends.iter().all(|e| e["action"] == "JobPublish" || from(e)), "{ends:?}");
    assert!(named("Generate").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_log_is_required_and_cannot_be_written_nothing_is_changed() {
    let mut world = World::new();
    let folder = world.data_dir().with_file_name("log");
    std::fs::create_dir(&folder).expect("made");
    world.config.audit = AuditConfig { file: Some(folder.join("audit.jsonl")), required: true };
    let running = world.start().await;
    let client = &running.client;
    client.upload("style", &world.delta(1)).await.expect("an upload");
    std::fs::remove_dir_all(&folder).expect("removed");
    let refused = client.upload("style", &world.delta(2)).await.expect_err("it cannot be recorded");
    assert_eq!(kind(&refused), (Code::Unavailable, "AUDIT_UNAVAILABLE".into()));
    assert_eq!(client.delta("style").await.expect("the delta").versions.len(), 1);
    assert!(client.generate(ask("style", "once", 2)).await.is_ok(), "what changes nothing goes on");
    std::fs::create_dir(&folder).expect("made");
    timely("it goes on", async {
        while client.upload("style", &world.delta(2)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    running.stop().await;
}
