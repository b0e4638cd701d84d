//! NF4 and LoRA linears for models that are built with candle: gradients flow through candle's autograd.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use candle_nn::{Linear, Module};

use super::LoraPair;
use crate::nf4::Nf4Tensor;
use crate::{Error, Result};

/// A frozen linear layer whose weight stays in 4 bits: `y = x dequantize(W)^T + bias`.
///
/// `notebooks/02_nf4_by_hand.ipynb` explains it.
///
/// The weight is decoded for each product, forward and backward, and dropped again: between them only the 4 bits are
/// in memory. The gradient reaches `x` (and `bias`, if that is a variable), never `W`. On the CPU, in f32; other
/// dtypes are converted and back.
#[derive(Clone, Debug)]
pub struct Nf4Linear {
    weight: Arc<Nf4Tensor>,
    bias: Option<Tensor>,
}

impl Nf4Linear {
    /// A layer with this weight, `[out_features, in_features]`, and a bias `[out_features]` or none.
    ///
    /// # Errors
    /// A weight that is not a matrix or whose parts do not fit together, a bias of another length.
    pub fn new(weight: Nf4Tensor, bias: Option<Tensor>) -> Result<Self> {
        weight.validate()?;
        let [out_features, _] = weight.shape[..] else {
            return Err(Error::new("the weight of a linear layer is a matrix")
                .expected("[out_features, in_features]")
                .found(format!("{:?}", weight.shape)));
        };
        if let Some(b) = &bias
            && b.dims() != [out_features]
        {
            return Err(Error::new("the bias does not fit the weight")
                .expected(format!("[{out_features}]"))
                .found(format!("{:?}", b.dims())));
        }
        Ok(Nf4Linear { weight: Arc::new(weight), bias })
    }

    /// The 4-bit weight.
    pub fn weight(&self) -> &Nf4Tensor {
        &self.weight
    }

    /// Columns of the weight: the last dimension of the input.
    pub fn in_features(&self) -> usize {
        self.weight.shape.get(1).copied().unwrap_or_default()
    }

    /// Rows of the weight: the last dimension of the output.
    pub fn out_features(&self) -> usize {
        self.weight.shape.first().copied().unwrap_or_default()
    }
}

impl Module for Nf4Linear {
    /// `x`: `[.., in_features]`; gives `[.., out_features]` in the dtype of `x`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let op = Nf4MatMul { weight: self.weight.clone() };
        let y = x.to_dtype(DType::F32)?.contiguous()?.apply_op1(op)?.to_dtype(x.dtype())?;
        match &self.bias {
            Some(b) => y.broadcast_add(&b.to_dtype(x.dtype())?),
            None => Ok(y),
        }
    }
}

/// `x [.., in] -> x W^T [.., out]` with a 4-bit W.
struct Nf4MatMul {
    weight: Arc<Nf4Tensor>,
}

impl Nf4MatMul {
    /// W in f32, `[out, in]`.
    fn dense(&self) -> candle_core::Result<Tensor> {
        let values = self.weight.dequantize_f32().map_err(candle_core::Error::wrap)?;
        Tensor::from_vec(values, self.weight.shape.as_slice(), &Device::Cpu)
    }
}

impl CustomOp1 for Nf4MatMul {
    fn name(&self) -> &'static str {
        "nf4-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x: &[f32] = storage.as_slice()?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("nf4-linear wants a contiguous input")
        };
        let w = self.dense()?;
        let (out, width) = w.dims2()?;
        let dims = layout.dims();
        let Some((&last, lead)) = dims.split_last().filter(|&(&last, _)| last == width) else {
            candle_core::bail!("nf4-linear: input {dims:?} does not end in in_features = {width}")
        };
        let rows = lead.iter().product::<usize>();
        let y = Tensor::from_slice(&x[start..end], (rows, last), &Device::Cpu)?.matmul(&w.t()?)?;
        let shape: Vec<usize> = lead.iter().copied().chain([out]).collect();
        Ok((CpuStorage::F32(y.flatten_all()?.to_vec1()?), shape.into()))
    }

    /// `dx = dy W`.
    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let w = self.dense()?;
        let (out, _) = w.dims2()?;
        let grad = grad.contiguous()?;
        let rows = grad.elem_count() / out.max(1);
        grad.reshape((rows, out))?.matmul(&w)?.reshape(arg.shape()).map(Some)
    }
}

