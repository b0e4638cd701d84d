//! QLoRA fine-tuning that is run, seen and understood inside Rust notebooks, on one GPU.
//!
//! The stages can each be run and looked at one step at a time: memory budget ([`plan`]), 4-bit quantization ([`nf4`]),
//! LoRA target discovery and merging ([`lora`]), data ([`data`]), resumable training ([`train`]) and text
//! ([`generate`]). Each returns a value that a notebook cell can hold, print and inspect.

pub mod data;
pub mod display;
pub mod engine;
mod environment;
mod error;
pub mod files;
pub mod generate;
mod interrupt;
mod json;
pub mod lesson;
pub mod lora;
pub mod model;
pub mod nf4;
pub mod plan;
pub mod survey;
pub mod train;

pub use environment::{Environment, environment};
pub use error::{Error, Result};

/// What a notebook's first cell imports.
pub mod prelude {
    pub use crate::data::{
        self, BatchView, ChatTemplate, DataConfig, Dataset, InstructionTemplate, RowFile, Rows, Tokenizer, encode,
    };
    pub use crate::engine::Engine;
    pub use crate::generate::{Sampling, answer, exact_match, generate};
    pub use crate::lora::{self, Adapter, LoraConfig, MergeBase, Targets};
    pub use crate::model::{Base, Checkpoint, ModelSpec};
    pub use crate::nf4::{self, Nf4Config, Nf4Tensor, QuantType};
    pub use crate::plan::{Checkpointing, Estimate, EstimateConfig, Gpu, MemoryPlan, Phase};
    pub use crate::train::{LrScheduler, Metrics, Optim, Run, TrainConfig};
    pub use crate::{Error, Result, environment};
}

/// The README's examples are compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
