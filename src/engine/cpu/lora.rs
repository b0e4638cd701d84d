//! LoRA pairs whose low-rank products lie beside their modules' common input. No plan for the CPU asks for this: here it is what the
//! GPU's is compared with, in plain steps; dropped inputs are made again, never kept.

use super::CpuOps;
use super::matmul::{Matrix, matmul};
use crate::engine::dropout::dropout;
use crate::engine::ops::{LoraA, LoraBackward, TensorId, low_rank_columns};

impl CpuOps {
    pub(super) fn low_rank(&self, op: &LoraA) {
        if !self.state.adapter {
            return;
        }
        let (t, k, row) = (self.tokens, op.in_features, self.width(op.x));
        for m in &op.adapters {
            let r = m.lora.r;
            let input = self.input(op.x, k, m.lora.dropout, m.lora.module);
            let mut xa = vec![0f32; t * r];
            // SAFETY: regions of one operation; the borrow of the input has ended.
            let (x, a) = unsafe { (self.rows(op.x), self.slice::<f32>(m.lora.a)) };
            matmul(&mut xa, Matrix::new(&input, k), Matrix::new(a, k).t(), t, r, k, 1.0, false);
            for (x, xa) in x.chunks_exact_mut(row).zip(xa.chunks_exact(r)) {
                let columns = &mut x[m.first..][..low_rank_columns(r)];
                columns[..r].copy_from_slice(xa);
                columns[r..].fill(0.0);
            }
        }
        let (Some(kept), Some(first)) = (op.kept, op.adapters.first()) else { return };
        // SAFETY: two regions.
        let (x, kept) = unsafe { (self.rows(op.x), self.rows(kept)) };
        let columns = kept.len() / t;
        for (x, kept) in x.chunks_exact(row).zip(kept.chunks_exact_mut(columns)) {
            kept.copy_from_slice(&x[first.first..][..columns]);
        }
    }

    pub(super) fn low_rank_grads(&self, op: &LoraBackward) {
        let (t, k) = (self.tokens, op.in_features);
        if let Some(dx) = op.dx {
            // SAFETY: one region.
            unsafe { self.rows(dx) }.fill(0.0);
        }
        let mut kept = 0;
        for m in &op.modules {
            let Some(lora) = m.linear.lora else { continue };
            let (n, r) = (m.linear.out_features, lora.r);
            let (low_rank, first) = op.xa.map_or((op.x, m.first), |xa| (xa, kept));
            kept += low_rank_columns(r);
            let input = self.input(op.x, k, lora.dropout, lora.module);
            // SAFETY: regions of one operation.
            let (xa, dy, a, b) =
                unsafe { (self.rows(low_rank), self.rows(m.dy), self.slice::<f32>(lora.a), self.slice::<f32>(lora.b)) };
            let mut dxa = vec![0f32; t * r];
            matmul(&mut dxa, Matrix::new(dy, n), Matrix::new(b, r), t, r, n, lora.scaling, false);
            if let Some((grad_a, grad_b)) = lora.grads {
                // SAFETY: as above.
                let (grad_a, grad_b) = unsafe { (self.slice::<f32>(grad_a), self.slice::<f32>(grad_b)) };
                let xa = Matrix::strided(&xa[first..], self.width(low_rank));
                matmul(grad_b, Matrix::new(dy, n).t(), xa, n, r, t, lora.scaling, true);
                matmul(grad_a, Matrix::new(&dxa, r).t(), Matrix::new(&input, k), r, k, t, 1.0, true);
            }
            let Some(dx) = op.dx else { continue };
            let mut through = vec![0f32; t * k];
            matmul(&mut through, Matrix::new(&dxa, r), Matrix::new(a, k), t, k, r, 1.0, false);
            if self.state.training && lora.dropout > 0.0 {
                dropout(&mut through, lora.dropout, self.state.dropout_seed, self.state.micro_step, lora.module);
            }
            // SAFETY: as above.
            unsafe { self.rows(dx) }.iter_mut().zip(&through).for_each(|(d, g)| *d += g);
        }
    }

    /// The first `k` columns, with a module's dropout.
    fn input(&self, x: TensorId, k: usize, p: f32, module: u32) -> Vec<f32> {
        let row = self.width(x);
        // SAFETY: only read.
        let x = unsafe { self.rows(x) };
        let mut out: Vec<f32> = x.chunks_exact(row).flat_map(|x| &x[..k]).copied().collect();
        if self.state.training && p > 0.0 {
            dropout(&mut out, p, self.state.dropout_seed, self.state.micro_step, module);
        }
        out
    }
}
