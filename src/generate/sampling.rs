//! [`Sampling`]: how the next token is chosen.

use serde::{Deserialize, Serialize};

/// How the next token is chosen, and when to stop. Field names and meanings are those of transformers' `GenerationConfig`.
///
/// `notebooks/08_merge_and_generate.ipynb` explains it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Logits are divided by it; 0 means greedy: always the likeliest token, the lowest id among equals.
    pub temperature: f64,
    /// Only the `top_k` likeliest tokens are considered; `None`: all.
    pub top_k: Option<usize>,
    /// Only the fewest likeliest tokens whose probabilities add up to `top_p` are considered; `None`: all.
    pub top_p: Option<f64>,
    /// Logits of tokens that are already in the prompt or the text are divided (positive ones) or multiplied (negative
    /// ones) by it, once per distinct token; 1 changes nothing.
    pub repetition_penalty: f32,
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// Start of the random numbers: the same seed gives the same text.
    pub seed: u64,
    /// Generation ends with any of these ids, which are not part of the text, besides the tokenizer's own end of sequence.
    pub stop_tokens: Vec<u32>,
    /// Generation ends when the text contains any of these, which are cut off.
    pub stop_strings: Vec<String>,
}

impl Default for Sampling {
    /// The same as [`Sampling::greedy`].
    fn default() -> Self {
        Sampling::greedy()
    }
}

impl Sampling {
    /// Always the likeliest token, at most 256 of them.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: None,
            top_p: None,
            repetition_penalty: 1.0,
            max_new_tokens: 256,
            seed: 0,
            stop_tokens: vec![],
            stop_strings: vec![],
        }
    }

    /// Sampled at a temperature, from the whole vocabulary, at most 256 tokens.
    pub fn temperature(temperature: f64) -> Self {
        Sampling { temperature, ..Sampling::greedy() }
    }

    /// Sets [`top_k`](Self#structfield.top_k).
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// Sets [`top_p`](Self#structfield.top_p).
    pub fn top_p(mut self, top_p: f64) -> Self {
        self.top_p = Some(top_p);
        self
    }

    /// Sets [`repetition_penalty`](Self#structfield.repetition_penalty).
    pub fn repetition_penalty(mut self, repetition_penalty: f32) -> Self {
        self.repetition_penalty = repetition_penalty;
        self
    }

    /// Sets [`max_new_tokens`](Self#structfield.max_new_tokens).
    pub fn max_new_tokens(mut self, max_new_tokens: usize) -> Self {
        self.max_new_tokens = max_new_tokens;
        self
    }

    /// Sets [`seed`](Self#structfield.seed).
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets [`stop_tokens`](Self#structfield.stop_tokens).
    pub fn stop_tokens(mut self, stop_tokens: Vec<u32>) -> Self {
        self.stop_tokens = stop_tokens;
        self
    }

    /// Sets [`stop_strings`](Self#structfield.stop_strings).
    pub fn stop_strings(mut self, stop_strings: Vec<String>) -> Self {
        self.stop_strings = stop_strings;
        self
    }
}
