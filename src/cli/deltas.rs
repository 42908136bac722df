//! `deltas`: list, get, upload, merge, download, delete, pin, promote.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use bytes::BytesMut;
use clap::{Args, Subcommand};

use super::{Common, client::Client, output};
use crate::{grpc::proto, interop};

const CHUNK: usize = 256 * 1024;

/// Options of `deltas`.
#[derive(Debug, Clone, Args)]
pub(super) struct DeltasArgs {
    #[command(subcommand)]
    command: DeltasCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum DeltasCommand {
    /// All names with their current versions.
    List {
        /// Only names that begin with this.
        #[arg(long, default_value = "")]
        prefix: String,
    },
    /// One delta and its versions.
    Get {
        /// name, name@3 or name@DIGEST.
        delta: String,
    },
    /// Publish the files of a PEFT or AdapterHub folder, or of a combination.
    Upload(UploadArgs),
    /// Write a folder whose weights are pickles (.bin) as safetensors; needs no server. Nothing in a pickle is run.
    Convert {
        /// The folder to read.
        source: PathBuf,
        /// The folder to write; made if missing.
        target: PathBuf,
    },
    /// Publish a weighted merge of LoRA deltas.
    Merge(super::merge::MergeArgs),
    /// Write a version's files into a folder.
    Download {
        /// name, name@3 or name@DIGEST.
        delta: String,
        /// The folder; made if missing.
        folder: PathBuf,
        /// In a form that PEFT loads: BitFit as LORA with bias="all". Other methods have one or are refused.
        #[arg(long)]
        peft: bool,
    },
    /// Remove a name with all its versions.
    Delete {
        /// The name.
        name: String,
        /// Only if this digest is current.
        #[arg(long)]
        expected_id: Option<String>,
    },
    /// Keep a delta in memory, or stop doing so.
    Pin {
        /// The name.
        name: String,
        /// Stop doing so.
        #[arg(long)]
        off: bool,
    },
    /// Point a name at one of its versions.
    Promote {
        /// The name.
        name: String,
        /// Number or digest of the version.
        version: String,
        /// Only if this digest is current.
        #[arg(long)]
        expected_id: Option<String>,
    },
}

#[derive(Debug, Clone, Args)]
struct UploadArgs {
    /// Name to publish under.
    name: String,
    /// Folder with adapter_config.json and adapter_model.safetensors (PEFT) or adapter.safetensors (AdapterHub), or with
    /// delta.json and its parts' files (PART.adapter_config.json ...) or folders. Other files in it are not sent.
    folder: PathBuf,
    #[command(flatten)]
    publish: PublishArgs,
    /// Label names in index order, separated by commas.
    #[arg(long, value_delimiter = ',')]
    labels: Vec<String>,
}

/// What a publish may do to an existing name.
#[derive(Debug, Clone, Args)]
pub(super) struct PublishArgs {
    /// The name must be new.
    #[arg(long, conflicts_with = "expected_id")]
    create: bool,
    /// Replace exactly this version.
    #[arg(long, value_name = "DIGEST")]
    expected_id: Option<String>,
}

impl PublishArgs {
    pub(super) fn policy(&self) -> proto::PublishPolicy {
        let mode = match (self.create, &self.expected_id) {
            (true, _) => proto::PublishMode::Create,
            (false, Some(_)) => proto::PublishMode::CompareAndSwap,
            (false, None) => proto::PublishMode::Upsert,
        };
        proto::PublishPolicy { mode: mode.into(), expected_id: self.expected_id.clone().unwrap_or_default() }
    }
}

/// Runs a `deltas` command.
pub(super) async fn run(common: &Common, args: DeltasArgs) -> anyhow::Result<()> {
    if let DeltasCommand::Convert { source, target } = &args.command {
        return convert(common, source, target);
    }
    let client = Client::connect(common).await?;
    let mut deltas = client.deltas();
    match args.command {
        DeltasCommand::List { prefix } => print(common, &list(&client, &prefix).await?),
        DeltasCommand::Get { delta } => {
            let reply = deltas.get_delta(proto::GetDeltaRequest { delta }).await?.into_inner();
            if common.json { output::json(&reply) } else { print(common, &reply.versions) }
        }
        DeltasCommand::Upload(args) => {
            let reply = deltas.upload(futures::stream::iter(upload(&args)?)).await?.into_inner();
            print(common, reply.delta.as_slice())
        }
        DeltasCommand::Merge(args) => {
            let reply = deltas.merge_deltas(args.request()).await?.into_inner();
            print(common, reply.delta.as_slice())
        }
        DeltasCommand::Convert { .. } => Ok(()), // done above, without a server
        DeltasCommand::Download { delta, folder, peft } => {
            let form = if peft { proto::DeltaForm::Peft } else { proto::DeltaForm::Unspecified };
            let request = proto::DownloadRequest { delta, form: form.into() };
            download(common, &client, request, &folder).await
        }
        DeltasCommand::Delete { name, expected_id } => {
            deltas.delete_delta(proto::DeleteDeltaRequest { name: name.clone(), expected_id }).await?;
            if common.json { output::json(&serde_json::json!({ "deleted": name })) } else { Ok(()) }
        }
        DeltasCommand::Pin { name, off } => {
            let reply = deltas.pin_delta(proto::PinDeltaRequest { name, pinned: !off }).await?.into_inner();
            print(common, reply.delta.as_slice())
        }
        DeltasCommand::Promote { name, version, expected_id } => {
            let request = proto::SetAliasRequest { name, version, expected_id };
            print(common, deltas.set_alias(request).await?.into_inner().delta.as_slice())
        }
    }
}

/// All pages.
pub(super) async fn list(client: &Client, prefix: &str) -> anyhow::Result<Vec<proto::Delta>> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = proto::ListDeltasRequest { page_size: 0, page_token, name_prefix: prefix.to_owned() };
        let page = client.deltas().list_deltas(request).await?.into_inner();
        all.extend(page.deltas);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

pub(super) fn print(common: &Common, deltas: &[proto::Delta]) -> anyhow::Result<()> {
    if common.json {
        return deltas.iter().try_for_each(output::json);
    }
    let row = |d: &proto::Delta| {
        let marks = [("current", d.current), ("pinned", d.current && d.pinned), ("corrupt", d.corrupt)];
        let mark = marks.iter().filter(|(_, is)| *is).map(|(mark, _)| *mark).collect::<Vec<_>>().join(" ");
        let resident = if d.resident_bytes > 0 { output::bytes(d.resident_bytes) } else { "-".to_owned() };
        vec![
            format!("{}@{}", d.name, d.number),
            output::short(&d.id),
            d.methods.join("+"),
            d.task().as_str_name().trim_start_matches("TASK_").to_ascii_lowercase(),
            d.parameters.to_string(),
            resident,
            d.leases.to_string(),
            mark,
            output::ago(d.created_ms),
        ]
    };
    let headings = ["DELTA", "ID", "METHODS", "TASK", "PARAMETERS", "RESIDENT", "IN USE", "STATE", "PUBLISHED"];
    output::table(&headings, &deltas.iter().map(row).collect::<Vec<_>>())
}

fn convert(common: &Common, source: &Path, target: &Path) -> anyhow::Result<()> {
    let files = interop::convert(source)?;
    fs::create_dir_all(target).with_context(|| format!("make {}", target.display()))?;
    for (name, data) in &files.files {
        fs::write(target.join(name), data).with_context(|| format!("write {name}"))?;
    }
    let names: Vec<&String> = files.files.keys().collect();
    if common.json {
        return output::json(&serde_json::json!({ "folder": target, "files": names }));
    }
    names.iter().try_for_each(|name| output::line(name))
}

fn upload(args: &UploadArgs) -> anyhow::Result<Vec<proto::UploadRequest>> {
    use proto::upload_request::Message;
    let mut messages = vec![Message::Header(proto::UploadHeader {
        name: args.name.clone(),
        policy: Some(args.publish.policy()),
        labels: args.labels.clone(),
    })];
    for (name, data) in interop::read_folder(&args.folder)?.files {
        for i in 0..data.len().div_ceil(CHUNK).max(1) {
            let piece = data.slice(i * CHUNK..data.len().min((i + 1) * CHUNK));
            messages.push(Message::Chunk(proto::FileChunk { file: name.clone(), data: piece }));
        }
    }
    Ok(messages.into_iter().map(|m| proto::UploadRequest { message: Some(m) }).collect())
}

async fn download(
    common: &Common,
    client: &Client,
    request: proto::DownloadRequest,
    folder: &Path,
) -> anyhow::Result<()> {
    use proto::download_response::Message;
    let mut stream = client.deltas().download(request).await?.into_inner();
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let mut version = None;
    let mut current: Option<(String, BytesMut)> = None;
    let mut done = Vec::new();
    while let Some(response) = stream.message().await? {
        match response.message {
            Some(Message::Delta(delta)) => version = Some(delta),
            Some(Message::Chunk(chunk)) => match &mut current {
                Some((name, data)) if *name == chunk.file => data.extend_from_slice(&chunk.data),
                _ => done.extend(current.replace((chunk.file, BytesMut::from(&chunk.data[..])))),
            },
            None => {}
        }
    }
    // Written when all of it is here, so that a broken download leaves no half folder.
    for (name, data) in done.into_iter().chain(current) {
        crate::ids::check_name(&name).with_context(|| format!("the server sent a file named {name:?}"))?;
        fs::write(folder.join(&name), &data).with_context(|| format!("write {name}"))?;
    }
    print(common, version.as_slice())
}
