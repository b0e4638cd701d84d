//! [`BlockView`]: one block of a quantized tensor, element by element.

use candle_core::{DType, Tensor};

use super::{Nf4Tensor, QuantType};
use crate::{Error, Result};

/// One element of a block on its way into 4 bits and back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockElement {
    /// Its number in the flat tensor.
    pub index: usize,
    /// The original value.
    pub value: f32,
    /// The value divided by the exact absmax of the block, from -1 to 1.
    pub scaled: f32,
    /// The code number, 0 to 15.
    pub code: u8,
    /// What the code number stands for.
    pub level: f32,
    /// The value that comes back: `level * absmax`.
    pub decoded: f32,
}

/// One block of a quantized tensor beside the original; made by [`Nf4Tensor::block`]. Lesson 02 reads one.
#[derive(Clone, PartialEq)]
pub struct BlockView {
    /// The number of the block.
    pub block: usize,
    /// The kind of its code.
    pub quant_type: QuantType,
    /// The block's scale as it is decoded.
    pub absmax: f32,
    /// The largest magnitude of the original values: `absmax` before it was nested.
    pub exact_absmax: f32,
    /// Its elements: `blocksize`, fewer in the last block.
    pub elements: Vec<BlockElement>,
    /// Its packed bytes.
    pub packed: Vec<u8>,
}

impl BlockView {
    /// Root of (sum of squared errors / sum of squared values); 0 for a block of zeros.
    pub fn relative_error(&self) -> f64 {
        let sum = |f: fn(&BlockElement) -> f64| self.elements.iter().map(f).sum::<f64>();
        let error = sum(|e| f64::from(e.decoded - e.value).powi(2));
        let square = sum(|e| f64::from(e.value).powi(2));
        if square > 0.0 { (error / square).sqrt() } else { 0.0 }
    }
}

impl Nf4Tensor {
    /// Block `block` beside the values of `original`, the tensor that was quantized.
    ///
    /// # Errors
    /// An original of another shape, a block that the tensor does not have, parts that do not fit together.
    pub fn block(&self, block: usize, original: &Tensor) -> Result<BlockView> {
        self.validate()?;
        if original.dims() != self.shape {
            return Err(Error::new("not the tensor that was quantized")
                .at("original")
                .expected(format!("shape {:?}", self.shape))
                .found(format!("{:?}", original.dims())));
        }
        let (start, blocks) = (block.saturating_mul(self.blocksize), self.numel().div_ceil(self.blocksize));
        if block >= blocks {
            return Err(Error::new("the tensor has no such block")
                .at("block")
                .expected(format!("0 to {}", blocks.saturating_sub(1)))
                .found(block.to_string()));
        }
        let end = (start + self.blocksize).min(self.numel());
        let values = original.flatten_all()?.narrow(0, start, end - start)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let absmax = self.absmax.to_f32()?[block];
        let exact_absmax = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let (code, numbers) = (self.quant_type.code(), self.codes());
        let elements = values.iter().zip(start..).map(|(&value, index)| {
            let level = code[usize::from(numbers[index] & 15)];
            let scaled = if exact_absmax > 0.0 { value / exact_absmax } else { 0.0 };
            BlockElement { index, value, scaled, code: numbers[index], level, decoded: level * absmax }
        });
        Ok(BlockView {
            block,
            quant_type: self.quant_type,
            absmax,
            exact_absmax,
            elements: elements.collect(),
            packed: self.packed[start / 2..end.div_ceil(2)].to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Nf4Config, quantize};
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_block_is_what_dequantize_gives() {
        let values: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 0.3).collect();
        let w = Tensor::from_vec(values.clone(), (10, 10), &Device::Cpu).unwrap();
        let q = quantize(&w, Nf4Config::default()).unwrap();
        let back = q.dequantize_f32().unwrap();
        let (first, last) = (q.block(0, &w).unwrap(), q.block(1, &w).unwrap());
        assert_eq!((first.elements.len(), last.elements.len(), last.elements[0].index), (64, 36, 64));
        let all = first.elements.iter().chain(&last.elements);
        for (e, (value, decoded)) in all.zip(values.iter().zip(&back)) {
            assert_eq!((e.value, e.decoded), (*value, *decoded));
        }
        assert_eq!([first.packed, last.packed].concat(), q.packed);
        assert!(q.block(2, &w).is_err() && q.block(0, &w.flatten_all().unwrap()).is_err());
    }
}
