//! What 4 bits did to a tensor: use of the levels, scales, bits per weight, and the error.

use candle_core::Tensor;

use super::absmax::Absmax;
use super::error::{ErrorReport, Measured};
use super::quantize::with_cpu_data;
use super::tensor::Nf4Tensor;
use crate::{Error, Result};

/// Bins of the absmax histogram.
const BINS: usize = 64;

/// Counts in bins of equal width.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// The lower edge of the first bin.
    pub min: f64,
    /// The upper edge of the last bin, which it includes.
    pub max: f64,
    /// One count per bin.
    pub counts: Vec<u64>,
}

impl Histogram {
    pub(super) fn new(min: f64, max: f64, bins: usize) -> Self {
        Histogram { min, max, counts: vec![0; bins] }
    }

    pub(super) fn add(&mut self, v: f64) {
        let bins = self.counts.len();
        let at = (v - self.min) / (self.max - self.min) * bins as f64;
        if let Some(count) = self.counts.get_mut((at.max(0.0) as usize).min(bins - 1)) {
            *count += 1;
        }
    }

    /// The width of a bin.
    pub fn bin_width(&self) -> f64 {
        (self.max - self.min) / self.counts.len().max(1) as f64
    }

    /// The middle of bin `i`.
    pub fn bin_center(&self, i: usize) -> f64 {
        self.min + self.bin_width() * (i as f64 + 0.5)
    }

    /// The sum of the counts.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Every byte that a bitsandbytes file holds for one 4-bit weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerializedBytes {
    /// Two elements per byte.
    pub packed: u64,
    /// One f32 per block, or one byte when nested.
    pub absmax: u64,
    /// One f32 per nested block, or 0.
    pub nested_absmax: u64,
    /// The table of sixteen f32: 64.
    pub quant_map: u64,
    /// The table of 256 f32, 1,024, when nested.
    pub nested_quant_map: u64,
    /// The JSON text with shape, dtype, blocksizes and nested offset.
    pub quant_state: u64,
}

impl SerializedBytes {
    /// The sum of the parts.
    pub fn total(&self) -> u64 {
        self.packed + self.absmax + self.nested_absmax + self.quant_map + self.nested_quant_map + self.quant_state
    }
}

/// A 4-bit tensor looked at from inside; made by [`Nf4Tensor::inspect`] and [`Nf4Tensor::inspect_against`].
///
/// `notebooks/03_inspect_a_model.ipynb` explains it.
#[derive(Clone, PartialEq)]
pub struct Inspection {
    /// The sixteen values.
    pub code: [f32; 16],
    /// How many elements use each value.
    pub usage: [u64; 16],
    /// Entropy of the usage in bits, at most 4: less means that some values are hardly used.
    pub entropy: f64,
    /// The scales of all blocks, as they are decoded.
    pub absmax: Histogram,
    /// Bytes in a file.
    pub bytes: SerializedBytes,
    /// `8 * bytes.total() / elements`: everything counted, tables and JSON too.
    pub bits_per_weight: f64,
    /// The error, when the original was given.
    pub error: Option<ErrorReport>,
}

impl Nf4Tensor {
    /// Looks at the quantized tensor alone: levels, scales, size.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use tunebook::nf4::{self, Nf4Config};
    /// let w = Tensor::randn(0f32, 1.0, (512, 512), &Device::Cpu)?;
    /// let i = nf4::quantize(&w, Nf4Config::default())?.inspect()?;
    /// assert_eq!(i.usage.iter().sum::<u64>(), 512 * 512);
    /// assert!(i.entropy > 3.8 && i.bits_per_weight < 4.2);
    /// # Ok::<(), tunebook::Error>(())
    /// ```
    ///
    /// # Errors
    /// Parts that do not fit together, and a tensor without elements.
    pub fn inspect(&self) -> Result<Inspection> {
        self.look(self.quant_type.code(), None)
    }

