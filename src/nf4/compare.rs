//! The same tensor in NF4, FP4 and plain int4, side by side.

use candle_core::Tensor;
use rayon::prelude::*;

use super::absmax::Absmax;
use super::codebook::QuantType;
use super::element::{Element, flush};
use super::inspect::Inspection;
use super::quantize::{CHUNK, Data, nest, quantize, with_cpu_data};
use super::tensor::{Nf4Config, Nf4Tensor};
use crate::Result;

/// One 4-bit scheme's result on a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct SchemeReport {
    /// `"nf4"`, `"fp4"` or `"int4"`, with `" + nested"` where absmax is quantized too.
    pub name: String,
    /// Levels, scales, size (int4 counted as if stored in the same way) and error.
    pub inspection: Inspection,
}

/// The 4-bit schemes on one tensor; made by [`compare`].
#[derive(Clone, PartialEq)]
pub struct Comparison {
    /// The shape of the tensor.
    pub shape: Vec<usize>,
    /// Elements per absmax.
    pub blocksize: usize,
    /// NF4, FP4 and int4, each with f32 and then with nested absmax.
    pub schemes: Vec<SchemeReport>,
}

/// Quantizes `t` to NF4, FP4 and plain int4 with the same blocks, each with f32 and with nested absmax, and measures the
/// errors.
///
/// `notebooks/02_nf4_by_hand.ipynb` explains it.
///
/// Plain int4 is linear: `round(7 x / absmax)`, a number from -7 to 7 (ties to even).
///
/// ```
/// use candle_core::{Device, Tensor};
/// let w = Tensor::randn(0f32, 0.02, (256, 256), &Device::Cpu)?;
/// let c = tunebook::nf4::compare(&w, 64)?;
/// let mse: Vec<f64> = c.schemes.iter().filter_map(|s| Some(s.inspection.error.as_ref()?.mse)).collect();
/// let (nf4, fp4, int4) = (mse[0], mse[2], mse[4]);
/// // On normally distributed weights NF4 is the best of the three.
/// assert!(nf4 < int4 && int4 < fp4);
/// # Ok::<(), tunebook::Error>(())
/// ```
///
/// # Errors
/// As [`quantize`].
pub fn compare(t: &Tensor, blocksize: usize) -> Result<Comparison> {
    let config = |quant_type| Nf4Config { quant_type, blocksize, double_quant: false, ..Nf4Config::default() };
    let nf4 = quantize(t, config(QuantType::Nf4))?;
    let fp4 = quantize(t, config(QuantType::Fp4))?;
    let int4 = with_cpu_data(t, |data, _| {
        Ok(match data {
            Data::F32(x) => int4(x, &nf4),
            Data::Bf16(x) => int4(x, &nf4),
            Data::F16(x) => int4(x, &nf4),
        })
    })?;
    let mut schemes = Vec::new();
    for (name, mut q, code) in
        [("nf4", nf4, QuantType::Nf4.code()), ("fp4", fp4, QuantType::Fp4.code()), ("int4", int4, INT4)]
    {
        schemes.push(SchemeReport { name: name.to_owned(), inspection: q.look(code, Some(t))? });
        if let Absmax::F32(absmax) = &q.absmax {
            q.absmax = nest(absmax.clone(), Nf4Config::default().nested_blocksize);
        }
        schemes.push(SchemeReport { name: format!("{name} + nested"), inspection: q.look(code, Some(t))? });
    }
    Ok(Comparison { shape: t.dims().to_vec(), blocksize, schemes })
}

/// Number n stands for (n - 8) / 7. Number 0 is not used.
const INT4: [f32; 16] = {
    let mut code = [0.0; 16];
    let mut n = 0;
    while n < 16 {
        code[n] = (n as f32 - 8.0) / 7.0;
        n += 1;
    }
    code
};

/// `like` with int4 numbers in place of its own: the scales are the same.
fn int4<T: Element>(x: &[T], like: &Nf4Tensor) -> Nf4Tensor {
    let mut q = like.clone();
    let (absmax, blocksize) = (like.absmax.borrow(), like.blocksize);
    q.packed.par_chunks_mut(CHUNK / 2).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (bytes, x))| {
        let number = |i: usize| {
            let a = absmax.get((chunk * CHUNK + i) / blocksize);
            let s = x.get(i).map_or(0.0, |v| flush(v.read())) / if a == 0.0 { 1.0 } else { a };
            ((7.0 * s).round_ties_even() + 8.0) as u8
        };
        for (j, byte) in bytes.iter_mut().enumerate() {
            // The pad of an odd length is a zero; its block is that of the element before it.
            let low = if 2 * j + 1 < x.len() { number(2 * j + 1) } else { 8 };
            *byte = number(2 * j) << 4 | low;
        }
    });
    q
}
