//! [`MemoryPlan`]: regions, placed.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use candle_core::DType;

use super::pack::{Block, align, pack};
use super::region::{Lifetime, Phase, Region, Space, Stage};
use super::scratch::scratch_bytes;
use super::{Checkpointing, DeviceKind, Gpu, Method, PlanConfig};
use crate::engine::layout::{Layout, layout};
use crate::engine::ops::{Op, Scratch};
use crate::engine::transformer::{Programs, programs};
use crate::lora::{Discovery, LoraConfig, Targets};
use crate::model::ModelSpec;
use crate::nf4::Nf4Config;
use crate::train::Optim;
use crate::{Error, Result};

/// The fewest positions of KV cache that a plan reserves when it is not told.
const MIN_CONTEXT: usize = 256;

/// Every byte of a run: what the engine allocates once and never adds to.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
///
/// ```
/// use tunebook::plan::MemoryPlan;
/// use tunebook::model::ModelSpec;
/// let spec = ModelSpec::preset("mistral-7b-v0.1")?;
/// let plan = MemoryPlan::qlora(&spec).r(64).batch(4).seq(512).build()?;
/// assert!(plan.arena_bytes() < 8_000_000_000);
/// # Ok::<(), tunebook::Error>(())
/// ```
#[derive(Clone)]
pub struct MemoryPlan(Arc<Inner>);

struct Inner {
    spec: ModelSpec,
    config: PlanConfig,
    targets: Option<Discovery>,
    layout: Layout,
    programs: Programs,
    scratch: BTreeMap<Phase, Vec<Scratch>>,
    persistent: u64,
    phases: BTreeMap<Phase, u64>,
    host: u64,
    context: usize,
}

/// One row of the memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageBytes {
    /// What the bytes are for; `None`: space that the placement leaves unused when most is alive, with alignment.
    pub stage: Option<Stage>,
    /// Bytes in the device's arena.
    pub device: u64,
    /// Bytes on the host.
    pub host: u64,
    /// Number of regions.
    pub regions: usize,
}

/// What is alive at one operation.
#[derive(Clone, Debug, PartialEq)]
pub struct TimelinePoint {
    /// The phase.
    pub phase: Phase,
    /// Index of the operation in its phase.
    pub index: usize,
    /// Name of the operation.
    pub op: &'static str,
    /// Bytes alive in the arena by stage, in the order of [`Stage::ALL`].
    pub bytes: [u64; Stage::ALL.len()],
}

impl TimelinePoint {
    /// All bytes alive in the arena.
    pub fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

impl MemoryPlan {
    /// QLoRA: NF4 with nested quantization, LoRA of rank 16 on all linear layers, bf16 compute, every layer
    /// recomputed. Change what differs, then [`PlanBuilder::build`].
    pub fn qlora(spec: &ModelSpec) -> PlanBuilder {
        PlanBuilder::new(spec, Method::Qlora)
    }

    /// LoRA on a dense base.
    pub fn lora(spec: &ModelSpec) -> PlanBuilder {
        PlanBuilder::new(spec, Method::Lora)
    }

    /// Full fine-tuning.
    pub fn full(spec: &ModelSpec) -> PlanBuilder {
        PlanBuilder::new(spec, Method::Full)
    }

    /// Generation and evaluation only, dense; [`PlanBuilder::quantization`] makes it 4-bit.
    pub fn inference(spec: &ModelSpec) -> PlanBuilder {
        PlanBuilder::new(spec, Method::Inference)
    }

