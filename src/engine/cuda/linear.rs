//! Linear modules: dense or 4-bit base, with or without LoRA; forward and gradients.
//!
//! Twin of `cpu/linear.rs`. Products are bf16 with f32 sums; A and B are f32 and cast for each product.

use candle_core::DType;

use super::CudaOps;
use super::gpu::{Arg, Launch};
use super::matmul::Matrix;
use super::nf4::Rows;
use super::scratch::LinearScratch;
use crate::Result;
use crate::engine::ops::{Linear, LinearBackward, LinearIds, Lora, Scratch, Weight};

impl CudaOps {
    pub(super) fn linear_forward(&mut self, op: &Linear, scratch: Scratch) -> Result<()> {
        let (t, m, e) = (self.tokens, op.linear, self.dtype);
        let (n, k) = (m.out_features, m.in_features);
        let rows = self.region(op.x).shape[0];
        let space = LinearScratch::new(&m, rows, e.size_in_bytes(), op.y.is_some(), false, op.low_rank());
        let base = self.at(scratch);
        let x = Matrix::new(self.ptr(op.x), e, self.width(op.x));
        let y = op.y.map(|y| Matrix::new(self.ptr(y), e, n));
        let (Some(y), Some(beside), true) = (y, op.low_rank(), self.state.adapter) else {
            return self.linear_apart(op, x, y, base, space);
        };
        let (lora, first) = (&beside.lora, beside.first);
        if self.has_one_kernel(&m) {
            return self.linear_one(&m, x.ptr, y.ptr, Some((lora, x.columns(first).ptr)));
        }
        // What the weight has beside it is multiplied with what the input has beside it.
        let together = beside.end();
        match m.weight {
            Weight::Nf4 { .. } => {
                let rows = Rows { k, row: space.row, beside: Some(self.scaled_b(lora, first)) };
                self.decode(&m.weight, n * k, base + space.weight, rows)?;
                let w = Matrix::new(base + space.weight, e, space.row);
                self.matmul(y, x, w.t(), (t, n, together), 1.0, 0.0)?;
            }
            Weight::Dense { w } if self.width(w) > k => {
                let w = Matrix::new(self.ptr(w), e, self.width(w));
                self.matmul(y, x, w.t(), (t, n, together), 1.0, 0.0)?;
            }
            Weight::Dense { w } => {
                let b = self.cast_b(lora, n, base + space.b)?;
                self.matmul(y, x.columns(first), b.t(), (t, n, lora.r), lora.scaling, 0.0)?;
                let w = Matrix::new(self.ptr(w), e, k);
                self.matmul(y, x, w.t(), (t, n, k), 1.0, 1.0)?;
            }
        }
        self.add_bias(&m, y.ptr)
    }

    /// A module whose low-rank product is a tensor of its own, or that has none.
    fn linear_apart(
        &mut self,
        op: &Linear,
        x: Matrix,
        y: Option<Matrix>,
        base: u64,
        space: LinearScratch,
    ) -> Result<()> {
        let (t, m, e) = (self.tokens, op.linear, self.dtype);
        let (n, k) = (m.out_features, m.in_features);
        let adapted = match (&m.lora, op.xa) {
            (Some(lora), Some(xa)) if self.state.adapter => Some((lora, Matrix::new(self.ptr(xa), e, lora.r))),
            _ => None,
        };
        if let (Some(y), true) = (y, self.has_one_kernel(&m)) {
            if let Some((lora, xa)) = adapted {
                self.low_rank_one(k, x.ptr, &[(lora, xa.ptr)])?;
            }
            return self.linear_one(&m, x.ptr, y.ptr, adapted.map(|(lora, xa)| (lora, xa.ptr)));
        }
        let ready = self.weights(&m, base, space, y.is_some(), adapted.is_some())?;
        // The adapter's part first: the large product adds it where it would only write.
        if let Some((lora, xa)) = adapted {
            let dropped = self.dropped(lora, x, k, base + space.dropped)?;
            self.matmul(xa, dropped, ready.a.t(), (t, lora.r, k), 1.0, 0.0)?;
            if let Some(y) = y {
                self.matmul(y, xa, ready.b.t(), (t, n, lora.r), lora.scaling, 0.0)?;
            }
        }
        let Some(y) = y else { return Ok(()) };
        self.matmul(y, x, ready.w.t(), (t, n, k), 1.0, if adapted.is_some() { 1.0 } else { 0.0 })?;
        if let Some((lora, magnitude)) = self.dora(&m) {
            let inverse = self.inverse_lengths(&m, &lora, &ready, base, space)?;
            self.scale(&m, magnitude, inverse, y.ptr, y.ptr)?;
        }
        self.add_bias(&m, y.ptr)
    }

    /// B in the compute dtype: cast to `to` where that is not its own.
    fn cast_b(&self, lora: &Lora, n: usize, to: u64) -> Result<Matrix> {
        if self.dtype == DType::F32 {
            return Ok(Matrix::new(self.ptr(lora.b), DType::F32, lora.r));
        }
        self.cast([(self.ptr(lora.b), to, n * lora.r), (0, 0, 0)])?;
        Ok(Matrix::new(to, self.dtype, lora.r))
    }

