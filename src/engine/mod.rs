//! The transformer, forward and backward, as lists of operations, and the engine that executes them inside one arena.
//!
//! [`ops`] says what the operations are; `transformer` writes each phase as a list of them; [`crate::plan`] places what
//! they touch; a backend ([`cpu`]) executes them. [`Engine`] puts these together.

pub mod backend;
pub mod cpu;
pub mod cuda;
mod decoder;
pub mod dropout;
pub(crate) mod layout;
mod load;
pub mod ops;
pub mod optimizer;
mod tensors;
pub(crate) mod transformer;
mod uses;

pub use layout::{MIN_PAGED_SIZE, Trainable};
pub use tensors::StateTensor;

use std::collections::BTreeMap;
use std::time::Instant;

use crate::data::{Batch, IGNORE_INDEX};
use crate::plan::{DeviceKind, Lifetime, MemoryPlan, Phase, Region, Stage};
use crate::{Error, Result};
use backend::{Backend, StepState};
use cpu::CpuOps;
use cuda::CudaOps;
use ops::{Op, TensorId};
use optimizer::AdamWHyper;

/// A model in its arena: takes steps, evaluates, gives logits, generates.
///
/// `notebooks/10_mistral_7b_on_your_gpu.ipynb` explains it.
///
/// It allocates [`MemoryPlan::arena_bytes`] once and nothing that lasts afterwards. Weights come in by
/// [`Engine::load`].
pub struct Engine {
    plan: MemoryPlan,
    ops: Box<dyn Backend>,
    /// The phase that was being executed when something went wrong, or is being executed.
    interrupted: Option<Phase>,
    seconds: BTreeMap<&'static str, f64>,
    /// Of the last micro-step: until the loss, and after it.
    pass_seconds: (f64, f64),
    fill_dead: bool,
    /// Waits for the device after each operation.
    profile: bool,
    /// A load began and did not end.
    half_loaded: bool,
    /// Tokens in the KV cache; `None`: its space was used by another phase.
    cached: Option<usize>,
}

/// The summed loss of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Sum of the cross-entropy (natural logarithm) of every token that has a label.
    pub sum: f64,
    /// Number of those tokens.
    pub tokens: u64,
}

impl LossSum {
    /// Mean cross-entropy per token; NaN when there is none.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens as f64
    }
}

/// What an optimizer step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNorm {
    /// Global L2 norm of the accumulated gradients, before clipping.
    pub norm: f64,
    /// The factor by which they were scaled, 1 when nothing was clipped.
    pub clip: f64,
}

impl Engine {
    /// Allocates the plan's arena.
    ///
    /// # Errors
    /// No GPU where the plan wants one, libraries that are missing; memory that the device does not give.
    pub fn new(plan: &MemoryPlan) -> Result<Self> {
        let ops: Box<dyn Backend> = match plan.config().device {
            DeviceKind::Cpu => Box::new(CpuOps::new(plan, StepState::default())?),
            DeviceKind::Cuda => Box::new(CudaOps::new(plan, StepState::default())?),
        };
        let mut engine = Engine {
            plan: plan.clone(),
            ops,
            interrupted: None,
            seconds: BTreeMap::new(),
            pass_seconds: (0.0, 0.0),
            fill_dead: false,
            profile: false,
            half_loaded: false,
            cached: Some(0),
        };
        engine.write_frequencies()?;
        if engine.ops.wants_rehearsal() {
            engine.rehearse()?;
        }
        Ok(engine)
    }

    fn write_frequencies(&mut self) -> Result<()> {
        let spec = self.plan.spec();
        let frequencies: Vec<f32> =
            spec.inv_freq().into_iter().chain(spec.long_inv_freq().unwrap_or_default()).collect();
        self.ops.write(self.plan.layout().inv_freq, bytemuck::cast_slice(&frequencies))
    }

    /// Executes every phase once on a full batch over zeroed memory, then clears it: a GPU's libraries load a kernel when
    /// it is first used, which must not happen in the middle of a run.
    fn rehearse(&mut self) -> Result<()> {
        let config = self.plan.config().clone();
        let (batch, seq) = (config.micro_batch_size as u32, config.max_seq_length as u32);
        let full = |batch: u32, seq: u32| {
            let n = (batch * seq) as usize;
            Batch {
                input_ids: vec![0; n],
                positions: (0..batch).flat_map(|_| 0..seq).collect(),
                labels: vec![0; n],
                cu_seqlens: (0..=batch).map(|i| i * seq).collect(),
                examples: (0..batch as usize).collect(),
            }
        };
        for phase in [Phase::MicroStep, Phase::Optimizer, Phase::Evaluate, Phase::Generate] {
            if self.plan.program(phase).is_empty() {
                continue;
            }
            match phase {
                Phase::Optimizer => {}
                Phase::Generate => {
                    let piece = (transformer::prompt_piece(&config) as u32).min(self.plan.max_context() as u32);
                    self.accept(full(1, piece))?;
                    self.execute(phase)?;
                    self.accept(full(1, 1))?;
                }
                _ => self.accept(full(batch, seq))?,
            }
            self.ops.state().training = phase == Phase::MicroStep;
            self.execute(phase)?;
        }
        self.ops.clear()?;
        self.write_frequencies()?;
        self.take_seconds();
        self.take_pass_seconds();
        self.cached = Some(0);
        Ok(())
    }

