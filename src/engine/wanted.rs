//! Which final hidden states the results of a step are read off.

use super::{request::Work, step::Task};
use crate::{admission::params::Pooling, model::Base, nn::Cx, rows::Span};

/// The rows that the step's tasks read, one span per task: none of a chunk in the middle of a prompt. `encoded`: embeddings are
/// those of the encoder.
pub(super) fn rows(base: &Base, tasks: &[Task<'_>], encoded: bool, cx: &Cx<'_>) -> Vec<u32> {
    let mut heads = None; // looked up once
    let mut rows = Vec::new();
    for (i, (task, span)) in tasks.iter().zip(cx.rows.spans()).enumerate() {
        let all = |rows: std::ops::Range<usize>| rows.map(|row| row as u32);
        let last = all(span.rows().end - 1..span.rows().end);
        match &task.sequence.request.work {
            Work::Generate(_) if task.share.completes => {
                rows.extend(all(span.rows().end - 1 - task.share.drafts..span.rows().end));
            }
            Work::Classify if task.share.completes => {
                rows.push(heads.get_or_insert_with(|| base.transformer.head_rows(cx))[i]);
            }
            Work::Generate(_) | Work::Classify => {}
            Work::ClassifyTokens => rows.extend(all(span.token_rows())),
            Work::Score { from } => rows.extend(scored(task, span, *from).map(|(row, _)| row)),
            Work::Embed { .. } if encoded => {}
            Work::Embed { pooling: Pooling::Mean | Pooling::Default, .. } => rows.extend(all(span.token_rows())),
            Work::Embed { pooling: Pooling::Cls, .. } => rows.extend(span.first_token_row().map(|row| row as u32)),
            Work::Embed { pooling: Pooling::Last, .. } if task.share.completes => rows.extend(last),
            Work::Embed { pooling: Pooling::Last, .. } => {}
        }
    }
    rows
}

/// The rows of a task's span that predict a token from position `from` on, with those tokens.
pub(super) fn scored<'a>(task: &'a Task<'_>, span: &Span, from: usize) -> impl Iterator<Item = (u32, u32)> + use<'a> {
    let predicted = span.token_rows().zip(span.tokens()).map(|(row, token)| (row as u32, token + 1));
    let known: &'a [u32] = task.sequence.tokens(0);
    predicted.filter_map(move |(row, at)| known.get(at).filter(|_| at >= from).map(|token| (row, *token)))
}
