//! [`Rows`] to and from a polars `DataFrame`.

use polars::prelude::{AnyValue, Column, DataFrame, DataType, NamedFrom, Series};
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

    /// Rows from a polars `DataFrame` of booleans, numbers, strings, and lists and structs of them.
    ///
    /// # Errors
    /// No row, or a column of another type.
    pub fn from_frame(frame: &DataFrame) -> Result<Self> {
        Rows::from_values(to_maps(frame, 0)?.into_iter().map(Value::Object).collect())
    }
}

/// The rows of a frame; `first`: the number of its first one, from 0, for messages.
pub(super) fn to_maps(frame: &DataFrame, first: usize) -> Result<Vec<Map<String, Value>>> {
    let mut rows = vec![Map::new(); frame.height()];
    for column in frame.columns() {
        for (i, row) in rows.iter_mut().enumerate() {
            let at = |e: Error| e.at(format!("column `{}`, row {}", column.name(), first + i + 1));
            let value = column.get(i).map_err(|e| at(Error::new("could not read a DataFrame").caused_by(e)))?;
            row.insert(column.name().to_string(), to_json(&value).map_err(at)?);
        }
    }
    Ok(rows)
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
    // Categories are strings, stored once each.
    if let Some(text) = value.get_str() {
        return Ok(json!(text));
    }
    Ok(match value {
        AnyValue::Null => Value::Null,
        AnyValue::Boolean(b) => json!(b),
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
        AnyValue::Struct(..) | AnyValue::StructOwned(..) => {
            let mut fields = Map::new();
            if let DataType::Struct(names) = value.dtype() {
                let mut values = Vec::with_capacity(names.len());
                value._materialize_struct_av(&mut values);
                for (field, value) in names.iter().zip(&values) {
                    fields.insert(field.name.to_string(), to_json(value)?);
                }
            }
            Value::Object(fields)
        }
        // Text that was written without its type.
        AnyValue::Binary(bytes) => json!(std::str::from_utf8(bytes).map_err(not_text)?),
        AnyValue::BinaryOwned(bytes) => json!(std::str::from_utf8(bytes).map_err(not_text)?),
        other => {
            return Err(Error::new("a DataFrame column has a type that rows cannot hold")
                .expected("booleans, numbers, strings, or lists and structs of them")
                .found(other.dtype().to_string()));
        }
    })
}

fn not_text(e: std::str::Utf8Error) -> Error {
    Error::new("a binary column does not hold text").expected("UTF-8").caused_by(e)
}
