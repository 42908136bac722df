//! `tenants`: the limits of the calling tenant, and its deletion.

use anyhow::bail;
use clap::{Args, Subcommand};

use super::{Common, client::Client, output};
use crate::grpc::proto;

/// Options of `tenants`.
#[derive(Debug, Clone, Args)]
pub(super) struct TenantsArgs {
    #[command(subcommand)]
    command: TenantsCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum TenantsCommand {
    /// The tenant's limits and what it uses of them.
    Quota,
    /// Delete all that a tenant has: deltas, datasets, jobs, models. It cannot be undone.
    Delete {
        /// The tenant: that of --tenant, or of the credentials.
        name: String,
        /// Do it.
        #[arg(long)]
        yes: bool,
    },
}

/// Runs a `tenants` command.
pub(super) async fn run(common: &Common, args: TenantsArgs) -> anyhow::Result<()> {
    match args.command {
        TenantsCommand::Quota => {
            let client = Client::connect(common).await?;
            let reply = client.tenants().get_quota(proto::GetQuotaRequest {}).await?.into_inner();
            if common.json { output::json(&reply) } else { print(&reply.quotas) }
        }
        TenantsCommand::Delete { name, yes } => {
            if !yes {
                bail!("this deletes all that the tenant {name:?} has and cannot be undone; say so with --yes");
            }
            let client = Client::connect(common).await?;
            let request = proto::DeleteTenantRequest { tenant: name.clone() };
            let reply = client.tenants().delete_tenant(request).await?.into_inner();
            if common.json {
                return output::json(&reply);
            }
            let proto::DeleteTenantResponse { deltas, versions, datasets, jobs, models, blobs, blobs_left } = reply;
            output::line(&format!(
                "deleted {name}: {deltas} deltas ({versions} versions), {datasets} datasets, {jobs} jobs, {models} models, \
                 {blobs} blobs"
            ))?;
            match blobs_left {
                0 => Ok(()),
                n => output::line(&format!("{n} blobs were still being read; they are removed within the hour")),
            }
        }
    }
}

fn print(quotas: &[proto::Quota]) -> anyhow::Result<()> {
    let number = |q: &proto::Quota, n: f64| {
        if q.name.ends_with("_bytes") { output::bytes(n as u64) } else { format!("{}", (n * 100.0).round() / 100.0) }
    };
    let row = |q: &proto::Quota| {
        let limit = q.limit.map_or_else(|| "-".to_owned(), |limit| number(q, limit));
        let burst = q.burst.map_or_else(String::new, |burst| burst.to_string());
        vec![q.name.clone(), number(q, q.used), limit, burst]
    };
    output::table(&["LIMIT", "USED", "MOST", "AT ONCE"], &quotas.iter().map(row).collect::<Vec<_>>())
}
