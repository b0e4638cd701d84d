//! [`RowFile`]: a file of rows that is looked at before it is read, and of which only the wanted part is read.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::data::Rows;
use crate::data::csv::CsvReader;
use crate::data::rows::{Place, Row, not_an_object};
use crate::{Error, Result, json};

/// How a file holds its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// One JSON object per line.
    Jsonl,
    /// A JSON list of objects.
    Json,
    /// Comma-separated values with a header.
    Csv,
    /// Tab-separated values with a header.
    Tsv,
    /// Apache Parquet, in any of its compressions.
    Parquet,
}

impl RowFormat {
    /// The format that a file's name says, by its last extension in any case.
    ///
    /// # Errors
    /// Another extension, or none.
    pub fn of(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "jsonl" | "ndjson" => Ok(RowFormat::Jsonl),
            "json" => Ok(RowFormat::Json),
            "csv" => Ok(RowFormat::Csv),
            "tsv" => Ok(RowFormat::Tsv),
            "parquet" => Ok(RowFormat::Parquet),
            _ => Err(Error::new("the name of this file does not say what it holds")
                .at_path(path)
                .expected(".jsonl, .ndjson, .json, .csv, .tsv or .parquet")
                .found(if extension.is_empty() { "no extension".into() } else { format!(".{extension}") })
                .next("rename it, or unpack it if it is an archive")),
        }
    }
}

/// Which part of a file is read.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// `None`: all columns.
    pub columns: Option<Vec<String>>,
    /// The first row, counted from 0.
    pub start: usize,
    /// At most so many rows.
    pub len: usize,
}

impl Default for Part {
    fn default() -> Self {
        Part { columns: None, start: 0, len: usize::MAX }
    }
}

impl Part {
    fn wants(&self, i: usize) -> bool {
        i >= self.start && i - self.start < self.len
    }

    fn is_behind(&self, i: usize) -> bool {
        i >= self.start && i - self.start >= self.len
    }

    /// The wanted columns of a row.
    fn project(&self, mut values: Map<String, Value>) -> Map<String, Value> {
        if let Some(columns) = &self.columns {
            values.retain(|name, _| columns.contains(name));
        }
        values
    }

    /// All wanted columns must be somewhere.
    fn check(&self, rows: Rows) -> Result<Rows> {
        if let Some(columns) = &self.columns {
            rows.require(columns)?;
        }
        Ok(rows)
    }
}

/// A file of rows that has not been read: its columns are known, and which of its rows and columns are wanted.
///
/// Of Parquet, the footer alone is read until [`read`](RowFile::read), and then the wanted columns and row groups; of the
/// others, the first row, and then the file up to the last wanted row.
///
/// ```no_run
/// use tunebook::data::RowFile;
/// let file = RowFile::open("train.parquet")?;
/// println!("{file:?}");
/// let rows = file.select(&["instruction", "output"]).slice(0, 1000).read()?;
/// # Ok::<(), tunebook::Error>(())
/// ```
#[derive(Clone)]
pub struct RowFile {
    path: PathBuf,
    format: RowFormat,
    columns: Vec<String>,
    len: Option<usize>,
    part: Part,
}

impl RowFile {
    /// Looks at a file, whose name says its format ([`RowFormat::of`]).
    ///
    /// # Errors
    /// An unknown extension; a file that cannot be read; a Parquet footer, CSV header or first row that is not valid.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let format = RowFormat::of(&path)?;
        let first = Part { len: 1, ..Part::default() };
        let (columns, len) = match format {
            RowFormat::Jsonl => (read_jsonl(&path, &first)?.columns().to_vec(), None),
            RowFormat::Json => {
                let rows = read_json(&path, &Part::default())?;
                (rows.columns().to_vec(), Some(rows.len()))
            }
            RowFormat::Csv | RowFormat::Tsv => (csv_header(&mut csv_reader(&path)?)?, None),
            #[cfg(feature = "polars")]
            RowFormat::Parquet => super::parquet::look(&path).map(|(columns, len)| (columns, Some(len)))?,
            #[cfg(not(feature = "polars"))]
            RowFormat::Parquet => return Err(no_parquet(&path)),
        };
        Ok(RowFile { path, format, columns, len, part: Part::default() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it holds its rows.
    pub fn format(&self) -> RowFormat {
        self.format
    }

    /// Its columns; of JSONL, those of the first row.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Number of rows in the whole file, where it is known without reading it: Parquet and JSON.
    pub fn rows(&self) -> Option<usize> {
        self.len
    }

    /// Only these columns are read.
    pub fn select(mut self, columns: &[&str]) -> Self {
        self.part.columns = Some(columns.iter().map(|c| (*c).to_owned()).collect());
        self
    }

    /// Only `len` rows from row `start` (from 0) on are read, or as many as there are.
    pub fn slice(mut self, start: usize, len: usize) -> Self {
        (self.part.start, self.part.len) = (start, len);
        self
    }

    /// Reads the wanted part.
    ///
    /// # Errors
    /// As the reader of its format ([`Rows::from_jsonl`] and so on), and a wanted column that is not there.
    pub fn read(&self) -> Result<Rows> {
        match self.format {
            RowFormat::Jsonl => read_jsonl(&self.path, &self.part),
            RowFormat::Json => read_json(&self.path, &self.part),
            RowFormat::Csv | RowFormat::Tsv => read_csv(&self.path, &self.part),
            #[cfg(feature = "polars")]
            RowFormat::Parquet => read_parquet(&self.path, &self.part),
            #[cfg(not(feature = "polars"))]
            RowFormat::Parquet => Err(no_parquet(&self.path)),
        }
    }
}

impl fmt::Debug for RowFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = self.len.map_or("rows not counted".into(), |n| format!("{n} rows"));
        write!(f, "RowFile({}, {:?}, {len}, columns {})", self.path.display(), self.format, self.columns.join(", "))
    }
}