    /// The plan of a saved configuration.
    ///
    /// # Errors
    /// As [`PlanBuilder::build`].
    pub fn new(spec: &ModelSpec, config: PlanConfig) -> Result<Self> {
        config.validate(spec)?;
        let targets = config.lora.as_ref().map(|lora| lora.discover(spec)).transpose()?;
        // Every pattern of ranks and scalings on every module, so that the layout meets no surprise.
        if let (Some(lora), Some(modules)) = (&config.lora, &targets) {
            lora.params(modules)?;
        }
        if let Some(m) = targets.iter().flat_map(|t| &t.matched).find(|m| m.layer.is_none()) {
            return Err(Error::new("this module cannot be adapted in the engine")
                .at("target_modules")
                .expected("linear modules of the decoder layers")
                .found(m.name.clone())
                .next("leave it out; an adapter that has it can be read and merged: lora::merge"));
        }
        let names: HashSet<String> = targets.iter().flat_map(|t| &t.matched).map(|m| m.name.clone()).collect();
        let base = layout(spec, &config, &names);
        // The cache takes what training leaves: plan without it, then fill up.
        let (context, (layout, programs, placed)) = match config.max_context {
            Some(n) => (n, place(spec, &config, base, n)),
            None => place_and_fill(spec, &config, &base),
        };
        Ok(MemoryPlan(Arc::new(Inner {
            spec: spec.clone(),
            config,
            targets,
            layout,
            programs,
            scratch: placed.scratch,
            persistent: placed.persistent,
            phases: placed.phases,
            host: placed.host,
            context,
        })))
    }

    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        &self.0.spec
    }

    /// What was asked for.
    pub fn config(&self) -> &PlanConfig {
        &self.0.config
    }

    /// The modules that get an adapter, and those that do not; `None` without an adapter.
    pub fn targets(&self) -> Option<&Discovery> {
        self.0.targets.as_ref()
    }

    /// Bytes of the one allocation on the device.
    pub fn arena_bytes(&self) -> u64 {
        self.0.persistent + self.phase_space()
    }

    /// Bytes that the process will hold on a card, as `nvidia-smi` shows them: the arena in whole pages of 2 MiB, and the
    /// CUDA context with the loaded kernels ([`Gpu::context_bytes`]).
    pub fn process_bytes(&self, gpu: &Gpu) -> u64 {
        self.arena_bytes().next_multiple_of(2 << 20) + gpu.context_bytes
    }

    /// Bytes of (pinned) host memory: paged optimizer state, and what the plan keeps there to save space on the card.
    pub fn host_bytes(&self) -> u64 {
        self.0.host
    }

    /// Heap bytes that one operation of the CPU backend allocates beside the arena and gives back, at most: an upper bound
    /// for this machine and rayon's number of threads, well below a MiB for two. 0 on a GPU, whose libraries get their
    /// workspaces from the arena.
    ///
    /// The matrix products' library (`gemm`) also keeps a buffer of the size of the L2 cache for each thread, from the
    /// first product to the end of the process.
    pub fn transient_bytes(&self) -> u64 {
        match self.0.config.device {
            DeviceKind::Cpu => crate::engine::cpu::transient_bytes(self.0.config.capacity(), self.0.config.ce_chunk),
            DeviceKind::Cuda => 0,
        }
    }

    /// Bytes that outlive phases: weights, adapters, gradients, optimizer state.
    pub fn persistent_bytes(&self) -> u64 {
        self.0.persistent
    }

    /// Bytes that the phases reuse: what the largest of them needs.
    pub fn phase_space(&self) -> u64 {
        self.0.phases.values().copied().max().unwrap_or(0)
    }

    /// Bytes that one phase needs beside the persistent ones.
    pub fn phase_bytes(&self, phase: Phase) -> u64 {
        self.0.phases.get(&phase).copied().unwrap_or(0)
    }

    /// Positions that the KV cache holds.
    pub fn max_context(&self) -> usize {
        self.0.context
    }

    /// Number of trained parameters.
    pub fn trainable_params(&self) -> u64 {
        self.0.layout.trainables.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum()
    }

    /// All parameters: the base and the adapter.
    pub fn total_params(&self) -> u64 {
        let lora = self.0.targets.iter().zip(&self.0.config.lora);
        // The patterns were checked with the configuration.
        let adapter = lora.map(|(t, lora)| lora.params(t).unwrap_or_default()).sum::<u64>();
        self.0.spec.total_params() + adapter
    }

    /// Every region, with its lifetime and its offset; scratch is in [`MemoryPlan::timeline`] alone.
    pub fn regions(&self) -> &[Region] {
        &self.0.layout.regions
    }

