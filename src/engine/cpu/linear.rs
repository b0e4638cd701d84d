//! Linear modules: dense or 4-bit base, with or without LoRA; forward and gradients.

use rayon::prelude::*;

use super::CpuOps;
use super::math::{dot, vectorised};
use super::matmul::{Matrix, matmul};
use crate::engine::dropout::dropout;
use crate::engine::ops::{
    Beside, Dequantize, Linear, LinearBackward, LinearIds, Lora, LoraB, Magnitude, Scratch, Weight,
};
use crate::nf4::{AbsmaxRef, dequantize_into};

/// Columns of a bias's gradient that one task owns: it adds all tokens to them, in order.
const COLUMNS: usize = 64;

vectorised! {
    /// `to += x`, as many elements as `to` has.
    fn add_to(to: &mut [f32], x: &[f32]) {
        for (t, x) in to.iter_mut().zip(x) {
            *t += x;
        }
    }
}

vectorised! {
    /// `x *= y z`.
    fn multiply(x: &mut [f32], y: &[f32], z: &[f32]) {
        for ((x, y), z) in x.iter_mut().zip(y).zip(z) {
            *x *= y * z;
        }
    }
}

impl CpuOps {
    pub(super) fn linear_forward(&self, op: &Linear, scratch: Scratch) {
        let (t, m) = (self.tokens, &op.linear);
        let (n, k) = (m.out_features, m.in_features);
        // SAFETY: regions of one operation.
        let (x, space) = unsafe { (self.rows(op.x), self.scratch(scratch)) };
        let (space, dropped) = space.split_at_mut(dequantized_len(m, op.y.is_some()));
        if let Some(y) = op.y {
            // SAFETY: as above.
            let y = unsafe { self.rows(y) };
            let w = self.base_weight(m, space);
            let w = Matrix::new(w, self.weight_row(m));
            matmul(y, Matrix::new(x, self.width(op.x)), w.t(), t, n, k, 1.0, false);
        }
        self.add_adapter(op, x, space, dropped);
        if let (Some(bias), Some(y)) = (m.bias, op.y) {
            // SAFETY: as above.
            let (b, y) = unsafe { (self.slice::<f32>(bias.b), self.rows(y)) };
            y.par_chunks_mut(n).for_each(|row| add_to(row, b));
        }
    }

    /// The adapter's part of the product; `w` holds the dequantized weight where there is one.
    fn add_adapter(&self, op: &Linear, x: &[f32], w: &mut [f32], space: &mut [f32]) {
        let (t, m) = (self.tokens, &op.linear);
        let (n, k) = (m.out_features, m.in_features);
        if let (Some(lora), Some(first), Some(y), true) = (&m.lora, op.beside, op.y, self.state.adapter) {
            // SAFETY: regions of one operation.
            let (y, b) = unsafe { (self.rows(y), self.slice::<f32>(lora.b)) };
            let xa = Matrix::new(&x[first..], self.width(op.x));
            matmul(y, xa, Matrix::new(b, lora.r).t(), t, n, lora.r, lora.scaling, true);
        }
        let (Some(lora), Some(xa), true) = (&m.lora, op.xa, self.state.adapter) else { return };
        // SAFETY: regions of one operation.
        let (xa, a, b) = unsafe { (self.rows(xa), self.slice::<f32>(lora.a), self.slice::<f32>(lora.b)) };
        let (dropped, space) = space.split_at_mut(if lora.dropout > 0.0 { space.len() } else { 0 });
        let x = self.dropped(lora, x, dropped);
        matmul(xa, Matrix::new(x, k), Matrix::new(a, k).t(), t, lora.r, k, 1.0, false);
        let Some(y) = op.y else { return };
        // SAFETY: the borrow above has ended.
        let y = unsafe { self.rows(y) };
        matmul(y, Matrix::new(xa, lora.r), Matrix::new(b, lora.r).t(), t, n, lora.r, lora.scaling, true);
        if let Some(magnitude) = lora.magnitude {
            let w = self.weight_in(m, w);
            let inverse = self.inverse_lengths(m, lora, w, space);
            // SAFETY: only read.
            let magnitude = unsafe { self.slice::<f32>(magnitude.m) };
            y.par_chunks_mut(n).for_each(|row| multiply(row, inverse, magnitude));
        }
    }

