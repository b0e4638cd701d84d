//! Writing a checkpoint: it is whole or it does not exist.
//!
//! ```text
//! checkpoints/step-40/
//!   adapter_config.json, adapter_model.safetensors   the adapter, as PEFT writes it
//!   optimizer.safetensors                            the moments
//!   state.json                                       [`TrainState`]
//!   manifest.json                                    size and SHA-256 of each of the others
//! ```
//!
//! Everything is written into `.tmp-step-40-PID` beside it and synced; then one rename makes it a checkpoint, and the
//! directory is synced. Whatever stops the process leaves the older checkpoints and at most such a temporary directory.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::checkpoint_read::{CheckpointDir, list_steps};
use super::fingerprint::sha256_file;
use super::state::{RUN_FORMAT_VERSION, RunDir, TrainState, json_text};
use super::tensor_file::{self, TensorSlice};
use crate::{Error, Result, files};

/// The files that every checkpoint has besides the adapter's.
pub(super) const OPTIMIZER_FILE: &str = "optimizer.safetensors";
pub(super) const STATE_FILE: &str = "state.json";
pub(super) const MANIFEST_FILE: &str = "manifest.json";
/// What names of unfinished directories start with.
pub(super) const TMP_PREFIX: &str = ".tmp-";

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Its name in the checkpoint's directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256, in hex.
    pub sha256: String,
}

/// What belongs to a checkpoint: the content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`RUN_FORMAT_VERSION`].
    pub format_version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Every other file, by name.
    pub files: Vec<ManifestFile>,
}

