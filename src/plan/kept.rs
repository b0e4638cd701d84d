//! What the forward pass of one layer leaves for the backward pass.

use super::region::{Lifetime, Phase, Region, Stage};
use super::{MemoryPlan, TimelinePoint};

impl MemoryPlan {
    /// The tensors of decoder layer `layer` that live from the forward pass, across the loss, into the backward pass: its
    /// activations, or its input alone where it is recomputed. Lesson 01 adds them up.
    pub fn kept_by_layer(&self, layer: usize) -> Vec<Region> {
        let Some(loss) = self.program(Phase::MicroStep).iter().position(|op| op.name() == "lm_head_ce") else {
            return Vec::new();
        };
        let name = format!("layer {layer} ");
        let across = |r: &&Region| match r.lifetime {
            Lifetime::Within { phase: Phase::MicroStep, first, last } => {
                (first as usize) < loss && loss < last as usize
            }
            _ => false,
        };
        self.regions().iter().filter(|r| r.name.starts_with(&name)).filter(across).cloned().collect()
    }

    /// Bytes of one stage in the arena at the operation where most is alive, as in [`MemoryPlan::table`].
    pub fn at_peak(&self, stage: Stage) -> u64 {
        let column = Stage::ALL.iter().position(|s| *s == stage).unwrap_or(0);
        self.peak().map_or(0, |p: TimelinePoint| p.bytes[column])
    }
}
