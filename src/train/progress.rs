//! Lines of progress while steps run.

use std::time::Instant;

use super::StepReport;

/// Prints one line for each logged step, with what is left.
pub(super) struct Progress {
    first: u64,
    last: u64,
    total: u64,
    start: Instant,
}

impl Progress {
    /// Of the steps after `first` up to `last`, in a run of `total`.
    pub(super) fn new(first: u64, last: u64, total: u64) -> Self {
        Progress { first, last, total, start: Instant::now() }
    }

    /// After a step.
    pub(super) fn step(&self, r: &StepReport) {
        let per_step = self.start.elapsed().as_secs_f64() / (r.step - self.first).max(1) as f64;
        let left = per_step * (self.last - r.step) as f64;
        println!(
            "step {:>5}/{}  loss {:.4}  grad norm {:.3}  lr {:.2e}  {:.0} tokens/s  {} left",
            r.step,
            self.total,
            r.loss,
            r.grad_norm,
            r.learning_rate,
            r.tokens_per_second,
            duration(left)
        );
    }

    /// At the end of the loop.
    pub(super) fn finish(&self, interrupted: bool) {
        if interrupted {
            println!("interrupted between two micro-steps: everything is kept, the next call goes on");
        }
    }
}

fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        format!("{seconds:.0} s")
    } else {
        format!("{:.0} min {:02.0} s", (seconds / 60.0).floor(), seconds % 60.0)
    }
}
