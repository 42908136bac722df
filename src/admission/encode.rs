//! Embed, score and tokenize, and how the inputs of a call run (of `classify`, too): prompt-only sequences, one per input, in the same steps as everything else.

use std::{collections::VecDeque, time::Instant};

use tokio::sync::mpsc;

use super::{
    params::{
        EmbedParams, EmbedReply, Pooling, ScoreParams, ScoreReply, Scored, ServeError, Timings, TokenLogprob,
        TokenizeReply, Usage,
    },
    service::{Admitted, Input, Service, no_start, text_error},
};
use crate::{
    engine::{Event, Output, Work},
    ids::TenantId,
};

/// One input, tokenised.
pub(super) struct Row {
    /// Its place among the call's inputs.
    pub(super) at: usize,
    pub(super) input: Input,
    pub(super) work: Work,
}

/// What came back for all inputs of a call.
pub(super) struct Results {
    pub(super) outputs: Vec<Output>,
    pub(super) usage: Usage,
    pub(super) timings: Timings,
}

impl Service {
    /// One vector per text.
    ///
    /// # Errors
    /// Every kind of [`ServeError`].
    pub async fn embed(&self, tenant: &TenantId, params: EmbedParams) -> Result<EmbedReply, ServeError> {
        let arrived = Instant::now();
        params.check()?;
        let _call = self.enter(tenant)?;
        let admitted = self.admit(tenant, &params.delta, arrived, params.timeout).await?;
        let admitted = admitted.with_priority(params.priority);
        let inputs = params.inputs.clone();
        let encoded = self
            .blocking(move |parts| {
                let one = |(i, text): (usize, &String)| {
                    parts.text.encode_user(text, true).map_err(|e| text_error(&format!("inputs[{i}]"), &e))
                };
                inputs.iter().enumerate().map(one).collect::<Result<Vec<_>, _>>()
            })
            .await?;
        let pooling = match params.pooling {
            Pooling::Default => self.parts().pooling.unwrap_or_default(),
            other => other,
        };
        let work = Work::Embed { pooling, normalize: params.normalize };
        let row = |(at, tokens)| Ok(Row { at, input: self.prompt(tokens)?, work: work.clone() });
        let rows = encoded.into_iter().enumerate().map(row);
        let results = self.run(rows.collect::<Result<_, ServeError>>()?, &admitted).await?;
        let embeddings = results.outputs.into_iter().map(|o| match o {
            Output::Embedding(v) => Ok(v),
            _ => Err(ServeError::Internal("the engine mixed up its work".into())),
        });
        Ok(EmbedReply {
            embeddings: embeddings.collect::<Result<_, _>>()?,
            served_by: admitted.served_by(),
            usage: results.usage,
            timings: results.timings,
        })
    }

    /// Log-likelihoods of given texts.
    ///
    /// # Errors
    /// Every kind of [`ServeError`].
    pub async fn score(&self, tenant: &TenantId, params: ScoreParams) -> Result<ScoreReply, ServeError> {
        let arrived = Instant::now();
        params.check()?;
        let arch = &self.parts().base.arch;
        if !arch.is_causal() {
            return Err(ServeError::WrongTask(format!("the base is {}, which does not score", arch.kind())));
        }
        let start = match (arch.is_encoder_decoder(), arch.decoder_start) {
            (false, _) => None,
            (true, Some(start)) => Some(start),
            (true, None) => return Err(no_start()),
        };
        let _call = self.enter(tenant)?;
        let admitted = self.admit(tenant, &params.delta, arrived, params.timeout).await?;
        let admitted = admitted.with_priority(params.priority);
        let inputs = params.inputs.clone();
        let encoded = self
            .blocking(move |parts| {
                let ids =
                    |text: &str, field: &str| parts.text.encode_user(text, true).map_err(|e| text_error(field, &e));
                let one = |(i, (prompt, completion)): (usize, &(String, String))| {
                    let field = format!("inputs[{i}]");
                    if let Some(start) = start {
                        return apart(&ids, (prompt, completion), start, &field);
                    }
                    // together, as the model would read them; scored from where the prompt's own tokens end
                    let whole = ids(&format!("{prompt}{completion}"), &field)?;
                    let from = if prompt.is_empty() { 1 } else { ids(prompt, &field)?.len().max(1) };
                    if from >= whole.len() {
                        let m =
                            "has nothing to score: at least one token after the prompt (or the first one) is needed";
                        return Err(ServeError::field(field, m));
                    }
                    Ok((Input { tokens: whole, ..Input::default() }, from))
                };
                inputs.iter().enumerate().map(one).collect::<Result<Vec<_>, _>>()
            })
            .await?;
        let row = |(at, (input, from)): (usize, &(Input, usize))| {
            let work = Work::Score { from: *from };
            Row { at, input: input.clone(), work }
        };
        let results = self.run(encoded.iter().enumerate().map(row).collect(), &admitted).await?;
        let text = &self.parts().text;
        let mut out = Vec::with_capacity(encoded.len());
        for (output, (Input { tokens: ids, .. }, from)) in results.outputs.into_iter().zip(&encoded) {
            let Output::Scores(scores) = output else {
                return Err(ServeError::Internal("the engine mixed up its work".into()));
            };
            let named =
                |(&id, &logprob): (&u32, &f32)| TokenLogprob { id, text: text.token_text(id), logprob, top: vec![] };
            let tokens: Vec<TokenLogprob> = ids[*from..].iter().zip(&scores).map(named).collect();
            out.push(Scored { log_likelihood: scores.iter().map(|&s| f64::from(s)).sum(), tokens });
        }
        Ok(ScoreReply { results: out, served_by: admitted.served_by(), usage: results.usage, timings: results.timings })
    }

