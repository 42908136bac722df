//! `InferenceService`: decode, call, encode. Dropping a response stream drops the admission stream, which cancels.

use std::time::Instant;

use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use tonic::{Request, Response, Status};

use super::{
    convert, proto,
    proto::inference_service_server::InferenceService,
    tenant::{tenant, timeout},
};
use crate::{
    admission::{
        CallLease, Pieces, Service,
        params::{GenerateChunk, GenerateParams, ServeError},
    },
    ids::TenantId,
};

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Inference {
    pub(super) service: Service,
}

#[tonic::async_trait]
impl InferenceService for Inference {
    type GenerateStream = BoxStream<'static, Result<proto::GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<proto::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (tenant, timeout) = (tenant(&request)?, timeout(request.metadata()));
        let params = convert::generate(request.into_inner(), timeout)?;
        let pieces = self.service.generate(&tenant, params).await?;
        let stream = pieces.map_ok(convert::generate_response).map_err(Status::from);
        Ok(Response::new(stream.boxed()))
    }

    async fn generate_batch(
        &self,
        request: Request<proto::GenerateBatchRequest>,
    ) -> Result<Response<proto::GenerateBatchResponse>, Status> {
        let (tenant, timeout) = (tenant(&request)?, timeout(request.metadata()));
        let all = convert::generate_batch(request.into_inner(), timeout)?;
        let at_a_time = self.service.prompts_at_a_time(all.first().map_or(1, GenerateParams::sequences));
        let arrived = Instant::now();
        let call = self.service.enter(&tenant)?;
        let work = all.into_iter().enumerate().map(|(i, params)| self.complete(&tenant, i, params, (arrived, &call)));
        let parts: Vec<_> = futures::stream::iter(work).buffered(at_a_time).try_collect().await?;
        Ok(Response::new(batch_response(parts)))
    }

    async fn classify(
        &self,
        request: Request<proto::ClassifyRequest>,
    ) -> Result<Response<proto::ClassifyResponse>, Status> {
        let (tenant, timeout) = (tenant(&request)?, timeout(request.metadata()));
        let params = convert::classify(request.into_inner(), timeout)?;
        Ok(Response::new(convert::classify_response(self.service.classify(&tenant, params).await?)))
    }

    async fn embed(&self, request: Request<proto::EmbedRequest>) -> Result<Response<proto::EmbedResponse>, Status> {
        let (tenant, timeout) = (tenant(&request)?, timeout(request.metadata()));
        let params = convert::embed(request.into_inner(), timeout)?;
        Ok(Response::new(convert::embed_response(self.service.embed(&tenant, params).await?)))
    }

    async fn score(&self, request: Request<proto::ScoreRequest>) -> Result<Response<proto::ScoreResponse>, Status> {
        let (tenant, timeout) = (tenant(&request)?, timeout(request.metadata()));
        let params = convert::score(request.into_inner(), timeout)?;
        Ok(Response::new(convert::score_response(self.service.score(&tenant, params).await?)))
    }

    async fn tokenize(
        &self,
        request: Request<proto::TokenizeRequest>,
    ) -> Result<Response<proto::TokenizeResponse>, Status> {
        tenant(&request)?;
        let proto::TokenizeRequest { text, add_special_tokens } = request.into_inner();
        let reply = self.service.tokenize(text, add_special_tokens.unwrap_or(true)).await?;
        Ok(Response::new(proto::TokenizeResponse { ids: reply.ids, tokens: reply.tokens }))
    }
}

impl Inference {
    /// A prompt of a batch. The first finds the server with room or is refused; the others wait for room.
    async fn complete(
        &self,
        tenant: &TenantId,
        prompt_index: usize,
        params: GenerateParams,
        (arrived, call): (Instant, &CallLease),
    ) -> Result<Vec<proto::Generation>, ServeError> {
        let n = params.n;
        let pieces = match prompt_index {
            0 => self.service.generate_first(tenant, params, call).await?,
            _ => self.service.generate_next(tenant, params, arrived, call).await?,
        };
        gather(pieces, prompt_index as u32, n).await
    }
}

