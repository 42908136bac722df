//! Generate: a prompt in, streamed continuations out.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use tokio::sync::mpsc;

use super::{
    beams::Told,
    params::{FinishReason, GenerateChunk, GenerateParams, Prompt, ServeError, ServedBy, Timings, TokenLogprob, Usage},
    places::Place,
    service::{CallLease, Pieces, Service, ServiceParts, chat_error, text_error},
    tenants::Meter,
};
use crate::{
    delta::Task,
    engine::{self, Event, TokenOut, Work},
    ids::TenantId,
    text::{DecodeStream, StopStrings, TextModel},
};

impl Service {
    /// Continues a prompt, `n` times.
    ///
    /// # Errors
    /// Every kind of [`ServeError`]; after the stream has begun they come through it.
    pub async fn generate(
        &self,
        tenant: &TenantId,
        params: GenerateParams,
    ) -> Result<Pieces<GenerateChunk>, ServeError> {
        params.check()?;
        let call = self.enter(tenant)?;
        let pieces = self.generate_first(tenant, params, &call).await?;
        // the call is over when the last piece was taken, before its client is told so
        let pieces = stream::unfold((pieces, call), |(mut pieces, call)| async move {
            let piece = pieces.next().await;
            piece.map(|piece| (piece, (pieces, call)))
        });
        Ok(pieces.boxed())
    }

    /// Continues the first prompt of a call of several, which is admitted or refused with it.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub async fn generate_first(
        &self,
        tenant: &TenantId,
        params: GenerateParams,
        call: &CallLease,
    ) -> Result<Pieces<GenerateChunk>, ServeError> {
        params.check()?;
        self.can_generate()?;
        let places = self.places().take(tenant, params.sequences() as usize, params.sequences_field())?;
        self.continue_prompt(tenant, params, Instant::now(), places, call).await
    }

    /// Continues one more prompt of a call that arrived then and was admitted with its first: waits for its places
    /// instead of being refused.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub async fn generate_next(
        &self,
        tenant: &TenantId,
        params: GenerateParams,
        arrived: Instant,
        call: &CallLease,
    ) -> Result<Pieces<GenerateChunk>, ServeError> {
        params.check()?;
        self.can_generate()?;
        let deadline = params.timeout.map(|timeout| arrived + timeout);
        let places = self
            .places()
            .wait(tenant, (params.sequences() as usize, params.sequences_field()), arrived, deadline)
            .await?;
        self.continue_prompt(tenant, params, arrived, places, call).await
    }

    /// Prompts of `n` sequences each that one call has in the engine at a time.
    pub fn prompts_at_a_time(&self, n: u32) -> usize {
        (self.places().share() / (n as usize).max(1)).max(1)
    }

    fn can_generate(&self) -> Result<(), ServeError> {
        let arch = &self.parts().base.arch;
        if !arch.is_causal() {
            return Err(ServeError::WrongTask(format!("the base is {}, which does not generate", arch.kind())));
        }
        Ok(())
    }

    async fn continue_prompt(
        &self,
        tenant: &TenantId,
        params: GenerateParams,
        arrived: Instant,
        places: Vec<Place>,
        call: &CallLease,
    ) -> Result<Pieces<GenerateChunk>, ServeError> {
        let prompt = params.prompt.clone();
        let tokens = self.blocking(move |parts| tokenize(parts, &prompt)).await?;
        let (input, new) = (self.prompt(tokens)?, params.max_new_tokens as usize);
        let len = input.given();
        // what a continuation's text follows on
        let before: &[u32] = if input.source.is_empty() { &input.tokens } else { &[] };
        let admitted = self.admit_once(tenant, &params.delta, (arrived, params.timeout), call).await?;
        let admitted = admitted.with_priority(params.priority);
        self.check_source("prompt", &input, &admitted)?;
        self.check_room("max_new_tokens", &input, new, &admitted)?;
        self.check_beams(&params, &input, &admitted)?;
        if let Some(lease) = &admitted.lease {
            let task = lease.delta().spec.task;
            if matches!(task, Task::SeqCls | Task::TokenCls) {
                let name = &params.delta;
                return Err(ServeError::WrongTask(format!(
                    "delta {name:?} is for {}, not for generation",
                    task.as_str()
                )));
            }
        }
        let meter = self.meter(tenant);
        if let Some(meter) = &meter {
            meter.take(len as u64);
        }
        let seed = params.sampling.seed.unwrap_or_else(rand::random);
        let eos = if params.ignore_eos { Vec::new() } else { self.parts().eos() };
        let stop_tokens = stop_tokens(&params.stop_tokens, &eos, self.parts().base.arch.vocab);
        let speculation = params.speculates(self.parts().limits.speculation);
        let generate = |sampling, beams| {
            let logprobs = params.logprobs.map(|n| n as usize);
            Work::Generate(engine::Generate {
                sampling,
                max_new_tokens: new,
                stop_tokens: stop_tokens.clone(),
                logprobs,
                beams,
                speculation,
            })
        };
        if let Some(search) = params.beams {
            let told = Told { seed, before: before.to_vec() };
            let work = generate(params.sampling.clone(), Some(engine::Beams { search, told: params.n as usize }));
            let events = self.submit(input, work, &admitted, places)?;
            return Ok(self.searched(events, params.n, (told, meter), &admitted));
        }
        let decode =
            DecodeStream::after(Arc::clone(&self.parts().text), before).map_err(|e| text_error("prompt", &e))?;
        let constraint = match &params.constraint {
            Some(constraint) => Some(self.constraints(constraint, decode.is_fresh(), admitted.deadline).await?),
            None => None,
        };
        let mut continuations = Vec::with_capacity(places.len());
        for (index, place) in (0u32..).zip(places) {
            let seed = seed.wrapping_add(u64::from(index));
            let mut sampling = params.sampling.clone();
            sampling.seed = Some(seed);
            let work = generate(sampling, None);
            let events = self.submit_constrained(input.clone(), work, constraint.clone(), &admitted, place)?;
            let (text, decode) = (Arc::clone(&self.parts().text), decode.clone());
            continuations.push(Continuation {
                index,
                seed,
                events,
                decode: Some(decode),
                stop: Some(StopStrings::new(params.stop.clone())),
                logprobs: params.logprobs.is_some(),
                meter: meter.clone(),
                text,
                served_by: admitted.served_by(),
                usage: Usage { prompt_tokens: len as u32, ..Usage::default() },
                clock: Clock { arrived, queue: Duration::ZERO, first: None },
                ready: VecDeque::new(),
                over: false,
            });
        }
        let streams = continuations
            .into_iter()
            .map(|c| stream::unfold(c, |mut c| async move { c.next().await.map(|piece| (piece, c)) }).boxed());
        Ok(stream::select_all(streams).boxed())
    }
}

