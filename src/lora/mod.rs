//! LoRA: which modules are adapted, the adapter's files, and merging it into its base.
//!
//! Nothing here needs a running model: [`discover()`] needs a config, [`Adapter`] its two files.

mod adapter;
mod adapter_config;
mod config;
mod decompose;
mod delta;
mod discover;
mod low_rank;
mod merge;
mod merge_report;
mod merge_weight;
mod module;

pub use adapter::{Adapter, LoraPair};
pub use adapter_config::AdapterConfig;
pub use config::{LoraConfig, Targets};
pub use decompose::{Decomposition, loftq, pissa};
pub use discover::{Discovery, TargetGroup, TargetStatus, discover};
pub use merge::{Merge, MergeOnto, merge};
pub use merge_report::{LayerMerge, MergeBase, MergeCost, MergeReport, ModuleMerge};
pub use module::{FrozenLinear, LoraLinear, Nf4Linear};
