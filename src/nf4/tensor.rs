//! A quantized tensor, its configuration and its size.

use std::fmt;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::absmax::{Absmax, nested_mismatch};
use super::codebook::QuantType;
use super::dequantize::dequantize_to;
use crate::{Error, Result};

/// How to quantize. Field names and defaults follow bitsandbytes' `bnb_4bit_*` options, except that nested quantization
/// is on, as in QLoRA.
///
/// `notebooks/02_nf4_by_hand.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nf4Config {
    /// Which sixteen values: `"nf4"` or `"fp4"`.
    pub quant_type: QuantType,
    /// Elements that share an `absmax`: a power of two from 32 to 4096. Smaller is more exact and larger.
    pub blocksize: usize,
    /// Whether `absmax` is quantized too, to 8 bits: 4.127 instead of 4.5 bits per weight, for a little more error.
    pub double_quant: bool,
    /// `absmax` values that share an f32 scale when `double_quant` is on; bitsandbytes knows 256 only.
    pub nested_blocksize: usize,
}

impl Default for Nf4Config {
    fn default() -> Self {
        Nf4Config { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true, nested_blocksize: 256 }
    }
}

impl Nf4Config {
    /// Checks both blocksizes.
    ///
    /// # Errors
    /// A blocksize that is no power of two from 32 to 4096.
    pub fn validate(&self) -> Result<()> {
        check_blocksize("blocksize", self.blocksize)?;
        if self.double_quant {
            check_blocksize("nested_blocksize", self.nested_blocksize)?;
        }
        Ok(())
    }
}

pub(super) fn check_blocksize(field: &str, blocksize: usize) -> Result<()> {
    if blocksize.is_power_of_two() && (32..=4096).contains(&blocksize) {
        return Ok(());
    }
    Err(Error::new("unsupported blocksize")
        .at(field)
        .expected("32, 64, 128, 256, 512, 1024, 2048 or 4096")
        .found(blocksize.to_string())
        .next("use 64, what QLoRA uses, with nested_blocksize 256"))
}

/// A tensor in 4 bits: packed code numbers, a scale per block, and what it was before.
#[derive(Clone, PartialEq)]
pub struct Nf4Tensor {
    /// Two code numbers per byte, the first in the high nibble: `[ceil(numel / 2)]`.
    pub packed: Vec<u8>,
    /// The scale of each block.
    pub absmax: Absmax,
    /// The shape before quantization; a linear weight is `[out_features, in_features]`.
    pub shape: Vec<usize>,
    /// The dtype before quantization, which [`dequantize`](Self::dequantize) gives back: F32, BF16 or F16.
    pub dtype: DType,
    /// Which sixteen values.
    pub quant_type: QuantType,
    /// Elements per scale.
    pub blocksize: usize,
}

impl fmt::Debug for Nf4Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Nf4Tensor({} {:?}, was {}, blocksize {}, absmax {:?}, {} bytes)",
            self.quant_type.as_str(),
            self.shape,
            self.dtype.as_str(),
            self.blocksize,
            self.absmax,
            self.bytes()
        )
    }
}

impl Nf4Tensor {
    /// The number of elements: the product of the shape.
    pub fn numel(&self) -> usize {
        self.shape.iter().fold(1, |n, d| n.saturating_mul(*d))
    }

    /// Bytes of the packed numbers and the scales; the code tables, which all tensors share, are not counted.
    pub fn bytes(&self) -> u64 {
        let absmax = match &self.absmax {
            Absmax::F32(v) => 4 * v.len(),
            Absmax::Nested { codes, absmax, .. } => codes.len() + 4 * absmax.len(),
        };
        (self.packed.len() + absmax) as u64
    }

    /// The configuration that gives this layout.
    pub fn config(&self) -> Nf4Config {
        let nested_blocksize = match &self.absmax {
            Absmax::Nested { blocksize, .. } => *blocksize,
            Absmax::F32(_) => 256,
        };
        Nf4Config {
            quant_type: self.quant_type,
            blocksize: self.blocksize,
            double_quant: self.absmax.is_nested(),
            nested_blocksize,
        }
    }

