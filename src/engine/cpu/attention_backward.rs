//! Gradients of attention: scores are made again from the saved log-sums, tile by tile.
//!
//! Two passes, so that every sum has one owner and a fixed order: one task per tile of keys for dK and dV, one per tile
//! of queries for dQ.

use rayon::prelude::*;

use super::CpuOps;
use super::attention::{HeadRows, Scores, Shared, Span, TILE, Tiles, first_key, head, masked_scores};
use super::math::{dot, exp, vectorised};
use super::matmul::{Matrix, tile_product};
use super::rotary::MAX_HEAD_DIM;
use crate::engine::ops::{AttentionBackward, Heads, Score, Scratch};

/// What both passes read.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    dout: &'a [f32],
    lse: &'a [f32],
    delta: &'a [f32],
    heads: Heads,
    score: Score,
}

vectorised! {
    /// Scores become probabilities; products with V become gradients of the scaled scores.
    fn score_grad_row(p: &mut [f32], ds: &mut [f32], lse: f32, delta: f32, factor: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp(*p - lse);
            *ds = *p * (*ds - delta) * factor;
        }
    }
}

vectorised! {
    /// As [`score_grad_row`], through the soft cap: its slope is `1 - (score / cap)^2`.
    fn capped_grad_row(p: &mut [f32], ds: &mut [f32], lse: f32, delta: f32, factor: f32, cap: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            let share = *p / cap;
            *p = exp(*p - lse);
            // What is masked has a score of -inf and no share in the gradient.
            let slope = if *p > 0.0 { 1.0 - share * share } else { 0.0 };
            *ds = *p * (*ds - delta) * factor * slope;
        }
    }
}

impl CpuOps {
    pub(super) fn attend_backward(&self, op: &AttentionBackward, scratch: Scratch) {
        // SAFETY: regions of one operation.
        let (q, k, v, out, lse, dout) = unsafe {
            (
                self.rows(op.q),
                self.rows(op.k),
                self.rows(op.v),
                self.rows(op.out),
                self.rows(op.lse),
                self.rows(op.dout),
            )
        };
        // SAFETY: as above.
        let (dq, dk, dv, delta) =
            unsafe { (self.rows(op.dq), self.rows(op.dk), self.rows(op.dv), self.scratch(scratch)) };
        let heads = op.heads;
        let delta = &mut delta[..self.tokens * heads.q];
        delta
            .par_iter_mut()
            .with_min_len(64)
            .zip(out.par_chunks(heads.dim))
            .zip(dout.par_chunks(heads.dim))
            .for_each(|((delta, o), g)| *delta = dot(o, g));
        let inputs = Inputs { q, k, v, dout, lse, delta, heads, score: op.score };
        let tiles = Tiles::new(&self.cu_seqlens);
        let (dq, dk, dv) = (Shared(dq.as_mut_ptr()), Shared(dk.as_mut_ptr()), Shared(dv.as_mut_ptr()));
        tiles.for_each(heads.kv, |span, h, first| inputs.keys(span, h, first, dk, dv));
        tiles.for_each(heads.q, |span, h, first| inputs.queries(span, h, first, dq));
    }
}

impl<'a> Inputs<'a> {
    fn query_head(&self, span: Span, h: usize) -> (HeadRows<'a>, HeadRows<'a>) {
        let Heads { q: n, dim, .. } = self.heads;
        (head(self.q, span, h, n, dim), head(self.dout, span, h, n, dim))
    }

    fn key_head(&self, span: Span, h: usize) -> (HeadRows<'a>, HeadRows<'a>) {
        let Heads { kv: n, dim, .. } = self.heads;
        (head(self.k, span, h, n, dim), head(self.v, span, h, n, dim))
    }