/// Puts the pieces of `n` continuations together.
async fn gather(
    mut pieces: Pieces<GenerateChunk>,
    prompt_index: u32,
    n: u32,
) -> Result<Vec<proto::Generation>, ServeError> {
    let blank = |index| proto::Generation { prompt_index, index, ..Default::default() };
    let mut out: Vec<proto::Generation> = (0..n).map(blank).collect();
    let strange = || ServeError::Internal("a piece of a continuation that was not asked for".into());
    while let Some(piece) = pieces.try_next().await? {
        match piece {
            GenerateChunk::Delta { index, text, token_ids, logprobs } => {
                let g = out.get_mut(index as usize).ok_or_else(strange)?;
                g.text.push_str(&text);
                g.token_ids.extend(token_ids);
                g.logprobs.extend(logprobs.into_iter().map(convert::token_logprob));
            }
            GenerateChunk::Finished { index, reason, usage, timings, served_by, seed, score } => {
                let g = out.get_mut(index as usize).ok_or_else(strange)?;
                g.reason = convert::finish_reason(reason);
                g.usage = Some(convert::usage(usage));
                g.timings = Some(convert::timings(timings));
                g.served_by = Some(convert::served_by(served_by));
                g.seed = seed;
                g.score = score;
            }
        }
    }
    if out.iter().any(|g| g.usage.is_none()) {
        return Err(ServeError::Internal("a continuation ended without its end".into()));
    }
    Ok(out)
}

/// Joins the prompts' continuations: usage is summed (a prompt once), times are of the slowest.
fn batch_response(parts: Vec<Vec<proto::Generation>>) -> proto::GenerateBatchResponse {
    let mut usage = proto::Usage::default();
    let mut timings = proto::Timings::default();
    let total = |t: &proto::Timings| t.queue_ms + t.prefill_ms + t.decode_ms;
    for part in &parts {
        let first = part.iter().find_map(|g| g.usage).unwrap_or_default();
        usage.prompt_tokens = usage.prompt_tokens.saturating_add(first.prompt_tokens);
        usage.cached_tokens = usage.cached_tokens.saturating_add(first.cached_tokens);
        for generation in part {
            let own = generation.usage.unwrap_or_default();
            usage.completion_tokens = usage.completion_tokens.saturating_add(own.completion_tokens);
            usage.drafted_tokens = usage.drafted_tokens.saturating_add(own.drafted_tokens);
            usage.accepted_tokens = usage.accepted_tokens.saturating_add(own.accepted_tokens);
            if let Some(t) = generation.timings.filter(|t| total(t) > total(&timings)) {
                timings = t;
            }
        }
    }
    let generations: Vec<_> = parts.into_iter().flatten().collect();
    let served_by = generations.last().and_then(|g| g.served_by.clone());
    proto::GenerateBatchResponse { generations, served_by, usage: Some(usage), timings: Some(timings) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::admission::params::{FinishReason, ServedBy, Timings, Usage};

    fn end(index: u32, ms: u64) -> Result<GenerateChunk, ServeError> {
        Ok(GenerateChunk::Finished {
            index,
            reason: FinishReason::Length,
            usage: Usage {
                prompt_tokens: 5,
                completion_tokens: 2,
                cached_tokens: 4,
                drafted_tokens: 3,
                accepted_tokens: 1,
            },
            timings: Timings { decode: Duration::from_millis(ms), ..Timings::default() },
            served_by: ServedBy { name: String::new(), number: 0, id: None, parts: vec![] },
            seed: 1,
            score: None,
        })
    }

    fn text(index: u32, text: &str) -> Result<GenerateChunk, ServeError> {
        Ok(GenerateChunk::Delta { index, text: text.into(), token_ids: vec![1], logprobs: vec![] })
    }

    #[tokio::test]
    async fn interleaved_pieces_are_put_together_and_a_prompt_is_counted_once() -> Result<(), ServeError> {
        let pieces = vec![text(1, "b"), text(0, "a"), text(1, "d"), end(1, 7), text(0, "c"), end(0, 9)];
        let part = gather(futures::stream::iter(pieces).boxed(), 0, 2).await?;
        let texts: Vec<_> = part.iter().map(|g| g.text.as_str()).collect();
        assert_eq!(texts, ["ac", "bd"]);
        let reply = batch_response(vec![part.clone(), part]);
        let (drafted_tokens, accepted_tokens) = (12, 4);
        let (prompt_tokens, completion_tokens, cached_tokens) = (10, 8, 8);
        let usage = proto::Usage { prompt_tokens, completion_tokens, cached_tokens, drafted_tokens, accepted_tokens };
        assert_eq!(reply.usage, Some(usage));
        assert!(reply.timings.is_some_and(|t| (t.decode_ms - 9.0).abs() < 1e-9));
        Ok(())
    }

    #[tokio::test]
    async fn a_stream_that_stops_early_is_an_error_not_a_short_answer() {
        let pieces = vec![text(0, "a"), end(0, 1), text(1, "b")];
        assert!(gather(futures::stream::iter(pieces).boxed(), 0, 2).await.is_err());
    }
}
