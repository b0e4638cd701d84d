//! One writer for each run directory.
//!
//! Between processes: an advisory lock on `run.lock`, which the kernel releases when the process dies, however it dies.
//! Within a process a new opening takes over from the old one, because a notebook cell is run again: the old value can
//! still be looked at, but no longer writes. Who writes is said in the file itself and not in a static: each cell of a
//! notebook has a copy of the library's statics.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// The right to write into a run directory.
#[derive(Debug)]
pub(super) struct Hold {
    dir: PathBuf,
    file: File,
    /// What `run.lock` says while this opening is the newest: the process, its file descriptor, the time.
    token: String,
}

impl Drop for Hold {
    /// Closing is not enough: a child that another thread is just starting shares the file until it executes.
    fn drop(&mut self) {
        // A newer opening shares the lock.
        if read(&self.file) == self.token {
            _ = self.file.unlock();
        }
    }
}

impl Hold {
    /// Takes the directory, from an older opening of this process if need be.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let dir = dir.canonicalize().map_err(|e| Error::io("open the run directory", dir, e))?;
        let path = dir.join("run.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| Error::io("open the run's lock", &path, e))?;
        let file = lock(file, &dir)?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let token = format!("{} {} {time}\n", std::process::id(), file.as_raw_fd());
        file.set_len(0)
            .and_then(|()| file.write_all_at(token.as_bytes(), 0))
            .map_err(|e| Error::io("write the run's lock", &path, e))?;
        Ok(Hold { dir, file, token })
    }

    /// An error if the directory was opened again since.
    pub(super) fn check(&self) -> Result<()> {
        if read(&self.file) == self.token {
            return Ok(());
        }
        Err(Error::new("this run was opened again, so this older value of it no longer writes")
            .at_path(&self.dir)
            .expected("one value that trains")
            .found("a newer one in the same process")
            .next("use the newer value, or resume the run once more"))
    }
}

/// What the file says; nothing when it cannot be read.
fn read(file: &File) -> String {
    let mut text = [0; 128];
    let n = file.read_at(&mut text, 0).unwrap_or(0);
    String::from_utf8_lossy(&text[..n]).into_owned()
}

/// The file that holds the lock of an older opening in this process, shared with it.
fn share(file: &File) -> Option<File> {
    let text = read(file);
    let mut words = text.split_whitespace().map(str::parse::<i32>);
    let (Some(Ok(pid)), Some(Ok(fd))) = (words.next(), words.next()) else { return None };
    if pid as u32 != std::process::id() || fd < 0 {
        return None;
    }
    // SAFETY: borrowed for the length of the call; a descriptor that is closed or another file's is found out.
    let older = File::from(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().ok()?);
    let (a, b) = (file.metadata().ok()?, older.metadata().ok()?);
    (a.ino() == b.ino() && a.dev() == b.dev()).then_some(older)
}

/// The file, locked; or that of an older opening of this process, which holds the lock.
fn lock(file: File, dir: &Path) -> Result<File> {
    // A process that was just killed may still be giving back its memory.
    let mut patience = 50;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if patience > 0 => {
                if let Some(older) = share(&file) {
                    return Ok(older);
                }
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
            Err(TryLockError::Error(e)) => return Err(Error::io("lock the run directory", dir, e)),
        }
    }
}
