//! What the tenants' tasks come to, before and after.

use std::path::Path;

use anyhow::Context as _;
use futures::StreamExt as _;
use serde_json::Value;

use super::{TENANTS, tenant};
use crate::{
    admission::{
        Service,
        params::{ClassifyInput, ClassifyParams, GenerateChunk, GenerateParams, Prompt, Sampling, ScoreParams},
    },
    cli::{
        bench::{call::Answer, figures::Percentiles},
        output,
    },
    ids::TenantId,
};

const STORY: &str = "Once upon a time";

/// The three tasks' figures with the bare base.
pub(super) struct Before {
    perplexity: f64,
    story: String,
    card_prompt: String,
    card_answer: String,
    form: f64,
    floor: f64,
}

/// Greedy continuation.
pub(super) async fn complete(
    service: &Service,
    tenant: &TenantId,
    delta: &str,
    prompt: &str,
    tokens: u32,
) -> anyhow::Result<String> {
    let params = GenerateParams {
        delta: delta.into(),
        prompt: Prompt::Text(prompt.into()),
        max_new_tokens: tokens,
        sampling: Sampling::default(),
        stop: vec![],
        stop_tokens: vec![],
        ignore_eos: false,
        logprobs: None,
        n: 1,
        beams: None,
        speculation: None,
        priority: 0,
        constraint: None,
        timeout: None,
    };
    let mut stream = service.generate(tenant, params).await?;
    let mut out = String::new();
    while let Some(chunk) = stream.next().await {
        if let GenerateChunk::Delta { text, .. } = chunk? {
            out += &text;
        }
    }
    Ok(out)
}

fn rows(adapters: &Path, folder: &str) -> anyhow::Result<Vec<Value>> {
    let path = adapters.join("demo-data").join(folder).join("heldout.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    text.lines().filter(|l| !l.trim().is_empty()).map(|l| Ok(serde_json::from_str(l)?)).collect()
}

fn field<'a>(row: &'a Value, name: &str) -> &'a str {
    row.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// Perplexity of the held-out speeches.
async fn perplexity(service: &Service, tenant: &TenantId, delta: &str, adapters: &Path) -> anyhow::Result<f64> {
    let inputs = rows(adapters, "style")?.iter().map(|r| (String::new(), field(r, "text").to_owned())).collect();
    let reply = service.score(tenant, ScoreParams { delta: delta.into(), inputs, priority: 0, timeout: None }).await?;
    let tokens: usize = reply.results.iter().map(|r| r.tokens.len()).sum();
    let sum: f64 = reply.results.iter().map(|r| r.log_likelihood).sum();
    Ok((-sum / tokens.max(1) as f64).exp())
}

/// Shares of held-out cards in the right form, and with the right speech mark.
async fn cards(service: &Service, tenant: &TenantId, delta: &str, adapters: &Path) -> anyhow::Result<(f64, f64)> {
    let form = regex::Regex::new(r"^who: [A-Z][a-z]+ \| speech: (yes|no) \| last: [a-z]+$")?;
    let rows = rows(adapters, "cards")?;
    let (mut right_form, mut right_speech) = (0, 0);
    for row in &rows {
        let answer = complete(service, tenant, delta, field(row, "prompt"), 32).await?;
        let answer = answer.lines().next().unwrap_or_default().trim();
        right_form += usize::from(form.is_match(answer));
        let speech = |card: &str| card.split(" | ").nth(1).map(str::to_owned);
        right_speech += usize::from(speech(answer).is_some() && speech(answer) == speech(field(row, "completion")));
    }
    let n = rows.len().max(1) as f64;
    Ok((right_form as f64 / n, right_speech as f64 / n))
}

async fn accuracy(service: &Service, tenant: &TenantId, delta: &str, adapters: &Path) -> anyhow::Result<f64> {
    let rows = rows(adapters, "text-kind")?;
    let inputs = rows.iter().map(|r| ClassifyInput::text(field(r, "text"))).collect();
    let reply = service
        .classify(
            tenant,
            ClassifyParams { delta: delta.into(), inputs, truncate: false, threshold: 0.0, priority: 0, timeout: None },
        )
        .await?;
    let best = |labels: &[crate::admission::params::LabelScore]| labels.first().map(|l| l.label.clone());
    let right = reply.results.iter().zip(&rows).filter(|(c, r)| best(&c.labels).as_deref() == Some(field(r, "label")));
    Ok(right.count() as f64 / rows.len().max(1) as f64)
}

