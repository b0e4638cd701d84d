//! [`Estimate`]: what transformers + PEFT + bitsandbytes needs for a run, tensor by tensor, at the moments that can be
//! the peak.
//!
//! Our own [plan](crate::plan) is exact because the engine allocates from it. Another stack allocates as it goes, so
//! here each term is a tensor that its code is known to hold (read in transformers 5.23, peft 0.21 and bitsandbytes
//! 0.50), counted at three moments of one step; the largest is the peak that `torch.cuda.max_memory_allocated` shows.
//!
//! Letters: T = micro_batch_size x seq tokens, L layers, C hidden, F intermediate, Q = heads x head_dim,
//! KV = key/value heads x head_dim, V vocabulary. All results are bytes.

mod activations;
mod components;
mod config;

pub use config::{Attention, EstimateConfig, EstimateLoss, EstimateMethod};

use crate::model::ModelSpec;
use crate::{Error, Result};

/// What a tensor is for; the rows of a memory table are grouped by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The model's own weights, with the quantization's scales.
    Weights,
    /// LoRA A and B, and the 16-bit copies that autocast keeps of them.
    Adapter,
    /// Gradients of what is trained.
    Gradients,
    /// Optimizer moments and master weights.
    Optimizer,
    /// What the backward pass needs of the layers, and the KV cache in inference.
    Activations,
    /// Logits and their gradients.
    Logits,
    /// Temporaries and library workspaces.
    Workspace,
}

impl Part {
    /// Every part, in the order of a memory table.
    pub const ALL: [Part; 7] = [
        Part::Weights,
        Part::Adapter,
        Part::Gradients,
        Part::Optimizer,
        Part::Activations,
        Part::Logits,
        Part::Workspace,
    ];

    /// The name that a table shows.
    pub fn name(self) -> &'static str {
        match self {
            Part::Weights => "weights",
            Part::Adapter => "adapter",
            Part::Gradients => "gradients",
            Part::Optimizer => "optimizer",
            Part::Activations => "activations",
            Part::Logits => "logits",
            Part::Workspace => "workspace",
        }
    }
}

/// One tensor, or one group of equal ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// What it is, e.g. `absmax codes`.
    pub name: String,
    /// What it is for.
    pub part: Part,
    /// Its size in bytes when it is complete.
    pub bytes: u64,
    /// Bytes that are live at each of [`Estimate::moments`].
    pub live: Vec<u64>,
    /// How `bytes` comes about, with the numbers put in.
    pub formula: String,
}

/// A moment of one step, and what is live then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// What happens at this moment.
    pub name: String,
    /// Sum of what is live, bytes.
    pub bytes: u64,
}

/// The memory of one run under transformers + PEFT + bitsandbytes.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, PartialEq)]
pub struct Estimate {
    /// The model's name.
    pub model: String,
    /// What was asked.
    pub config: EstimateConfig,
    /// Everything that is held on the device at any of the moments.
    pub components: Vec<Component>,
    /// The moments that can be the peak, in the order of a step.
    pub moments: Vec<Moment>,
    /// Peak of the allocator in bytes: the largest of [`Estimate::moments`]. The CUDA context is not in it
    /// ([`Gpu::context_bytes`](super::Gpu)).
    pub total: u64,
    /// Optimizer state in paged (unified) memory, bytes: `nvidia-smi` sees it when it is resident, the allocator never.
    pub paged_bytes: u64,
    /// The tensors that autograd saves in one decoder layer; `live` is empty. Empty for inference.
    pub layer: Vec<Component>,
    /// Parameters that are trained.
    pub trainable_params: u64,
}

impl Estimate {
    /// Counts the memory of `config` on `spec`.
    ///
    /// # Errors
    /// A size of zero, a target that is no linear module of the model, or sizes whose product exceeds 2^64 bytes.
    ///
    /// ```
    /// # use tunebook::plan::{Estimate, EstimateConfig};
    /// # fn f(spec: tunebook::model::ModelSpec) -> tunebook::Result<()> {
    /// let config = EstimateConfig { micro_batch_size: 4, seq: 2048, ..EstimateConfig::qlora() };
    /// let estimate = Estimate::new(&spec, config)?;
    /// println!("{:.1} GB", estimate.total as f64 / 1e9);
    /// # Ok(()) }
    /// ```
    pub fn new(spec: &ModelSpec, config: EstimateConfig) -> Result<Estimate> {
        config.check(spec)?;
        let shape = components::Shape::new(spec, &config);
        let mut sheet = components::Sheet::new(config.method.trains());
        components::weights(&shape, &mut sheet);
        if config.method.trains() {
            components::adapter(&shape, &mut sheet);
            components::gradients(&shape, &mut sheet);
            components::optimizer(&shape, &mut sheet);
            activations::training(&shape, &mut sheet);
        } else {
            activations::inference(&shape, &mut sheet);
        }
        let layer = if config.method.trains() { activations::layer(&shape) } else { Vec::new() };
        sheet.finish(spec, config, layer, &shape)
    }

    /// The moment at which the peak is reached: an index into [`Estimate::moments`].
    pub fn peak(&self) -> usize {
        // The first of equal ones.
        self.moments.iter().position(|m| m.bytes == self.total).unwrap_or(0)
    }

    /// Bytes of one part at the peak.
    pub fn at_peak(&self, part: Part) -> u64 {
        let peak = self.peak();
        self.components.iter().filter(|c| c.part == part).filter_map(|c| c.live.get(peak)).sum()
    }

    /// The component of that name.
    pub fn component(&self, name: &str) -> Option<&Component> {
        self.components.iter().find(|c| c.name == name)
    }

    /// Whether the peak and the CUDA context fit the card.
    pub fn fits(&self, gpu: &super::Gpu) -> bool {
        self.total <= gpu.usable_bytes()
    }
}

fn too_large(spec: &ModelSpec) -> Error {
    Error::new("the memory of this run exceeds 2^64 bytes")
        .at(format!("estimate of {}", spec.name))
        .expected("sizes of a real model and batch")
        .found(format!("hidden_size {}, vocab_size {}", spec.hidden_size, spec.vocab_size))
        .next("check config.json, micro_batch_size and seq")
}
