//! The residual sum with RMSNorm, the norm again, and its gradients.

use candle_core::DType;

use super::CudaOps;
use super::gpu::{Arg, Launch};
use crate::Result;
use crate::engine::ops::{AddRmsnorm, Rescale, RmsnormBackward, TensorId};

/// Columns that a block of `rmsnorm_weight_grad` adds up.
const COLUMNS: usize = 32;

impl CudaOps {
    pub(super) fn add_norm(&self, op: &AddRmsnorm) -> Result<()> {
        let (delta, sum) = match (op.delta, op.sum) {
            (Some(delta), Some(sum)) => (self.ptr(delta), self.ptr(sum)),
            _ => (0, 0),
        };
        self.gpu.launch(
            "add_rmsnorm",
            "add_rmsnorm",
            self.norm_rows(op.residual, op.weight),
            &[
                Arg::Ptr(self.ptr(op.residual)),
                Arg::Ptr(delta),
                Arg::Ptr(sum),
                Arg::Ptr(self.ptr(op.weight)),
                Arg::Ptr(self.ptr(op.out)),
                Arg::Ptr(self.ptr(op.rstd)),
                Arg::U32(self.region(op.weight).numel() as u32),
                Arg::F32(self.plan.spec().rms_norm_eps as f32),
                Arg::F32(op.offset),
                self.row_of(op.out, op.residual, op.weight),
            ],
        )
    }

    pub(super) fn norm_again(&self, op: &Rescale) -> Result<()> {
        self.gpu.launch(
            "add_rmsnorm",
            "rescale",
            self.norm_rows(op.x, op.weight),
            &[
                Arg::Ptr(self.ptr(op.x)),
                Arg::Ptr(self.ptr(op.rstd)),
                Arg::Ptr(self.ptr(op.weight)),
                Arg::Ptr(self.ptr(op.out)),
                Arg::U32(self.region(op.weight).numel() as u32),
                Arg::F32(op.offset),
                self.row_of(op.out, op.x, op.weight),
            ],
        )
    }

    /// From row to row of a norm's output: of what is normed at a time, which is a head of a token or all of it.
    fn row_of(&self, out: TensorId, x: TensorId, weight: TensorId) -> Arg {
        let groups = self.width(x) / self.region(weight).numel();
        Arg::U32((self.width(out) / groups) as u32)
    }

    pub(super) fn norm_backward(&self, op: &RmsnormBackward) -> Result<()> {
        let width = self.region(op.weight).numel();
        let (dout, x, rstd) = (self.ptr(op.dout), self.ptr(op.x), self.ptr(op.rstd));
        if let Some(grad) = op.grad {
            self.gpu.launch(
                "add_rmsnorm",
                "rmsnorm_weight_grad",
                Launch { grid: [width.div_ceil(COLUMNS) as u32, 1, 1], block: 1024, shared: 0 },
                &[
                    Arg::Ptr(dout),
                    Arg::Ptr(x),
                    Arg::Ptr(rstd),
                    Arg::Ptr(self.ptr(grad)),
                    Arg::U32(self.norm_rows(op.x, op.weight).grid[0]),
                    Arg::U32(width as u32),
                    Arg::U32(u32::from(self.region(grad).dtype == DType::BF16)),
                ],
            )?;
        }
        self.gpu.launch(
            "add_rmsnorm",
            "rmsnorm_backward",
            self.norm_rows(op.x, op.weight),
            &[
                Arg::Ptr(dout),
                Arg::Ptr(x),
                Arg::Ptr(rstd),
                Arg::Ptr(self.ptr(op.weight)),
                Arg::Ptr(self.ptr(op.dx)),
                Arg::U32(width as u32),
                Arg::U32(u32::from(op.accumulate)),
                Arg::F32(op.offset),
            ],
        )
    }

    /// A block of 256 threads for each row that is normed: a token, or a head of a token.
    fn norm_rows(&self, x: TensorId, weight: TensorId) -> Launch {
        let groups = self.width(x) / self.region(weight).numel();
        Launch { grid: [(self.tokens * groups) as u32, 1, 1], block: 256, shared: 0 }
    }

    /// A block of 256 threads for each token.
    pub(super) fn token_rows(&self) -> Launch {
        Launch { grid: [self.tokens as u32, 1, 1], block: 256, shared: 0 }
    }
}
