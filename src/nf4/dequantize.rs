//! From 4 bits back to numbers.

use half::{bf16, f16};
use rayon::prelude::*;

use super::codebook::QuantType;
use super::element::{Element, flush};
use super::quantize::CHUNK;
use super::tensor::{AbsmaxRef, Nf4Tensor};

/// Decodes 4-bit blocks to f32: `out[i] = code[q[i]] * absmax[i / blocksize]`, `i` over the flat tensor.
///
/// A product below the normal range of f32 is zero, as on the GPU. `packed`: `[ceil(out.len() / 2)]`; `absmax`: one per block of `blocksize`. Allocates nothing; multi-threaded.
///
/// # Panics
/// If the lengths do not fit together or `blocksize` is no power of two from 32 to 4096; what comes from outside is
/// checked before, by [`Nf4Tensor::validate`].
pub fn dequantize_into(packed: &[u8], absmax: AbsmaxRef<'_>, quant_type: QuantType, blocksize: usize, out: &mut [f32]) {
    decode(packed, absmax, quant_type, blocksize, out);
}

/// [`dequantize_into`], rounded to bf16 (to nearest, ties to even).
///
/// # Panics
/// As [`dequantize_into`].
pub fn dequantize_bf16_into(
    packed: &[u8],
    absmax: AbsmaxRef<'_>,
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [bf16],
) {
    decode(packed, absmax, quant_type, blocksize, out);
}

/// [`dequantize_into`], rounded to f16 (to nearest, ties to even).
///
/// # Panics
/// As [`dequantize_into`].
pub fn dequantize_f16_into(packed: &[u8], absmax: AbsmaxRef<'_>, quant_type: QuantType, blocksize: usize, out: &mut [f16]) {
    decode(packed, absmax, quant_type, blocksize, out);
}

/// A checked tensor, decoded to a new vector.
pub(super) fn dequantize_to<T: Element>(q: &Nf4Tensor) -> Vec<T> {
    let mut out = vec![T::write(0.0); q.numel()];
    decode(&q.packed, q.absmax.borrow(), q.quant_type, q.blocksize, &mut out);
    out
}

fn decode<T: Element>(packed: &[u8], absmax: AbsmaxRef<'_>, quant_type: QuantType, blocksize: usize, out: &mut [T]) {
    assert!(blocksize.is_power_of_two() && (32..=4096).contains(&blocksize), "blocksize {blocksize}");
    assert_eq!(packed.len(), out.len().div_ceil(2), "packed bytes for {} elements", out.len());
    assert_eq!(absmax.len(), out.len().div_ceil(blocksize), "absmax values for {} elements", out.len());
    assert!(absmax.is_whole(), "nested absmax values");
    let code = quant_type.code();
    out.par_chunks_mut(CHUNK).zip(packed.par_chunks(CHUNK / 2)).enumerate().for_each(|(chunk, (out, packed))| {
        let first = chunk * (CHUNK / blocksize);
        for (b, (out, packed)) in out.chunks_mut(blocksize).zip(packed.chunks(blocksize / 2)).enumerate() {
            decode_block(packed, &values::<T>(&code, absmax.get(first + b)), out);
        }
    });
}

/// The sixteen values that an element of one block can have.
fn values<T: Element>(code: &[f32; 16], absmax: f32) -> [T; 16] {
    code.map(|c| T::write(flush(c * absmax)))
}

/// One block, element by element.
fn decode_block<T: Element>(packed: &[u8], values: &[T; 16], out: &mut [T]) {
    for (pair, byte) in out.chunks_mut(2).zip(packed) {
        pair[0] = values[usize::from(byte >> 4)];
        if let Some(low) = pair.get_mut(1) {
            *low = values[usize::from(byte & 15)];
        }
    }
}
