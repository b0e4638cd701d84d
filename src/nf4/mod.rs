//! 4-bit block quantization as bitsandbytes does it: NF4 and FP4, nested ("double") quantization, and what they cost.
//!
//! A tensor is read as one flat row-major list and cut into blocks of `blocksize` elements (64; blocks run across
//! rows, the last one may be short). Each block keeps its largest magnitude, `absmax`, and for each element the
//! number (0 to 15) of one of sixteen values between -1 and 1, the [`code`](QuantType::code):
//!
//! ```text
//! quantize:    q[i] = code number of  x[i] * (1 / absmax[i / blocksize])
//! dequantize:  x'[i] = code[q[i]] * absmax[i / blocksize]
//! packed:      byte j = q[2j] << 4 | q[2j + 1]          (the first element in the high nibble)
//! ```
//!
//! Nested quantization stores `absmax` itself in 8 bits ([`dynamic8`]), after its mean has been taken away. NF4 is from
//! [QLoRA](https://arxiv.org/abs/2305.14314), section 3. Bytes equal those of bitsandbytes' CUDA kernels.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use tunebook::nf4::{self, Nf4Config};
//!
//! let w = Tensor::randn(0f32, 0.02, (128, 256), &Device::Cpu)?;
//! let q = nf4::quantize(&w, Nf4Config::default())?;
//! assert_eq!(q.packed.len(), 128 * 256 / 2);
//! let back = q.dequantize()?;
//! assert_eq!((back.dims(), back.dtype()), (w.dims(), w.dtype()));
//! # Ok::<(), tunebook::Error>(())
//! ```

mod absmax;
mod block;
mod bnb;
mod codebook;
mod compare;
mod dequantize;
pub mod dynamic8;
mod element;
mod error;
mod inspect;
mod quantize;
#[cfg(target_arch = "x86_64")]
mod simd;
mod tensor;
mod widest;

pub use absmax::{Absmax, AbsmaxRef};
pub use block::{BlockElement, BlockView};
pub use bnb::BnbTensor;
pub use codebook::{FP4_THRESHOLDS, LevelDerivation, NF4_THRESHOLDS, QuantType, derive_levels};
pub use compare::{Comparison, SchemeReport, compare};
pub use dequantize::{dequantize_bf16_into, dequantize_f16_into, dequantize_into};
pub use error::{BlockError, ErrorReport};
pub use inspect::{Histogram, Inspection, SerializedBytes};
pub(crate) use quantize::nest;
pub use quantize::{quantize, quantize_bf16, quantize_f16, quantize_f32};
pub use tensor::{Nf4Config, Nf4Storage, Nf4Tensor, storage};
pub(crate) use widest::widest;
