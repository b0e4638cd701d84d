//! What a run reports: one value for each step, kept in `metrics.jsonl`.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::exact_json::{self, any_f64};
use super::state::RunDir;
use crate::{Error, Result};

/// Name of the file of [`StepReport`]s in a run directory.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// Name of the file of [`EvalReport`]s in a run directory.
pub const EVALUATIONS_FILE: &str = "evaluations.jsonl";

/// One optimizer step, in numbers.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepReport {
    /// Optimizer steps done, this one counted: the first report has 1.
    pub step: u64,
    /// Epochs done after it, as a fraction.
    #[serde(with = "any_f64")]
    pub epoch: f64,
    /// Mean cross-entropy in nats over all trained tokens of the step's micro-batches.
    #[serde(with = "any_f64")]
    pub loss: f64,
    /// Total norm of the gradients before clipping.
    #[serde(with = "any_f64")]
    pub grad_norm: f64,
    /// The learning rate that this step used.
    #[serde(with = "any_f64")]
    pub learning_rate: f64,
    /// Tokens in its micro-batches.
    pub tokens: u64,
    /// Those that had a label.
    pub trained_tokens: u64,
    /// `tokens / seconds`.
    #[serde(with = "any_f64")]
    pub tokens_per_second: f64,
    /// Wall-clock time of the step, checkpoints and evaluations not counted.
    #[serde(with = "any_f64")]
    pub seconds: f64,
    /// Of it: choosing and laying out the micro-batches.
    #[serde(with = "any_f64")]
    pub data_seconds: f64,
    /// Of it: forward passes.
    #[serde(with = "any_f64")]
    pub forward_seconds: f64,
    /// Of it: backward passes, recomputation counted.
    #[serde(with = "any_f64")]
    pub backward_seconds: f64,
    /// Of it: gradient norm, clipping and the optimizer.
    #[serde(with = "any_f64")]
    pub optimizer_seconds: f64,
    /// Bytes of the arena that the plan allocated; the same at every step.
    pub arena_bytes: u64,
    /// Whether the gradients were scaled down to `max_grad_norm`.
    pub clipped: bool,
    /// Whether it is the first step after the run was resumed.
    pub resumed: bool,
}

impl StepReport {
    /// The time of the step by stage, in seconds.
    pub fn stages(&self) -> Vec<(String, f64)> {
        [
            ("data", self.data_seconds),
            ("forward", self.forward_seconds),
            ("backward", self.backward_seconds),
            ("optimizer", self.optimizer_seconds),
        ]
        .map(|(name, seconds)| (name.to_owned(), seconds))
        .to_vec()
    }
}

impl fmt::Display for StepReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {}  epoch {:.2}  loss {:.4}  grad_norm {:.3}{}  lr {:.2e}  {} tokens  {:.0} tokens/s",
            self.step,
            self.epoch,
            self.loss,
            self.grad_norm,
            if self.clipped { " (clipped)" } else { "" },
            self.learning_rate,
            self.tokens,
            self.tokens_per_second,
        )
    }
}

/// One evaluation, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalReport {
    /// Optimizer steps done when it was made.
    pub step: u64,
    /// Mean cross-entropy in nats over all labelled tokens of the evaluation set; its exponential is the perplexity.
    #[serde(with = "any_f64")]
    pub loss: f64,
    /// Examples.
    pub examples: u64,
    /// Tokens.
    pub tokens: u64,
    /// Those that had a label.
    pub trained_tokens: u64,
    /// Wall-clock time.
    #[serde(with = "any_f64")]
    pub seconds: f64,
}

impl EvalReport {
    /// `exp(loss)`: how many tokens the model hesitates between, on average.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

impl fmt::Display for EvalReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {}  evaluation loss {:.4}  perplexity {:.2}  {} tokens of {} examples",
            self.step,
            self.loss,
            self.perplexity(),
            self.trained_tokens,
            self.examples
        )
    }
}

/// All that a run has reported so far.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
#[derive(Clone, Default, PartialEq)]
pub struct Metrics {
    /// Every step, ascending.
    pub steps: Vec<StepReport>,
    /// Every evaluation, ascending.
    pub evaluations: Vec<EvalReport>,
}

impl Metrics {
    /// Reads the reports of a run directory, also of one that is training now. A last line that was cut short is left out.
    ///
    /// # Errors
    /// A file that cannot be read, and any other damaged line, with its number.
    pub fn read(run_dir: impl AsRef<Path>) -> Result<Self> {
        let dir = run_dir.as_ref();
        Ok(Metrics {
            steps: read_lines(&dir.join(METRICS_FILE))?.reports,
            evaluations: read_lines(&dir.join(EVALUATIONS_FILE))?.reports,
        })
    }

