//! [`Rows`]: a table of training rows, as the file has them.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Map, Value};

use crate::data::sampler::shuffle;
use crate::data::{RowFile, row_file};
use crate::{Error, Result};

/// Rows with named columns, each value as JSON has it. Cloning shares them.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
#[derive(Clone)]
pub struct Rows {
    rows: Arc<Vec<Row>>,
    columns: Arc<Vec<String>>,
    source: Arc<str>,
}

/// One row, and where it came from.
#[derive(Clone)]
pub(super) struct Row {
    pub place: Place,
    pub values: Map<String, Value>,
}

/// Where a row came from.
#[derive(Clone)]
pub(super) struct Place {
    /// The file, or `rows`.
    pub source: Arc<str>,
    /// Line of the file or number of the row, from 1.
    pub number: usize,
    /// Whether `number` counts lines: files in which a row has no line of its own count rows.
    pub is_line: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}{}", self.source, if self.is_line { "" } else { " row " }, self.number)
    }
}

impl Rows {
    /// Reads a file of rows: `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, known by its name.
    ///
    /// [`RowFile::open`] looks at a file before it is read, and reads parts of it.
    ///
    /// # Errors
    /// As [`RowFile::open`] and [`RowFile::read`].
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        RowFile::open(path)?.read()
    }

    /// Reads a JSONL file: one JSON object per line. Blank lines are skipped.
    ///
    /// # Errors
    /// A file that cannot be read, holds no row, or has a line that is not UTF-8 or not a JSON object; the place is
    /// `file:line`.
    pub fn from_jsonl(path: impl AsRef<Path>) -> Result<Self> {
        row_file::read_jsonl(path.as_ref(), &row_file::Part::default())
    }

    /// Reads a JSON file: a list of objects, or an object with one such list in it (`{"data": [...]}`).
    ///
    /// # Errors
    /// A file that cannot be read, is not of that form, or holds no row.
    pub fn from_json(path: impl AsRef<Path>) -> Result<Self> {
        row_file::read_json(path.as_ref(), &row_file::Part::default())
    }

    /// Reads a CSV file with a header (by `.tsv` in its name, separated by tabs). All values are text; empty fields are
    /// empty text.
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8, or holds no row; columns of one name; a row with another number of fields
    /// than the header, with its line.
    pub fn from_csv(path: impl AsRef<Path>) -> Result<Self> {
        row_file::read_csv(path.as_ref(), &row_file::Part::default())
    }

    /// Reads a Parquet file, in any of its compressions.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged or holds no row; a column of a type that rows cannot hold, such as dates
    /// ([`RowFile::select`] leaves columns out).
    #[cfg(feature = "polars")]
    pub fn from_parquet(path: impl AsRef<Path>) -> Result<Self> {
        row_file::read_parquet(path.as_ref(), &row_file::Part::default())
    }

    /// Rows made in code: each value a JSON object.
    ///
    /// ```
    /// use tunebook::data::Rows;
    /// let rows = Rows::from_values(vec![serde_json::json!({"instruction": "Say hello.", "output": "Hello!"})])?;
    /// assert_eq!(rows.columns(), ["instruction", "output"]);
    /// # Ok::<(), tunebook::Error>(())
    /// ```
    ///
    /// # Errors
    /// No value, or one that is not an object.
    pub fn from_values(values: Vec<Value>) -> Result<Self> {
        let source: Arc<str> = "rows".into();
        Rows::from_list(values, &source)
    }

    /// Rows of a list whose rows have numbers and no lines.
    pub(super) fn from_list(values: Vec<Value>, source: &Arc<str>) -> Result<Self> {
        let row = |(i, value): (usize, Value)| {
            let place = Place { source: source.clone(), number: i + 1, is_line: false };
            match value {
                Value::Object(values) => Ok(Row { place, values }),
                other => Err(not_an_object(&other).at(place.to_string())),
            }
        };
        Rows::new(values.into_iter().enumerate().map(row).collect::<Result<_>>()?, source)
    }

    pub(super) fn new(rows: Vec<Row>, source: &str) -> Result<Self> {
        if rows.is_empty() {
            return Err(Error::new("there are no rows").at(source).expected("at least one JSON object").found("none"));
        }
        let mut columns: Vec<String> = vec![];
        let mut seen = std::collections::HashSet::new();
        for key in rows.iter().flat_map(|row| row.values.keys()) {
            if seen.insert(key.as_str()) {
                columns.push(key.clone());
            }
        }
        Ok(Rows { rows: Arc::new(rows), columns: Arc::new(columns), source: source.into() })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Always false when it was read from somewhere: no rows are an error.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Names of all columns, in the order in which they first appear.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Row `i`, counted from 0.
    pub fn get(&self, i: usize) -> Option<&Map<String, Value>> {
        self.rows.get(i).map(|row| &row.values)
    }

    /// Where row `i` came from: `file:line`, or `file: row 3` where rows have no lines.
    pub fn place(&self, i: usize) -> String {
        let unknown = || format!("{}: row {}", self.source, i + 1);
        self.rows.get(i).map_or_else(unknown, |row| row.place.to_string())
    }

    /// The file, or `rows`.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The first `n` rows, or all when there are fewer.
    pub fn head(&self, n: usize) -> Rows {
        self.slice(0, n)
    }

    /// `len` rows from row `start` on, or as many as there are: `rows.slice(0, 900)` to train, `rows.slice(900, 100)` to
    /// evaluate.
    pub fn slice(&self, start: usize, len: usize) -> Rows {
        let rows: Vec<Row> = self.rows.iter().skip(start).take(len).cloned().collect();
        Rows { rows: Arc::new(rows), columns: self.columns.clone(), source: self.source.clone() }
    }

    /// Columns under other names: `rows.rename(&[("question", "instruction"), ("answer", "output")])`.
    ///
    /// # Errors
    /// A column that is not there (with the nearest that is), or a new name that is taken.
    pub fn rename(&self, names: &[(&str, &str)]) -> Result<Rows> {
        self.require(&names.iter().map(|(from, _)| (*from).to_owned()).collect::<Vec<_>>())?;
        let new_name = |column: &str| {
            names.iter().find(|(from, _)| *from == column).map_or_else(|| column.to_owned(), |(_, to)| (*to).to_owned())
        };
        let columns: Vec<String> = self.columns.iter().map(|c| new_name(c)).collect();
        if let Some(twice) = columns.iter().enumerate().find(|(i, c)| columns[..*i].contains(c)) {
            return Err(Error::new(format!("two columns would be named `{}`", twice.1))
                .at(&*self.source)
                .expected("a name for each column")
                .next("rename or leave out the other one first"));
        }
        let renamed = |row: &Row| Row {
            place: row.place.clone(),
            values: row.values.iter().map(|(column, value)| (new_name(column), value.clone())).collect(),
        };
        let rows = self.rows.iter().map(renamed).collect();
        Ok(Rows { rows: Arc::new(rows), columns: Arc::new(columns), source: self.source.clone() })
    }

    /// All rows of several files, in order.
    ///
    /// # Errors
    /// No rows at all.
    pub fn concat(parts: &[Rows]) -> Result<Rows> {
        let rows: Vec<Row> = parts.iter().flat_map(|part| part.rows.iter().cloned()).collect();
        let source = match parts {
            [one] => one.source.to_string(),
            [first, ..] => format!("{} and {} more", first.source, parts.len() - 1),
            [] => "rows".into(),
        };
        Rows::new(rows, &source)
    }

    /// Shuffles and splits: rows to train on, and `eval` rows to evaluate on, each in the shuffled order.
    ///
    /// The same rows, `eval` and `seed` give the same split everywhere.
    ///
    /// # Errors
    /// When one of the two would be empty.
    pub fn split(&self, eval: usize, seed: u64) -> Result<(Rows, Rows)> {
        if eval == 0 || eval >= self.len() {
            return Err(Error::new("a split leaves one side empty")
                .at(&*self.source)
                .expected(format!("1 to {} rows to evaluate on", self.len().saturating_sub(1)))
                .found(eval.to_string()));
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        shuffle(&mut ChaCha8Rng::seed_from_u64(seed), &mut order);
        let part = |order: &[usize]| Rows {
            rows: Arc::new(order.iter().filter_map(|&i| self.rows.get(i).cloned()).collect()),
            columns: self.columns.clone(),
            source: self.source.clone(),
        };
        let (train, eval) = order.split_at(self.len() - eval);
        Ok((part(train), part(eval)))
    }

    /// Checks that every one of `wanted` is a column.
    ///
    /// # Errors
    /// Names the missing columns, those that exist, and the nearest name.
    pub fn require(&self, wanted: &[String]) -> Result<()> {
        Rows::require_in(wanted, &self.columns, &self.source)
    }

    /// [`require`](Self::require), for columns that are not read yet.
    pub(super) fn require_in(wanted: &[String], columns: &[String], source: &str) -> Result<()> {
        let missing: Vec<&String> = wanted.iter().filter(|w| !columns.contains(w)).collect();
        let Some(first) = missing.first() else { return Ok(()) };
        let error = Error::new(format!("the rows have no column {}", quoted(&missing)))
            .at(source)
            .expected(format!("columns {}", quoted(&wanted.iter().collect::<Vec<_>>())))
            .found(format!("columns {}", quoted(&columns.iter().collect::<Vec<_>>())));
        let nearest = columns.iter().map(|c| (strsim::jaro_winkler(c, first), c)).max_by(|a, b| a.0.total_cmp(&b.0));
        Err(match nearest {
            Some((score, name)) if score > 0.8 => error.next(format!("did you mean `{name}`?")),
            _ => error.next("name the columns in the template as the rows do, or rename them: Rows::rename"),
        })
    }

    /// The text of a column in row `i`: a string as it is, a number or boolean as JSON writes it, `""` for null.
    ///
    /// # Errors
    /// A row that has not the column, or in which it is a list or an object; the place is `file:line`.
    pub fn text(&self, i: usize, column: &str) -> Result<String> {
        let value = self.get(i).and_then(|row| row.get(column));
        match value {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Null) => Ok(String::new()),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
            Some(other) => Err(Error::new(format!("column `{column}` is not text"))
                .at(self.place(i))
                .expected("a string, number, boolean or null")
                .found(kind(other))),
            None => Err(Error::new(format!("the row has no column `{column}`"))
                .at(self.place(i))
                .expected(format!("column `{column}`"))
                .found(match self.get(i) {
                    Some(row) => format!("columns {}", quoted(&row.keys().collect::<Vec<_>>())),
                    None => format!("{} rows", self.len()),
                })
                .next("give every row the same columns; an empty string or null will do")),
        }
    }
}

pub(super) fn not_an_object(value: &Value) -> Error {
    Error::new("a row is not a JSON object")
        .expected(r#"an object such as {"instruction": "...", "output": "..."}"#)
        .found(kind(value))
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn quoted(names: &[&String]) -> String {
    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Rows: {} from {}, columns {}",
            self.len(),
            self.source,
            quoted(&self.columns.iter().collect::<Vec<_>>())
        )?;
        for row in self.rows.iter().take(3) {
            write!(f, "\n[{}]", row.place.number)?;
            for (name, value) in &row.values {
                let text = value.as_str().map_or_else(|| value.to_string(), String::from).replace('\n', "⏎");
                let short: String = text.chars().take(80).collect();
                write!(f, "\n  {name}: {short}{}", if short.len() < text.len() { "…" } else { "" })?;
            }
        }
        if self.len() > 3 { write!(f, "\n… {} more", self.len() - 3) } else { Ok(()) }
    }
}
