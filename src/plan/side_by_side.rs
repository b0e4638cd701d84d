//! Plans beside each other: what one change does to every stage.

use super::MemoryPlan;

/// Plans with a name for each, shown as bars of one scale; made by [`side_by_side`]. Lesson 01 compares with it.
#[derive(Clone)]
pub struct SideBySide {
    /// In the order in which they were given; the first is the one that the others are compared with.
    pub plans: Vec<(String, MemoryPlan)>,
}

/// Shows plans beside each other; the first is what the others are compared with.
///
/// `notebooks/09_trade_offs.ipynb` explains it.
///
/// ```
/// use tunebook::model::ModelSpec;
/// use tunebook::plan::{MemoryPlan, side_by_side};
/// let spec = ModelSpec::preset("mistral-7b-v0.1")?;
/// let plan = |seq| MemoryPlan::qlora(&spec).seq(seq).build();
/// println!("{}", side_by_side([("512 tokens", plan(512)?), ("2,048 tokens", plan(2048)?)]));
/// # Ok::<(), tunebook::Error>(())
/// ```
pub fn side_by_side<N: Into<String>>(plans: impl IntoIterator<Item = (N, MemoryPlan)>) -> SideBySide {
    SideBySide { plans: plans.into_iter().map(|(name, plan)| (name.into(), plan)).collect() }
}
