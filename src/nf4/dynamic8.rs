//! 8-bit block quantization with bitsandbytes' dynamic map: for nested absmax values and for optimizer state.
//!
//! The map is a small float with a movable point: 254 values, zero and one, between -1 and 1 (signed) or 0 and 1
//! (unsigned), spaced finely near zero, seven decades deep. From [8-bit Optimizers](https://arxiv.org/abs/2110.02861),
//! section 2.1.

use std::sync::OnceLock;

use rayon::prelude::*;

use super::codebook::linspace;
use super::element::flush;

/// Which 256 values an 8-bit code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// From -0.99296874 (code 0) over 0 (code 127) to 1 (code 255). In files: `nested_quant_map`, `qmap1`.
    Signed,
    /// From 0 (code 0) to 1 (code 255), twice as fine: for values that are never negative. In files: `qmap2`.
    Unsigned,
}

/// The values of [`Map::Signed`], in rising order.
pub fn signed_map() -> &'static [f32; 256] {
    Map::Signed.values()
}

/// The values of [`Map::Unsigned`], in rising order.
pub fn unsigned_map() -> &'static [f32; 256] {
    Map::Unsigned.values()
}

impl Map {
    /// The 256 values, in rising order.
    pub fn values(self) -> &'static [f32; 256] {
        &self.tables().values
    }

    /// The value of a code.
    pub fn decode(self, code: u8) -> f32 {
        self.values()[usize::from(code)]
    }

    /// The code of `x`, a value divided by its block's absmax: the nearest value, with the ties of the CUDA kernel's
    /// binary search (to the even code). NaN, which is what an all-zero block gives, has code 0.
    pub fn encode(self, x: f32) -> u8 {
        self.tables().encode(x)
    }

    pub(crate) fn tables(self) -> &'static Tables {
        static SIGNED: OnceLock<Tables> = OnceLock::new();
        static UNSIGNED: OnceLock<Tables> = OnceLock::new();
        match self {
            Map::Signed => SIGNED.get_or_init(|| Tables::new(dynamic_map(true))),
            Map::Unsigned => UNSIGNED.get_or_init(|| Tables::new(dynamic_map(false))),
        }
    }
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

/// Cells of [`Tables`]: the upper 16 bits of a magnitude from 2^-24 (below it every magnitude is like zero) to 1.
const FIRST_CELL: u32 = (127 - 24) << 7;
const CELLS: usize = 24 * 128 + 1;

/// A map with what makes encoding quick: the code at the start of each cell, a narrow range of magnitudes that holds one
/// threshold at most.
pub(crate) struct Tables {
    pub(crate) values: [f32; 256],
    /// A number above `thresholds[c]` has a code above `c`.
    thresholds: [f32; 256],
    /// Cells of positive, then of negative numbers: the code of the cell's lowest number. Three bytes of padding, because
    /// AVX-512 reads four at a time.
    start: [u8; 2 * CELLS + 3],
}

impl Tables {
    fn new(values: [f32; 256]) -> Self {
        let mut thresholds = [f32::INFINITY; 256];
        for (c, t) in thresholds.iter_mut().take(255).enumerate() {
            // The search ends at an even code; from there a neighbour is taken only beyond the midpoint.
            let middle = (values[c + 1] + values[c]) * 0.5;
            *t = if c % 2 == 0 { middle } else { middle.next_down() };
        }
        let code = |x: f32| thresholds.iter().take_while(|t| x > **t).count() as u8;
        let mut start = [0; 2 * CELLS + 3];
        let (positive, negative) = start.split_at_mut(CELLS);
        for (cell, (p, n)) in positive.iter_mut().zip(negative).enumerate() {
            let lower = (FIRST_CELL + cell as u32) << 16;
            *p = code(if cell == 0 { 0.0 } else { f32::from_bits(lower) });
            // Negative numbers fall as their bits rise: the lowest is at the end.
            *n = code(-f32::from_bits(lower | 0xffff));
        }
        Tables { values, thresholds, start }
    }

    #[inline(always)]
    pub(crate) fn encode(&self, x: f32) -> u8 {
        if x.is_nan() {
            return 0;
        }
        let bits = x.to_bits();
        let cell = ((bits & 0x7fff_ffff) >> 16).saturating_sub(FIRST_CELL).min(CELLS as u32 - 1) as usize;
        let start = self.start[cell + if bits >> 31 == 1 { CELLS } else { 0 }];
        start + u8::from(x > self.thresholds[usize::from(start)])
    }

    /// [`encode`](Self::encode) of every `x`, into as many codes.
    pub(crate) fn encode_all(&self, mut x: &[f32], mut codes: &mut [u8]) {
        #[cfg(target_arch = "x86_64")]
        if super::simd::available() {
            let whole = x.len().min(codes.len()) / 16 * 16;
            let (head, bytes);
            (head, x) = x.split_at(whole);
            (bytes, codes) = codes.split_at_mut(whole);
            // SAFETY: the CPU has the features; the tables are as long as the cells and codes say.
            unsafe {
                super::simd::encode_dynamic(head, bytes, (&self.start, FIRST_CELL, CELLS as u32), &self.thresholds)
            };
        }
        for (code, x) in codes.iter_mut().zip(x) {
            *code = self.encode(*x);
        }
    }
}

