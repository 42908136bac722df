//! The command line: `serve` and `demo` run a server, everything else is a client that speaks gRPC to one.
//!
//! Answers go to standard output, notes and progress to standard error. `--json` prints one JSON value per line.

mod backup;
mod bench;
mod chart;
mod classify;
mod client;
mod credentials;
mod deltas;
mod demo;
mod files;
mod generate;
mod infer;
mod jobs;
mod keys;
mod merge;
mod models;
mod output;
mod study;
mod tenants;
mod train;
mod train_positions;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::{Config, ServeArgs};

pub use client::describe;
pub use demo::DemoArgs;
pub use study::StudyArgs;

/// One frozen base model, many tenants' deltas: an inference server that hot-swaps, batches and trains deltas.
#[derive(Debug, Parser)]
#[command(name = "deltaserve", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Options of all client commands.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// Address of the server.
    #[arg(long, global = true, env = "DELTASERVE_SERVER", default_value = "http://127.0.0.1:50051")]
    pub(crate) server: String,
    /// Who is calling; default the tenant of the credentials, or `default` where the server asks for none.
    #[arg(long, global = true, env = "DELTASERVE_TENANT")]
    pub(crate) tenant: Option<String>,
    /// Give up after this many seconds.
    #[arg(long, global = true, value_name = "S")]
    pub(crate) timeout: Option<f64>,
    /// Print JSON, one value per line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) credentials: credentials::Credentials,
}

impl Common {
    /// A server that asks for no credentials, and who calls it.
    pub(crate) fn plain(server: String, tenant: &str, json: bool) -> Self {
        let credentials = credentials::Credentials::default();
        Self { server, tenant: Some(tenant.to_owned()), timeout: None, json, credentials }
    }
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value in a process's life, parsed at its start")]
enum Command {
    /// Run a server.
    Serve(Box<ServeArgs>),
    /// Run a server on the bundled base with three tenants, and show what it does.
    Demo(DemoArgs),
    /// Compare methods on tasks and bases of a plan, and write a report.
    Study(StudyArgs),
    /// Make API keys for a server's file of keys.
    Keys(keys::KeysArgs),
    /// Write all that is stored into a folder, also while a server runs.
    Backup(backup::BackupArgs),
    /// Put a backup into an empty place, verified.
    Restore(backup::RestoreArgs),
    #[command(flatten)]
    Client(ClientCommand),
    /// Print a completion script, e.g. `deltaserve completions bash > /etc/bash_completion.d/deltaserve`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum ClientCommand {
    /// Continue a prompt, or the rows of a JSON Lines file.
    Generate(Box<WithCommon<generate::GenerateArgs>>),
    /// Label texts, or the rows of a JSON Lines file.
    Classify(WithCommon<classify::ClassifyArgs>),
    /// Turn texts into vectors.
    Embed(WithCommon<infer::EmbedArgs>),
    /// Log-likelihood of a text after a prompt.
    Score(WithCommon<infer::ScoreArgs>),
    /// Train a delta: upload the data, create the job, watch it.
    Train(Box<WithCommon<train::TrainArgs>>),
    /// List and manage deltas.
    Deltas(WithCommon<deltas::DeltasArgs>),
    /// List and manage training jobs.
    Jobs(WithCommon<jobs::JobsArgs>),
    /// List and remove datasets.
    Datasets(WithCommon<jobs::DatasetsArgs>),
    /// Limits of a tenant, and its deletion.
    Tenants(WithCommon<tenants::TenantsArgs>),
    /// What the server is and does.
    Info(WithCommon<NoArgs>),
    /// Put load on a server, measure and report. Several tenants: --tenant a,b.
    Bench(Box<WithCommon<bench::BenchArgs>>),
}

/// A command's own options, with those of all client commands.
#[derive(Debug, Clone, Args)]
struct WithCommon<A: Args> {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    args: A,
}

#[derive(Debug, Clone, Args)]
struct NoArgs {}

impl Cli {
    /// The number of threads that the command line asks for.
    pub fn threads(&self) -> Option<usize> {
        match &self.command {
            Command::Serve(args) => args.threads,
            _ => None,
        }
    }

    /// Does what was asked for.
    ///
    /// # Errors
    /// What [`describe`] prints.
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(args) => crate::app::serve(Config::try_from(*args)?).await,
            Command::Demo(args) => demo::run(args).await,
            Command::Study(args) => study::run(args).await,
            Command::Keys(args) => keys::run(args),
            Command::Backup(args) => backup::backup(args).await,
            Command::Restore(args) => backup::restore(args).await,
            Command::Client(command) => command.run().await,
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Self::command(), "deltaserve", &mut std::io::stdout());
                Ok(())
            }
        }
    }
}

impl ClientCommand {
    async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Generate(c) => generate::generate(&c.common, c.args).await,
            Self::Classify(c) => classify::classify(&c.common, c.args).await,
            Self::Embed(c) => infer::embed(&c.common, c.args).await,
            Self::Score(c) => infer::score(&c.common, c.args).await,
            Self::Train(c) => train::run(&c.common, c.args).await,
            Self::Deltas(c) => deltas::run(&c.common, c.args).await,
            Self::Jobs(c) => jobs::jobs(&c.common, c.args).await,
            Self::Datasets(c) => jobs::datasets(&c.common, c.args).await,
            Self::Tenants(c) => tenants::run(&c.common, c.args).await,
            Self::Info(c) => infer::info(&c.common).await,
            Self::Bench(c) => bench::run(&c.common, c.args).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn common_options_stand_before_or_after_a_nested_command() {
        for line in [["x", "deltas", "--json", "list"], ["x", "deltas", "list", "--json"]] {
            let cli = Cli::try_parse_from(line).expect("parses");
            assert!(matches!(cli.command, Command::Client(ClientCommand::Deltas(c)) if c.common.json));
        }
    }
}
