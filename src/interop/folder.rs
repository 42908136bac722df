//! Which files a delta's folder may bring, and how a folder on disk is read: one list for server and client.

use std::path::{Path, PathBuf};

use super::{CONFIGS, InteropError, LABELS, PICKLES, WEIGHTS, adapterhub, container};
use crate::delta::DeltaFiles;

/// Notes for people; stored, not read.
pub(super) const README: &str = "README.md";
/// What a part may bring beside its configuration and weights.
const BESIDE: &[&str] = &[adapterhub::HEAD_CONFIG, adapterhub::HEAD_WEIGHTS, LABELS, README];

/// All names of a part's files.
pub(super) fn known() -> impl Iterator<Item = &'static str> {
    CONFIGS.iter().chain(WEIGHTS).chain(BESIDE).copied()
}

/// Every file is known, and there is one configuration and one weights file at most.
///
/// # Errors
/// The file's name and what is accepted.
pub(super) fn check(files: &DeltaFiles) -> Result<(), InteropError> {
    let names = || files.files.keys().map(String::as_str);
    if let Some(stranger) = names().find(|n| !known().any(|k| k == *n)) {
        if PICKLES.iter().any(|p| stranger.ends_with(p)) {
            return Err(InteropError::Pickle(stranger.to_owned()));
        }
        let accepted = known().collect::<Vec<_>>().join(", ");
        return Err(InteropError::invalid(stranger, format!("is no file of a delta; accepted are {accepted}")));
    }
    for one_of in [CONFIGS, WEIGHTS] {
        let found: Vec<&str> = names().filter(|n| one_of.contains(n)).collect();
        if let [first, second, ..] = found[..] {
            return Err(InteropError::invalid(second, format!("is beside {first}; one of them is accepted")));
        }
    }
    Ok(())
}

/// A folder that a part's files are in: how their names begin when they are sent, and on disk.
pub(super) struct Place {
    pub(super) sent: String,
    pub(super) folder: PathBuf,
    pub(super) prefix: String,
}

impl Place {
    /// Where a file of this part would be.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}{name}", self.prefix))
    }
}

/// The folder itself, and with `delta.json` in it one place per part: `<part>.<file>`, or a folder called as the part.
///
/// # Errors
/// An index that cannot be read.
pub(super) fn places(folder: &Path) -> Result<Vec<Place>, InteropError> {
    let mut all = vec![Place { sent: String::new(), folder: folder.to_owned(), prefix: String::new() }];
    if folder.join(container::INDEX).is_file() {
        let mut index = DeltaFiles::default();
        index.files.insert(container::INDEX.into(), read(&folder.join(container::INDEX), container::INDEX)?.into());
        for part in container::index(&index)? {
            let (sent, own) = (format!("{part}."), folder.join(&part));
            all.push(match own.is_dir() {
                true => Place { sent, folder: own, prefix: String::new() },
                false => Place { prefix: sent.clone(), sent, folder: folder.to_owned() },
            });
        }
    }
    Ok(all)
}

/// The files of a folder that belong to its delta, as they are called in an upload, with their paths. Other files
/// (checkpoints, logs) stay where they are.
///
/// # Errors
/// A `delta.json` that cannot be read.
pub(super) fn files_of(folder: &Path) -> Result<Vec<(String, PathBuf)>, InteropError> {
    let mut out = Vec::new();
    let index = folder.join(container::INDEX);
    if index.is_file() {
        out.push((container::INDEX.to_owned(), index));
    }
    for place in places(folder)? {
        let found = known().map(|name| (format!("{}{name}", place.sent), place.path(name)));
        out.extend(found.filter(|(_, path)| path.is_file()));
    }
    Ok(out)
}

/// Reads the files of a folder that belong to its delta; other files are left alone.
///
/// # Errors
/// A file that cannot be read; a folder without a delta.
pub fn read_folder(folder: &Path) -> Result<DeltaFiles, InteropError> {
    let mut out = DeltaFiles::default();
    for (name, path) in files_of(folder)? {
        let data = read(&path, &name)?;
        out.files.insert(name, data.into());
    }
    if out.files.is_empty() {
        let accepted = known().collect::<Vec<_>>().join(", ");
        return Err(InteropError::invalid("folder", format!("has none of {}, {accepted}", container::INDEX)));
    }
    Ok(out)
}

/// A file's bytes.
pub(super) fn read(path: &Path, name: &str) -> Result<Vec<u8>, InteropError> {
    std::fs::read(path).map_err(|e| InteropError::invalid(name, e.to_string()))
}
