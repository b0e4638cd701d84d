//! 4-bit weights on the card: quantized, their scales nested, decoded. Bit for bit what [`crate::nf4`] gives.
//!
//! Twin of `src/nf4`; the kernels are in kernels/cuda/nf4.cu.

use candle_core::DType;

use super::CudaOps;
use super::gpu::{Arg, Gpu, Launch};
use crate::engine::ops::Weight;
use crate::nf4::{Nf4Config, QuantType};
use crate::{Error, Result};

/// The number by which kernels know a file's dtype.
pub(super) fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 1,
        DType::F32 => 2,
        _ => 0,
    }
}

pub(super) fn quant_type_code(quant_type: QuantType) -> u32 {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 1,
    }
}

/// 256 threads for each unit of work, on no more thread blocks than keep the card busy: the kernels stride over the rest.
pub(super) fn strided(gpu: &Gpu, work: usize) -> Launch {
    Launch { grid: [work.clamp(1, gpu.sm_count as usize * 16) as u32, 1, 1], block: 256, shared: 0 }
}

/// Where the scales of a 4-bit tensor lie.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scales {
    /// f32, one per block.
    Plain(u64),
    /// u8 codes, one per block; f32 scales of these; f32 `[1]`.
    Nested { codes: u64, absmax: u64, offset: u64 },
}

/// Thread blocks of the quantizing kernels that a multiprocessor has room for.
const QUANTIZING: usize = 6;

/// `source [n]` of `dtype` to `packed`, u8 `[ceil(n / 2)]`, and `absmax`, f32 `[blocks]`. A tensor may come in parts of
/// whole blocks. Where an element is not finite its block's absmax is not: see [`check_scales`].
pub(super) fn quantize(
    gpu: &Gpu,
    (source, dtype, n): (u64, DType, usize),
    config: Nf4Config,
    packed: u64,
    absmax: u64,
) -> Result<()> {
    let kernel = match dtype {
        DType::F32 => "nf4_quantize_f32",
        DType::F16 => "nf4_quantize_f16",
        _ => "nf4_quantize_bf16",
    };
    let args = [
        Arg::Ptr(source),
        Arg::U64(n as u64),
        Arg::U32(config.blocksize as u32),
        Arg::U32(quant_type_code(config.quant_type)),
        Arg::Ptr(packed),
        Arg::Ptr(absmax),
    ];
    // Eight elements a thread, whole blocks a warp, as many thread blocks as are at work at a time.
    let grid = [n.div_ceil(256 * 8).clamp(1, gpu.sm_count as usize * QUANTIZING) as u32, 1, 1];
    gpu.launch("nf4", kernel, Launch { grid, block: 256, shared: 0 }, &args)
}

/// The mean of `absmax [blocks]` into `mean`, f32 `[1]`.
pub(super) fn mean(gpu: &Gpu, absmax: u64, blocks: usize, mean: u64) -> Result<()> {
    let args = [Arg::Ptr(absmax), Arg::U32(blocks as u32), Arg::Ptr(mean)];
    // At most MEAN_BLOCKS of the kernel file.
    let grid = [blocks.div_ceil(256 * 16).clamp(1, 256) as u32, 1, 1];
    gpu.launch("nf4", "nf4_absmax_mean", Launch { grid, block: 256, shared: 0 }, &args)
}

/// [`mean`]; an error when the tensor had elements that are not finite.
pub(super) fn check_scales(gpu: &Gpu, absmax: u64, blocks: usize, blocksize: usize, mean: u64) -> Result<()> {
    self::mean(gpu, absmax, blocks, mean)?;
    let mut found = [0f32];
    gpu.read(mean, bytemuck::cast_slice_mut(&mut found))?;
    if found[0].is_finite() {
        return Ok(());
    }
    let mut all = vec![0f32; blocks];
    gpu.read(absmax, bytemuck::cast_slice_mut(&mut all))?;
    let bad = all.iter().position(|a| !a.is_finite()).unwrap_or(0);
    Err(Error::new("a value that is not finite cannot be quantized")
        .at(format!("elements {} to {} (block {bad})", bad * blocksize, (bad + 1) * blocksize - 1))
        .expected("finite weights")
        .found(all.get(bad).map_or(f32::NAN, |a| *a).to_string())
        .next("check the file that the weights came from"))
}

/// Nested quantization of `scales`, f32 `[blocks]`, which may not overlap the results: `codes`, u8 `[blocks]`; `absmax`,
/// f32, one per `nested_blocksize`; `offset`, f32 `[1]`, the mean, which is there already.
pub(super) fn nest(
    gpu: &Gpu,
    (scales, blocks): (u64, usize),
    nested_blocksize: usize,
    codes: u64,
    absmax: u64,
    offset: u64,
) -> Result<()> {
    let args = [
        Arg::Ptr(scales),
        Arg::Ptr(offset),
        Arg::U32(blocks as u32),
        Arg::U32(nested_blocksize as u32),
        Arg::Ptr(codes),
        Arg::Ptr(absmax),
    ];
    gpu.launch("nf4", "nf4_absmax_nest", strided(gpu, blocks.div_ceil(nested_blocksize).div_ceil(8)), &args)
}

