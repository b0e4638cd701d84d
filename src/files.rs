//! Writing files so that a reader never sees half of one.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::{Error, Result};

/// A new file in the directory that `path` is to be in, to be renamed to it; and that directory.
///
/// # Errors
/// A directory that cannot be written.
pub(crate) fn temporary_beside(path: &Path) -> Result<(NamedTempFile, &Path)> {
    let dir = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let tmp = tempfile::Builder::new()
        .prefix(".tunebook-")
        // Temporary files are private by default; model files are for everybody whom the umask lets in.
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(dir)
        .map_err(|e| Error::io("create a file", dir, e))?;
    Ok((tmp, dir))
}

/// Writes a file through a temporary beside it: written, synced, renamed, and the directory synced.
///
/// A crash, a full disk or an error in `write` leaves what was there before.
///
/// # Errors
/// Any failure of `write`, and input or output errors with the path.
pub fn write_atomic(path: impl AsRef<Path>, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let path = path.as_ref();
    let (tmp, dir) = temporary_beside(path)?;
    let mut out = BufWriter::with_capacity(1 << 20, tmp);
    write(&mut out)?;
    let tmp = out.into_inner().map_err(|e| Error::io("write", path, e.into_error()))?;
    tmp.as_file().sync_all().map_err(|e| Error::io("write", path, e))?;
    tmp.persist(path).map_err(|e| Error::io("rename into place", path, e.error))?;
    sync_dir(dir)
}

/// [`write_atomic`] for bytes that are already in memory.
///
/// # Errors
/// Input or output errors, with the path.
pub fn write_atomic_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    write_atomic(path, |w| w.write_all(bytes).map_err(|e| Error::io("write", path, e)))
}

/// Makes renames and new files in `dir` durable.
///
/// # Errors
/// Input or output errors, with the path.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io("sync the directory", dir, e))
}

/// Creates a directory and its parents.
///
/// # Errors
/// Input or output errors, with the path.
pub fn create_dir_all(dir: impl AsRef<Path>) -> Result<()> {
    fs::create_dir_all(dir.as_ref()).map_err(|e| Error::io("create the directory", dir, e))
}

/// Reads a whole text file.
///
/// # Errors
/// Input or output errors and text that is not UTF-8, with the path.
pub fn read_to_string(path: impl AsRef<Path>) -> Result<String> {
    fs::read_to_string(path.as_ref()).map_err(|e| Error::io("read", path, e))
}

/// Bytes that may still be written on the disk of `dir`.
///
/// # Errors
/// Input or output errors, with the path.
#[cfg(feature = "hub")]
pub(crate) fn free_bytes(dir: &Path) -> Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())
        .map_err(|e| Error::new("a path holds a zero byte").at_path(dir).caused_by(e))?;
    // SAFETY: `path` is NUL-terminated and lives through the call; `out` is plain data that it fills.
    let (rc, out) = unsafe {
        let mut out: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut out), out)
    };
    if rc != 0 {
        return Err(Error::io("ask for the free space", dir, std::io::Error::last_os_error()));
    }
    Ok(out.f_bavail.saturating_mul(out.f_frsize))
}
