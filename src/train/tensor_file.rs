//! Named bytes in a safetensors file: written straight from the caller's memory, read back one tensor at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::{Error, Result};

/// The format's own limit on a header.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor to be saved: its bytes stay where they are.
#[derive(Clone, Debug)]
pub struct TensorSlice<'a> {
    /// Its name in the file.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, little-endian, row-major.
    pub data: Cow<'a, [u8]>,
}

impl<'a> TensorSlice<'a> {
    /// An f32 tensor.
    pub fn f32(name: impl Into<String>, shape: &[usize], data: &'a [f32]) -> Self {
        let data = Cow::Borrowed(bytemuck::cast_slice(data));
        TensorSlice { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), data }
    }

    /// A u8 tensor.
    pub fn u8(name: impl Into<String>, shape: &[usize], data: &'a [u8]) -> Self {
        TensorSlice { name: name.into(), dtype: Dtype::U8, shape: shape.to_vec(), data: Cow::Borrowed(data) }
    }
}

/// Writes and syncs a new file.
pub(super) fn write(path: &Path, tensors: &[TensorSlice<'_>]) -> Result<()> {
    let header = header(tensors).map_err(|e| e.at_path(path))?;
    let run = || -> std::io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for tensor in tensors {
            out.write_all(&tensor.data)?;
        }
        out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
    };
    run().map_err(|e| Error::io("write", path, e))
}

/// The header, padded with spaces so that the data starts at a multiple of 8.
fn header(tensors: &[TensorSlice<'_>]) -> Result<Vec<u8>> {
    let mut at = 0;
    let mut infos = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for t in tensors {
        if !seen.insert(&t.name) {
            return Err(Error::new("two tensors have one name").at(&t.name).next("name each tensor once"));
        }
        let data_offsets = (at, at + t.data.len());
        at = data_offsets.1;
        infos.push((t.name.clone(), TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets }));
    }
    // `new` checks that every shape and dtype give the number of bytes.
    let metadata = Metadata::new(None, infos).map_err(|e| {
        Error::new("a tensor's bytes do not fit its shape").caused_by(e).next("this is a mistake in the caller")
    })?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| Error::new("could not write a header").caused_by(e))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(json)
}

/// A safetensors file of which single tensors are read when asked for. Cheap to clone.
#[derive(Clone)]
pub struct TensorFile {
    path: PathBuf,
    file: Arc<File>,
    start: u64,
    tensors: Arc<BTreeMap<String, TensorInfo>>,
}

impl std::fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// A file that cannot be read, or whose header and length do not agree.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let damaged = |found: String| {
            Error::new("this is not a whole safetensors file")
                .at_path(path)
                .expected("a header and the data that it describes")
                .found(found)
                .next("use another copy or an older checkpoint")
        };
        let bytes = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        let mut size = [0; 8];
        file.read_exact(&mut size).map_err(|_| damaged(format!("{bytes} bytes")))?;
        let header = u64::from_le_bytes(size);
        if header > MAX_HEADER || header > bytes - 8 {
            return Err(damaged(format!("a header of {header} bytes in a file of {bytes} bytes")));
        }
        let mut json = vec![0; header as usize];
        file.read_exact(&mut json).map_err(|e| Error::io("read", path, e))?;
        let metadata: Metadata = serde_json::from_slice(&json).map_err(|e| damaged(e.to_string()))?;
        let start = 8 + header;
        if start + metadata.data_len() as u64 != bytes {
            return Err(damaged(format!("{bytes} bytes where the header says {}", start + metadata.data_len() as u64)));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(TensorFile { path: path.to_owned(), file: Arc::new(file), start, tensors: Arc::new(tensors) })
    }

    /// The names of its tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// No tensor of that name.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.info(name)?.shape.clone())
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| {
            Error::new("a tensor is missing")
                .at_path(&self.path)
                .expected(name)
                .found(format!("{} tensors with other names", self.tensors.len()))
                .next("this file belongs to another model or configuration")
        })
    }

    /// The bytes of a tensor that must have this dtype and shape.
    ///
    /// # Errors
    /// No such tensor; another dtype or shape; a file that cannot be read.
    pub fn read(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Vec<u8>> {
        let (from, to) = self.info(name)?.data_offsets;
        let mut out = vec![0; to - from];
        self.read_into(name, dtype, shape, &mut out)?;
        Ok(out)
    }

    /// The bytes of a tensor that must have this dtype and shape, into memory of exactly its size.
    ///
    /// # Errors
    /// As [`read`](Self::read); `out` of another size.
    pub fn read_into(&self, name: &str, dtype: Dtype, shape: &[usize], out: &mut [u8]) -> Result<()> {
        let info = self.info(name)?;
        let (from, to) = info.data_offsets;
        if info.dtype != dtype || info.shape != shape || to - from != out.len() {
            return Err(Error::new("a saved tensor has another shape than this run's")
                .at_path(&self.path)
                .at(name)
                .expected(format!("{dtype:?} {shape:?}, {} bytes", out.len()))
                .found(format!("{:?} {:?}, {} bytes", info.dtype, info.shape, to - from))
                .next("this file belongs to another model or configuration"));
        }
        let read = self.file.read_exact_at(out, self.start + from as u64);
        read.map_err(|e| Error::io("read", &self.path, e))
    }
}