    /// Steps (done) at which the run was resumed, ascending: where a plot draws a line.
    pub fn resumes(&self) -> Vec<u64> {
        self.steps.iter().filter(|r| r.resumed).map(|r| r.step.saturating_sub(1)).collect()
    }
}

/// The reports of a run that trains: appended to files, one line each.
#[derive(Debug)]
pub struct MetricsLog {
    run: RunDir,
    steps: Lines,
    evaluations: Lines,
    resumed: bool,
}

impl MetricsLog {
    /// The log of a new run.
    ///
    /// # Errors
    /// The run opened again; files that cannot be written.
    pub fn create(run: &RunDir) -> Result<Self> {
        Self::open(run, 0, false)
    }

    /// The log of a run that continues from optimizer step `step`: what was reported after that step is cut off, because
    /// it will be reported again, and so is a last line that was cut short.
    ///
    /// # Errors
    /// The run opened again; files that cannot be read or written; a damaged line in the part that is kept.
    pub fn resume(run: &RunDir, step: u64) -> Result<Self> {
        Self::open(run, step, true)
    }

    fn open(run: &RunDir, step: u64, resumed: bool) -> Result<Self> {
        run.check()?;
        let steps = Lines::open::<StepReport>(run.path().join(METRICS_FILE), step)?;
        let evaluations = Lines::open::<EvalReport>(run.path().join(EVALUATIONS_FILE), step)?;
        Ok(MetricsLog { run: run.clone(), steps, evaluations, resumed })
    }

    /// Appends the report of a step; the first after a resume is marked as such. Returns it as written.
    ///
    /// # Errors
    /// The run opened again; a full disk: the file then ends where it did before.
    pub fn append(&mut self, mut report: StepReport) -> Result<StepReport> {
        self.run.check()?;
        report.resumed = self.resumed;
        self.steps.append(&report)?;
        self.resumed = false;
        Ok(report)
    }

    /// Appends the report of an evaluation.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_evaluation(&mut self, report: &EvalReport) -> Result<()> {
        self.run.check()?;
        self.evaluations.append(report)
    }
}

/// A report that knows its step.
trait Report: Serialize + DeserializeOwned {
    fn step(&self) -> u64;
}

impl Report for StepReport {
    fn step(&self) -> u64 {
        self.step
    }
}

impl Report for EvalReport {
    fn step(&self) -> u64 {
        self.step
    }
}

/// A file of JSON lines that only grows, except at its opening.
#[derive(Debug)]
struct Lines {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Lines {
    /// Opens the file and cuts it after the last report of a step up to `last`.
    fn open<T: Report>(path: PathBuf, last: u64) -> Result<Self> {
        let found: Found<T> = read_lines_until(&path, last)?;
        let failed = |e| Error::io("open", &path, e);
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() > found.bytes {
            file.set_len(found.bytes).and_then(|()| file.sync_all()).map_err(failed)?;
        }
        Ok(Lines { path, file, bytes: found.bytes })
    }

    fn append(&mut self, report: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(report)
            .map_err(|e| Error::new("could not write JSON").at_path(&self.path).caused_by(e))?;
        line.push('\n');
        if let Err(e) = self.file.write_all(line.as_bytes()) {
            // Half a line in the middle of the file would make it unreadable.
            _ = self.file.set_len(self.bytes);
            return Err(Error::io("write", &self.path, e));
        }
        self.bytes += line.len() as u64;
        Ok(())
    }
}

/// Reports, and where the last of them ends in the file.
struct Found<T> {
    reports: Vec<T>,
    bytes: u64,
}

fn read_lines<T: Report>(path: &Path) -> Result<Found<T>> {
    read_lines_until(path, u64::MAX)
}

/// Reads until the first report of a step after `last`, or a line without an end.
fn read_lines_until<T: Report>(path: &Path, last: u64) -> Result<Found<T>> {
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        text => text.map_err(|e| Error::io("read", path, e))?,
    };
    let mut found = Found { reports: Vec::new(), bytes: 0 };
    for (n, line) in text.split_inclusive(|&b| b == b'\n').enumerate() {
        if !line.ends_with(b"\n") {
            break;
        }
        let report: T = parse_line(line).map_err(|e| e.at(format!("line {}", n + 1)).at_path(path))?;
        if report.step() > last {
            break;
        }
        found.bytes += line.len() as u64;
        found.reports.push(report);
    }
    Ok(found)
}

fn parse_line<T: Report>(line: &[u8]) -> Result<T> {
    let text = std::str::from_utf8(line).map_err(|e| Error::new("this line is not text").caused_by(e))?;
    exact_json::from_str(text)
}
