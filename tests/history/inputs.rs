//! The inputs, and how a server is asked for what it answers to them.

use deltaserve::grpc::proto;
use tonic::{Code, Status};

use crate::{
    record::{Key, Value, Version},
    support::*,
};

/// Short ones whose pages are never shared, and one that is several pages long.
pub(crate) const PROMPTS: [&str; 3] = ["ab", "the cat", "once upon a time there was a frog that said to the cat"];
pub(crate) const NEW: u32 = 6;
const TEXTS: [&str; 3] = ["a", "the cat sat", "who goes there in the night?"];
const SCORED: [(&str, &str); 2] = [("the cat", " sat"), ("once upon", " a time there")];

/// What all that is not a classifier is asked.
pub(crate) fn text_keys() -> Vec<Key> {
    let generate = (0..PROMPTS.len()).map(Key::Generate);
    generate.chain((0..TEXTS.len()).map(Key::Embed)).chain((0..SCORED.len()).map(Key::Score)).collect()
}

pub(crate) fn keys(classifies: bool) -> Vec<Key> {
    if classifies { (0..TEXTS.len()).map(Key::Classify).collect() } else { text_keys() }
}

/// Answers with who gave them.
pub(crate) type Answers = (proto::ServedBy, Vec<(Key, Value)>);

pub(crate) fn version(by: &proto::ServedBy) -> Version {
    Version { number: by.number, id: by.id.clone() }
}

/// Whether the server said no before anything was changed. Of all else nobody knows.
pub(crate) fn refused(status: &Status) -> bool {
    let (code, reason) = kind(status);
    let broken_off = matches!(code, Code::DeadlineExceeded | Code::Cancelled | Code::Internal);
    !reason.is_empty() && !broken_off
}

/// Asks in one call for inputs of one kind, that of the first.
pub(crate) async fn ask_all(client: &Client, delta: &str, keys: &[Key]) -> Result<Answers, Status> {
    match keys {
        [Key::Generate(only)] => {
            let said = client.generate(ask(delta, PROMPTS[*only], NEW)).await?;
            Ok((said.finished.served_by.unwrap_or_default(), vec![(keys[0], Value::Tokens(said.ids))]))
        }
        [Key::Generate(_), ..] => generate(client, delta, keys).await,
        [Key::Classify(_), ..] => classify(client, delta, keys).await,
        [Key::Embed(_), ..] => embed(client, delta, keys).await,
        [Key::Score(_), ..] => score_all(client, delta, keys).await,
        [] => panic!("nothing is asked"),
    }
}

/// The text of an input for a head or a vector.
fn text(key: &Key) -> &'static str {
    match key {
        Key::Classify(i) | Key::Embed(i) => TEXTS[*i],
        Key::Generate(i) => PROMPTS[*i],
        Key::Score(i) => SCORED[*i].1,
    }
}

async fn generate(client: &Client, delta: &str, keys: &[Key]) -> Result<Answers, Status> {
    let prompts = keys.iter().map(|key| prompt(text(key))).collect();
    let options = Some(options(NEW));
    let request = proto::GenerateBatchRequest { delta: delta.into(), prompts, options, ..Default::default() };
    let reply = client.batch(request).await?;
    assert_eq!(reply.generations.len(), keys.len());
    let by = reply.generations[0].served_by.clone().unwrap_or_default();
    assert!(reply.generations.iter().all(|g| g.served_by.as_ref() == Some(&by)), "a batch of two versions: {reply:?}");
    let tokens = reply.generations.into_iter().map(|g| Value::Tokens(g.token_ids));
    Ok((by, keys.iter().copied().zip(tokens).collect()))
}

async fn classify(client: &Client, delta: &str, keys: &[Key]) -> Result<Answers, Status> {
    let texts: Vec<&str> = keys.iter().map(text).collect();
    let reply = client.classify(delta, &texts).await?;
    assert_eq!(reply.results.len(), keys.len());
    let by_index = |result: proto::Classification| {
        let mut labels = result.labels;
        labels.sort_by_key(|l| l.index);
        Value::Numbers(labels.iter().map(|l| l.probability).collect())
    };
    let values = reply.results.into_iter().map(by_index);
    Ok((reply.served_by.unwrap_or_default(), keys.iter().copied().zip(values).collect()))
}

async fn embed(client: &Client, delta: &str, keys: &[Key]) -> Result<Answers, Status> {
    let inputs = keys.iter().map(|key| text(key).to_owned()).collect();
    let request = proto::EmbedRequest { delta: delta.into(), inputs, normalize: Some(false), ..Default::default() };
    let reply = client.inference().embed(client.request(request)).await?.into_inner();
    assert_eq!(reply.embeddings.len(), keys.len());
    let values = reply.embeddings.into_iter().map(|e| Value::Numbers(e.values));
    Ok((reply.served_by.unwrap_or_default(), keys.iter().copied().zip(values).collect()))
}

async fn score_all(client: &Client, delta: &str, keys: &[Key]) -> Result<Answers, Status> {
    let input = |key: &Key| match key {
        Key::Score(i) => scored(SCORED[*i].0, SCORED[*i].1),
        other => scored("", text(other)),
    };
    let inputs = keys.iter().map(input).collect();
    let request = proto::ScoreRequest { delta: delta.into(), inputs, ..Default::default() };
    let reply = client.inference().score(client.request(request)).await?.into_inner();
    assert_eq!(reply.results.len(), keys.len());
    let values = reply.results.into_iter().map(|r| Value::Numbers(vec![r.log_likelihood as f32]));
    Ok((reply.served_by.unwrap_or_default(), keys.iter().copied().zip(values).collect()))
}