    /// [`inspect`](Self::inspect), and the error against `original`: f32, bf16 or f16, of the same shape.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use tunebook::nf4::{self, Nf4Config};
    /// let w = Tensor::randn(0f32, 1.0, (512, 512), &Device::Cpu)?;
    /// let i = nf4::quantize(&w, Nf4Config::default())?.inspect_against(&w)?;
    /// let error = i.error.unwrap();
    /// // NF4 keeps normally distributed weights within 9 to 10 % of their norm.
    /// assert!((0.08..0.11).contains(&error.relative));
    /// assert!(error.nested_share.unwrap() < 0.05);
    /// # Ok::<(), tunebook::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`inspect`](Self::inspect), and an original of another shape or dtype.
    pub fn inspect_against(&self, original: &Tensor) -> Result<Inspection> {
        self.look(self.quant_type.code(), Some(original))
    }

    /// The inspection with any code table.
    pub(super) fn look(&self, code: [f32; 16], original: Option<&Tensor>) -> Result<Inspection> {
        self.validate()?;
        let n = self.numel();
        if n == 0 {
            return Err(Error::new("nothing to inspect").at("shape").found(format!("{:?}", self.shape)));
        }
        let usage = usage(&self.packed, n);
        let bytes = self.serialized_bytes();
        Ok(Inspection {
            code,
            usage,
            entropy: entropy(&usage),
            absmax: absmax_histogram(&self.absmax.to_f32()?),
            bytes,
            bits_per_weight: 8.0 * bytes.total() as f64 / n as f64,
            error: original.map(|t| self.error(code, t)).transpose()?,
        })
    }

    fn error(&self, code: [f32; 16], original: &Tensor) -> Result<ErrorReport> {
        if original.dims() != self.shape {
            return Err(Error::new("not the tensor that was quantized")
                .at("original")
                .expected(format!("shape {:?}", self.shape))
                .found(format!("{:?}", original.dims())));
        }
        let q = Measured { packed: &self.packed, code, absmax: self.absmax.borrow(), blocksize: self.blocksize };
        with_cpu_data(original, |data, _| Ok(q.error(data)))
    }

    fn serialized_bytes(&self) -> SerializedBytes {
        let (absmax, nested_absmax, nested_quant_map) = match &self.absmax {
            Absmax::F32(v) => (4 * v.len(), 0, 0),
            Absmax::Nested { codes, absmax, .. } => (codes.len(), 4 * absmax.len(), 1024),
        };
        SerializedBytes {
            packed: self.packed.len() as u64,
            absmax: absmax as u64,
            nested_absmax: nested_absmax as u64,
            quant_map: 64,
            nested_quant_map,
            quant_state: self.quant_state().len() as u64,
        }
    }
}

/// How often each code number occurs among the first `n`.
fn usage(packed: &[u8], n: usize) -> [u64; 16] {
    // Bytes are counted first: an eighth of the work.
    let mut bytes = [0u64; 256];
    for b in packed {
        bytes[usize::from(*b)] += 1;
    }
    let mut usage = [0; 16];
    for (b, count) in bytes.into_iter().enumerate() {
        usage[b >> 4] += count;
        usage[b & 15] += count;
    }
    if n % 2 == 1
        && let Some(last) = packed.last()
    {
        usage[usize::from(last & 15)] -= 1;
    }
    usage
}

/// `-sum p log2 p`, in bits.
fn entropy(usage: &[u64; 16]) -> f64 {
    let total = usage.iter().sum::<u64>() as f64;
    let terms = usage.iter().filter(|&&c| c > 0).map(|&c| c as f64 / total);
    // Subtracted from zero, so that a single level gives 0 and not -0.
    0.0 - terms.map(|p| p * p.log2()).sum::<f64>()
}

fn absmax_histogram(absmax: &[f32]) -> Histogram {
    let finite = || absmax.iter().filter(|a| a.is_finite()).map(|a| f64::from(*a));
    let (mut min, mut max) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), a| (lo.min(a), hi.max(a)));
    if min >= max {
        // One value only, or none: a bin around it.
        let middle = if min.is_finite() { min } else { 0.0 };
        let margin = if middle == 0.0 { 0.5 } else { middle.abs() * 0.5 };
        (min, max) = (middle - margin, middle + margin);
    }
    let mut histogram = Histogram::new(min, max, BINS);
    finite().for_each(|a| histogram.add(a));
    histogram
}