    /// The operations of a phase, in order.
    pub fn program(&self, phase: Phase) -> &[Op] {
        self.0.programs.of(phase)
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// Where the scratch of each operation of a phase lies.
    pub(crate) fn scratch(&self, phase: Phase) -> &[Scratch] {
        self.0.scratch.get(&phase).map_or(&[], Vec::as_slice)
    }

    /// The memory table: persistent stages, what is alive at the operation where most is, and what the placement
    /// leaves unused there. The device column adds up to [`MemoryPlan::arena_bytes`].
    pub fn table(&self) -> Vec<StageBytes> {
        let peak = self.peak();
        let mut rows = Vec::new();
        for (i, stage) in Stage::ALL.into_iter().enumerate() {
            let of_stage = |r: &&Region| r.stage == stage;
            let device = peak.as_ref().map_or(0, |p| p.bytes[i]);
            let host = self
                .regions()
                .iter()
                .filter(of_stage)
                .filter(|r| r.space == Space::Host)
                .map(|r| align(r.bytes()))
                .sum();
            let regions = self.regions().iter().filter(of_stage).count();
            if device + host > 0 {
                rows.push(StageBytes { stage: Some(stage), device, host, regions });
            }
        }
        let used: u64 = rows.iter().map(|r| r.device).sum();
        let spare = self.arena_bytes().saturating_sub(used);
        if spare > 0 {
            rows.push(StageBytes { stage: None, device: spare, host: 0, regions: 0 });
        }
        rows
    }

    /// The operation at which most bytes are alive, in the phase that needs most space.
    pub fn peak(&self) -> Option<TimelinePoint> {
        let phase = self.largest_phase()?;
        // The first of equals, so that the answer does not depend on the iteration order.
        self.timeline(phase).into_iter().rev().max_by_key(TimelinePoint::total)
    }

    /// The phase that needs most space.
    pub fn largest_phase(&self) -> Option<Phase> {
        self.0.phases.iter().rev().max_by_key(|(_, bytes)| **bytes).map(|(p, _)| *p)
    }

    /// What is alive at each operation of a phase, bytes aligned as in the arena.
    pub fn timeline(&self, phase: Phase) -> Vec<TimelinePoint> {
        let program = self.program(phase);
        let column = |stage: Stage| Stage::ALL.iter().position(|s| *s == stage).unwrap_or(0);
        let mut persistent = [0u64; Stage::ALL.len()];
        let mut delta = vec![[0i64; Stage::ALL.len()]; program.len() + 1];
        for r in self.regions().iter().filter(|r| r.space == Space::Device) {
            let (c, bytes) = (column(r.stage), align(r.bytes()));
            match r.lifetime {
                Lifetime::Persistent => persistent[c] += bytes,
                Lifetime::Within { phase: p, first, last } if p == phase && first <= last => {
                    delta[first as usize][c] += bytes as i64;
                    delta[last as usize + 1][c] -= bytes as i64;
                }
                Lifetime::Within { .. } => {}
            }
        }
        let mut live = [0i64; Stage::ALL.len()];
        let mut out = Vec::with_capacity(program.len());
        for (index, op) in program.iter().enumerate() {
            let mut bytes = persistent;
            for c in 0..live.len() {
                live[c] += delta[index][c];
                bytes[c] += live[c] as u64;
            }
            bytes[column(Stage::Scratch)] += align(self.scratch(phase)[index].bytes);
            out.push(TimelinePoint { phase, index, op: op.name(), bytes });
        }
        out
    }
}

/// What the placement found.
struct Placed {
    scratch: BTreeMap<Phase, Vec<Scratch>>,
    persistent: u64,
    phases: BTreeMap<Phase, u64>,
    host: u64,
}

const PHASES: [Phase; 5] = [Phase::MicroStep, Phase::Optimizer, Phase::Evaluate, Phase::Logits, Phase::Generate];

/// Programs and offsets for a KV cache of `context` positions.
fn place(spec: &ModelSpec, config: &PlanConfig, mut layout: Layout, context: usize) -> (Layout, Programs, Placed) {
    let programs = programs(spec, config, &mut layout, context);
    let (mut persistent, mut host) = (0, 0);
    // The gradients of A of modules that share their input, one after the other: a GPU adds to them in one product.
    let of_a = |r: &Region| r.stage == Stage::Gradients && r.name.ends_with(".lora_A.weight");
    let (last, first): (Vec<_>, Vec<_>) = layout.regions.iter_mut().partition(|r| of_a(r));
    for r in first.into_iter().chain(last) {
        if r.lifetime == Lifetime::Persistent {
            let end = if r.space == Space::Host { &mut host } else { &mut persistent };
            r.offset = *end;
            *end += align(r.bytes());
        }
    }
    let (mut scratch, mut phases) = (BTreeMap::new(), BTreeMap::new());
    for phase in PHASES {
        let program = programs.of(phase);
        if program.is_empty() {
            continue;
        }
        let (places, bytes) = place_phase(&mut layout.regions, phase, program, config, persistent);
        scratch.insert(phase, places);
        phases.insert(phase, bytes);
    }
    (layout, programs, Placed { scratch, persistent, phases, host })
}

/// Places the regions and the scratch of one phase after `base`; the scratch of each operation, and the phase's bytes.
fn place_phase(
    regions: &mut [Region],
    phase: Phase,
    program: &[Op],
    config: &PlanConfig,
    base: u64,
) -> (Vec<Scratch>, u64) {
    let mut blocks = Vec::new();
    let mut owners = Vec::new();
    for (i, r) in regions.iter().enumerate() {
        if let Lifetime::Within { phase: p, first, last } = r.lifetime
            && p == phase
            && first <= last
        {
            blocks.push(Block { bytes: r.bytes(), first, last });
            owners.push(i);
        }
    }
    let mut scratch = vec![Scratch::default(); program.len()];
    for (i, op) in program.iter().enumerate() {
        scratch[i].bytes = scratch_bytes(op, regions, config.device, config.compute_dtype);
        if scratch[i].bytes > 0 {
            blocks.push(Block { bytes: scratch[i].bytes, first: i as u32, last: i as u32 });
        }
    }
    let (offsets, total) = pack(&blocks);
    for (owner, offset) in owners.iter().zip(&offsets) {
        regions[*owner].offset = base + offset;
    }
    let with_scratch = scratch.iter_mut().filter(|s| s.bytes > 0);
    for (s, offset) in with_scratch.zip(&offsets[owners.len()..]) {
        s.offset = base + offset;
    }
    (scratch, total)
}

/// A plan of single operations over regions of their own, so that a backend's operations can be tested one by one.
#[cfg(test)]
pub(crate) fn of_ops(
    spec: ModelSpec,
    mut regions: Vec<Region>,
    program: Vec<Op>,
    device: DeviceKind,
    compute_dtype: DType,
) -> MemoryPlan {
    let workspace = (device == DeviceKind::Cuda).then(|| {
        regions.push(Region {
            name: "matrix-product workspace".into(),
            stage: Stage::Scratch,
            dtype: DType::U8,
            shape: vec![crate::engine::layout::MATMUL_WORKSPACE],
            space: Space::Device,
            lifetime: Lifetime::Persistent,
            offset: 0,
        });
        crate::engine::ops::TensorId(regions.len() as u32 - 1)
    });
    let (mut end, mut host) = (0, 0);
    for r in &mut regions {
        let end = if r.space == Space::Host { &mut host } else { &mut end };
        r.offset = *end;
        *end += align(r.bytes());
    }
    let config = PlanBuilder::new(&spec, Method::Inference).device(device).compute_dtype(compute_dtype).config;
    let (scratch, bytes) = place_phase(&mut regions, Phase::MicroStep, &program, &config, end);
    let none = crate::engine::ops::TensorId(0);
    let dense = crate::engine::layout::NormIds { weight: none, grad: None };
    let layout = Layout {
        regions,
        embedding: dense,
        layers: Vec::new(),
        norm: dense,
        lm_head: dense,
        inv_freq: none,
        workspace,
        trainables: Vec::new(),
        weights: Vec::new(),
        dequantize: Vec::new(),
        adapters: BTreeMap::new(),
        grad_norm: none,
        loss: none,
    };
    MemoryPlan(Arc::new(Inner {
        spec,
        config,
        targets: None,
        layout,
        programs: Programs { micro_step: program, ..Programs::default() },
        scratch: [(Phase::MicroStep, scratch)].into(),
        persistent: end,
        phases: [(Phase::MicroStep, bytes)].into(),
        host,
        context: 0,
    }))
}

/// [`place`] with as many positions of KV cache as fit into the space that the other phases need anyway.
fn place_and_fill(spec: &ModelSpec, config: &PlanConfig, base: &Layout) -> (usize, (Layout, Programs, Placed)) {
    let (_, _, placed) = place(spec, config, base.clone(), 1);
    let per_position =
        2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * config.compute_dtype.size_in_bytes();
    let generate = placed.phases.get(&Phase::Generate).copied().unwrap_or(0);
    let space = placed.phases.values().copied().max().unwrap_or(0);
    // Alignment takes at most one unit for each of the 2 L caches.
    let slack = 2 * spec.num_hidden_layers as u64 * super::ALIGNMENT;
    let least = MIN_CONTEXT.min(spec.max_position_embeddings);
    let within = |fits: u64| (fits as usize).clamp(least, spec.max_position_embeddings);
    let mut context = within(space.saturating_sub(generate + slack) / per_position as u64);
    // Caches of another size may be placed with gaps between them.
    let mut tries = 0;
    loop {
        let all = place(spec, config, base.clone(), context);
        let over = all.2.phases.get(&Phase::Generate).copied().unwrap_or(0).saturating_sub(space);
        if over == 0 || context == least || tries == 8 {
            return (context, all);
        }
        context = within((context as u64).saturating_sub(over.div_ceil(per_position as u64)));
        tries += 1;
    }
}

/// Sets what differs from the defaults of a method.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, Debug)]
pub struct PlanBuilder {
    spec: ModelSpec,
    config: PlanConfig,
}

impl PlanBuilder {
    fn new(spec: &ModelSpec, method: Method) -> Self {
        let lora = matches!(method, Method::Lora | Method::Qlora).then(LoraConfig::default);
        let quantization = (method == Method::Qlora).then(Nf4Config::default);
        let config = PlanConfig {
            method,
            quantization,
            lora,
            optim: Optim::AdamW,
            resident_state: false,
            micro_batch_size: 1,
            max_seq_length: 512.min(spec.max_position_embeddings),
            checkpointing: Checkpointing::All,
            device: DeviceKind::Cuda,
            compute_dtype: DType::BF16,
            ce_chunk: 256,
            host_embeddings: false,
            host_checkpoints: false,
            keep_dequantized: false,
            keep_dequantized_modules: None,
            dequantized_layers: 0,
            max_context: None,
        };
        PlanBuilder { spec: spec.clone(), config }
    }