#[cfg(not(feature = "polars"))]
fn no_parquet(path: &Path) -> Error {
    Error::new("this build reads no Parquet")
        .at_path(path)
        .next("build with the feature `polars`, or convert the file to JSONL")
}

pub(super) fn read_jsonl(path: &Path, part: &Part) -> Result<Rows> {
    let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let source: Arc<str> = path.display().to_string().into();
    let (mut rows, mut bytes, mut i) = (vec![], vec![], 0);
    for number in 1.. {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).map_err(|e| Error::io("read", path, e))? == 0 || part.is_behind(i) {
            break;
        }
        let text = bytes.strip_prefix(b"\xEF\xBB\xBF").filter(|_| number == 1).unwrap_or(&bytes);
        if text.trim_ascii().is_empty() {
            continue;
        }
        if part.wants(i) {
            let place = Place { source: source.clone(), number, is_line: true };
            let values = part.project(parse_line(text).map_err(|e| e.at(place.to_string()))?);
            rows.push(Row { place, values });
        }
        i += 1;
    }
    part.check(Rows::new(rows, &source)?)
}

fn parse_line(text: &[u8]) -> Result<Map<String, Value>> {
    match json::parse(text) {
        Ok(Value::Object(values)) => Ok(values),
        Ok(other) => Err(not_an_object(&other)),
        Err(e) => Err(Error::new("a line is not JSON")
            .expected("one JSON object per line (JSONL), no key twice")
            .caused_by(e)
            .next("a file that is one JSON list must be named .json; an object over several lines must be put on one")),
    }
}

pub(super) fn read_json(path: &Path, part: &Part) -> Result<Rows> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    let form = "a list of objects, or an object with one such list in it";
    let value = json::parse(text).map_err(|e| {
        Error::new("the file is not JSON")
            .at_path(path)
            .expected(form)
            .caused_by(e)
            .next("a file with one object per line must be named .jsonl")
    })?;
    let list = match value {
        Value::Array(list) => list,
        Value::Object(map) => {
            let mut lists: Vec<Vec<Value>> = map
                .into_iter()
                .filter_map(|(_, v)| if let Value::Array(list) = v { Some(list) } else { None })
                .filter(|list| list.iter().all(Value::is_object))
                .collect();
            let n = lists.len();
            lists.pop().filter(|_| n == 1).ok_or_else(|| {
                Error::new("the file does not hold one list of rows")
                    .at_path(path)
                    .expected(form)
                    .found(format!("an object with {n} lists of objects"))
                    .next("convert it to a list of objects, one for each row")
            })?
        }
        other => return Err(not_an_object(&other).at_path(path).expected(form)),
    };
    let source: Arc<str> = path.display().to_string().into();
    let rows = list.into_iter().enumerate().filter(|(i, _)| part.wants(*i));
    let row = |(i, value): (usize, Value)| {
        let place = Place { source: source.clone(), number: i + 1, is_line: false };
        match value {
            Value::Object(values) => Ok(Row { place, values: part.project(values) }),
            other => Err(not_an_object(&other).at(place.to_string())),
        }
    };
    part.check(Rows::new(rows.map(row).collect::<Result<_>>()?, &source)?)
}

fn csv_reader(path: &Path) -> Result<CsvReader> {
    CsvReader::open(path, if RowFormat::of(path).ok() == Some(RowFormat::Tsv) { b'\t' } else { b',' })
}

/// Names of the columns: the first record.
fn csv_header(reader: &mut CsvReader) -> Result<Vec<String>> {
    let columns = reader.next()?.map_or_else(Vec::new, |record| record.fields);
    match columns.iter().enumerate().find(|(i, c)| columns[..*i].contains(c)) {
        Some((_, twice)) => Err(Error::new("two columns have the same name")
            .at(format!("{}:1", reader.path().display()))
            .expected("a header with a name for each column")
            .found(format!("`{twice}` twice"))
            .next("give each column a name of its own")),
        None => Ok(columns),
    }
}

pub(super) fn read_csv(path: &Path, part: &Part) -> Result<Rows> {
    let mut reader = csv_reader(path)?;
    let columns = csv_header(&mut reader)?;
    let source: Arc<str> = path.display().to_string().into();
    let (mut rows, mut i) = (vec![], 0);
    while !part.is_behind(i)
        && let Some(record) = reader.next()?
    {
        let place = Place { source: source.clone(), number: record.line, is_line: true };
        if record.fields.len() != columns.len() {
            return Err(Error::new("a row has another number of fields than the header")
                .at(place.to_string())
                .expected(format!("{} fields", columns.len()))
                .found(format!("{} fields", record.fields.len()))
                .next("put quotes around fields that hold the separator or line breaks"));
        }
        if part.wants(i) {
            let values = columns.iter().zip(record.fields).map(|(name, text)| (name.clone(), text.into()));
            rows.push(Row { place, values: part.project(values.collect()) });
        }
        i += 1;
    }
    part.check(Rows::new(rows, &source)?)
}

#[cfg(feature = "polars")]
pub(super) fn read_parquet(path: &Path, part: &Part) -> Result<Rows> {
    let source: Arc<str> = path.display().to_string().into();
    let values = super::parquet::read(path, part)?;
    let row = |(i, values)| Row {
        place: Place { source: source.clone(), number: part.start + i + 1, is_line: false },
        values,
    };
    Rows::new(values.into_iter().enumerate().map(row).collect(), &source)
}
