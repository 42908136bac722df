//! Messages that are not what their frames, types or names say, sent as bytes below any client library; and what errors
//! tell of the server.

use std::fs;

use bytes::Bytes;
use deltaserve::{delta::DeltaFiles, grpc::proto};
use http_body_util::{BodyExt as _, Full};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service as _, http},
    transport::Channel,
};

use crate::support::*;

const TOKENIZE: &str = "/deltaserve.v1.InferenceService/Tokenize";

/// A message in its frame, as the frame says.
fn framed(flag: u8, length: u32, message: &[u8]) -> Vec<u8> {
    [&[flag][..], &length.to_be_bytes(), message].concat()
}

/// The same, and as it is.
fn whole(message: &[u8]) -> Vec<u8> {
    framed(0, message.len() as u32, message)
}

/// `TokenizeRequest { text: "hi" }`.
const HI: [u8; 4] = [0x0A, 2, b'h', b'i'];

/// What a call of these bytes ends with.
async fn call(channel: &Channel, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> (Code, String) {
    let mut request = http::Request::builder().method("POST").uri(path);
    for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")].iter().chain(headers) {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::new(Full::new(Bytes::from(body)))).expect("a request");
    let mut channel = channel.clone();
    std::future::poll_fn(|cx| channel.poll_ready(cx)).await.expect("a connection");
    let (parts, body) = timely("an answer", channel.call(request)).await.expect("an answer").into_parts();
    let collected = timely("its end", body.collect()).await;
    let trailers = collected.ok().and_then(|all| all.trailers().cloned()).unwrap_or_default();
    let find = |name: &str| parts.headers.get(name).or_else(|| trailers.get(name)).cloned();
    let code = find("grpc-status").map_or(Code::Unknown, |value| Code::from_bytes(value.as_bytes()));
    let message = find("grpc-message").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    (code, message.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_not_what_they_say_end_their_own_call() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let said = client.text("", "hello", 4).await;
    let groups = [0x7B].repeat(100_000); // an unknown group in a group in a group
    let unknown = [&HI[..], &[0x9A, 0x06, 1, b'x']].concat(); // field 99
    let cases: [(&str, Vec<u8>, Code); 12] = [
        ("as it should be", whole(&HI), Code::Ok),
        ("with a field that nobody knows", whole(&unknown), Code::Ok),
        ("4 GiB that do not come", framed(0, u32::MAX, &HI), Code::OutOfRange),
        ("compressed, it says, by nothing", framed(1, 4, &HI), Code::Internal),
        ("with a flag that there is none of", framed(7, 4, &HI), Code::Internal),
        ("shorter than it says", framed(0, 100, &HI), Code::Internal),
        ("no message", vec![], Code::Internal),
        ("half a frame", vec![0, 0, 0], Code::Internal),
        ("text that is not UTF-8", whole(&[0x0A, 2, 0xFF, 0xFE]), Code::Internal),
        ("text longer than the message", whole(&[0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F, b'x']), Code::Internal),
        (
            "a number without an end",
            whole(&[0x10].iter().chain(&[0xFF; 11]).copied().collect::<Vec<_>>()),
            Code::Internal,
        ),
        ("groups in groups", whole(&groups), Code::Internal),
    ];
    for (what, body, code) in cases {
        let found = call(&client.channel, TOKENIZE, &[], body).await;
        assert_eq!(found.0, code, "{what}: {}", found.1);
    }
    let gzip = call(&client.channel, TOKENIZE, &[("grpc-encoding", "gzip")], framed(1, 4, &HI)).await;
    assert_eq!(gzip.0, Code::Unimplemented, "nothing is unpacked: {}", gzip.1);
    let late = call(&client.channel, TOKENIZE, &[("grpc-timeout", "99999999999H")], whole(&HI)).await;
    assert_eq!(late.0, Code::Ok, "a deadline that is none is none: {}", late.1);
    for path in ["/deltaserve.v1.InferenceService/Nothing", "/deltaserve.v1.Nobody/Generate", "/../../etc/passwd", "/"]
    {
        assert_eq!(call(&client.channel, path, &[], whole(&HI)).await.0, Code::Unimplemented, "{path}");
    }
    assert_eq!(client.text("", "hello", 4).await, said);
    running.stop().await;
}

/// Fails where a status tells of a path of this server.
#[track_caller]
fn tells_no_path(status: &Status, world: &World) {
    let root = world.data_dir().parent().expect("a folder").display().to_string();
    let all = format!("{} {}", status.message(), String::from_utf8_lossy(status.details()));
    for word in [root.as_str(), "/src/", ".cargo", ".rs:", "blobs/"] {
        assert!(!all.contains(word), "{word:?} in {all}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_tell_nothing_of_the_servers_files() {
    const WEIGHTS: &str = "adapter_model.safetensors";
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let good = world.delta(1);
    client.upload("good", &good).await.expect("an upload");
    let with = |name: &str, data: &'static [u8]| {
        let mut files: DeltaFiles = good.clone();
        files.files.insert(name.into(), Bytes::from_static(data));
        files
    };
    let bad = [
        with(WEIGHTS, b"torn"),
        with(WEIGHTS, b"\x02\0\0\0\0\0\0\0{}"),
        with("adapter_config.json", b"{"),
        with("adapter_model.bin", b"\x80\x02."),
        with("notes.txt", b""),
    ];
    for files in &bad {
        tells_no_path(&client.upload("bad", files).await.expect_err("refused"), &world);
    }
    for reference in ["nobody", "good@99", "../good", "good@../../x", "/etc/passwd"] {
        tells_no_path(&client.generate(ask(reference, "x", 1)).await.expect_err("unknown"), &world);
        tells_no_path(&client.delta(reference).await.expect_err("unknown"), &world);
        tells_no_path(&client.download(reference).await.expect_err("unknown"), &world);
        tells_no_path(&client.job(reference).await.expect_err("unknown"), &world);
        let mut spec = spec("out", proto::Task::CausalLm, stories(4), 1);
        spec.data =
            Some(proto::TrainingData { source: Some(proto::training_data::Source::DatasetId(reference.into())) });
        tells_no_path(&client.create_job(spec, "").await.expect_err("unknown"), &world);
    }
    running.stop().await;

    // a blob that is gone is an error of the server's: the caller learns which delta, and nothing of where it was
    let mut files = vec![world.data_dir()];
    let mut removed = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
        } else if fs::read(&path).is_ok_and(|data| data == good.files[WEIGHTS]) {
            fs::remove_file(&path).expect("it can be removed");
            removed += 1;
        }
    }
    assert_eq!(removed, 1, "there was one blob of it");
    let running = world.start().await;
    for lost in [
        running.client.generate(ask("good", "x", 1)).await.expect_err("lost"),
        running.client.download("good").await.expect_err("lost"),
    ] {
        assert_eq!(kind(&lost), (Code::DataLoss, "DELTA_CORRUPT".to_owned()));
        tells_no_path(&lost, &world);
    }
    running.stop().await;
}