/// Writes a checkpoint of `state.step` and then deletes old ones beyond `save_total_limit`.
///
/// `write_adapter` is given a directory and writes the adapter's files into it. A checkpoint of the same step is replaced in
/// one exchange; a damaged one that stood there is kept as `step-N.damaged-K`. Never deleted: the checkpoint just written,
/// damaged ones, and those of later steps.
///
/// # Errors
/// A full disk, an unwritable directory, an error of `write_adapter`, the run opened again: the older checkpoints are then
/// whole, and what was written is removed. An old checkpoint that cannot be deleted: the new one is then whole.
pub fn write_checkpoint(
    run: &RunDir,
    state: &TrainState,
    tensors: &[TensorSlice<'_>],
    save_total_limit: Option<usize>,
    write_adapter: &mut dyn FnMut(&Path) -> Result<()>,
) -> Result<CheckpointDir> {
    run.check()?;
    let parent = run.checkpoints();
    let tmp = parent.join(format!("{TMP_PREFIX}step-{}-{}", state.step, std::process::id()));
    let target = parent.join(format!("step-{}", state.step));
    let written = fill(run, &tmp, state, tensors, write_adapter).and_then(|()| put_in_place(&tmp, &target));
    if let Err(e) = written {
        // What cannot be removed now is removed when the run is resumed.
        _ = fs::remove_dir_all(&tmp);
        return Err(Error::new(format!("the checkpoint of step {} was not written", state.step))
            .at_path(&target)
            .caused_by(e)
            .next("the older checkpoints are whole; remove the cause, then save again"));
    }
    prune(&parent, state.step, save_total_limit)?;
    CheckpointDir::open(&target)
}

fn fill(
    run: &RunDir,
    tmp: &Path,
    state: &TrainState,
    tensors: &[TensorSlice<'_>],
    write_adapter: &mut dyn FnMut(&Path) -> Result<()>,
) -> Result<()> {
    if fs::symlink_metadata(tmp).is_ok() {
        fs::remove_dir_all(tmp).map_err(|e| Error::io("remove an unfinished checkpoint", tmp, e))?;
    }
    files::create_dir_all(tmp)?;
    files::sync_dir(run.path())?;
    write_adapter(tmp)?;
    tensor_file::write(&tmp.join(OPTIMIZER_FILE), tensors)?;
    write_new(&tmp.join(STATE_FILE), state)?;
    let manifest = Manifest { format_version: RUN_FORMAT_VERSION, step: state.step, files: sync_and_hash(tmp)? };
    write_new(&tmp.join(MANIFEST_FILE), &manifest)?;
    files::sync_dir(tmp)?;
    // A checkpoint never knows of a step whose line of metrics a power failure could still take back.
    for log in [super::metrics::METRICS_FILE, super::metrics::EVALUATIONS_FILE] {
        let path = run.path().join(log);
        if path.exists() {
            File::open(&path).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", &path, e))?;
        }
    }
    Ok(())
}

fn write_new(path: &Path, value: &impl Serialize) -> Result<()> {
    use std::io::Write;
    let text = json_text(path, value)?;
    let run = || -> std::io::Result<()> {
        let mut file = File::create_new(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    run().map_err(|e| Error::io("write", path, e))
}

/// Syncs every file of the directory and says what it is, by name.
fn sync_and_hash(dir: &Path) -> Result<Vec<ManifestFile>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read the directory", dir, e))? {
        let path = entry.map_err(|e| Error::io("read the directory", dir, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let is_file = fs::symlink_metadata(&path).is_ok_and(|m| m.is_file());
        if name.is_empty() || !is_file {
            return Err(Error::new("a checkpoint holds plain files only")
                .at_path(&path)
                .next("write the adapter without directories or links"));
        }
        let run = || -> std::io::Result<ManifestFile> {
            let mut file = File::open(&path)?;
            file.sync_all()?;
            let bytes = file.metadata()?.len();
            Ok(ManifestFile { name, bytes, sha256: sha256_file(&mut file)? })
        };
        found.push(run().map_err(|e| Error::io("read", &path, e))?);
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Renames `tmp` to `target`; a checkpoint that is there changes places with it in one step.
fn put_in_place(tmp: &Path, target: &Path) -> Result<()> {
    let parent = target.parent().unwrap_or(Path::new("."));
    if fs::symlink_metadata(target).is_err() {
        fs::rename(tmp, target).map_err(|e| Error::io("rename into place", target, e))?;
        return files::sync_dir(parent);
    }
    let old_is_whole = CheckpointDir::open(target).is_ok_and(|c| c.verify().is_ok());
    exchange(tmp, target).map_err(|e| Error::io("exchange with the checkpoint of the same step", target, e))?;
    files::sync_dir(parent)?;
    // The new checkpoint is in place: what happens to the old one is no reason to fail.
    _ = if old_is_whole { fs::remove_dir_all(tmp) } else { fs::rename(tmp, damaged_name(target)) };
    Ok(())
}

fn damaged_name(target: &Path) -> PathBuf {
    (1u32..)
        .map(|k| target.with_extension(format!("damaged-{k}")))
        .find(|p| fs::symlink_metadata(p).is_err())
        .unwrap_or_else(|| target.with_extension("damaged"))
}

/// Lets two directories change names atomically.
fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    let a = std::ffi::CString::new(a.as_os_str().as_bytes())?;
    let b = std::ffi::CString::new(b.as_os_str().as_bytes())?;
    // SAFETY: both are NUL-terminated strings that live through the call.
    let rc = unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Deletes whole checkpoints before `newest` until `limit` are left, `newest` counted.
fn prune(parent: &Path, newest: u64, limit: Option<usize>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let mut older: Vec<u64> = list_steps(parent)?.into_iter().filter(|&step| step < newest).collect();
    // Damaged ones are evidence, not checkpoints: neither counted nor deleted. Sizes are enough to tell here.
    older
        .retain(|step| CheckpointDir::open(parent.join(format!("step-{step}"))).is_ok_and(|c| c.check_sizes().is_ok()));
    let excess = (older.len() + 1).saturating_sub(limit.max(1));
    for step in &older[..excess] {
        let dir = parent.join(format!("step-{step}"));
        // Renamed first: a deletion that is cut short must not look like a damaged checkpoint.
        let gone = parent.join(format!("{TMP_PREFIX}delete-step-{step}-{}", std::process::id()));
        fs::rename(&dir, &gone)
            .and_then(|()| fs::remove_dir_all(&gone))
            .map_err(|e| Error::io("delete an old checkpoint", &dir, e))?;
    }
    if excess > 0 { files::sync_dir(parent) } else { Ok(()) }
}
