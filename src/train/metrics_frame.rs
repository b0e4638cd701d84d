//! Reports as a polars `DataFrame`.

use polars::prelude::{Column, DataFrame, IntoColumn, NamedFrom, Series};

use super::metrics::StepReport;
use crate::{Error, Result};

/// Step reports as a table: one row for each step, one column for each field, under the fields' names.
///
/// Read a run's reports with [`Metrics::read`](super::Metrics::read). Counts are `u64`, measurements `f64`, flags `bool`.
///
/// # Errors
/// None that a slice of reports can cause; polars' own error otherwise.
pub fn metrics_frame(reports: &[StepReport]) -> Result<DataFrame> {
    let counts = |name: &str, get: fn(&StepReport) -> u64| -> Column {
        Series::new(name.into(), reports.iter().map(get).collect::<Vec<u64>>()).into_column()
    };
    let numbers = |name: &str, get: fn(&StepReport) -> f64| -> Column {
        Series::new(name.into(), reports.iter().map(get).collect::<Vec<f64>>()).into_column()
    };
    let flags = |name: &str, get: fn(&StepReport) -> bool| -> Column {
        Series::new(name.into(), reports.iter().map(get).collect::<Vec<bool>>()).into_column()
    };
    let columns = vec![
        counts("step", |r| r.step),
        numbers("epoch", |r| r.epoch),
        numbers("loss", |r| r.loss),
        numbers("grad_norm", |r| r.grad_norm),
        numbers("learning_rate", |r| r.learning_rate),
        counts("tokens", |r| r.tokens),
        counts("trained_tokens", |r| r.trained_tokens),
        numbers("tokens_per_second", |r| r.tokens_per_second),
        numbers("seconds", |r| r.seconds),
        numbers("data_seconds", |r| r.data_seconds),
        numbers("forward_seconds", |r| r.forward_seconds),
        numbers("backward_seconds", |r| r.backward_seconds),
        numbers("optimizer_seconds", |r| r.optimizer_seconds),
        counts("arena_bytes", |r| r.arena_bytes),
        flags("clipped", |r| r.clipped),
        flags("resumed", |r| r.resumed),
    ];
    DataFrame::new(reports.len(), columns)
        .map_err(|e| Error::new("could not make a DataFrame of the reports").caused_by(e))
}
