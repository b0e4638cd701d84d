//! What a model is: its shape from `config.json`, its tensors in safetensors files, its tokenizer.

mod spec;

pub use spec::{Family, LinearModule, ModelSpec, RopeScaling, TensorSpec};
