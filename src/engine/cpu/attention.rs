//! Causal attention in tiles, with a running softmax (arXiv 2205.14135): the score matrix is never held.

use rayon::prelude::*;

use super::CpuOps;
use super::math::{exp_sum, max, scale, soft_cap};
use super::matmul::{Matrix, tile_product};
use super::rotary::MAX_HEAD_DIM;
use crate::engine::ops::{Attention, CachedAttention, Heads, Score};

/// Queries and keys of a tile.
pub(super) const TILE: usize = 64;

/// A tile of scores.
pub(super) type Scores = [f32; TILE * TILE];

/// Rows of one head: `row` elements apart, `dim` wide.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub dim: usize,
}

impl HeadRows<'_> {
    /// The matrix of rows from `first` on.
    pub(super) fn from(&self, first: usize) -> (*const f32, Matrix) {
        let m = Matrix::strided(self.data, self.row);
        (self.data.as_ptr().wrapping_add(first * self.row), m)
    }
}

/// One example: where its rows are.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub start: usize,
    pub len: usize,
}

/// The first key that a query at `position` sees.
pub(super) fn first_key(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |w| (position + 1).saturating_sub(w))
}

/// `scores = scale * q k^T` for `rows` queries from `q_first` and `cols` keys from `k_first`, masked causally (and by
/// the window) with -inf; products become scores as `score` says. Query row i stands at position `q_first + i + shift`.
#[allow(clippy::too_many_arguments)]
pub(super) fn masked_scores(
    scores: &mut Scores,
    q: HeadRows<'_>,
    k: HeadRows<'_>,
    (q_first, rows): (usize, usize),
    (k_first, cols): (usize, usize),
    shift: usize,
    score: Score,
    window: Option<usize>,
) {
    let ((qs, qm), (ks, km)) = (q.from(q_first), k.from(k_first));
    // SAFETY: rows and columns lie inside the heads; the tile is TILE x TILE.
    unsafe { tile_product(scores.as_mut_ptr(), TILE, qs, qm, ks, km.t(), rows, cols, q.dim, score.scale, false) };
    for i in 0..rows {
        let position = q_first + i + shift;
        let (from, to) = (first_key(position, window), position + 1);
        let row = &mut scores[i * TILE..][..cols];
        if let Some(cap) = score.softcap {
            soft_cap(row, cap);
        }
        for (j, s) in row.iter_mut().enumerate() {
            let key = k_first + j;
            if key < from || key >= to {
                *s = f32::NEG_INFINITY;
            }
        }
    }
}

impl CpuOps {
    pub(super) fn attend(&self, op: &Attention) {
        // SAFETY: regions of one operation.
        let (q, k, v, out, lse) =
            unsafe { (self.rows(op.q), self.rows(op.k), self.rows(op.v), self.rows(op.out), self.rows(op.lse)) };
        let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
        let heads = op.heads;
        Tiles::new(&self.cu_seqlens).for_each(heads.q, |span, h, first| {
            let kv = h / (heads.q / heads.kv);
            let (q, k, v) = (
                head(q, span, h, heads.q, heads.dim),
                head(k, span, kv, heads.kv, heads.dim),
                head(v, span, kv, heads.kv, heads.dim),
            );
            let rows = TILE.min(span.len - first);
            let mut acc = [0f32; TILE * MAX_HEAD_DIM];
            let sums = attend_tile(&mut acc, q, k, v, (first, rows), 0, heads, op.score);
            for (i, sum) in sums.iter().enumerate().take(rows) {
                let t = span.start + first + i;
                // SAFETY: each task writes the rows of its own queries and head.
                unsafe {
                    *lse.at(t * heads.q + h) = *sum;
                    let to = std::slice::from_raw_parts_mut(out.at((t * heads.q + h) * heads.dim), heads.dim);
                    to.copy_from_slice(&acc[i * heads.dim..][..heads.dim]);
                }
            }
        });
    }

