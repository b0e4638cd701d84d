//! How a run shows that it is running.

use super::train::curves;
use super::units::{bytes, count, number, seconds};
use super::{Card, Cell, Show, Table};
use crate::train::StepReport;

/// Steps that run now.
pub(crate) struct RunProgress {
    /// Those done by this call.
    pub reports: Vec<StepReport>,
    /// The step at which this call ends.
    pub last: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// An estimate, in seconds.
    pub seconds_left: Option<f64>,
}

impl RunProgress {
    /// The newest step in one line.
    pub fn line(&self) -> String {
        let Some(r) = self.reports.last() else { return String::new() };
        format!(
            "step {:>width$}/{}  loss {:.4}  grad norm {:.3}  lr {:.2e}  {} tokens/s  {} left",
            r.step,
            self.total,
            r.loss,
            r.grad_norm,
            r.learning_rate,
            number(r.tokens_per_second, 3),
            self.seconds_left.map_or_else(|| "-".to_owned(), seconds),
            width = self.total.to_string().len()
        )
    }
}

impl Show for RunProgress {
    fn card(&self) -> Card {
        let done = self.reports.last().map_or(0, |r| r.step);
        let left = self.seconds_left.map_or_else(String::new, |s| format!(", {} left", seconds(s)));
        let mut bar = Table::new().words("").words("");
        let share = done as f64 / self.total.max(1) as f64;
        bar.row([format!("{} of {}", count(done), count(self.total)).into(), Cell::bar(share, 2)]);
        let goal = if self.last < self.total { format!(", to step {}", count(self.last)) } else { String::new() };
        let mut card = Card::new("Training")
            .subtitle(format!("step {} of {}{goal}{left}", count(done), count(self.total)))
            .table(bar);
        if let Some(r) = self.reports.last() {
            card = card.facts([
                ("now", format!("loss {:.4}, {} tokens/s", r.loss, number(r.tokens_per_second, 3))),
                ("memory", bytes(r.arena_bytes)),
            ]);
        }
        curves(card, &self.reports, &[])
    }
}
