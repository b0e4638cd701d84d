//! The output projection: cross-entropy in chunks, and logits. Twin of `cpu/lm_head.rs`.

use candle_core::DType;

use super::CudaOps;
use super::matmul::Matrix;
use super::scratch::LmHeadScratch;
use crate::Result;
use crate::data::IGNORE_INDEX;
use crate::engine::ops::{LmHeadCe, LmHeadLogits, Scratch};

impl CudaOps {
    pub(super) fn cross_entropy(&mut self, op: &LmHeadCe, scratch: Scratch) -> Result<()> {
        let (v, c) = (self.region(op.weight).shape[0], self.region(op.weight).shape[1]);
        let (e, elem) = (self.dtype, self.dtype.size_in_bytes());
        let space = LmHeadScratch::new(op, self.region(op.x).shape[0], c, v, elem);
        let base = self.at(scratch);
        let rows = self.labelled.len();
        self.gpu.upload(base + space.index, bytemuck::cast_slice(&self.labelled))?;
        self.gpu.upload(self.ptr(op.loss), bytemuck::cast_slice(&[0f64, rows as f64]))?;
        if let Some(dx) = op.dx {
            self.gpu.fill(self.ptr(dx), 0, (self.tokens * c * elem) as u64)?;
        }
        let (x, labels, loss) = (self.ptr(op.x), self.ptr(op.labels), self.ptr(op.loss));
        let weight = Matrix::new(self.ptr(op.weight), e, c);
        let gathered = Matrix::new(base + space.gathered, e, c);
        let logits = Matrix::new(base + space.logits, DType::F32, v);
        let dlogits = Matrix::new(base + space.dlogits, e, v);
        for first in (0..rows).step_by(op.chunk) {
            let n = op.chunk.min(rows - first);
            let index = base + space.index + (first * 4) as u64;
            self.gather_rows(x, index, gathered.ptr, n, c)?;
            self.matmul(logits, gathered, weight.t(), (n, v, c), 1.0, 0.0)?;
            let losses = base + space.losses;
            let gradient = op.dx.map(|_| dlogits.ptr);
            self.token_loss(logits.ptr, labels, index, losses, gradient, n, v, op.softcap)?;
            self.sum_losses(losses, loss, n)?;
            let Some(dx) = op.dx else { continue };
            let dgathered = Matrix::new(base + space.dgathered, e, c);
            self.matmul(dgathered, dlogits, weight, (n, c, v), 1.0, 0.0)?;
            self.scatter_rows(dgathered.ptr, index, self.ptr(dx), n, c)?;
            if let Some(grad) = op.grad {
                let grad = Matrix::new(self.ptr(grad), self.region(grad).dtype, c);
                self.matmul(grad, dlogits.t(), gathered, (v, c, n), 1.0, 1.0)?;
            }
        }
        Ok(())
    }

    pub(super) fn project_logits(&mut self, op: &LmHeadLogits) -> Result<()> {
        let (v, c) = (self.region(op.weight).shape[0], self.region(op.weight).shape[1]);
        let e = self.dtype;
        let first = if op.last_only { self.tokens - 1 } else { 0 };
        let rows = self.tokens - first;
        let mut host = std::mem::take(&mut self.logits);
        host.clear();
        host.resize(rows * v, 0.0);
        let (weight, logits) =
            (Matrix::new(self.ptr(op.weight), e, c), Matrix::new(self.ptr(op.logits), DType::F32, v));
        for (i, out) in host.chunks_mut(op.chunk * v).enumerate() {
            let at = (first + i * op.chunk) * c * e.size_in_bytes();
            let x = Matrix::new(self.ptr(op.x) + at as u64, e, c);
            self.matmul(logits, x, weight.t(), (out.len() / v, v, c), 1.0, 0.0)?;
            self.gpu.read(logits.ptr, bytemuck::cast_slice_mut(out))?;
            if let Some(cap) = op.softcap {
                out.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
            }
        }
        self.logits = host;
        Ok(())
    }
}

/// Positions of the tokens that have a label.
pub(super) fn labelled_rows(labels: &[i32], out: &mut Vec<u32>) {
    out.clear();
    out.extend(labels.iter().enumerate().filter(|(_, l)| **l != IGNORE_INDEX).map(|(t, _)| t as u32));
}
