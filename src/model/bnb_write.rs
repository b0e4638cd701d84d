//! Writing a bitsandbytes 4-bit checkpoint from a dense one, in bounded memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::DType;

use super::bnb::{self, QuantizationConfig};
use super::outdir::OutDir;
use super::writer::{ShardedWriter, TensorHeader, canonical_order, pt_metadata};
use super::{Base, Checkpoint};
use crate::nf4::{self, Absmax, Nf4Config, Nf4Tensor};
use crate::{Error, Result, interrupt};

/// Tensors per shard, as transformers 4 splits; a larger tensor gets a shard of its own.
pub(crate) const MAX_SHARD_BYTES: u64 = 5_000_000_000;
/// Elements that are read and quantized at a time: 16 MiB of f32, a multiple of every blocksize.
const WINDOW: usize = 1 << 22;
/// Bytes copied at a time.
const COPY: usize = 4 << 20;

/// Quantizes every linear module of a dense model but `lm_head`, as transformers does with bitsandbytes, and writes a
/// model directory that both read: same keys, same bytes.
///
/// One tensor is in memory at a time (in 4 bits). The directory appears whole or not at all.
///
/// # Errors
/// A base that is 4-bit already, weights that are not finite, an output directory that is not empty or cannot be
/// written.
pub fn write_bnb_4bit(base: &Base, dir: impl AsRef<Path>, cfg: Nf4Config) -> Result<()> {
    if base.quantization().is_some() {
        return Err(Error::new("the model is in 4 bits already")
            .at_path(base.dir())
            .expected("a dense checkpoint")
            .found("a quantization_config")
            .next("use it as it is"));
    }
    cfg.validate()?;
    let out = OutDir::create(dir)?;
    let mut writer = BnbWriter::create(out.path())?;
    let linears = base.spec().linears();
    for m in linears.iter().filter(|m| m.layer.is_some()) {
        let name = format!("{}.weight", m.name);
        writer.add(&name, &quantize_streamed(base.checkpoint(), &name, cfg)?)?;
    }
    writer.finish(base.checkpoint(), MAX_SHARD_BYTES)?;
    out.copy_side_files(base.dir())?;
    out.write_config(base, Some(QuantizationConfig::to_json(cfg, torch_name(base.spec().dtype))))?;
    out.commit()
}

/// torch's name of a dtype of weights.
pub(crate) fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// Quantizes a weight window by window: its dense form is never whole in memory.
pub(crate) fn quantize_streamed(checkpoint: &Checkpoint, name: &str, cfg: Nf4Config) -> Result<Nf4Tensor> {
    let info = checkpoint.info(name)?;
    let n = info.numel();
    let mut parts = QuantParts::new(n, cfg);
    let mut window = vec![0f32; n.min(WINDOW)];
    for start in (0..n).step_by(WINDOW) {
        let window = &mut window[..(n - start).min(WINDOW)];
        checkpoint.read_f32_at(name, start, window)?;
        parts.push(window).map_err(|e| e.at(name.to_string()))?;
    }
    Ok(parts.finish(&info.shape, info.dtype))
}

/// A 4-bit tensor in the making, from consecutive windows.
pub(crate) struct QuantParts {
    cfg: Nf4Config,
    packed: Vec<u8>,
    absmax: Vec<f32>,
}

impl QuantParts {
    /// For a tensor of `n` elements.
    pub(crate) fn new(n: usize, cfg: Nf4Config) -> Self {
        let (packed, absmax) = (Vec::with_capacity(n.div_ceil(2)), Vec::with_capacity(n.div_ceil(cfg.blocksize)));
        QuantParts { cfg, packed, absmax }
    }

    /// Quantizes the next window; all but the last must be a multiple of the blocksize.
    pub(crate) fn push(&mut self, values: &[f32]) -> Result<()> {
        self.append(quantize_window(values, self.cfg)?);
        Ok(())
    }

    /// Appends a window that was quantized elsewhere.
    pub(crate) fn append(&mut self, (packed, absmax): (Vec<u8>, Vec<f32>)) {
        self.packed.extend(packed);
        self.absmax.extend(absmax);
    }

    /// The tensor: absmax is nested only now, because its mean is over all blocks.
    pub(crate) fn finish(self, shape: &[usize], dtype: DType) -> Nf4Tensor {
        let absmax = match self.cfg.double_quant {
            true => nf4::nest(self.absmax, self.cfg.nested_blocksize),
            false => Absmax::F32(self.absmax),
        };
        let (quant_type, blocksize) = (self.cfg.quant_type, self.cfg.blocksize);
        Nf4Tensor { packed: self.packed, absmax, shape: shape.to_vec(), dtype, quant_type, blocksize }
    }
}

