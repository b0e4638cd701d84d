//! One writer for each run directory.
//!
//! Between processes: an advisory lock on `run.lock`, which the kernel releases when the process dies, however it dies.
//! Within a process a new opening takes over from the old one, because a notebook cell is run again: the old value can
//! still be looked at, but no longer writes.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use crate::{Error, Result};

/// The right to write into a run directory.
#[derive(Debug)]
pub(super) struct Hold {
    dir: PathBuf,
    generation: u64,
    // The lock lasts as long as any opening of this process holds the file.
    _file: Arc<File>,
}

struct Held {
    generation: u64,
    file: std::sync::Weak<File>,
}

static HELD: LazyLock<Mutex<HashMap<PathBuf, Held>>> = LazyLock::new(Mutex::default);

impl Hold {
    /// Takes the directory, from an older opening of this process if need be.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let dir = dir.canonicalize().map_err(|e| Error::io("open the run directory", dir, e))?;
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        let before = held.get(&dir);
        let generation = before.map_or(0, |h| h.generation) + 1;
        let file = match before.and_then(|h| h.file.upgrade()) {
            Some(file) => file,
            None => Arc::new(lock(&dir)?),
        };
        held.insert(dir.clone(), Held { generation, file: Arc::downgrade(&file) });
        Ok(Hold { dir, generation, _file: file })
    }

    /// An error if the directory was opened again since.
    pub(super) fn check(&self) -> Result<()> {
        let held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        if held.get(&self.dir).is_some_and(|h| h.generation == self.generation) {
            return Ok(());
        }
        Err(Error::new("this run was opened again, so this older value of it no longer writes")
            .at_path(&self.dir)
            .expected("one value that trains")
            .found("a newer one in the same process")
            .next("use the newer value, or resume the run once more"))
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("run.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io("open the run's lock", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new("another process has this run open")
            .at_path(dir)
            .expected("one process for each run directory")
            .found("a lock held by another process")
            .next("stop that process (or restart that notebook's kernel), then try again")),
        // A file system without locks: the reader has to look after that.
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => Err(Error::io("lock the run directory", &path, e)),
    }
}