    /// Probabilities `p` and score gradients `ds` of one tile for query head `h`.
    #[allow(clippy::too_many_arguments)]
    fn tile(
        &self,
        p: &mut Scores,
        ds: &mut Scores,
        span: Span,
        h: usize,
        queries: (usize, usize),
        keys: (usize, usize),
    ) {
        let heads = self.heads;
        let kv = h / (heads.q / heads.kv);
        let ((q, dout), (k, v)) = (self.query_head(span, h), self.key_head(span, kv));
        let Score { scale, softcap } = self.score;
        masked_scores(p, q, k, queries, keys, 0, self.score, heads.window);
        let ((gs, gm), (vs, vm)) = (dout.from(queries.0), v.from(keys.0));
        // SAFETY: a tile of rows x cols products over the head size.
        unsafe { tile_product(ds.as_mut_ptr(), TILE, gs, gm, vs, vm.t(), queries.1, keys.1, heads.dim, 1.0, false) };
        for i in 0..queries.1 {
            let t = (span.start + queries.0 + i) * heads.q + h;
            let (lse, delta) = (self.lse[t], self.delta[t]);
            let row = i * TILE..i * TILE + keys.1;
            match softcap {
                None => score_grad_row(&mut p[row.clone()], &mut ds[row], lse, delta, scale),
                Some(cap) => capped_grad_row(&mut p[row.clone()], &mut ds[row], lse, delta, scale, cap),
            }
        }
    }

    /// dK and dV of a tile of keys: all query heads of the group, all later queries, in order.
    fn keys(&self, span: Span, kv: usize, first: usize, dk: Shared, dv: Shared) {
        let Heads { q: n, kv: n_kv, dim: d, window } = self.heads;
        let cols = TILE.min(span.len - first);
        let (mut p, mut ds): (Scores, Scores) = ([0.0; TILE * TILE], [0.0; TILE * TILE]);
        let mut acc = [[0f32; TILE * MAX_HEAD_DIM]; 2];
        let group = n / n_kv;
        // The last query that sees any key of the tile.
        let end = window.map_or(span.len, |w| (first + cols - 1 + w).min(span.len));
        for h in kv * group..(kv + 1) * group {
            let (q, dout) = self.query_head(span, h);
            let mut query = first;
            while query < end {
                let rows = TILE.min(span.len - query);
                self.tile(&mut p, &mut ds, span, h, (query, rows), (first, cols));
                let ((qs, qm), (gs, gm)) = (q.from(query), dout.from(query));
                let (pm, dsm) = (Matrix::strided(&p, TILE).t(), Matrix::strided(&ds, TILE).t());
                let [dk, dv] = &mut acc;
                // SAFETY: the accumulators hold cols x d, the tiles rows x cols, q and dout rows x d.
                unsafe {
                    tile_product(dv.as_mut_ptr(), d, p.as_ptr(), pm, gs, gm, cols, d, rows, 1.0, true);
                    tile_product(dk.as_mut_ptr(), d, ds.as_ptr(), dsm, qs, qm, cols, d, rows, 1.0, true);
                }
                query += rows;
            }
        }
        for (acc, to) in acc.iter().zip([dk, dv]) {
            write_rows(to, acc, span.start + first, cols, kv, n_kv, d);
        }
    }

    /// dQ of a tile of queries: all keys that they see, in order.
    fn queries(&self, span: Span, h: usize, first: usize, dq: Shared) {
        let Heads { q: n, kv: n_kv, dim: d, window } = self.heads;
        let rows = TILE.min(span.len - first);
        let (k, _) = self.key_head(span, h / (n / n_kv));
        let (mut p, mut ds): (Scores, Scores) = ([0.0; TILE * TILE], [0.0; TILE * TILE]);
        let mut acc = [0f32; TILE * MAX_HEAD_DIM];
        let mut key = first_key(first, window) / TILE * TILE;
        while key < first + rows {
            let cols = TILE.min(first + rows - key);
            self.tile(&mut p, &mut ds, span, h, (first, rows), (key, cols));
            let (ks, km) = k.from(key);
            let dsm = Matrix::strided(&ds, TILE);
            // SAFETY: the accumulator holds rows x d, the tile rows x cols, k cols x d.
            unsafe { tile_product(acc.as_mut_ptr(), d, ds.as_ptr(), dsm, ks, km, rows, d, cols, 1.0, true) };
            key += cols;
        }
        write_rows(dq, &acc, span.start + first, rows, h, n, d);
    }
}

/// Writes `rows` rows of one head from token `t` on.
fn write_rows(to: Shared, from: &[f32], t: usize, rows: usize, h: usize, heads: usize, d: usize) {
    for i in 0..rows {
        // SAFETY: each task writes the rows of its own tile and head.
        let out = unsafe { std::slice::from_raw_parts_mut(to.at(((t + i) * heads + h) * d), d) };
        out.copy_from_slice(&from[i * d..][..d]);
    }
}
