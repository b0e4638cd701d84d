//! The CUDA backend: one NVIDIA GPU, bf16 with f32 sums (f32 throughout for validation), one file per operation.
//!
//! Each operation launches the kernels of `kernels/cuda/<same name>.cu`, which NVRTC compiles for the card at hand when the
//! backend is opened; matrix products go to cuBLASLt. Driver and libraries are looked for at run time. Everything lies in
//! one allocation of [`MemoryPlan::arena_bytes`], and all work is done in order by one stream.

mod add_rmsnorm;
mod attention;
mod bench;
mod columns;
mod compile;
mod detect;
mod dora;
mod dropout;
mod embedding;
mod gpu;
mod libraries;
mod linear;
mod linear_one;
mod lm_head;
mod lm_head_rows;
mod load;
mod lora;
mod matmul;
mod nf4;
mod nvml;
mod optimizer;
mod rotary;
pub(crate) mod scratch;
mod swiglu;
#[cfg(test)]
mod tests;
mod transfers;
mod workbench;

pub use bench::{Nf4Timing, bench_nf4};
pub use gpu::{Arg, Ballast, Gpu, Launch, reserve_all_but};
pub use libraries::check;
pub use workbench::{Buffer, Module, kernel_source};

use std::borrow::Cow;

use candle_core::DType;

use super::backend::{Backend, StepState, WeightSource};
use super::layout::WeightSlot;
use super::ops::*;
use super::optimizer::AdamWHyper;
use crate::data::Batch;
use crate::plan::{MemoryPlan, Region, Space};
use crate::{Error, Result};
use matmul::{Matrix, Products};
use transfers::Transfers;

/// The name of the first visible card.
///
/// # Errors
/// No driver, no card, libraries that are missing.
pub fn device_name() -> Result<String> {
    check()?;
    let named = cudarc::driver::result::device::get(0).and_then(cudarc::driver::result::device::get_name);
    named.map_err(|e| libraries::failed("cuDeviceGetName", e))
}

/// Whether a GPU can be used from this process.
pub fn available() -> bool {
    check().is_ok() && cudarc::driver::result::device::get_count().is_ok_and(|n| n > 0)
}

/// The arena on the card, the plan's map of it, and the state of the step.
pub struct CudaOps {
    plan: MemoryPlan,
    products: Products,
    arena: u64,
    /// Pinned memory for what the plan keeps on the host.
    host: *mut u8,
    /// Compute dtype: bf16 or f32.
    dtype: DType,
    /// T of the batch at hand.
    tokens: usize,
    /// Where each example of the batch at hand starts.
    cu_seqlens: Vec<u32>,
    /// Which tokens of the batch at hand have a label.
    labelled: Vec<u32>,
    /// Positions of the first token, for the key-value cache.
    first_position: u32,
    batch: Option<Batch>,
    logits: Vec<f32>,
    /// The stream of copies between the arena and the host, and for each tensor the event after its last copy.
    transfers: Transfers,
    /// Updates that wait to be launched together.
    updates: Vec<(optimizer::Update, AdamWHyper)>,
    /// While weights are loaded.
    staging: Option<load::Staging>,
    /// Modules of one token that wait to be launched together.
    ones: Vec<linear_one::One>,
    /// Columns of B that wait to be written together.
    columns: Vec<lora::Columns>,
    /// Scalars of the step.
    pub state: StepState,
    /// The plain attention kernels instead of the tiled ones, for comparison.
    pub(crate) plain_attention: bool,
    // Last: dropped after what lives in its context.
    gpu: Gpu,
}

// SAFETY: the pinned memory belongs to this value.
unsafe impl Send for CudaOps {}

impl CudaOps {
    /// Opens the card and allocates the plan's arena on it, zeroed.
    ///
    /// # Errors
    /// No card, no libraries, too little memory: each says what to install or change.
    pub fn new(plan: &MemoryPlan, state: StepState) -> Result<Self> {
        let dtype = plan.config().compute_dtype;
        let gpu = Gpu::open(dtype == DType::F32)?;
        let arena = gpu.allocate(plan.arena_bytes())?;
        let host = gpu.allocate_host(plan.host_bytes()).inspect_err(|_| gpu.free(arena))?;
        let workspace = plan.layout().workspace.map_or((0, 0), |id| {
            let r = &plan.regions()[id.index()];
            (arena + r.offset, r.bytes() as usize)
        });
        let products = Products::new(workspace).inspect_err(|_| gpu.free(arena))?;
        let transfers = Transfers::new().inspect_err(|_| gpu.free(arena))?;
        Ok(CudaOps {
            plan: plan.clone(),
            products,
            arena,
            host,
            dtype,
            tokens: 0,
            cu_seqlens: Vec::new(),
            labelled: Vec::new(),
            first_position: 0,
            batch: None,
            logits: Vec::new(),
            transfers,
            updates: Vec::new(),
            staging: None,
            ones: Vec::new(),
            columns: Vec::new(),
            state,
            plain_attention: false,
            gpu,
        })
    }

    fn region(&self, id: TensorId) -> &Region {
        &self.plan.regions()[id.index()]
    }

