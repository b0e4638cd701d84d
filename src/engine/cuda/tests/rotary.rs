//! One rounding: angles and products are f32.

use super::*;
use crate::engine::ops::{Heads, Rotary};

const TOLERANCE: f64 = 2e-6;

#[test]
fn rotary_and_its_inverse() {
    if !gpu() {
        return;
    }
    for (t, step) in [(1, 1), (3, 16_000), (65, 1), (130, 251)] {
        let mut b = Bench::new(t);
        b.batch.positions = (0..t as u32).map(|i| i * step).collect();
        for (q, kv, dim) in [(6, 3, 64), (4, 1, 80), (2, 2, 96), (4, 2, 128), (1, 1, 256), (3, 1, 8), (5, 5, 40)] {
            for (inverse, scale) in [(false, 1.0), (true, 1.0), (true, 1.25)] {
                let heads = Heads { q, kv, dim, window: None };
                b.part(format!("{heads:?}, inverse {inverse}, scale {scale}"));
                let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dim as f32)).collect();
                let (x, y) = (b.random(t * q * dim), b.random(t * kv * dim));
                let (q, k) = (b.act("q", q * dim, &x), b.act("k", kv * dim, &y));
                let inv_freq = b.f32s("inv_freq", &[dim / 2], &inv_freq);
                let positions = b.load.positions;
                b.op(Op::Rotary(Rotary { q, k, positions, inv_freq, inverse, scale, heads }));
                b.want(q, TOLERANCE, Plain::Rounded);
                b.want(k, TOLERANCE, Plain::Rounded);
            }
        }
        b.check();
    }
}