    /// Token ids of a text, as a prompt would be read.
    ///
    /// # Errors
    /// A text over the limit.
    pub async fn tokenize(&self, text: String, add_special: bool) -> Result<TokenizeReply, ServeError> {
        self.blocking(move |parts| {
            let ids = parts.text.encode_user(&text, add_special).map_err(|e| text_error("text", &e))?;
            let tokens = ids.iter().map(|&id| parts.text.token_str(id).unwrap_or_default()).collect();
            Ok(TokenizeReply { ids, tokens })
        })
        .await
    }

    /// Runs one sequence per row and waits for all: at once a share of the server's places, then each as another ends.
    pub(super) async fn run(&self, rows: Vec<Row>, admitted: &Admitted) -> Result<Results, ServeError> {
        for row in &rows {
            let field = format!("inputs[{}]", row.at);
            self.check_source(&field, &row.input, admitted)?;
            self.check_room(&field, &row.input, 0, admitted)?;
        }
        let places = self.places().take_bulk(&admitted.tenant, rows.len().min(self.places().share()))?;
        let read: usize = rows.iter().map(|r| r.input.given()).sum();
        if let Some(meter) = self.meter(&admitted.tenant) {
            meter.take(read as u64);
        }
        let (all, mut rows) = (rows.len(), rows.into_iter());
        let mut waiting: VecDeque<mpsc::Receiver<Event>> = VecDeque::with_capacity(places.len());
        let start = |row: Row, place| self.submit(row.input, row.work, admitted, place);
        for (row, place) in rows.by_ref().take(places.len()).zip(places) {
            waiting.push_back(start(row, place)?);
        }
        let mut results = Results {
            outputs: Vec::with_capacity(all),
            usage: Usage { prompt_tokens: u32::try_from(read).unwrap_or(u32::MAX), ..Usage::default() },
            timings: Timings::default(),
        };
        while let Some(mut events) = waiting.pop_front() {
            match events.recv().await {
                Some(Event::Output(output, timings)) => {
                    results.outputs.push(output);
                    let t = &mut results.timings;
                    t.queue = t.queue.max(timings.queue);
                    t.prefill = t.prefill.max(timings.prefill);
                }
                Some(Event::Failed(e)) => return Err(e.into()),
                Some(_) => return Err(ServeError::Internal("the engine mixed up its work".into())),
                None => return Err(ServeError::Internal("the engine has stopped".into())),
            }
            if let Some(row) = rows.next() {
                let place = self.places().next(&admitted.tenant, admitted.arrived, admitted.deadline).await?;
                waiting.push_back(start(row, place)?);
            }
        }
        Ok(results)
    }
}

/// An encoder-decoder reads the prompt and scores the completion as its output.
fn apart(
    ids: &impl Fn(&str, &str) -> Result<Vec<u32>, ServeError>,
    (prompt, completion): (&str, &str),
    start: u32,
    field: &str,
) -> Result<(Input, usize), ServeError> {
    let source = ids(prompt, field)?;
    if source.is_empty() {
        return Err(ServeError::field(field, "has an empty prompt, which the encoder cannot read"));
    }
    let tokens: Vec<u32> = std::iter::once(start).chain(ids(completion, field)?).collect();
    if tokens.len() < 2 {
        return Err(ServeError::field(field, "has nothing to score: the completion has no token"));
    }
    Ok((Input { source, tokens, types: None }, 1))
}