impl ServiceParts {
    /// Tokens that end a text: those of the config and the tokenizer's.
    pub(super) fn eos(&self) -> Vec<u32> {
        let mut eos = self.base.arch.eos.clone();
        eos.extend(self.text.special().eos.filter(|id| !eos.contains(id)));
        eos
    }
}

/// Ids of a prompt; an empty one is an error that says so.
fn tokenize(parts: &ServiceParts, prompt: &Prompt) -> Result<Vec<u32>, ServeError> {
    let tokens = match prompt {
        Prompt::Text(text) => parts.text.encode_user(text, true).map_err(|e| text_error("prompt", &e))?,
        Prompt::Tokens(ids) => ids.clone(),
        Prompt::Chat(messages) => {
            let Some(template) = &parts.chat else {
                return Err(ServeError::field(
                    "prompt.chat",
                    "this base has no chat template; send the prompt as text or tokens",
                ));
            };
            template.encode(messages, true, &parts.text).map_err(|e| chat_error("prompt.chat", &e))?
        }
    };
    let vocab = parts.base.arch.vocab;
    if let Some((at, id)) = tokens.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        return Err(ServeError::field(
            format!("prompt.tokens[{at}]"),
            format!("token {id} is outside the base's vocabulary of {vocab}"),
        ));
    }
    if tokens.is_empty() {
        return Err(ServeError::field("prompt", "is empty: at least one token is needed"));
    }
    Ok(tokens)
}

/// Times of a continuation that ends outside the engine (at a stop text).
struct Clock {
    arrived: Instant,
    /// As the engine said with its tokens.
    queue: Duration,
    first: Option<Instant>,
}

impl Clock {
    fn timings(&self) -> Timings {
        let first = self.first.unwrap_or_else(Instant::now);
        let prefill = first.saturating_duration_since(self.arrived).saturating_sub(self.queue);
        Timings { queue: self.queue, prefill, decode: first.elapsed() }
    }
}

/// One continuation: engine events in, chunks out. Dropping it closes the channel, which frees the sequence.
struct Continuation {
    index: u32,
    seed: u64,
    events: mpsc::Receiver<Event>,
    decode: Option<DecodeStream>,
    stop: Option<StopStrings>,
    logprobs: bool,
    /// Takes each token as it comes.
    meter: Option<Meter>,
    text: Arc<TextModel>,
    served_by: ServedBy,
    usage: Usage,
    clock: Clock,
    ready: VecDeque<Result<GenerateChunk, ServeError>>,
    over: bool,
}

