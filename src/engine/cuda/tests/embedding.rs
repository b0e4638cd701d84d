//! Copies are exact; a row's gradient is added in the order of its tokens, so it has the CPU's bits.

use rand::Rng;

use super::*;
use crate::engine::ops::{Embedding, EmbeddingBackward};

#[test]
fn embedding_and_its_gradient() {
    if !gpu() {
        return;
    }
    // 400 tokens of few: many occurrences, over several strides of a block.
    for t in TOKENS.into_iter().chain([400]) {
        let mut b = Bench::new(t);
        let v = 33;
        b.batch.input_ids = (0..t).map(|_| b.rng.random_range(0..v as u32)).collect();
        for (c, scale) in WIDTHS.into_iter().chain([2056, 4100]).flat_map(|c| [(c, 1.0), (c, 4.5)]) {
            b.part(format!("C {c}, scale {scale}"));
            let (table, before, dout) = (b.random(v * c), b.random(v * c), b.random(t * c));
            let (table, out) = (b.elems("table", &[v, c], &table), b.out("out", c));
            let dout = b.act("dout", c, &dout);
            let (grad, grad_elem) = (b.f32s("grad", &[v, c], &before), b.elems("grad in elem", &[v, c], &before));
            let tokens = b.load.tokens;
            b.op(Op::Embedding(Embedding { table, tokens, out, scale }));
            b.op(Op::EmbeddingBackward(EmbeddingBackward { tokens, dout, grad, scale }));
            b.op(Op::EmbeddingBackward(EmbeddingBackward { tokens, dout, grad: grad_elem, scale }));
            b.want(out, 0.0, if scale == 1.0 { Plain::Within(0.0) } else { Plain::Rounded });
            // A multiplication and an addition may be one instruction on the GPU.
            let tolerance = if scale == 1.0 { 0.0 } else { 1e-6 };
            b.want(grad, tolerance, Plain::Within(tolerance));
            b.want(grad_elem, tolerance, Plain::Rounded);
        }
        b.check();
    }
}
