//! What a model is: its shape from `config.json`, its tensors in safetensors files.
//!
//! [`ModelSpec`] needs a config and no weights; [`Checkpoint`] reads headers first and tensors one at a time; [`Base`]
//! is a model directory in which the two agree.

mod base;
mod bnb;
pub(crate) mod bnb_write;
mod checkpoint;
mod config;
mod config_write;
mod gguf;
mod header;
#[cfg(feature = "hub")]
pub mod hub;
pub(crate) mod outdir;
mod presets;
mod rope;
mod rope_config;
mod spec;
mod writer;

pub use base::Base;
pub use bnb::QuantizationConfig;
pub use bnb_write::write_bnb_4bit;
pub use checkpoint::{Checkpoint, TensorInfo};
pub use gguf::{GgufType, write_gguf};
pub(crate) use spec::dtype_name;
pub use spec::{Activation, Experts, Family, LinearModule, ModelSpec, RopeScaling, TensorSpec};
pub use writer::{SafetensorsWriter, ShardedWriter, Shards, TensorHeader, canonical_order, pt_metadata};