impl Continuation {
    async fn next(&mut self) -> Option<Result<GenerateChunk, ServeError>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(piece);
            }
            if self.over {
                return None;
            }
            match self.events.recv().await {
                Some(Event::Token(token, began)) => {
                    self.clock.queue = began.queue;
                    self.usage.cached_tokens = began.cached;
                    (self.usage.drafted_tokens, self.usage.accepted_tokens) = (began.drafted, began.accepted);
                    self.token(&token);
                }
                Some(Event::Finished(end)) => self.finish(end.reason, end.usage, end.timings),
                Some(Event::Failed(e)) => self.fail(e.into()),
                Some(Event::Output(..) | Event::Hypotheses(..)) => {
                    self.fail(ServeError::Internal("the engine mixed up its work".into()))
                }
                None => self.fail(ServeError::Internal("the engine has stopped".into())),
            }
        }
    }

    fn fail(&mut self, e: ServeError) {
        self.over = true;
        self.ready.push_back(Err(e));
    }

    fn token(&mut self, token: &TokenOut) {
        self.clock.first.get_or_insert_with(Instant::now);
        self.usage.completion_tokens += 1;
        if let Some(meter) = &self.meter {
            meter.take(1);
        }
        let (Some(decode), Some(stop)) = (&mut self.decode, &mut self.stop) else { return };
        let piece = match decode.push(token.id) {
            Ok(piece) => piece.unwrap_or_default(),
            Err(e) => return self.fail(ServeError::Internal(e.to_string())),
        };
        let outcome = stop.push(&piece);
        let logprobs = if self.logprobs { vec![self.logprob(token)] } else { vec![] };
        // a token whose text is held back still counts: ids stream as they come, text when it is certain
        self.push(outcome.text, vec![token.id], logprobs);
        if outcome.matched.is_some() {
            self.events.close();
            self.end(FinishReason::StopText, self.usage, self.clock.timings());
        }
    }

    fn logprob(&self, token: &TokenOut) -> TokenLogprob {
        let named = |id: u32| self.text.token_text(id);
        TokenLogprob {
            id: token.id,
            text: named(token.id),
            logprob: token.logprob,
            top: token.top.iter().map(|&(id, p)| (id, named(id), p)).collect(),
        }
    }

    fn push(&mut self, text: String, token_ids: Vec<u32>, logprobs: Vec<TokenLogprob>) {
        self.ready.push_back(Ok(GenerateChunk::Delta { index: self.index, text, token_ids, logprobs }));
    }

    /// The engine is done: what was held back is text now, unless it completes a stop text.
    fn finish(&mut self, reason: FinishReason, usage: Usage, timings: Timings) {
        let rest = match self.decode.take().map(DecodeStream::finish) {
            Some(Ok(rest)) => rest.unwrap_or_default(),
            Some(Err(e)) => return self.fail(ServeError::Internal(e.to_string())),
            None => String::new(),
        };
        let mut reason = reason;
        if let Some(mut stop) = self.stop.take() {
            let outcome = stop.push(&rest);
            let mut text = outcome.text;
            match outcome.matched {
                Some(_) => reason = FinishReason::StopText,
                None => text += &stop.finish(),
            }
            if !text.is_empty() {
                self.push(text, vec![], vec![]);
            }
        }
        self.end(reason, usage, timings);
    }

    fn end(&mut self, reason: FinishReason, usage: Usage, timings: Timings) {
        self.over = true;
        let (index, seed, served_by) = (self.index, self.seed, self.served_by.clone());
        self.ready.push_back(Ok(GenerateChunk::Finished {
            index,
            reason,
            usage,
            timings,
            served_by,
            seed,
            score: None,
        }));
    }
}

/// Tokens that end an output: what was asked for, and the base's own. Ids that are no token's can never come, and whoever keeps a
/// set of tokens need not have room for them.
fn stop_tokens(asked: &[u32], eos: &[u32], vocab: usize) -> Vec<u32> {
    asked.iter().chain(eos).copied().filter(|id| (*id as usize) < vocab).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_a_text_that_ends_at_a_stop_text_add_up() {
        let first = Instant::now();
        let arrived = first.checked_sub(Duration::from_millis(70)).unwrap_or(first);
        let clock = Clock { arrived, queue: Duration::from_millis(50), first: Some(first) };
        let times = clock.timings();
        assert_eq!((times.queue, times.queue + times.prefill), (Duration::from_millis(50), first - arrived));
    }

    #[test]
    fn ids_that_are_no_tokens_end_nothing() {
        assert_eq!(stop_tokens(&[7, u32::MAX, 99, 100], &[2], 100), [7, 99, 2]);
    }
}
