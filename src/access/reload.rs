//! Files that are read again when their content changes. What cannot be used leaves what was there in force.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::Arc,
};

use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};

use super::AccessError;
use crate::telemetry::names;

/// Largest file that is read; certificates and lists of keys are far smaller.
const MAX_BYTES: u64 = 16 << 20;

type Parse<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync>;

/// What some files say, as last read without an error.
pub(super) struct Reloaded<T> {
    /// The flag that names the files, for messages.
    flag: &'static str,
    paths: Vec<PathBuf>,
    parse: Parse<T>,
    current: RwLock<Arc<T>>,
    /// Digest of what was tried last, so that each content is tried, and complained about, once.
    tried: Mutex<[u8; 32]>,
}

impl<T> Reloaded<T> {
    /// Reads the files; `parse` gets their bytes in the order of the paths.
    ///
    /// # Errors
    /// If a file cannot be read or used.
    pub(super) fn open(
        flag: &'static str,
        paths: Vec<PathBuf>,
        parse: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, AccessError> {
        let refused = |why| AccessError { flag, why };
        let files = read(&paths).map_err(refused)?;
        let current = RwLock::new(Arc::new(parse(&files).map_err(refused)?));
        Ok(Self { flag, paths, parse: Box::new(parse), current, tried: Mutex::new(digest(&files)) })
    }

    /// What is in force.
    pub(super) fn get(&self) -> Arc<T> {
        Arc::clone(&self.current.read())
    }

    /// Reads the files again, and takes what they say if it is new and can be used. Blocks.
    pub(super) fn look_again(&self) {
        let files = read(&self.paths);
        let digest = match &files {
            Ok(files) => digest(files),
            Err(why) => digest(&[why.clone().into_bytes()]),
        };
        let mut tried = self.tried.lock();
        if *tried == digest {
            return;
        }
        *tried = digest;
        let outcome = match files.and_then(|files| (self.parse)(&files)) {
            Ok(new) => {
                *self.current.write() = Arc::new(new);
                tracing::info!(flag = self.flag, "read again");
                "done"
            }
            Err(why) => {
                tracing::error!(
                    flag = self.flag,
                    why,
                    "cannot be used as it is now; what was read before stays in force"
                );
                "failed"
            }
        };
        metrics::counter!(names::ACCESS_RELOADS, "outcome" => outcome).increment(1);
    }
}

impl<T> fmt::Debug for Reloaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloaded").field("flag", &self.flag).finish_non_exhaustive()
    }
}

fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, String> {
    let all = paths.iter().map(|path| {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
        let read = match read {
            Ok(n) if n as u64 > MAX_BYTES => Err(io::Error::other(format!("is larger than {MAX_BYTES} bytes"))),
            read => read,
        };
        read.map(|_| bytes).map_err(|e| format!("{}: {e}", path.display()))
    });
    all.collect()
}

fn digest(files: &[Vec<u8>]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for file in files {
        hash.update((file.len() as u64).to_le_bytes());
        hash.update(file);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[test]
    fn a_file_that_cannot_be_used_leaves_the_last_one_in_force_and_is_tried_once() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("number");
        let write = |text: &str| fs::write(&path, text);
        let tries = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&tries);
        let parse = move |files: &[Vec<u8>]| {
            counted.fetch_add(1, Ordering::Relaxed);
            String::from_utf8_lossy(&files[0]).parse::<u32>().map_err(|e| e.to_string())
        };
        assert!(Reloaded::open("--n", vec![path.clone()], parse.clone()).is_err(), "there is no file");
        write("1")?;
        let opened = Reloaded::open("--n", vec![path.clone()], parse);
        let Ok(number) = opened else { panic!("the file can be used") };
        let tried = || tries.load(Ordering::Relaxed);
        number.look_again();
        assert_eq!((*number.get(), tried()), (1, 1), "nothing is new");
        write("two")?;
        number.look_again();
        number.look_again();
        assert_eq!((*number.get(), tried()), (1, 2));
        fs::remove_file(&path)?;
        number.look_again();
        assert_eq!((*number.get(), tried()), (1, 2), "a file that is gone revokes nothing by accident");
        write("2")?;
        number.look_again();
        assert_eq!((*number.get(), tried()), (2, 3));
        Ok(())
    }
}
