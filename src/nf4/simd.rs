//! The AVX-512 twins of [`quantize`](super::quantize) and [`dequantize`](super::dequantize): the same bits, and as fast
//! as memory.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::codebook::{NF4_THRESHOLDS, QuantType};
use super::element::Element;
use super::quantize::quantize_block;

/// Whether this CPU has what the functions below are compiled for.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// Sixteen elements at a time.
pub(super) trait Lanes: Element {
    /// Sixteen elements as f32.
    ///
    /// # Safety
    /// AVX-512F, and sixteen elements at `from`.
    unsafe fn load16(from: *const Self) -> __m512;

    /// Writes whole blocks: `out[i] = round(values[q[i]])`, where `q` are the nibbles of `packed`, the high one first.
    ///
    /// # Safety
    /// AVX-512F, BW and VL; `out.len()` is twice `packed.len()` and a multiple of 32; finite `values`.
    unsafe fn decode(packed: &[u8], values: __m512, out: &mut [Self]);
}

impl Lanes for f32 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn decode(packed: &[u8], values: __m512, out: &mut [f32]) {
        for (bytes, out) in packed.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            // Each byte in 64 bits: its high nibble becomes the lower index of two, its low nibble the upper.
            let b = _mm512_cvtepu8_epi64(_mm_set_epi64x(0, i64::from_le_bytes(*bytes)));
            let index = _mm512_or_si512(_mm512_srli_epi64::<4>(b), _mm512_slli_epi64::<32>(b));
            // Only the low four bits of an index count.
            let v = _mm512_permutexvar_ps(index, values);
            // SAFETY: sixteen f32 at `out`.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
        }
    }
}

impl Lanes for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const bf16) -> __m512 {
        // SAFETY: the caller's; sixteen times 16 bits.
        let bits = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn decode(packed: &[u8], values: __m512, out: &mut [bf16]) {
        // To nearest, ties to even: half a unit less one, plus the last bit that stays. Finite values only.
        let bits = _mm512_castps_si512(values);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let values = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
        // SAFETY: the caller's; bf16 is 16 bits.
        unsafe { decode16(packed, values, out.as_mut_ptr().cast(), out.len()) }
    }
}

impl Lanes for f16 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const f16) -> __m512 {
        // SAFETY: the caller's; sixteen times 16 bits.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn decode(packed: &[u8], values: __m512, out: &mut [f16]) {
        let values = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(values);
        // SAFETY: the caller's; f16 is 16 bits.
        unsafe { decode16(packed, values, out.as_mut_ptr().cast(), out.len()) }
    }
}

/// [`Lanes::decode`] for sixteen values of 16 bits.
///
/// # Safety
/// AVX-512F and BW; `len` elements at `out`, twice `packed.len()` and a multiple of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn decode16(packed: &[u8], values: __m256i, out: *mut u16, len: usize) {
    debug_assert!(len == 2 * packed.len());
    // Twice, so that the fifth bit of an index does not matter.
    let values = _mm512_broadcast_i64x4(values);
    for (i, bytes) in packed.as_chunks::<16>().0.iter().enumerate() {
        // SAFETY: sixteen bytes.
        let b = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        let index = _mm512_or_si512(_mm512_srli_epi32::<4>(b), _mm512_slli_epi32::<16>(b));
        let v = _mm512_permutexvar_epi16(index, values);
        // SAFETY: 32 elements for each 16 bytes.
        unsafe { _mm512_storeu_si512(out.add(32 * i).cast(), v) }
    }
}

