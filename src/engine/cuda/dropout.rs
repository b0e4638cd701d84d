//! Element by element: casts and LoRA dropout. Addresses are device addresses.

use super::CudaOps;
use super::gpu::{Arg, Launch};
use crate::Result;
use crate::engine::dropout::threshold;
use crate::engine::ops::Lora;

/// Blocks for each multiprocessor: enough to fill it, and each thread has several elements in long tensors.
const BLOCKS: usize = 16;

impl CudaOps {
    /// f32 arrays to the compute dtype: from, to, elements.
    pub(super) fn cast(&self, casts: [(u64, u64, usize); 2]) -> Result<()> {
        let [(x0, y0, n0), (x1, y1, n1)] = casts;
        let most = n0.max(n1);
        if most == 0 {
            return Ok(());
        }
        let args = [Arg::Ptr(x0), Arg::Ptr(y0), Arg::U32(n0 as u32), Arg::Ptr(x1), Arg::Ptr(y1), Arg::U32(n1 as u32)];
        self.gpu.launch("linear", "cast_to_elem", self.elements(most), &args)
    }

    /// `y = dropout(x)`, elem `[n]`, with the module's mask of this micro-step; `y` may be `x`.
    pub(super) fn dropout(&self, lora: &Lora, x: u64, y: u64, n: usize) -> Result<()> {
        self.dropout_rows(lora, (x, 1), y, n, 1)
    }

    /// The same where rows of x, `[n / width, width]`, are `row` elements apart; those of y are not.
    pub(super) fn dropout_rows(&self, lora: &Lora, x: (u64, usize), y: u64, n: usize, width: usize) -> Result<()> {
        self.dropout_kernel("dropout", lora, [x.0, y], n, &[Arg::U32(width as u32), Arg::U32(x.1 as u32)])
    }

    /// [`CudaOps::dropout_rows`] that leaves its mask in `bits`, u8 `[n / 8]`; `width` is a multiple of 8.
    pub(super) fn dropout_kept(
        &self,
        lora: &Lora,
        x: (u64, usize),
        y: u64,
        n: usize,
        width: usize,
        bits: u64,
    ) -> Result<()> {
        let rows = [Arg::U32(width as u32), Arg::U32(x.1 as u32), Arg::Ptr(bits)];
        self.dropout_kernel("dropout_kept", lora, [x.0, y], n, &rows)
    }

    /// `y += dropout(x)`, elem `[n]`, with the mask of [`CudaOps::dropout`].
    pub(super) fn dropout_add(&self, lora: &Lora, y: u64, x: u64, n: usize) -> Result<()> {
        self.dropout_kernel("dropout_add", lora, [y, x], n, &[])
    }

    /// Whether the module's input is dropped now: in training, where it has dropout.
    pub(super) fn drops(&self, lora: &Lora) -> bool {
        self.state.training && lora.dropout > 0.0
    }

    fn dropout_kernel(
        &self,
        kernel: &'static str,
        lora: &Lora,
        [first, second]: [u64; 2],
        n: usize,
        rows: &[Arg],
    ) -> Result<()> {
        let (threshold, keep) = threshold(lora.dropout);
        let args = [
            Arg::Ptr(first),
            Arg::Ptr(second),
            Arg::U64(n as u64),
            Arg::U32(threshold),
            Arg::F32(keep),
            Arg::U64(self.state.dropout_seed),
            Arg::U64(self.state.micro_step),
            Arg::U32(lora.module),
        ];
        self.gpu.launch("linear", kernel, self.elements(n), &[&args[..], rows].concat())
    }

    /// Blocks of 256 threads for a kernel whose threads take 16 bytes of `n` elements at a time, in steps of the grid.
    pub(super) fn elements(&self, n: usize) -> Launch {
        let per_block = 256 * if self.is_bf16() { 8 } else { 4 };
        let blocks = n.div_ceil(per_block).clamp(1, self.gpu.sm_count as usize * BLOCKS);
        Launch { grid: [blocks as u32, 1, 1], block: 256, shared: 0 }
    }
}
