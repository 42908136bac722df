//! Inference messages.

use std::time::Duration;

use crate::{
    admission::{
        catalog_params::check_weighted,
        check::{MAX_PROMPTS, Problems},
        params::{
            BeamParams, ChatMessage, Classification, ClassifyInput, ClassifyParams, ClassifyReply, ConstraintParams,
            DeltaChoice, EarlyStopping, EmbedParams, EmbedReply, FinishReason, GenerateChunk, GenerateParams,
            LabelScore, NgramSpeculation, Pooling, Prompt, Sampling, ScoreParams, ScoreReply, Scored, ServeError,
            ServedBy, ServedPart, Timings, TokenLabel, TokenLogprob, Usage,
        },
    },
    grpc::proto,
};

const DEFAULT_NEW_TOKENS: u32 = 128;

/// A Generate request.
pub(in crate::grpc) fn generate(
    request: proto::GenerateRequest,
    timeout: Option<Duration>,
) -> Result<GenerateParams, ServeError> {
    let mut problems = Problems::default();
    let prompt = prompt("prompt", request.prompt, &mut problems);
    let delta = choice(request.delta, request.deltas, &mut problems);
    let params = options(delta, prompt, request.options, timeout, &mut problems);
    params.check_options(&mut problems);
    problems.finish()?;
    Ok(params)
}

/// A GenerateBatch request, as one request per prompt.
pub(in crate::grpc) fn generate_batch(
    request: proto::GenerateBatchRequest,
    timeout: Option<Duration>,
) -> Result<Vec<GenerateParams>, ServeError> {
    let count = request.prompts.len();
    if !(1..=MAX_PROMPTS).contains(&count) {
        return Err(ServeError::field("prompts", format!("has {count} entries; accepted are 1 to {MAX_PROMPTS}")));
    }
    let mut problems = Problems::default();
    let delta = choice(request.delta, request.deltas, &mut problems);
    let template = options(delta, Prompt::Tokens(Vec::new()), request.options, timeout, &mut problems);
    template.check_options(&mut problems);
    let mut all = Vec::with_capacity(count);
    for (i, message) in request.prompts.into_iter().enumerate() {
        let prompt = prompt(&format!("prompts[{i}]"), Some(message), &mut problems);
        all.push(GenerateParams { prompt, ..template.clone() });
    }
    problems.finish()?;
    Ok(all)
}

fn prompt(at: &str, message: Option<proto::Prompt>, problems: &mut Problems) -> Prompt {
    use proto::prompt::Prompt as Wire;
    let prompt = match message.and_then(|m| m.prompt) {
        Some(Wire::Text(text)) => Prompt::Text(text),
        Some(Wire::Chat(chat)) => Prompt::Chat(chat.messages.into_iter().map(chat_message).collect()),
        Some(Wire::Tokens(tokens)) => Prompt::Tokens(tokens.ids),
        None => {
            problems.push(at, "is required: one of text, chat, tokens");
            return Prompt::Text(String::new());
        }
    };
    prompt.check(at, problems);
    prompt
}

pub(super) fn chat_message(message: proto::ChatMessage) -> ChatMessage {
    ChatMessage { role: message.role, content: message.content }
}

/// One delta, or several with weights; not both.
fn choice(delta: String, deltas: Vec<proto::WeightedDelta>, problems: &mut Problems) -> DeltaChoice {
    if deltas.is_empty() {
        return delta.into();
    }
    problems.require(delta.is_empty(), "deltas", || "is given beside delta; name the deltas in one of them".into());
    let deltas = super::deltas::weighted(deltas);
    check_weighted(&deltas, 1, problems);
    DeltaChoice::weighted(deltas)
}

fn only_choice(delta: String, deltas: Vec<proto::WeightedDelta>) -> Result<DeltaChoice, ServeError> {
    let mut problems = Problems::default();
    let choice = choice(delta, deltas, &mut problems);
    problems.finish()?;
    Ok(choice)
}

