//! Generation: tokens go through the same layers, with keys and values of the past in a cache.

use super::Engine;
use crate::data::Batch;
use crate::engine::transformer::prompt_piece;
use crate::generate::Decoder;
use crate::plan::Phase;
use crate::{Error, Result};

impl Decoder for Engine {
    fn vocab_size(&self) -> usize {
        self.plan.spec().vocab_size
    }

    fn capacity(&self) -> usize {
        self.plan.max_context()
    }

    fn reset(&mut self) {
        self.cached = Some(0);
    }

    fn position(&self) -> usize {
        self.cached.unwrap_or(0)
    }

    fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let Some(mut position) = self.cached else {
            return Err(Error::new("the key-value cache was overwritten by training or evaluation")
                .next("call reset() and feed the prompt again"));
        };
        if tokens.is_empty() {
            return Err(Error::new("no token was given to the decoder").expected("at least one"));
        }
        if position + tokens.len() > self.capacity() {
            return Err(Error::new("the text is longer than the key-value cache")
                .at("max_context")
                .expected(format!("at most {} tokens, prompt and answer together", self.capacity()))
                .found((position + tokens.len()).to_string())
                .next("plan with .context(n), shorten the prompt, or generate fewer tokens"));
        }
        // Before anything is computed: a refused text leaves the cache as it was.
        let vocab = self.vocab_size();
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::new("a token is outside the vocabulary")
                .expected(format!("below {vocab}"))
                .found(token.to_string())
                .next("use the model's own tokenizer"));
        }
        // LongRoPE has other frequencies for long texts, which the keys in the cache would not have.
        let end = position + tokens.len();
        let long = self.plan.spec().rope_switch().is_some_and(|n| end > n);
        if position > 0 && long != self.ops.state().long_text {
            return Err(Error::new("the text has grown beyond the length up to which its rotary frequencies hold")
                .at("rope_scaling.original_max_position_embeddings")
                .expected(format!("at most {} tokens", self.plan.spec().rope_switch().unwrap_or_default()))
                .found(end.to_string())
                .next("call reset() and feed the whole text again, which takes the frequencies for long texts"));
        }
        self.ops.state().training = false;
        for piece in tokens.chunks(prompt_piece(self.plan.config())) {
            let n = piece.len() as u32;
            let first = position as u32;
            self.accept(Batch {
                input_ids: piece.to_vec(),
                positions: (first..first + n).collect(),
                cu_seqlens: vec![0, n],
                labels: vec![crate::data::IGNORE_INDEX; piece.len()],
                examples: vec![0],
            })?;
            self.ops.state().long_text = long;
            self.execute(Phase::Generate)?;
            position += piece.len();
            self.cached = Some(position);
        }
        Ok(self.ops.logits().to_vec())
    }
}
