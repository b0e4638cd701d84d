//! Text from a model: greedy and sampled decoding with a key-value cache.

mod sampling;

pub use sampling::Sampling;

use crate::Result;

/// A model that can continue a list of tokens: what generation needs from an engine.
///
/// Keys and values of past tokens stay in a cache, so each token is fed once.
pub trait Decoder {
    /// V: number of logits.
    fn vocab_size(&self) -> usize;

    /// Tokens that the key-value cache has room for, prompt and generated together.
    fn capacity(&self) -> usize;

    /// Forgets everything that was fed.
    fn reset(&mut self);

    /// Number of tokens fed since the last reset.
    fn position(&self) -> usize;

    /// Feeds `tokens` (at least one) at the next positions; gives the logits that follow the last one, `[vocab_size]`.
    ///
    /// # Errors
    /// No token, more tokens than [`capacity`](Self::capacity) has room for, an id that is not in the vocabulary, or an error of the
    /// engine.
    fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>>;
}
