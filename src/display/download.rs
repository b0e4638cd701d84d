//! How a download shows that it is going on.

use super::units::{bytes, percent, seconds};
use super::{Card, Cell, Show, Table};
use crate::model::hub::DownloadProgress;

impl DownloadProgress {
    /// The state in one line.
    pub fn line(&self) -> String {
        let share = percent(self.bytes as f64 / self.total.max(1) as f64);
        format!(
            "{}: {share} of {}, {}/s, {} left: {}",
            self.repo,
            bytes(self.total),
            bytes(self.bytes_per_second as u64),
            self.left(),
            self.file
        )
    }

    fn left(&self) -> String {
        let rest = self.total.saturating_sub(self.bytes) as f64;
        if rest == 0.0 || self.bytes_per_second > 0.0 {
            seconds(rest / self.bytes_per_second.max(1.0))
        } else {
            "-".into()
        }
    }
}

impl Show for DownloadProgress {
    fn card(&self) -> Card {
        let mut bar = Table::new().words("").words("");
        let share = self.bytes as f64 / self.total.max(1) as f64;
        bar.row([format!("{} of {}", bytes(self.bytes), bytes(self.total)).into(), Cell::bar(share, 2)]);
        Card::new(format!("Downloading {}", self.repo))
            .subtitle(format!("{}, {}/s, {} left", self.file, bytes(self.bytes_per_second as u64), self.left()))
            .table(bar)
    }
}
