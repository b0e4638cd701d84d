//! [`Rows`] to and from a polars `DataFrame`.

use polars::prelude::{AnyValue, Column, DataFrame, NamedFrom, Series};
use serde_json::{Map, Value, json};

use crate::data::Rows;
use crate::{Error, Result};

impl Rows {
    /// The rows as a polars `DataFrame`: columns of booleans, of integers, of numbers or of strings where all values are
    /// (null apart); lists and objects as JSON text.
    ///
    /// # Errors
    /// Those of polars.
    pub fn to_frame(&self) -> Result<DataFrame> {
        let columns = self.columns().iter().map(|name| {
            let values: Vec<&Value> =
                (0..self.len()).map(|i| self.get(i).and_then(|r| r.get(name)).unwrap_or(&Value::Null)).collect();
            Column::from(series(name, &values))
        });
        DataFrame::new(self.len(), columns.collect())
            .map_err(|e| Error::new("could not make a DataFrame").at(self.source()).caused_by(e))
    }

    /// Rows from a polars `DataFrame` of booleans, numbers, strings and lists of them.
    ///
    /// # Errors
    /// No row, or a column of another type.
    pub fn from_frame(frame: &DataFrame) -> Result<Self> {
        let mut rows = vec![Map::new(); frame.height()];
        for column in frame.columns() {
            for (i, row) in rows.iter_mut().enumerate() {
                let at = |e: Error| e.at(format!("column `{}`, row {}", column.name(), i + 1));
                let value = column.get(i).map_err(|e| at(Error::new("could not read a DataFrame").caused_by(e)))?;
                row.insert(column.name().to_string(), to_json(&value).map_err(at)?);
            }
        }
        Rows::from_values(rows.into_iter().map(Value::Object).collect())
    }
}

fn series(name: &str, values: &[&Value]) -> Series {
    let all = |is: fn(&Value) -> bool| values.iter().all(|v| v.is_null() || is(v));
    if values.iter().all(|v| v.is_null()) {
        Series::new(name.into(), vec![None::<String>; values.len()])
    } else if all(Value::is_boolean) {
        Series::new(name.into(), values.iter().map(|v| v.as_bool()).collect::<Vec<_>>())
    } else if all(Value::is_i64) {
        Series::new(name.into(), values.iter().map(|v| v.as_i64()).collect::<Vec<_>>())
    } else if all(Value::is_number) {
        Series::new(name.into(), values.iter().map(|v| v.as_f64()).collect::<Vec<_>>())
    } else {
        let text = |v: &&Value| match v {
            Value::Null => None,
            Value::String(s) => Some(s.clone()),
            other => Some(other.to_string()),
        };
        Series::new(name.into(), values.iter().map(text).collect::<Vec<_>>())
    }
}

fn to_json(value: &AnyValue<'_>) -> Result<Value> {
    Ok(match value {
        AnyValue::Null => Value::Null,
        AnyValue::Boolean(b) => json!(b),
        AnyValue::String(s) => json!(s),
        AnyValue::StringOwned(s) => json!(s.as_str()),
        AnyValue::UInt8(x) => json!(x),
        AnyValue::UInt16(x) => json!(x),
        AnyValue::UInt32(x) => json!(x),
        AnyValue::UInt64(x) => json!(x),
        AnyValue::Int8(x) => json!(x),
        AnyValue::Int16(x) => json!(x),
        AnyValue::Int32(x) => json!(x),
        AnyValue::Int64(x) => json!(x),
        AnyValue::Float32(x) => json!(x),
        AnyValue::Float64(x) => json!(x),
        AnyValue::List(list) => Value::Array(list.iter().map(|v| to_json(&v)).collect::<Result<_>>()?),
        other => {
            return Err(Error::new("a DataFrame column has a type that rows cannot hold")
                .expected("booleans, numbers, strings or lists of them")
                .found(other.dtype().to_string()));
        }
    })
}