fn options(
    delta: DeltaChoice,
    prompt: Prompt,
    message: Option<proto::GenerateOptions>,
    timeout: Option<Duration>,
    problems: &mut Problems,
) -> GenerateParams {
    let o = message.unwrap_or_default();
    let beams = beams(&o, problems);
    GenerateParams {
        beams,
        constraint: constraint(o.constraint, problems),
        delta,
        prompt,
        max_new_tokens: o.max_new_tokens.unwrap_or(DEFAULT_NEW_TOKENS),
        sampling: sampling(o.sampling.unwrap_or_default()),
        stop: o.stop,
        stop_tokens: o.stop_tokens,
        ignore_eos: o.ignore_eos,
        logprobs: o.logprobs,
        n: o.n.unwrap_or(1),
        speculation: o.speculative_ngram.map(speculation),
        priority: o.priority,
        timeout,
    }
}

/// What the output must be.
fn constraint(given: Option<proto::generate_options::Constraint>, problems: &mut Problems) -> Option<ConstraintParams> {
    use proto::generate_options::Constraint as Wire;
    Some(match given? {
        Wire::JsonSchema(schema) => ConstraintParams::JsonSchema(schema),
        Wire::JsonObject(wanted) => {
            problems.require(wanted, "options.json_object", || "is false; leave it out".into());
            ConstraintParams::JsonObject
        }
        Wire::Regex(regex) => ConstraintParams::Regex(regex),
        Wire::Choice(choice) => ConstraintParams::Choice(choice.texts),
        Wire::LarkGrammar(grammar) => ConstraintParams::Lark(grammar),
    })
}

/// A beam search, where more than one beam is asked for.
fn beams(o: &proto::GenerateOptions, problems: &mut Problems) -> Option<BeamParams> {
    use proto::EarlyStopping as Wire;
    let early_stopping = match Wire::try_from(o.early_stopping) {
        Ok(Wire::Unspecified | Wire::Heuristic) => EarlyStopping::Heuristic,
        Ok(Wire::Full) => EarlyStopping::Full,
        Ok(Wire::Never) => EarlyStopping::Never,
        Err(unknown) => {
            problems.push("options.early_stopping", unknown.to_string());
            EarlyStopping::default()
        }
    };
    match o.num_beams {
        None | Some(1) => {
            for (field, given) in
                [("length_penalty", o.length_penalty.is_some()), ("early_stopping", o.early_stopping != 0)]
            {
                problems.require(!given, &format!("options.{field}"), || {
                    "is given without num_beams over 1, which it is for".into()
                });
            }
            None
        }
        Some(beams) => Some(BeamParams { beams, length_penalty: o.length_penalty.unwrap_or(1.0), early_stopping }),
    }
}

fn speculation(s: proto::NgramSpeculation) -> NgramSpeculation {
    let unset = NgramSpeculation::default();
    NgramSpeculation {
        tokens: s.num_speculative_tokens.unwrap_or(unset.tokens),
        longest: s.prompt_lookup_max.unwrap_or(unset.longest),
        shortest: s.prompt_lookup_min.unwrap_or(unset.shortest),
    }
}

fn sampling(s: proto::Sampling) -> Sampling {
    let neutral = Sampling::default();
    Sampling {
        temperature: s.temperature.unwrap_or(neutral.temperature),
        top_k: s.top_k.unwrap_or(neutral.top_k),
        top_p: s.top_p.unwrap_or(neutral.top_p),
        min_p: s.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: s.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        frequency_penalty: s.frequency_penalty.unwrap_or(neutral.frequency_penalty),
        presence_penalty: s.presence_penalty.unwrap_or(neutral.presence_penalty),
        no_repeat_ngram_size: s.no_repeat_ngram_size.unwrap_or(neutral.no_repeat_ngram_size),
        seed: s.seed,
    }
}

