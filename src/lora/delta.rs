//! The arithmetic of a merge on blocks of rows: `ΔW = scaling * B A`, rounding, and what was lost.
//!
//! A block is computed by one thread from start to end and blocks are summed in order, so the bits do not depend on
//! the number of threads.

use candle_core::DType;
use gemm::Parallelism;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::adapter::LoraPair;
use crate::engine::cpu::math::vectorised;

/// Writes rows `first..first + rows` of `scaling * B A` to `out`, row-major `[rows, in_features]`.
pub(super) fn delta_rows(pair: &LoraPair, first: usize, rows: usize, out: &mut [f32]) {
    let (r, n) = (pair.r, pair.in_features);
    let b = &pair.b[first * r..(first + rows) * r];
    assert!(out.len() == rows * n && pair.a.len() == r * n, "the caller sizes the block");
    // SAFETY: out is [rows, n], b is [rows, r], a is [r, n], all row-major and of exactly these lengths (the slice and
    // the assertion above), and out overlaps neither.
    unsafe {
        gemm::gemm(
            rows,
            n,
            r,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            b.as_ptr(),
            1,
            r as isize,
            pair.a.as_ptr(),
            1,
            n as isize,
            0f32,
            pair.scaling as f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Rounds to the nearest value of `dtype` (ties to even), in place.
pub(super) fn round_to(dtype: DType, values: &mut [f32]) {
    match dtype {
        DType::BF16 => {
            for v in values {
                let bits = v.to_bits();
                let up = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
                // Adding to a NaN could make it an infinity.
                *v = f32::from_bits(if v.is_nan() { bits } else { up });
            }
        }
        DType::F16 => {
            let mut bits = [0u16; 1024];
            for values in values.chunks_mut(bits.len()) {
                let half = bits[..values.len()].reinterpret_cast_mut::<half::f16>();
                half.convert_from_f32_slice(values);
                half.convert_to_f32_slice(values);
            }
        }
        _ => {}
    }
}

/// Values that [`round_to`] has rounded, as the bytes of `dtype`.
pub(super) fn to_bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::BF16 => {
            let mut out = vec![0u8; 2 * values.len()];
            for (to, v) in out.chunks_exact_mut(2).zip(values) {
                to.copy_from_slice(&((v.to_bits() >> 16) as u16).to_le_bytes());
            }
            out
        }
        DType::F16 => {
            let mut bits = vec![0u16; values.len()];
            bits.reinterpret_cast_mut::<half::f16>().convert_from_f32_slice(values);
            bytemuck::cast_slice(&bits).to_vec()
        }
        _ => bytemuck::cast_slice(values).to_vec(),
    }
}

/// Sums over the elements of a block or a weight, in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sums {
    /// Of the products of the two.
    pub dot: f64,
    /// Of the squares of their difference.
    pub diff: f64,
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, o: Sums) {
        self.dot += o.dot;
        self.diff += o.diff;
    }
}

/// Independent sums that the compiler can keep in one vector register.
const LANES: usize = 16;

vectorised! {
    /// Compares the change that a merge made with the change that was meant: for each element `e = result - base` and
    /// `d = delta`, the sums of `e d` and `(e - d)^2`.
    fn compare(result: &[f32], base: &[f32], delta: &[f32]) -> Sums {
        assert!(result.len() == base.len() && base.len() == delta.len(), "the change of one block");
        let (mut dot, mut diff) = ([0f64; LANES], [0f64; LANES]);
        let mut add = |i: usize, r: f32, w: f32, d: f32| {
            // In f64: f32 would add its own rounding to the one that is measured.
            let (e, d) = (f64::from(r) - f64::from(w), f64::from(d));
            dot[i] += e * d;
            diff[i] += (e - d) * (e - d);
        };
        let (r, w, d) = (result.chunks_exact(LANES), base.chunks_exact(LANES), delta.chunks_exact(LANES));
        let rest = r.remainder().iter().zip(w.remainder()).zip(d.remainder()).enumerate();
        for ((r, w), d) in r.zip(w).zip(d) {
            for (i, ((r, w), d)) in r.iter().zip(w).zip(d).enumerate() {
                add(i, *r, *w, *d);
            }
        }
        rest.for_each(|(i, ((r, w), d))| add(i, *r, *w, *d));
        Sums { dot: dot.iter().sum(), diff: diff.iter().sum() }
    }
}

vectorised! {
    /// The sum of squares.
    fn squares(values: &[f32]) -> f64 {
        let mut lanes = [0f64; LANES];
        let blocks = values.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            lanes.iter_mut().zip(block).for_each(|(lane, v)| *lane += f64::from(*v) * f64::from(*v));
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, v)| *lane += f64::from(*v) * f64::from(*v));
        lanes.iter().sum()
    }
}
