//! Rows of the embedding table, and their gradient.

use candle_core::DType;

use super::CudaOps;
use super::gpu::{Arg, Launch};
use crate::Result;
use crate::engine::ops::{Embedding, EmbeddingBackward};

/// Columns that a block of `embedding_backward` adds up.
const COLUMNS: usize = 2048;

impl CudaOps {
    pub(super) fn embed(&self, op: &Embedding) -> Result<()> {
        let width = self.region(op.table).shape[1];
        self.gpu.launch(
            "embedding",
            "embedding",
            self.token_rows(),
            &[
                Arg::Ptr(self.ptr(op.table)),
                Arg::Ptr(self.ptr(op.tokens)),
                Arg::Ptr(self.ptr(op.out)),
                Arg::U32(width as u32),
                Arg::F32(op.scale),
            ],
        )
    }

    pub(super) fn embed_backward(&self, op: &EmbeddingBackward) -> Result<()> {
        let width = self.region(op.grad).shape[1];
        self.gpu.launch(
            "embedding",
            "embedding_backward",
            Launch { grid: [self.tokens as u32, width.div_ceil(COLUMNS) as u32, 1], block: 256, shared: 0 },
            &[
                Arg::Ptr(self.ptr(op.tokens)),
                Arg::Ptr(self.ptr(op.dout)),
                Arg::Ptr(self.ptr(op.grad)),
                Arg::U32(self.tokens as u32),
                Arg::U32(width as u32),
                Arg::U32(u32::from(self.region(op.grad).dtype == DType::BF16)),
                Arg::F32(op.scale),
            ],
        )
    }
}