impl Before {
    pub(super) async fn measure(service: &Service, adapters: &Path) -> anyhow::Result<Self> {
        let id = tenant(TENANTS[0].name)?;
        let card_prompt = rows(adapters, "cards")?.first().map(|r| field(r, "prompt").to_owned()).unwrap_or_default();
        let kinds = rows(adapters, "text-kind")?;
        let most = kinds
            .iter()
            .map(|r| kinds.iter().filter(|o| field(o, "label") == field(r, "label")).count())
            .max()
            .unwrap_or(0);
        Ok(Self {
            perplexity: perplexity(service, &id, "", adapters).await?,
            story: complete(service, &id, "", STORY, 40).await?,
            card_answer: complete(service, &id, "", &card_prompt, 24).await?,
            card_prompt,
            form: cards(service, &id, "", adapters).await?.0,
            floor: most as f64 / kinds.len().max(1) as f64,
        })
    }

    pub(super) fn print(&self) -> anyhow::Result<()> {
        output::line(&format!("ada,  Shakespeare's style: perplexity of held-out speeches {:.1}", self.perplexity))?;
        output::line(&format!("      {STORY:?} -> {:?}", clip(&self.story)))?;
        output::line(&format!(
            "ben,  cards from sentences: {:.0} % of held-out answers in the right form",
            self.form * 100.0
        ))?;
        output::line(&format!("      {:?} -> {:?}", clip(&self.card_prompt), clip(&self.card_answer)))?;
        output::line(&format!(
            "cleo, kind of text: the base has no classifier (naming one label: {:.1} %)",
            self.floor * 100.0
        ))
    }

    pub(super) async fn compare(&self, service: &Service, adapters: &Path) -> anyhow::Result<()> {
        let [ada, ben, cleo] = &TENANTS;
        let id = tenant(ada.name)?;
        let after = perplexity(service, &id, ada.delta, adapters).await?;
        let change = (after / self.perplexity - 1.0) * 100.0;
        output::line(&format!("ada:  perplexity {:.1} -> {after:.1} ({change:+.0} %)", self.perplexity))?;
        let story = complete(service, &id, ada.delta, STORY, 40).await?;
        output::line(&format!("      {STORY:?} -> {:?}", clip(&story)))?;
        let id = tenant(ben.name)?;
        let (form, speech) = cards(service, &id, ben.delta, adapters).await?;
        output::line(&format!(
            "ben:  right form {:.0} % -> {:.0} %; right about speech {:.0} %",
            self.form * 100.0,
            form * 100.0,
            speech * 100.0
        ))?;
        let card = complete(service, &id, ben.delta, &self.card_prompt, 24).await?;
        output::line(&format!("      {:?} -> {:?}", clip(&self.card_prompt), clip(&card)))?;
        let id = tenant(cleo.name)?;
        let right = accuracy(service, &id, cleo.delta, adapters).await?;
        output::line(&format!(
            "cleo: accuracy on held-out sentences {:.1} % -> {:.1} %",
            self.floor * 100.0,
            right * 100.0
        ))?;
        let stranger = service.get_delta(&tenant(ada.name)?, cleo.delta).await;
        let answer = stranger.err().map(|e| e.to_string()).unwrap_or_default();
        output::line(&format!("ada asks for cleo's delta: {answer}"))
    }
}

fn clip(text: &str) -> String {
    text.chars().take(110).collect()
}

/// Latency of live traffic without and with training.
pub(super) fn latency(quiet: &[Answer], busy: &[Answer]) -> anyhow::Result<()> {
    let row = |name: &str, answers: &[Answer]| {
        let good = || answers.iter().filter(|a| a.failure.is_none()).map(|a| &a.chunks);
        let first = Percentiles::of(good().filter_map(|c| c.first()).map(|seconds| seconds as f32));
        let gaps = Percentiles::of(good().flat_map(|c| c.between_tokens()));
        let failed = answers.len() - good().count();
        let ms = |p: Option<f64>| p.map_or_else(|| "-".to_owned(), |v| format!("{v:.1}"));
        vec![
            name.to_owned(),
            answers.len().to_string(),
            failed.to_string(),
            ms(first.map(|p| p.p50)),
            ms(first.map(|p| p.p99)),
            ms(gaps.map(|p| p.p50)),
            ms(gaps.map(|p| p.p99)),
        ]
    };
    output::table(
        &["LIVE TRAFFIC", "REQUESTS", "FAILED", "TTFT P50 MS", "TTFT P99", "ITL P50 MS", "ITL P99"],
        &[row("without training", quiet), row("during training", busy)],
    )
}
