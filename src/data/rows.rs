//! [`Rows`]: a table of training rows, as the file has them.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

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

#[derive(Clone)]
struct Row {
    /// Line of the file or number of the row, from 1.
    line: usize,
    values: Map<String, Value>,
}

impl Rows {
    /// Reads a JSONL file: one JSON object per line. Blank lines are skipped.
    ///
    /// # Errors
    /// A file that cannot be read, holds no row, or has a line that is not UTF-8 or not a JSON object; the place is
    /// `file:line`.
    pub fn from_jsonl(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
        let mut reader = BufReader::with_capacity(1 << 16, file);
        let (source, mut rows, mut bytes) = (path.display().to_string(), vec![], vec![]);
        for line in 1.. {
            bytes.clear();
            if reader.read_until(b'\n', &mut bytes).map_err(|e| Error::io("read", path, e))? == 0 {
                break;
            }
            let text = bytes.strip_prefix(b"\xEF\xBB\xBF").filter(|_| line == 1).unwrap_or(&bytes);
            if !text.trim_ascii().is_empty() {
                rows.push(Row { line, values: parse_line(text).map_err(|e| e.at(format!("{source}:{line}")))? });
            }
        }
        Rows::new(rows, source)
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
        let row = |(i, value): (usize, Value)| match value {
            Value::Object(values) => Ok(Row { line: i + 1, values }),
            other => Err(not_an_object(&other).at(format!("row {}", i + 1))),
        };
        Rows::new(values.into_iter().enumerate().map(row).collect::<Result<_>>()?, "rows".into())
    }

    fn new(rows: Vec<Row>, source: String) -> Result<Self> {
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

    /// Where row `i` came from: `file:line`, or `rows: row 3` for rows made in code.
    pub fn place(&self, i: usize) -> String {
        let line = self.rows.get(i).map_or(i + 1, |row| row.line);
        if &*self.source == "rows" { format!("rows: row {line}") } else { format!("{}:{line}", self.source) }
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

    /// Checks that every one of `wanted` is a column.
    ///
    /// # Errors
    /// Names the missing columns, those that exist, and the nearest name.
    pub fn require(&self, wanted: &[String]) -> Result<()> {
        let missing: Vec<&String> = wanted.iter().filter(|w| !self.columns.contains(w)).collect();
        let Some(first) = missing.first() else { return Ok(()) };
        let error = Error::new(format!("the rows have no column {}", quoted(&missing)))
            .at(&*self.source)
            .expected(format!("columns {}", quoted(&wanted.iter().collect::<Vec<_>>())))
            .found(format!("columns {}", quoted(&self.columns.iter().collect::<Vec<_>>())));
        let nearest =
            self.columns.iter().map(|c| (strsim::jaro_winkler(c, first), c)).max_by(|a, b| a.0.total_cmp(&b.0));
        Err(match nearest {
            Some((score, name)) if score > 0.8 => error.next(format!("did you mean `{name}`?")),
            _ => error.next("name the columns in the template as the rows do"),
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

fn parse_line(text: &[u8]) -> Result<Map<String, Value>> {
    match serde_json::from_slice(text) {
        Ok(Value::Object(values)) => Ok(values),
        Ok(other) => Err(not_an_object(&other)),
        Err(e) => Err(Error::new("a line is not JSON")
            .expected("one JSON object per line (JSONL)")
            .caused_by(e)
            .next("a file that is one JSON array, or has an object over several lines, must be converted first")),
    }
}

fn not_an_object(value: &Value) -> Error {
    Error::new("a row is not a JSON object")
        .expected(r#"an object such as {"instruction": "...", "output": "..."}"#)
        .found(kind(value))
}

fn kind(value: &Value) -> &'static str {
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
            write!(f, "\n[{}]", row.line)?;
            for (name, value) in &row.values {
                let text = value.as_str().map_or_else(|| value.to_string(), String::from).replace('\n', "⏎");
                let short: String = text.chars().take(80).collect();
                write!(f, "\n  {name}: {short}{}", if short.len() < text.len() { "…" } else { "" })?;
            }
        }
        if self.len() > 3 { write!(f, "\n… {} more", self.len() - 3) } else { Ok(()) }
    }
}
