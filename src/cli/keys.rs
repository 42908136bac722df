//! `keys`: API keys of a server, made where its file of keys is. No server is asked.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use clap::{Args, Subcommand};
use serde_json::json;

use super::output;
use crate::access::{KeyEntry, with_entry};

/// Options of `keys`.
#[derive(Debug, Clone, Args)]
pub(super) struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum KeysCommand {
    /// Make a key. It is printed once; the server gets an entry with its SHA-256.
    New(NewArgs),
}

#[derive(Debug, Clone, Args)]
struct NewArgs {
    /// Whose key it is; `*` = any tenant's that a call names, with the permission admin.
    #[arg(long)]
    tenant: String,
    /// What it may be used for: infer, train, manage, admin. None implies another.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', required = true)]
    permission: Vec<String>,
    /// Its name in logs and in the file; default one after the tenant.
    #[arg(long)]
    id: Option<String>,
    /// Days until it is refused; unset = never.
    #[arg(long, value_name = "N")]
    expires_days: Option<u32>,
    /// Add the entry to this file, which `serve --api-keys` reads, at once; unset = print it.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Does what was asked for.
///
/// # Errors
/// Options that make no entry; a file that cannot be read, used or written.
pub(super) fn run(args: KeysArgs) -> anyhow::Result<()> {
    let KeysCommand::New(args) = args.command;
    let owner = if args.tenant == "*" { "all" } else { args.tenant.as_str() };
    let id = args.id.unwrap_or_else(|| format!("{owner}-{:08x}", rand::random::<u32>()));
    let made = KeyEntry::generate(&id, &args.tenant, &args.permission, args.expires_days);
    let (key, entry) = made.map_err(|why| anyhow!("--{}", why.replacen("permissions:", "permission:", 1)))?;
    if let Some(path) = &args.file {
        append(path, &entry).with_context(|| format!("--file {}", path.display()))?;
        output::note(&format!("added {id:?} to {}; the key is shown only now:", path.display()));
    }
    if args.json {
        return output::json(&json!({"key": key, "entry": entry}));
    }
    output::line(&key)?;
    if args.file.is_none() {
        output::note("the key is shown only now; the entry for the file of `serve --api-keys`, a JSON array of such:");
        output::line(&serde_json::to_string_pretty(&entry)?)?;
    }
    Ok(())
}

/// Adds an entry: whoever reads the file sees it without or with it, never half of it.
fn append(path: &Path, entry: &KeyEntry) -> anyhow::Result<()> {
    let (path, before, mode) = match fs::read(path) {
        // what a link leads to is replaced, not the link
        Ok(bytes) => (fs::canonicalize(path)?, bytes, Some(fs::metadata(path)?.permissions())),
        Err(error) if error.kind() == ErrorKind::NotFound => (path.to_owned(), Vec::new(), None),
        Err(error) => return Err(error.into()),
    };
    let after = with_entry(&before, entry).map_err(|why| anyhow!(why))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // readable for nobody else unless the file was
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(after.as_bytes())?;
    if let Some(mode) = mode {
        file.as_file().set_permissions(mode)?;
    }
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(file: &Path, tenant: &str) -> anyhow::Result<()> {
        let args = NewArgs {
            tenant: tenant.into(),
            permission: vec!["infer".into()],
            id: None,
            expires_days: Some(30),
            file: Some(file.to_owned()),
            json: true,
        };
        run(KeysArgs { command: KeysCommand::New(args) })
    }

    #[test]
    fn entries_are_added_to_a_file_and_a_bad_one_changes_nothing() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("keys.json");
        let tenants = || -> anyhow::Result<Vec<String>> {
            let all: Vec<KeyEntry> = serde_json::from_slice(&fs::read(&path)?)?;
            Ok(all.into_iter().map(|entry| entry.tenant).collect())
        };
        new(&path, "a")?;
        new(&path, "b")?;
        assert_eq!(tenants()?, ["a", "b"]);
        let refused = new(&path, "*").map_err(|e| e.to_string()).expect_err("it takes admin");
        assert!(refused.starts_with("--tenant:"), "{refused}");
        assert_eq!(tenants()?, ["a", "b"]);
        fs::write(&path, "not JSON")?;
        assert!(new(&path, "c").is_err());
        assert_eq!(fs::read_to_string(&path)?, "not JSON");
        Ok(())
    }
}