    pub(super) fn linear_grad(&self, op: &LinearBackward, scratch: Scratch) {
        let (t, m) = (self.tokens, &op.linear);
        let (n, k) = (m.out_features, m.in_features);
        // SAFETY: regions of one operation.
        let (dy, space) = unsafe { (self.rows(op.dy), self.scratch(scratch)) };
        let dora = m.lora.filter(|_| self.state.adapter).and_then(|l| Some((l, l.magnitude?)));
        let (space, rest) = space.split_at_mut(dequantized_len(m, op.dx.is_some() || dora.is_some()));
        let (dy, rest): (&[f32], &mut [f32]) = match dora {
            None => (dy, rest),
            Some((lora, magnitude)) => {
                let at = rest.len() - dora_len(m, self.region(op.dy).shape[0], true);
                let (rest, own) = rest.split_at_mut(at);
                let w = self.base_weight(m, space);
                (self.dora_grad(op, &lora, magnitude, w, dy, own), rest)
            }
        };
        if let Some(dx) = op.dx {
            // SAFETY: as above.
            let dx = unsafe { self.rows(dx) };
            let w = Matrix::new(self.base_weight(m, space), self.weight_row(m));
            matmul(dx, Matrix::new(dy, n), w, t, k, n, 1.0, op.accumulate);
        }
        if let (Some(grad), Some(x)) = (m.grad, op.x) {
            // SAFETY: as above.
            let (grad, x) = unsafe { (self.slice::<f32>(grad), self.rows(x)) };
            matmul(grad, Matrix::new(dy, n).t(), Matrix::new(x, k), n, k, t, 1.0, true);
        }
        if let Some(grad) = m.bias.and_then(|b| b.grad) {
            // SAFETY: as above.
            let grad = unsafe { self.slice::<f32>(grad) };
            grad.par_chunks_mut(COLUMNS).enumerate().for_each(|(part, grad)| {
                let from = part * COLUMNS;
                dy.chunks_exact(n).for_each(|row| add_to(grad, &row[from..]));
            });
        }
        if let Some(lora) = &m.lora {
            self.lora_grad(op, lora, dy, rest);
        }
    }

    fn lora_grad(&self, op: &LinearBackward, lora: &Lora, dy: &[f32], space: &mut [f32]) {
        let (t, n, k, r) = (self.tokens, op.linear.out_features, op.linear.in_features, lora.r);
        let (Some(x), Some(xa)) = (op.x, op.xa) else { return };
        // SAFETY: regions of one operation.
        let (x, xa, a, b) =
            unsafe { (self.rows(x), self.rows(xa), self.slice::<f32>(lora.a), self.slice::<f32>(lora.b)) };
        let rows = self.region(op.dy).shape[0];
        let (dxa, dropped) = space.split_at_mut((rows * r).next_multiple_of(16));
        // dxa = scaling * dy B
        matmul(dxa, Matrix::new(dy, n), Matrix::new(b, r), t, r, n, lora.scaling, false);
        if let Some((grad_a, grad_b)) = lora.grads {
            // SAFETY: as above.
            let (grad_a, grad_b) = unsafe { (self.slice::<f32>(grad_a), self.slice::<f32>(grad_b)) };
            matmul(grad_b, Matrix::new(dy, n).t(), Matrix::new(xa, r), n, r, t, lora.scaling, true);
            let x = self.dropped(lora, x, dropped);
            matmul(grad_a, Matrix::new(dxa, r).t(), Matrix::new(x, k), r, k, t, 1.0, true);
        }
        let Some(dx) = op.dx else { return };
        // SAFETY: the base product's borrow has ended.
        let dx = unsafe { self.rows(dx) };
        if self.drops(lora) {
            let through = &mut dropped[..t * k];
            matmul(through, Matrix::new(dxa, r), Matrix::new(a, k), t, k, r, 1.0, false);
            dropout(through, lora.dropout, self.state.dropout_seed, self.state.micro_step, lora.module);
            dx.iter_mut().zip(&*through).for_each(|(d, g)| *d += g);
        } else {
            matmul(dx, Matrix::new(dxa, r), Matrix::new(a, k), t, k, r, 1.0, true);
        }
    }

