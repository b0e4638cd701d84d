//! From numbers to 4 bits.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::absmax::Absmax;
use super::codebook::{NF4_THRESHOLDS, QuantType};
use super::dynamic8;
use super::element::{Element, Lanes, flush};
use super::tensor::{Nf4Config, Nf4Tensor, check_dtype, checked_numel};
use super::widest;
use crate::{Error, Result, interrupt};

/// Elements per unit of parallel work: a multiple of every blocksize, so that no block is shared.
pub(super) const CHUNK: usize = 1 << 16;

/// Quantizes a tensor to 4 bits.
///
/// `notebooks/02_nf4_by_hand.ipynb` explains it.
///
/// `t`: f32, bf16 or f16, any shape with at least one element and any layout; what is not contiguous or not on the CPU
/// is copied first. A contiguous one is read in place, without a copy in f32.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use tunebook::nf4::{self, Nf4Config};
///
/// let w = Tensor::randn(0f32, 0.02, (64, 96), &Device::Cpu)?.to_dtype(DType::BF16)?;
/// let q = nf4::quantize(&w, Nf4Config { double_quant: false, ..Nf4Config::default() })?;
/// assert_eq!((q.packed.len(), q.absmax.len()), (64 * 96 / 2, 64 * 96 / 64));
/// // The transpose is another flat list, so it has other blocks.
/// assert_ne!(q.packed, nf4::quantize(&w.t()?, q.config())?.packed);
/// # Ok::<(), tunebook::Error>(())
/// ```
///
/// # Errors
/// A blocksize that is no power of two from 32 to 4096, an empty tensor, another dtype, a value that is not finite, or an interrupt.
pub fn quantize(t: &Tensor, cfg: Nf4Config) -> Result<Nf4Tensor> {
    check_dtype(t.dtype())?;
    with_cpu_data(t, |data, shape| match data {
        Data::F32(d) => quantize_slice(d, shape, DType::F32, cfg),
        Data::Bf16(d) => quantize_slice(d, shape, DType::BF16, cfg),
        Data::F16(d) => quantize_slice(d, shape, DType::F16, cfg),
    })
}

/// Quantizes a flat row-major f32 slice. `dtype` is what [`Nf4Tensor::dequantize`] shall give back.
///
/// # Errors
/// As [`quantize`], and a shape whose product is not the length of `data`.
pub fn quantize_f32(data: &[f32], shape: &[usize], dtype: DType, cfg: Nf4Config) -> Result<Nf4Tensor> {
    quantize_slice(data, shape, dtype, cfg)
}

/// Quantizes a flat row-major bf16 slice.
///
/// # Errors
/// As [`quantize_f32`].
pub fn quantize_bf16(data: &[bf16], shape: &[usize], cfg: Nf4Config) -> Result<Nf4Tensor> {
    quantize_slice(data, shape, DType::BF16, cfg)
}

/// Quantizes a flat row-major f16 slice.
///
/// # Errors
/// As [`quantize_f32`].
pub fn quantize_f16(data: &[f16], shape: &[usize], cfg: Nf4Config) -> Result<Nf4Tensor> {
    quantize_slice(data, shape, DType::F16, cfg)
}

