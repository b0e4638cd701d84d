//! Linear modules: dense or 4-bit base, with or without LoRA; forward and gradients.

use rayon::prelude::*;

use super::CpuOps;
use super::math::vectorised;
use super::matmul::{Matrix, matmul};
use crate::engine::dropout::dropout;
use crate::engine::ops::{Linear, LinearBackward, LinearIds, Lora, Scratch, Weight};
use crate::nf4::{AbsmaxRef, dequantize_into};

/// Columns of a bias's gradient that one task owns: it adds all tokens to them, in order.
const COLUMNS: usize = 64;

vectorised! {
    /// `to += x`, as many elements as `to` has.
    fn add_to(to: &mut [f32], x: &[f32]) {
        for (t, x) in to.iter_mut().zip(x) {
            *t += x;
        }
    }
}

impl CpuOps {
    pub(super) fn linear_forward(&self, op: &Linear, scratch: Scratch) {
        let (t, m) = (self.tokens, &op.linear);
        let (n, k) = (m.out_features, m.in_features);
        // SAFETY: regions of one operation.
        let (x, space) = unsafe { (self.rows(op.x), self.scratch(scratch)) };
        let (space, dropped) = space.split_at_mut(dequantized_len(m, op.y.is_some()));
        if let Some(y) = op.y {
            // SAFETY: as above.
            let y = unsafe { self.rows(y) };
            let w = self.base_weight(m, space);
            matmul(y, Matrix::new(x, k), Matrix::new(w, k).t(), t, n, k, 1.0, false);
            if let Some(bias) = m.bias {
                // SAFETY: as above.
                let b = unsafe { self.slice::<f32>(bias.b) };
                y.par_chunks_mut(n).for_each(|row| add_to(row, b));
            }
        }
        let (Some(lora), Some(xa), true) = (&m.lora, op.xa, self.state.adapter) else { return };
        // SAFETY: as above.
        let (xa, a, b) = unsafe { (self.rows(xa), self.slice::<f32>(lora.a), self.slice::<f32>(lora.b)) };
        let x = self.dropped(lora, x, dropped);
        matmul(xa, Matrix::new(x, k), Matrix::new(a, k).t(), t, lora.r, k, 1.0, false);
        if let Some(y) = op.y {
            // SAFETY: the borrow above has ended.
            let y = unsafe { self.rows(y) };
            matmul(y, Matrix::new(xa, lora.r), Matrix::new(b, lora.r).t(), t, n, lora.r, lora.scaling, true);
        }
    }

    pub(super) fn linear_grad(&self, op: &LinearBackward, scratch: Scratch) {
        let (t, m) = (self.tokens, &op.linear);
        let (n, k) = (m.out_features, m.in_features);
        // SAFETY: regions of one operation.
        let (dy, space) = unsafe { (self.rows(op.dy), self.scratch(scratch)) };
        let (space, rest) = space.split_at_mut(dequantized_len(m, op.dx.is_some()));
        if let Some(dx) = op.dx {
            // SAFETY: as above.
            let dx = unsafe { self.rows(dx) };
            let w = self.base_weight(m, space);
            matmul(dx, Matrix::new(dy, n), Matrix::new(w, k), t, k, n, 1.0, op.accumulate);
        }
        if let (Some(grad), Some(x)) = (m.grad, op.x) {
            // SAFETY: as above.
            let (grad, x) = unsafe { (self.slice::<f32>(grad), self.rows(x)) };
            matmul(grad, Matrix::new(dy, n).t(), Matrix::new(x, k), n, k, t, 1.0, true);
        }
        if let Some(grad) = m.bias.and_then(|b| b.grad) {
            // SAFETY: as above.
            let grad = unsafe { self.slice::<f32>(grad) };
            grad.par_chunks_mut(COLUMNS).enumerate().for_each(|(part, grad)| {
                let from = part * COLUMNS;
                dy.chunks_exact(n).for_each(|row| add_to(grad, &row[from..]));
            });
        }
        if let Some(lora) = &m.lora {
            self.lora_grad(op, lora, dy, rest);
        }
    }

