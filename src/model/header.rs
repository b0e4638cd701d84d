//! The header of a safetensors file, read with distrust: everything it says is checked against the file's size.
//!
//! Layout: 8 bytes N (little-endian u64), N bytes of JSON, then the tensors' bytes without gaps.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::DType;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::{Error, Result};

/// As in the safetensors library; a header of this size would describe about a million tensors.
const MAX_HEADER: u64 = 100_000_000;

/// What one header says of one tensor, checked.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: String,
    /// `Err` holds the name of a dtype that this library does not read.
    pub dtype: Result<DType, String>,
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// All tensors of a file, in the order of their bytes, and its `__metadata__`.
#[derive(Clone, Debug, Default)]
pub(super) struct Header {
    pub entries: Vec<Entry>,
    pub metadata: BTreeMap<String, String>,
}

/// The name in safetensors files of a dtype that they can hold.
pub(super) fn dtype_name(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::U8 => "U8",
        DType::U32 => "U32",
        DType::I16 => "I16",
        DType::I32 => "I32",
        DType::I64 => "I64",
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        DType::F32 => "F32",
        DType::F64 => "F64",
        DType::F8E4M3 => "F8_E4M3",
        _ => return None,
    })
}

fn dtype_from(name: &str) -> Result<DType, String> {
    let known = [
        DType::U8,
        DType::U32,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::BF16,
        DType::F16,
        DType::F32,
        DType::F64,
        DType::F8E4M3,
    ];
    known.into_iter().find(|d| dtype_name(*d) == Some(name)).ok_or_else(|| name.to_string())
}

fn lie(what: &str, path: &Path) -> Error {
    Error::new(what).at_path(path).next("the file is damaged or was cut short: download or save it again")
}

/// Reads and checks the header of an open file.
pub(super) fn read(file: &File, path: &Path) -> Result<Header> {
    let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    let mut n = [0u8; 8];
    if len < 8 {
        return Err(lie("the file is too short to be safetensors", path)
            .expected("at least 8 bytes")
            .found(format!("{len} bytes")));
    }
    file.read_exact_at(&mut n, 0).map_err(|e| Error::io("read", path, e))?;
    let n = u64::from_le_bytes(n);
    let room = (len - 8).min(MAX_HEADER);
    if n > room {
        return Err(lie("the length of the safetensors header cannot be right", path)
            .expected(format!("at most {room} bytes, in a file of {len} bytes"))
            .found(format!("{n} bytes")));
    }
    let mut json = vec![0u8; n as usize];
    file.read_exact_at(&mut json, 8).map_err(|e| Error::io("read", path, e))?;
    check(&json, 8 + n, len).map_err(|e| e.at_path(path))
}

/// Checks the header's text for a file of `len` bytes whose tensors start at `start`.
fn check(json: &[u8], start: u64, len: u64) -> Result<Header> {
    let next = "the file is damaged or was cut short: download or save it again";
    let pairs: Pairs = serde_json::from_slice(json)
        .map_err(|e| Error::new("the safetensors header is not valid").caused_by(e).next(next))?;
    let mut header = Header::default();
    let mut seen = HashSet::new();
    for (name, value) in pairs.0 {
        if !seen.insert(name.clone()) {
            return Err(Error::new("the safetensors header names a tensor twice").at(name).next(next));
        }
        if name == "__metadata__" {
            header.metadata = serde_json::from_value(value)
                .map_err(|e| Error::new("the metadata is not text").at(name).caused_by(e).next(next))?;
            continue;
        }
        let entry = entry(&name, value, start, len).map_err(|e| e.at(name).next(next))?;
        header.entries.push(entry);
    }
    header.entries.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    let mut end = start;
    for e in &header.entries {
        if e.offset != end {
            let what = if e.offset < end { "two tensors overlap" } else { "there are bytes that belong to no tensor" };
            return Err(Error::new(what)
                .at(e.name.clone())
                .expected(format!("to start at byte {end}"))
                .found(format!("byte {}", e.offset))
                .next(next));
        }
        end = e.offset + e.bytes;
    }
    if end != len {
        return Err(Error::new("the file is longer than its tensors")
            .expected(format!("{end} bytes"))
            .found(format!("{len} bytes"))
            .next(next));
    }
    Ok(header)
}

fn entry(name: &str, value: Value, start: u64, len: u64) -> Result<Entry> {
    #[derive(serde::Deserialize)]
    struct Raw {
        dtype: String,
        shape: Vec<u64>,
        data_offsets: [u64; 2],
    }
    let raw: Raw =
        serde_json::from_value(value).map_err(|e| Error::new("the entry of a tensor is not valid").caused_by(e))?;
    let [begin, end] = raw.data_offsets;
    let bytes = end
        .checked_sub(begin)
        .ok_or_else(|| Error::new("a tensor ends before it starts").found(format!("data_offsets [{begin}, {end}]")))?;
    let room = len.saturating_sub(start);
    if end > room {
        return Err(Error::new("a tensor lies beyond the end of the file")
            .expected(format!("to end within {room} bytes of tensors"))
            .found(format!("data_offsets [{begin}, {end}]")));
    }
    let numel = raw
        .shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .ok_or_else(|| Error::new("the shape of a tensor cannot be right").found(format!("{:?}", raw.shape)))?;
    let dtype = dtype_from(&raw.dtype);
    if let Ok(d) = dtype {
        let size = d.size_in_bytes() as u64;
        if numel.checked_mul(size) != Some(bytes) {
            return Err(Error::new("the shape of a tensor does not match its bytes")
                .expected(format!("{:?} x {size} bytes ({})", raw.shape, raw.dtype))
                .found(format!("{bytes} bytes")));
        }
    }
    let shape = raw.shape.iter().map(|&d| d as usize).collect();
    Ok(Entry { name: name.to_string(), dtype, shape, offset: start + begin, bytes })
}

/// A JSON object with its keys in order, repeated ones included.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut out = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    out.push(pair);
                }
                Ok(Pairs(out))
            }
        }
        d.deserialize_map(V)
    }
}
