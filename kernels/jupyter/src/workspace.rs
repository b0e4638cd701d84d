//! A kernel's own directory: what it compiles in. Gone with the kernel, however that ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

const LOCK: &str = "lock";

/// The directory of a running kernel; locked while the kernel or the process of its cells lives.
pub struct Workspace {
    dir: PathBuf,
    _lock: File,
}

impl Workspace {
    /// Makes one below `sessions`, and removes those that dead kernels have left.
    ///
    /// # Errors
    /// A directory that cannot be written.
    pub fn create(sessions: &Path) -> io::Result<Workspace> {
        fs::create_dir_all(sessions)?;
        // One at a time: a directory without its lock yet would look like a dead one.
        let guard = File::create(sessions.join(".lock"))?;
        lock(&guard, true)?;
        for entry in fs::read_dir(sessions)?.flatten() {
            let dir = entry.path();
            // Without a lock it was being made, or removed, when its kernel was killed.
            if dir.is_dir() && File::open(dir.join(LOCK)).map_or(true, |file| lock(&file, false).is_ok()) {
                remove(&dir);
            }
        }
        let dir = tempfile::Builder::new().prefix("").rand_bytes(8).tempdir_in(sessions)?.keep();
        let file = File::create(dir.join(LOCK))?;
        lock(&file, true)?;
        // EVCXR_TMPDIR.
        fs::create_dir_all(dir.join("ctx/src"))?;
        fs::write(dir.join("Cargo.toml"), "[workspace]\nresolver = \"3\"\nmembers = [\"ctx\"]\n")?;
        Ok(Workspace { dir, _lock: file })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What evcxr takes to be its own.
    pub fn context(&self) -> PathBuf {
        self.dir.join("ctx")
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// Removes a workspace. Another process may be writing a last file there: the second attempt gets that too.
pub fn remove(dir: &Path) {
    if fs::remove_dir_all(dir).is_err() {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let _ = fs::remove_dir_all(dir);
    }
}

/// Locks a file for this process; waits for it, or fails when another has it.
fn lock(file: &File, wait: bool) -> io::Result<()> {
    let operation = if wait { libc::LOCK_EX } else { libc::LOCK_EX | libc::LOCK_NB };
    // SAFETY: a descriptor that is open.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What becomes of a file in a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Link,
    Copy,
    Skip,
}

/// Makes `to` a copy of the tree `from` in which large files are hard links. Compiled artifacts are replaced, never rewritten,
/// so a link is as good as a copy; the small files in which cargo keeps its books are copied, with their times.
pub fn clone_tree(from: &Path, to: &Path, how: &dyn Fn(&Path) -> How) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            clone_tree(&source, &target, how)?;
            continue;
        }
        match how(&source) {
            How::Skip => {}
            // Another file system has no links to this one.
            How::Link if fs::hard_link(&source, &target).is_ok() => {}
            How::Link | How::Copy => copy_with_times(&source, &target)?,
        }
    }
    Ok(())
}

fn copy_with_times(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    let times = fs::FileTimes::new().set_modified(fs::metadata(from)?.modified()?);
    File::options().write(true).open(to)?.set_times(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_kernel_removes_what_a_dead_one_left() {
        let sessions = tempfile::tempdir().unwrap();
        let alive = Workspace::create(sessions.path()).unwrap();
        let dead = Workspace::create(sessions.path()).unwrap();
        let left = dead.dir().to_owned();
        // As SIGKILL does: the lock is gone, the directory is not.
        drop(dead);
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join(LOCK), "").unwrap();
        let next = Workspace::create(sessions.path()).unwrap();
        assert!(!left.exists() && alive.dir().exists() && next.dir().exists());
    }

    #[test]
    fn a_clone_links_and_copies() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("a"), root.path().join("b"));
        fs::create_dir_all(from.join("deps")).unwrap();
        fs::write(from.join("deps/x.rlib"), "x").unwrap();
        fs::write(from.join("deps/x.d"), "d").unwrap();
        clone_tree(&from, &to, &|p| if p.extension().is_some_and(|e| e == "rlib") { How::Link } else { How::Copy })
            .unwrap();
        let inode = |p: PathBuf| fs::metadata(p).unwrap().ino();
        assert_eq!(inode(from.join("deps/x.rlib")), inode(to.join("deps/x.rlib")));
        assert_ne!(inode(from.join("deps/x.d")), inode(to.join("deps/x.d")));
        let time = |p: PathBuf| fs::metadata(p).unwrap().modified().unwrap();
        assert_eq!(time(from.join("deps/x.d")), time(to.join("deps/x.d")));
    }
}
