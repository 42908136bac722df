//! What the tests are written in: a world (base and data directory on disk), a server on it, a tenant's client.

use std::{
    collections::BTreeMap,
    future::Future,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use deltaserve::{
    access::AccessConfig,
    app,
    audit::AuditConfig,
    config::{BaseConfig, Config, DeviceChoice, EngineLimits, TenantConfig, TrainLimits},
    delta::{Delta, DeltaFiles, DeltaSpec, Head, LowRank, Patch, Task},
    grpc::{GrpcConfig, TENANT_KEY, proto},
    interop::{self, EncodeMeta},
    model::{
        Base, LoadOptions,
        testing::{Rng, tiny_bert, tiny_llama, write_random},
    },
    ops::{Activations, Halves, Priority},
    telemetry::LogFormat,
};
use futures::StreamExt as _;
use proto::{
    delta_service_client::DeltaServiceClient, generate_response::Event,
    inference_service_client::InferenceServiceClient, job_event::Body, server_service_client::ServerServiceClient,
    tenant_service_client::TenantServiceClient, training_service_client::TrainingServiceClient,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use tonic_types::StatusExt as _;

/// Long enough for two cores that are busy with other tests, short enough to tell a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A tokenizer of single characters: byte-level BPE without merges, 128 ids.
fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    let specials = ["<unk>", "<s>", "</s>"];
    let printable = (33u8..127).map(|b| char::from(b).to_string());
    let names = specials.into_iter().map(str::to_owned).chain(printable).chain(["Ġ".to_owned(), "Ċ".to_owned()]);
    for name in names.chain((0..).map(|i| format!("[{i}]"))).take(128) {
        vocab.insert(name, vocab.len().into());
    }
    let added = specials.iter().enumerate().map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

/// A base and a data directory on disk, and how to serve them.
pub(crate) struct World {
    root: TempDir,
    pub(crate) base: Arc<Base>,
    pub(crate) config: Config,
}

impl World {
    /// A causal base with a context of 256.
    pub(crate) fn new() -> Self {
        Self::of(tiny_llama(), 7)
    }

    /// A causal base with room for streams that take a while.
    pub(crate) fn long() -> Self {
        let mut config = tiny_llama();
        config["max_position_embeddings"] = json!(16_384);
        Self::of(config, 7)
    }

    /// A sentence encoder.
    pub(crate) fn encoder() -> Self {
        Self::of(tiny_bert(), 7)
    }

    pub(crate) fn of(config: Value, seed: u64) -> Self {
        let root = tempfile::tempdir().expect("a temporary folder");
        let dir = root.path().join("base");
        write_random(&dir, &config, seed).expect("a base is written");
        std::fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).expect("a tokenizer is written");
        let options = LoadOptions::default();
        let base = Arc::new(Base::load(&dir, &options).expect("the base loads"));
        let any = "127.0.0.1:0".parse().expect("an address");
        let config = Config {
            base: BaseConfig {
                source: dir.display().to_string(),
                device: DeviceChoice::Cpu,
                dtype: None,
                quantize: None,
            },
            data_dir: root.path().join("data"),
            store: Default::default(),
            listen: any,
            http: None,
            access: AccessConfig::default(),
            grpc: GrpcConfig { max_message_bytes: 4 << 20, max_upload_bytes: 16 << 20, max_calls: 512 },
            engine: EngineLimits {
                max_batch_tokens: 256,
                max_sequences: 16,
                kv_positions: None,
                prefix_cache: true,
                constraint_bytes: 256 << 20,
                speculative_ngram: 0,
                max_queue: 64,
                activations: Activations::AsWeights,
            },
            tenants: TenantConfig::default(),
            audit: AuditConfig::default(),
            halves: Halves::Training,
            train: TrainLimits {
                max_jobs: 8,
                max_paused: 8,
                max_slowdown: 0.1,
                max_yield: Duration::from_millis(20),
                max_bytes: None,
                share: 1,
                priority: Priority::Normal,
                floor_percent: 0,
            },
            max_resident_bytes: 64 << 20,
            delta_retry: Duration::from_secs(5),
            drain: Duration::from_secs(20),
            log_format: LogFormat::Text,
            log_filter: "warn".into(),
            adapters_dir: None,
        };
        Self { root, base, config }
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.root.path().join("data")
    }

    pub(crate) async fn start(&self) -> Running {
        let server = app::start(self.config.clone(), None).await.expect("the server starts");
        let channel = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address").connect_lazy();
        Running { server, client: Client { channel, tenant: "default".into(), key: None } }
    }

    /// The real binary on this world, once it serves.
    pub(crate) async fn spawn(&self) -> Spawned {
        self.spawn_with(&[]).await.expect("the binary serves")
    }

    /// As [`Self::spawn`], with these environment variables; `None` if it ended before it served.
    pub(crate) async fn spawn_with(&self, env: &[(&str, String)]) -> Option<Spawned> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_deltaserve"))
            .args(["serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--threads", "1", "--train-nice", "0"])
            .args(["--log", "warn,deltaserve::app=info", "--log-format", "json"])
            .args(["--drain-seconds", &self.config.drain.as_secs().to_string()])
            .arg("--base")
            .arg(&self.config.base.source)
            .arg("--data-dir")
            .arg(self.data_dir())
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let log = child.stderr.take().expect("its log is piped");
        let client = |address: &str| {
            let channel = Channel::from_shared(address.to_owned()).expect("an address").connect_lazy();
            Client { channel, tenant: "default".into(), key: None }
        };
        // from here on it ends with the test, also if it never serves
        let (address, http) = (String::new(), String::new());
        let mut spawned = Spawned { child, address, http, client: client("http://127.0.0.1:0") };
        let (found, mut ready) = tokio::sync::mpsc::channel(1);
        // reads the log to its end, so that the server never waits for it
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                let event: Value = serde_json::from_str(&line).unwrap_or_default();
                match (event["message"].as_str(), event["grpc"].as_str()) {
                    (Some("ready"), Some(grpc)) => {
                        // as Rust shows an address that there may be
                        let http = event["http"].as_str().unwrap_or_default();
                        let http = http.trim_start_matches("Some(").trim_end_matches(')');
                        drop(found.try_send((grpc.to_owned(), http.to_owned())));
                    }
                    _ => eprintln!("server: {line}"),
                }
            }
        });
        let (grpc, http) = timely("the binary is ready", ready.recv()).await?;
        spawned.address = format!("http://{grpc}");
        spawned.http = format!("http://{http}");
        spawned.client = client(&spawned.address);
        Some(spawned)
    }

    /// A random low-rank delta on every linear, strong enough to change what is generated, as a PEFT folder.
    pub(crate) fn delta(&self, seed: u64) -> DeltaFiles {
        let task = if self.base.arch.is_encoder_decoder() { Task::Seq2Seq } else { Task::CausalLm };
        self.encode(&self.random_delta(seed, task, None))
    }

    /// The same with a head of these labels.
    pub(crate) fn classifier(&self, seed: u64, labels: &[&str]) -> DeltaFiles {
        let mut rng = Rng(seed ^ 0x5eed);
        let weight = random(&mut rng, (labels.len(), self.base.arch.hidden), 1.0);
        let mut delta = self.random_delta(seed, Task::SeqCls, Some(Head::linear(weight, None)));
        delta.spec.labels = labels.iter().map(|&l| l.to_owned()).collect();
        self.encode(&delta)
    }

    pub(crate) fn random_delta(&self, seed: u64, task: Task, head: Option<Head>) -> Delta {
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let patches = self.base.sites.linears().map(|(id, site)| {
            let a = random(&mut rng, (4, site.in_dim), 0.4);
            let b = random(&mut rng, (4, site.out_dim), 0.4);
            (id, Patch::LowRank(LowRank { a, b, scale: 2.0 }))
        });
        let spec = DeltaSpec {
            methods: vec!["lora".into()],
            task,
            labels: vec![],
            num_virtual_tokens: 0,
            problem: Default::default(),
            parameters: 0,
            resident_bytes: 0,
        };
        Delta::new(spec, patches.collect(), head)
    }

    pub(crate) fn encode(&self, delta: &Delta) -> DeltaFiles {
        interop::encode(delta, &self.base, &EncodeMeta::default()).expect("a delta is encoded")
    }

    /// Bytes of a [`Self::delta`] in memory.
    pub(crate) fn delta_bytes(&self) -> u64 {
        self.random_delta(1, Task::CausalLm, None).bytes()
    }
}