/// Decodes one whole block if the fast path gives the right bits for it; false if it was left alone.
///
/// # Safety
/// AVX-512F, BW and VL; `out.len()` is twice `packed.len()` and a multiple of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn decode_block<T: Lanes>(packed: &[u8], code: &[f32; 16], absmax: f32, out: &mut [T]) -> bool {
    if !absmax.is_finite() {
        return false;
    }
    // SAFETY: sixteen f32.
    let values = _mm512_mul_ps(unsafe { _mm512_loadu_ps(code.as_ptr()) }, _mm512_set1_ps(absmax));
    // Denormals become zero of the same sign.
    let bits = _mm512_castps_si512(values);
    let magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fff_ffff));
    let denormal = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x0080_0000));
    let flushed = _mm512_mask_and_epi32(bits, denormal, bits, _mm512_set1_epi32(i32::MIN));
    // SAFETY: the caller's; |code| <= 1, so the values are finite.
    unsafe { T::decode(packed, _mm512_castsi512_ps(flushed), out) };
    true
}

/// 15.5 s, rounded down, is one of 32 cells from -16 to 15, so narrow that each holds one threshold at most. A number's
/// code is that of its cell, plus one if it is above the cell's threshold.
struct Cells {
    threshold: [f32; 32],
    code: [i32; 32],
}

const SCALE: f32 = 15.5;

const CELLS: Cells = {
    let mut cells = Cells { threshold: [f32::INFINITY; 32], code: [0; 32] };
    let mut cell = -16i32;
    while cell < 16 {
        let at = (cell & 31) as usize;
        let mut t = 0;
        while t < 15 {
            let scaled = NF4_THRESHOLDS[t] * SCALE;
            let truncated = scaled as i32;
            let floor = if (truncated as f32) > scaled { truncated - 1 } else { truncated };
            if floor < cell {
                cells.code[at] += 1;
            } else if floor == cell {
                assert!(cells.threshold[at] == f32::INFINITY, "two thresholds in a cell");
                cells.threshold[at] = NF4_THRESHOLDS[t];
            }
            t += 1;
        }
        cell += 1;
    }
    cells
};

/// Below this absmax, whether an element is a denormal can change its code: the slow path knows.
const TINY: u32 = 0x0d80_0000; // 2^-100

/// NF4 for whole blocks: `packed` is half as long as `data`, `absmax` has one element per block.
///
/// # Safety
/// AVX-512F, BW and VL; `blocksize` is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn quantize_nf4<T: Lanes>(data: &[T], packed: &mut [u8], absmax: &mut [f32], blocksize: usize) {
    // SAFETY: 32 values in each table.
    let tables = unsafe {
        let (t, c) = (CELLS.threshold.as_ptr(), CELLS.code.as_ptr());
        (_mm512_loadu_ps(t), _mm512_loadu_ps(t.add(16)), _mm512_loadu_epi32(c), _mm512_loadu_epi32(c.add(16)))
    };
    let blocks = data.chunks_exact(blocksize).zip(packed.chunks_exact_mut(blocksize / 2)).zip(absmax);
    for ((x, bytes), absmax) in blocks {
        // SAFETY: the caller's; `bytes` has half of `x.len()`, a multiple of 32.
        unsafe {
            let bits = largest_magnitude(x);
            if !(TINY..0x7f80_0000).contains(&bits) {
                *absmax = quantize_block(x, bytes, QuantType::Nf4);
                continue;
            }
            *absmax = f32::from_bits(bits);
            let reciprocal = _mm512_set1_ps(1.0 / *absmax);
            for (x, bytes) in x.as_chunks::<16>().0.iter().zip(bytes.as_chunks_mut::<8>().0) {
                let q = codes(_mm512_mul_ps(T::load16(x.as_ptr()), reciprocal), tables);
                // Two codes in 64 bits: the first, in the lower half, becomes the high nibble.
                let byte = _mm512_or_si512(_mm512_slli_epi64::<4>(q), _mm512_srli_epi64::<32>(q));
                *bytes = _mm_cvtsi128_si64(_mm512_cvtepi64_epi8(byte)).to_le_bytes();
            }
        }
    }
}

/// The bits of the largest |x|; NaN and infinities are larger than all else.
///
/// # Safety
/// AVX-512F; `x.len()` is a multiple of 16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn largest_magnitude<T: Lanes>(x: &[T]) -> u32 {
    let mut largest = _mm512_setzero_si512();
    for x in x.as_chunks::<16>().0 {
        // SAFETY: sixteen elements.
        let bits = _mm512_castps_si512(unsafe { T::load16(x.as_ptr()) });
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fff_ffff)));
    }
    _mm512_reduce_max_epi32(largest) as u32
}

