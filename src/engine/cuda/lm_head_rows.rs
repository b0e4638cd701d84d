//! What the output projection does beside its matrix products: the rows that have a label, and their loss.

use super::CudaOps;
use super::gpu::{Arg, Launch};
use crate::Result;

impl CudaOps {
    /// `out[i] = x[index[i]]`: x elem `[T, width]`, index u32 `[n]`, out elem `[n, width]`, as device addresses.
    pub(super) fn gather_rows(&self, x: u64, index: u64, out: u64, n: usize, width: usize) -> Result<()> {
        self.copy_rows("gather_rows", x, index, out, n, width)
    }

    /// `out[index[i]] = x[i]`: x elem `[n, width]`, index u32 `[n]` without repetition, out elem `[T, width]`.
    pub(super) fn scatter_rows(&self, x: u64, index: u64, out: u64, n: usize, width: usize) -> Result<()> {
        self.copy_rows("scatter_rows", x, index, out, n, width)
    }

    fn copy_rows(&self, kernel: &'static str, x: u64, index: u64, out: u64, n: usize, width: usize) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        let launch = Launch { grid: [n as u32, 1, 1], block: 256, shared: 0 };
        let args = [Arg::Ptr(x), Arg::Ptr(index), Arg::Ptr(out), Arg::U32(width as u32)];
        self.gpu.launch("lm_head", kernel, launch, &args)
    }

    /// Cross-entropy of each row of logits f32 `[n, vocab]` into `losses` f64 `[n]`; row i has the label
    /// `labels[index[i]]`. With `dlogits`, elem `[n, vocab]`, also the gradient times `loss_scale`; in f32 it may be the
    /// logits' own place.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn token_loss(
        &self,
        logits: u64,
        labels: u64,
        index: u64,
        losses: u64,
        dlogits: Option<u64>,
        n: usize,
        vocab: usize,
        softcap: Option<f32>,
    ) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        self.gpu.launch(
            "lm_head",
            "token_loss",
            Launch { grid: [n as u32, 1, 1], block: 512, shared: 0 },
            &[
                Arg::Ptr(logits),
                Arg::Ptr(labels),
                Arg::Ptr(index),
                Arg::Ptr(losses),
                Arg::Ptr(dlogits.unwrap_or(0)),
                Arg::U32(vocab as u32),
                Arg::F32(self.state.loss_scale),
                Arg::F32(softcap.unwrap_or(0.0)),
            ],
        )
    }

    /// `loss[0] +=` the sum of `losses`, f64 `[n]`.
    pub(super) fn sum_losses(&self, losses: u64, loss: u64, n: usize) -> Result<()> {
        self.gpu.launch(
            "lm_head",
            "sum_losses",
            Launch { grid: [1, 1, 1], block: 1024, shared: 0 },
            &[Arg::Ptr(losses), Arg::Ptr(loss), Arg::U32(n as u32)],
        )
    }
}