    /// The plan that the engine runs.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Fills every region with NaN when its life ends, so that a mistake in a lifetime shows as a NaN loss. For tests.
    pub fn fill_dead_regions(&mut self, on: bool) {
        self.fill_dead = on;
    }

    /// Switches the adapter off or on for evaluation and generation: the base model alone, or with what was learnt.
    pub fn enable_adapter(&mut self, on: bool) {
        self.ops.state().adapter = on;
        self.cached = None;
    }

    /// On a GPU operations run behind the program: with `on`, each is waited for, so that [`Engine::take_seconds`] says what
    /// it took. Slower.
    pub fn profile(&mut self, on: bool) {
        self.profile = on;
    }

    /// The device that computes, as its driver names it; `cpu` on the CPU.
    pub fn device_name(&self) -> String {
        self.ops.device_name()
    }

    /// Bytes of device memory that this process holds, as `nvidia-smi` shows it: the arena, the CUDA context and the loaded
    /// kernels. `None` on the CPU, or where the driver does not say.
    pub fn process_bytes(&self) -> Option<u64> {
        self.ops.process_bytes()
    }

    /// Seconds spent in each kind of operation since the last call.
    pub fn take_seconds(&mut self) -> Vec<(&'static str, f64)> {
        let out = self.seconds.iter().filter(|(_, s)| **s > 0.0).map(|(name, s)| (*name, *s)).collect();
        self.seconds.values_mut().for_each(|s| *s = 0.0);
        out
    }

    /// Seconds of the forward and of the backward pass since the last call.
    pub fn take_pass_seconds(&mut self) -> (f64, f64) {
        std::mem::take(&mut self.pass_seconds)
    }

    /// Whether an operation failed or panicked: the engine then refuses to go on.
    pub fn has_failed(&self) -> bool {
        self.interrupted.is_some()
    }

    /// Forward and backward pass of one micro-batch; gradients are added to what is there, each token's scaled by
    /// 1 / `num_items`.
    ///
    /// `num_items` is the number of labels in all micro-batches of the step, so that the loss is the mean over the
    /// accumulated batch. `micro_step` counts micro-steps since the run began and `seed` is the run's: they choose
    /// the dropout masks.
    ///
    /// # Errors
    /// A batch beyond the plan's capacity, tokens outside the vocabulary, an engine that failed before.
    pub fn micro_step(&mut self, batch: Batch, num_items: usize, seed: u64, micro_step: u64) -> Result<LossSum> {
        if self.plan.program(Phase::MicroStep).is_empty() {
            return Err(Error::new("nothing is trained under this plan")
                .at("method")
                .expected("full fine-tuning, LoRA or QLoRA")
                .found(self.plan.config().method.label()));
        }
        if !self.ops.state().adapter {
            return Err(Error::new("the adapter is switched off").next("call enable_adapter(true) before training"));
        }
        self.accept(batch)?;
        let state = self.ops.state();
        state.loss_scale = 1.0 / num_items.max(1) as f32;
        state.dropout_seed = seed;
        state.micro_step = micro_step;
        state.training = true;
        self.execute(Phase::MicroStep)?;
        self.loss()
    }

    /// Clips the accumulated gradients to `max_grad_norm` (0: not at all), updates every trained tensor, and sets the
    /// gradients to zero. `grad_scale` of `hyper` is ignored: the clip factor takes its place.
    ///
    /// # Errors
    /// An engine that failed before.
    pub fn optimizer_step(&mut self, hyper: AdamWHyper, max_grad_norm: f64) -> Result<GradNorm> {
        self.ops.state().adamw = hyper;
        self.ops.state().max_grad_norm = max_grad_norm;
        self.execute(Phase::Optimizer)?;
        let v = self.read::<f64>(self.plan.layout().grad_norm)?;
        Ok(GradNorm { norm: v[0], clip: v[1] })
    }

    /// The loss of a batch, without dropout and without gradients.
    ///
    /// # Errors
    /// As [`Engine::micro_step`].
    pub fn evaluate(&mut self, batch: Batch) -> Result<LossSum> {
        self.accept(batch)?;
        self.ops.state().training = false;
        self.execute(Phase::Evaluate)?;
        self.loss()
    }

    /// All logits of a batch, f32 `[T, V]` row-major.
    ///
    /// # Errors
    /// As [`Engine::micro_step`].
    pub fn logits(&mut self, batch: Batch) -> Result<Vec<f32>> {
        self.accept(batch)?;
        self.ops.state().training = false;
        self.execute(Phase::Logits)?;
        Ok(self.ops.logits().to_vec())
    }

    fn loss(&self) -> Result<LossSum> {
        let v = self.read::<f64>(self.plan.layout().loss)?;
        Ok(LossSum { sum: v[0], tokens: v[1] as u64 })
    }

