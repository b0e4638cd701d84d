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
        self.swiglu_kernel(kernel, [op.gate, op.up, op.out])
    }

    pub(super) fn gate_backward(&self, op: &SwigluBackward) -> Result<()> {
        let kernel = match op.activation {
            Activation::Silu => "swiglu_backward",
            Activation::GeluTanh => "geglu_backward",
        };
        self.swiglu_kernel(kernel, [op.gate, op.up, op.dout])
    }

    fn swiglu_kernel(&self, kernel: &'static str, ids: [TensorId; 3]) -> Result<()> {
        let r = self.region(ids[0]);
        let n = self.tokens * (r.numel() / r.shape[0]);
        let [a, b, c] = ids.map(|id| Arg::Ptr(self.ptr(id)));
        self.gpu.launch("swiglu", kernel, self.elements(n), &[a, b, c, Arg::U64(n as u64)])
    }
}
