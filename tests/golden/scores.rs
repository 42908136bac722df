//! The engine's scores against the golden logits: sources, prompts in chunks and what deltas put ahead, all rows at once.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType, Tensor};
use deltaserve::{
    delta::Delta,
    engine::{EngineConfig, Event, HeldDelta, Output, Request, Work, spawn},
    ids::DeltaId,
    model::Base,
    pacing::Pacer,
    rows::RowLayout,
};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::{
    cases::places,
    fixtures::{Batch, Step, fail},
};

/// The log-probability of each row's tokens after its first, as the engine's `Score` gives them and as the golden logits
/// say; the largest difference. The first row comes twice, once without the delta, so that different ones share steps.
///
/// # Errors
/// A difference above `atol`, or a request that fails.
pub(crate) fn check(
    base: &Arc<Base>,
    delta: &Option<Arc<Delta>>,
    (case, task): (&Value, &str),
    want: &HashMap<String, Tensor>,
    atol: f64,
) -> Step<f64> {
    let batch = Batch::read_output(want, base)?;
    let inputs = Batch::read(want, "input_ids", "attention_mask")?;
    let logits = want.get("logits").ok_or_else(|| fail("no logits"))?;
    // steps are small, so that sequences begin in different ones and prompts come in chunks
    let config = EngineConfig { max_batch_tokens: 24, prefill_chunk: 5, kv_pages: 64, ..EngineConfig::default() };
    let pacer = Arc::new(Pacer::new(Duration::from_millis(1), 0.0));
    let (engine, thread) = spawn(Arc::clone(base), config, pacer).map_err(fail)?;
    let submit = |i: usize, delta: &Option<Arc<Delta>>| -> Step<mpsc::Receiver<Event>> {
        let (events, receiver) = mpsc::channel(2);
        let source = if base.arch.is_encoder_decoder() { inputs.tokens[i].clone() } else { vec![] };
        let held = delta.as_ref().map(|d| HeldDelta::new(DeltaId::from_bytes([7; 32]), Arc::clone(d), ()));
        let request = Request {
            tenant: None,
            weight: 1,
            priority: 0,
            id: i as u64,
            source,
            tokens: batch.tokens[i].clone(),
            token_types: None,
            delta: held,
            work: Work::Score { from: 1 },
            constraint: None,
            deadline: None,
            events,
            permit: None,
            arrived: Instant::now(),
        };
        engine.submit(request).map_err(fail)?;
        Ok(receiver)
    };
    let bare = submit(0, &None)?;
    let rows = (0..batch.tokens.len()).map(|i| submit(i, delta)).collect::<Step<Vec<_>>>()?;
    scores(bare)?;
    let ahead = delta.as_ref().map(|d| d.ahead()).unwrap_or_default();
    let mut worst = 0f64;
    for (i, events) in rows.into_iter().enumerate() {
        let tokens = &batch.tokens[i];
        let span = RowLayout::packed_after([(tokens.len(), ahead)]).spans()[0].clone();
        let places = places(case, task, &span, &batch.places(i));
        let first = places.len() - tokens.len(); // virtual positions
        let go = || -> candle_core::Result<Vec<Vec<f32>>> {
            let own = logits.get(i)?.index_select(&Tensor::new(&places[first..], logits.device())?, 0)?;
            candle_nn::ops::log_softmax(&own.to_dtype(DType::F32)?, 1)?.to_vec2()
        };
        let likely = go().map_err(fail)?;
        let got = scores(events)?;
        if got.len() != tokens.len() - 1 {
            return Err(fail(format!("{} scores of row {i} with {} tokens", got.len(), tokens.len())));
        }
        for (t, score) in got.iter().enumerate() {
            let d = f64::from((score - likely[t][tokens[t + 1] as usize]).abs());
            worst = worst.max(d);
            if d.is_nan() || d > atol {
                return Err(fail(format!(
                    "the score of token {} of row {i} differs by {d:.2e} (atol {atol:.1e})",
                    t + 1
                )));
            }
        }
    }
    engine.shutdown(Duration::ZERO);
    thread.join().map_err(|_| fail("the engine thread panicked"))?;
    Ok(worst)
}

fn scores(mut events: mpsc::Receiver<Event>) -> Step<Vec<f32>> {
    match events.blocking_recv() {
        Some(Event::Output(Output::Scores(scores), _)) => Ok(scores),
        other => Err(fail(format!("no scores, but {other:?}"))),
    }
}
