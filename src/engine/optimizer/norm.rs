//! The sum of squares behind the gradient norm.

use rayon::prelude::*;

use crate::nf4::widest;

/// Pieces that a gradient is cut into, at most; the partial sums live on the stack.
const PIECES: usize = 256;
/// Elements per piece, at least.
const SMALLEST: usize = 1 << 14;

/// The sum of squares of `g`, in f64. The global gradient norm is the root of the sum over all tensors.
///
/// The pieces and the order of the sums depend on the length only, so the bits do not depend on the number of threads.
///
/// ```
/// assert_eq!(tunebook::engine::optimizer::sum_of_squares(&[3.0, 4.0]), 25.0);
/// ```
pub fn sum_of_squares(g: &[f32]) -> f64 {
    let piece = g.len().div_ceil(PIECES).max(SMALLEST);
    let mut sums = [0f64; PIECES];
    sums.par_iter_mut().zip(g.par_chunks(piece)).for_each(|(sum, g)| *sum = piece_sum(g));
    sums.iter().sum()
}

widest! { fn piece_sum(g: &[f32]) -> f64 = piece_body }

#[inline(always)]
fn piece_body(g: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    let (whole, rest) = g.as_chunks::<16>();
    for chunk in whole {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(*x) * f64::from(*x);
    }
    lanes.iter().sum()
}
