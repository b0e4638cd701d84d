//! From 4 bits back to numbers.

use half::{bf16, f16};
use rayon::prelude::*;

use super::absmax::AbsmaxRef;
use super::codebook::QuantType;
use super::element::{Element, Lanes, flush};
use super::quantize::CHUNK;
use super::tensor::Nf4Tensor;

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
pub fn dequantize_f16_into(
    packed: &[u8],
    absmax: AbsmaxRef<'_>,
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [f16],
) {
    decode(packed, absmax, quant_type, blocksize, out);
}

/// A checked tensor, decoded to a new vector.
pub(super) fn dequantize_to<T: Lanes>(q: &Nf4Tensor) -> Vec<T> {
    let mut out = T::zeros(q.numel());
    decode(&q.packed, q.absmax.borrow(), q.quant_type, q.blocksize, &mut out);
    out
}

fn decode<T: Lanes>(packed: &[u8], absmax: AbsmaxRef<'_>, quant_type: QuantType, blocksize: usize, out: &mut [T]) {
    assert!(blocksize.is_power_of_two() && (32..=4096).contains(&blocksize), "blocksize {blocksize}");
    assert_eq!(packed.len(), out.len().div_ceil(2), "packed bytes for {} elements", out.len());
    assert_eq!(absmax.len(), out.len().div_ceil(blocksize), "absmax values for {} elements", out.len());
    assert!(absmax.is_whole(), "nested absmax values");
    let code = quant_type.code();
    out.par_chunks_mut(CHUNK).zip(packed.par_chunks(CHUNK / 2)).enumerate().for_each(|(chunk, (out, packed))| {
        decode_blocks(packed, absmax, chunk * (CHUNK / blocksize), &code, blocksize, out);
    });
}

/// Blocks one after the other; `first` is the number of the first one in `absmax`.
fn decode_blocks<T: Lanes>(
    packed: &[u8],
    absmax: AbsmaxRef<'_>,
    first: usize,
    code: &[f32; 16],
    blocksize: usize,
    out: &mut [T],
) {
    #[cfg(target_arch = "x86_64")]
    let fast = super::simd::available();
    for (b, (out, packed)) in out.chunks_mut(blocksize).zip(packed.chunks(blocksize / 2)).enumerate() {
        let absmax = absmax.get(first + b);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the CPU has the features; a whole block is a multiple of 32.
        if fast && out.len() == blocksize && unsafe { super::simd::decode_block(packed, code, absmax, out) } {
            continue;
        }
        decode_block(packed, &values::<T>(code, absmax), out);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_paths_equal_the_definition() {
        let absmax = [
            0.0,
            1.0,
            0.03,
            3.3e38,
            1.2e-38,
            1e-39,
            6.1e-5,
            65504.0,
            f32::INFINITY,
            f32::NAN,
            -0.5,
            1e-7,
            65519.9,
            1.0625,
        ];
        for blocksize in [32, 64, 256] {
            let n = blocksize * absmax.len() - 5;
            let packed: Vec<u8> = (0..n.div_ceil(2)).map(|i| (i * 37 + i / 256) as u8).collect();
            for quant_type in [QuantType::Nf4, QuantType::Fp4] {
                let q = (&packed[..], AbsmaxRef::F32(&absmax), quant_type, blocksize);
                check::<f32>(q, n, |v| u64::from(v.to_bits()));
                check::<bf16>(q, n, |v| u64::from(v.to_bits()));
                check::<f16>(q, n, |v| u64::from(v.to_bits()));
            }
        }
    }

    fn check<T: Lanes>(q: (&[u8], AbsmaxRef<'_>, QuantType, usize), n: usize, bits: impl Fn(T) -> u64) {
        let (packed, absmax, quant_type, blocksize) = q;
        let mut found = T::zeros(n);
        decode(packed, absmax, quant_type, blocksize, &mut found);
        for (i, v) in found.into_iter().enumerate() {
            let nibble = packed[i / 2] >> if i % 2 == 0 { 4 } else { 0 } & 15;
            let expected = T::write(flush(quant_type.code()[usize::from(nibble & 15)] * absmax.get(i / blocksize)));
            // A NaN has many bit patterns.
            let both_nan = v.read().is_nan() && expected.read().is_nan();
            assert!(both_nan || bits(v) == bits(expected), "{quant_type:?} {blocksize} at {i}: {}", v.read());
        }
    }
}