    /// Elements of a row of a region.
    fn width(&self, id: TensorId) -> usize {
        let r = self.region(id);
        r.numel() / r.shape[0]
    }

    /// The device address of a region; pinned memory has one too.
    fn ptr(&self, id: TensorId) -> u64 {
        let r = self.region(id);
        match r.space {
            Space::Device => self.arena + r.offset,
            Space::Host => self.host as u64 + r.offset,
        }
    }

    /// The device address of an operation's scratch.
    fn at(&self, scratch: Scratch) -> u64 {
        self.arena + scratch.offset
    }

    fn is_bf16(&self) -> bool {
        self.dtype == DType::BF16
    }

    fn matmul(
        &mut self,
        c: Matrix,
        a: Matrix,
        b: Matrix,
        shape: (usize, usize, usize),
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        self.products.matmul(&self.gpu, c, a, b, shape, alpha, beta)
    }

    /// Launches all that waits for its like.
    fn launch_waiting(&mut self) -> Result<()> {
        self.launch_columns()?;
        self.launch_ones()?;
        self.launch_updates()
    }

    /// The pinned bytes of a region on the host.
    fn pinned(&self, id: TensorId) -> &[u8] {
        let r = self.region(id);
        // SAFETY: inside the pinned memory, by the plan; the stream has been waited for.
        unsafe { std::slice::from_raw_parts(self.host.add(r.offset as usize), r.bytes() as usize) }
    }
}

impl Drop for CudaOps {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            let _ = self.gpu.wait();
            self.end_load();
            self.transfers.close();
            self.gpu.free_host(self.host);
            self.gpu.free(self.arena);
        }
    }
}

impl Backend for CudaOps {
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
        if self.region(id).space == Space::Host {
            self.gpu.bind()?;
            self.gpu.wait()?;
            return Ok(Cow::Borrowed(self.pinned(id)));
        }
        let mut out = vec![0u8; self.region(id).bytes() as usize];
        self.gpu.read(self.ptr(id), &mut out)?;
        Ok(Cow::Owned(out))
    }

    fn write(&mut self, id: TensorId, bytes: &[u8]) -> Result<()> {
        self.gpu.bind()?;
        if self.region(id).space == Space::Host {
            self.gpu.wait()?;
            // SAFETY: inside the pinned memory, by the plan; nothing else reads it now.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr(id) as *mut u8, bytes.len()) };
            return Ok(());
        }
        self.gpu.upload(self.ptr(id), bytes)
    }

    fn load(&mut self, slot: &WeightSlot, source: &mut WeightSource<'_>) -> Result<()> {
        self.gpu.bind()?;
        self.load_weight(slot, source)
    }

    fn row_lengths(&mut self, linear: &LinearIds) -> Result<Vec<f32>> {
        self.gpu.bind()?;
        self.gpu.wait()?;
        self.lengths(linear)
    }

    fn poison(&mut self, ids: &[TensorId], scratch: Scratch) -> Result<()> {
        self.launch_waiting()?;
        for &id in ids {
            self.gpu.fill(self.ptr(id), 0xff, self.region(id).bytes())?;
        }
        self.gpu.fill(self.at(scratch), 0xff, scratch.bytes)
    }

    fn begin(&mut self) -> Result<()> {
        self.gpu.bind()?;
        self.end_load();
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.launch_waiting()?;
        self.gpu.wait()
    }

    fn wants_rehearsal(&self) -> bool {
        true
    }

    fn clear(&mut self) -> Result<()> {
        self.gpu.fill(self.arena, 0, self.plan.arena_bytes())?;
        self.gpu.wait()?;
        // SAFETY: the whole pinned memory; the stream has been waited for.
        unsafe { std::ptr::write_bytes(self.host, 0, self.plan.host_bytes() as usize) };
        Ok(())
    }

    fn process_bytes(&self) -> Option<u64> {
        nvml::process_bytes(&self.gpu)
    }

    fn device_name(&self) -> String {
        self.gpu.name.clone()
    }
}

