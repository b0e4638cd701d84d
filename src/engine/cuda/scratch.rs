//! Where the temporaries of an operation lie in its scratch: read by the plan for their size, by the launchers for their
//! places. No GPU is needed.

use crate::engine::ops::{
    AdaptedModule, Beside, LinearIds, LmHeadCe, Lora, LoraA, LoraBackward, Weight, low_rank_columns,
};

/// What a matrix product wants its operands aligned to, in bytes.
const ALIGN: usize = 256;

/// Hands out places one after the other.
#[derive(Default)]
struct Carve(usize);

impl Carve {
    fn take(&mut self, bytes: usize) -> u64 {
        let at = self.0;
        self.0 += bytes.next_multiple_of(ALIGN);
        at as u64
    }
}

/// Byte offsets of a linear module's temporaries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearScratch {
    /// The dequantized weight in the compute dtype, `[out, in]`, or with the columns of B beside it.
    pub weight: u64,
    /// Elements of its rows.
    pub row: usize,
    /// A and B in the compute dtype, when that is not theirs.
    pub a: u64,
    pub b: u64,
    /// Backward: `[T, R]`.
    pub dxa: u64,
    /// `[T, in]`: the input with dropout applied, or the gradient before it.
    pub dropped: u64,
    /// DoRA: `scaling * B A`, `[out, in]`.
    pub low: u64,
    /// DoRA: f32 `[out]`.
    pub inverse: u64,
    /// DoRA, backward: the gradient of what the magnitudes multiply, and that itself; `[T, out]`.
    pub g: u64,
    pub z: u64,
    /// All bytes.
    pub total: usize,
}

impl LinearScratch {
    /// For `rows` tokens at capacity and a compute dtype of `elem` bytes; `product`: the base weight takes part; `beside`: where the
    /// low-rank product lies beside the input.
    pub fn new(
        linear: &LinearIds,
        rows: usize,
        elem: usize,
        product: bool,
        backward: bool,
        beside: Option<Beside>,
    ) -> Self {
        let mut carve = Carve::default();
        let (n, k) = (linear.out_features, linear.in_features);
        let four_bit = matches!(linear.weight, Weight::Nf4 { .. });
        let r = linear.lora.map_or(0, |l| l.r);
        let dora = linear.lora.is_some_and(|l| l.magnitude.is_some());
        let product = product || (dora && backward);
        let row = beside.map_or(k, |b| b.row());
        let weight = carve.take(if product && four_bit { n * row * elem } else { 0 });
        let cast = if elem == 2 { 2 } else { 0 };
        let a = carve.take(if beside.is_none() { r * k * cast } else { 0 });
        let b = carve.take(if beside.is_some() && four_bit { 0 } else { n * r * cast });
        let dxa = carve.take(if backward { rows * r * elem } else { 0 });
        let drops = linear.lora.is_some_and(|l| l.dropout > 0.0);
        let dropped = carve.take(if drops { rows * k * elem } else { 0 });
        let low = carve.take(if dora && product { n * k * elem } else { 0 });
        let inverse = carve.take(if dora && product { n * 4 } else { 0 });
        let g = carve.take(if dora && backward { rows * n * elem } else { 0 });
        let z = carve.take(if dora && backward { rows * n * elem } else { 0 });
        LinearScratch { weight, row, a, b, dxa, dropped, low, inverse, g, z, total: carve.0 }
    }
}

/// Modules that share their input, at most: what a kernel of lora.cu or lora_dx.cu takes.
pub(crate) const STACKED: usize = 3;

/// Whether kernels/cuda/lora_dx.cu takes these modules, with a compute dtype of `elem` bytes.
pub(crate) fn has_dx_kernel(op: &LoraBackward, elem: usize) -> bool {
    let whole = |l: Lora| low_rank_columns(l.r).is_multiple_of(16) && l.dropout > 0.0;
    let fits = |m: &AdaptedModule| m.dropped.is_some() && m.linear.lora.is_some_and(whole);
    elem == 2 && op.in_features.is_multiple_of(128) && op.modules.len() <= STACKED && op.modules.iter().all(fits)
}

