//! Statistics of repeated measurements, and how a measurement is printed.

use std::io::Write;
use std::time::Instant;

use serde_json::Value;
use tunebook::{Error, Result};

/// Prints one measurement as one line of JSON.
///
/// # Errors
/// A stdout that was closed.
pub fn line(value: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    // Measurements take minutes: each is seen as soon as it is there.
    writeln!(out, "{value}").and_then(|()| out.flush()).map_err(|e| Error::io("write", "stdout", e))
}

/// What a call gave and the seconds that it took.
pub fn timed<R>(f: impl FnOnce() -> R) -> (R, f64) {
    let start = Instant::now();
    let out = f();
    (out, start.elapsed().as_secs_f64())
}

/// The middle value; the mean of the two in the middle for an even number of them; NaN for none.
pub fn median(values: &[f64]) -> f64 {
    let mut v = values.to_vec();
    v.sort_by(f64::total_cmp);
    match v.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => v[n / 2],
        n => (v[n / 2 - 1] + v[n / 2]) / 2.0,
    }
}

/// The smallest value; infinite for none.
pub fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Bytes for people.
pub fn gib(bytes: u64) -> String {
    format!("{:.3} GiB", bytes as f64 / (1u64 << 30) as f64)
}
