//! Parquet files through polars' reader: the footer first, then the wanted columns, some thousand rows at a time.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use polars::io::SerReader;
use polars::io::parquet::read::ParquetReader;
use polars::prelude::PolarsResult;
use serde_json::{Map, Value};

use super::frame;
use super::row_file::Part;
use crate::data::Rows;
use crate::{Error, Result};

/// Rows that are decoded at a time, so that the tables do not stand in memory beside all the rows.
const ROWS: usize = 8192;

/// Columns and number of rows.
pub(super) fn look(path: &Path) -> Result<(Vec<String>, usize)> {
    guarded(path, |file| {
        let mut reader = ParquetReader::new(file);
        let columns = reader.schema()?.iter_names().map(|name| name.to_string()).collect();
        Ok((columns, reader.num_rows()?))
    })
}

/// The wanted rows and columns.
pub(super) fn read(path: &Path, part: &Part) -> Result<Vec<Map<String, Value>>> {
    let (columns, len) = look(path)?;
    if let Some(wanted) = &part.columns {
        Rows::require_in(wanted, &columns, &path.display().to_string())?;
    }
    let end = part.start.saturating_add(part.len).min(len);
    let mut rows = Vec::with_capacity(end.saturating_sub(part.start));
    for start in (part.start..end).step_by(ROWS) {
        let slice = (start, ROWS.min(end - start));
        let frame = guarded(path, |file| {
            ParquetReader::new(file).with_columns(part.columns.clone()).with_slice(Some(slice)).finish()
        })?;
        rows.extend(frame::to_maps(&frame, start).map_err(|e| {
            let e = e.at_path(path);
            if part.columns.is_none() { e.next("RowFile::open(..)?.select(&[..]) leaves columns out") } else { e }
        })?);
    }
    Ok(rows)
}

/// The reader trusts what a file says of itself in places, and panics where that is wrong.
fn guarded<T>(path: &Path, run: impl FnOnce(File) -> PolarsResult<T>) -> Result<T> {
    let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    let damaged = |found: String| {
        Error::new("the Parquet file cannot be read")
            .at_path(path)
            .expected("a whole Parquet file")
            .found(found)
            .next("download or write it again")
    };
    match catch_unwind(AssertUnwindSafe(|| run(file))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(damaged(e.to_string())),
        Err(_) => Err(damaged("what its reader did not expect".into())),
    }
}
