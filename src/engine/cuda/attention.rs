//! Causal attention: tiles on the matrix units in bf16 for the usual head sizes, the plain kernels for everything else.

use super::{Arg, CudaOps, Launch};
use crate::Result;
use crate::engine::ops::{Attention, AttentionBackward, CachedAttention, Heads, Score, Scratch};

/// Rows of a tile, and threads of a block that works on one.
const TILE: usize = 64;
const TILE_THREADS: u32 = 128;

/// The kernels of compute capability 9.0 for one head size; see kernels/cuda/attention_hopper.cu.
struct Hopper {
    forward: &'static str,
    keys: &'static str,
    queries: &'static str,
    /// Dynamic shared memory in bytes: two tiles of keys and two of values; the own two, two of each streamed, and two
    /// times 64 rows' statistics.
    forward_shared: u32,
    backward_shared: u32,
}

impl Hopper {
    fn new(dim: usize) -> Option<Hopper> {
        let tile = (TILE * dim * 2) as u32;
        (dim == 128).then_some(Hopper {
            forward: "attention_hopper_128",
            keys: "attention_backward_keys_hopper_128",
            queries: "attention_backward_queries_hopper_128",
            forward_shared: 4 * tile,
            backward_shared: 6 * tile + 2 * 2 * 64 * 4,
        })
    }
}

/// Rows of a block of the plain kernels: its warps.
const PLAIN_ROWS: usize = 4;

/// New tokens from which on the tiled kernel reads the cache: with fewer most of a tile would be empty.
const CACHED_TILE_MIN: usize = 16;

/// The tiled kernels of one head size.
struct Tiled {
    forward: &'static str,
    cached: &'static str,
    keys: &'static str,
    queries: &'static str,
    /// Dynamic shared memory in bytes.
    forward_shared: u32,
    backward_shared: u32,
}

macro_rules! names {
    ($dim:literal) => {
        [
            concat!("attention_", $dim),
            concat!("cached_attention_", $dim),
            concat!("attention_backward_keys_", $dim),
            concat!("attention_backward_queries_", $dim),
        ]
    };
}

impl Tiled {
    fn new(dim: usize) -> Option<Tiled> {
        let [forward, cached, keys, queries] = match dim {
            64 => names!(64),
            80 => names!(80),
            96 => names!(96),
            128 => names!(128),
            256 => names!(256),
            _ => return None,
        };
        // Rows of bf16, padded by 16 bytes. Forward: keys, values and, for wide heads, queries. Backward: two tiles of a
        // block's own rows, two (one twice) that are streamed; for wide heads half tiles, none twice.
        let row = 2 * (dim + 8);
        let (forward_rows, backward_rows) = if dim <= 128 { (2 * TILE, 5 * TILE) } else { (3 * TILE, 3 * TILE) };
        let (forward_shared, backward_shared) = ((forward_rows * row) as u32, (backward_rows * row) as u32);
        Some(Tiled { forward, cached, keys, queries, forward_shared, backward_shared })
    }
}

impl CudaOps {
    /// The tiled kernels, where they can run.
    fn tiled(&self, heads: Heads, score: Score) -> Option<Tiled> {
        let tiled = if self.is_bf16() && !self.plain_attention && score.is_plain(heads.dim) {
            Tiled::new(heads.dim)
        } else {
            None
        };
        tiled.filter(|t| t.forward_shared.max(t.backward_shared) <= self.gpu.shared_limit)
    }

    /// The kernels of the card's own instructions, where it has them.
    fn hopper(&self, heads: Heads, score: Score) -> Option<Hopper> {
        let ordinary = score.is_plain(heads.dim);
        let usable = ordinary && self.is_bf16() && !self.plain_attention && self.gpu.capability == (9, 0);
        if usable { Hopper::new(heads.dim) } else { None }
    }