/// A Classify request.
pub(in crate::grpc) fn classify(
    request: proto::ClassifyRequest,
    timeout: Option<Duration>,
) -> Result<ClassifyParams, ServeError> {
    let mut problems = Problems::default();
    let inputs = request.inputs.into_iter().enumerate().map(|(i, input)| classify_input(i, input, &mut problems));
    let inputs = inputs.collect();
    let delta = choice(request.delta, request.deltas, &mut problems);
    problems.finish()?;
    let proto::ClassifyRequest { truncate, threshold, priority, .. } = request;
    let params = ClassifyParams { delta, inputs, truncate, threshold, priority, timeout };
    params.check()?;
    Ok(params)
}

fn classify_input(i: usize, input: proto::ClassifyInput, problems: &mut Problems) -> ClassifyInput {
    if input.words.is_empty() {
        return ClassifyInput::Text { text: input.text, pair: input.pair };
    }
    if !input.text.is_empty() || input.pair.is_some() {
        problems.push(format!("inputs[{i}].words"), "excludes text and pair; give one form");
    }
    ClassifyInput::Words(input.words)
}

/// An Embed request.
pub(in crate::grpc) fn embed(
    request: proto::EmbedRequest,
    timeout: Option<Duration>,
) -> Result<EmbedParams, ServeError> {
    use proto::Pooling as Wire;
    let pooling = match Wire::try_from(request.pooling) {
        Ok(Wire::Unspecified) => Pooling::Default,
        Ok(Wire::Mean) => Pooling::Mean,
        Ok(Wire::Cls) => Pooling::Cls,
        Ok(Wire::Last) => Pooling::Last,
        Err(unknown) => return Err(ServeError::field("pooling", unknown.to_string())),
    };
    let normalize = request.normalize.unwrap_or(true);
    let delta = only_choice(request.delta, request.deltas)?;
    let priority = request.priority;
    let params = EmbedParams { delta, inputs: request.inputs, pooling, normalize, priority, timeout };
    params.check()?;
    Ok(params)
}

/// A Score request.
pub(in crate::grpc) fn score(
    request: proto::ScoreRequest,
    timeout: Option<Duration>,
) -> Result<ScoreParams, ServeError> {
    let inputs = request.inputs.into_iter().map(|i| (i.prompt, i.completion)).collect();
    let delta = only_choice(request.delta, request.deltas)?;
    let params = ScoreParams { delta, inputs, priority: request.priority, timeout };
    params.check()?;
    Ok(params)
}

/// A piece of a generation to the wire.
pub(in crate::grpc) fn generate_response(chunk: GenerateChunk) -> proto::GenerateResponse {
    use proto::generate_response::Event;
    let event = match chunk {
        GenerateChunk::Delta { index, text, token_ids, logprobs } => Event::Delta(proto::TextDelta {
            index,
            text,
            token_ids,
            logprobs: logprobs.into_iter().map(token_logprob).collect(),
        }),
        GenerateChunk::Finished { index, reason, usage: u, timings: t, served_by: s, seed, score } => {
            Event::Finished(proto::Finished {
                index,
                reason: finish_reason(reason),
                usage: Some(usage(u)),
                timings: Some(timings(t)),
                served_by: Some(served_by(s)),
                seed,
                score,
            })
        }
    };
    proto::GenerateResponse { event: Some(event) }
}

pub(in crate::grpc) fn finish_reason(reason: FinishReason) -> i32 {
    match reason {
        FinishReason::StopToken => proto::FinishReason::StopToken,
        FinishReason::StopText => proto::FinishReason::StopText,
        FinishReason::Length => proto::FinishReason::Length,
    }
    .into()
}

pub(in crate::grpc) fn token_logprob(t: TokenLogprob) -> proto::TokenLogprob {
    let top = t.top.into_iter().map(|(id, text, logprob)| proto::Token { id, text, logprob }).collect();
    proto::TokenLogprob { token: Some(proto::Token { id: t.id, text: t.text, logprob: t.logprob }), top }
}

pub(in crate::grpc) fn usage(u: Usage) -> proto::Usage {
    let Usage { prompt_tokens, completion_tokens, cached_tokens, drafted_tokens, accepted_tokens } = u;
    proto::Usage { prompt_tokens, completion_tokens, cached_tokens, drafted_tokens, accepted_tokens }
}