    /// One over the length of each row of `W + scaling * B A`, in the first `out` elements of `space`; 0 for a row of zeros, which has
    /// no direction.
    fn inverse_lengths<'a>(&self, linear: &LinearIds, lora: &Lora, w: &[f32], space: &'a mut [f32]) -> &'a mut [f32] {
        let (n, k, r) = (linear.out_features, linear.in_features, lora.r);
        // SAFETY: regions of one operation, only read.
        let (a, b) = unsafe { (self.slice::<f32>(lora.a), self.slice::<f32>(lora.b)) };
        let (inverse, tile) = space.split_at_mut(n.next_multiple_of(16));
        for (i, inverse) in inverse[..n].chunks_mut(DORA_ROWS).enumerate() {
            let (first, count) = (i * DORA_ROWS, inverse.len());
            let tile = &mut tile[..count * k];
            tile.copy_from_slice(&w[first * k..][..count * k]);
            let b = Matrix::new(&b[first * r..][..count * r], r);
            matmul(tile, b, Matrix::new(a, k), count, k, r, lora.scaling, true);
            inverse.par_iter_mut().zip(tile.par_chunks(k)).for_each(|(x, row)| {
                let squares = dot(row, row);
                *x = if squares > 0.0 { 1.0 / squares.sqrt() } else { 0.0 };
            });
        }
        &mut inverse[..n]
    }

    /// The gradient of the magnitudes; gives the gradient of what they multiply.
    fn dora_grad<'a>(
        &self,
        op: &LinearBackward,
        lora: &Lora,
        magnitude: Magnitude,
        w: &[f32],
        dy: &[f32],
        space: &'a mut [f32],
    ) -> &'a [f32] {
        let (t, n, k, r) = (self.tokens, op.linear.out_features, op.linear.in_features, lora.r);
        let capacity = (self.region(op.dy).shape[0] * n).next_multiple_of(16);
        let (g, rest) = space.split_at_mut(capacity);
        let (z, rest) = rest.split_at_mut(capacity);
        let inverse = self.inverse_lengths(&op.linear, lora, w, rest);
        // SAFETY: only read.
        let m = unsafe { self.slice::<f32>(magnitude.m) };
        let g = &mut g[..t * n];
        g.copy_from_slice(dy);
        g.par_chunks_mut(n).for_each(|row| multiply(row, inverse, m));
        let (Some(x), Some(xa), Some(grad)) = (op.x, op.xa, magnitude.grad) else { return g };
        // SAFETY: regions of one operation.
        let (x, xa, b, grad) =
            unsafe { (self.rows(x), self.rows(xa), self.slice::<f32>(lora.b), self.slice::<f32>(grad)) };
        // What the magnitudes multiply, over its length: made again, since the output is rotated or overwritten by now.
        let z = &mut z[..t * n];
        matmul(z, Matrix::new(x, k), Matrix::new(w, k).t(), t, n, k, 1.0, false);
        matmul(z, Matrix::new(xa, r), Matrix::new(b, r).t(), t, n, r, lora.scaling, true);
        let (dy, z, inverse) = (&dy[..t * n], &*z, &*inverse);
        grad.par_chunks_mut(COLUMNS).enumerate().for_each(|(part, grad)| {
            let (from, mut sums) = (part * COLUMNS, [0f32; COLUMNS]);
            for (dy, z) in dy.chunks_exact(n).zip(z.chunks_exact(n)) {
                for (i, sum) in sums[..grad.len()].iter_mut().enumerate() {
                    *sum += dy[from + i] * z[from + i];
                }
            }
            for (i, grad) in grad.iter_mut().enumerate() {
                *grad += inverse[from + i] * sums[i];
            }
        });
        g
    }

    fn drops(&self, lora: &Lora) -> bool {
        self.state.training && lora.dropout > 0.0
    }

    /// The input with LoRA dropout applied, in `space`; the input itself when there is none.
    fn dropped<'a>(&self, lora: &Lora, x: &'a [f32], space: &'a mut [f32]) -> &'a [f32] {
        if !self.drops(lora) {
            return x;
        }
        let out = &mut space[..x.len()];
        out.copy_from_slice(x);
        dropout(out, lora.dropout, self.state.dropout_seed, self.state.micro_step, lora.module);
        out
    }

    /// The dense weight, or what the product has dequantized into `space`.
    fn weight_in<'a>(&'a self, m: &LinearIds, space: &'a [f32]) -> &'a [f32] {
        match m.weight {
            // SAFETY: weights are only read.
            Weight::Dense { w } => unsafe { self.slice::<f32>(w) },
            Weight::Nf4 { .. } => &space[..m.out_features * m.in_features],
        }
    }

    /// The lengths of the rows of a base weight: DoRA's magnitudes before training.
    pub(super) fn lengths(&self, m: &LinearIds) -> Vec<f32> {
        let mut space =
            vec![0f32; if matches!(m.weight, Weight::Nf4 { .. }) { m.out_features * m.in_features } else { 0 }];
        let w = self.base_weight(m, &mut space);
        w.par_chunks(m.in_features).map(|row| dot(row, row).sqrt()).collect()
    }

    /// From row to row of what [`CpuOps::base_weight`] gives: a decoded weight may have columns beside it.
    fn weight_row(&self, m: &LinearIds) -> usize {
        match m.weight {
            Weight::Dense { w } => self.width(w),
            Weight::Nf4 { .. } => m.in_features,
        }
    }

    /// `[out, in]`: the dense weight, or the 4-bit one dequantized into `space`.
    fn base_weight<'a>(&'a self, m: &LinearIds, space: &'a mut [f32]) -> &'a [f32] {
        match m.weight {
            // SAFETY: weights are only read.
            Weight::Dense { w } => unsafe { self.slice::<f32>(w) },
            Weight::Nf4 { .. } => {
                let out = &mut space[..m.out_features * m.in_features];
                self.decode(m.weight, out);
                out
            }
        }
    }

    /// A 4-bit weight as f32, with the scaled B beside it where that is asked for.
    pub(super) fn decode_rows(&self, op: &Dequantize) {
        // SAFETY: regions of one operation.
        let out: &mut [f32] = unsafe { self.slice(op.out) };
        let (k, row) = (op.in_features, self.width(op.out));
        if row == k {
            return self.decode(op.weight, out);
        }
        let mut dense = vec![0f32; out.len() / row * k];
        self.decode(op.weight, &mut dense);
        for (out, w) in out.chunks_exact_mut(row).zip(dense.chunks_exact(k)) {
            out[..k].copy_from_slice(w);
        }
        if let Some(lora) = op.lora {
            self.beside_rows(&LoraB { lora, in_features: k, out: op.out });
        }
    }

    /// The scaled B beside a weight.
    pub(super) fn beside_rows(&self, op: &LoraB) {
        let (k, row, Beside { lora, first }) = (op.in_features, self.width(op.out), op.lora);
        // SAFETY: regions of one operation; B is only read.
        let (out, b) = unsafe { (self.slice::<f32>(op.out), self.slice::<f32>(lora.b)) };
        for (out, b) in out.chunks_exact_mut(row).zip(b.chunks_exact(lora.r)) {
            out[k..op.lora.end()].fill(0.0);
            out[first..].iter_mut().zip(b).for_each(|(o, b)| *o = lora.scaling * b);
        }
    }

    /// A 4-bit weight as f32.
    fn decode(&self, weight: Weight, out: &mut [f32]) {
        let Weight::Nf4 { packed, absmax, nested, config } = weight else { return };
        // SAFETY: weights are only read.
        unsafe {
            let scales = match nested {
                None => AbsmaxRef::F32(self.slice::<f32>(absmax)),
                Some(n) => AbsmaxRef::Nested {
                    codes: self.slice::<u8>(absmax),
                    absmax: self.slice::<f32>(n.absmax),
                    offset: self.slice::<f32>(n.offset)[0],
                    blocksize: config.nested_blocksize,
                },
            };
            dequantize_into(self.slice::<u8>(packed), scales, config.quant_type, config.blocksize, out);
        }
    }
}

/// Rows of `W + scaling * B A` that are made at a time, for their lengths.
pub(crate) const DORA_ROWS: usize = 64;

/// Elements of scratch that DoRA takes in the forward pass (inverse lengths and a tile of rows) or, with two activations more, in
/// the backward pass of `rows` tokens.
pub(crate) fn dora_len(m: &LinearIds, rows: usize, backward: bool) -> usize {
    if m.lora.is_none_or(|l| l.magnitude.is_none()) {
        return 0;
    }
    let (n, k) = (m.out_features, m.in_features);
    let activations = if backward { 2 * (rows * n).next_multiple_of(16) } else { 0 };
    activations + n.next_multiple_of(16) + (DORA_ROWS.min(n) * k).next_multiple_of(16)
}

/// Elements of scratch that the dequantized weight takes, as `plan::scratch_bytes` counts it.
fn dequantized_len(m: &LinearIds, product: bool) -> usize {
    match m.weight {
        Weight::Nf4 { .. } if product => (m.out_features * m.in_features * 4).next_multiple_of(64) / 4,
        _ => 0,
    }
}