/// Quantizes to 8 bits in blocks of `blocksize`: the codes, and one absmax per block.
///
/// Denormals count as zero. A block of zeros has absmax 0 and codes 0. Multi-threaded.
///
/// ```
/// use tunebook::nf4::dynamic8::{self, Map};
/// let (codes, absmax) = dynamic8::quantize_blocks(&[0.5, -2.0, 0.0], Map::Signed, 256);
/// assert_eq!(absmax, [2.0]);
/// let back = dynamic8::dequantize_blocks(&codes, &absmax, Map::Signed, 256);
/// assert!((back[0] - 0.5).abs() < 0.01 && back[2] == 0.0);
/// ```
pub fn quantize_blocks(data: &[f32], map: Map, blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let blocksize = blocksize.max(1);
    let tables = map.tables();
    let mut codes = vec![0u8; data.len()];
    let mut absmax = vec![0f32; data.len().div_ceil(blocksize)];
    let blocks = codes.par_chunks_mut(blocksize).zip(data.par_chunks(blocksize)).zip(absmax.par_iter_mut());
    blocks.with_min_len(64).for_each(|((codes, x), absmax)| {
        *absmax = x.iter().fold(0f32, |m, v| m.max(flush(*v).abs()));
        let reciprocal = 1.0 / *absmax;
        for (codes, x) in codes.chunks_mut(256).zip(x.chunks(256)) {
            let mut scaled = [0f32; 256];
            for (s, v) in scaled.iter_mut().zip(x) {
                *s = flush(*v) * reciprocal;
            }
            tables.encode_all(&scaled[..x.len()], codes);
        }
    });
    (codes, absmax)
}

/// The values back: `map[code] * absmax[i / blocksize]`. Elements past the last absmax are left out.
pub fn dequantize_blocks(codes: &[u8], absmax: &[f32], map: Map, blocksize: usize) -> Vec<f32> {
    let blocks = codes.chunks(blocksize.max(1)).zip(absmax);
    blocks.flat_map(|(codes, a)| codes.iter().map(move |c| flush(map.decode(*c) * a))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The binary search of the CUDA kernel, step by step: the definition that [`Tables`] is tested against.
    fn search(map: &[f32; 256], x: f32) -> u8 {
        let (mut pivot, mut low, mut high) = (127usize, 0usize, 255usize);
        let (mut below, mut above) = (map[0], map[255]);
        for step in [64, 32, 16, 8, 4, 2, 1] {
            if x > map[pivot] {
                (low, below) = (pivot, map[pivot]);
                pivot += step;
            } else {
                (high, above) = (pivot, map[pivot]);
                pivot -= step;
            }
        }
        let code = if x > map[pivot] {
            if x > (above + map[pivot]) * 0.5 { high } else { pivot }
        } else if x < (below + map[pivot]) * 0.5 {
            low
        } else {
            pivot
        };
        code as u8
    }

    #[test]
    fn maps_have_their_landmarks() {
        let (s, u) = (signed_map(), unsigned_map());
        assert_eq!((s[0], s[127], s[254], s[255]), (-0.99296874, 0.0, 0.99296874, 1.0));
        assert_eq!((u[0], u[255]), (0.0, 1.0));
        assert!(s.windows(2).all(|w| w[0] < w[1]) && u.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn many_at_once_equal_one_by_one() {
        for map in [Map::Signed, Map::Unsigned] {
            let mut x: Vec<f32> = (0..=0xffff_u32).map(|b| f32::from_bits(b << 16 | b)).collect();
            x.extend(map.values().windows(2).flat_map(|w| {
                let middle = (w[0] + w[1]) * 0.5;
                [w[0], middle, middle.next_up(), middle.next_down(), -middle]
            }));
            x.extend([0.5, -0.5, f32::NAN]);
            let mut codes = vec![0; x.len()];
            map.tables().encode_all(&x, &mut codes);
            assert!(x.iter().zip(codes).all(|(x, code)| map.encode(*x) == code), "{map:?}");
        }
    }

    #[test]
    fn the_quick_encoding_equals_the_binary_search() {
        for map in [Map::Signed, Map::Unsigned] {
            let values = map.values();
            let check = |x: f32| assert_eq!(map.encode(x), search(values, x), "{map:?} {x:e} {:x}", x.to_bits());
            for w in values.windows(2) {
                for x in [w[0], w[1], (w[0] + w[1]) * 0.5] {
                    [x, x.next_up(), x.next_down(), -x, -x.next_up(), -x.next_down()].into_iter().for_each(check);
                }
            }
            // Both ends of every range of numbers with equal upper bits, NaN, infinities and denormals included.
            for upper in 0..=0xffff_u32 {
                [0, 1, 0x7fff, 0x8000, 0xffff].into_iter().for_each(|lower| check(f32::from_bits(upper << 16 | lower)));
            }
        }
    }
}