pub(in crate::grpc) fn timings(t: Timings) -> proto::Timings {
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    proto::Timings { queue_ms: ms(t.queue), prefill_ms: ms(t.prefill), decode_ms: ms(t.decode) }
}

pub(in crate::grpc) fn served_by(s: ServedBy) -> proto::ServedBy {
    let part =
        |p: ServedPart| proto::ServedPart { name: p.name, number: p.number, id: p.id.to_string(), weight: p.weight };
    proto::ServedBy {
        name: s.name,
        number: s.number,
        id: s.id.map(|id| id.to_string()).unwrap_or_default(),
        parts: s.parts.into_iter().map(part).collect(),
    }
}

/// The reply of Classify.
pub(in crate::grpc) fn classify_response(reply: ClassifyReply) -> proto::ClassifyResponse {
    proto::ClassifyResponse {
        problem_type: reply.problem.map(|p| p.as_str().to_owned()).unwrap_or_default(),
        results: reply.results.into_iter().map(classification).collect(),
        served_by: Some(served_by(reply.served_by)),
        usage: Some(usage(reply.usage)),
        timings: Some(timings(reply.timings)),
    }
}

fn classification(c: Classification) -> proto::Classification {
    proto::Classification {
        labels: c.labels.into_iter().map(label_score).collect(),
        tokens: c.tokens.into_iter().map(token_label).collect(),
        tokens_read: c.tokens_read,
        cut: c.cut,
        value: c.value,
    }
}

fn label_score(l: LabelScore) -> proto::LabelScore {
    proto::LabelScore { label: l.label, index: l.index, probability: l.probability }
}

fn token_label(t: TokenLabel) -> proto::TokenLabel {
    proto::TokenLabel { start: t.start, end: t.end, text: t.text, label: t.label.map(label_score) }
}

/// The reply of Embed.
pub(in crate::grpc) fn embed_response(reply: EmbedReply) -> proto::EmbedResponse {
    proto::EmbedResponse {
        embeddings: reply.embeddings.into_iter().map(|values| proto::Embedding { values }).collect(),
        served_by: Some(served_by(reply.served_by)),
        usage: Some(usage(reply.usage)),
        timings: Some(timings(reply.timings)),
    }
}

/// The reply of Score.
pub(in crate::grpc) fn score_response(reply: ScoreReply) -> proto::ScoreResponse {
    proto::ScoreResponse {
        results: reply.results.into_iter().map(scored).collect(),
        served_by: Some(served_by(reply.served_by)),
        usage: Some(usage(reply.usage)),
        timings: Some(timings(reply.timings)),
    }
}

