//! `backup` and `restore`: all that is stored, into a folder and back. They work on the store itself, not through a server.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;

use super::output::note;
use crate::{
    config::{ConfigError, places},
    store::{self, Places},
};

/// Where the store is; as of `serve`.
#[derive(Debug, Clone, Args)]
struct PlaceArgs {
    /// The data directory.
    #[arg(long, env = "DELTASERVE_DATA_DIR", value_name = "DIR", default_value = "deltaserve-data")]
    data_dir: PathBuf,
    /// The database; unset = SQLite in the data directory.
    #[arg(long, env = "DELTASERVE_DATABASE", value_name = "URL", hide_env_values = true)]
    database: Option<String>,
    /// The blobs; unset = a folder of the data directory.
    #[arg(long, env = "DELTASERVE_BLOBS", value_name = "URL")]
    blobs: Option<String>,
}

impl PlaceArgs {
    fn places(&self) -> Result<Places, ConfigError> {
        let mut problems = Vec::new();
        let places = places(&self.data_dir, self.database.as_deref(), self.blobs.as_deref(), &mut problems);
        if problems.is_empty() { Ok(places) } else { Err(ConfigError(problems)) }
    }
}

/// Flags of `backup`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BackupArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// A new or empty folder.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Flags of `restore`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The folder of a backup.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
}

/// Writes a backup; an error also where something that is stored was damaged already, which is then said.
pub(crate) async fn backup(args: BackupArgs) -> anyhow::Result<()> {
    let made = store::backup(&args.place.places()?, &args.out).await?;
    let (versions, jobs) = (made.rows.get("versions").copied(), made.rows.get("jobs").copied());
    note(&format!(
        "backup: {} versions, {} jobs, {} blobs of {} bytes in {}",
        versions.unwrap_or_default(),
        jobs.unwrap_or_default(),
        made.blobs,
        made.bytes,
        args.out.display()
    ));
    if !made.corrupt.is_empty() {
        for (blob, why) in &made.corrupt {
            note(&format!("damaged in the store already: {blob}: {why}"));
        }
        bail!("the backup is whole but for {} blobs, which were damaged in the store already", made.corrupt.len());
    }
    Ok(())
}

/// Restores a backup.
pub(crate) async fn restore(args: RestoreArgs) -> anyhow::Result<()> {
    let backup = store::restore(&args.place.places()?, &args.from).await?.backup;
    note(&format!("restored and verified: {} blobs of {} bytes", backup.blobs, backup.bytes));
    if !backup.corrupt.is_empty() {
        note(&format!(
            "{} blobs were damaged when the backup was made: their deltas are corrupt",
            backup.corrupt.len()
        ));
    }
    Ok(())
}
