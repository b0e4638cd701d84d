//! Columns of a matrix as tensors of their own, and back. Twin of `cpu/columns.rs`.

use super::CudaOps;
use super::gpu::Arg;
use crate::Result;
use crate::engine::ops::{JoinColumns, SplitColumns, TensorId};

impl CudaOps {
    pub(super) fn split(&self, op: &SplitColumns) -> Result<()> {
        let mut first = 0;
        for &part in &op.parts {
            self.copy_columns((op.whole, first), (part, 0), self.width(part))?;
            first += self.width(part);
        }
        Ok(())
    }

    pub(super) fn join(&self, op: &JoinColumns) -> Result<()> {
        let mut first = 0;
        for &part in &op.parts {
            self.copy_columns((part, 0), (op.whole, first), self.width(part))?;
            first += self.width(part);
        }
        Ok(())
    }

    /// `width` columns, each side from its first on.
    pub(super) fn copy_columns(&self, from: (TensorId, usize), to: (TensorId, usize), width: usize) -> Result<()> {
        let count = |n: usize| Arg::U32(n as u32);
        let args = [
            Arg::Ptr(self.ptr(from.0)),
            Arg::Ptr(self.ptr(to.0)),
            count(self.width(from.0)),
            count(from.1),
            count(self.width(to.0)),
            count(to.1),
            count(width),
        ];
        self.gpu.launch("columns", "copy_columns", self.token_rows(), &args)
    }
}
