//! Linear modules: dense or 4-bit base, with or without LoRA; forward and gradients.
//!
//! Twin of `cpu/linear.rs`. Products are bf16 with f32 sums; A and B are f32 and cast for each product.

use candle_core::DType;

use super::CudaOps;
use super::gpu::{Arg, Launch};
use super::matmul::Matrix;
use super::scratch::LinearScratch;
use crate::Result;
use crate::engine::ops::{Linear, LinearBackward, LinearIds, Lora, Scratch, Weight};

impl CudaOps {
    pub(super) fn linear_forward(&mut self, op: &Linear, scratch: Scratch) -> Result<()> {
        let (t, m, e) = (self.tokens, op.linear, self.dtype);
        let (n, k) = (m.out_features, m.in_features);
        let rows = self.region(op.x).shape[0];
        let space = LinearScratch::new(&m, rows, e.size_in_bytes(), op.y.is_some(), false);
        let base = self.at(scratch);
        let x = Matrix::new(self.ptr(op.x), e, k);
        if let Some(y) = op.y {
            let w = self.base_weight(&m, base + space.weight)?;
            let y = Matrix::new(self.ptr(y), e, n);
            self.matmul(y, x, w.t(), (t, n, k), 1.0, 0.0)?;
            if let Some(bias) = m.bias {
                let args = [Arg::Ptr(y.ptr), Arg::Ptr(self.ptr(bias.b)), Arg::U64((t * n) as u64), Arg::U32(n as u32)];
                self.gpu.launch("linear", "add_bias", self.elements(t * n), &args)?;
            }
        }
        let (Some(lora), Some(xa), true) = (&m.lora, op.xa, self.state.adapter) else { return Ok(()) };
        let a = self.in_elem(lora.a, lora.r * k, base + space.a)?;
        let xa = Matrix::new(self.ptr(xa), e, lora.r);
        let x = self.dropped(lora, x, t * k, base + space.dropped)?;
        self.matmul(xa, x, Matrix::new(a, e, k).t(), (t, lora.r, k), 1.0, 0.0)?;
        if let Some(y) = op.y {
            let b = self.in_elem(lora.b, n * lora.r, base + space.b)?;
            let y = Matrix::new(self.ptr(y), e, n);
            self.matmul(y, xa, Matrix::new(b, e, lora.r).t(), (t, n, lora.r), lora.scaling, 1.0)?;
        }
        Ok(())
    }

    pub(super) fn linear_grad(&mut self, op: &LinearBackward, scratch: Scratch) -> Result<()> {
        let (t, m, e) = (self.tokens, op.linear, self.dtype);
        let (n, k) = (m.out_features, m.in_features);
        let rows = self.region(op.dy).shape[0];
        let space = LinearScratch::new(&m, rows, e.size_in_bytes(), op.dx.is_some(), true);
        let base = self.at(scratch);
        let dy = Matrix::new(self.ptr(op.dy), e, n);
        if let Some(dx) = op.dx {
            let w = self.base_weight(&m, base + space.weight)?;
            let dx = Matrix::new(self.ptr(dx), e, k);
            self.matmul(dx, dy, w, (t, k, n), 1.0, if op.accumulate { 1.0 } else { 0.0 })?;
        }
        if let (Some(grad), Some(x)) = (m.grad, op.x) {
            let x = Matrix::new(self.ptr(x), e, k);
            let grad = Matrix::new(self.ptr(grad), self.region(grad).dtype, k);
            self.matmul(grad, dy.t(), x, (n, k, t), 1.0, 1.0)?;
        }
        if let Some(grad) = m.bias.and_then(|b| b.grad) {
            let launch = Launch { grid: [n.div_ceil(32) as u32, 1, 1], block: 1024, shared: 0 };
            let bf16 = u32::from(self.region(grad).dtype == DType::BF16);
            let args =
                [Arg::Ptr(dy.ptr), Arg::Ptr(self.ptr(grad)), Arg::U32(t as u32), Arg::U32(n as u32), Arg::U32(bf16)];
            self.gpu.launch("linear", "bias_grad", launch, &args)?;
        }
        match &m.lora {
            Some(lora) => self.lora_grad(op, lora, dy, base, space),
            None => Ok(()),
        }
    }

    fn lora_grad(
        &mut self,
        op: &LinearBackward,
        lora: &Lora,
        dy: Matrix,
        base: u64,
        space: LinearScratch,
    ) -> Result<()> {
        let (t, n, k, r, e) = (self.tokens, op.linear.out_features, op.linear.in_features, lora.r, self.dtype);
        let (Some(x), Some(xa)) = (op.x, op.xa) else { return Ok(()) };
        let b = self.in_elem(lora.b, n * r, base + space.b)?;
        let dxa = Matrix::new(base + space.dxa, e, r);
        // dxa = scaling * dy B
        self.matmul(dxa, dy, Matrix::new(b, e, r), (t, r, n), lora.scaling, 0.0)?;
        if let Some((grad_a, grad_b)) = lora.grads {
            let (grad_a, grad_b) =
                (Matrix::new(self.ptr(grad_a), DType::F32, k), Matrix::new(self.ptr(grad_b), DType::F32, r));
            let xa = Matrix::new(self.ptr(xa), e, r);
            self.matmul(grad_b, dy.t(), xa, (n, r, t), lora.scaling, 1.0)?;
            let x = self.dropped(lora, Matrix::new(self.ptr(x), e, k), t * k, base + space.dropped)?;
            self.matmul(grad_a, dxa.t(), x, (r, k, t), 1.0, 1.0)?;
        }
        let Some(dx) = op.dx else { return Ok(()) };
        let a = Matrix::new(self.in_elem(lora.a, r * k, base + space.a)?, e, k);
        let dx = Matrix::new(self.ptr(dx), e, k);
        if self.drops(lora) {
            let through = Matrix::new(base + space.dropped, e, k);
            self.matmul(through, dxa, a, (t, k, r), 1.0, 0.0)?;
            self.dropout_add(lora, dx.ptr, through.ptr, t * k)
        } else {
            self.matmul(dx, dxa, a, (t, k, r), 1.0, 1.0)
        }
    }

    /// `x` with dropout applied, in `space` when there is any.
    fn dropped(&self, lora: &Lora, x: Matrix, n: usize, space: u64) -> Result<Matrix> {
        if !self.drops(lora) {
            return Ok(x);
        }
        self.dropout(lora, x.ptr, space, n)?;
        Ok(Matrix { ptr: space, ..x })
    }

    /// An f32 matrix of the adapter in the compute dtype: itself, or cast into `space`.
    fn in_elem(&self, id: crate::engine::ops::TensorId, n: usize, space: u64) -> Result<u64> {
        if self.dtype == DType::F32 {
            return Ok(self.ptr(id));
        }
        self.cast(self.ptr(id), space, n)?;
        Ok(space)
    }

    /// `[out, in]`: the dense weight, or the 4-bit one dequantized into `space`.
    fn base_weight(&self, m: &LinearIds, space: u64) -> Result<Matrix> {
        let ptr = match m.weight {
            Weight::Dense { w } => self.ptr(w),
            Weight::Nf4 { .. } => {
                self.dequantize(&m.weight, m.out_features * m.in_features, space)?;
                space
            }
        };
        Ok(Matrix::new(ptr, self.dtype, m.in_features))
    }
}
