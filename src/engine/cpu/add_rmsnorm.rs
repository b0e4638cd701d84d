//! The residual sum with RMSNorm, the norm again, and its gradient.

use rayon::prelude::*;

use super::CpuOps;
use super::math::{dot, vectorised};
use crate::engine::ops::{AddRmsnorm, Rescale, RmsnormBackward};

/// Columns of the weight's gradient that one task owns.
const COLUMNS: usize = 64;

vectorised! {
    /// `out = x * rstd * (weight + offset)`.
    fn rescale_row(out: &mut [f32], x: &[f32], weight: &[f32], offset: f32, rstd: f32) {
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * rstd * (w + offset);
        }
    }
}

vectorised! {
    /// `sum = a + b`.
    fn add_row(sum: &mut [f32], a: &[f32], b: &[f32]) {
        for ((s, a), b) in sum.iter_mut().zip(a).zip(b) {
            *s = a + b;
        }
    }
}

vectorised! {
    /// `dx (+)= rstd * ((weight + offset) * dout - x * scale)`.
    fn norm_grad_row(
        dx: &mut [f32], dout: &[f32], x: &[f32], weight: &[f32], offset: f32, rstd: f32, scale: f32, accumulate: bool
    ) {
        let keep = if accumulate { 1.0 } else { 0.0 };
        for (((d, g), x), w) in dx.iter_mut().zip(dout).zip(x).zip(weight) {
            let before = if accumulate { *d } else { 0.0 };
            *d = keep * before + rstd * ((w + offset) * g - x * scale);
        }
    }
}

vectorised! {
    /// Sum of `(weight + offset) * dout * x`.
    fn dot3(weight: &[f32], offset: f32, dout: &[f32], x: &[f32]) -> f32 {
        let mut lanes = [0f32; 16];
        let n = x.len() / 16 * 16;
        for i in (0..n).step_by(16) {
            for l in 0..16 {
                lanes[l] = ((weight[i + l] + offset) * dout[i + l]).mul_add(x[i + l], lanes[l]);
            }
        }
        let tail: f32 = (n..x.len()).map(|i| (weight[i] + offset) * dout[i] * x[i]).sum();
        lanes.iter().sum::<f32>() + tail
    }
}

impl CpuOps {
    pub(super) fn add_norm(&self, op: &AddRmsnorm) {
        let eps = self.plan.spec().rms_norm_eps as f32;
        // SAFETY: regions of one operation; each is borrowed once.
        let (residual, weight, out, rstd) =
            unsafe { (self.rows(op.residual), self.slice::<f32>(op.weight), self.rows(op.out), self.rows(op.rstd)) };
        let width = weight.len();
        let row = self.width(op.out) / (self.width(op.residual) / width);
        if let (Some(delta), Some(sum)) = (op.delta, op.sum) {
            // SAFETY: as above.
            let (delta, sum) = unsafe { (self.rows(delta), self.rows(sum)) };
            sum.par_chunks_mut(width)
                .zip(residual.par_chunks(width))
                .zip(delta.par_chunks(width))
                .zip(out.par_chunks_mut(row))
                .zip(rstd)
                .for_each(|((((sum, a), b), out), rstd)| {
                    add_row(sum, a, b);
                    norm_row(sum, weight, op.offset, eps, out, rstd);
                });
        } else {
            residual
                .par_chunks(width)
                .zip(out.par_chunks_mut(row))
                .zip(rstd)
                .for_each(|((x, out), rstd)| norm_row(x, weight, op.offset, eps, out, rstd));
        }
    }

    pub(super) fn norm_again(&self, op: &Rescale) {
        // SAFETY: regions of one operation.
        let (x, rstd, weight, out) =
            unsafe { (self.rows(op.x), self.rows(op.rstd), self.slice::<f32>(op.weight), self.rows(op.out)) };
        let width = weight.len();
        let row = self.width(op.out) / (self.width(op.x) / width);
        out.par_chunks_mut(row)
            .zip(x.par_chunks(width))
            .zip(rstd)
            .for_each(|((out, x), rstd)| rescale_row(out, x, weight, op.offset, *rstd));
    }

    pub(super) fn norm_backward(&self, op: &RmsnormBackward) {
        // SAFETY: regions of one operation.
        let (dout, x, rstd, weight, dx) = unsafe {
            (self.rows(op.dout), self.rows(op.x), self.rows(op.rstd), self.slice::<f32>(op.weight), self.rows(op.dx))
        };
        let width = weight.len();
        dx.par_chunks_mut(width).zip(dout.par_chunks(width)).zip(x.par_chunks(width)).zip(&*rstd).for_each(
            |(((dx, g), x), &rstd)| {
                let scale = rstd * rstd * dot3(weight, op.offset, g, x) / width as f32;
                norm_grad_row(dx, g, x, weight, op.offset, rstd, scale, op.accumulate);
            },
        );
        let Some(grad) = op.grad else { return };
        // SAFETY: as above.
        let grad = unsafe { self.slice::<f32>(grad) };
        grad.par_chunks_mut(COLUMNS).enumerate().for_each(|(part, grad)| {
            let from = part * COLUMNS;
            for ((g, x), rstd) in dout.chunks_exact(width).zip(x.chunks_exact(width)).zip(&*rstd) {
                for (i, grad) in grad.iter_mut().enumerate() {
                    *grad += g[from + i] * x[from + i] * rstd;
                }
            }
        });
    }
}

fn norm_row(x: &[f32], weight: &[f32], offset: f32, eps: f32, out: &mut [f32], rstd: &mut f32) {
    *rstd = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    rescale_row(out, x, weight, offset, *rstd);
}
