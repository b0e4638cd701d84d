//! From rows to flat batches of tokens.

mod batch;
mod dataset;
mod sampler;
mod stream;
mod tokenizer;
mod view;

pub use batch::Batch;
pub use dataset::{Dataset, Example};
pub use sampler::{epoch_order, length_grouped};
pub use stream::TextStream;
pub use tokenizer::{Encoding, Tokenizer};
pub use view::{BatchView, TokenView};

/// The label of a token that is not trained on.
pub const IGNORE_INDEX: i32 = -100;
