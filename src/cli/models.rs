//! `jobs download`: a whole model to a folder. Files go to disk as they come: a model may be larger than memory.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
};

use anyhow::{Context as _, bail};

use super::{Common, client::Client, output};
use crate::grpc::proto;

/// Ending of a file that is not whole yet.
const PART: &str = "part";

/// Writes the model's files. A file gets its name when it is whole.
pub(super) async fn download(common: &Common, client: &Client, id: String, folder: &Path) -> anyhow::Result<()> {
    use proto::download_model_response::Message;
    let mut stream = client.training().download_model(proto::DownloadModelRequest { id }).await?.into_inner();
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let mut model = None;
    let mut current: Option<(String, File)> = None;
    while let Some(response) = stream.message().await? {
        match response.message {
            Some(Message::Model(m)) => model = Some(m),
            Some(Message::Chunk(chunk)) => {
                if current.as_ref().is_none_or(|(name, _)| *name != chunk.file) {
                    finish(folder, current.take())?;
                    current = Some(begin(folder, chunk.file)?);
                }
                if let Some((name, file)) = &mut current {
                    file.write_all(&chunk.data).with_context(|| format!("write {name}"))?;
                }
            }
            None => {}
        }
    }
    finish(folder, current)?;
    let Some(model) = model else { bail!("the server sent no model") };
    if common.json {
        return output::json(&model);
    }
    output::line(&format!("{} ({}), fingerprint {}", folder.display(), output::bytes(model.bytes), model.fingerprint))
}

fn begin(folder: &Path, name: String) -> anyhow::Result<(String, File)> {
    crate::ids::check_name(&name).with_context(|| format!("the server sent a file named {name:?}"))?;
    let path = folder.join(format!("{name}.{PART}"));
    let file = File::create(&path).with_context(|| format!("write {}", path.display()))?;
    Ok((name, file))
}

fn finish(folder: &Path, done: Option<(String, File)>) -> anyhow::Result<()> {
    let Some((name, file)) = done else { return Ok(()) };
    file.sync_all().with_context(|| format!("write {name}"))?;
    fs::rename(folder.join(format!("{name}.{PART}")), folder.join(&name)).with_context(|| format!("write {name}"))
}
