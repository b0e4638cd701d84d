//! DoRA (arXiv 2402.09353): what it does to a linear module beside LoRA. Its twin is in `cpu/linear.rs`.

use candle_core::DType;
use half::bf16;

use super::CudaOps;
use super::gpu::{Arg, Launch};
use super::linear::Ready;
use super::matmul::Matrix;
use super::scratch::LinearScratch;
use crate::Result;
use crate::engine::ops::{LinearBackward, LinearIds, Lora, Magnitude, Weight};
use crate::nf4::{AbsmaxRef, dequantize_into};

impl CudaOps {
    /// The pair and the magnitudes, where the module computes DoRA now.
    pub(super) fn dora(&self, m: &LinearIds) -> Option<(Lora, Magnitude)> {
        m.lora.filter(|_| self.state.adapter).and_then(|l| Some((l, l.magnitude?)))
    }

    /// One over the length of each row of `W + scaling * B A`: where these f32 `[out]` are.
    pub(super) fn inverse_lengths(
        &mut self,
        m: &LinearIds,
        lora: &Lora,
        ready: &Ready,
        base: u64,
        space: LinearScratch,
    ) -> Result<u64> {
        let (n, k) = (m.out_features, m.in_features);
        let (low, inverse) = (Matrix::new(base + space.low, self.dtype, k), base + space.inverse);
        self.matmul(low, ready.b, ready.a, (n, k, lora.r), lora.scaling, 0.0)?;
        let args = [
            Arg::Ptr(ready.w.ptr),
            Arg::U32(ready.w.row as u32),
            Arg::Ptr(low.ptr),
            Arg::Ptr(inverse),
            Arg::U32(n as u32),
            Arg::U32(k as u32),
        ];
        let how = Launch { grid: [n.div_ceil(8) as u32, 1, 1], block: 256, shared: 0 };
        self.gpu.launch("dora", "inverse_lengths", how, &args)?;
        Ok(inverse)
    }

    /// `y = x * m * inverse`, column by column; `y` may be `x`.
    pub(super) fn scale(&self, m: &LinearIds, magnitude: Magnitude, inverse: u64, x: u64, y: u64) -> Result<()> {
        let (n, all) = (m.out_features, self.tokens * m.out_features);
        let args = [
            Arg::Ptr(x),
            Arg::Ptr(y),
            Arg::Ptr(self.ptr(magnitude.m)),
            Arg::Ptr(inverse),
            Arg::U64(all as u64),
            Arg::U32(n as u32),
        ];
        self.gpu.launch("dora", "scale", self.elements(all), &args)
    }

    /// The gradient of the magnitudes; gives the gradient of what they multiply.
    pub(super) fn dora_grad(
        &mut self,
        op: &LinearBackward,
        (lora, magnitude): (Lora, Magnitude),
        ready: &Ready,
        base: u64,
        space: LinearScratch,
    ) -> Result<Matrix> {
        let (t, m, e) = (self.tokens, &op.linear, self.dtype);
        let (n, k, dy) = (m.out_features, m.in_features, self.ptr(op.dy));
        let inverse = self.inverse_lengths(m, &lora, ready, base, space)?;
        if let (Some(x), Some(xa), Some(grad)) = (op.x, op.xa, magnitude.grad) {
            // What the magnitudes multiply, over its length: made again, since the output is rotated or overwritten by now.
            let z = Matrix::new(base + space.z, e, n);
            let xa = Matrix::new(self.ptr(xa), e, lora.r);
            let x = Matrix::new(self.ptr(x), e, self.width(x));
            self.matmul(z, xa, ready.b.t(), (t, n, lora.r), lora.scaling, 0.0)?;
            self.matmul(z, x, ready.w.t(), (t, n, k), 1.0, 1.0)?;
            let args = [
                Arg::Ptr(dy),
                Arg::Ptr(z.ptr),
                Arg::Ptr(inverse),
                Arg::Ptr(self.ptr(grad)),
                Arg::U32(t as u32),
                Arg::U32(n as u32),
            ];
            let how = Launch { grid: [n.div_ceil(32) as u32, 1, 1], block: 1024, shared: 0 };
            self.gpu.launch("dora", "magnitude_grad", how, &args)?;
        }
        let g = Matrix::new(base + space.g, e, n);
        self.scale(m, magnitude, inverse, dy, g.ptr)?;
        Ok(g)
    }

    /// The lengths of the rows of a base weight: DoRA's magnitudes before training. On the host, once: a decoded weight has no
    /// place in the plan before the first step.
    pub(super) fn lengths(&self, m: &LinearIds) -> Result<Vec<f32>> {
        use crate::engine::backend::Backend as _;
        let (n, k) = (m.out_features, m.in_features);
        let floats =
            |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
        let w: Vec<f32> = match m.weight {
            Weight::Dense { w } => {
                let bytes = self.read(w)?;
                match self.region(w).dtype {
                    DType::BF16 => {
                        bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes).into_iter().map(bf16::to_f32).collect()
                    }
                    _ => floats(&bytes),
                }
            }
            Weight::Nf4 { packed, absmax, nested, config } => {
                let (packed, scales) = (self.read(packed)?, self.read(absmax)?);
                let (absmax, offset) = match nested {
                    None => (floats(&scales), 0.0),
                    Some(n) => (floats(&self.read(n.absmax)?), floats(&self.read(n.offset)?)[0]),
                };
                let scales = match nested {
                    None => AbsmaxRef::F32(&absmax),
                    Some(_) => AbsmaxRef::Nested {
                        codes: &scales,
                        absmax: &absmax,
                        offset,
                        blocksize: config.nested_blocksize,
                    },
                };
                let mut out = vec![0f32; n * k];
                dequantize_into(&packed, scales, config.quant_type, config.blocksize, &mut out);
                if self.is_bf16() {
                    out.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
                }
                out
            }
        };
        let row = w.len() / n;
        Ok(w.chunks_exact(row).map(|w| w[..k].iter().map(|x| x * x).sum::<f32>().sqrt()).collect())
    }
}