    /// Blocks for tiles of `rows` rows of each example, for each of `heads` heads.
    fn attention_grid(&self, rows: usize, heads: usize) -> [u32; 3] {
        let longest = self.cu_seqlens.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0) as usize;
        [longest.div_ceil(rows) as u32, heads as u32, self.cu_seqlens.len().saturating_sub(1) as u32]
    }

    pub(super) fn attend(&self, op: &Attention) -> Result<()> {
        let heads = op.heads;
        let [q, k, v, out] = [op.q, op.k, op.v, op.out].map(|id| Arg::Ptr(self.ptr(id)));
        let [lse, cu_seqlens] = [op.lse, op.cu_seqlens].map(|id| Arg::Ptr(self.ptr(id)));
        let [n, n_kv, dim, window] = head_args(heads);
        if let Some(hopper) = self.hopper(heads, op.score) {
            let grid = self.attention_grid(TILE, heads.q);
            let how = Launch { grid, block: TILE_THREADS, shared: hopper.forward_shared };
            let args = [q, k, v, out, lse, cu_seqlens, n, n_kv, window];
            return self.gpu.launch("attention_hopper", hopper.forward, how, &args);
        }
        let [scale, cap] = score_args(op.score);
        if let Some(tiled) = self.tiled(heads, op.score) {
            let grid = self.attention_grid(TILE, heads.q);
            let how = Launch { grid, block: TILE_THREADS, shared: tiled.forward_shared };
            let args = [q, k, v, out, lse, cu_seqlens, n, n_kv, window];
            return self.gpu.launch("attention", tiled.forward, how, &args);
        }
        let how = Launch { grid: self.attention_grid(PLAIN_ROWS, heads.q), block: 128, shared: 0 };
        let args = [q, k, v, out, lse, cu_seqlens, n, n_kv, dim, window, scale, cap];
        self.gpu.launch("attention_plain", "attention_plain", how, &args)
    }

    /// Scratch: f32 `[T, H]`, the sums of `dout * out`.
    pub(super) fn attend_backward(&self, op: &AttentionBackward, scratch: Scratch) -> Result<()> {
        let heads = op.heads;
        let [q, k, v, out] = [op.q, op.k, op.v, op.out].map(|id| Arg::Ptr(self.ptr(id)));
        let [lse, cu_seqlens] = [op.lse, op.cu_seqlens].map(|id| Arg::Ptr(self.ptr(id)));
        let [dout, dq, dk, dv] = [op.dout, op.dq, op.dk, op.dv].map(|id| Arg::Ptr(self.ptr(id)));
        let delta = Arg::Ptr(self.at(scratch));
        let [n, n_kv, dim, window] = head_args(heads);
        let [scale, cap] = score_args(op.score);

        let rows = self.tokens * heads.q;
        let how = Launch { grid: [rows.div_ceil(8) as u32, 1, 1], block: 256, shared: 0 };
        let args = [out, dout, delta, Arg::U64(rows as u64), dim];
        self.gpu.launch("attention_backward", "attention_delta", how, &args)?;

        if let Some(hopper) = self.hopper(heads, op.score) {
            let how =
                |n| Launch { grid: self.attention_grid(TILE, n), block: TILE_THREADS, shared: hopper.backward_shared };
            let args = [q, k, v, dout, lse, delta, dk, dv, cu_seqlens, n, n_kv, window];
            self.gpu.launch("attention_backward_hopper", hopper.keys, how(heads.kv), &args)?;
            let args = [q, k, v, dout, lse, delta, dq, cu_seqlens, n, n_kv, window];
            return self.gpu.launch("attention_backward_hopper", hopper.queries, how(heads.q), &args);
        }
        if let Some(tiled) = self.tiled(heads, op.score) {
            let how =
                |n| Launch { grid: self.attention_grid(TILE, n), block: TILE_THREADS, shared: tiled.backward_shared };
            let args = [q, k, v, dout, lse, delta, dk, dv, cu_seqlens, n, n_kv, window];
            self.gpu.launch("attention_backward", tiled.keys, how(heads.kv), &args)?;
            let args = [q, k, v, dout, lse, delta, dq, cu_seqlens, n, n_kv, window];
            return self.gpu.launch("attention_backward", tiled.queries, how(heads.q), &args);
        }
        let how = |n| Launch { grid: self.attention_grid(PLAIN_ROWS, n), block: 128, shared: 0 };
        let args = [q, k, v, dout, lse, delta, dk, dv, cu_seqlens, n, n_kv, dim, window, scale, cap];
        self.gpu.launch("attention_plain", "attention_plain_keys", how(heads.kv), &args)?;
        let args = [q, k, v, dout, lse, delta, dq, cu_seqlens, n, n_kv, dim, window, scale, cap];
        self.gpu.launch("attention_plain", "attention_plain_queries", how(heads.q), &args)
    }

    pub(super) fn attend_cached(&self, op: &CachedAttention) -> Result<()> {
        let heads = op.heads;
        let [q, k, v, out] = [op.q, op.k, op.v, op.out].map(|id| Arg::Ptr(self.ptr(id)));
        let [k_cache, v_cache, positions] = [op.k_cache, op.v_cache, op.positions].map(|id| Arg::Ptr(self.ptr(id)));
        let [n, n_kv, dim, window] = head_args(heads);
        let [scale, cap] = score_args(op.score);
        let (tokens, width) = (self.tokens as u32, heads.kv * heads.dim);
        let how = Launch { grid: [width.div_ceil(256) as u32, tokens, 1], block: 256, shared: 0 };
        let args = [k, v, k_cache, v_cache, positions, Arg::U32(width as u32)];
        self.gpu.launch("cached_attention", "cache_append", how, &args)?;
        if let Some(tiled) = self.tiled(heads, op.score).filter(|_| self.tokens >= CACHED_TILE_MIN) {
            let grid = [tokens.div_ceil(TILE as u32), heads.q as u32, 1];
            let how = Launch { grid, block: TILE_THREADS, shared: tiled.forward_shared };
            let before = Arg::U32(self.first_position);
            let args = [q, k_cache, v_cache, out, Arg::U32(tokens), before, n, n_kv, window];
            return self.gpu.launch("attention", tiled.cached, how, &args);
        }
        let how = Launch { grid: [heads.q as u32, tokens, 1], block: 512, shared: 0 };
        let args = [q, k_cache, v_cache, out, positions, n, n_kv, dim, window, scale, cap];
        self.gpu.launch("cached_attention", "cached_attention", how, &args)
    }
}

/// The factor of the products and the soft cap (0: none), as the plain kernels take them.
fn score_args(score: Score) -> [Arg; 2] {
    [Arg::F32(score.scale), Arg::F32(score.softcap.unwrap_or(0.0))]
}

/// H, K, D and the window (0: none), as the kernels take them.
fn head_args(heads: Heads) -> [Arg; 4] {
    [heads.q, heads.kv, heads.dim, heads.window.unwrap_or(0)].map(|x| Arg::U32(x as u32))
}
