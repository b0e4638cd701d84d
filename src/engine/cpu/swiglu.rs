//! `silu(gate) * up` and its gradient.

use rayon::prelude::*;

use super::CpuOps;
use super::math::{exp, vectorised};
use crate::engine::ops::{Swiglu, SwigluBackward};

/// Elements that one task handles.
const PART: usize = 1 << 13;

vectorised! {
    /// `out = gate / (1 + exp(-gate)) * up`.
    fn swiglu_part(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
}

vectorised! {
    /// In place: the gradients of gate and up.
    fn swiglu_grad_part(gate: &mut [f32], up: &mut [f32], dout: &[f32]) {
        for ((g, u), d) in gate.iter_mut().zip(up).zip(dout) {
            let sigmoid = 1.0 / (1.0 + exp(-*g));
            let silu = *g * sigmoid;
            let dgate = d * *u * (sigmoid + silu * (1.0 - sigmoid));
            *u = d * silu;
            *g = dgate;
        }
    }
}

impl CpuOps {
    pub(super) fn gate(&self, op: &Swiglu) {
        // SAFETY: regions of one operation.
        let (gate, up, out) = unsafe { (self.rows(op.gate), self.rows(op.up), self.rows(op.out)) };
        out.par_chunks_mut(PART)
            .zip(gate.par_chunks(PART))
            .zip(up.par_chunks(PART))
            .for_each(|((out, gate), up)| swiglu_part(out, gate, up));
    }

    pub(super) fn gate_backward(&self, op: &SwigluBackward) {
        // SAFETY: regions of one operation.
        let (gate, up, dout) = unsafe { (self.rows(op.gate), self.rows(op.up), self.rows(op.dout)) };
        gate.par_chunks_mut(PART)
            .zip(up.par_chunks_mut(PART))
            .zip(dout.par_chunks(PART))
            .for_each(|((gate, up), dout)| swiglu_grad_part(gate, up, dout));
    }
}
