//! From rows to flat batches of tokens.

/// The label of a token that is not trained on.
pub const IGNORE_INDEX: i32 = -100;
