//! LoRA: which modules are adapted, the adapter's files, and merging it into its base.
//!
//! Nothing here needs a running model: [`discover()`] needs a config, [`Adapter`] its two files.

mod adapter;
mod adapter_config;
mod config;
mod discover;

pub use adapter::{Adapter, LoraPair};
pub use adapter_config::AdapterConfig;
pub use config::{LoraConfig, Targets};
pub use discover::{Discovery, TargetGroup, TargetStatus, discover};
