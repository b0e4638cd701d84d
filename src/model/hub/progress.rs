//! How far a download is.

use std::time::{Duration, Instant};

use crate::display;

/// A download under way, as it is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct DownloadProgress {
    /// The repository.
    pub repo: String,
    /// The file that is being downloaded.
    pub file: String,
    /// Bytes of all wanted files that are there.
    pub bytes: u64,
    /// Bytes of all wanted files.
    pub total: u64,
    /// Bytes per second since the download began, those that were there before left out.
    pub bytes_per_second: f64,
}

/// Shows progress from time to time, and nothing at all for what is there or done within moments.
pub(super) struct Reporter {
    shown: DownloadProgress,
    /// Bytes of the files before this one.
    before: u64,
    file_size: u64,
    start: Instant,
    /// Bytes that came over the network.
    received: u64,
    last: u64,
    next_line: Instant,
    has_shown: bool,
}

/// Long enough that a notebook with a line for each is still readable.
const BETWEEN_LINES: Duration = Duration::from_secs(5);
const BETWEEN_UPDATES: Duration = Duration::from_millis(250);
/// What is done sooner shows nothing.
const FIRST: Duration = Duration::from_secs(1);

impl Reporter {
    pub fn new(repo: String, total: u64) -> Self {
        let shown = DownloadProgress { repo, file: String::new(), bytes: 0, total, bytes_per_second: 0.0 };
        let start = Instant::now();
        Reporter {
            shown,
            before: 0,
            file_size: 0,
            start,
            received: 0,
            last: 0,
            next_line: start + FIRST,
            has_shown: false,
        }
    }

    /// The next file.
    pub fn begin(&mut self, name: &str, size: u64) {
        self.before += self.file_size;
        name.clone_into(&mut self.shown.file);
        (self.file_size, self.last) = (size, u64::MAX);
    }

    /// So many bytes of the file are there; the first call of a file tells what was there before.
    pub fn bytes(&mut self, bytes: u64) {
        if self.last != u64::MAX {
            self.received += bytes.saturating_sub(self.last);
        }
        self.last = bytes;
        self.shown.bytes = self.before + bytes;
        self.shown.bytes_per_second = self.received as f64 / self.start.elapsed().as_secs_f64().max(1e-3);
        if Instant::now() >= self.next_line {
            self.show();
        }
    }

    /// After the last file.
    pub fn finish(&mut self) {
        if self.has_shown {
            self.shown.bytes = self.shown.total;
            self.show();
        }
    }

    fn show(&mut self) {
        self.has_shown = true;
        let wait = if display::is_live() {
            display::update("tunebook-download", &self.shown);
            BETWEEN_UPDATES
        } else {
            display::line(&self.shown.line());
            BETWEEN_LINES
        };
        self.next_line = Instant::now() + wait;
    }
}
