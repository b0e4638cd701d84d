//! Writing safetensors: the header first, then the tensors one by one, and the file appears when it is whole.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::DType;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use serde_json::{Map, Value, json};

use super::checkpoint::{INDEX, SINGLE};
use super::header::dtype_name;
use crate::{Error, Result, files};

/// Bytes after which the kernel is asked to start writing.
const FLUSH: u64 = 32 << 20;
/// Small pieces are collected; larger ones go to the kernel as they are.
const BUFFER: usize = 64 << 10;

/// One tensor that is going to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorHeader {
    /// Its key in the file.
    pub name: String,
    /// Element type in the file.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl TensorHeader {
    /// A tensor to write.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        TensorHeader { name: name.into(), dtype, shape: shape.into() }
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.dtype.size_in_bytes() as u64
    }
}

/// Sorts as the safetensors library does: wide dtypes first (so that all are aligned), then by name.
///
/// A file in this order has the same bytes as one that the library wrote.
pub fn canonical_order(tensors: &mut [TensorHeader]) {
    // The library's own order of dtypes, of those that candle has.
    let rank = |d: DType| match d {
        DType::I64 => 0,
        DType::F64 => 1,
        DType::F32 => 2,
        DType::U32 => 3,
        DType::I32 => 4,
        DType::BF16 => 5,
        DType::F16 => 6,
        DType::I16 => 7,
        DType::F8E4M3 => 8,
        _ => 9,
    };
    tensors.sort_by(|a, b| (rank(a.dtype), &a.name).cmp(&(rank(b.dtype), &b.name)));
}

/// Writes one safetensors file whose tensors are given in order; [`finish`](SafetensorsWriter::finish) makes it appear.
///
/// The bytes go to a temporary file beside the target. Dropping the writer before `finish` removes it and leaves
/// what was there before.
pub struct SafetensorsWriter {
    path: PathBuf,
    out: BufWriter<tempfile::NamedTempFile>,
    tensors: Vec<TensorHeader>,
    /// The tensor that is being written.
    current: usize,
    /// Bytes of it that are still to come.
    left: u64,
    /// Bytes written so far, and of those how many the kernel was asked to put on the disk.
    written: u64,
    flushed: u64,
}

impl SafetensorsWriter {
    /// Starts the file: writes the header for `tensors`, which must then come in this order.
    ///
    /// `metadata` is the file's `__metadata__`; PyTorch tools want [`pt_metadata`].
    ///
    /// # Errors
    /// A name given twice, a dtype that safetensors does not have, a directory that cannot be written.
    pub fn create(
        path: impl AsRef<Path>,
        tensors: Vec<TensorHeader>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let header = header_bytes(&tensors, metadata).map_err(|e| e.at_path(&path))?;
        let (tmp, _) = files::temporary_beside(&path)?;
        let mut out = BufWriter::with_capacity(BUFFER, tmp);
        out.write_all(&header).map_err(|e| Error::io("write", &path, e))?;
        let left = tensors.first().map_or(0, TensorHeader::bytes);
        let written = header.len() as u64;
        Ok(SafetensorsWriter { path, out, tensors, current: 0, left, written, flushed: 0 })
    }

