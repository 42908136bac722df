//! The encoder's part of a step of an encoder-decoder: sequences that begin have their sources read.

use std::sync::Arc;

use candle_core::{DType, Result};

use super::{
    request::Work,
    step::{Got, Task, deltas_of},
};
use crate::{
    admission::params::Pooling,
    model::{Base, Source},
    rows::RowLayout,
};

/// Encodes the sources of the sequences that begin in this step, if there are any.
pub(super) fn encode(base: &Base, tasks: &[Task<'_>]) -> Result<Option<Source>> {
    let begin = || tasks.iter().filter(|t| t.share.encode > 0);
    let mut rows = RowLayout::default();
    let mut tokens = Vec::new();
    for task in begin() {
        tokens.extend_from_slice(&task.sequence.request.source);
        rows.push_after(task.sequence.request.source_ahead(), task.share.encode, 0, Arc::from([]));
    }
    if tokens.is_empty() {
        return Ok(None);
    }
    Source::encode(base, rows, &tokens, &deltas_of(begin()), None).map(Some)
}

/// Pooled encoder states of those that asked for an embedding.
pub(super) fn embeddings(source: &Source, tasks: &[Task<'_>], got: &mut [Got]) -> Result<()> {
    let begin = tasks.iter().enumerate().filter(|(_, t)| t.share.encode > 0);
    for ((i, task), span) in begin.zip(source.rows().spans()) {
        let Work::Embed { pooling, .. } = task.sequence.request.work else { continue };
        let tokens = span.token_rows();
        let own = source.states().narrow(0, tokens.start, tokens.len())?.to_dtype(DType::F32)?; // [tokens, hidden]
        got[i] = match pooling {
            Pooling::Mean | Pooling::Default => Got::Sum(own.sum(0)?.to_vec1()?),
            Pooling::Cls => Got::Numbers(own.get(0)?.to_vec1()?),
            Pooling::Last => Got::Numbers(own.get(tokens.len() - 1)?.to_vec1()?),
        };
    }
    Ok(())
}