/// Byte offsets of the temporaries of LoRA pairs that share their input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoraScratch {
    /// `[columns, in]`: A of all, one below the other.
    pub a: u64,
    /// Low-rank columns of all.
    pub columns: usize,
    /// `[out, columns of one]`: B of one module at a time, scaled.
    pub b: u64,
    /// `[T, columns]`.
    pub dxa: u64,
    /// `[T, in]`: the input with dropout applied, or the gradient before it.
    pub dropped: u64,
    /// All bytes.
    pub total: usize,
}

impl LoraScratch {
    /// For the products of `op`.
    pub fn forward(op: &LoraA, rows: usize, elem: usize) -> Self {
        // What is kept has a place of its own.
        let drops = op.dropped.is_empty() && op.adapters.iter().any(|m| m.lora.dropout > 0.0);
        Self::new(op.adapters.iter().map(|m| m.lora.r), op.in_features, (rows, elem), drops, None)
    }

    /// For the gradients of `op`.
    pub fn backward(op: &LoraBackward, rows: usize, elem: usize) -> Self {
        // What was kept need not be made again, and where one kernel makes dx there is nothing in between.
        let through = op.dx.is_some() && !has_dx_kernel(op, elem);
        let again = |m: &AdaptedModule| m.dropped.is_none() || through;
        let drops = |m: &AdaptedModule| m.linear.lora.is_some_and(|l| l.dropout > 0.0);
        let drops = op.modules.iter().any(|m| again(m) && drops(m));
        let loras = || op.modules.iter().filter_map(|m| Some((m.linear.out_features, m.linear.lora?.r)));
        let largest = loras().map(|(n, r)| n * low_rank_columns(r)).max().unwrap_or(0);
        Self::new(loras().map(|(_, r)| r), op.in_features, (rows, elem), drops, Some(largest))
    }

    /// For pairs of these ranks; `backward`: the elements of the largest B.
    fn new(
        ranks: impl Iterator<Item = usize>,
        k: usize,
        (rows, elem): (usize, usize),
        drops: bool,
        backward: Option<usize>,
    ) -> Self {
        let mut carve = Carve::default();
        let columns = ranks.map(low_rank_columns).sum::<usize>();
        let a = carve.take(columns * k * elem);
        let b = carve.take(backward.unwrap_or(0) * elem);
        let dxa = carve.take(if backward.is_some() { rows * columns * elem } else { 0 });
        let dropped = carve.take(if drops { rows * k * elem } else { 0 });
        LoraScratch { a, columns, b, dxa, dropped, total: carve.0 }
    }
}

/// Byte offsets of the loss's temporaries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LmHeadScratch {
    /// u32 `[T]`: the rows that have a label.
    pub index: u64,
    /// f64 `[chunk]`: the losses of a chunk.
    pub losses: u64,
    /// `[chunk, C]`: those rows.
    pub gathered: u64,
    /// `[chunk, C]`: their gradients.
    pub dgathered: u64,
    /// f32 `[chunk, V]`.
    pub logits: u64,
    /// `[chunk, V]` in the compute dtype: their gradient; in f32 the logits themselves.
    pub dlogits: u64,
    /// All bytes.
    pub total: usize,
}

impl LmHeadScratch {
    /// For `rows` tokens at capacity, hidden size `c`, vocabulary `v` and a compute dtype of `elem` bytes.
    pub fn new(op: &LmHeadCe, rows: usize, c: usize, v: usize, elem: usize) -> Self {
        let mut carve = Carve::default();
        let trains = op.dx.is_some();
        let index = carve.take(rows * 4);
        let losses = carve.take(op.chunk * 8);
        let gathered = carve.take(op.chunk * c * elem);
        let dgathered = carve.take(if trains { op.chunk * c * elem } else { 0 });
        let logits = carve.take(op.chunk * v * 4);
        let dlogits = if trains && elem == 2 { carve.take(op.chunk * v * 2) } else { logits };
        LmHeadScratch { index, losses, gathered, dgathered, logits, dlogits, total: carve.0 }
    }
}

/// Blocks that sum the squares of one gradient, at most; a partial sum of each is f64.
pub(crate) const NORM_BLOCKS: usize = 256;

/// Bytes of the partial sums of `grads` gradients.
pub(crate) fn grad_norm_bytes(grads: usize) -> usize {
    grads * NORM_BLOCKS * size_of::<f64>()
}