    /// Computes on the CPU, in f32.
    pub fn cpu(mut self) -> Self {
        self.config.device = DeviceKind::Cpu;
        self.config.compute_dtype = DType::F32;
        self
    }

    /// What computes: a GPU in bf16 (default), or the CPU in f32.
    pub fn device(mut self, device: DeviceKind) -> Self {
        self.config.device = device;
        self.config.compute_dtype = if device == DeviceKind::Cpu { DType::F32 } else { DType::BF16 };
        self
    }

    /// dtype of activations and matrix products: BF16 (default on a GPU) or F32.
    pub fn compute_dtype(mut self, dtype: DType) -> Self {
        self.config.compute_dtype = dtype;
        self
    }

    /// Sequences per micro-batch.
    pub fn batch(mut self, micro_batch_size: usize) -> Self {
        self.config.micro_batch_size = micro_batch_size;
        self
    }

    /// Tokens per sequence.
    pub fn seq(mut self, max_seq_length: usize) -> Self {
        self.config.max_seq_length = max_seq_length;
        self
    }

    /// The adapter as a whole.
    pub fn adapter(mut self, lora: LoraConfig) -> Self {
        self.config.lora = Some(lora);
        self
    }

    /// LoRA rank.
    pub fn r(self, r: usize) -> Self {
        self.with_lora(|l| l.r = r)
    }

