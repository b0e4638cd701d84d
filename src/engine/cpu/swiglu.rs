//! `act(gate) * up` and its gradient: SwiGLU and GeGLU.

use rayon::prelude::*;

use super::CpuOps;
use super::math::{exp, vectorised};
use crate::engine::ops::{Swiglu, SwigluBackward};
use crate::model::Activation;

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

/// GELU's tanh form is `x * sigmoid(z)`, `z = 2 sqrt(2 / pi) (x + 0.044715 x^3)`.
const GELU_LINEAR: f32 = 1.595_769;
const GELU_CUBIC: f32 = GELU_LINEAR * 0.044_715;

vectorised! {
    /// `out = gelu(gate) * up`.
    fn geglu_part(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            let z = g * (GELU_LINEAR + GELU_CUBIC * g * g);
            *o = g / (1.0 + exp(-z)) * u;
        }
    }
}

vectorised! {
    /// In place: the gradients of gate and up.
    fn geglu_grad_part(gate: &mut [f32], up: &mut [f32], dout: &[f32]) {
        for ((g, u), d) in gate.iter_mut().zip(up).zip(dout) {
            let square = *g * *g;
            let sigmoid = 1.0 / (1.0 + exp(-*g * (GELU_LINEAR + GELU_CUBIC * square)));
            let gelu = *g * sigmoid;
            let slope = GELU_LINEAR + 3.0 * GELU_CUBIC * square;
            // Where the slope overflows, sigmoid (1 - sigmoid) is 0.
            let bend = if sigmoid > 0.0 && sigmoid < 1.0 { gelu * (1.0 - sigmoid) * slope } else { 0.0 };
            let dgate = d * *u * (sigmoid + bend);
            *u = d * gelu;
            *g = dgate;
        }
    }
}

impl CpuOps {
    pub(super) fn gate(&self, op: &Swiglu) {
        // SAFETY: regions of one operation.
        let (gate, up, out) = unsafe { (self.rows(op.gate), self.rows(op.up), self.rows(op.out)) };
        let part = match op.activation {
            Activation::Silu => swiglu_part,
            Activation::GeluTanh => geglu_part,
        };
        let (width, row) = (self.width(op.gate), self.width(op.out));
        if row > width {
            for ((out, gate), up) in out.chunks_mut(row).zip(gate.chunks(width)).zip(up.chunks(width)) {
                part(&mut out[..width], gate, up);
            }
            return;
        }
        out.par_chunks_mut(PART)
            .zip(gate.par_chunks(PART))
            .zip(up.par_chunks(PART))
            .for_each(|((out, gate), up)| part(out, gate, up));
    }

    pub(super) fn gate_backward(&self, op: &SwigluBackward) {
        // SAFETY: regions of one operation.
        let (gate, up, dout) = unsafe { (self.rows(op.gate), self.rows(op.up), self.rows(op.dout)) };
        let part = match op.activation {
            Activation::Silu => swiglu_grad_part,
            Activation::GeluTanh => geglu_grad_part,
        };
        gate.par_chunks_mut(PART)
            .zip(up.par_chunks_mut(PART))
            .zip(dout.par_chunks(PART))
            .for_each(|((gate, up), dout)| part(gate, up, dout));
    }
}
