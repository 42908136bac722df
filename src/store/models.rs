//! Whole models that jobs of full fine-tuning made: the folder `models/<job>/` and its record `models/<job>.json`.
//!
//! A model is there when both are. It is written to `models/<job>.part`; its record is made durable, then the folder gets
//! its name. So a record says that its folder is whole, whichever of the two names the folder has, and after a crash the
//! move is made up for. Everything here waits for the disk: not for an async thread.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::StoreError;
use crate::admission::train_params::ModelResult;

/// Folder of the data directory.
const DIR: &str = "models";
/// Room for the small files beside a model's weights, in bytes.
const BESIDE: u64 = 64 << 20;
/// Ending of what is not whole yet.
const PART: &str = "part";
/// Ending of a model that was written but could not be read back.
const UNVERIFIED: &str = "unverified";
/// Ending of a record.
const RECORD: &str = "json";

/// The models of a data directory.
#[derive(Debug, Clone)]
pub struct Models {
    data: PathBuf,
    dir: PathBuf,
}

impl Models {
    pub(super) fn new(data: &Path) -> Self {
        Self { data: data.to_owned(), dir: data.join(DIR) }
    }

    /// A job's folder, whether it is there or not.
    pub fn path(&self, job: &str) -> PathBuf {
        self.dir.join(job)
    }

    fn named(&self, job: &str, ending: &str) -> PathBuf {
        self.dir.join(format!("{job}.{ending}"))
    }

    /// Where a job's model is to be written: a path that does not exist, in a folder that does.
    ///
    /// # Errors
    /// The file system's.
    pub fn begin(&self, job: &str) -> Result<PathBuf, StoreError> {
        if !self.dir.is_dir() {
            fs::create_dir(&self.dir).map_err(StoreError::io(&self.dir))?;
            sync(&self.data)?;
        }
        let part = self.named(job, PART);
        remove(&part)?;
        Ok(part)
    }

    /// Whether the disk has room for so many bytes of weights and the small files beside them.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] with the numbers, or the file system's.
    pub fn check_room(&self, weights: u64) -> Result<(), StoreError> {
        let found = rustix::fs::statvfs(&self.data).map_err(|e| StoreError::io(&self.data)(e.into()))?;
        let (need, free) = (weights.saturating_add(BESIDE), found.f_bavail.saturating_mul(found.f_frsize));
        if need <= free { Ok(()) } else { Err(StoreError::DiskFull { need, free }) }
    }

    /// Takes what was written to [`Self::begin`]'s path as a job's model of this fingerprint; durable on return.
    ///
    /// # Errors
    /// The file system's.
    pub fn keep(&self, job: &str, fingerprint: String) -> Result<ModelResult, StoreError> {
        let bytes = size(&self.named(job, PART))?;
        let record = ModelResult { path: format!("{DIR}/{job}"), fingerprint, bytes };
        let (path, part) = (self.named(job, RECORD), self.named(job, &format!("{RECORD}.{PART}")));
        let text = serde_json::to_vec_pretty(&record).map_err(|e| StoreError::io(&path)(e.into()))?;
        let write = || -> io::Result<()> {
            let mut file = File::create(&part)?;
            file.write_all(&text)?;
            file.sync_all()?;
            crate::failpoint!("model-before-record");
            fs::rename(&part, &path)
        };
        write().map_err(StoreError::io(&path))?;
        sync(&self.dir)?;
        crate::failpoint!("model-before-move");
        self.put_in_place(job)?;
        crate::failpoint!("model-in-place");
        Ok(record)
    }

    fn put_in_place(&self, job: &str) -> Result<(), StoreError> {
        let path = self.path(job);
        fs::rename(self.named(job, PART), &path).map_err(StoreError::io(&path))?;
        sync(&self.dir)
    }

    /// Keeps what was written to [`Self::begin`]'s path, but not as a job's model: somebody may want to look at it. Its
    /// place.
    ///
    /// # Errors
    /// The file system's.
    pub fn set_aside(&self, job: &str) -> Result<PathBuf, StoreError> {
        let path = self.named(job, UNVERIFIED);
        remove(&path)?;
        fs::rename(self.named(job, PART), &path).map_err(StoreError::io(&path))?;
        sync(&self.dir)?;
        Ok(path)
    }

    /// Removes what was written to [`Self::begin`]'s path.
    ///
    /// # Errors
    /// The file system's.
    pub fn discard(&self, job: &str) -> Result<(), StoreError> {
        remove(&self.named(job, PART))
    }

