//! Rows of the embedding table, and their gradient.

use rayon::prelude::*;

use super::CpuOps;
use super::math::scale;
use crate::engine::ops::{Embedding, EmbeddingBackward};

/// Columns of the gradient that one task owns: it adds all tokens to them, in order.
const COLUMNS: usize = 64;

impl CpuOps {
    pub(super) fn embed(&self, op: &Embedding) {
        let width = self.region(op.table).shape[1];
        // SAFETY: three regions of one operation.
        let (table, tokens, out) =
            unsafe { (self.slice::<f32>(op.table), self.slice::<u32>(op.tokens), self.rows(op.out)) };
        out.par_chunks_mut(width).zip(&tokens[..self.tokens]).for_each(|(row, &token)| {
            row.copy_from_slice(&table[token as usize * width..][..width]);
            if op.scale != 1.0 {
                scale(row, op.scale);
            }
        });
    }

    pub(super) fn embed_backward(&self, op: &EmbeddingBackward) {
        let width = self.region(op.grad).shape[1];
        // SAFETY: three regions of one operation.
        let (tokens, dout, grad) =
            unsafe { (self.slice::<u32>(op.tokens), self.rows(op.dout), self.slice::<f32>(op.grad)) };
        let tokens = &tokens[..self.tokens];
        let start = grad.as_mut_ptr() as usize;
        (0..width.div_ceil(COLUMNS)).into_par_iter().for_each(|part| {
            let from = part * COLUMNS;
            let n = COLUMNS.min(width - from);
            for (row, &token) in dout.chunks_exact(width).zip(tokens) {
                // SAFETY: inside `grad`, whose columns from..from + n belong to this task.
                let target = unsafe {
                    std::slice::from_raw_parts_mut((start as *mut f32).add(token as usize * width + from), n)
                };
                for (t, d) in target.iter_mut().zip(&row[from..]) {
                    *t += op.scale * d;
                }
            }
        });
    }
}