    fn lora_grad(&self, op: &LinearBackward, lora: &Lora, dy: &[f32], space: &mut [f32]) {
        let (t, n, k, r) = (self.tokens, op.linear.out_features, op.linear.in_features, lora.r);
        let (Some(x), Some(xa)) = (op.x, op.xa) else { return };
        // SAFETY: regions of one operation.
        let (x, xa, a, b) =
            unsafe { (self.rows(x), self.rows(xa), self.slice::<f32>(lora.a), self.slice::<f32>(lora.b)) };
        let rows = self.region(op.dy).shape[0];
        let (dxa, dropped) = space.split_at_mut((rows * r).next_multiple_of(16));
        // dxa = scaling * dy B
        matmul(dxa, Matrix::new(dy, n), Matrix::new(b, r), t, r, n, lora.scaling, false);
        if let Some((grad_a, grad_b)) = lora.grads {
            // SAFETY: as above.
            let (grad_a, grad_b) = unsafe { (self.slice::<f32>(grad_a), self.slice::<f32>(grad_b)) };
            matmul(grad_b, Matrix::new(dy, n).t(), Matrix::new(xa, r), n, r, t, lora.scaling, true);
            let x = self.dropped(lora, x, dropped);
            matmul(grad_a, Matrix::new(dxa, r).t(), Matrix::new(x, k), r, k, t, 1.0, true);
        }
        let Some(dx) = op.dx else { return };
        // SAFETY: the base product's borrow has ended.
        let dx = unsafe { self.rows(dx) };
        if self.drops(lora) {
            let through = &mut dropped[..t * k];
            matmul(through, Matrix::new(dxa, r), Matrix::new(a, k), t, k, r, 1.0, false);
            dropout(through, lora.dropout, self.state.dropout_seed, self.state.micro_step, lora.module);
            dx.iter_mut().zip(&*through).for_each(|(d, g)| *d += g);
        } else {
            matmul(dx, Matrix::new(dxa, r), Matrix::new(a, k), t, k, r, 1.0, true);
        }
    }

    fn drops(&self, lora: &Lora) -> bool {
        self.state.training && lora.dropout > 0.0
    }

    /// The input with LoRA dropout applied, in `space`; the input itself when there is none.
    fn dropped<'a>(&self, lora: &Lora, x: &'a [f32], space: &'a mut [f32]) -> &'a [f32] {
        if !self.drops(lora) {
            return x;
        }
        let out = &mut space[..x.len()];
        out.copy_from_slice(x);
        dropout(out, lora.dropout, self.state.dropout_seed, self.state.micro_step, lora.module);
        out
    }

    /// `[out, in]`: the dense weight, or the 4-bit one dequantized into `space`.
    fn base_weight<'a>(&'a self, m: &LinearIds, space: &'a mut [f32]) -> &'a [f32] {
        match m.weight {
            // SAFETY: weights are only read.
            Weight::Dense { w } => unsafe { self.slice::<f32>(w) },
            Weight::Nf4 { packed, absmax, nested, config } => {
                let out = &mut space[..m.out_features * m.in_features];
                // SAFETY: weights are only read.
                unsafe {
                    let scales = match nested {
                        None => AbsmaxRef::F32(self.slice::<f32>(absmax)),
                        Some(n) => AbsmaxRef::Nested {
                            codes: self.slice::<u8>(absmax),
                            absmax: self.slice::<f32>(n.absmax),
                            offset: self.slice::<f32>(n.offset)[0],
                            blocksize: config.nested_blocksize,
                        },
                    };
                    dequantize_into(self.slice::<u8>(packed), scales, config.quant_type, config.blocksize, out);
                }
                out
            }
        }
    }
}

/// Elements of scratch that the dequantized weight takes, as `plan::scratch_bytes` counts it.
fn dequantized_len(m: &LinearIds, product: bool) -> usize {
    match m.weight {
        Weight::Nf4 { .. } if product => (m.out_features * m.in_features * 4).next_multiple_of(64) / 4,
        _ => 0,
    }
}
