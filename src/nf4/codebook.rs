//! The sixteen values of NF4 and FP4, the thresholds between them, and where NF4's come from.

use serde::{Deserialize, Serialize};

/// Which sixteen values a 4-bit number stands for. In files: `"nf4"` and `"fp4"`.
///
/// `notebooks/02_nf4_by_hand.ipynb` explains it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    /// Quantiles of the normal distribution: each value is used about equally often by normally distributed weights.
    #[default]
    Nf4,
    /// A 4-bit float: sign bit 8, and eight magnitudes from 0 to 1.
    Fp4,
}

/// NF4's values by their bits, so that nothing depends on how a decimal is rounded.
const NF4_BITS: [u32; 16] = [
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff,
    0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
];

const fn from_bits(bits: [u32; 16]) -> [f32; 16] {
    let mut out = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    out
}

pub(crate) const NF4_CODE: [f32; 16] = from_bits(NF4_BITS);

/// FP4's values: the magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4 in the order of their bits, then the negative ones.
/// Number 8 is +0: bitsandbytes never makes it, and reads it as zero.
pub(crate) const FP4_CODE: [f32; 16] = [
    0.0,
    1.0 / 192.0,
    2.0 / 3.0,
    1.0,
    1.0 / 3.0,
    0.5,
    1.0 / 6.0,
    0.25,
    0.0,
    -1.0 / 192.0,
    -2.0 / 3.0,
    -1.0,
    -1.0 / 3.0,
    -0.5,
    -1.0 / 6.0,
    -0.25,
];

/// The fifteen thresholds of NF4: the code number of `s` is how many of them are less than `s` (a tie goes to the lower
/// number).
///
/// They are bitsandbytes' decimal literals. They are close to the midpoints between the values, but four of them are not
/// equal to the computed midpoint, and must be parsed straight to f32: on the way through f64 they would be rounded twice.
#[allow(clippy::excessive_precision)] // the literals as they are in the reference
pub const NF4_THRESHOLDS: [f32; 15] = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
];

/// The seven thresholds of FP4 between its magnitudes in rising order.
#[allow(clippy::excessive_precision)] // the literals as they are in the reference
pub const FP4_THRESHOLDS: [f32; 7] = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

/// The bits of FP4's magnitudes in rising order.
const FP4_RISING: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

impl QuantType {
    /// The sixteen values, by their number. In bitsandbytes files: `quant_map`.
    ///
    /// ```
    /// use tunebook::nf4::QuantType;
    /// let code = QuantType::Nf4.code();
    /// assert_eq!((code[0], code[7], code[15]), (-1.0, 0.0, 1.0));
    /// ```
    pub fn code(self) -> [f32; 16] {
        match self {
            QuantType::Nf4 => NF4_CODE,
            QuantType::Fp4 => FP4_CODE,
        }
    }

    /// `"nf4"` or `"fp4"`, as in files.
    pub fn as_str(self) -> &'static str {
        match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
        }
    }

    /// The number (0 to 15) of the value that `s` is rounded to; `s` is an element divided by its block's `absmax`.
    ///
    /// NaN, which is what an all-zero block gives, has number 0.
    pub fn encode(self, s: f32) -> u8 {
        match self {
            QuantType::Nf4 => NF4_THRESHOLDS.iter().map(|&t| u8::from(s > t)).sum(),
            QuantType::Fp4 => {
                let magnitude: u8 = FP4_THRESHOLDS.iter().map(|&t| u8::from(s.abs() > t)).sum();
                FP4_RISING[usize::from(magnitude)] | if s < 0.0 { 8 } else { 0 }
            }
        }
    }
}

/// How NF4's sixteen values follow from the normal distribution, step by step: see [`derive_levels`].
#[derive(Clone, Debug, PartialEq)]
pub struct LevelDerivation {
    /// The largest probability whose quantile is used: the mean of 1 - 1/30 and 1 - 1/32.
    pub offset: f64,
    /// The sixteen probabilities: eight from the mirrored 8-point grid and zero below one half, eight above it.
    pub probabilities: [f32; 16],
    /// The normal quantile of each probability, in f64; the one in the middle is zero.
    pub quantiles: [f64; 16],
    /// The quantiles divided by the largest one, in f32: NF4's values, bit for bit.
    pub levels: [f32; 16],
}