pub(crate) fn random(rng: &mut Rng, shape: (usize, usize), spread: f32) -> Tensor {
    let data: Vec<f32> = (0..shape.0 * shape.1).map(|_| spread * rng.normal()).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).expect("a tensor")
}

/// A server in this process.
pub(crate) struct Running {
    pub(crate) server: app::Server,
    pub(crate) client: Client,
}

impl Running {
    pub(crate) async fn stop(self) {
        drop(self.client);
        self.server.stop().await.expect("it stops cleanly");
    }
}

/// A server of its own; killed when dropped.
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) address: String,
    /// Where metrics and probes are.
    pub(crate) http: String,
    pub(crate) client: Client,
}

impl Spawned {
    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// SIGTERM.
    pub(crate) fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().expect("kill runs");
        assert!(status.success());
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One tenant's view of a server.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) channel: Channel,
    /// Empty = calls name none.
    pub(crate) tenant: String,
    /// An API key or token.
    pub(crate) key: Option<String>,
}

/// What a generate stream said.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Said {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) pieces: usize,
    pub(crate) finished: proto::Finished,
}

/// A greedy request of `max_new` tokens that does not stop earlier.
pub(crate) fn ask(delta: &str, text: &str, max_new: u32) -> proto::GenerateRequest {
    let (prompt, options) = (Some(prompt(text)), Some(options(max_new)));
    proto::GenerateRequest { delta: delta.into(), prompt, options, deltas: vec![] }
}

