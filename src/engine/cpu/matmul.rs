//! Matrix products, cut into tiles that depend on the shapes alone.

use rayon::prelude::*;

fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Columns of the result in a tile: register tiles of the `gemm` crate's kernel, one of 64 with AVX-512 or two of 24 with
/// AVX2. With more it may copy both operands instead of one; these are as fast.
fn tile_cols() -> usize {
    if has_avx512() { 64 } else { 48 }
}

/// The longest stretch of a product's inner dimension that is taken at a time.
fn depth() -> usize {
    if has_avx512() { 512 } else { 256 }
}

/// Bytes that one thread allocates at most while it computes a tile: the operands that `gemm` copies in order. With AVX-512
/// that is one; elsewhere the sizes of the caches decide, and it may be both, rows in register tiles of 24.
pub(crate) fn tile_bytes() -> usize {
    let rows = if has_avx512() { 0 } else { TILE_ROWS.next_multiple_of(24) };
    (tile_cols() + rows) * depth() * size_of::<f32>()
}

/// Rows of the result in a tile.
const TILE_ROWS: usize = 256;
/// Multiplications below which threads cost more than they bring.
const SERIAL: usize = 1 << 16;

/// A strided view of f32.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    start: *const f32,
    row: isize,
    col: isize,
}

// SAFETY: read-only views, used inside one operation.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

impl Matrix {
    /// Row-major data of `cols` columns.
    pub(crate) fn new(data: &[f32], cols: usize) -> Self {
        Self::strided(data, cols)
    }

    /// Data whose rows start `stride` elements apart.
    pub(crate) fn strided(data: &[f32], stride: usize) -> Self {
        Matrix { start: data.as_ptr(), row: stride as isize, col: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Matrix { start: self.start, row: self.col, col: self.row }
    }

    fn at(self, row: usize, col: usize) -> *const f32 {
        self.start.wrapping_offset(row as isize * self.row + col as isize * self.col)
    }
}

#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: tiles write disjoint elements.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn offset(self, n: usize) -> *mut f32 {
        self.0.wrapping_add(n)
    }
}

/// `c = scale * a b`, or `c += scale * a b` with `accumulate`; `a` is `[m, k]`, `b` is `[k, n]`, `c` is row-major
/// `[m, n]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn matmul(c: &mut [f32], a: Matrix, b: Matrix, m: usize, n: usize, k: usize, scale: f32, accumulate: bool) {
    assert!(c.len() >= m * n);
    let out = Out(c.as_mut_ptr());
    let tile_cols = tile_cols();
    let (tiles_m, tiles_n) = (m.div_ceil(TILE_ROWS), n.div_ceil(tile_cols));
    let tile = |i: usize| {
        let (r, c) = (i / tiles_n * TILE_ROWS, i % tiles_n * tile_cols);
        let (rows, cols) = (TILE_ROWS.min(m - r), tile_cols.min(n - c));
        // SAFETY: the tile lies inside `c`, tiles are disjoint, and the views cover [m, k] and [k, n].
        unsafe {
            tile_product(out.offset(r * n + c), n, a.at(r, 0), a, b.at(0, c), b, rows, cols, k, scale, accumulate)
        }
    };
    let tiles = tiles_m * tiles_n;
    if tiles == 1 || m * n * k <= SERIAL {
        (0..tiles).for_each(tile);
    } else {
        (0..tiles).into_par_iter().with_max_len(1).for_each(tile);
    }
}

/// One product on the calling thread: `c[rows, cols]` with rows `stride` apart.
///
/// # Safety
/// `c` is writable at every element and overlaps neither operand; `a` and `b` are readable over `[rows, k]`, `[k, cols]`.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn tile_product(
    c: *mut f32,
    stride: usize,
    a_start: *const f32,
    a: Matrix,
    b_start: *const f32,
    b: Matrix,
    rows: usize,
    cols: usize,
    k: usize,
    scale: f32,
    accumulate: bool,
) {
    let depth = depth();
    // Longer stretches would be cut by the sizes of this machine's caches, and copied into buffers of any size.
    for first in (0..k).step_by(depth) {
        let skip = first as isize;
        // SAFETY: the caller's contract is gemm's; a stretch of the inner dimension lies inside the views.
        unsafe {
            gemm::gemm(
                rows,
                cols,
                depth.min(k - first),
                c,
                1,
                stride as isize,
                accumulate || first > 0,
                a_start.offset(skip * a.col),
                a.col,
                a.row,
                b_start.offset(skip * b.row),
                b.col,
                b.row,
                1.0,
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}
