//! One rounding: the exponential and the products are f32.

use super::*;
use crate::engine::ops::{Swiglu, SwigluBackward};
use crate::model::Activation;

const TOLERANCE: f64 = 2e-6;

#[test]
fn swiglu_and_its_gradient() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for f in WIDTHS.into_iter().chain([1, 1000]) {
            let kinds = [
                (1.0, Activation::Silu),
                (60.0, Activation::Silu),
                (1.0, Activation::GeluTanh),
                (60.0, Activation::GeluTanh),
            ];
            for (factor, activation) in kinds {
                b.part(format!("F {f}, gates up to {}, {activation:?}", factor * 3.0));
                let (gate, up, dout) = (b.random(t * f), b.random(t * f), b.random(t * f));
                // Also where exp overflows and where it vanishes.
                let gate: Vec<f32> = gate.iter().map(|g| round(g * factor)).collect();
                let (gate_id, up_id, out) = (b.act("gate", f, &gate), b.act("up", f, &up), b.out("out", f));
                b.op(Op::Swiglu(Swiglu { gate: gate_id, up: up_id, out, activation }));
                b.want(out, TOLERANCE, Plain::Rounded);
                let (gate, up) = (b.act("gate and its gradient", f, &gate), b.act("up and its gradient", f, &up));
                let dout = b.act("dout", f, &dout);
                b.op(Op::SwigluBackward(SwigluBackward { gate, up, dout, activation }));
                // For a very negative gate alone all gradients vanish.
                b.want(gate, TOLERANCE, Plain::Rounded).scale(1e-3);
                b.want(up, TOLERANCE, Plain::Rounded).scale(1e-3);
            }
        }
        b.check();
    }
}
