//! [`Checkpoint`]: the tensors of a model in safetensors files, read one at a time.
//!
//! Files are read with `pread`, not mapped: a file that shrinks while it is mapped kills the process with a signal,
//! where a short read is an error that can be shown.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use rayon::prelude::*;

use super::header::{self, Entry, Header};
use crate::{Error, Result, files, json};

/// Name of the index of a sharded checkpoint.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Name of a checkpoint in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Elements converted at a time by one thread: 512 KiB of bf16.
const CHUNK: usize = 1 << 18;

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type in the file.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// The file that holds it.
    pub file: PathBuf,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        // Checked when the header was read.
        self.shape.iter().product()
    }
}

/// The tensors of a model directory (one file, or shards with `model.safetensors.index.json`) or of one file.
///
/// Opening reads and checks the headers only. A clone shares the open files.
#[derive(Clone)]
pub struct Checkpoint(Arc<Inner>);

struct Inner {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Name to (shard, entry).
    names: HashMap<String, (usize, usize)>,
}

struct Shard {
    path: PathBuf,
    file: File,
    header: Header,
}

impl Checkpoint {
    /// Opens a model directory or one safetensors file.
    ///
    /// # Errors
    /// A path that holds no safetensors; headers that contradict the file (cut short, overlapping or missing bytes,
    /// shapes that do not match their bytes, a name given twice); an index that names shards or tensors that are not
    /// there.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let kind = std::fs::metadata(path).map_err(|e| Error::io("open the checkpoint", path, e))?;
        let (files, index) = if kind.is_dir() { shards_of(path)? } else { (vec![path.to_path_buf()], None) };
        let shards = files.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;
        let mut names = HashMap::new();
        for (s, shard) in shards.iter().enumerate() {
            for (e, entry) in shard.header.entries.iter().enumerate() {
                if let Some((other, _)) = names.insert(entry.name.clone(), (s, e)) {
                    let other: &Shard = &shards[other];
                    return Err(Error::new("two shards hold the same tensor")
                        .at_path(path)
                        .expected("every tensor once")
                        .found(format!("{} in {} and {}", entry.name, other.path.display(), shard.path.display()))
                        .next("remove the files that belong to another checkpoint"));
                }
            }
        }
        if let Some(index) = index {
            check_index(path, &index, &shards, &names)?;
        }
        Ok(Checkpoint(Arc::new(Inner { path: path.to_path_buf(), shards, names })))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.0.names.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// Names of all tensors, in the order of their bytes, shard by shard: the order to stream them in.
    pub fn names_in_file_order(&self) -> Vec<String> {
        self.0.shards.iter().flat_map(|s| s.header.entries.iter().map(|e| e.name.clone())).collect()
    }

    /// Whether a tensor of this name is there.
    pub fn contains(&self, name: &str) -> bool {
        self.0.names.contains_key(name)
    }

    /// Type, shape and place of a tensor.
    ///
    /// # Errors
    /// A name that is not there (with the nearest that is), or a dtype that this library does not read.
    pub fn info(&self, name: &str) -> Result<TensorInfo> {
        let (shard, entry) = self.find(name)?;
        let dtype = entry.dtype.clone().map_err(|found| {
            Error::new("tensors of this dtype are not supported")
                .at_path(&shard.path)
                .at(name.to_string())
                .expected("F32, BF16, F16, F64, F8_E4M3, U8, U32, I16, I32 or I64")
                .found(found)
                .next("convert the checkpoint to bfloat16 first")
        })?;
        Ok(TensorInfo {
            dtype,
            shape: entry.shape.clone(),
            file: shard.path.clone(),
            offset: entry.offset,
            bytes: entry.bytes,
        })
    }