/// Derives NF4's values from the quantiles of the normal distribution.
///
/// `notebooks/02_nf4_by_hand.ipynb` explains it.
///
/// Between `offset` and 1/2 lie eight evenly spaced probabilities for the positive values and seven for the negative
/// ones (so that zero is a value, which makes the code asymmetric); the quantile of each, divided by the largest, is a
/// value. ([QLoRA](https://arxiv.org/abs/2305.14314), section 3 and appendix E.)
///
/// Equal bits need the same rounding: the grids in f32, computed from both ends, the quantile in f64 and the division in
/// f32.
///
/// ```
/// use tunebook::nf4::{QuantType, derive_levels};
/// assert_eq!(derive_levels().levels, QuantType::Nf4.code());
/// ```
pub fn derive_levels() -> LevelDerivation {
    // bitsandbytes' literal for (29/30 + 31/32) / 2.
    let offset = 0.9677083;
    let positive = linspace(offset as f32, 0.5, 9);
    let negative = linspace(offset as f32, 0.5, 8);
    let mut probabilities = [0.5f32; 16];
    let mut quantiles = [0f64; 16];
    for i in 0..7 {
        probabilities[i] = 1.0 - negative[i];
        quantiles[i] = -normal_quantile(f64::from(negative[i]));
    }
    for i in 0..8 {
        probabilities[15 - i] = positive[i];
        quantiles[15 - i] = normal_quantile(f64::from(positive[i]));
    }
    let largest = quantiles[15] as f32;
    let levels = quantiles.map(|q| q as f32 / largest);
    LevelDerivation { offset, probabilities, quantiles, levels }
}

/// `steps` evenly spaced numbers in f32, the first half counted from the start and the second from the end, with one
/// rounding each, as torch does.
pub(crate) fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    let point = |i: usize| match i < steps / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((steps - 1 - i) as f32, end),
    };
    (0..steps).map(point).collect()
}

/// The x for which a standard normal variable is below x with probability `p`, for 1/2 <= p < 1: Newton's method on
/// the distribution function.
fn normal_quantile(p: f64) -> f64 {
    let mut x = 0.0;
    for _ in 0..50 {
        let (cdf, density) = normal(x);
        let step = (cdf - p) / density;
        x -= step;
        if step.abs() < 1e-16 {
            break;
        }
    }
    x
}

/// The normal distribution function and density: Phi(x) = 1/2 + phi(x) (x + x^3/3 + x^5/(3*5) + ...).
fn normal(x: f64) -> (f64, f64) {
    let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    let (mut term, mut sum) = (x, x);
    for k in 1..200 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    (0.5 + density * sum, density)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_derived_bit_for_bit() {
        assert_eq!(derive_levels().levels.map(f32::to_bits), NF4_BITS);
    }

    #[test]
    fn thresholds_have_the_bits_of_the_reference() {
        let bits: [u32; 15] = [
            0xbf591cd9, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff, 0x3df64863,
            0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d03, 0x3f248daf, 0x3f5c89d9,
        ];
        assert_eq!(NF4_THRESHOLDS.map(f32::to_bits), bits);
    }

    #[test]
    fn every_value_encodes_to_its_own_number() {
        for t in [QuantType::Nf4, QuantType::Fp4] {
            for (i, v) in t.code().into_iter().enumerate() {
                // Number 8 of FP4 is a second zero.
                let expected = if t == QuantType::Fp4 && i == 8 { 0 } else { i };
                assert_eq!(usize::from(t.encode(v)), expected, "{t:?} {v}");
            }
        }
        assert_eq!((QuantType::Nf4.encode(f32::NAN), QuantType::Fp4.encode(f32::NAN)), (0, 0));
    }

    #[test]
    fn a_tie_goes_to_the_lower_number() {
        for (i, t) in NF4_THRESHOLDS.into_iter().enumerate() {
            assert_eq!(usize::from(QuantType::Nf4.encode(t)), i);
            assert_eq!(usize::from(QuantType::Nf4.encode(t.next_up())), i + 1);
        }
    }
}
