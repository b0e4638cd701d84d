//! Progress while steps run: lines of text, or one display that is updated where the front end can.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::StepReport;
use crate::display::{self, RunProgress};

/// A front end that redraws is given time to do so.
const BETWEEN_UPDATES: Duration = Duration::from_millis(250);
/// Drawing takes at most this share of the time: a curve of many steps is drawn less often.
const SHARE: u32 = 50;

/// Each loop has a display of its own.
static LOOPS: AtomicU64 = AtomicU64::new(1);

/// Tells of each logged step, with what is left.
pub(super) struct Progress {
    first: u64,
    last: u64,
    every: u64,
    start: Instant,
    updated: Option<Instant>,
    between: Duration,
    id: String,
    shown: RunProgress,
}

impl Progress {
    /// Of the steps after `first` up to `last`, in a run of `total`; a line for each `every` steps.
    pub(super) fn new(first: u64, last: u64, total: u64, every: u64) -> Self {
        let shown = RunProgress { reports: Vec::new(), last, total, seconds_left: None };
        let id = format!("tunebook-run-{}", LOOPS.fetch_add(1, Ordering::Relaxed));
        let between = BETWEEN_UPDATES;
        Progress { first, last, every: every.max(1), start: Instant::now(), updated: None, between, id, shown }
    }

    /// After each step.
    pub(super) fn step(&mut self, r: &StepReport) {
        let per_step = self.start.elapsed().as_secs_f64() / (r.step - self.first).max(1) as f64;
        self.shown.seconds_left = Some(per_step * (self.last - r.step) as f64);
        self.shown.reports.push(r.clone());
        if display::is_live() {
            if self.updated.is_none_or(|t| t.elapsed() >= self.between) {
                self.update();
            }
        } else if r.step.is_multiple_of(self.every) || r.step == self.last {
            display::line(&self.shown.line());
        }
    }

    /// At the end of the loop.
    pub(super) fn finish(&mut self, interrupted: bool) {
        if display::is_live() && !self.shown.reports.is_empty() {
            self.update();
        }
        if interrupted {
            display::line("interrupted between two micro-steps: everything is kept, the next call goes on");
        }
    }

    fn update(&mut self) {
        let began = Instant::now();
        display::update(&self.id, &self.shown);
        self.between = BETWEEN_UPDATES.max(began.elapsed() * SHARE);
        self.updated = Some(Instant::now());
    }
}