    /// LoRA's scale numerator: the update is scaled by `lora_alpha / r`.
    pub fn lora_alpha(self, lora_alpha: f64) -> Self {
        self.with_lora(|l| l.lora_alpha = lora_alpha)
    }

    /// Probability that an input element of A is dropped in training.
    pub fn lora_dropout(self, lora_dropout: f64) -> Self {
        self.with_lora(|l| l.lora_dropout = lora_dropout)
    }

    /// The modules that get an adapter: `"all-linear"`, `"q_proj,v_proj"`, a list, or a [`Targets`].
    pub fn targets(self, targets: impl Into<Targets>) -> Self {
        let targets = targets.into();
        self.with_lora(|l| l.target_modules = targets)
    }

    fn with_lora(mut self, change: impl FnOnce(&mut LoraConfig)) -> Self {
        change(self.config.lora.get_or_insert_with(LoraConfig::default));
        self
    }

    /// The optimizer.
    pub fn optim(mut self, optim: Optim) -> Self {
        self.config.optim = optim;
        self
    }

    /// Keeps the state of a paged optimizer on the device.
    pub fn resident_state(mut self, on: bool) -> Self {
        self.config.resident_state = on;
        self
    }

    /// Which layers are recomputed in the backward pass.
    pub fn checkpointing(mut self, checkpointing: Checkpointing) -> Self {
        self.config.checkpointing = checkpointing;
        self
    }

