//! Base weights into the arena: read piece by piece, converted and quantized on the device.
//!
//! The pieces pass through cuBLASLt's workspace, which nothing else uses meanwhile, and through two pinned buffers, so that
//! a piece is read, by all cores, while the one before it is copied. Host memory beside those: none. The buffers stay for the weights
//! that follow, until a phase begins.

use candle_core::DType;
use rayon::prelude::*;

use super::gpu::{Arg, Gpu, Launch};
use super::{CudaOps, nf4};
use crate::engine::backend::{WeightSource, write_quantized};
use crate::engine::layout::{MATMUL_WORKSPACE, WeightSlot};
use crate::engine::ops::Weight;
use crate::{Error, Result};

/// Bytes of a piece of a weight in its file's dtype.
const PIECE: usize = 8 << 20;

/// What a core reads of a piece.
const SHARE: usize = 512 << 10;

/// Two pinned buffers of a piece each.
pub(super) struct Staging(*mut u8);

impl Staging {
    fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Staging(gpu.allocate_host(2 * PIECE as u64)?))
    }

    /// `bytes` of one of the two, from which nothing is being copied.
    fn buffer(&mut self, which: usize, bytes: usize) -> &mut [u8] {
        // SAFETY: inside the allocation; the caller has waited for the copy out of this half.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(which * PIECE), bytes) }
    }
}

impl CudaOps {
    pub(super) fn load_weight(&mut self, slot: &WeightSlot, source: &mut WeightSource<'_>) -> Result<()> {
        if let WeightSource::Quantized(q) = source {
            return self.load_quantized(slot, q.clone());
        }
        match slot.weight {
            Weight::Dense { w } => {
                let elem = self.region(w).dtype.size_in_bytes() as u64;
                let (out, master) = (self.ptr(w), slot.master.map(|m| self.ptr(m)));
                let numel: usize = slot.shape.iter().product();
                self.pieces(source, numel, MATMUL_WORKSPACE - PIECE, |ops, first, n, staged, dtype| {
                    ops.convert(out + first as u64 * elem, staged, n, dtype, false)?;
                    match master {
                        Some(master) => ops.convert(master + first as u64 * 4, staged, n, dtype, true),
                        None => Ok(()),
                    }
                })
            }
            Weight::Nf4 { packed, absmax, nested, config } => {
                let numel: usize = slot.shape.iter().product();
                let blocks = numel.div_ceil(config.blocksize);
                // Scales wait in the workspace until all are known: nesting takes their mean away.
                let (packed, scales) =
                    (self.ptr(packed), if nested.is_some() { self.workspace() } else { self.ptr(absmax) });
                let room = MATMUL_WORKSPACE - PIECE;
                if nested.is_some() && blocks * 4 > room {
                    return Err(Error::new("the weight is too large to be quantized on the GPU")
                        .at(slot.name.clone())
                        .expected(format!("at most {} elements", room / 4 * config.blocksize))
                        .found(numel.to_string())
                        .next("quantize it on the host and save it in 4 bits, or plan with .double_quant(false)"));
                }
                self.pieces(source, numel, MATMUL_WORKSPACE - PIECE, |ops, first, n, staged, dtype| {
                    let (packed, scales) = (packed + first as u64 / 2, scales + (first / config.blocksize * 4) as u64);
                    ops.quantize_chunk(staged, dtype, n, config, packed, scales)
                })?;
                match nested {
                    Some(n) => {
                        let (codes, groups, offset) = (self.ptr(absmax), self.ptr(n.absmax), self.ptr(n.offset));
                        self.nest_absmax(scales, blocks, config, codes, groups, offset)
                    }
                    None => self.check_absmax(scales, blocks, config, self.workspace()),
                }
            }
        }
    }

    /// A weight that is stored in 4 bits: its bytes, or its values when the plan wants another form.
    fn load_quantized(&mut self, slot: &WeightSlot, q: crate::nf4::Nf4Tensor) -> Result<()> {
        match slot.weight {
            Weight::Dense { w } => {
                let values = q.dequantize_f32()?;
                if self.region(w).dtype == DType::F32 {
                    return self.upload(w, bytemuck::cast_slice(&values));
                }
                let halves: Vec<half::bf16> = values.iter().map(|x| half::bf16::from_f32(*x)).collect();
                self.upload(w, bytemuck::cast_slice(&halves))?;
                match slot.master {
                    Some(m) => self.upload(m, bytemuck::cast_slice(&values)),
                    None => Ok(()),
                }
            }
            Weight::Nf4 { packed, absmax, nested, config } => {
                let q = WeightSource::Quantized(q).quantize(config)?;
                write_quantized(self, &q, packed, absmax, nested)
            }
        }
    }