/// NF4 codes of sixteen finite numbers of magnitude 1 at most (up to rounding), each in 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes(s: __m512, tables: (__m512, __m512, __m512i, __m512i)) -> __m512i {
    const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    let cell = _mm512_cvt_roundps_epi32::<DOWN>(_mm512_mul_ps(s, _mm512_set1_ps(SCALE)));
    let threshold = _mm512_permutex2var_ps(tables.0, cell, tables.1);
    let code = _mm512_permutex2var_epi32(tables.2, cell, tables.3);
    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s, threshold);
    _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1))
}

/// Dynamic 8-bit codes of `x`: `start` holds the first code of each cell (the table, the number of the first cell, the
/// cells of one sign), `thresholds` where each code ends.
///
/// # Safety
/// AVX-512F, BW, DQ and VL; `codes` as long as `x`, a multiple of 16; a table of two times the cells and three bytes more.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn encode_dynamic(
    x: &[f32],
    codes: &mut [u8],
    (start, first, cells): (&[u8], u32, u32),
    thresholds: &[f32; 256],
) {
    let (first, cells) = (_mm512_set1_epi32(first as i32), _mm512_set1_epi32(cells as i32));
    let last = _mm512_sub_epi32(cells, _mm512_set1_epi32(1));
    for (x, codes) in x.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0) {
        // SAFETY: sixteen f32.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        let bits = _mm512_castps_si512(x);
        let upper = _mm512_srli_epi32::<16>(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fff_ffff)));
        let cell = _mm512_max_epi32(_mm512_sub_epi32(upper, first), _mm512_setzero_si512());
        let cell = _mm512_min_epi32(cell, last);
        let cell = _mm512_mask_add_epi32(cell, _mm512_movepi32_mask(bits), cell, cells);
        // SAFETY: every cell is in the table, and the three bytes after it.
        let code = unsafe { _mm512_i32gather_epi32::<1>(cell, start.as_ptr().cast()) };
        let code = _mm512_and_si512(code, _mm512_set1_epi32(0xff));
        // SAFETY: a code is at most 255.
        let threshold = unsafe { _mm512_i32gather_ps::<4>(code, thresholds.as_ptr()) };
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, threshold);
        let code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
        // NaN has code 0.
        let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(x, x);
        let bytes = _mm512_cvtepi32_epi8(_mm512_maskz_mov_epi32(number, code));
        // SAFETY: sixteen bytes.
        unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nf4::codebook::NF4_CODE;

    #[test]
    fn cells_give_the_codes_of_the_thresholds() {
        if !available() {
            return;
        }
        let check = |s: f32| {
            // SAFETY: the CPU has AVX-512; 32 values in each table.
            let code = unsafe {
                let (t, c) = (CELLS.threshold.as_ptr(), CELLS.code.as_ptr());
                let tables = (
                    _mm512_loadu_ps(t),
                    _mm512_loadu_ps(t.add(16)),
                    _mm512_loadu_epi32(c),
                    _mm512_loadu_epi32(c.add(16)),
                );
                _mm512_cvtsi512_si32(codes(_mm512_set1_ps(s), tables))
            };
            assert_eq!(code, i32::from(QuantType::Nf4.encode(s)), "{s:e}");
        };
        for t in NF4_THRESHOLDS.into_iter().chain(NF4_CODE) {
            [t, t.next_up(), t.next_down()].into_iter().for_each(check);
        }
        for i in -100_000..=100_000 {
            check(i as f32 / 100_000.0);
        }
        for cell in -16..=16 {
            let edge = (cell as f32 / SCALE).clamp(-1.0, 1.0);
            [edge, edge.next_up(), edge.next_down(), -0.0, f32::MIN_POSITIVE].into_iter().for_each(check);
        }
    }
}
