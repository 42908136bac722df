//! Classify, embed, score and tokenize: prompt-only sequences, one per input, in the same steps as everything else.

use std::{collections::VecDeque, time::Instant};

use tokio::sync::mpsc;

use super::{
    params::{
        Classification, ClassifyParams, ClassifyReply, EmbedParams, EmbedReply, LabelScore, Pooling, ScoreParams,
        ScoreReply, Scored, ServeError, Timings, TokenLabel, TokenLogprob, TokenizeReply, Usage,
    },
    service::{Admitted, Input, Service, no_start, text_error},
};
use crate::{
    delta::Task,
    engine::{Event, Output, Work},
    ids::TenantId,
    text::Encoded,
};

/// One input, tokenised.
struct Row {
    input: Input,
    work: Work,
}

/// What came back for all inputs of a call.
struct Results {
    outputs: Vec<Output>,
    usage: Usage,
    timings: Timings,
}

impl Service {
    /// Labels of texts: of each text, or of each of its tokens, as the head's task says.
    ///
    /// # Errors
    /// Every kind of [`ServeError`].
    pub async fn classify(&self, tenant: &TenantId, params: ClassifyParams) -> Result<ClassifyReply, ServeError> {
        let arrived = Instant::now();
        params.check()?;
        let arch = &self.parts().base.arch;
        if arch.is_encoder_decoder() {
            return Err(ServeError::WrongTask(format!("the base is {}, which does not classify", arch.kind())));
        }
        let admitted = self.admit(tenant, &params.delta, arrived, params.timeout).await?;
        let (task, labels) = self.head(&params.delta, &admitted)?;
        let inputs = params.inputs.clone();
        let encoded = self
            .blocking(move |parts| {
                let one = |(i, (text, second)): (usize, &(String, Option<String>))| {
                    let field = format!("inputs[{i}]");
                    parts.text.encode_pair(text, second.as_deref()).map_err(|e| text_error(&field, &e))
                };
                inputs.iter().enumerate().map(one).collect::<Result<Vec<Encoded>, _>>()
            })
            .await?;
        let tokens_of = |e: &Encoded| e.ids.len() as u32;
        // a tokenizer may number the second text although the base knows one kind only (RoBERTa)
        let kinds = self.parts().base.arch.token_types as u32;
        let rows = encoded.iter().map(|e| Row {
            input: Input {
                source: vec![],
                tokens: e.ids.clone(),
                types: (kinds > 0).then(|| e.type_ids.iter().map(|t| (*t).min(kinds - 1)).collect()),
            },
            work: if task == Task::TokenCls { Work::ClassifyTokens } else { Work::Classify },
        });
        let results = self.run(rows.collect(), &admitted).await?;
        let mut out = Vec::with_capacity(encoded.len());
        for ((output, encoded), input) in results.outputs.into_iter().zip(&encoded).zip(&params.inputs) {
            out.push(match output {
                Output::Logits(logits) => {
                    Classification { labels: ranked(&logits, &labels), tokens: vec![], tokens_read: tokens_of(encoded) }
                }
                Output::TokenLogits(rows) => Classification {
                    labels: vec![],
                    tokens: token_labels(&rows, encoded, input, &labels),
                    tokens_read: tokens_of(encoded),
                },
                _ => return Err(ServeError::Internal("the engine mixed up its work".into())),
            });
        }
        Ok(ClassifyReply {
            results: out,
            served_by: admitted.served_by(),
            usage: results.usage,
            timings: results.timings,
        })
    }

    /// Which head answers, and its label names.
    fn head(&self, reference: &str, admitted: &Admitted) -> Result<(Task, Vec<String>), ServeError> {
        let base = &self.parts().base;
        if let Some(lease) = &admitted.lease {
            let spec = &lease.delta().spec;
            if lease.delta().head().is_some() || !spec.labels.is_empty() {
                let task = if spec.task == Task::TokenCls { Task::TokenCls } else { Task::SeqCls };
                return Ok((task, spec.labels.clone()));
            }
            let task = spec.task.as_str();
            return Err(ServeError::WrongTask(format!(
                "delta {reference:?} is for {task} and has no classification head"
            )));
        }
        match &base.arch.head {
            Some(head) if base.transformer.has_head() => Ok((head.task, head.labels.clone())),
            _ => Err(ServeError::WrongTask("the base has no classification head; name a delta that brings one".into())),
        }
    }