fn scored(s: Scored) -> proto::Scored {
    let token = |t: TokenLogprob| proto::Token { id: t.id, text: t.text, logprob: t.logprob };
    proto::Scored { log_likelihood: s.log_likelihood, tokens: s.tokens.into_iter().map(token).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(error: ServeError) -> Vec<String> {
        match error {
            ServeError::Invalid(all) => all.into_iter().map(|v| v.field).collect(),
            other => panic!("{other}"),
        }
    }

    fn text(text: &str) -> proto::Prompt {
        proto::Prompt { prompt: Some(proto::prompt::Prompt::Text(text.into())) }
    }

    #[test]
    fn unset_options_are_the_documented_defaults() -> Result<(), ServeError> {
        let request = proto::GenerateRequest { prompt: Some(text("hi")), ..Default::default() };
        let params = generate(request, None)?;
        assert_eq!((params.max_new_tokens, params.n, params.logprobs), (128, 1, None));
        assert_eq!(params.sampling, Sampling::default());
        assert_eq!(params.speculation, None);
        let speculative_ngram = Some(proto::NgramSpeculation { prompt_lookup_max: Some(2), ..Default::default() });
        let options = proto::GenerateOptions { speculative_ngram, ..Default::default() };
        let request = proto::GenerateRequest { options: Some(options), prompt: Some(text("hi")), ..Default::default() };
        let speculation = NgramSpeculation { tokens: 4, longest: 2, shortest: 1 };
        assert_eq!(generate(request, None)?.speculation, Some(speculation));
        Ok(())
    }

    #[test]
    fn every_bad_number_is_named_at_once() {
        let sampling = proto::Sampling {
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            min_p: Some(f32::INFINITY),
            repetition_penalty: Some(-1.0),
            frequency_penalty: Some(2.5),
            presence_penalty: Some(f32::NEG_INFINITY),
            no_repeat_ngram_size: Some(257),
            ..Default::default()
        };
        let options = proto::GenerateOptions {
            max_new_tokens: Some(0),
            sampling: Some(sampling),
            stop: vec![String::new(), "x".repeat(257)],
            stop_tokens: vec![0; 65],
            logprobs: Some(21),
            n: Some(1_000_000),
            priority: -101,
            speculative_ngram: Some(proto::NgramSpeculation {
                num_speculative_tokens: Some(17),
                prompt_lookup_max: Some(0),
                prompt_lookup_min: Some(2),
            }),
            ..Default::default()
        };
        let request = proto::GenerateRequest { options: Some(options), ..Default::default() };
        let got = fields(generate(request, None).expect_err("all of it is bad"));
        let expected = [
            "prompt",
            "options.priority",
            "options.max_new_tokens",
            "options.sampling.temperature",
            "options.sampling.top_p",
            "options.sampling.min_p",
            "options.sampling.repetition_penalty",
            "options.sampling.frequency_penalty",
            "options.sampling.presence_penalty",
            "options.sampling.no_repeat_ngram_size",
            "options.stop[0]",
            "options.stop[1]",
            "options.stop_tokens",
            "options.logprobs",
            "options.n",
            "options.speculative_ngram.num_speculative_tokens",
            "options.speculative_ngram.prompt_lookup_max",
            "options.speculative_ngram.prompt_lookup_min",
        ];
        assert_eq!(got, expected);
    }

    #[test]
    fn one_bad_prompt_among_good_ones_is_named() {
        let request =
            proto::GenerateBatchRequest { prompts: vec![text("a"), text(""), text("b")], ..Default::default() };
        assert_eq!(fields(generate_batch(request, None).expect_err("the second is empty")), ["prompts[1].text"]);
        for count in [0, 257] {
            let request = proto::GenerateBatchRequest { prompts: vec![text("a"); count], ..Default::default() };
            assert_eq!(fields(generate_batch(request, None).expect_err("too few or many")), ["prompts"]);
        }
    }

    #[test]
    fn huge_and_empty_batches_are_refused() {
        for count in [0, 1025] {
            let inputs = vec![proto::ClassifyInput { text: "a".into(), ..Default::default() }; count];
            let request = proto::ClassifyRequest { inputs, ..Default::default() };
            assert_eq!(fields(classify(request, None).expect_err("count")), ["inputs"]);
        }
        for threshold in [f32::NAN, -0.1, 1.1] {
            let inputs = vec![proto::ClassifyInput { text: "a".into(), ..Default::default() }];
            let request = proto::ClassifyRequest { inputs, threshold, ..Default::default() };
            assert_eq!(fields(classify(request, None).expect_err("no probability")), ["threshold"]);
        }
        let both = proto::ClassifyInput { text: "a".into(), words: vec!["a".into()], pair: None };
        let request = proto::ClassifyRequest { inputs: vec![both], ..Default::default() };
        assert_eq!(fields(classify(request, None).expect_err("two forms")), ["inputs[0].words"]);
        let request = proto::EmbedRequest { inputs: vec!["a".into()], pooling: 99, ..Default::default() };
        assert_eq!(fields(embed(request, None).expect_err("unknown pooling")), ["pooling"]);
        let inputs = vec![proto::ScoreInput::default()];
        let request = proto::ScoreRequest { inputs, ..Default::default() };
        assert_eq!(fields(score(request, None).expect_err("empty")), ["inputs[0].completion"]);
    }
}
