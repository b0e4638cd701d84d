//! How far the decoded values are from the original ones.

use std::fmt;

use rayon::prelude::*;

use super::absmax::AbsmaxRef;
use super::element::{Element, flush};
use super::inspect::Histogram;
use super::quantize::{CHUNK, Data};

/// Bins from -1 to 1 of the scaled values.
const BINS: usize = 128;

/// The error of one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockError {
    /// The number of the block; it starts at element `block * blocksize`.
    pub block: usize,
    /// The block's scale as it is decoded.
    pub absmax: f32,
    /// Mean of the squared errors.
    pub mse: f32,
    /// The largest error.
    pub max_abs: f32,
    /// Root of (sum of squared errors / sum of squared values); 0 for a block of zeros.
    pub relative: f32,
}

/// How far the decoded values (`code * absmax` in f32) are from the original ones.
///
/// `notebooks/03_inspect_a_model.ipynb` explains it.
#[derive(Clone, PartialEq)]
pub struct ErrorReport {
    /// Mean of the squared errors.
    pub mse: f64,
    /// Signal to quantization noise in decibels: `10 log10(sum x^2 / sum e^2)`; infinite without error.
    pub sqnr_db: f64,
    /// The largest error.
    pub max_abs: f64,
    /// `||e|| / ||x||`: 0.09 is 9 % of the weight's norm.
    pub relative: f64,
    /// Mean of the errors, decoded less original: far from 0 if the quantization is biased.
    pub bias: f64,
    /// The mean squared error that the same codes would give with exact absmax; equals `mse` without nesting.
    pub mse_exact_absmax: f64,
    /// `(mse - mse_exact_absmax) / mse`: the share of the error that nested quantization adds. It can be slightly below 0,
    /// by luck. `None` without nesting.
    pub nested_share: Option<f64>,
    /// Every block's error, in the order of the tensor.
    pub blocks: Vec<BlockError>,
    /// The original values divided by their block's largest magnitude, from -1 to 1: what the levels are laid over.
    pub scaled: Histogram,
}

impl ErrorReport {
    /// The `n` blocks with the largest mean squared error, the worst first.
    pub fn worst(&self, n: usize) -> Vec<BlockError> {
        let mut blocks = self.blocks.clone();
        blocks.sort_by(|a, b| b.mse.total_cmp(&a.mse).then(a.block.cmp(&b.block)));
        blocks.truncate(n);
        blocks
    }
}

impl fmt::Debug for ErrorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ErrorReport(mse {:.4e}, SQNR {:.2} dB, max {:.4e}, ", self.mse, self.sqnr_db, self.max_abs)?;
        write!(f, "relative {:.4}, bias {:.1e}", self.relative, self.bias)?;
        if let Some(share) = self.nested_share {
            write!(f, ", nested share {:.2} %", 100.0 * share)?;
        }
        write!(f, ", {} blocks)", self.blocks.len())
    }
}

/// 4-bit data of any code table, to be compared with the original.
pub(super) struct Measured<'a> {
    pub packed: &'a [u8],
    pub code: [f32; 16],
    pub absmax: AbsmaxRef<'a>,
    pub blocksize: usize,
}

/// Sums over a piece of the tensor.
struct Sums {
    count: usize,
    error: f64,
    squared_error: f64,
    squared_error_exact: f64,
    squared: f64,
    max: f64,
    scaled: Histogram,
    blocks: Vec<BlockError>,
}

impl Sums {
    fn new() -> Self {
        Sums {
            count: 0,
            error: 0.0,
            squared_error: 0.0,
            squared_error_exact: 0.0,
            squared: 0.0,
            max: 0.0,
            scaled: Histogram::new(-1.0, 1.0, BINS),
            blocks: Vec::new(),
        }
    }

    fn add(&mut self, other: Sums) {
        self.count += other.count;
        self.error += other.error;
        self.squared_error += other.squared_error;
        self.squared_error_exact += other.squared_error_exact;
        self.squared += other.squared;
        self.max = self.max.max(other.max);
        for (a, b) in self.scaled.counts.iter_mut().zip(&other.scaled.counts) {
            *a += b;
        }
        self.blocks.extend(other.blocks);
    }
}

impl Measured<'_> {
    pub(super) fn error(&self, original: Data<'_>) -> ErrorReport {
        let sums = match original {
            Data::F32(x) => self.sums(x),
            Data::Bf16(x) => self.sums(x),
            Data::F16(x) => self.sums(x),
        };
        let n = sums.count.max(1) as f64;
        let nested = matches!(self.absmax, AbsmaxRef::Nested { .. });
        let (squared_error, exact) = (sums.squared_error, sums.squared_error_exact);
        let share = if squared_error > 0.0 { (squared_error - exact) / squared_error } else { 0.0 };
        ErrorReport {
            mse: squared_error / n,
            sqnr_db: if squared_error == 0.0 { f64::INFINITY } else { 10.0 * (sums.squared / squared_error).log10() },
            max_abs: sums.max,
            relative: ratio(squared_error, sums.squared),
            bias: sums.error / n,
            mse_exact_absmax: exact / n,
            nested_share: nested.then_some(share),
            blocks: sums.blocks,
            scaled: sums.scaled,
        }
    }

    /// Pieces in parallel, added up in their order: the same bits for any number of threads.
    fn sums<T: Element>(&self, x: &[T]) -> Sums {
        let pieces: Vec<Sums> = x
            .par_chunks(CHUNK)
            .enumerate()
            .map(|(i, x)| {
                let mut sums = Sums::new();
                for (b, x) in x.chunks(self.blocksize).enumerate() {
                    self.block(i * (CHUNK / self.blocksize) + b, x, &mut sums);
                }
                sums
            })
            .collect();
        let mut total = Sums::new();
        pieces.into_iter().for_each(|s| total.add(s));
        total
    }

    fn block<T: Element>(&self, block: usize, x: &[T], sums: &mut Sums) {
        let absmax = self.absmax.get(block);
        let exact = x.iter().fold(0f32, |m, v| m.max(flush(v.read()).abs()));
        let start = block * self.blocksize;
        let (mut squared_error, mut squared, mut max) = (0f64, 0f64, 0f32);
        for (i, v) in x.iter().enumerate() {
            let byte = self.packed[(start + i) / 2];
            let code = self.code[usize::from(if i % 2 == 0 { byte >> 4 } else { byte & 15 })];
            let v = v.read();
            let error = f64::from(flush(code * absmax) - v);
            squared_error += error * error;
            sums.error += error;
            sums.squared_error_exact += f64::from(flush(code * exact) - v).powi(2);
            squared += f64::from(v) * f64::from(v);
            max = max.max(error.abs() as f32);
            sums.scaled.add(if exact > 0.0 { f64::from(v / exact) } else { 0.0 });
        }
        sums.count += x.len();
        sums.squared_error += squared_error;
        sums.squared += squared;
        sums.max = sums.max.max(f64::from(max));
        let mse = (squared_error / x.len() as f64) as f32;
        sums.blocks.push(BlockError {
            block,
            absmax,
            mse,
            max_abs: max,
            relative: ratio(squared_error, squared) as f32,
        });
    }
}

/// The root of a ratio of sums of squares; 0 / 0 is no error.
fn ratio(error: f64, signal: f64) -> f64 {
    if error == 0.0 { 0.0 } else { (error / signal).sqrt() }
}
