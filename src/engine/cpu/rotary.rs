//! Rotary position embedding, half-split form (arXiv 2104.09864; transformers `rotate_half`).

use rayon::prelude::*;

use super::CpuOps;
use crate::engine::ops::Rotary;

/// The widest head.
pub(crate) const MAX_HEAD_DIM: usize = 256;

impl CpuOps {
    pub(super) fn rotate(&self, op: &Rotary) {
        // SAFETY: regions of one operation.
        let (q, k, positions, inv_freq) = unsafe {
            (self.rows(op.q), self.rows(op.k), self.slice::<u32>(op.positions), self.slice::<f32>(op.inv_freq))
        };
        let d = op.heads.dim;
        let row = if self.state.long_text { d / 2 } else { 0 };
        let inv_freq = &inv_freq[row..][..d / 2];
        let sign = if op.inverse { -1.0 } else { 1.0 };
        q.par_chunks_mut(op.heads.q * d)
            .zip(k.par_chunks_mut(op.heads.kv * d))
            .zip(&positions[..self.tokens])
            .for_each(|((q, k), &position)| {
                let mut table = [(0f32, 0f32); MAX_HEAD_DIM / 2];
                for (t, f) in table.iter_mut().zip(inv_freq) {
                    let (sin, cos) = (position as f32 * f).sin_cos();
                    *t = (sin * sign * op.scale, cos * op.scale);
                }
                q.chunks_exact_mut(d).chain(k.chunks_exact_mut(d)).for_each(|head| rotate_head(head, &table));
            });
    }
}

/// `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`.
fn rotate_head(head: &mut [f32], table: &[(f32, f32)]) {
    let (first, second) = head.split_at_mut(head.len() / 2);
    for ((a, b), (sin, cos)) in first.iter_mut().zip(second).zip(table) {
        let (x, y) = (*a, *b);
        *a = x * cos - y * sin;
        *b = y * cos + x * sin;
    }
}
