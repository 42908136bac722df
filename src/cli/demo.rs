//! `demo`: a server in this process, three tenants, and what they see.

/// Options of `demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArgs {}

/// Runs the demo.
pub(super) async fn run(_args: DemoArgs) -> anyhow::Result<()> {
    anyhow::bail!("not wired")
}