    /// Checks a batch against the plan and holds it for `load_batch`.
    fn accept(&mut self, batch: Batch) -> Result<()> {
        let plan = self.plan.clone();
        let (spec, config) = (plan.spec(), plan.config());
        let beyond = |what: &str, expected: String, found: String| {
            Err(Error::new(format!("the batch has {what}")).at("batch").expected(expected).found(found))
        };
        let capacity = config.capacity();
        if batch.tokens() == 0 {
            return beyond("no tokens", "at least one".into(), "none".into());
        }
        if batch.tokens() > capacity {
            let expected = format!("at most {capacity} = {} x {}", config.micro_batch_size, config.max_seq_length);
            return beyond("more tokens than the plan", expected, batch.tokens().to_string())
                .map_err(|e: Error| e.next("plan with a larger .batch() or .seq(), or use fewer or shorter examples"));
        }
        // The fields are public: kernels trust them from here on.
        let (n, ends) = (batch.tokens(), &batch.cu_seqlens);
        if batch.positions.len() != n || batch.labels.len() != n {
            let found = format!("{} positions, {} labels", batch.positions.len(), batch.labels.len());
            return beyond("parts of different lengths", format!("{n} of each, as tokens"), found);
        }
        if ends.first() != Some(&0) || ends.last() != Some(&(n as u32)) || ends.windows(2).any(|w| w[0] >= w[1]) {
            let expected = format!("cu_seqlens rising from 0 to {n}");
            return beyond("examples that do not cover its tokens", expected, format!("{ends:?}"));
        }
        if let Some(id) = batch.input_ids.iter().find(|&&id| id as usize >= spec.vocab_size) {
            return beyond("a token outside the vocabulary", format!("below {}", spec.vocab_size), id.to_string());
        }
        let wrong = |l: &&i32| **l != IGNORE_INDEX && (**l < 0 || **l as usize >= spec.vocab_size);
        if let Some(label) = batch.labels.iter().find(wrong) {
            return beyond("a label outside the vocabulary", format!("below {}", spec.vocab_size), label.to_string());
        }
        let longest = batch.positions.iter().max().copied().unwrap_or(0) as usize + 1;
        if longest > spec.max_position_embeddings {
            let expected = format!("at most max_position_embeddings = {}", spec.max_position_embeddings);
            return beyond("an example that is too long", expected, format!("{longest} tokens"));
        }
        self.ops.state().long_text = spec.rope_switch().is_some_and(|n| longest > n);
        self.ops.set_batch(batch);
        Ok(())
    }

    /// Executes a phase's program.
    fn execute(&mut self, phase: Phase) -> Result<()> {
        if let Some(phase) = self.interrupted {
            return Err(Error::new("the engine stopped in the middle of an operation and cannot go on")
                .at(phase.label())
                .next("resume the run from its last checkpoint, or build the engine again"));
        }
        if self.half_loaded {
            return Err(Error::new("the weights are loaded in part: loading failed or was interrupted")
                .at(phase.label())
                .next("load the base again"));
        }
        if phase != Phase::Generate {
            self.cached = None;
        }
        // Stays set when an operation fails or panics.
        self.interrupted = Some(phase);
        let plan = self.plan.clone();
        let scratch = plan.scratch(phase);
        let mut backward = false;
        self.ops.begin()?;
        for (i, op) in plan.program(phase).iter().enumerate() {
            let start = Instant::now();
            self.ops.run(op, scratch[i])?;
            if self.profile {
                self.ops.wait()?;
            }
            let seconds = start.elapsed().as_secs_f64();
            *self.seconds.entry(op.name()).or_default() += seconds;
            if phase == Phase::MicroStep {
                *(if backward { &mut self.pass_seconds.1 } else { &mut self.pass_seconds.0 }) += seconds;
                backward |= matches!(op, Op::LmHeadCe(_));
            }
            if self.fill_dead {
                let dead = dead_after(&plan, phase, i as u32);
                self.ops.poison(&dead, scratch[i])?;
            }
        }
        self.ops.wait()?;
        self.interrupted = None;
        Ok(())
    }
}

/// The regions whose life ends with operation `i`. A cache lives on from one run of its phase to the next.
fn dead_after(plan: &MemoryPlan, phase: Phase, i: u32) -> Vec<TensorId> {
    let ends = |r: &Region| {
        let Lifetime::Within { phase: p, first, last } = r.lifetime else { return false };
        p == phase && last == i && first <= last && r.stage != Stage::KvCache
    };
    let regions = plan.regions().iter().enumerate();
    regions.filter(|(_, r)| ends(r)).map(|(n, _)| TensorId(n as u32)).collect()
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (spec, config) = (self.plan.spec(), self.plan.config());
        write!(
            f,
            "Engine({}, {}, {} tokens per micro-batch, arena of {} bytes)",
            spec.name,
            config.method.label(),
            config.capacity(),
            self.plan.arena_bytes()
        )
    }
}
