//! The card at hand, with what a process of this library holds on it beside the arena: measured, not assumed.

use candle_core::DType;

use super::gpu;
use crate::Result;
use crate::engine::Engine;
use crate::model::ModelSpec;
use crate::plan::{Gpu, MemoryPlan};
use crate::train::Optim;

impl Gpu {
    /// The first visible card. Its context is measured with a small model that has been through every phase once; where the
    /// driver does not say what a process holds, it is assumed as for the presets.
    ///
    /// Takes about a second; the first time some more, while the kernels are compiled.
    ///
    /// # Errors
    /// No driver, no card, libraries that are missing.
    pub fn detect() -> Result<Gpu> {
        let mut spec = ModelSpec::preset("mistral-7b-v0.1")?;
        (spec.num_hidden_layers, spec.vocab_size) = (1, 1024);
        let plan = MemoryPlan::qlora(&spec).optim(Optim::AdamW8bit).seq(256).context(256);
        let plan = plan.compute_dtype(DType::BF16).build()?;
        let engine = Engine::new(&plan)?;
        let held = engine.process_bytes();
        drop(engine);
        let card = gpu::Gpu::open(false)?;
        let name = card.name.trim_start_matches("NVIDIA ").to_owned();
        let mut found = Gpu::new(name, card.total_bytes, card.capability);
        if let Some(held) = held {
            found.context_bytes = held.saturating_sub(plan.arena_bytes().next_multiple_of(gpu::PAGE));
            found.context_measured = true;
        }
        Ok(found)
    }
}
