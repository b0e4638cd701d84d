//! A region: one tensor of the plan, with its bytes, its lifetime and its place.

use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a region is for: the rows of the memory table.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Frozen or trained base weights, in the form in which products read them.
    Weights,
    /// f32 master copies of weights that are computed with in 16 bits.
    MasterWeights,
    /// LoRA matrices.
    Adapters,
    /// Accumulated gradients of what is trained.
    Gradients,
    /// Moments of the optimizer.
    OptimizerState,
    /// Tokens, labels, positions, rotary frequencies, losses: small.
    Batch,
    /// Inputs of recomputed layers, kept from the forward to the backward pass.
    Checkpoints,
    /// What the forward pass leaves for the backward pass, and what passes between operations.
    Activations,
    /// Gradients of activations.
    ActivationGradients,
    /// Temporaries of one operation: a dequantized matrix, a chunk of logits.
    Scratch,
    /// Keys and values of generated tokens.
    KvCache,
    /// Space through which optimizer state passes when it is paged, on the CPU; a GPU's update reads and writes it where it is.
    Window,
}

impl Stage {
    /// Every stage, in the order of the memory table.
    pub const ALL: [Stage; 12] = [
        Stage::Weights,
        Stage::MasterWeights,
        Stage::Adapters,
        Stage::Gradients,
        Stage::OptimizerState,
        Stage::Batch,
        Stage::Checkpoints,
        Stage::Activations,
        Stage::ActivationGradients,
        Stage::Scratch,
        Stage::KvCache,
        Stage::Window,
    ];

    /// The name shown in tables.
    pub fn label(self) -> &'static str {
        match self {
            Stage::Weights => "base weights",
            Stage::MasterWeights => "master weights (f32)",
            Stage::Adapters => "LoRA adapters",
            Stage::Gradients => "gradients",
            Stage::OptimizerState => "optimizer state",
            Stage::Batch => "batch, rotary table, losses",
            Stage::Checkpoints => "checkpointed layer inputs",
            Stage::Activations => "activations",
            Stage::ActivationGradients => "activation gradients",
            Stage::Scratch => "scratch of one operation",
            Stage::KvCache => "KV cache",
            Stage::Window => "paging window",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.label())
    }
}

/// The parts of the schedule that reuse one space.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Forward and backward pass of one micro-batch.
    MicroStep,
    /// Clipping and the update, once per step.
    Optimizer,
    /// Forward pass and loss of an evaluation batch.
    Evaluate,
    /// Forward pass and all logits of a batch, for inspection.
    Logits,
    /// A piece of a prompt, or one new token, with a KV cache.
    Generate,
}

impl Phase {
    /// The name shown in tables.
    pub fn label(self) -> &'static str {
        match self {
            Phase::MicroStep => "micro-step",
            Phase::Optimizer => "optimizer",
            Phase::Evaluate => "evaluate",
            Phase::Logits => "logits",
            Phase::Generate => "generate",
        }
    }
}

/// Where a region lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Space {
    /// The arena of the device that computes.
    Device,
    /// (Pinned) memory of the host.
    Host,
}

/// How long a region holds a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifetime {
    /// Across all phases.
    Persistent,
    /// From the first to the last operation of a phase that uses it, both included; recorded from the phase's program.
    Within {
        /// The phase.
        phase: Phase,
        /// Index of the first operation that uses it.
        first: u32,
        /// Index of the last operation that uses it.
        last: u32,
    },
}

/// One tensor of the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    /// E.g. `model.layers.3.mlp.gate_proj.weight` or `layer 3 gate`.
    pub name: String,
    /// What it is for.
    pub stage: Stage,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape at capacity.
    pub shape: Vec<usize>,
    /// Device or host.
    pub space: Space,
    /// How long it lives.
    pub lifetime: Lifetime,
    /// Place in its space, in bytes.
    pub offset: u64,
}

impl Region {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the elements, without alignment.
    pub fn bytes(&self) -> u64 {
        self.numel() as u64 * self.dtype.size_in_bytes() as u64
    }
}
