//! The memory plan: every byte of a run, before a weight is loaded. The plan is the allocator.
//!
//! A [`MemoryPlan`] lists regions with their lifetimes, read from the very operations that the engine will execute
//! ([`crate::engine::ops::Op`]), and places them so that regions which never live together share space. The engine owns
//! one allocation of [`MemoryPlan::arena_bytes`] and reads every offset from the plan.

mod config;
pub mod estimate;
mod fit;
pub mod gpu;
mod kept;
mod memory;
mod methods;
mod pack;
mod region;
mod scratch;
mod side_by_side;

pub(crate) use config::kept_modules;
pub use config::{Checkpointing, DeviceKind, Method, PlanConfig};
pub use estimate::{Attention, Component, Estimate, EstimateConfig, EstimateLoss, EstimateMethod, Moment, Part};
pub use fit::{Change, Fit, FitTable, Fitted};
pub use gpu::Gpu;
#[cfg(test)]
pub(crate) use memory::of_ops;
pub use memory::{MemoryPlan, PlanBuilder, StageBytes, TimelinePoint};
pub use methods::{MethodRow, MethodTable};
pub use pack::ALIGNMENT;
pub use region::{Lifetime, Phase, Region, Space, Stage};
pub use scratch::scratch_bytes;
pub use side_by_side::{SideBySide, side_by_side};