    /// All bytes of a tensor, as in the file (little-endian).
    ///
    /// # Errors
    /// As [`Checkpoint::info`], and a file that became shorter or cannot be read.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let (_, entry) = self.find(name)?;
        let mut out = vec![0u8; entry.bytes as usize];
        self.read_bytes_at(name, 0, &mut out)?;
        Ok(out)
    }

    /// Fills `out` with the bytes of a tensor from byte `start` on.
    ///
    /// # Errors
    /// As [`Checkpoint::read_bytes`], and a range beyond the tensor.
    pub fn read_bytes_at(&self, name: &str, start: u64, out: &mut [u8]) -> Result<()> {
        let (shard, entry) = self.find(name)?;
        let end = start.checked_add(out.len() as u64).filter(|end| *end <= entry.bytes);
        if end.is_none() {
            return Err(Error::new("a read goes beyond the tensor")
                .at(name.to_string())
                .expected(format!("at most {} bytes", entry.bytes))
                .found(format!("{} bytes from {start}", out.len())));
        }
        shard.pread(out, entry.offset + start).map_err(|e| e.at(name.to_string()))
    }

    /// A tensor as f32 (from F32, BF16 or F16), row-major.
    ///
    /// # Errors
    /// As [`Checkpoint::read_bytes`], and another dtype.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let mut out = vec![0f32; self.info(name)?.numel()];
        self.read_f32_into(name, &mut out)?;
        Ok(out)
    }

    /// [`Checkpoint::read_f32`] into memory that is there already; 512 KiB per thread are allocated besides.
    ///
    /// # Errors
    /// As [`Checkpoint::read_f32`], and an `out` of another length than the tensor's.
    pub fn read_f32_into(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let numel = self.info(name)?.numel();
        if out.len() != numel {
            return Err(Error::new("the destination has another size than the tensor")
                .at(name.to_string())
                .expected(format!("{numel} elements"))
                .found(format!("{}", out.len())));
        }
        self.read_f32_at(name, 0, out)
    }

    /// Fills `out` with the elements of a tensor from element `start` on, as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::read_f32`], and a range beyond the tensor.
    pub fn read_f32_at(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let info = self.info(name)?;
        let size = info.dtype.size_in_bytes();
        if !matches!(info.dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(Error::new("the tensor does not hold floating-point weights")
                .at_path(&info.file)
                .at(name.to_string())
                .expected("F32, BF16 or F16")
                .found(info.dtype.as_str())
                .next("a 4-bit weight is read with Base::nf4"));
        }
        if start.checked_add(out.len()).is_none_or(|end| end > info.numel()) {
            return Err(Error::new("a read goes beyond the tensor")
                .at(name.to_string())
                .expected(format!("at most {} elements", info.numel()))
                .found(format!("{} from {start}", out.len())));
        }
        out.par_chunks_mut(CHUNK).enumerate().try_for_each_init(Vec::new, |bits: &mut Vec<u16>, (i, out)| {
            let at = ((start + i * CHUNK) * size) as u64;
            if info.dtype == DType::F32 {
                // Files and supported machines are little-endian.
                return self.read_bytes_at(name, at, bytemuck::cast_slice_mut(out));
            }
            bits.resize(out.len(), 0);
            self.read_bytes_at(name, at, bytemuck::cast_slice_mut(bits))?;
            if info.dtype == DType::BF16 {
                bits.reinterpret_cast::<half::bf16>().convert_to_f32_slice(out);
            } else {
                bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(out);
            }
            Ok(())
        })
    }

    /// A tensor on the CPU, in the dtype of the file.
    ///
    /// # Errors
    /// As [`Checkpoint::read_bytes`].
    pub fn read_tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        let bytes = self.read_bytes(name)?;
        Tensor::from_raw_buffer(&bytes, info.dtype, &info.shape, &Device::Cpu)
            .map_err(|e| Error::from(e).at(name.to_string()))
    }

    /// The files, in order.
    pub fn shards(&self) -> Vec<PathBuf> {
        self.0.shards.iter().map(|s| s.path.clone()).collect()
    }

    /// The `__metadata__` of all files; of a key in several, the last file's value.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.0.shards.iter().flat_map(|s| s.header.metadata.clone()).collect()
    }

    /// The directory or file that was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        self.0.shards.iter().flat_map(|s| &s.header.entries).map(|e| e.bytes).sum()
    }

    fn find(&self, name: &str) -> Result<(&Shard, &Entry)> {
        if let Some((s, e)) = self.0.names.get(name) {
            let shard = &self.0.shards[*s];
            return Ok((shard, &shard.header.entries[*e]));
        }
        let near = self.0.names.keys().max_by(|a, b| {
            let score = |k: &str| strsim::jaro_winkler(name, k);
            score(a).total_cmp(&score(b)).then(b.cmp(a))
        });
        let e = Error::new("the checkpoint has no such tensor")
            .at_path(&self.0.path)
            .expected(format!("`{name}`"))
            .found(format!("{} tensors without it", self.0.names.len()));
        Err(match near {
            Some(near) => e.next(format!("the nearest name there is `{near}`")),
            None => e.next("the file is empty: download or save it again"),
        })
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, files) = (self.0.names.len(), self.0.shards.len());
        write!(f, "Checkpoint({}: {n} tensors, {} bytes, {files} file(s))", self.0.path.display(), self.bytes())
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        let header = header::read(&file, &path)?;
        Ok(Shard { path, file, header })
    }

    fn pread(&self, out: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(out, at).map_err(|e| {
            let short = e.kind() == std::io::ErrorKind::UnexpectedEof;
            let e = Error::io("read", &self.path, e);
            if short { e.next("the file became shorter after it was opened: download or save it again") } else { e }
        })
    }
}

