//! Live traffic over real gRPC, for as long as the demo wants it.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::task::JoinHandle;

use crate::{
    cli::{
        Common,
        bench::call::{Answer, Call},
        client::Client,
    },
    grpc::proto,
};

/// Deltas that the traffic names in turn; the empty one is the bare base.
const DELTAS: [&str; 3] = ["", "shakespeare", ""];
const PROMPTS: [&str; 4] =
    ["Once upon a time", "The little dog", "One day, Lily and her mom", "Tom wanted to play with"];

/// Requests at a steady rate, each on a task of its own.
pub(super) struct Traffic {
    answers: Arc<Mutex<Vec<Answer>>>,
    task: JoinHandle<()>,
}

impl Traffic {
    /// Starts sending `rate` requests per second.
    pub(super) async fn start(address: SocketAddr, rate: f64) -> anyhow::Result<Self> {
        let common = Common::plain(format!("http://{address}"), "default", false);
        let client = Client::connect(&common).await?;
        let answers = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&answers);
        let task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
            let mut n = 0usize;
            loop {
                tick.tick().await;
                let request = request(n);
                n += 1;
                let (client, sink) = (client.clone(), Arc::clone(&sink));
                tokio::spawn(async move {
                    let answer = Call::Generate(Box::new(request)).measure(&client, Instant::now()).await;
                    sink.lock().push(answer);
                });
            }
        });
        Ok(Self { answers, task })
    }

    /// The answers since the last mark.
    pub(super) fn mark(&self) -> Vec<Answer> {
        std::mem::take(&mut *self.answers.lock())
    }

    /// Stops sending.
    pub(super) async fn stop(self) {
        self.task.abort();
        // an aborted task is the expected end
        let _ = self.task.await;
    }
}

fn request(n: usize) -> proto::GenerateRequest {
    let prompt = proto::prompt::Prompt::Text(PROMPTS[n % PROMPTS.len()].into());
    proto::GenerateRequest {
        delta: DELTAS[n % DELTAS.len()].into(),
        prompt: Some(proto::Prompt { prompt: Some(prompt) }),
        options: Some(proto::GenerateOptions {
            max_new_tokens: Some(24),
            ignore_eos: true,
            ..proto::GenerateOptions::default()
        }),
        deltas: vec![],
    }
}
