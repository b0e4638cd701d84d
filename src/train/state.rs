//! What a run is, on disk: its record ([`RunRecord`], `run.json`), its directory ([`RunDir`]) and where it stands
//! ([`TrainState`], a checkpoint's `state.json`).
//!
//! ```text
//! runs/demo/
//!   run.json               everything that was asked
//!   run.lock               held by the process that trains
//!   dataset.safetensors    the tokenized examples
//!   metrics.jsonl          one line for each optimizer step
//!   evaluations.jsonl      one line for each evaluation
//!   checkpoints/step-40/   see [`CheckpointDir`](super::CheckpointDir)
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::fingerprint::hex;
use super::lock::Hold;
use super::{TrainConfig, exact_json, fingerprint_dir};
use crate::data::Dataset;
use crate::model::ModelSpec;
use crate::{Error, Result, files};

/// The format of run directories that this version reads and writes.
pub const RUN_FORMAT_VERSION: u32 = 1;

/// The base model of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRecord {
    /// Its directory.
    pub dir: PathBuf,
    /// [`fingerprint_dir`](super::fingerprint_dir) of it.
    pub fingerprint: String,
}

impl BaseRecord {
    /// The record of a model directory, under its absolute path, so that a run resumes from any working directory.
    ///
    /// # Errors
    /// As [`fingerprint_dir`](super::fingerprint_dir).
    pub fn of(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().canonicalize().map_err(|e| Error::io("open the base model", dir.as_ref(), e))?;
        Ok(BaseRecord { fingerprint: fingerprint_dir(&dir)?, dir })
    }

    /// Checks that the directory still holds that model.
    ///
    /// # Errors
    /// No directory there, or one with other files.
    pub fn check(&self) -> Result<()> {
        let found = fingerprint_dir(&self.dir)?;
        if found == self.fingerprint {
            return Ok(());
        }
        Err(Error::new("the base model is not the one that this run was created with")
            .at_path(&self.dir)
            .expected(format!("fingerprint {}", self.fingerprint))
            .found(format!("fingerprint {found}"))
            .next("put the original files back, or start a new run"))
    }
}

/// The data set of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetRecord {
    /// [`Dataset::fingerprint`](crate::data::Dataset::fingerprint): SHA-256 of the tokenized examples.
    pub fingerprint: String,
    /// Number of examples.
    pub examples: usize,
}

impl DatasetRecord {
    /// The record of a data set.
    pub fn of(dataset: &Dataset) -> Self {
        DatasetRecord { fingerprint: dataset.fingerprint(), examples: dataset.len() }
    }

    /// Checks that this is that data set.
    ///
    /// # Errors
    /// Another fingerprint.
    pub fn check(&self, dataset: &Dataset) -> Result<()> {
        let found = Self::of(dataset);
        if found == *self {
            return Ok(());
        }
        Err(Error::new("the data set is not the one that this run was created with")
            .expected(format!("{} examples, fingerprint {}", self.examples, self.fingerprint))
            .found(format!("{} examples, fingerprint {}", found.examples, found.fingerprint))
            .next("give the same rows, tokenizer and template, or start a new run"))
    }
}

/// Everything that was asked when the run was created: the content of `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// [`RUN_FORMAT_VERSION`].
    pub format_version: u32,
    /// The version of this crate that created the run.
    pub tunebook_version: String,
    /// The shape of the model.
    pub spec: ModelSpec,
    /// The LoRA configuration; null for full fine-tuning.
    pub lora: Value,
    /// The training configuration.
    pub train: TrainConfig,
    /// The inputs of the memory plan.
    pub plan: Value,
    /// The base model.
    pub base: BaseRecord,
    /// The data set.
    pub dataset: DatasetRecord,
}

impl RunRecord {
    /// A record in this version's format.
    pub fn new(
        spec: ModelSpec,
        lora: Value,
        train: TrainConfig,
        plan: Value,
        base: BaseRecord,
        dataset: DatasetRecord,
    ) -> Self {
        RunRecord {
            format_version: RUN_FORMAT_VERSION,
            tunebook_version: env!("CARGO_PKG_VERSION").to_owned(),
            spec,
            lora,
            train,
            plan,
            base,
            dataset,
        }
    }

    /// Reads `run.json` of a run directory without opening the run for writing.
    ///
    /// # Errors
    /// No run there, another format version, a damaged file.
    pub fn read(run_dir: impl AsRef<Path>) -> Result<Self> {
        let path = run_dir.as_ref().join("run.json");
        if !path.exists() {
            return Err(Error::new("there is no run here")
                .at_path(run_dir)
                .expected("a directory with a run.json")
                .found(if run_dir_exists(&path) { "a directory without one" } else { "no such directory" })
                .next("check the path; `Run::create` makes a new run"));
        }
        let text = files::read_to_string(&path)?;
        let record = parse_versioned(&path, &text)?;
        check_sum(&path, &text)?;
        Ok(record)
    }
}

/// What the line of `run.json` begins with that holds the SHA-256 of all its other lines: a bit that flips in a learning
/// rate would train another model.
const SUM: &str = "  \"sha256\": \"";

/// Puts the checksum's line behind the first.
fn with_sum(text: &str) -> String {
    match text.split_once('\n') {
        Some((first, rest)) => format!("{first}\n{SUM}{}\",\n{rest}", sha256_hex(text.as_bytes())),
        None => text.to_owned(),
    }
}

