//! Which deltas requests may name: references and patterns, looked up at the server for each tenant.

use anyhow::{Context as _, bail};
use regex::Regex;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};

use super::workload::Op;
use crate::{
    cli::{client::Client, deltas},
    grpc::proto,
};

/// A delta that requests name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Target {
    pub(super) tenant: String,
    /// As requests name it.
    pub(super) delta: String,
    /// Its methods, joined with `+`.
    pub(super) kind: String,
    /// What it is for, in small letters: `causal_lm`, `seq_cls`, ...
    pub(super) task: String,
    /// Numbers in its tensors.
    pub(super) parameters: u64,
}

impl Target {
    fn new(tenant: &str, reference: &str, delta: &proto::Delta) -> Self {
        Self {
            tenant: tenant.to_owned(),
            delta: reference.to_owned(),
            kind: delta.methods.join("+"),
            task: delta.task().as_str_name().trim_start_matches("TASK_").to_ascii_lowercase(),
            parameters: delta.parameters,
        }
    }

    /// Whether the server would do this with it: classifiers classify, the others generate and score, all embed.
    pub(super) fn can(&self, op: Op) -> bool {
        let classifies = matches!(self.task.as_str(), "seq_cls" | "token_cls");
        match op {
            Op::Generate | Op::Score => !classifies,
            Op::Classify => classifies,
            Op::Embed => true,
        }
    }
}

/// The deltas that these references and patterns name, in this order (those of a pattern by name, of a reference by tenant),
/// each once.
///
/// # Errors
/// A reference that no tenant has; a pattern that fits nothing; a reference to a delta that can do none of `ops`; failed calls.
pub(super) async fn resolve(
    tenants: &[(String, Client)],
    wanted: &[String],
    ops: &[Op],
) -> anyhow::Result<Vec<Target>> {
    let mut targets: Vec<Target> = Vec::new();
    for wanted in wanted.iter().map(|w| w.trim()) {
        let pattern = wanted.contains('*');
        let mut found = Vec::new();
        for (tenant, client) in tenants {
            if pattern {
                let matches = matcher(wanted)?;
                let prefix = wanted.split('*').next().unwrap_or_default();
                let listed = deltas::list(client, prefix).await?;
                let fitting = listed.iter().filter(|d| matches.is_match(&d.name));
                found.extend(fitting.map(|d| Target::new(tenant, &d.name, d)));
            } else if let Some(delta) = get(client, wanted).await? {
                found.push(Target::new(tenant, wanted, &delta));
            }
        }
        let whose = tenants.iter().map(|(tenant, _)| tenant.as_str()).collect::<Vec<_>>().join(", ");
        if found.is_empty() {
            bail!("--deltas: no delta of {whose} {} {wanted:?}", if pattern { "fits" } else { "is" });
        }
        if let Some(useless) = found.iter().find(|t| !pattern && !ops.iter().any(|op| t.can(*op))) {
            let ops: Vec<&str> = ops.iter().map(|op| op.name()).collect();
            bail!("--deltas: {wanted:?} is for {}, which none of --op {} uses", useless.task, ops.join(","));
        }
        let usable = found.into_iter().filter(|t| ops.iter().any(|op| t.can(*op)));
        for target in usable {
            if !targets.iter().any(|t| (&t.tenant, &t.delta) == (&target.tenant, &target.delta)) {
                targets.push(target);
            }
        }
    }
    Ok(targets)
}

/// A delta, or nothing if the tenant has none of this name.
async fn get(client: &Client, reference: &str) -> anyhow::Result<Option<proto::Delta>> {
    let request = proto::GetDeltaRequest { delta: reference.to_owned() };
    match client.deltas().get_delta(request).await {
        Ok(reply) => Ok(Some(reply.into_inner().delta.context("a reply without a delta")?)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(refused(reference, status)),
    }
}

/// The server's refusal with what it was about; what a status says by itself is kept.
fn refused(reference: &str, status: Status) -> anyhow::Error {
    anyhow::Error::from(status).context(format!("--deltas {reference}"))
}

/// `*` stands for any characters.
fn matcher(pattern: &str) -> anyhow::Result<Regex> {
    let parts: Vec<String> = pattern.split('*').map(regex::escape).collect();
    Regex::new(&format!("^{}$", parts.join(".*"))).context("--deltas")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stand_for_whole_names() {
        let fits = |pattern: &str, name: &str| matcher(pattern).expect("a pattern").is_match(name);
        assert!(fits("*", "anything") && fits("a*", "a") && fits("a*c", "abbc") && fits("*.v1", "x.v1"));
        assert!(!fits("a*c", "abbcd") && !fits("*.v1", "xxv1") && !fits("b*", "ab"));
    }

    #[test]
    fn deltas_do_what_the_server_lets_them_do() {
        let target = |task: proto::Task| {
            let delta =
                proto::Delta { task: task.into(), methods: vec!["lora".into(), "head".into()], ..Default::default() };
            Target::new("me", "x@2", &delta)
        };
        let can = |task| [Op::Generate, Op::Classify, Op::Embed, Op::Score].map(|op| target(task).can(op));
        assert_eq!(can(proto::Task::CausalLm), [true, false, true, true]);
        assert_eq!(can(proto::Task::Seq2seq), [true, false, true, true]);
        assert_eq!(can(proto::Task::SeqCls), [false, true, true, false]);
        assert_eq!(can(proto::Task::TokenCls), [false, true, true, false]);
        let t = target(proto::Task::SeqCls);
        assert_eq!((t.kind.as_str(), t.task.as_str(), t.delta.as_str()), ("lora+head", "seq_cls", "x@2"));
    }
}
