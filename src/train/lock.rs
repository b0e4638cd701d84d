//! One writer for each run directory.
//!
//! Between processes: an advisory lock on `run.lock`, which the kernel releases when the process dies, however it dies.
//! Within a process a new opening takes over from the old one, because a notebook cell is run again: the old value can
//! still be looked at, but no longer writes.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::{Error, Result};

/// The right to write into a run directory.
#[derive(Debug)]
pub(super) struct Hold {
    dir: PathBuf,
    generation: u64,
    // The lock lasts as long as any opening of this process holds the file.
    _lock: Arc<Lock>,
}

/// The locked file.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    /// Closing is not enough: a child that another thread is just starting shares the file until it executes.
    fn drop(&mut self) {
        _ = self.0.unlock();
    }
}

struct Held {
    generation: u64,
    lock: Weak<Lock>,
}

static HELD: LazyLock<Mutex<HashMap<PathBuf, Held>>> = LazyLock::new(Mutex::default);

impl Hold {
    /// Takes the directory, from an older opening of this process if need be.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let dir = dir.canonicalize().map_err(|e| Error::io("open the run directory", dir, e))?;
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        let before = held.get(&dir);
        let generation = before.map_or(0, |h| h.generation) + 1;
        let lock = match before.and_then(|h| h.lock.upgrade()) {
            Some(lock) => lock,
            None => Arc::new(Lock(lock_file(&dir)?)),
        };
        held.insert(dir.clone(), Held { generation, lock: Arc::downgrade(&lock) });
        Ok(Hold { dir, generation, _lock: lock })
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

fn lock_file(dir: &Path) -> Result<File> {
    let path = dir.join("run.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io("open the run's lock", &path, e))?;
    // A process that was just killed may still be giving back its memory.
    let mut patience = 50;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if patience > 0 => {
                patience -= 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new("another process has this run open")
                    .at_path(dir)
                    .expected("one process for each run directory")
                    .found("a lock held by another process")
                    .next("stop that process (or restart that notebook's kernel), then try again"));
            }
            // A file system without locks: the reader has to look after that.
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => return Ok(file),
            Err(TryLockError::Error(e)) => return Err(Error::io("lock the run directory", &path, e)),
        }
    }
}
