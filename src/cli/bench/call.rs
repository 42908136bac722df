//! One request, measured by this client's clock.

use std::time::Instant;

use tonic::Status;
use tonic_types::StatusExt;

use super::{chunks::Chunks, workload::Op};
use crate::{cli::client::Client, grpc::proto};

/// A request, ready to be sent.
#[derive(Debug, Clone)]
pub(in crate::cli) enum Call {
    Generate(Box<proto::GenerateRequest>),
    Classify(proto::ClassifyRequest),
    Embed(proto::EmbedRequest),
    Score(proto::ScoreRequest),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::cli) struct Failure {
    /// The status code's name, or `CLIENT` where this client found fault.
    pub(super) code: String,
    /// The server's stable reason, or the code where there is none.
    pub(super) reason: String,
}

/// What became of a request.
#[derive(Debug, Clone, Default)]
pub(in crate::cli) struct Answer {
    /// When the tokens came; of generation.
    pub(in crate::cli) chunks: Chunks,
    /// Whether the answer came as a whole, without tokens.
    pub(super) whole: bool,
    /// Seconds to its end.
    pub(super) total: f64,
    /// Tokens of the prompt or text, as the server says.
    pub(super) input_tokens: u32,
    /// Of those, found in the server's prefix cache.
    pub(super) cached_tokens: u32,
    /// Seconds that it waited for the engine, and to its first token or result from there, as the server says.
    pub(super) server: Option<(f32, f32)>,
    /// If it failed.
    pub(in crate::cli) failure: Option<Failure>,
}

impl Answer {
    /// Seconds to the first token, or to an answer that came as a whole.
    pub(super) fn first(&self) -> Option<f64> {
        self.chunks.first().or_else(|| self.whole.then_some(self.total))
    }

    /// What the server says at the end, checked against what was asked for.
    fn finished(
        &mut self,
        asked: &str,
        by: Option<&proto::ServedBy>,
        usage: Option<proto::Usage>,
        timings: Option<proto::Timings>,
    ) {
        let usage = usage.unwrap_or_default();
        (self.input_tokens, self.cached_tokens) = (usage.prompt_tokens, usage.cached_tokens);
        self.server = timings.map(|t| ((t.queue_ms / 1e3) as f32, (t.prefill_ms / 1e3) as f32));
        let served = by.map_or("", |by| by.name.as_str());
        if served != asked.split('@').next().unwrap_or_default() {
            self.failure = Some(client_failure("SERVED_BY_ANOTHER_DELTA"));
        }
    }
}

fn client_failure(reason: &str) -> Failure {
    Failure { code: "CLIENT".to_owned(), reason: reason.to_owned() }
}

impl Call {
    /// Which operation it is.
    pub(super) fn op(&self) -> Op {
        match self {
            Self::Generate(_) => Op::Generate,
            Self::Classify(_) => Op::Classify,
            Self::Embed(_) => Op::Embed,
            Self::Score(_) => Op::Score,
        }
    }

    /// Sends it and follows the answer to its end. Times count from `since`.
    pub(in crate::cli) async fn measure(self, client: &Client, since: Instant) -> Answer {
        let mut answer = Answer::default();
        if let Err(status) = self.follow(client, since, &mut answer).await {
            let info = status.get_details_error_info();
            let code = format!("{:?}", status.code());
            let reason = info.map_or_else(|| code.clone(), |info| info.reason);
            answer.failure = Some(Failure { code, reason });
        }
        answer.total = since.elapsed().as_secs_f64();
        answer
    }

    async fn follow(self, client: &Client, since: Instant, answer: &mut Answer) -> Result<(), Status> {
        let mut inference = client.inference();
        match self {
            Self::Generate(request) => return generate(client, *request, since, answer).await,
            Self::Classify(request) => {
                let asked = request.delta.clone();
                let reply = inference.classify(request).await?.into_inner();
                answer.finished(&asked, reply.served_by.as_ref(), reply.usage, reply.timings);
            }
            Self::Embed(request) => {
                let asked = request.delta.clone();
                let reply = inference.embed(request).await?.into_inner();
                answer.finished(&asked, reply.served_by.as_ref(), reply.usage, reply.timings);
            }
            Self::Score(request) => {
                let asked = request.delta.clone();
                let reply = inference.score(request).await?.into_inner();
                answer.finished(&asked, reply.served_by.as_ref(), reply.usage, reply.timings);
            }
        }
        answer.whole = true;
        Ok(())
    }
}

async fn generate(
    client: &Client,
    request: proto::GenerateRequest,
    since: Instant,
    answer: &mut Answer,
) -> Result<(), Status> {
    use proto::generate_response::Event;
    let asked = request.delta.clone();
    let mut stream = client.inference().generate(request).await?.into_inner();
    let mut finished = false;
    while let Some(response) = stream.message().await? {
        match response.event {
            Some(Event::Delta(delta)) => {
                let tokens = u32::try_from(delta.token_ids.len()).unwrap_or(u32::MAX);
                answer.chunks.came(since.elapsed().as_secs_f64(), tokens);
            }
            Some(Event::Finished(end)) => {
                finished = true;
                answer.finished(&asked, end.served_by.as_ref(), end.usage, end.timings);
            }
            None => {}
        }
    }
    if !finished {
        answer.failure = Some(client_failure("STREAM_WITHOUT_END"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_delta_is_a_failure() {
        let by = |name: &str| proto::ServedBy { name: name.into(), ..Default::default() };
        let reason = |asked: &str, by: Option<&proto::ServedBy>| {
            let mut answer = Answer::default();
            answer.finished(asked, by, None, None);
            answer.failure.map(|f| f.reason)
        };
        assert_eq!(reason("style@3", Some(&by("style"))), None);
        assert_eq!(reason("", Some(&by(""))), None);
        assert_eq!(reason("", None), None);
        for (asked, by) in [("style", Some(by("other"))), ("style", Some(by(""))), ("style", None), ("", Some(by("x")))]
        {
            assert_eq!(reason(asked, by.as_ref()).as_deref(), Some("SERVED_BY_ANOTHER_DELTA"), "{asked}");
        }
    }

    #[test]
    fn the_first_token_counts_or_the_whole_answer_never_a_failure() {
        let mut answer = Answer { total: 2.0, ..Answer::default() };
        assert_eq!(answer.first(), None, "a generation without tokens has no first one");
        answer.whole = true;
        assert_eq!(answer.first(), Some(2.0));
        answer.chunks.came(0.5, 1);
        assert_eq!(answer.first(), Some(0.5));
    }
}