    /// A job's model, if it is there; makes up for a move that a crash prevented.
    ///
    /// # Errors
    /// The file system's, or a record that nobody here wrote.
    pub fn find(&self, job: &str) -> Result<Option<ModelResult>, StoreError> {
        let path = self.named(job, RECORD);
        let record: ModelResult = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|e| StoreError::io(&path)(e.into()))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::io(&path)(e)),
        };
        if !self.path(job).is_dir() && self.named(job, PART).is_dir() {
            self.put_in_place(job)?;
        }
        Ok(Some(record).filter(|_| self.path(job).is_dir()))
    }

    /// Removes all that a job's full fine-tuning left, a model that could not be read back, too: whether there was
    /// anything.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, job: &str) -> Result<bool, StoreError> {
        // the record first: a folder without one is swept
        let places = [self.named(job, RECORD), self.path(job), self.named(job, PART), self.named(job, UNVERIFIED)];
        let there = places.iter().any(|p| p.exists());
        for path in &places {
            remove(path)?;
        }
        if there {
            sync(&self.dir)?;
        }
        Ok(there)
    }

    /// Jobs that have a record or a folder.
    ///
    /// # Errors
    /// The file system's.
    pub fn jobs(&self) -> Result<Vec<String>, StoreError> {
        let job = |name: String| match name.split_once('.') {
            Some((stem, RECORD)) => Some(stem.to_owned()),
            Some(_) => None,
            None => Some(name),
        };
        Ok(self.entries()?.into_iter().filter_map(job).collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// Removes what is half-written, and every folder and record but those of these jobs. What was set aside stays.
    ///
    /// # Errors
    /// The file system's.
    pub fn sweep(&self, keep: &BTreeSet<String>) -> Result<(), StoreError> {
        for name in self.entries()? {
            let (stem, ending) = name.split_once('.').unwrap_or((&name, ""));
            let stays = match ending {
                UNVERIFIED => true,
                RECORD | "" => keep.contains(stem),
                _ => false,
            };
            if !stays {
                tracing::warn!(name, "removed what no job keeps as its model");
                remove(&self.dir.join(&name))?;
            }
        }
        Ok(())
    }

    fn entries(&self) -> Result<Vec<String>, StoreError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(StoreError::io(&self.dir)(e)),
        };
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        entries.map(name).collect::<io::Result<_>>().map_err(StoreError::io(&self.dir))
    }
}

/// Makes a folder's entries durable.
fn sync(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(StoreError::io(dir))
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> Result<(), StoreError> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io(path)(e)),
        _ => Ok(()),
    }
}

/// Bytes of a folder's files.
fn size(dir: &Path) -> Result<u64, StoreError> {
    let size = |entry: io::Result<fs::DirEntry>| Ok::<u64, io::Error>(entry?.metadata()?.len());
    fs::read_dir(dir).and_then(|files| files.map(size).sum::<io::Result<u64>>()).map_err(StoreError::io(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(models: &Models, job: &str) {
        let part = models.begin(job).unwrap();
        assert!(!part.exists());
        fs::create_dir(&part).unwrap();
        fs::write(part.join("weights"), [7; 100]).unwrap();
    }

    fn names(models: &Models) -> Vec<String> {
        let mut names = models.entries().unwrap();
        names.sort();
        names
    }

    #[test]
    fn a_model_is_there_when_its_record_is_and_a_crash_before_the_move_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let models = Models::new(dir.path());
        assert!(models.find("a").unwrap().is_none() && models.jobs().unwrap().is_empty());
        written(&models, "a");
        assert!(models.find("a").unwrap().is_none(), "not before it is kept");
        let kept = models.keep("a", "f".into()).unwrap();
        assert_eq!((kept.path.as_str(), kept.bytes), ("models/a", 100));
        assert_eq!(models.find("a").unwrap(), Some(kept.clone()));
        // as after a crash between record and move
        fs::rename(models.path("a"), models.named("a", PART)).unwrap();
        assert_eq!(models.find("a").unwrap(), Some(kept));
        assert_eq!(names(&models), ["a", "a.json"]);
        assert!(models.remove("a").unwrap() && !models.remove("a").unwrap());
        assert!(models.find("a").unwrap().is_none() && names(&models).is_empty());
        models.check_room(0).unwrap();
        let full = models.check_room(u64::MAX - BESIDE).unwrap_err();
        assert!(matches!(full, StoreError::DiskFull { need: u64::MAX, .. }), "{full}");
    }

    #[test]
    fn a_sweep_leaves_what_jobs_keep_and_what_was_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let models = Models::new(dir.path());
        models.sweep(&BTreeSet::new()).unwrap();
        for job in ["kept", "lost"] {
            written(&models, job);
            models.keep(job, "f".into()).unwrap();
        }
        written(&models, "odd");
        models.set_aside("odd").unwrap();
        written(&models, "half");
        fs::remove_file(models.named("lost", RECORD)).unwrap();
        assert_eq!(models.jobs().unwrap(), ["kept", "lost"], "a folder without a record is asked about, too");
        models.sweep(&BTreeSet::from(["kept".to_owned()])).unwrap();
        assert_eq!(names(&models), ["kept", "kept.json", "odd.unverified"]);
        assert!(models.remove("odd").unwrap());
        written(&models, "half");
        models.discard("half").unwrap();
        assert_eq!(names(&models), ["kept", "kept.json"]);
    }
}
