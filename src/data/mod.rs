//! From rows to flat batches of tokens.

mod batch;
mod dataset;
mod sampler;

pub use batch::Batch;
pub use dataset::{Dataset, Example};
pub use sampler::{epoch_order, length_grouped};

/// The label of a token that is not trained on.
pub const IGNORE_INDEX: i32 = -100;