pub(crate) fn prompt(text: &str) -> proto::Prompt {
    proto::Prompt { prompt: Some(proto::prompt::Prompt::Text(text.into())) }
}

pub(crate) fn options(max_new: u32) -> proto::GenerateOptions {
    proto::GenerateOptions { max_new_tokens: Some(max_new), ignore_eos: true, ..Default::default() }
}

impl Client {
    pub(crate) fn tenant(&self, name: &str) -> Self {
        Self { tenant: name.into(), ..self.clone() }
    }

    /// With a key or token, naming no tenant.
    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { tenant: String::new(), key: Some(key.into()), ..self.clone() }
    }

    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if !self.tenant.is_empty() {
            request.metadata_mut().insert(TENANT_KEY, self.tenant.parse().expect("ASCII"));
        }
        if let Some(key) = &self.key {
            request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().expect("ASCII"));
        }
        request
    }

    pub(crate) fn inference(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel.clone())
    }

    pub(crate) fn deltas(&self) -> DeltaServiceClient<Channel> {
        DeltaServiceClient::new(self.channel.clone())
    }

    pub(crate) fn training(&self) -> TrainingServiceClient<Channel> {
        TrainingServiceClient::new(self.channel.clone())
    }

    pub(crate) fn tenants(&self) -> TenantServiceClient<Channel> {
        TenantServiceClient::new(self.channel.clone())
    }

    pub(crate) async fn info(&self) -> Result<proto::GetServerInfoResponse, Status> {
        let request = self.request(proto::GetServerInfoRequest {});
        Ok(ServerServiceClient::new(self.channel.clone()).get_server_info(request).await?.into_inner())
    }

    pub(crate) async fn running(&self) -> u32 {
        self.info().await.expect("server info").load.unwrap_or_default().running
    }

    pub(crate) async fn stream(
        &self,
        request: proto::GenerateRequest,
    ) -> Result<Streaming<proto::GenerateResponse>, Status> {
        Ok(self.inference().generate(self.request(request)).await?.into_inner())
    }

    /// A whole continuation.
    pub(crate) async fn generate(&self, request: proto::GenerateRequest) -> Result<Said, Status> {
        let stream = self.stream(request).await?;
        timely("a stream ends", finish(Said::default(), stream)).await
    }

    /// The greedy text, of a request that must succeed.
    pub(crate) async fn text(&self, delta: &str, prompt: &str, max_new: u32) -> String {
        self.generate(ask(delta, prompt, max_new)).await.expect("it generates").text
    }

    pub(crate) async fn batch(
        &self,
        request: proto::GenerateBatchRequest,
    ) -> Result<proto::GenerateBatchResponse, Status> {
        Ok(self.inference().generate_batch(self.request(request)).await?.into_inner())
    }

    pub(crate) async fn upload(&self, name: &str, files: &DeltaFiles) -> Result<proto::Delta, Status> {
        self.upload_with(proto::UploadHeader { name: name.into(), ..Default::default() }, files).await
    }

    pub(crate) async fn upload_with(
        &self,
        header: proto::UploadHeader,
        files: &DeltaFiles,
    ) -> Result<proto::Delta, Status> {
        use proto::upload_request::Message;
        let mut messages = vec![Message::Header(header)];
        for (file, data) in &files.files {
            // in two chunks, as a real client would for a large file
            let half = data.len() / 2;
            for data in [data.slice(..half), data.slice(half..)] {
                messages.push(Message::Chunk(proto::FileChunk { file: file.clone(), data }));
            }
        }
        let messages = messages.into_iter().map(|m| proto::UploadRequest { message: Some(m) });
        let request = self.request(futures::stream::iter(messages.collect::<Vec<_>>()));
        Ok(self.deltas().upload(request).await?.into_inner().delta.expect("a delta"))
    }

    pub(crate) async fn download(&self, delta: &str) -> Result<DeltaFiles, Status> {
        use proto::download_response::Message;
        let request = self.request(proto::DownloadRequest { delta: delta.into(), form: 0 });
        let mut stream = self.deltas().download(request).await?.into_inner();
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut current = String::new();
        while let Some(response) = stream.message().await? {
            if let Some(Message::Chunk(chunk)) = response.message {
                if !chunk.file.is_empty() {
                    current = chunk.file;
                }
                files.entry(current.clone()).or_default().extend_from_slice(&chunk.data);
            }
        }
        Ok(DeltaFiles { files: files.into_iter().map(|(name, data)| (name, data.into())).collect() })
    }

    pub(crate) async fn delta(&self, reference: &str) -> Result<proto::GetDeltaResponse, Status> {
        let request = self.request(proto::GetDeltaRequest { delta: reference.into() });
        Ok(self.deltas().get_delta(request).await?.into_inner())
    }

    pub(crate) async fn list(&self) -> Vec<proto::Delta> {
        let request = self.request(proto::ListDeltasRequest { page_size: 1000, ..Default::default() });
        self.deltas().list_deltas(request).await.expect("a list").into_inner().deltas
    }

    pub(crate) async fn promote(&self, name: &str, version: &str) -> Result<proto::Delta, Status> {
        let request = proto::SetAliasRequest { name: name.into(), version: version.into(), expected_id: None };
        Ok(self.deltas().set_alias(self.request(request)).await?.into_inner().delta.expect("a delta"))
    }

    pub(crate) async fn classify(&self, delta: &str, texts: &[&str]) -> Result<proto::ClassifyResponse, Status> {
        let inputs = texts.iter().map(|t| proto::ClassifyInput { text: (*t).into(), ..Default::default() }).collect();
        let request = self.request(proto::ClassifyRequest { delta: delta.into(), inputs, ..Default::default() });
        Ok(self.inference().classify(request).await?.into_inner())
    }

    pub(crate) async fn upload_dataset(&self, name: &str, jsonl: &str) -> String {
        use proto::upload_dataset_request::Message;
        let header = Message::Header(proto::DatasetHeader { name: name.into() });
        let messages = [header, Message::Data(jsonl.as_bytes().to_vec().into())];
        let messages = messages.map(|m| proto::UploadDatasetRequest { message: Some(m) });
        let request = self.request(futures::stream::iter(messages));
        let reply = self.training().upload_dataset(request).await.expect("an upload").into_inner();
        reply.dataset.expect("a dataset").id
    }

    pub(crate) async fn create_job(&self, spec: proto::TrainingSpec, key: &str) -> Result<proto::Job, Status> {
        let request = proto::CreateJobRequest { spec: Some(spec), idempotency_key: key.into() };
        Ok(self.training().create_job(self.request(request)).await?.into_inner().job.expect("a job"))
    }

    pub(crate) async fn job(&self, id: &str) -> Result<proto::Job, Status> {
        let request = self.request(proto::GetJobRequest { id: id.into() });
        Ok(self.training().get_job(request).await?.into_inner().job.expect("a job"))
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<proto::Job, Status> {
        let request = self.request(proto::PauseJobRequest { id: id.into() });
        Ok(self.training().pause_job(request).await?.into_inner().job.expect("a job"))
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<proto::Job, Status> {
        let request = self.request(proto::ResumeJobRequest { id: id.into() });
        Ok(self.training().resume_job(request).await?.into_inner().job.expect("a job"))
    }

    pub(crate) async fn jobs(&self) -> Vec<proto::Job> {
        let request = self.request(proto::ListJobsRequest { page_size: 1000, ..Default::default() });
        self.training().list_jobs(request).await.expect("a list").into_inner().jobs
    }

    /// All events from a number on, to the end of the stream.
    pub(crate) async fn events(&self, job: &str, from_seq: u64) -> Result<Vec<proto::JobEvent>, Status> {
        let request = self.request(proto::WatchJobRequest { id: job.into(), from_seq });
        let mut stream = self.training().watch_job(request).await?.into_inner();
        let mut events = Vec::new();
        timely("a watch ends", async {
            while let Some(event) = stream.message().await? {
                events.push(event);
            }
            Ok(events)
        })
        .await
    }

    /// The state with which a job ended.
    pub(crate) async fn ended(&self, job: &str) -> proto::StateChange {
        match self.events(job, 0).await.expect("a watch").pop().and_then(|e| e.body) {
            Some(Body::State(state)) => state,
            other => panic!("the last event is {other:?}"),
        }
    }
}

/// Reads a stream of one continuation to its end.
pub(crate) async fn finish(mut said: Said, mut stream: Streaming<proto::GenerateResponse>) -> Result<Said, Status> {
    let mut over = false;
    while let Some(response) = stream.next().await {
        assert!(!over, "nothing follows the final message");
        match response?.event {
            Some(Event::Delta(d)) => {
                said.text += &d.text;
                said.ids.extend(d.token_ids);
                said.pieces += 1;
            }
            Some(Event::Finished(f)) => {
                said.finished = f;
                over = true;
            }
            None => panic!("an empty message"),
        }
    }
    assert!(over, "the stream ended without its final message");
    Ok(said)
}

/// A training request on JSON lines, with a small LoRA and this many steps.
pub(crate) fn spec(name: &str, task: proto::Task, jsonl: String, steps: u32) -> proto::TrainingSpec {
    let lora = proto::Lora { rank: Some(4), ..Default::default() };
    proto::TrainingSpec {
        output_name: name.into(),
        task: task.into(),
        data: Some(proto::TrainingData { source: Some(proto::training_data::Source::Jsonl(jsonl)) }),
        methods: vec![proto::MethodPart { part: Some(proto::method_part::Part::Lora(lora)) }],
        hyper: Some(proto::HyperParameters {
            epochs: Some(1000.0),
            max_steps: Some(steps),
            batch_size: Some(4),
            learning_rate: Some(5e-3),
            seed: Some(1),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Texts to learn.
pub(crate) fn stories(rows: usize) -> String {
    (0..rows)
        .map(|i| json!({"text": format!("the {} cat sat on mat {i}", ["red", "old", "big"][i % 3])}).to_string() + "\n")
        .collect()
}

/// Texts with one of two labels that their first letter gives away.
pub(crate) fn labelled(rows: usize) -> String {
    let row = |i: usize| {
        let (letter, label) = [("a", "first"), ("z", "last")][i % 2];
        json!({"text": format!("{}{i}", letter.repeat(4 + i % 5)), "label": label}).to_string() + "\n"
    };
    (0..rows).map(row).collect()
}

/// Code and reason of an error.
pub(crate) fn kind(status: &Status) -> (Code, String) {
    let reason = status.get_error_details().error_info().map(|i| i.reason.clone()).unwrap_or_default();
    (status.code(), reason)
}

/// Expects INVALID_ARGUMENT that names a field (a part of its path) and says these words.
#[track_caller]
pub(crate) fn expect_invalid(status: &Status, field: &str, words: &[&str]) {
    assert_eq!(kind(status), (Code::InvalidArgument, "INVALID_REQUEST".to_owned()), "{status:?}");
    let details = status.get_error_details();
    let violations = details.bad_request().map(|b| b.field_violations.clone()).unwrap_or_default();
    let found = violations.iter().any(|v| v.field.contains(field) && words.iter().all(|w| v.description.contains(w)));
    assert!(found, "no violation of {field:?} with {words:?} in {violations:?}");
}

/// Ends the test instead of hanging.
pub(crate) async fn timely<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: not within {PATIENCE:?}"),
    }
}

/// Asks again and again until it holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn scored(prompt: &str, completion: &str) -> proto::ScoreInput {
    proto::ScoreInput { prompt: prompt.into(), completion: completion.into() }
}

/// The log-likelihood of a completion.
pub(crate) async fn score(client: &Client, delta: &str, input: proto::ScoreInput) -> Result<f64, Status> {
    let request = proto::ScoreRequest { delta: delta.into(), inputs: vec![input], ..Default::default() };
    let reply = client.inference().score(client.request(request)).await?.into_inner();
    Ok(reply.results[0].log_likelihood)
}
