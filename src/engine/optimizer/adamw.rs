//! AdamW with 32-bit state.

use rayon::prelude::*;

use super::{AdamWHyper, BnbCoefficients, CHUNK};
use crate::nf4::widest;

/// One step of `torch.optim.AdamW`, all slices of the same length:
///
/// ```text
/// p -= lr weight_decay p
/// exp_avg    += (1 - beta1) (g - exp_avg)
/// exp_avg_sq  = beta2 exp_avg_sq + (1 - beta2) g^2
/// p -= lr / (1 - beta1^t)  exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^t) + eps)
/// ```
///
/// # Panics
/// If the lengths differ.
pub fn adamw(p: &mut [f32], g: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], h: &AdamWHyper) {
    let c = TorchCoefficients::new(h);
    each_chunk(p, g, exp_avg, exp_avg_sq, |p, g, m, v| torch_step(p, g, m, v, &c));
}

/// One step of bitsandbytes' AdamW with 32-bit state, all slices of the same length:
///
/// ```text
/// exp_avg    = beta1 exp_avg + (1 - beta1) g
/// exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
/// p -= lr sqrt(1 - beta2^t) / (1 - beta1^t)  exp_avg / (sqrt(exp_avg_sq) + sqrt(1 - beta2^t) eps)
/// p *= 1 - lr weight_decay
/// ```
///
/// Used for `paged_adamw_32bit`, and under the 8-bit optimizers for tensors with fewer than
/// [`MIN_8BIT_SIZE`](super::MIN_8BIT_SIZE) elements.
///
/// # Panics
/// If the lengths differ.
pub fn adamw_32bit_bnb(p: &mut [f32], g: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], h: &AdamWHyper) {
    let c = BnbCoefficients::new(h);
    each_chunk(p, g, exp_avg, exp_avg_sq, |p, g, m, v| bnb_step(p, g, m, v, &c));
}

fn each_chunk(
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    step: impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32]) + Sync,
) {
    let n = p.len();
    assert!(
        g.len() == n && m.len() == n && v.len() == n,
        "lengths: p {n}, g {}, moments {} {}",
        g.len(),
        m.len(),
        v.len()
    );
    let pieces = p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
    let pieces = pieces.zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
    pieces.for_each(|(((p, g), m), v)| step(p, g, m, v));
}

/// The scalars of a torch step: computed in f64 and rounded where a tensor meets them.
pub(crate) struct TorchCoefficients {
    pub decay: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub step_size: f32,
    pub root_correction2: f32,
    pub eps: f32,
    pub grad_scale: f32,
}

impl TorchCoefficients {
    pub fn new(h: &AdamWHyper) -> Self {
        let (lr, beta1, beta2) = (decimal(h.lr), decimal(h.beta1), decimal(h.beta2));
        let t = h.step.min(i32::MAX as u32) as i32;
        TorchCoefficients {
            decay: (1.0 - lr * decimal(h.weight_decay)) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: h.beta2,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - beta1.powi(t))) as f32,
            root_correction2: (1.0 - beta2.powi(t)).sqrt() as f32,
            eps: h.eps,
            grad_scale: h.grad_scale,
        }
    }
}

/// The decimal number that was meant: 0.9 as f32 is 0.89999998, and 1 - 0.9 would lose seven digits.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

widest! { fn torch_step(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &TorchCoefficients) = torch_body }

#[inline(always)]
fn torch_body(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &TorchCoefficients) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * c.grad_scale;
        *m += c.one_minus_beta1 * (g - *m);
        *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
        *p = *p * c.decay - c.step_size * *m / (v.sqrt() / c.root_correction2 + c.eps);
    }
}

widest! { fn bnb_step(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &BnbCoefficients) = bnb_body }

#[inline(always)]
fn bnb_body(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &BnbCoefficients) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * c.grad_scale;
        *m = *m * c.beta1 + c.one_minus_beta1 * g;
        *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
        *p = (*p + c.step_size * (*m / (v.sqrt() + c.eps))) * c.decay;
    }
}