/// How a decoded matrix lies in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// Columns of the matrix.
    pub k: usize,
    /// Elements from row to row: `k`, or more where `k` is a multiple of 8.
    pub row: usize,
    /// What stands beside it, from column `k` on.
    pub beside: Option<ScaledB>,
}

impl Rows {
    /// One row after the other.
    pub fn dense(k: usize) -> Self {
        Rows { k, row: k, beside: None }
    }
}

/// `scaling * B` as columns of a matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScaledB {
    /// Address of f32 `[out, r]`.
    pub b: u64,
    pub r: usize,
    /// Column of the matrix where it begins; before it are zeros.
    pub first: usize,
    pub scaling: f32,
}

/// `out`, n elements of the compute dtype from 4 bits. `packed` and `out` are aligned to 16 bytes.
pub(super) fn dequantize(
    gpu: &Gpu,
    packed: u64,
    scales: Scales,
    config: Nf4Config,
    n: usize,
    out: u64,
    rows: Rows,
) -> Result<()> {
    if rows.row != rows.k && n / rows.k >= 1 << 20 {
        return Err(Error::new("a 4-bit matrix has too many rows for columns beside it")
            .expected("fewer than 2^20, for which the kernel's division is exact")
            .found((n / rows.k).to_string())
            .next("leave the module out of target_modules"));
    }
    // Two words of eight codes a thread.
    let how = Launch { grid: [n.div_ceil(256 * 8 * 2).max(1) as u32, 1, 1], block: 256, shared: 0 };
    let (n, shift) = (Arg::U64(n as u64), Arg::U32(config.blocksize.trailing_zeros()));
    let (quant_type, out) = (Arg::U32(quant_type_code(config.quant_type)), Arg::Ptr(out));
    let packed = Arg::Ptr(packed);
    let none = ScaledB { b: 0, r: 0, first: 0, scaling: 0.0 };
    let ScaledB { b, r, first, scaling } = rows.beside.unwrap_or(none);
    // By which the kernel divides where there is room between rows.
    let reciprocal = (1u64 << 44).div_ceil((rows.k as u64 / 8).max(1));
    let [k, row, r, first] = [rows.k, rows.row, r, first].map(|n| Arg::U32(n as u32));
    let rows = [k, row, Arg::U64(reciprocal), Arg::Ptr(b), r, first, Arg::F32(scaling)];
    match scales {
        Scales::Plain(absmax) => {
            let args = [packed, Arg::Ptr(absmax), n, shift, quant_type, out];
            gpu.launch("nf4", "nf4_dequantize", how, &[&args[..], &rows].concat())
        }
        Scales::Nested { codes, absmax, offset } => {
            let nested_shift = Arg::U32(config.nested_blocksize.trailing_zeros());
            let [codes, absmax, offset] = [codes, absmax, offset].map(Arg::Ptr);
            let args = [packed, codes, absmax, offset, n, shift, nested_shift, quant_type, out];
            gpu.launch("nf4", "nf4_dequantize_nested", how, &[&args[..], &rows].concat())
        }
    }
}

impl CudaOps {
    /// A 4-bit weight of `numel` elements, decoded to the compute dtype at `out`.
    pub(super) fn decode(&self, weight: &Weight, numel: usize, out: u64, rows: Rows) -> Result<()> {
        let Weight::Nf4 { packed, absmax, nested, config } = *weight else { return Ok(()) };
        let scales = match nested {
            None => Scales::Plain(self.ptr(absmax)),
            Some(n) => {
                Scales::Nested { codes: self.ptr(absmax), absmax: self.ptr(n.absmax), offset: self.ptr(n.offset) }
            }
        };
        dequantize(&self.gpu, self.ptr(packed), scales, config, numel, out, rows)
    }

    /// See [`quantize`].
    pub(super) fn quantize_chunk(
        &self,
        source: u64,
        dtype: DType,
        n: usize,
        config: Nf4Config,
        packed: u64,
        absmax: u64,
    ) -> Result<()> {
        quantize(&self.gpu, (source, dtype, n), config, packed, absmax)
    }

    /// The whole tensor's scales to their final form: see [`check_scales`] and [`nest`].
    pub(super) fn nest_absmax(
        &self,
        scales: u64,
        blocks: usize,
        config: Nf4Config,
        codes: u64,
        absmax: u64,
        offset: u64,
    ) -> Result<()> {
        check_scales(&self.gpu, scales, blocks, config.blocksize, offset)?;
        nest(&self.gpu, (scales, blocks), config.nested_blocksize, codes, absmax, offset)
    }

    /// Plain scales that are where they stay: see [`check_scales`]; `spare` has room for an f32.
    pub(super) fn check_absmax(&self, absmax: u64, blocks: usize, config: Nf4Config, spare: u64) -> Result<()> {
        check_scales(&self.gpu, absmax, blocks, config.blocksize, spare)
    }
}
