//! Beam search: one request of the engine, whose outputs come at its end, the best first.

use std::sync::Arc;

use futures::{StreamExt as _, stream};

use super::{
    params::{BeamParams, GenerateChunk, GenerateParams, ServeError},
    service::{Admitted, Input, Pieces, Service, text_error},
    tenants::Meter,
};
use crate::{
    engine::{Event, Footprint, Hypothesis},
    kv::PAGE_SIZE,
    text::{DecodeStream, TextModel},
};

/// What an output's text follows on, and what is told beside it.
pub(super) struct Told {
    pub(super) seed: u64,
    /// Tokens ahead of the output; none of an encoder-decoder.
    pub(super) before: Vec<u32>,
}

impl Service {
    /// Whether the cache and the engine's places have room for so many beams.
    pub(super) fn check_beams(
        &self,
        params: &GenerateParams,
        input: &Input,
        admitted: &Admitted,
    ) -> Result<(), ServeError> {
        let Some(BeamParams { beams, .. }) = params.beams else { return Ok(()) };
        let engine = &self.parts().engine;
        let most = engine.max_sequences();
        if beams as usize > most {
            let message = format!("is {beams}; this server runs at most {most} sequences at a time");
            return Err(ServeError::field("options.num_beams", message));
        }
        let delta = admitted.lease.as_ref().map(|l| l.delta().as_ref());
        let (len, new) = (input.tokens.len(), params.max_new_tokens as usize);
        let pages = |len: usize, source: usize| Footprint::of(delta, source, len + new).pages(beams as usize);
        let (needs, has) = (pages(len, input.source.len()), engine.stats().pages_total);
        if needs > has {
            let message = format!(
                "{beams} outputs of {len} + {new} tokens need a cache of {} positions; this server has {}",
                needs * PAGE_SIZE,
                has * PAGE_SIZE
            );
            // a shorter prompt may do, or none would
            let field = if pages(1, input.source.len().min(1)) > has { "options.num_beams" } else { "prompt" };
            return Err(ServeError::field(field, message));
        }
        Ok(())
    }

    /// The outputs of a search as a stream: of each its text, then its end.
    pub(super) fn searched(
        &self,
        mut events: tokio::sync::mpsc::Receiver<Event>,
        n: u32,
        (told, meter): (Told, Option<Meter>),
        admitted: &Admitted,
    ) -> Pieces<GenerateChunk> {
        let (text, served_by) = (Arc::clone(&self.parts().text), admitted.served_by());
        let chunks = async move {
            let (found, timings) = match events.recv().await {
                Some(Event::Hypotheses(found, timings)) => (found, timings),
                Some(Event::Failed(e)) => return vec![Err(e.into())],
                Some(_) => return vec![Err(ServeError::Internal("the engine mixed up its work".into()))],
                None => return vec![Err(ServeError::Internal("the engine has stopped".into()))],
            };
            if found.len() < n as usize {
                let message = format!("the search ended with {} outputs where {n} were asked for", found.len());
                return vec![Err(ServeError::Internal(message))];
            }
            if let Some(meter) = &meter {
                meter.take(found.iter().map(|h| u64::from(h.usage.completion_tokens)).sum());
            }
            let mut out = Vec::with_capacity(2 * found.len());
            for (index, Hypothesis { tokens, score, reason, usage }) in (0u32..).zip(found) {
                out.push(written(&text, &told.before, &tokens).map(|text| GenerateChunk::Delta {
                    index,
                    text,
                    token_ids: tokens,
                    logprobs: vec![],
                }));
                let (served_by, score) = (served_by.clone(), Some(score));
                out.push(Ok(GenerateChunk::Finished {
                    index,
                    reason,
                    usage,
                    timings,
                    served_by,
                    seed: told.seed,
                    score,
                }));
            }
            out
        };
        stream::once(chunks).flat_map(stream::iter).boxed()
    }
}

/// The text of an output, as a stream would have told it.
fn written(text: &Arc<TextModel>, before: &[u32], tokens: &[u32]) -> Result<String, ServeError> {
    let strange = |e: &dyn std::fmt::Display| ServeError::Internal(e.to_string());
    let mut decode = DecodeStream::after(Arc::clone(text), before).map_err(|e| text_error("prompt", &e))?;
    let mut out = String::new();
    for &token in tokens {
        out.extend(decode.push(token).map_err(|e| strange(&e))?);
    }
    out.extend(decode.finish().map_err(|e| strange(&e))?);
    Ok(out)
}