type Index = BTreeMap<String, String>;

/// The files of a model directory, and what its index says of them.
fn shards_of(dir: &Path) -> Result<(Vec<PathBuf>, Option<Index>)> {
    let (index, single) = (dir.join(INDEX), dir.join(SINGLE));
    if index.exists() {
        let map = read_index(&index)?;
        let names: BTreeSet<&String> = map.values().collect();
        let mut files = Vec::new();
        for name in names {
            // An index must not lead out of its directory.
            if name.is_empty() || name.contains('/') || name.contains('\\') || name.as_str() == ".." {
                return Err(Error::new("the index names a file elsewhere")
                    .at_path(&index)
                    .expected("file names in the same directory")
                    .found(format!("`{name}`"))
                    .next("download the checkpoint again"));
            }
            let file = dir.join(name);
            if !file.exists() {
                let missing = map.values().filter(|v| *v == name).count();
                return Err(Error::new("a shard of the checkpoint is missing")
                    .at_path(&index)
                    .expected(format!("{name}, with {missing} tensors"))
                    .found("no such file")
                    .next("finish the download of the model"));
            }
            files.push(file);
        }
        return Ok((files, Some(map)));
    }
    if single.exists() {
        return Ok((vec![single], None));
    }
    let found = match std::fs::read_dir(dir) {
        Ok(entries) => {
            let mut names: Vec<_> =
                entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).take(20).collect();
            names.sort();
            if names.is_empty() { "an empty directory".into() } else { names.join(", ") }
        }
        Err(e) => return Err(Error::io("read the directory", dir, e)),
    };
    let torch = found.contains("pytorch_model");
    Err(Error::new("no safetensors checkpoint in this directory")
        .at_path(dir)
        .expected(format!("{SINGLE} or {INDEX}"))
        .found(found)
        .next(if torch { "convert the .bin files to safetensors" } else { "check the path, or download the model" }))
}

fn read_index(path: &Path) -> Result<Index> {
    #[derive(serde::Deserialize)]
    struct Raw {
        weight_map: Index,
    }
    let text = files::read_to_string(path)?;
    let raw: Raw = json::parse(text.as_bytes()).and_then(serde_json::from_value).map_err(|e| {
        Error::new("the index of the checkpoint is not valid")
            .at_path(path)
            .expected("{\"weight_map\": {tensor: file}}")
            .caused_by(e)
            .next("download the checkpoint again")
    })?;
    Ok(raw.weight_map)
}

fn check_index(dir: &Path, index: &Index, shards: &[Shard], names: &HashMap<String, (usize, usize)>) -> Result<()> {
    for (name, file) in index {
        let there = names.get(name).map(|(s, _)| &shards[*s].path);
        if there != Some(&dir.join(file)) {
            return Err(Error::new("the index and the shards do not agree")
                .at_path(dir.join(INDEX))
                .expected(format!("{name} in {file}"))
                .found(there.map_or("no such tensor".into(), |p| format!("it is in {}", p.display())))
                .next("download the checkpoint again"));
        }
    }
    Ok(())
}
