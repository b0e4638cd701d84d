//! The CPU backend: f32, multi-threaded, one file per operation. The reference that the GPU is compared with.
//!
//! The same bits for any number of threads: work is cut into parts that depend on shapes alone, and every sum has a
//! fixed order.

mod add_rmsnorm;
mod arena;
mod attention;
mod attention_backward;
#[cfg(test)]
mod autograd;
mod columns;
mod embedding;
pub(crate) mod linear;
mod lm_head;
mod lora;
pub(crate) mod math;
mod matmul;
mod optimizer;
mod rotary;
mod swiglu;

pub use arena::Arena;

use std::borrow::Cow;

use super::backend::{Backend, StepState, WeightSource, write_quantized};
use super::layout::WeightSlot;
use super::ops::*;
use crate::data::Batch;
use crate::plan::{ALIGNMENT, MemoryPlan, Region, Space};
use crate::{Error, Result};

/// Heap bytes beside the arena that an operation allocates and gives back, at most, on this machine with as many threads
/// as rayon has: one operand of a tile of a matrix product for each thread, attention's list of tiles, the token losses
/// of `chunk` rows, and what handing work to the threads costs.
pub(crate) fn transient_bytes(tokens: usize, chunk: usize) -> u64 {
    const HANDING_OUT: usize = 16 << 10;
    let threads = rayon::current_num_threads() * (matmul::tile_bytes() + ALIGNMENT as usize);
    (threads + attention::tiles_bytes(tokens) + chunk.min(tokens) * size_of::<f64>() + HANDING_OUT) as u64
}

/// The arena, the plan's map of it, and the state of the step.
pub struct CpuOps {
    plan: MemoryPlan,
    arena: Arena,
    host: Arena,
    /// T of the batch at hand.
    tokens: usize,
    /// Where each example of the batch at hand starts.
    cu_seqlens: Vec<u32>,
    /// The batch that `load_batch` copies in.
    batch: Option<Batch>,
    /// Filled by `lm_head_logits` when all logits are wanted.
    logits: Vec<f32>,
    /// Scalars of the step.
    pub state: StepState,
}

impl CpuOps {
    /// Allocates the plan's arena, zeroed.
    ///
    /// # Errors
    /// Heads wider than a tile; memory that the system does not give.
    pub fn new(plan: &MemoryPlan, state: StepState) -> Result<Self> {
        if plan.spec().head_dim > rotary::MAX_HEAD_DIM {
            return Err(Error::new("the heads are wider than the CPU backend's tiles")
                .at("head_dim")
                .expected(format!("at most {}", rotary::MAX_HEAD_DIM))
                .found(plan.spec().head_dim.to_string()));
        }
        let arena = Arena::new(plan.arena_bytes())?;
        let host = Arena::new(plan.host_bytes())?;
        let capacity = plan.config().capacity();
        Ok(CpuOps {
            plan: plan.clone(),
            arena,
            host,
            tokens: 0,
            cu_seqlens: Vec::with_capacity(capacity + 1),
            batch: None,
            logits: Vec::new(),
            state,
        })
    }

    fn region(&self, id: TensorId) -> &Region {
        &self.plan.regions()[id.index()]
    }

    /// A region's bytes.
    ///
    /// # Safety
    /// The caller holds no other reference to a region that shares these bytes: true inside one operation, because the
    /// plan gives its operands places of their own.
    #[allow(clippy::mut_from_ref)]
    unsafe fn bytes(&self, id: TensorId) -> &mut [u8] {
        let r = self.region(id);
        let arena = if r.space == Space::Host { &self.host } else { &self.arena };
        // SAFETY: the plan keeps offset + bytes inside the arena; disjointness is the caller's.
        unsafe { arena.slice(r.offset, r.bytes()) }
    }