    /// `y += bias`, where the module has one.
    fn add_bias(&self, m: &LinearIds, y: u64) -> Result<()> {
        let Some(bias) = m.bias else { return Ok(()) };
        let (n, all) = (m.out_features, self.tokens * m.out_features);
        let args = [Arg::Ptr(y), Arg::Ptr(self.ptr(bias.b)), Arg::U64(all as u64), Arg::U32(n as u32)];
        self.gpu.launch("linear", "add_bias", self.elements(all), &args)
    }

    pub(super) fn linear_grad(&mut self, op: &LinearBackward, scratch: Scratch) -> Result<()> {
        let (t, m, e) = (self.tokens, op.linear, self.dtype);
        let (n, k) = (m.out_features, m.in_features);
        let rows = self.region(op.dy).shape[0];
        let space = LinearScratch::new(&m, rows, e.size_in_bytes(), op.dx.is_some(), true, None);
        let base = self.at(scratch);
        let dy = Matrix::new(self.ptr(op.dy), e, n);
        let lora = m.lora.filter(|_| op.x.is_some() && op.xa.is_some());
        let dora = self.dora(&m);
        let ready =
            self.weights(&m, base, space, op.dx.is_some() || dora.is_some(), lora.is_some() || dora.is_some())?;
        let dy = match dora {
            Some(dora) => self.dora_grad(op, dora, &ready, base, space)?,
            None => dy,
        };
        if let (Some(grad), Some(x)) = (m.grad, op.x) {
            let x = Matrix::new(self.ptr(x), e, self.width(x));
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
        if let Some(lora) = &lora {
            self.lora_grad(op, lora, dy, base, space, &ready)?;
        }
        match op.dx {
            Some(dx) => {
                let dx = Matrix::new(self.ptr(dx), e, k);
                let adds = op.accumulate || lora.is_some();
                self.matmul(dx, dy, ready.w, (t, k, n), 1.0, if adds { 1.0 } else { 0.0 })
            }
            None => Ok(()),
        }
    }

    /// The adapter's gradients, and its part of `dx`, to which the base's is added.
    fn lora_grad(
        &mut self,
        op: &LinearBackward,
        lora: &Lora,
        dy: Matrix,
        base: u64,
        space: LinearScratch,
        ready: &Ready,
    ) -> Result<()> {
        let (t, n, k, r, e) = (self.tokens, op.linear.out_features, op.linear.in_features, lora.r, self.dtype);
        let (Some(x), Some(xa)) = (op.x, op.xa) else { return Ok(()) };
        let dxa = Matrix::new(base + space.dxa, e, r);
        // dxa = scaling * dy B
        self.matmul(dxa, dy, ready.b, (t, r, n), lora.scaling, 0.0)?;
        if let Some((grad_a, grad_b)) = lora.grads {
            let (grad_a, grad_b) =
                (Matrix::new(self.ptr(grad_a), DType::F32, k), Matrix::new(self.ptr(grad_b), DType::F32, r));
            let xa = Matrix::new(self.ptr(xa), e, r);
            self.matmul(grad_b, dy.t(), xa, (n, r, t), lora.scaling, 1.0)?;
            let x = self.dropped(lora, Matrix::new(self.ptr(x), e, k), k, base + space.dropped)?;
            self.matmul(grad_a, dxa.t(), x, (r, k, t), 1.0, 1.0)?;
        }
        let Some(dx) = op.dx else { return Ok(()) };
        let dx = Matrix::new(self.ptr(dx), e, k);
        self.through_dropout(lora, (dx, dxa, ready.a), op.accumulate, r, base + space.dropped)
    }

    /// The module's matrices in the compute dtype: a 4-bit weight is decoded, A and B are cast.
    fn weights(&self, m: &LinearIds, base: u64, space: LinearScratch, product: bool, adapted: bool) -> Result<Ready> {
        let (n, k, e) = (m.out_features, m.in_features, self.dtype);
        let r = m.lora.map_or(1, |l| l.r);
        let (mut a, mut b) = (0, 0);
        if let (Some(lora), true) = (&m.lora, adapted) {
            (a, b) = (self.ptr(lora.a), self.ptr(lora.b));
            if e != DType::F32 {
                self.cast([(a, base + space.a, r * k), (b, base + space.b, n * r)])?;
                (a, b) = (base + space.a, base + space.b);
            }
        }
        let (w, row) = match m.weight {
            // A decoded one may have columns beside it.
            Weight::Dense { w } => (self.ptr(w), self.width(w)),
            Weight::Nf4 { .. } => (base + space.weight, k),
        };
        if product && matches!(m.weight, Weight::Nf4 { .. }) {
            self.decode(&m.weight, n * k, w, Rows::dense(k))?;
        }
        Ok(Ready { w: Matrix::new(w, e, row), a: Matrix::new(a, e, k), b: Matrix::new(b, e, r) })
    }
}

/// A module's matrices as the products take them.
pub(super) struct Ready {
    /// `[out, in]`.
    pub w: Matrix,
    /// `[R, in]`.
    pub a: Matrix,
    /// `[out, R]`.
    pub b: Matrix,
}