/// The frozen part of a [`LoraLinear`].
///
/// `notebooks/04_lora_by_hand.ipynb` explains it.
#[derive(Clone, Debug)]
pub enum FrozenLinear {
    /// A dense layer; its weight should not be a variable.
    Dense(Linear),
    /// A 4-bit layer.
    Nf4(Nf4Linear),
}

/// A linear layer with a LoRA pair: `y = base(x) + scaling * (x A^T) B^T`.
///
/// `notebooks/04_lora_by_hand.ipynb` explains it.
///
/// `A` and `B` are candle variables: give [`vars`](LoraLinear::vars) to an optimizer. The base is frozen.
#[derive(Clone, Debug)]
pub struct LoraLinear {
    base: FrozenLinear,
    a: Var,
    b: Var,
    scaling: f64,
}

impl LoraLinear {
    /// A layer with this pair beside the frozen `base`.
    ///
    /// # Errors
    /// A pair whose shapes are not those of the base.
    pub fn new(base: FrozenLinear, pair: LoraPair) -> Result<Self> {
        let (out_features, in_features) = match &base {
            FrozenLinear::Dense(l) => l.weight().dims2()?,
            FrozenLinear::Nf4(l) => (l.out_features(), l.in_features()),
        };
        if (pair.out_features, pair.in_features) != (out_features, in_features) {
            return Err(Error::new("the LoRA pair belongs to another layer")
                .expected(format!("B A of shape [{out_features}, {in_features}]"))
                .found(format!("[{}, {}]", pair.out_features, pair.in_features)));
        }
        if pair.magnitude.is_some() {
            return Err(Error::new("DoRA is not supported as a candle module")
                .expected("a pair without magnitudes")
                .found("lora_magnitude_vector")
                .next("train it with the engine, or merge it: lora::merge"));
        }
        let a = Var::from_vec(pair.a, (pair.r, in_features), &Device::Cpu)?;
        let b = Var::from_vec(pair.b, (out_features, pair.r), &Device::Cpu)?;
        Ok(LoraLinear { base, a, b, scaling: pair.scaling })
    }

    /// The trainable variables: A `[r, in_features]`, B `[out_features, r]`, in f32.
    pub fn vars(&self) -> Vec<Var> {
        vec![self.a.clone(), self.b.clone()]
    }

    /// The pair as it is now, to be saved in an [`Adapter`](super::Adapter).
    ///
    /// # Errors
    /// Variables that were given another shape or dtype.
    pub fn pair(&self) -> Result<LoraPair> {
        let (r, in_features) = self.a.dims2()?;
        let (out_features, _) = self.b.dims2()?;
        let flat = |v: &Var| v.flatten_all()?.to_vec1::<f32>();
        let (a, b) = (flat(&self.a)?, flat(&self.b)?);
        Ok(LoraPair { a, b, r, in_features, out_features, scaling: self.scaling, magnitude: None })
    }

    /// As `forward`, with dropout of probability `lora_dropout` before A: for training.
    ///
    /// # Errors
    /// Those of candle: shapes that do not fit, a probability outside 0 to 1.
    pub fn forward_train(&self, x: &Tensor, lora_dropout: f32) -> Result<Tensor> {
        Ok(self.add_lora(x, &candle_nn::ops::dropout(x, lora_dropout)?)?)
    }

    fn add_lora(&self, x: &Tensor, dropped: &Tensor) -> candle_core::Result<Tensor> {
        let base = match &self.base {
            FrozenLinear::Dense(l) => l.forward(x)?,
            FrozenLinear::Nf4(l) => l.forward(x)?,
        };
        // PEFT computes the pair in its own dtype, f32.
        let h = Linear::new(self.a.as_tensor().clone(), None).forward(&dropped.to_dtype(DType::F32)?)?;
        let y = Linear::new(self.b.as_tensor().clone(), None).forward(&h)?;
        base + (y * self.scaling)?.to_dtype(x.dtype())?
    }
}

impl Module for LoraLinear {
    /// `x`: `[.., in_features]`; gives `[.., out_features]` in the dtype of `x`, without dropout.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.add_lora(x, x)
    }
}
