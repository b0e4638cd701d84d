//! AdamW on flat slices: PyTorch's, and bitsandbytes' with 32-bit or 8-bit state.
//!
//! All have the same parts: `p` the parameters, `g` the gradient, and two moments, the running means of the gradient
//! (`exp_avg`) and of its square (`exp_avg_sq`). They differ in the order of operations, so in the last digits, and in
//! when the weight decays: PyTorch before the update, bitsandbytes' CUDA kernels after it.
//!
//! A slice is cut into fixed pieces and each element is computed by itself, so the bits do not depend on the number of
//! threads. Nothing allocates. Slices of unequal length are a mistake of the caller: a panic.

mod adamw;
mod adamw_8bit;
mod norm;

pub(crate) use adamw::TorchCoefficients;
pub use adamw::{adamw, adamw_32bit_bnb};
pub use adamw_8bit::{STATE_BLOCKSIZE, adamw_8bit};
pub use norm::sum_of_squares;

/// Tensors with fewer elements keep 32-bit state under the 8-bit optimizers, as in bitsandbytes.
pub const MIN_8BIT_SIZE: usize = 4096;

/// What one AdamW step needs to know beside the slices.
///
/// ```
/// use tunebook::engine::optimizer::{AdamWHyper, adamw};
/// let (mut p, mut m, mut v) = ([1.0f32], [0.0], [0.0]);
/// let h = AdamWHyper { lr: 0.1, weight_decay: 0.0, ..AdamWHyper::default() };
/// adamw(&mut p, &[-3.0], &mut m, &mut v, &h);
/// // The first step has the size of the learning rate, whatever the gradient's.
/// assert!((p[0] - 1.1).abs() < 1e-6);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWHyper {
    /// The learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled: the parameters are multiplied by `1 - lr * weight_decay`.
    pub weight_decay: f32,
    /// The number of this step, from 1.
    pub step: u32,
    /// Multiplies the gradient: the clipping factor, or 1.
    pub grad_scale: f32,
}

impl Default for AdamWHyper {
    /// Learning rate 1e-3, betas 0.9 and 0.999, eps 1e-8, weight decay 0.01, step 1, no clipping.
    fn default() -> Self {
        AdamWHyper { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1, grad_scale: 1.0 }
    }
}

impl AdamWHyper {
    /// The corrections of bitsandbytes for moments that started at zero: `1 - beta1^t` and `sqrt(1 - beta2^t)`.
    fn bias_corrections(&self) -> (f32, f32) {
        let power = |beta: f32| f64::from(beta).powi(self.step.min(i32::MAX as u32) as i32) as f32;
        (1.0 - power(self.beta1), (1.0 - power(self.beta2)).sqrt())
    }
}

/// The scalars of a bitsandbytes step: its kernels compute them in f32.
pub(crate) struct BnbCoefficients {
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub step_size: f32,
    pub eps: f32,
    pub decay: f32,
    pub grad_scale: f32,
}

impl BnbCoefficients {
    pub fn new(h: &AdamWHyper) -> Self {
        let (correction1, correction2) = h.bias_corrections();
        BnbCoefficients {
            beta1: h.beta1,
            one_minus_beta1: 1.0 - h.beta1,
            beta2: h.beta2,
            one_minus_beta2: 1.0 - h.beta2,
            step_size: -h.lr * correction2 / correction1,
            eps: correction2 * h.eps,
            decay: 1.0 - h.lr * h.weight_decay,
            grad_scale: h.grad_scale,
        }
    }
}

/// Elements per unit of parallel work.
const CHUNK: usize = 1 << 14;
