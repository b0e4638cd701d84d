//! 8-bit block quantization with bitsandbytes' dynamic map: for nested absmax values and for optimizer state.
//!
//! The map is a small float with a movable point: 255 values and zero between -1 and 1 (signed) or 0 and 1 (unsigned),
//! spaced finely near zero, seven decades deep. From [8-bit Optimizers](https://arxiv.org/abs/2110.02861), section 2.1.

use std::sync::OnceLock;

use rayon::prelude::*;

use super::codebook::linspace;
use super::element::flush;

/// The signed map, in rising order: `[0]` is -0.99296874, `[127]` is 0, `[255]` is 1. In files: `nested_quant_map`.
pub fn signed_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| dynamic_map(true))
}

/// The unsigned map, in rising order: `[0]` is 0, `[255]` is 1.
pub fn unsigned_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| dynamic_map(false))
}

/// Seven decades; in decade i, from 10^(i-6), as many linear steps as the bits that are left can count.
fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for i in 0..7 {
        let steps = if signed { 1 << i } else { 1 << (i + 1) };
        let decade = 10f64.powi(i - 6) as f32;
        for edge in linspace(0.1, 1.0, steps + 1).windows(2) {
            let mean = (edge[0] + edge[1]) / 2.0;
            values.push(decade * mean);
            if signed {
                values.push(-(decade * mean));
            }
        }
    }
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// The code of `x` (a value divided by its block's absmax) in a rising map of 256 values.
///
/// The binary search of the CUDA kernel, step by step, because on ties its answer depends on the path: from number
/// 127 in steps of 64 to 1, then a comparison with the midpoint to the neighbour on that side. NaN, which is what an
/// all-zero block gives, has code 0.
pub fn encode(map: &[f32; 256], x: f32) -> u8 {
    search(map, x, map[0])
}

/// [`encode`] with the value that stands for the lower neighbour of the lowest code.
fn search(map: &[f32; 256], x: f32, lowest: f32) -> u8 {
    let (mut pivot, mut low, mut high) = (127usize, 0usize, 255usize);
    let (mut below, mut above) = (lowest, map[255]);
    let mut value = map[127];
    for step in [64, 32, 16, 8, 4, 2, 1] {
        if x > value {
            (low, below) = (pivot, value);
            pivot += step;
        } else {
            (high, above) = (pivot, value);
            pivot -= step;
        }
        // The steps add up to 127: the mask changes nothing and spares a check.
        pivot &= 255;
        value = map[pivot];
    }
    let code = if x > value {
        if x > (above + value) * 0.5 { high } else { pivot }
    } else if x < (below + value) * 0.5 {
        low
    } else {
        pivot
    };
    code as u8
}

/// Quantizes to 8 bits in blocks of `blocksize`: the codes, and one absmax per block.
///
/// Denormals count as zero. A block of zeros has absmax 0 and codes 0. Multi-threaded.
///
/// ```
/// use tunebook::nf4::dynamic8;
/// let (codes, absmax) = dynamic8::quantize_blocks(&[0.5, -2.0, 0.0], dynamic8::signed_map(), 256);
/// assert_eq!(absmax, [2.0]);
/// let back = dynamic8::dequantize_blocks(&codes, &absmax, dynamic8::signed_map(), 256);
/// assert!((back[0] - 0.5).abs() < 0.01 && back[2] == 0.0);
/// ```
///
/// # Panics
/// If `blocksize` is 0.
pub fn quantize_blocks(data: &[f32], map: &[f32; 256], blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0u8; data.len()];
    let mut absmax = vec![0f32; data.len().div_ceil(blocksize)];
    codes.par_chunks_mut(blocksize).zip(data.par_chunks(blocksize)).zip(absmax.par_iter_mut()).for_each(
        |((codes, x), absmax)| {
            *absmax = x.iter().fold(0f32, |m, v| m.max(flush(*v).abs()));
            let reciprocal = 1.0 / *absmax;
            for (code, v) in codes.iter_mut().zip(x) {
                *code = encode(map, flush(*v) * reciprocal);
            }
        },
    );
    (codes, absmax)
}

/// The values back: `map[code] * absmax[i / blocksize]`. Elements past the last absmax are left out.
///
/// # Panics
/// If `blocksize` is 0.
pub fn dequantize_blocks(codes: &[u8], absmax: &[f32], map: &[f32; 256], blocksize: usize) -> Vec<f32> {
    let blocks = codes.chunks(blocksize).zip(absmax);
    blocks.flat_map(|(codes, a)| codes.iter().map(move |c| flush(map[usize::from(*c)] * a))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_their_landmarks() {
        let (s, u) = (signed_map(), unsigned_map());
        assert_eq!((s[0], s[127], s[254], s[255]), (-0.99296874, 0.0, 0.99296874, 1.0));
        assert_eq!((u[0], u[255]), (0.0, 1.0));
        assert!(s.windows(2).all(|w| w[0] < w[1]) && u.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn every_value_encodes_to_itself() {
        for map in [signed_map(), unsigned_map()] {
            for (i, v) in map.iter().enumerate() {
                assert_eq!(usize::from(encode(map, *v)), i, "{v}");
            }
        }
        assert_eq!(encode(signed_map(), f32::NAN), 0);
    }

    #[test]
    fn search_is_within_one_code_of_the_nearest() {
        for i in -2000..=2000 {
            let x = i as f32 / 2000.0;
            let code = usize::from(encode(signed_map(), x));
            let nearest = (0..256).min_by(|a, b| {
                (signed_map()[*a] - x).abs().total_cmp(&(signed_map()[*b] - x).abs())
            });
            assert!(nearest.is_some_and(|n| n.abs_diff(code) <= 1), "{x}: {code} {nearest:?}");
        }
    }
}