impl Ops for CudaOps {
    fn before(&mut self, op: &Op) -> Result<()> {
        // Modules wait for their siblings alone, and columns for others: what comes next may read or overwrite what is theirs.
        if !matches!(op, Op::LoraB(_)) {
            self.launch_columns()?;
        }
        if matches!(op, Op::Linear(_)) { Ok(()) } else { self.launch_ones() }
    }
    fn load_batch(&mut self, op: &LoadBatch) -> Result<()> {
        let batch = self.batch.take().ok_or_else(|| Error::new("no batch was given to the engine"))?;
        self.tokens = batch.tokens();
        self.cu_seqlens.clear();
        self.cu_seqlens.extend_from_slice(&batch.cu_seqlens);
        self.first_position = batch.positions.first().copied().unwrap_or(0);
        lm_head::labelled_rows(&batch.labels, &mut self.labelled);
        self.gpu.upload(self.ptr(op.tokens), bytemuck::cast_slice(&batch.input_ids))?;
        self.gpu.upload(self.ptr(op.positions), bytemuck::cast_slice(&batch.positions))?;
        self.gpu.upload(self.ptr(op.cu_seqlens), bytemuck::cast_slice(&batch.cu_seqlens))?;
        match op.labels {
            Some(labels) => self.gpu.upload(self.ptr(labels), bytemuck::cast_slice(&batch.labels)),
            None => Ok(()),
        }
    }
    fn embedding(&mut self, op: &Embedding) -> Result<()> {
        self.embed(op)
    }
    fn embedding_backward(&mut self, op: &EmbeddingBackward) -> Result<()> {
        self.embed_backward(op)
    }
    fn add_rmsnorm(&mut self, op: &AddRmsnorm) -> Result<()> {
        self.add_norm(op)
    }
    fn rescale(&mut self, op: &Rescale) -> Result<()> {
        self.norm_again(op)
    }
    fn rmsnorm_backward(&mut self, op: &RmsnormBackward, _: Scratch) -> Result<()> {
        self.norm_backward(op)
    }
    fn linear(&mut self, op: &Linear, scratch: Scratch) -> Result<()> {
        self.linear_forward(op, scratch)
    }
    fn linear_backward(&mut self, op: &LinearBackward, scratch: Scratch) -> Result<()> {
        self.linear_grad(op, scratch)
    }
    fn lora_a(&mut self, op: &LoraA, scratch: Scratch) -> Result<()> {
        self.low_rank(op, scratch)
    }
    fn lora_backward(&mut self, op: &LoraBackward, scratch: Scratch) -> Result<()> {
        self.low_rank_grads(op, scratch)
    }
    fn split_columns(&mut self, op: &SplitColumns) -> Result<()> {
        self.split(op)
    }
    fn join_columns(&mut self, op: &JoinColumns) -> Result<()> {
        self.join(op)
    }
    fn rotary(&mut self, op: &Rotary) -> Result<()> {
        self.rotate(op)
    }
    fn attention(&mut self, op: &Attention) -> Result<()> {
        self.attend(op)
    }
    fn attention_backward(&mut self, op: &AttentionBackward, scratch: Scratch) -> Result<()> {
        self.attend_backward(op, scratch)
    }
    fn cached_attention(&mut self, op: &CachedAttention) -> Result<()> {
        self.attend_cached(op)
    }
    fn swiglu(&mut self, op: &Swiglu) -> Result<()> {
        self.gate(op)
    }
    fn swiglu_backward(&mut self, op: &SwigluBackward) -> Result<()> {
        self.gate_backward(op)
    }
    fn lm_head_ce(&mut self, op: &LmHeadCe, scratch: Scratch) -> Result<()> {
        self.cross_entropy(op, scratch)
    }
    fn lm_head_logits(&mut self, op: &LmHeadLogits) -> Result<()> {
        self.project_logits(op)
    }
    fn grad_norm(&mut self, op: &GradNorm, scratch: Scratch) -> Result<()> {
        self.global_norm(op, scratch)
    }
    fn adamw(&mut self, op: &AdamW) -> Result<()> {
        self.update(op);
        Ok(())
    }
    fn page_in(&mut self, op: &PageIn) -> Result<()> {
        self.launch_updates()?;
        // SAFETY of sizes: the window has the host region's shape.
        self.gpu.copy(self.ptr(op.window), self.ptr(op.host), self.region(op.host).bytes())
    }
    fn page_out(&mut self, op: &PageOut) -> Result<()> {
        self.launch_updates()?;
        self.gpu.copy(self.ptr(op.host), self.ptr(op.window), self.region(op.host).bytes())
    }
    fn offload(&mut self, op: &Offload) -> Result<()> {
        let (to, from, bytes) = (self.ptr(op.host), self.ptr(op.device), self.region(op.host).bytes());
        self.transfers.start(&self.gpu, op.device, to, from, bytes)
    }
    fn fetch(&mut self, op: &Fetch) -> Result<()> {
        let (to, from, bytes) = (self.ptr(op.device), self.ptr(op.host), self.region(op.host).bytes());
        self.transfers.start(&self.gpu, op.device, to, from, bytes)
    }
    fn transferred(&mut self, op: &Transferred) -> Result<()> {
        self.transfers.wait_for(&self.gpu, op.device)
    }
    fn dequantize(&mut self, op: &Dequantize) -> Result<()> {
        let (k, row) = (op.in_features, self.width(op.out));
        let beside = op.lora.map(|m| self.scaled_b(&m.lora, m.first));
        let numel = self.region(op.out).shape[0] * k;
        self.decode(&op.weight, numel, self.ptr(op.out), nf4::Rows { k, row, beside })
    }
    fn lora_b(&mut self, op: &LoraB) -> Result<()> {
        let (shape, k) = (&self.region(op.out).shape, op.in_features);
        let columns = self.columns_of_b(&op.lora.lora, self.ptr(op.out), shape[0], (k, op.lora.first, shape[1]));
        self.columns.push(columns);
        Ok(())
    }
    fn zero(&mut self, op: &Zero) -> Result<()> {
        self.launch_updates()?;
        let arrays: Vec<_> = op.tensors.iter().map(|&id| (self.ptr(id), self.region(id).bytes() as usize)).collect();
        optimizer::zero(&self.gpu, &arrays)
    }
}
