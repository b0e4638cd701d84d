//! The output projection: cross-entropy in chunks, and logits.

use rayon::prelude::*;

use super::CpuOps;
use super::math::{exp, exp_sum, exp_sum_of, max, scale, soft_cap, vectorised};
use super::matmul::{Matrix, matmul};
use crate::data::IGNORE_INDEX;
use crate::engine::ops::{LmHeadCe, LmHeadLogits, Scratch};

impl CpuOps {
    pub(super) fn cross_entropy(&self, op: &LmHeadCe, scratch: Scratch) {
        let (v, c) = (self.region(op.weight).shape[0], self.region(op.weight).shape[1]);
        let capacity = self.region(op.x).shape[0];
        // SAFETY: regions of one operation.
        let (x, weight, labels, loss) = unsafe {
            (self.rows(op.x), self.slice::<f32>(op.weight), self.slice::<i32>(op.labels), self.slice::<f64>(op.loss))
        };
        // SAFETY: as above.
        let space = unsafe { self.scratch(scratch) };
        let (index, space) = space.split_at_mut((capacity * 4).next_multiple_of(64) / 4);
        let index: &mut [u32] = bytemuck::cast_slice_mut(index);
        let (gathered, space) = space.split_at_mut(op.chunk * c);
        let (dgathered, logits) = space.split_at_mut(if op.dx.is_some() { op.chunk * c } else { 0 });
        let rows = labelled_rows(&labels[..self.tokens], index);
        // SAFETY: as above.
        let mut dx = op.dx.map(|dx| unsafe { self.rows(dx) });
        if let Some(dx) = &mut dx {
            dx.fill(0.0);
        }
        loss.copy_from_slice(&[0.0, rows.len() as f64]);
        for chunk in rows.chunks(op.chunk) {
            let n = chunk.len();
            let gathered = &mut gathered[..n * c];
            gather(gathered, x, chunk, c);
            let logits = &mut logits[..n * v];
            matmul(logits, Matrix::new(gathered, c), Matrix::new(weight, c).t(), n, v, c, 1.0, false);
            let factor = self.state.loss_scale;
            let loss_of = |(row, &t): (&mut [f32], &u32)| match op.softcap {
                None => token_loss(row, labels[t as usize], factor),
                Some(cap) => capped_token_loss(row, labels[t as usize], factor, cap),
            };
            let losses: Vec<f64> = logits.par_chunks_mut(v).zip(chunk).map(loss_of).collect();
            loss[0] += losses.iter().sum::<f64>();
            let Some(dx) = &mut dx else { continue };
            let dgathered = &mut dgathered[..n * c];
            matmul(dgathered, Matrix::new(logits, v), Matrix::new(weight, c), n, c, v, 1.0, false);
            for (row, &t) in dgathered.chunks_exact(c).zip(chunk) {
                dx[t as usize * c..][..c].copy_from_slice(row);
            }
            if let Some(grad) = op.grad {
                // SAFETY: as above.
                let grad = unsafe { self.slice::<f32>(grad) };
                matmul(grad, Matrix::new(logits, v).t(), Matrix::new(gathered, c), v, c, n, 1.0, true);
            }
        }
    }

    pub(super) fn project_logits(&mut self, op: &LmHeadLogits) {
        let (v, c) = (self.region(op.weight).shape[0], self.region(op.weight).shape[1]);
        let mut host = std::mem::take(&mut self.logits);
        host.clear();
        // SAFETY: regions of one operation.
        let (x, weight, logits) =
            unsafe { (self.rows(op.x), self.slice::<f32>(op.weight), self.slice::<f32>(op.logits)) };
        let x = if op.last_only { &x[(self.tokens - 1) * c..] } else { &*x };
        for chunk in x.chunks(op.chunk * c) {
            let n = chunk.len() / c;
            matmul(logits, Matrix::new(chunk, c), Matrix::new(weight, c).t(), n, v, c, 1.0, false);
            if let Some(cap) = op.softcap {
                logits[..n * v].par_chunks_mut(v).for_each(|row| soft_cap(row, cap));
            }
            host.extend_from_slice(&logits[..n * v]);
        }
        self.logits = host;
    }
}

/// Indices of the rows that have a label, in `index`.
fn labelled_rows<'a>(labels: &[i32], index: &'a mut [u32]) -> &'a [u32] {
    let mut n = 0;
    for (t, &label) in labels.iter().enumerate() {
        if label != IGNORE_INDEX {
            index[n] = t as u32;
            n += 1;
        }
    }
    &index[..n]
}

fn gather(out: &mut [f32], x: &[f32], rows: &[u32], width: usize) {
    for (out, &t) in out.chunks_exact_mut(width).zip(rows) {
        out.copy_from_slice(&x[t as usize * width..][..width]);
    }
}

/// Cross-entropy of one row of logits, which become its gradient times `factor`.
fn token_loss(row: &mut [f32], label: i32, factor: f32) -> f64 {
    let shift = max(row);
    let target = row[label as usize];
    let sum = exp_sum(row, shift);
    scale(row, factor / sum);
    row[label as usize] -= factor;
    f64::from(sum.ln() + shift - target)
}

vectorised! {
    /// Capped logits become their gradient before the cap: softmax times the cap's slope `1 - (logit / cap)^2`.
    fn capped_grad(row: &mut [f32], shift: f32, share: f32, cap: f32) {
        for x in row {
            let y = *x / cap;
            *x = exp(*x - shift) * share * (1.0 - y * y);
        }
    }
}

/// As [`token_loss`], of logits that pass through a soft cap first.
fn capped_token_loss(row: &mut [f32], label: i32, factor: f32, cap: f32) -> f64 {
    soft_cap(row, cap);
    let shift = max(row);
    let target = row[label as usize];
    let sum = exp_sum_of(row, shift);
    capped_grad(row, shift, factor / sum, cap);
    let y = target / cap;
    row[label as usize] -= factor * (1.0 - y * y);
    f64::from(sum.ln() + shift - target)
}