    /// Appends bytes of the tensor `name` (little-endian, as in the file); it may come in several pieces.
    ///
    /// # Errors
    /// A tensor out of order, more bytes than it has, and a disk that is full or cannot be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.skip_finished();
        let due = self.tensors.get(self.current).map(|t| t.name.as_str());
        if due != Some(name) || bytes.len() as u64 > self.left {
            // An empty tensor is finished before it is written.
            if bytes.is_empty() {
                return Ok(());
            }
            return Err(Error::new("tensors must be written in the order of the header")
                .at_path(&self.path)
                .expected(due.map_or("no more tensors".into(), |d| format!("{} more bytes of {d}", self.left)))
                .found(format!("{} bytes of {name}", bytes.len())));
        }
        self.out.write_all(bytes).map_err(|e| Error::io("write", &self.path, e))?;
        self.left -= bytes.len() as u64;
        self.written += bytes.len() as u64;
        if self.written - self.flushed >= FLUSH {
            self.start_writeback();
        }
        Ok(())
    }

    /// Lets the disk work while the next tensors are made, instead of all at once in `finish`.
    fn start_writeback(&mut self) {
        use std::os::fd::AsRawFd;
        let fd = self.out.get_ref().as_file().as_raw_fd();
        let (at, n) = (self.flushed as i64, (self.written - self.flushed) as i64);
        // SAFETY: a plain system call on an open file. It is advice: whether it fails does not matter.
        unsafe { libc::sync_file_range(fd, at, n, libc::SYNC_FILE_RANGE_WRITE) };
        self.flushed = self.written;
    }

    /// Appends values of the tensor `name`, rounded to nearest (ties to even) to its dtype: F32, BF16 or F16.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::write`], and another dtype.
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.skip_finished();
        let dtype = self.tensors.get(self.current).map_or(DType::F32, |t| t.dtype);
        let mut bits = vec![0u16; values.len().min(1 << 16)];
        match dtype {
            DType::F32 => return self.write(name, bytemuck::cast_slice(values)),
            DType::BF16 | DType::F16 => {}
            other => {
                return Err(Error::new("values cannot be written in this dtype")
                    .at(name.to_string())
                    .expected("F32, BF16 or F16")
                    .found(other.as_str()));
            }
        }
        for values in values.chunks(1 << 16) {
            let bits = &mut bits[..values.len()];
            if dtype == DType::BF16 {
                bits.reinterpret_cast_mut::<half::bf16>().convert_from_f32_slice(values);
            } else {
                bits.reinterpret_cast_mut::<half::f16>().convert_from_f32_slice(values);
            }
            self.write(name, bytemuck::cast_slice(bits))?;
        }
        Ok(())
    }

    /// Syncs the file and renames it into place.
    ///
    /// # Errors
    /// Tensors that were not written, and a disk that is full or cannot be written.
    pub fn finish(mut self) -> Result<()> {
        self.skip_finished();
        if let Some(t) = self.tensors.get(self.current) {
            return Err(Error::new("not all tensors were written")
                .at_path(&self.path)
                .expected(format!("{} more bytes of {}", self.left, t.name))
                .found("the end"));
        }
        let path = self.path;
        let tmp = self.out.into_inner().map_err(|e| Error::io("write", &path, e.into_error()))?;
        tmp.as_file().sync_all().map_err(|e| Error::io("write", &path, e))?;
        tmp.persist(&path).map_err(|e| Error::io("rename into place", &path, e.error))?;
        match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => files::sync_dir(p),
            _ => files::sync_dir(Path::new(".")),
        }
    }

    fn skip_finished(&mut self) {
        while self.left == 0 && self.current < self.tensors.len() {
            self.current += 1;
            self.left = self.tensors.get(self.current).map_or(0, TensorHeader::bytes);
        }
    }
}

impl fmt::Debug for SafetensorsWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SafetensorsWriter({}: tensor {} of {})", self.path.display(), self.current, self.tensors.len())
    }
}

/// `{"format": "pt"}`, which transformers and PEFT look for.
pub fn pt_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}

fn header_bytes(tensors: &[TensorHeader], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut map = Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".into(), json!(metadata));
    }
    let mut at = 0u64;
    for t in tensors {
        let dtype = dtype_name(t.dtype).ok_or_else(|| {
            Error::new("safetensors files cannot hold this dtype").at(t.name.clone()).found(t.dtype.as_str())
        })?;
        let end = at + t.bytes();
        let entry = json!({ "dtype": dtype, "shape": t.shape, "data_offsets": [at, end] });
        if map.insert(t.name.clone(), entry).is_some() {
            return Err(Error::new("a tensor is to be written twice").at(t.name.clone()));
        }
        at = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    // The tensors start at a multiple of 8 bytes.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json);
    Ok(out)
}

/// Which tensors of a model are in which file: shards of at most `max_shard_bytes` and an index, or one file if they fit. Each file can
/// be written by a thread of its own.
///
/// A tensor is never split. Files have the names that transformers uses: `model.safetensors`, or
/// `model-00001-of-00003.safetensors` and so on.
#[derive(Debug)]
pub struct Shards {
    dir: PathBuf,
    files: Vec<(String, Vec<TensorHeader>)>,
    index: Option<Value>,
    metadata: BTreeMap<String, String>,
}