/// Packed codes and f32 absmax of consecutive blocks.
pub(crate) fn quantize_window(values: &[f32], cfg: Nf4Config) -> Result<(Vec<u8>, Vec<f32>)> {
    let q = nf4::quantize_f32(values, &[values.len()], DType::F32, Nf4Config { double_quant: false, ..cfg })?;
    let absmax = match q.absmax {
        Absmax::F32(absmax) => absmax,
        nested => nested.to_f32()?,
    };
    Ok((q.packed, absmax))
}

/// Collects 4-bit weights and writes them with the dense rest of a checkpoint.
///
/// The header of a safetensors file comes first and holds the length of every quant state, which is known last: the
/// codes wait in a nameless temporary file beside the output.
pub(crate) struct BnbWriter {
    dir: PathBuf,
    spill: BufWriter<File>,
    at: u64,
    /// Every part: what it is and where its bytes are.
    parts: Vec<(TensorHeader, Bytes)>,
}

enum Bytes {
    Spilled { at: u64 },
    Here(Vec<u8>),
}

impl BnbWriter {
    /// A writer into the directory `dir`.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(dir).map_err(|e| Error::io("create a file", dir, e))?;
        let spill = BufWriter::with_capacity(1 << 20, file);
        Ok(BnbWriter { dir: dir.to_path_buf(), spill, at: 0, parts: Vec::new() })
    }

    /// Adds a 4-bit weight under the weight's whole name.
    pub(crate) fn add(&mut self, name: &str, q: &Nf4Tensor) -> Result<()> {
        for (name, dtype, shape, bytes) in q.to_bnb(name)? {
            let place = if bytes.len() > 4096 {
                self.spill.write_all(&bytes).map_err(|e| Error::io("write", &self.dir, e))?;
                let at = self.at;
                self.at += bytes.len() as u64;
                Bytes::Spilled { at }
            } else {
                Bytes::Here(bytes)
            };
            self.parts.push((TensorHeader::new(name, dtype, shape), place));
        }
        Ok(())
    }

    /// Adds a dense tensor that replaces the checkpoint's; kept in the temporary file.
    pub(crate) fn add_dense(
        &mut self,
        header: TensorHeader,
        fill: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let at = self.at;
        fill(&mut self.spill)?;
        self.at += header.bytes();
        self.parts.push((header, Bytes::Spilled { at }));
        Ok(())
    }

    /// Writes all in the order of the safetensors library; tensors of `checkpoint` that were not added are copied.
    pub(crate) fn finish(self, checkpoint: &Checkpoint, max_shard_bytes: u64) -> Result<u64> {
        let spill = self.spill.into_inner().map_err(|e| Error::io("write", &self.dir, e.into_error()))?;
        let mut parts: HashMap<String, (TensorHeader, Bytes)> =
            self.parts.into_iter().map(|(h, b)| (h.name.clone(), (h, b))).collect();
        let mut headers: Vec<TensorHeader> = parts.values().map(|(h, _)| h.clone()).collect();
        for name in checkpoint.names() {
            if !parts.contains_key(&name) && !bnb::is_part(checkpoint, &name) {
                let info = checkpoint.info(&name)?;
                headers.push(TensorHeader::new(name, info.dtype, info.shape));
            }
        }
        canonical_order(&mut headers);
        let mut out = ShardedWriter::create(&self.dir, headers.clone(), max_shard_bytes, &pt_metadata())?;
        for h in &headers {
            let mut write = |bytes: &[u8]| out.write(&h.name, bytes);
            match parts.remove(&h.name) {
                Some((_, Bytes::Here(bytes))) => write(&bytes)?,
                Some((_, Bytes::Spilled { at })) => {
                    let read = |pos, buf: &mut [u8]| spill.read_exact_at(buf, at + pos);
                    copy(h, |pos, buf| read(pos, buf).map_err(|e| Error::io("read", &self.dir, e)), write)?;
                }
                None => copy_tensor(checkpoint, h, write)?,
            }
        }
        out.finish()?;
        Ok(headers.iter().map(TensorHeader::bytes).sum())
    }
}

/// Copies a tensor of a checkpoint as it is.
pub(crate) fn copy_tensor(
    checkpoint: &Checkpoint,
    h: &TensorHeader,
    write: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    copy(h, |pos, buf| checkpoint.read_bytes_at(&h.name, pos, buf), write)
}

fn copy(
    h: &TensorHeader,
    read: impl Fn(u64, &mut [u8]) -> Result<()>,
    mut write: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let n = h.bytes() as usize;
    let mut buf = vec![0u8; n.min(COPY)];
    for start in (0..n).step_by(COPY) {
        let buf = &mut buf[..(n - start).min(COPY)];
        interrupt::check(|| format!("copying {}", h.name))?;
        read(start as u64, buf)?;
        write(buf)?;
    }
    Ok(())
}