fn sha256_hex(bytes: &[u8]) -> String {
    hex(Sha256::new_with_prefix(bytes))
}

fn check_sum(path: &Path, text: &str) -> Result<()> {
    let lines = text.split_inclusive('\n');
    let (sums, rest): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with(SUM));
    let found = sha256_hex(rest.concat().as_bytes());
    let said = sums.first().map(|line| line.trim_start_matches(SUM).trim_end().trim_end_matches("\","));
    if said == Some(found.as_str()) {
        return Ok(());
    }
    Err(Error::new("the record of this run is damaged or was edited")
        .at_path(path)
        .expected(format!("SHA-256 {}", said.unwrap_or("in the second line")))
        .found(format!("SHA-256 {found}"))
        .next("put a copy in its place, or start a new run: a run cannot change what it was asked"))
}

fn run_dir_exists(path: &Path) -> bool {
    path.parent().is_some_and(Path::is_dir)
}

/// Where the random numbers stand. They are counter-based: a seed and a count give any of them again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// The run's seed.
    pub seed: u64,
    /// Micro-steps done since the start: the counter of dropout masks.
    pub micro_steps: u64,
}

/// Where a run stands, at an optimizer-step boundary: the content of a checkpoint's `state.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps done.
    pub step: u64,
    /// The epoch of the next micro-batch, from 0.
    pub epoch: u64,
    /// The next micro-batch within that epoch, from 0.
    pub next_batch: u64,
    /// Examples seen.
    pub examples: u64,
    /// Tokens seen.
    pub total_tokens: u64,
    /// Tokens that had a label.
    pub trained_tokens: u64,
    /// The random numbers.
    pub rng: RngState,
    /// Steps (as `step` above) at which the run was resumed, in the order of time.
    pub resumes: Vec<u64>,
}

/// A run directory that this process may write. Cloning shares it.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
    hold: Arc<Hold>,
}

impl RunDir {
    /// Makes the directory of a new run. It becomes a run with [`commit`](Self::commit); until then nothing resumes it.
    ///
    /// # Errors
    /// A run that is already there, or files of one; a directory that cannot be written; another process in it.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // Empty ones are what a creation leaves that was cut short before `commit`.
        let used = |file: &str| {
            let path = path.join(file);
            std::fs::read_dir(&path)
                .map_or_else(|_| std::fs::metadata(&path).is_ok_and(|m| m.len() > 0), |d| d.count() > 0)
        };
        if let Some(file) = ["run.json", "metrics.jsonl", "checkpoints"].into_iter().find(|file| used(file)) {
            return Err(Error::new("there is already a run here")
                .at_path(path)
                .expected("a new or empty directory")
                .found(file)
                .next("continue it with `Run::resume`, or choose another directory"));
        }
        files::create_dir_all(path)?;
        Ok(RunDir { hold: Arc::new(Hold::take(path)?), path: path.to_owned() })
    }

    /// Writes `run.json`: from now on the directory is a run.
    ///
    /// # Errors
    /// Input or output errors; the run opened again elsewhere.
    pub fn commit(&self, record: &RunRecord) -> Result<()> {
        self.check()?;
        let path = self.path.join("run.json");
        files::write_atomic_bytes(&path, with_sum(&json_text(&path, record)?).as_bytes())
    }

    /// Opens a run for writing, and its record. An older opening in this process no longer writes.
    ///
    /// # Errors
    /// As [`RunRecord::read`]; another process that has the run open.
    pub fn open(path: impl AsRef<Path>) -> Result<(Self, RunRecord)> {
        let path = path.as_ref();
        let record = RunRecord::read(path)?;
        Ok((RunDir { hold: Arc::new(Hold::take(path)?), path: path.to_owned() }, record))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `dataset.safetensors` in it, for [`save_dataset`](super::save_dataset).
    pub fn dataset(&self) -> PathBuf {
        self.path.join("dataset.safetensors")
    }

    /// `checkpoints/` in it.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// An error if this value may no longer write: the run was opened again.
    ///
    /// # Errors
    /// Then, naming the directory.
    pub fn check(&self) -> Result<()> {
        self.hold.check()
    }
}

pub(super) fn json_text(path: &Path, value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value);
    text.map(|t| t + "\n").map_err(|e| Error::new("could not write JSON").at_path(path).caused_by(e))
}

/// Reads a JSON file that has a `format_version`, refusing other versions before anything else in it is looked at.
pub(super) fn read_versioned<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    parse_versioned(path, &files::read_to_string(path)?)
}

fn parse_versioned<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    let value = exact_json::value(text).map_err(|e| e.at_path(path))?;
    match value.get("format_version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(RUN_FORMAT_VERSION) => {}
        version => {
            let found = version.map_or("no format_version".into(), |v| format!("format version {v}"));
            let newer = version.is_some_and(|v| v > u64::from(RUN_FORMAT_VERSION));
            return Err(Error::new("this run was written in another format")
                .at_path(path)
                .expected(format!("format version {RUN_FORMAT_VERSION}"))
                .found(found)
                .next(if newer {
                    "use a newer version of tunebook"
                } else {
                    "use the version of tunebook that wrote it"
                }));
        }
    }
    serde_json::from_value(value).map_err(|e| {
        Error::new("a field of this file is wrong")
            .at_path(path)
            .expected("what this version of tunebook writes")
            .caused_by(e)
            .next("the file was changed or damaged: use a copy, or start a new run")
    })
}