    fn upload(&mut self, id: crate::engine::ops::TensorId, bytes: &[u8]) -> Result<()> {
        self.gpu.upload(self.ptr(id), bytes)
    }

    /// Frees the pinned buffers of a load.
    pub(super) fn end_load(&mut self) {
        if let Some(staging) = self.staging.take() {
            let _ = self.gpu.wait();
            self.gpu.free_host(staging.0);
        }
    }

    fn workspace(&self) -> u64 {
        self.plan.layout().workspace.map_or(0, |id| self.ptr(id))
    }

    /// Brings a weight into the workspace piece by piece, from byte `at` of it on, and hands each to `take`: the first
    /// element, the number of elements, the address, the dtype.
    fn pieces(
        &mut self,
        source: &mut WeightSource<'_>,
        numel: usize,
        at: usize,
        mut take: impl FnMut(&mut Self, usize, usize, u64, DType) -> Result<()>,
    ) -> Result<()> {
        let staged = self.workspace() + at as u64;
        match source {
            WeightSource::File { checkpoint, name } => {
                let info = checkpoint.info(name)?;
                if !matches!(info.dtype, DType::F32 | DType::BF16 | DType::F16) {
                    return Err(Error::new("the tensor does not hold floating-point weights")
                        .at_path(&info.file)
                        .expected("F32, BF16 or F16")
                        .found(info.dtype.as_str()));
                }
                let size = info.dtype.size_in_bytes();
                let step = PIECE / size;
                let mut staging = match self.staging.take() {
                    Some(staging) => staging,
                    None => Staging::new(&self.gpu)?,
                };
                let mut read = || {
                    for (i, first) in (0..numel).step_by(step).enumerate() {
                        let n = step.min(numel - first);
                        // The copy out of this half is the one before the last: the stream is waited for one piece later.
                        let buffer = staging.buffer(i % 2, n * size);
                        let at = |share: usize| (first * size + share * SHARE) as u64;
                        let shares = buffer.par_chunks_mut(SHARE).enumerate();
                        shares.try_for_each(|(share, out)| checkpoint.read_bytes_at(name, at(share), out))?;
                        self.gpu.wait()?;
                        self.gpu.upload(staged, buffer)?;
                        take(self, first, n, staged, info.dtype)?;
                    }
                    Ok(())
                };
                let done = read();
                // Also after an error: the buffers are used again.
                let waited = self.gpu.wait();
                self.staging = Some(staging);
                done.and(waited)
            }
            WeightSource::Drawn { shape, constant, seed, .. } => {
                let std = if shape.len() == 1 { 0.0 } else { 0.02 };
                let step = PIECE / 2;
                for first in (0..numel).step_by(step) {
                    let n = step.min(numel - first);
                    let how = Launch { grid: [n.div_ceil(1024) as u32, 1, 1], block: 256, shared: 0 };
                    let args = [
                        Arg::Ptr(staged),
                        Arg::U64(first as u64),
                        Arg::U64(n as u64),
                        Arg::U64(*seed),
                        Arg::F32(std),
                        Arg::F32(*constant),
                    ];
                    self.gpu.launch("weights", "random_weights", how, &args)?;
                    take(self, first, n, staged, DType::BF16)?;
                }
                Ok(())
            }
            WeightSource::Quantized(_) => Err(Error::new("a 4-bit weight is not read in pieces")),
        }
    }

    fn convert(&mut self, out: u64, source: u64, n: usize, dtype: DType, master: bool) -> Result<()> {
        let how = Launch { grid: [n.div_ceil(256) as u32, 1, 1], block: 256, shared: 0 };
        let args = [
            Arg::Ptr(out),
            Arg::Ptr(source),
            Arg::U64(n as u64),
            Arg::U32(nf4::dtype_code(dtype)),
            Arg::U32(master.into()),
        ];
        self.gpu.launch("weights", "convert_weights", how, &args)
    }
}
