//! Columns of a matrix as tensors of their own, and back.

use rayon::prelude::*;

use super::CpuOps;
use crate::engine::ops::{JoinColumns, SplitColumns, TensorId};

impl CpuOps {
    pub(super) fn split(&self, op: &SplitColumns) {
        self.parts(op.whole, &op.parts, |whole, part| part.copy_from_slice(whole));
    }

    pub(super) fn join(&self, op: &JoinColumns) {
        self.parts(op.whole, &op.parts, |whole, part| whole.copy_from_slice(part));
    }

    /// Hands each row of each part over with its place in the whole.
    fn parts(&self, whole: TensorId, parts: &[TensorId], copy: impl Fn(&mut [f32], &mut [f32]) + Sync) {
        let width = |id: TensorId| self.region(id).numel() / self.region(id).shape[0];
        let mut first = 0;
        for &part in parts {
            let n = width(part);
            // SAFETY: two regions of one operation; one part at a time.
            let (all, rows) = unsafe { (self.rows(whole), self.rows(part)) };
            all.par_chunks_mut(width(whole))
                .zip(rows.par_chunks_mut(n))
                .for_each(|(whole, part)| copy(&mut whole[first..first + n], part));
            first += n;
        }
    }
}