    /// A region as elements of `T`, whose size is that of the region's dtype.
    ///
    /// # Safety
    /// As [`CpuOps::bytes`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice<T: bytemuck::Pod>(&self, id: TensorId) -> &mut [T] {
        debug_assert_eq!(self.region(id).dtype.size_in_bytes(), size_of::<T>());
        // SAFETY: as above; regions are aligned to 256 bytes.
        bytemuck::cast_slice_mut(unsafe { self.bytes(id) })
    }

    /// Elements of a row of a region.
    fn width(&self, id: TensorId) -> usize {
        let r = self.region(id);
        r.numel() / r.shape[0]
    }

    /// The rows of the batch at hand of an activation `[T, width]`, f32.
    ///
    /// # Safety
    /// As [`CpuOps::bytes`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn rows(&self, id: TensorId) -> &mut [f32] {
        let (width, tokens) = (self.width(id), self.tokens);
        // SAFETY: passed on to the caller.
        let all = unsafe { self.slice::<f32>(id) };
        &mut all[..tokens * width]
    }

    /// An operation's scratch as f32.
    ///
    /// # Safety
    /// As [`CpuOps::bytes`]: one borrow at a time.
    #[allow(clippy::mut_from_ref)]
    unsafe fn scratch(&self, s: Scratch) -> &mut [f32] {
        // SAFETY: the plan placed it; passed on to the caller.
        bytemuck::cast_slice_mut(unsafe { self.arena.slice(s.offset, s.bytes / 4 * 4) })
    }

    /// A region's bytes, to be changed from outside an operation.
    fn bytes_mut(&mut self, id: TensorId) -> &mut [u8] {
        // SAFETY: the exclusive borrow of `self` covers the result.
        unsafe { self.bytes(id) }
    }
}

impl Backend for CpuOps {
    fn state(&mut self) -> &mut StepState {
        &mut self.state
    }

    fn set_batch(&mut self, batch: Batch) {
        self.batch = Some(batch);
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn read(&self, id: TensorId) -> Result<Cow<'_, [u8]>> {
        // SAFETY: shared borrow of `self`; operations need `&mut self`.
        Ok(Cow::Borrowed(unsafe { self.bytes(id) }))
    }

    fn write(&mut self, id: TensorId, bytes: &[u8]) -> Result<()> {
        self.bytes_mut(id).copy_from_slice(bytes);
        Ok(())
    }

    fn load(&mut self, slot: &WeightSlot, source: &mut WeightSource<'_>) -> Result<()> {
        match slot.weight {
            Weight::Dense { w } => {
                let out: &mut [f32] = bytemuck::cast_slice_mut(self.bytes_mut(w));
                source.read_f32(out)
            }
            Weight::Nf4 { packed, absmax, nested, config } => {
                let q = source.quantize(config)?;
                write_quantized(self, &q, packed, absmax, nested)
            }
        }
    }

    fn row_lengths(&mut self, linear: &LinearIds) -> Result<Vec<f32>> {
        Ok(self.lengths(linear))
    }

    /// Fills regions and scratch with NaN (all bits set): what is read after the end of its life shows.
    fn poison(&mut self, ids: &[TensorId], scratch: Scratch) -> Result<()> {
        for &id in ids {
            self.bytes_mut(id).fill(0xff);
        }
        // SAFETY: exclusive borrow.
        unsafe { self.arena.slice(scratch.offset, scratch.bytes) }.fill(0xff);
        Ok(())
    }
}

