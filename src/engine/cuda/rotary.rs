//! Rotary position embedding.

use super::CudaOps;
use super::gpu::{Arg, Launch};
use crate::Result;
use crate::engine::ops::Rotary;

impl CudaOps {
    pub(super) fn rotate(&self, op: &Rotary) -> Result<()> {
        // Long texts have frequencies of their own, in a second row.
        let row = if self.state.long_text { op.heads.dim / 2 * size_of::<f32>() } else { 0 };
        self.gpu.launch(
            "rotary",
            "rotary",
            Launch { shared: (op.heads.dim * size_of::<f32>()) as u32, ..self.token_rows() },
            &[
                Arg::Ptr(self.ptr(op.q)),
                Arg::Ptr(self.ptr(op.k)),
                Arg::Ptr(self.ptr(op.positions)),
                Arg::Ptr(self.ptr(op.inv_freq) + row as u64),
                Arg::U32(op.heads.q as u32),
                Arg::U32(op.heads.kv as u32),
                Arg::U32(op.heads.dim as u32),
                Arg::F32(if op.inverse { -1.0 } else { 1.0 }),
                Arg::F32(op.scale),
            ],
        )
    }
}