impl Shards {
    /// Fills one file after the other with the tensors in this order; writes nothing.
    ///
    /// # Errors
    /// Nothing to write.
    pub fn plan(
        dir: impl AsRef<Path>,
        tensors: Vec<TensorHeader>,
        max_shard_bytes: u64,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        if tensors.is_empty() {
            return Err(Error::new("there are no tensors to write").at_path(&dir));
        }
        let total: u64 = tensors.iter().map(TensorHeader::bytes).sum();
        let mut shards: Vec<(u64, Vec<TensorHeader>)> = Vec::new();
        for t in tensors {
            let bytes = t.bytes();
            match shards.last_mut() {
                Some((size, shard)) if size.saturating_add(bytes) <= max_shard_bytes => {
                    *size += bytes;
                    shard.push(t);
                }
                _ => shards.push((bytes, vec![t])),
            }
        }
        let n = shards.len();
        let name = |i: usize| match n {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let files: Vec<_> = shards.into_iter().enumerate().map(|(i, (_, s))| (name(i), s)).collect();
        let index = (n > 1).then(|| {
            let map: BTreeMap<&str, &str> =
                files.iter().flat_map(|(file, s)| s.iter().map(|t| (t.name.as_str(), file.as_str()))).collect();
            json!({ "metadata": { "total_size": total }, "weight_map": map })
        });
        Ok(Shards { dir, files, index, metadata: metadata.clone() })
    }

    /// Number of files.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// The tensors of a file, in their order.
    ///
    /// # Panics
    /// A file that is not below [`Shards::files`].
    pub fn tensors(&self, file: usize) -> &[TensorHeader] {
        &self.files[file].1
    }

    /// Starts a file.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::create`].
    ///
    /// # Panics
    /// As [`Shards::tensors`].
    pub fn writer(&self, file: usize) -> Result<SafetensorsWriter> {
        let (name, tensors) = &self.files[file];
        SafetensorsWriter::create(self.dir.join(name), tensors.clone(), &self.metadata)
    }

    /// Once all files are there: the index, where there are several.
    ///
    /// # Errors
    /// A disk that is full or cannot be written.
    pub fn write_index(&self) -> Result<()> {
        match &self.index {
            Some(index) => files::write_atomic_bytes(self.dir.join(INDEX), format!("{index:#}\n").as_bytes()),
            None => Ok(()),
        }
    }
}

/// Writes the files of [`Shards`] one after the other. Tensors come in the order that was given, as in [`SafetensorsWriter`].
#[derive(Debug)]
pub struct ShardedWriter {
    shards: Shards,
    /// The file that is being written, and its number.
    writer: SafetensorsWriter,
    current: usize,
}

impl ShardedWriter {
    /// Plans the shards and starts the first.
    ///
    /// # Errors
    /// As [`Shards::plan`] and [`SafetensorsWriter::create`].
    pub fn create(
        dir: impl AsRef<Path>,
        tensors: Vec<TensorHeader>,
        max_shard_bytes: u64,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let shards = Shards::plan(dir, tensors, max_shard_bytes, metadata)?;
        let writer = shards.writer(0)?;
        Ok(ShardedWriter { shards, writer, current: 0 })
    }

    /// Appends bytes of a tensor; see [`SafetensorsWriter::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.at(name)?.write(name, bytes)
    }

    /// Appends values of a tensor, rounded to its dtype; see [`SafetensorsWriter::write_f32`].
    ///
    /// # Errors
    /// As there.
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.at(name)?.write_f32(name, values)
    }

    /// Finishes the last shard and writes the index, if there are several.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::finish`].
    pub fn finish(self) -> Result<()> {
        if self.current + 1 < self.shards.files() {
            return Err(Error::new("not all shards were written").at_path(&self.shards.dir));
        }
        self.writer.finish()?;
        self.shards.write_index()
    }

    /// The writer of the shard that holds `name`, which must be this one or the next.
    fn at(&mut self, name: &str) -> Result<&mut SafetensorsWriter> {
        let w = &self.writer;
        if !w.tensors[w.current.min(w.tensors.len())..].iter().any(|t| t.name == name) {
            if self.current + 1 == self.shards.files() {
                return Err(Error::new("this tensor is not in the header")
                    .at_path(&self.shards.dir)
                    .found(name.to_string()));
            }
            let next = self.shards.writer(self.current + 1)?;
            self.current += 1;
            std::mem::replace(&mut self.writer, next).finish()?;
        }
        Ok(&mut self.writer)
    }
}
