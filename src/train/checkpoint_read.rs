//! Finding and reading checkpoints: by manifest and checksum, never by trust.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::checkpoint::{MANIFEST_FILE, Manifest, ManifestFile, OPTIMIZER_FILE, STATE_FILE, TMP_PREFIX};
use super::exact_json;
use super::fingerprint::sha256_file;
use super::state::{RunDir, TrainState, read_versioned};
use super::tensor_file::TensorFile;
use crate::{Error, Result, files};

/// A checkpoint on disk, known by its manifest.
#[derive(Clone, Debug)]
pub struct CheckpointDir {
    path: PathBuf,
    manifest: Manifest,
}

impl CheckpointDir {
    /// Reads the manifest of `checkpoints/step-N`; the other files are looked at by [`verify`](Self::verify).
    ///
    /// # Errors
    /// No manifest, a damaged one, one of another format or step, or one that names files elsewhere.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let manifest: Manifest = read_versioned(&path.join(MANIFEST_FILE))?;
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(step) = parse_step(name).filter(|&step| step != manifest.step) {
            return Err(damaged(&path, format!("step {step}"), format!("a manifest of step {}", manifest.step)));
        }
        for needed in [OPTIMIZER_FILE, STATE_FILE] {
            if !manifest.files.iter().any(|f| f.name == needed) {
                return Err(damaged(&path, format!("{needed} in the manifest"), "a manifest without it".into()));
            }
        }
        if let Some(file) = manifest.files.iter().find(|f| f.name.contains('/') || f.name == "..") {
            return Err(damaged(&path, "names of files".into(), format!("`{}` in the manifest", file.name)));
        }
        Ok(CheckpointDir { path, manifest })
    }

    /// Its directory; the adapter's files in it are PEFT's.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Its files, with sizes and checksums.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Size of all its files in bytes, the manifest not counted.
    pub fn bytes(&self) -> u64 {
        self.manifest.files.iter().map(|f| f.bytes).sum()
    }

    /// Reads every file and compares size and SHA-256 with the manifest.
    ///
    /// # Errors
    /// The first file that is missing or differs, with what was expected and found.
    pub fn verify(&self) -> Result<()> {
        self.check_sizes()?;
        for file in &self.manifest.files {
            let path = self.path.join(&file.name);
            let sum = File::open(&path).and_then(|mut f| sha256_file(&mut f));
            let sum = sum.map_err(|e| Error::io("read", &path, e))?;
            if sum != file.sha256 {
                return Err(damaged(&path, format!("SHA-256 {}", file.sha256), format!("SHA-256 {sum}")));
            }
        }
        Ok(())
    }

    /// Compares sizes only.
    pub(super) fn check_sizes(&self) -> Result<()> {
        self.manifest.files.iter().try_for_each(|file| self.check_size(file))
    }

    fn check_size(&self, file: &ManifestFile) -> Result<()> {
        let path = self.path.join(&file.name);
        let found = match fs::symlink_metadata(&path) {
            Ok(m) if m.is_file() && m.len() == file.bytes => return Ok(()),
            Ok(m) => format!("{} bytes", m.len()),
            Err(_) => "no such file".into(),
        };
        Err(damaged(&path, format!("{} bytes", file.bytes), found))
    }

    /// Where the run stood.
    ///
    /// # Errors
    /// A file that cannot be read, or of another step.
    pub fn state(&self) -> Result<TrainState> {
        let path = self.path.join(STATE_FILE);
        let state: TrainState = exact_json::from_str(&files::read_to_string(&path)?).map_err(|e| e.at_path(&path))?;
        if state.step == self.step() {
            return Ok(state);
        }
        Err(damaged(&path, format!("step {}", self.step()), format!("step {}", state.step)))
    }

    /// The optimizer's tensors, read one at a time.
    ///
    /// # Errors
    /// As [`TensorFile::open`].
    pub fn optimizer(&self) -> Result<TensorFile> {
        TensorFile::open(self.path.join(OPTIMIZER_FILE))
    }
}

fn damaged(path: &Path, expected: String, found: String) -> Error {
    Error::new("this checkpoint is damaged")
        .at_path(path)
        .expected(expected)
        .found(found)
        .next("resuming takes the newest whole checkpoint; delete this one when you no longer need it")
}

/// A checkpoint that cannot be used, and why.
#[derive(Clone, Debug)]
pub struct DamagedCheckpoint {
    /// Its directory; it is left as it is.
    pub path: PathBuf,
    /// What is wrong with it, in full.
    pub problem: String,
}

/// What [`scan_checkpoints`] found.
#[derive(Clone, Debug, Default)]
pub struct CheckpointScan {
    /// The newest checkpoint of which every file is as its manifest says.
    pub newest: Option<CheckpointDir>,
    /// Newer ones that are not, newest first.
    pub damaged: Vec<DamagedCheckpoint>,
    /// Steps of the older ones, ascending; they were not looked at.
    pub older: Vec<u64>,
}

/// Looks through a run's checkpoints from the newest until one is whole. Changes nothing.
///
/// # Errors
/// A directory that cannot be read. No checkpoint at all is not an error: a run that was killed before its first one starts
/// again from step 0.
pub fn scan_checkpoints(run_dir: impl AsRef<Path>) -> Result<CheckpointScan> {
    let parent = run_dir.as_ref().join("checkpoints");
    let mut scan = CheckpointScan { older: list_steps(&parent)?, ..CheckpointScan::default() };
    while let Some(step) = scan.older.pop() {
        let path = parent.join(format!("step-{step}"));
        match CheckpointDir::open(&path).and_then(|c| c.verify().and_then(|()| c.state()).map(|_| c)) {
            Ok(checkpoint) => {
                scan.newest = Some(checkpoint);
                break;
            }
            Err(e) => scan.damaged.push(DamagedCheckpoint { path, problem: e.to_string() }),
        }
    }
    Ok(scan)
}

/// The newest whole checkpoint of a run, if there is one.
///
/// # Errors
/// As [`scan_checkpoints`].
pub fn latest_checkpoint(run_dir: impl AsRef<Path>) -> Result<Option<CheckpointDir>> {
    Ok(scan_checkpoints(run_dir)?.newest)
}

/// Removes what killed processes left unfinished; returns the names. Only the process that holds the run may do so.
///
/// # Errors
/// The run opened again; a directory that cannot be read or removed.
pub fn clean_leftovers(run: &RunDir) -> Result<Vec<String>> {
    run.check()?;
    let mut removed = Vec::new();
    for name in names(&run.checkpoints())? {
        if name.starts_with(TMP_PREFIX) {
            let path = run.checkpoints().join(&name);
            fs::remove_dir_all(&path).map_err(|e| Error::io("remove an unfinished checkpoint", &path, e))?;
            removed.push(name);
        }
    }
    removed.sort();
    Ok(removed)
}

/// The steps of all `step-N` directories, ascending.
pub(super) fn list_steps(parent: &Path) -> Result<Vec<u64>> {
    let mut steps: Vec<u64> = names(parent)?.iter().filter_map(|name| parse_step(name)).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// `step-40` is 40; `step-040` and `step-40.damaged-1` are nothing.
fn parse_step(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (name == format!("step-{step}")).then_some(step)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let failed = |e| Error::io("read the directory", dir, e);
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(failed)?.file_name().into_string().ok());
    }
    Ok(names)
}