    /// How the linear weights are quantized; `None`: dense.
    pub fn quantization(mut self, quantization: Option<Nf4Config>) -> Self {
        self.config.quantization = quantization;
        self
    }

    /// Nested quantization of the scales (QLoRA's double quantization), on or off.
    pub fn double_quant(mut self, on: bool) -> Self {
        if let Some(q) = &mut self.config.quantization {
            q.double_quant = on;
        }
        self
    }

    /// Full fine-tuning with weights, gradients and moments all in bf16.
    pub fn pure_bf16(mut self) -> Self {
        self.config.method = Method::FullPureBf16;
        self
    }

    /// Rows of logits that the loss holds at a time; `usize::MAX`: all of them.
    pub fn ce_chunk(mut self, rows: usize) -> Self {
        self.config.ce_chunk = rows;
        self
    }

    /// Keeps the embedding table in pinned host memory: 262 MB of a Mistral-7B less on the card, for one row over the bus
    /// for each token. Not for tied embeddings or full fine-tuning.
    pub fn host_embeddings(mut self, on: bool) -> Self {
        self.config.host_embeddings = on;
        self
    }

    /// Keeps the inputs of recomputed layers in pinned host memory, copied there and back beside the computation:
    /// `layers x tokens x hidden_size` elements less on the card.
    pub fn host_checkpoints(mut self, on: bool) -> Self {
        self.config.host_checkpoints = on;
        self
    }

    /// Decodes the 4-bit weights of a recomputed layer once for the recomputation and the backward pass instead of twice.
    /// Spends the memory of one layer in the compute dtype.
    pub fn keep_dequantized(mut self, on: bool) -> Self {
        self.config.keep_dequantized = on;
        self.config.keep_dequantized_modules = None;
        self
    }

    /// The same for the modules with these names alone (`q_proj`, `up_proj`), where not all fit: of each, `out_features x in_features`
    /// elements of the compute dtype. Not `down_proj`, whose product is not recomputed. [`build`](Self::build) refuses names that the
    /// model does not have.
    pub fn keep_dequantized_modules<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.config.keep_dequantized = true;
        self.config.keep_dequantized_modules = Some(names.into_iter().map(Into::into).collect());
        self
    }

    /// Holds the base weights of the first `layers` layers dequantized beside their 4-bit codes: training decodes them once, when they
    /// are loaded, instead of in every pass. Spends `out_features x in_features` elements of the compute dtype for each of their modules (a layer of a
    /// Mistral-7B: 416 MiB), and changes no number. [`fit`](Self::fit) holds as many of them as there is room for.
    /// [`build`](Self::build) refuses more layers than the model has, and every method but QLoRA.
    pub fn dequantized_layers(mut self, layers: usize) -> Self {
        self.config.dequantized_layers = layers;
        self
    }

    /// Positions of the KV cache.
    pub fn context(mut self, positions: usize) -> Self {
        self.config.max_context = Some(positions);
        self
    }

    /// The plan.
    ///
    /// # Errors
    /// Values that contradict each other or the model, and target modules that the model does not have.
    pub fn build(self) -> Result<MemoryPlan> {
        MemoryPlan::new(&self.spec, self.config)
    }
}
