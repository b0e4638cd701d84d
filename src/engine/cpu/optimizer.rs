//! Gradient norm, updates, and pages of optimizer state.

use super::CpuOps;
use crate::engine::ops::{AdamW, GradNorm, Moments, TensorId};
use crate::engine::optimizer::{AdamWHyper, adamw, adamw_8bit, adamw_32bit_bnb, sum_of_squares};
use crate::{Error, Result};

impl CpuOps {
    pub(super) fn global_norm(&self, op: &GradNorm) -> Result<()> {
        // SAFETY: regions of one operation; gradients are only read.
        let total: f64 = op.grads.iter().map(|&g| sum_of_squares(unsafe { self.slice::<f32>(g) })).sum();
        let norm = total.sqrt();
        if !norm.is_finite() {
            // Before anything is updated: the parameters are whole.
            return Err(Error::new("the gradient norm is not finite")
                .expected("a finite number")
                .found(norm.to_string())
                .next("lower the learning rate, then Run::resume"));
        }
        let limit = self.state.max_grad_norm;
        // torch.nn.utils.clip_grad_norm_
        let clip = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
        // SAFETY: as above.
        unsafe { self.slice::<f64>(op.norm) }.copy_from_slice(&[norm, clip]);
        Ok(())
    }

    pub(super) fn update(&self, op: &AdamW) {
        // SAFETY: regions of one operation.
        unsafe {
            let (p, g) = (self.slice::<f32>(op.param), self.slice::<f32>(op.grad));
            let mut h: AdamWHyper = self.state.adamw;
            h.grad_scale = self.slice::<f64>(op.norm)[1] as f32;
            if !op.decay {
                h.weight_decay = 0.0;
            }
            match op.moments {
                Moments::F32 { exp_avg, exp_avg_sq, bitsandbytes } => {
                    let (m, v) = (self.slice::<f32>(exp_avg), self.slice::<f32>(exp_avg_sq));
                    if bitsandbytes { adamw_32bit_bnb(p, g, m, v, &h) } else { adamw(p, g, m, v, &h) }
                }
                Moments::Blockwise8bit { state1, absmax1, state2, absmax2 } => adamw_8bit(
                    p,
                    g,
                    self.slice::<u8>(state1),
                    self.slice::<f32>(absmax1),
                    self.slice::<u8>(state2),
                    self.slice::<f32>(absmax2),
                    &h,
                ),
            }
        }
    }

    pub(super) fn copy(&self, from: TensorId, to: TensorId) {
        // SAFETY: two regions of one operation.
        unsafe { self.bytes(to).copy_from_slice(self.bytes(from)) }
    }
}