    /// Checks that the parts fit together. [`quantize`](super::quantize()) and [`from_bnb`](Self::from_bnb) give nothing
    /// else; fields that were changed by hand may not.
    ///
    /// # Errors
    /// A shape, blocksize, dtype or length that contradicts the others.
    pub fn validate(&self) -> Result<()> {
        self.config().validate()?;
        check_dtype(self.dtype)?;
        let n = checked_numel(&self.shape)?;
        let wrong = |part: &str, expected: usize, found: usize| {
            Error::new("the parts of a 4-bit tensor do not fit together")
                .at(part)
                .expected(format!("{expected} bytes or values for shape {:?}", self.shape))
                .found(found.to_string())
        };
        if self.packed.len() != n.div_ceil(2) {
            return Err(wrong("packed", n.div_ceil(2), self.packed.len()));
        }
        if self.absmax.len() != n.div_ceil(self.blocksize) {
            return Err(wrong("absmax", n.div_ceil(self.blocksize), self.absmax.len()));
        }
        let absmax = self.absmax.borrow();
        if !absmax.is_whole() {
            return Err(nested_mismatch(&absmax));
        }
        Ok(())
    }

    /// The values back, on the CPU, in the shape and dtype from before: `code * absmax` in f32, then rounded.
    ///
    /// # Errors
    /// Parts that do not fit together.
    pub fn dequantize(&self) -> Result<Tensor> {
        self.validate()?;
        let shape = self.shape.as_slice();
        let tensor = match self.dtype {
            DType::BF16 => Tensor::from_vec(dequantize_to::<bf16>(self), shape, &Device::Cpu),
            DType::F16 => Tensor::from_vec(dequantize_to::<f16>(self), shape, &Device::Cpu),
            _ => Tensor::from_vec(dequantize_to::<f32>(self), shape, &Device::Cpu),
        };
        Ok(tensor?)
    }

    /// The values back as flat f32, whatever the dtype from before: no rounding after `code * absmax`.
    ///
    /// # Errors
    /// Parts that do not fit together.
    pub fn dequantize_f32(&self) -> Result<Vec<f32>> {
        self.validate()?;
        Ok(dequantize_to::<f32>(self))
    }

    /// The code number (0 to 15) of every element, flat: `[numel]`.
    pub fn codes(&self) -> Vec<u8> {
        let mut codes: Vec<u8> = self.packed.iter().flat_map(|b| [b >> 4, b & 15]).collect();
        codes.truncate(self.numel());
        codes
    }
}

/// Bytes of each part of a quantized tensor; see [`storage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nf4Storage {
    /// Two elements per byte.
    pub packed: u64,
    /// One f32 per block, or one byte when nested.
    pub absmax: u64,
    /// One f32 per nested block, or 0.
    pub nested_absmax: u64,
}

impl Nf4Storage {
    /// The sum of the parts, in bytes.
    pub fn total(&self) -> u64 {
        self.packed + self.absmax + self.nested_absmax
    }
}

/// Bytes of the parts for `n` elements: `ceil(n/2)` packed and `4 ceil(n/blocksize)` of absmax; nested,
/// `ceil(n/blocksize) + 4 ceil(ceil(n/blocksize)/nested_blocksize)`. The nested offset is a scalar and is not counted.
///
/// `notebooks/02_nf4_by_hand.ipynb` explains it.
///
/// ```
/// use tunebook::nf4::{Nf4Config, storage};
/// let s = storage(4096 * 14336, Nf4Config::default());
/// assert_eq!((s.packed, s.absmax, s.nested_absmax), (29_360_128, 917_504, 14_336));
/// ```
pub fn storage(n: usize, cfg: Nf4Config) -> Nf4Storage {
    let blocks = n.div_ceil(cfg.blocksize.max(1)) as u64;
    let (absmax, nested_absmax) = match cfg.double_quant {
        true => (blocks, 4 * blocks.div_ceil(cfg.nested_blocksize.max(1) as u64)),
        false => (4 * blocks, 0),
    };
    Nf4Storage { packed: n.div_ceil(2) as u64, absmax, nested_absmax }
}

/// The product of a shape that may come from a file.
pub(super) fn checked_numel(shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        // Twice as many bytes as elements must be countable too.
        .filter(|&n| n <= isize::MAX as usize / 4)
        .ok_or_else(|| {
            Error::new("a tensor that is too large for memory")
                .at("shape")
                .found(format!("{shape:?}"))
                .next("check the shape")
        })
}

pub(super) fn check_dtype(dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::BF16 | DType::F16 => Ok(()),
        other => Err(Error::new("unsupported dtype for 4-bit quantization")
            .at("dtype")
            .expected("F32, BF16 or F16")
            .found(other.as_str())
            .next("convert the tensor first: t.to_dtype(DType::F32)?")),
    }
}