impl Ops for CpuOps {
    fn load_batch(&mut self, op: &LoadBatch) -> Result<()> {
        let batch = self.batch.take().ok_or_else(|| Error::new("no batch was given to the engine"))?;
        self.tokens = batch.tokens();
        self.cu_seqlens.clear();
        self.cu_seqlens.extend_from_slice(&batch.cu_seqlens);
        let t = self.tokens;
        // SAFETY: one region at a time, exclusive borrow.
        unsafe {
            self.slice::<u32>(op.tokens)[..t].copy_from_slice(&batch.input_ids);
            self.slice::<u32>(op.positions)[..t].copy_from_slice(&batch.positions);
            self.slice::<u32>(op.cu_seqlens)[..batch.cu_seqlens.len()].copy_from_slice(&batch.cu_seqlens);
            if let Some(labels) = op.labels {
                self.slice::<i32>(labels)[..t].copy_from_slice(&batch.labels);
            }
        }
        Ok(())
    }
    fn embedding(&mut self, op: &Embedding) -> Result<()> {
        self.embed(op);
        Ok(())
    }
    fn embedding_backward(&mut self, op: &EmbeddingBackward) -> Result<()> {
        self.embed_backward(op);
        Ok(())
    }
    fn add_rmsnorm(&mut self, op: &AddRmsnorm) -> Result<()> {
        self.add_norm(op);
        Ok(())
    }
    fn rescale(&mut self, op: &Rescale) -> Result<()> {
        self.norm_again(op);
        Ok(())
    }
    fn rmsnorm_backward(&mut self, op: &RmsnormBackward, _: Scratch) -> Result<()> {
        self.norm_backward(op);
        Ok(())
    }
    fn linear(&mut self, op: &Linear, scratch: Scratch) -> Result<()> {
        self.linear_forward(op, scratch);
        Ok(())
    }
    fn linear_backward(&mut self, op: &LinearBackward, scratch: Scratch) -> Result<()> {
        self.linear_grad(op, scratch);
        Ok(())
    }
    fn lora_a(&mut self, op: &LoraA, _: Scratch) -> Result<()> {
        self.low_rank(op);
        Ok(())
    }
    fn lora_backward(&mut self, op: &LoraBackward, _: Scratch) -> Result<()> {
        self.low_rank_grads(op);
        Ok(())
    }
    fn split_columns(&mut self, op: &SplitColumns) -> Result<()> {
        self.split(op);
        Ok(())
    }
    fn join_columns(&mut self, op: &JoinColumns) -> Result<()> {
        self.join(op);
        Ok(())
    }
    fn rotary(&mut self, op: &Rotary) -> Result<()> {
        self.rotate(op);
        Ok(())
    }
    fn attention(&mut self, op: &Attention) -> Result<()> {
        self.attend(op);
        Ok(())
    }
    fn attention_backward(&mut self, op: &AttentionBackward, scratch: Scratch) -> Result<()> {
        self.attend_backward(op, scratch);
        Ok(())
    }
    fn cached_attention(&mut self, op: &CachedAttention) -> Result<()> {
        self.attend_cached(op);
        Ok(())
    }
    fn swiglu(&mut self, op: &Swiglu) -> Result<()> {
        self.gate(op);
        Ok(())
    }
    fn swiglu_backward(&mut self, op: &SwigluBackward) -> Result<()> {
        self.gate_backward(op);
        Ok(())
    }
    fn lm_head_ce(&mut self, op: &LmHeadCe, scratch: Scratch) -> Result<()> {
        self.cross_entropy(op, scratch);
        Ok(())
    }
    fn lm_head_logits(&mut self, op: &LmHeadLogits) -> Result<()> {
        self.project_logits(op);
        Ok(())
    }
    fn grad_norm(&mut self, op: &GradNorm, _: Scratch) -> Result<()> {
        self.global_norm(op)
    }
    fn adamw(&mut self, op: &AdamW) -> Result<()> {
        self.update(op);
        Ok(())
    }
    fn page_in(&mut self, op: &PageIn) -> Result<()> {
        self.copy(op.host, op.window);
        Ok(())
    }
    fn page_out(&mut self, op: &PageOut) -> Result<()> {
        self.copy(op.window, op.host);
        Ok(())
    }
    fn offload(&mut self, op: &Offload) -> Result<()> {
        self.copy(op.device, op.host);
        Ok(())
    }
    fn fetch(&mut self, op: &Fetch) -> Result<()> {
        self.copy(op.host, op.device);
        Ok(())
    }
    fn transferred(&mut self, _: &Transferred) -> Result<()> {
        Ok(())
    }
    fn dequantize(&mut self, op: &Dequantize) -> Result<()> {
        self.decode_rows(op);
        Ok(())
    }
    fn lora_b(&mut self, op: &LoraB) -> Result<()> {
        self.beside_rows(op);
        Ok(())
    }
    fn zero(&mut self, op: &Zero) -> Result<()> {
        for &id in &op.tensors {
            // SAFETY: one region at a time, exclusive borrow.
            unsafe { self.bytes(id) }.fill(0);
        }
        Ok(())
    }
}