/// The elements of a tensor, in place.
pub(super) enum Data<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// Calls `f` with the flat row-major elements of `t` and its shape.
pub(super) fn with_cpu_data<R>(t: &Tensor, f: impl FnOnce(Data<'_>, &[usize]) -> Result<R>) -> Result<R> {
    let t = t.to_device(&Device::Cpu)?.contiguous()?;
    let shape = t.dims().to_vec();
    let n = t.elem_count();
    let (storage, layout) = t.storage_and_layout();
    let start = layout.start_offset();
    let range = start..start + n;
    let outside = || Error::new("a tensor that reaches past its storage").at("tensor");
    let Storage::Cpu(cpu) = &*storage else {
        return Err(Error::new("a tensor that is not on the CPU").at("tensor").next("t.to_device(&Device::Cpu)?"));
    };
    match cpu {
        CpuStorage::F32(v) => f(Data::F32(v.get(range).ok_or_else(outside)?), &shape),
        CpuStorage::BF16(v) => f(Data::Bf16(v.get(range).ok_or_else(outside)?), &shape),
        CpuStorage::F16(v) => f(Data::F16(v.get(range).ok_or_else(outside)?), &shape),
        _ => Err(check_dtype(t.dtype()).err().unwrap_or_else(outside)),
    }
}

fn quantize_slice<T: Lanes>(data: &[T], shape: &[usize], dtype: DType, cfg: Nf4Config) -> Result<Nf4Tensor> {
    cfg.validate()?;
    check_dtype(dtype)?;
    check_length(data.len(), shape)?;
    let n = data.len();
    let mut packed = vec![0u8; n.div_ceil(2)];
    let mut absmax = vec![0f32; n.div_ceil(cfg.blocksize)];
    packed
        .par_chunks_mut(CHUNK / 2)
        .zip(absmax.par_chunks_mut(CHUNK / cfg.blocksize))
        .zip(data.par_chunks(CHUNK))
        .try_for_each(|((p, a), d)| {
            if interrupt::interrupted() {
                return Err(interrupt::taken(format!("quantizing {shape:?}")));
            }
            quantize_blocks(d, p, a, cfg.quant_type, cfg.blocksize);
            Ok(())
        })?;
    check_finite(data, &absmax, cfg.blocksize)?;
    let absmax = if cfg.double_quant { nest(absmax, cfg.nested_blocksize) } else { Absmax::F32(absmax) };
    Ok(Nf4Tensor { packed, absmax, shape: shape.to_vec(), dtype, quant_type: cfg.quant_type, blocksize: cfg.blocksize })
}

fn check_length(len: usize, shape: &[usize]) -> Result<()> {
    let n = checked_numel(shape)?;
    if n != len {
        return Err(Error::new("data and shape differ")
            .at("shape")
            .expected(format!("{n} elements for {shape:?}"))
            .found(format!("{len} elements")));
    }
    if n == 0 {
        return Err(Error::new("nothing to quantize")
            .at("tensor")
            .expected("at least one element")
            .found(format!("{shape:?}")));
    }
    Ok(())
}

/// A block's absmax is taken from bit patterns, so a NaN or an infinity in the block is the largest of them.
fn check_finite<T: Element>(data: &[T], absmax: &[f32], blocksize: usize) -> Result<()> {
    let Some(block) = absmax.iter().position(|a| !a.is_finite()) else { return Ok(()) };
    let start = block * blocksize;
    let inside = data.iter().skip(start).take(blocksize).position(|v| !v.read().is_finite()).unwrap_or(0);
    let found = data.get(start + inside).map_or(f32::NAN, |v| v.read());
    Err(Error::new("a value that is not finite cannot be quantized")
        .at(format!("element {} (block {block})", start + inside))
        .expected("finite weights")
        .found(found.to_string())
        .next("check the file that the weights came from"))
}

/// Blocks one after the other: `packed` and `absmax` belong to `data`.
fn quantize_blocks<T: Lanes>(
    mut data: &[T],
    mut packed: &mut [u8],
    mut absmax: &mut [f32],
    quant_type: QuantType,
    blocksize: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if quant_type == QuantType::Nf4 && super::simd::available() {
        let whole = data.len() / blocksize;
        let (x, bytes, a);
        (x, data) = data.split_at(whole * blocksize);
        (bytes, packed) = packed.split_at_mut(whole * blocksize / 2);
        (a, absmax) = absmax.split_at_mut(whole);
        // SAFETY: the CPU has the features; every blocksize is a multiple of 32.
        unsafe { super::simd::quantize_nf4(x, bytes, a, blocksize) };
    }
    let blocks = data.chunks(blocksize).zip(packed.chunks_mut(blocksize / 2)).zip(absmax);
    for ((x, bytes), absmax) in blocks {
        *absmax = match quant_type {
            QuantType::Nf4 => quantize_nf4_block(x, bytes),
            QuantType::Fp4 => quantize_block(x, bytes, quant_type),
        };
    }
}

/// Elements that [`nf4_piece`] encodes at a time.
const PIECE: usize = 32;

/// [`quantize_block`] for NF4, in an order that the compiler can vectorise.
fn quantize_nf4_block<T: Element>(x: &[T], bytes: &mut [u8]) -> f32 {
    let absmax = x.iter().fold(0f32, |m, v| larger(m, flush(v.read()).abs()));
    let reciprocal = 1.0 / absmax;
    for (x, bytes) in x.chunks(PIECE).zip(bytes.chunks_mut(PIECE / 2)) {
        // Past the end of an odd block there is a zero.
        let mut s = [0f32; PIECE];
        for (s, v) in s.iter_mut().zip(x) {
            *s = flush(v.read());
        }
        nf4_piece(&s, reciprocal, bytes);
    }
    absmax
}

widest! { fn nf4_piece(x: &[f32; PIECE], reciprocal: f32, bytes: &mut [u8]) = nf4_piece_body }

#[inline(always)]
fn nf4_piece_body(x: &[f32; PIECE], reciprocal: f32, bytes: &mut [u8]) {
    let s = x.map(|x| x * reciprocal);
    let mut codes = [0i32; PIECE];
    for t in NF4_THRESHOLDS {
        for (code, s) in codes.iter_mut().zip(&s) {
            *code += i32::from(*s > t);
        }
    }
    for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
}

/// One block, element by element: the definition that the fast paths are tested against. Returns its absmax.
pub(super) fn quantize_block<T: Element>(x: &[T], bytes: &mut [u8], quant_type: QuantType) -> f32 {
    let absmax = x.iter().fold(0f32, |m, v| larger(m, flush(v.read()).abs()));
    // Multiplied by the reciprocal, not divided: some codes differ. In an all-zero block 0 * inf is NaN: code 0.
    let reciprocal = 1.0 / absmax;
    for (byte, pair) in bytes.iter_mut().zip(x.chunks(2)) {
        let high = flush(pair[0].read()) * reciprocal;
        // Past the end of an odd block there is a zero.
        let low = pair.get(1).map_or(0.0, |v| flush(v.read())) * reciprocal;
        *byte = quant_type.encode(high) << 4 | quant_type.encode(low);
    }
    absmax
}

/// The larger of two that are not negative, by their bits: NaN is larger than all else.
fn larger(a: f32, b: f32) -> f32 {
    f32::from_bits(a.to_bits().max(b.to_bits()))
}

/// Nested quantization: takes the mean away and quantizes the rest to 8 bits.
pub(crate) fn nest(absmax: Vec<f32>, blocksize: usize) -> Absmax {
    let offset = mean(&absmax);
    let centred: Vec<f32> = absmax.iter().map(|a| a - offset).collect();
    let (codes, absmax) = dynamic8::quantize_blocks(&centred, dynamic8::Map::Signed, blocksize);
    Absmax::Nested { codes, absmax, offset, blocksize }
}

/// The mean, summed in f64 in eight lanes: a fixed order.
fn mean(values: &[f32]) -> f32 {
    let mut lanes = [0f64; 8];
    for chunk in values.chunks(8) {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*v);
        }
    }
    (lanes.iter().sum::<f64>() / values.len() as f64) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every path gives the bits of the definition, on blocks with zeros, denormals, tiny and huge numbers.
    #[test]
    fn all_paths_equal_the_definition() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        };
        // Random bits in random ranges of the exponent; one block in eight holds zeros.
        let mut random = |n: usize| -> Vec<f32> {
            let mut out = Vec::new();
            while out.len() < n {
                let (exponent, spread) = (next() >> 25, 1 + next() % 8);
                for _ in 0..64 {
                    let e = (2 * exponent + next() % spread).min(254);
                    let bits = (next() & 0x807f_ffff) | e << 23;
                    out.push(if exponent % 8 == 0 && out.len() % 3 > 0 { 0.0 } else { f32::from_bits(bits) });
                }
            }
            out.truncate(n);
            out
        };
        for (n, blocksize) in [(64 * 3000, 64), (4096 * 40 + 1, 4096), (32 * 1000 + 31, 32), (70_001, 128), (1, 64)] {
            let data = random(n);
            check(&data, blocksize);
            check(&data.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>(), blocksize);
            let in_range = |v: f32| f16::from_f32(v.clamp(-65504.0, 65504.0));
            check(&data.iter().map(|v| in_range(*v)).collect::<Vec<_>>(), blocksize);
        }
    }

    fn check<T: Lanes>(data: &[T], blocksize: usize) {
        let (bytes, blocks) = (data.len().div_ceil(2), data.len().div_ceil(blocksize));
        let mut expected = (vec![0u8; bytes], vec![0f32; blocks]);
        for (b, x) in data.chunks(blocksize).enumerate() {
            let at = b * blocksize / 2;
            let bytes = &mut expected.0[at..at + x.len().div_ceil(2)];
            expected.1[b] = quantize_block(x, bytes, QuantType::Nf4);
            let mut portable = vec![0u8; bytes.len()];
            let absmax = quantize_nf4_block(x, &mut portable);
            assert!(
                absmax.to_bits() == expected.1[b].to_bits() && portable == bytes,
                "portable, block {b} of {blocksize}"
            );
        }
        let mut found = (vec![0u8; bytes], vec![0f32; blocks]);
        quantize_blocks(data, &mut found.0, &mut found.1, QuantType::Nf4, blocksize);
        assert!(found == expected, "blocksize {blocksize}");
    }
}