    /// One vector per text.
    ///
    /// # Errors
    /// Every kind of [`ServeError`].
    pub async fn embed(&self, tenant: &TenantId, params: EmbedParams) -> Result<EmbedReply, ServeError> {
        let arrived = Instant::now();
        params.check()?;
        let admitted = self.admit(tenant, &params.delta, arrived, params.timeout).await?;
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
        let rows = encoded.into_iter().map(|tokens| Ok(Row { input: self.prompt(tokens)?, work: work.clone() }));
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
        let admitted = self.admit(tenant, &params.delta, arrived, params.timeout).await?;
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
        let rows = encoded.iter().map(|(input, from)| Row { input: input.clone(), work: Work::Score { from: *from } });
        let results = self.run(rows.collect(), &admitted).await?;
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

    /// Runs one sequence per row and waits for all: at once as many as the server admits, then each as another ends.
    async fn run(&self, rows: Vec<Row>, admitted: &Admitted) -> Result<Results, ServeError> {
        for (i, row) in rows.iter().enumerate() {
            let field = format!("inputs[{i}]");
            self.check_source(&field, &row.input, admitted)?;
            self.check_room(&field, &row.input, 0, admitted)?;
        }
        let places = self.places().take(rows.len().min(self.places().most()))?;
        let read: usize = rows.iter().map(|r| r.input.given()).sum();
        let (all, mut rows) = (rows.len(), rows.into_iter());
        let mut waiting: VecDeque<mpsc::Receiver<Event>> = VecDeque::with_capacity(places.len());
        let start = |row: Row, place| self.submit(row.input, row.work, admitted, place);
        for (row, place) in rows.by_ref().take(places.len()).zip(places) {
            waiting.push_back(start(row, place)?);
        }
        let mut results = Results {
            outputs: Vec::with_capacity(all),
            usage: Usage { prompt_tokens: u32::try_from(read).unwrap_or(u32::MAX), completion_tokens: 0 },
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
                let place = self.places().next(admitted.arrived, admitted.deadline).await?;
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

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

fn score(index: usize, probability: f32, labels: &[String]) -> LabelScore {
    let label = labels.get(index).cloned().unwrap_or_else(|| format!("LABEL_{index}"));
    LabelScore { label, index: index as u32, probability }
}

/// All labels, best first.
fn ranked(logits: &[f32], labels: &[String]) -> Vec<LabelScore> {
    let mut all: Vec<LabelScore> = softmax(logits).into_iter().enumerate().map(|(i, p)| score(i, p, labels)).collect();
    all.sort_by(|a, b| b.probability.total_cmp(&a.probability).then(a.index.cmp(&b.index)));
    all
}

/// The best label of every word piece of the first text; special tokens have none.
fn token_labels(
    rows: &[Vec<f32>],
    encoded: &Encoded,
    input: &(String, Option<String>),
    labels: &[String],
) -> Vec<TokenLabel> {
    let mut out = Vec::new();
    for (i, logits) in rows.iter().enumerate() {
        let (Some(0), Some(&(start, end))) = (encoded.sources.get(i).copied().flatten(), encoded.offsets.get(i)) else {
            continue;
        };
        let Some(best) = ranked(logits, labels).into_iter().next() else { continue };
        let text = input.0.get(start..end).unwrap_or_default().to_owned();
        out.push(TokenLabel { start: start as u32, end: end as u32, text, label: best });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_ranked_and_their_probabilities_sum_to_one() {
        let labels = ["a".to_owned(), "b".to_owned()];
        let out = ranked(&[1.0, 3.0, 2.0], &labels);
        let names: Vec<_> = out.iter().map(|l| l.label.as_str()).collect();
        assert_eq!(names, ["b", "LABEL_2", "a"]);
        assert!((out.iter().map(|l| l.probability).sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(softmax(&[1000.0, 0.0])[0] > 0.999, "large logits do not overflow");
    }
}