    pub(super) fn attend_cached(&self, op: &CachedAttention) {
        // SAFETY: regions of one operation.
        let (q, k, v, out) = unsafe { (self.rows(op.q), self.rows(op.k), self.rows(op.v), self.rows(op.out)) };
        // SAFETY: as above.
        let (k_cache, v_cache, positions) =
            unsafe { (self.slice::<f32>(op.k_cache), self.slice::<f32>(op.v_cache), self.slice::<u32>(op.positions)) };
        let (heads, base) = (op.heads, positions[0] as usize);
        let width = heads.kv * heads.dim;
        k_cache[base * width..][..k.len()].copy_from_slice(k);
        v_cache[base * width..][..v.len()].copy_from_slice(v);
        let out = Shared(out.as_mut_ptr());
        let cached = Span { start: 0, len: base + self.tokens };
        let (k_cache, v_cache) = (&*k_cache, &*v_cache);
        Tiles::new(&[0, self.tokens as u32]).for_each(heads.q, |span, h, first| {
            let kv = h / (heads.q / heads.kv);
            let q = head(q, span, h, heads.q, heads.dim);
            let (k, v) =
                (head(k_cache, cached, kv, heads.kv, heads.dim), head(v_cache, cached, kv, heads.kv, heads.dim));
            let rows = TILE.min(span.len - first);
            let mut acc = [0f32; TILE * MAX_HEAD_DIM];
            attend_tile(&mut acc, q, k, v, (first, rows), base, heads, op.score);
            for i in 0..rows {
                // SAFETY: each task writes the rows of its own queries and head.
                let to = unsafe {
                    std::slice::from_raw_parts_mut(out.at(((first + i) * heads.q + h) * heads.dim), heads.dim)
                };
                to.copy_from_slice(&acc[i * heads.dim..][..heads.dim]);
            }
        });
    }
}

/// Softmax(q k^T) v for a tile of queries, into `acc` `[rows, D]`; the log of each row's sum of exponentials.
#[allow(clippy::too_many_arguments)]
fn attend_tile(
    acc: &mut [f32; TILE * MAX_HEAD_DIM],
    q: HeadRows<'_>,
    k: HeadRows<'_>,
    v: HeadRows<'_>,
    (first, rows): (usize, usize),
    shift: usize,
    heads: Heads,
    score: Score,
) -> [f32; TILE] {
    let d = heads.dim;
    let mut scores: Scores = [0.0; TILE * TILE];
    let (mut top, mut sum) = ([f32::NEG_INFINITY; TILE], [0f32; TILE]);
    let end = first + shift + rows;
    let mut key = first_key(first + shift, heads.window) / TILE * TILE;
    while key < end {
        let cols = TILE.min(end - key);
        masked_scores(&mut scores, q, k, (first, rows), (key, cols), shift, score, heads.window);
        for i in 0..rows {
            let row = &mut scores[i * TILE..][..cols];
            let largest = max(row).max(top[i]);
            if largest == f32::NEG_INFINITY {
                // Nothing of this tile is visible yet.
                row.fill(0.0);
                continue;
            }
            let shrink = (top[i] - largest).exp();
            sum[i] = sum[i] * shrink + exp_sum(row, largest);
            if shrink != 1.0 {
                scale(&mut acc[i * d..][..d], shrink);
            }
            top[i] = largest;
        }
        let (vs, vm) = v.from(key);
        let p = Matrix::strided(&scores, TILE);
        // SAFETY: acc holds rows x d, scores rows x cols, v cols x d.
        unsafe { tile_product(acc.as_mut_ptr(), d, scores.as_ptr(), p, vs, vm, rows, d, cols, 1.0, true) };
        key += cols;
    }
    for i in 0..rows {
        scale(&mut acc[i * d..][..d], 1.0 / sum[i]);
        sum[i] = top[i] + sum[i].ln();
    }
    sum
}

/// The rows of head `h` of `heads` in a span.
pub(super) fn head(data: &[f32], span: Span, h: usize, heads: usize, dim: usize) -> HeadRows<'_> {
    HeadRows { data: &data[(span.start * heads + h) * dim..], row: heads * dim, dim }
}

/// The tiles that a batch is cut into: the example and the first row of each, the longest rows of an example first.
pub(super) struct Tiles(Vec<(Span, usize)>);

/// Bytes of [`Tiles`] for at most `tokens` tokens: at worst each is an example of its own.
pub(super) const fn tiles_bytes(tokens: usize) -> usize {
    tokens * size_of::<(Span, usize)>()
}

impl Tiles {
    pub(super) fn new(cu_seqlens: &[u32]) -> Self {
        let spans = || cu_seqlens.windows(2).map(|w| Span { start: w[0] as usize, len: (w[1] - w[0]) as usize });
        let mut list = Vec::with_capacity(spans().map(|s| s.len.div_ceil(TILE)).sum());
        for span in spans() {
            list.extend((0..span.len).step_by(TILE).rev().map(|first| (span, first)));
        }
        Tiles(list)
    }

    /// Runs a task for each tile of each head, given the example, the head and the first row.
    pub(super) fn for_each(&self, heads: usize, task: impl Fn(Span, usize, usize) + Sync) {
        let n = self.0.len();
        (0..n * heads).into_par_iter().with_max_len(1).for_each(|i| {
            let (span, first) = self.0[i % n];
            task(span, i / n, first);
        });
    }
}

/// A result that tasks write at disjoint places.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub *mut f32);
// SAFETY: tasks write disjoint elements.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn at(self, i: usize) -> *mut f32 {
        self.0.wrapping_add(i)
    }
}
