//! `act(gate) * up` and its gradient: SwiGLU and GeGLU.

use super::CudaOps;
use super::gpu::Arg;
use crate::Result;
use crate::engine::ops::{Swiglu, SwigluBackward, TensorId};
use crate::model::Activation;

impl CudaOps {
    pub(super) fn gate(&self, op: &Swiglu) -> Result<()> {
        let kernel = match op.activation {
            Activation::Silu => "swiglu",
            Activation::GeluTanh => "geglu",
        };
        let rows = [self.width(op.gate), self.width(op.out)].map(|n| Arg::U32(n as u32));
        self.swiglu_kernel(kernel, [op.gate, op.up, op.out], &rows)
    }

    pub(super) fn gate_backward(&self, op: &SwigluBackward) -> Result<()> {
        let kernel = match op.activation {
            Activation::Silu => "swiglu_backward",
            Activation::GeluTanh => "geglu_backward",
        };
        self.swiglu_kernel(kernel, [op.gate, op.up, op.dout], &[])
    }

    fn swiglu_kernel(&self, kernel: &'static str, ids: [TensorId; 3], rows: &[Arg]) -> Result<()> {
        let n = self.tokens * self.width(ids[0]);
        let [a, b, c] = ids.map(|id| Arg::Ptr(self.ptr(id)));
        self.gpu.launch("swiglu", kernel, self.elements(n), &[&[a, b, c, Arg::U64(n as u64)], rows].concat())
    }
}
