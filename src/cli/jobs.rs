//! `jobs` and `datasets`.

use clap::{Args, Subcommand, ValueEnum};

use super::{
    Common,
    client::Client,
    deltas::{self, PublishArgs},
    output, train,
};
use crate::grpc::proto;

/// Options of `jobs`.
#[derive(Debug, Clone, Args)]
pub(super) struct JobsArgs {
    #[command(subcommand)]
    command: JobsCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum JobsCommand {
    /// All jobs, newest first.
    List {
        /// Only jobs in this state.
        #[arg(long)]
        state: Option<StateArg>,
    },
    /// One job.
    Get {
        /// The job's id.
        id: String,
        /// Its examples with the highest loss, in place of the job.
        #[arg(long)]
        worst: bool,
    },
    /// Follow a job's events to its end.
    Watch {
        /// The job's id.
        id: String,
        /// First event wanted.
        #[arg(long, default_value_t = 0)]
        from: u64,
    },
    /// Fetch the model that full fine-tuning made into a folder, which `serve --base` takes.
    Download {
        /// The job's id.
        id: String,
        /// The folder; made if it is not there.
        folder: std::path::PathBuf,
    },
    /// Remove the model that full fine-tuning made; the job's record stays.
    DeleteModel {
        /// The job's id.
        id: String,
    },
    /// Stop a job until `jobs resume`; nothing of it is lost.
    Pause {
        /// The job's id.
        id: String,
    },
    /// Let a paused job go on.
    Resume {
        /// The job's id.
        id: String,
    },
    /// Publish what a job has come to, while it goes on: its last stored checkpoint, or one that it keeps of another step.
    Publish {
        /// The job's id.
        id: String,
        /// The name to publish it under.
        name: String,
        /// The checkpoint of this step: of a job that was trained with --keep-best, one of its next best evaluations.
        #[arg(long, value_name = "N")]
        step: Option<u32>,
        #[command(flatten)]
        publish: PublishArgs,
    },
    /// Ask a job to end.
    Cancel {
        /// The job's id.
        id: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StateArg {
    Queued,
    Running,
    Publishing,
    Succeeded,
    Failed,
    Cancelled,
    Interrupted,
    Paused,
}

impl StateArg {
    fn wire(self) -> proto::JobState {
        match self {
            Self::Queued => proto::JobState::Queued,
            Self::Running => proto::JobState::Running,
            Self::Publishing => proto::JobState::Publishing,
            Self::Succeeded => proto::JobState::Succeeded,
            Self::Failed => proto::JobState::Failed,
            Self::Cancelled => proto::JobState::Cancelled,
            Self::Interrupted => proto::JobState::Interrupted,
            Self::Paused => proto::JobState::Paused,
        }
    }
}

/// Runs a `jobs` command.
pub(super) async fn jobs(common: &Common, args: JobsArgs) -> anyhow::Result<()> {
    let client = Client::connect(common).await?;
    let mut training = client.training();
    match args.command {
        JobsCommand::List { state } => {
            let state = state.map_or(0, |s| s.wire().into());
            let mut all = Vec::new();
            let mut page_token = String::new();
            loop {
                let request = proto::ListJobsRequest { page_size: 0, page_token, state };
                let page = training.list_jobs(request).await?.into_inner();
                all.extend(page.jobs);
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            print_jobs(common, &all)
        }
        JobsCommand::Get { id, worst: true } => train::worst::print(common, &client, &id).await,
        JobsCommand::Get { id, worst: false } => {
            print_jobs(common, training.get_job(proto::GetJobRequest { id }).await?.into_inner().job.as_slice())
        }
        JobsCommand::Watch { id, from } => train::watch(common, &client, &id, from).await,
        JobsCommand::Download { id, folder } => super::models::download(common, &client, id, &folder).await,
        JobsCommand::DeleteModel { id } => {
            training.delete_model(proto::DeleteModelRequest { id: id.clone() }).await?;
            if common.json { output::json(&serde_json::json!({ "deleted": id })) } else { Ok(()) }
        }
        JobsCommand::Pause { id } => {
            let reply = training.pause_job(proto::PauseJobRequest { id }).await?.into_inner();
            print_jobs(common, reply.job.as_slice())
        }
        JobsCommand::Resume { id } => {
            let reply = training.resume_job(proto::ResumeJobRequest { id }).await?.into_inner();
            print_jobs(common, reply.job.as_slice())
        }
        JobsCommand::Publish { id, name, step, publish } => {
            let request = proto::PublishCheckpointRequest { id, name, policy: Some(publish.policy()), step };
            let reply = training.publish_checkpoint(request).await?.into_inner();
            deltas::print(common, reply.delta.as_slice())
        }
        JobsCommand::Cancel { id } => {
            let reply = training.cancel_job(proto::CancelJobRequest { id }).await?.into_inner();
            print_jobs(common, reply.job.as_slice())
        }
    }
}

/// A state's name.
pub(super) fn state_name(state: proto::JobState) -> String {
    state.as_str_name().trim_start_matches("JOB_STATE_").to_ascii_lowercase()
}

fn print_jobs(common: &Common, jobs: &[proto::Job]) -> anyhow::Result<()> {
    if common.json {
        return jobs.iter().try_for_each(output::json);
    }
    let row = |job: &proto::Job| {
        let total = job.resolved.as_ref().map_or(0, |r| r.total_steps);
        let outcome = match (&job.result, &job.failure) {
            (Some(proto::JobResult { model: Some(m), final_loss, .. }), _) => {
                format!("{} ({}), loss {final_loss:.4}", m.path, output::bytes(m.bytes))
            }
            (Some(r), _) => format!("{}@{}, loss {:.4}", r.name, r.number, r.final_loss),
            (None, Some(f)) => format!("{}: {}", f.code, f.message),
            (None, None) => String::new(),
        };
        vec![
            job.id.clone(),
            job.output_name.clone(),
            state_name(job.state()),
            format!("{}/{total}", job.step),
            output::ago(job.created_ms),
            outcome,
        ]
    };
    output::table(&["JOB", "DELTA", "STATE", "STEP", "CREATED", "OUTCOME"], &jobs.iter().map(row).collect::<Vec<_>>())
}

/// Options of `datasets`.
#[derive(Debug, Clone, Args)]
pub(super) struct DatasetsArgs {
    #[command(subcommand)]
    command: DatasetsCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum DatasetsCommand {
    /// All datasets, newest first.
    List,
    /// Remove a dataset.
    Delete {
        /// The dataset's id.
        id: String,
    },
}

/// Runs a `datasets` command.
pub(super) async fn datasets(common: &Common, args: DatasetsArgs) -> anyhow::Result<()> {
    let mut training = Client::connect(common).await?.training();
    match args.command {
        DatasetsCommand::List => {
            let mut all = Vec::new();
            let mut page_token = String::new();
            loop {
                let request = proto::ListDatasetsRequest { page_size: 0, page_token };
                let page = training.list_datasets(request).await?.into_inner();
                all.extend(page.datasets);
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            print_datasets(common, &all)
        }
        DatasetsCommand::Delete { id } => {
            training.delete_dataset(proto::DeleteDatasetRequest { id: id.clone() }).await?;
            if common.json { output::json(&serde_json::json!({ "deleted": id })) } else { Ok(()) }
        }
    }
}

fn print_datasets(common: &Common, datasets: &[proto::Dataset]) -> anyhow::Result<()> {
    if common.json {
        return datasets.iter().try_for_each(output::json);
    }
    let row = |d: &proto::Dataset| {
        let size = output::bytes(d.bytes);
        vec![d.id.clone(), d.name.clone(), d.format.clone(), d.rows.to_string(), size, output::ago(d.created_ms)]
    };
    let rows: Vec<_> = datasets.iter().map(row).collect();
    output::table(&["DATASET", "NAME", "FORMAT", "ROWS", "SIZE", "STORED"], &rows)
}
