//! From logits to the next token.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::generate::Sampling;
use crate::{Error, Result};

impl Sampling {
    /// Checks that the settings make sense together.
    ///
    /// # Errors
    /// Names the field, what it may be and what it is.
    pub fn check(&self) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: String| {
            Err(Error::new(format!("`{field}` is out of range"))
                .at(format!("sampling: {field}"))
                .expected(expected)
                .found(found))
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return wrong("temperature", "a number of at least 0; 0 is greedy", self.temperature.to_string());
        }
        if self.top_k == Some(0) {
            return wrong("top_k", "at least 1, or none for all tokens", "0".into());
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return wrong("top_p", "above 0 and at most 1, or none for all tokens", p.to_string());
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return wrong(
                "repetition_penalty",
                "a number above 0; 1 changes nothing",
                self.repetition_penalty.to_string(),
            );
        }
        if self.max_new_tokens == 0 {
            return wrong("max_new_tokens", "at least 1", "0".into());
        }
        Ok(())
    }

    /// The tokens that may come next with their probabilities, likeliest first, lowest id first among equals; they add up to 1.
    ///
    /// The order of the steps is transformers': repetition penalty, temperature, top-k, top-p. With temperature 0 there
    /// is one token, of probability 1.
    ///
    /// - `logits`: what the model says, `[vocab_size]`.
    /// - `seen`: ids in the prompt and the text so far, in any order.
    ///
    /// # Errors
    /// Settings out of range; logits that are NaN or all minus infinity.
    pub fn distribution(&self, logits: &[f32], seen: &[u32]) -> Result<Vec<(u32, f64)>> {
        self.check()?;
        let mut logits = logits.to_vec();
        apply_repetition_penalty(&mut logits, self.repetition_penalty, seen);
        let best = argmax(&logits)?;
        if self.temperature == 0.0 {
            return Ok(vec![(best, 1.0)]);
        }
        let max = f64::from(logits[best as usize]);
        let mut tokens: Vec<(u32, f64)> =
            (0..).zip(&logits).map(|(id, &x)| (id, ((f64::from(x) - max) / self.temperature).exp())).collect();
        tokens.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if let Some(kth) = self.top_k.and_then(|k| tokens.get(k - 1)).map(|t| t.1) {
            // Equals of the last one stay.
            tokens.retain(|t| t.1 >= kth);
        }
        normalize(&mut tokens);
        if let Some(top_p) = self.top_p {
            let mut above = 0.0;
            let within = |t: &&(u32, f64)| {
                let likelier = above;
                above += t.1;
                likelier < top_p
            };
            let kept = tokens.iter().take_while(within).count();
            tokens.truncate(kept.max(1));
            normalize(&mut tokens);
        }
        tokens.retain(|t| t.1 > 0.0);
        Ok(tokens)
    }
}

/// Chooses tokens one after another; the same seed and logits give the same tokens.
pub struct Chooser {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Chooser {
    pub fn new(sampling: &Sampling) -> Self {
        Chooser { sampling: sampling.clone(), rng: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// The next token.
    pub fn next(&mut self, logits: &[f32], seen: &[u32]) -> Result<u32> {
        let tokens = self.sampling.distribution(logits, seen)?;
        // 53 random bits: uniform in [0, 1).
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let found = tokens.iter().find(|(_, p)| {
            left -= p;
            left < 0.0
        });
        // Rounding may leave a last sliver that belongs to nobody.
        found.or(tokens.last()).map(|(id, _)| *id).ok_or_else(|| Error::new("there are no logits to choose from"))
    }
}

/// transformers' `RepetitionPenaltyLogitsProcessor`: once per distinct token.
fn apply_repetition_penalty(logits: &mut [f32], penalty: f32, seen: &[u32]) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = if *x < 0.0 { *x * penalty } else { *x / penalty };
        }
    }
}

/// The likeliest token, the lowest id among equals.
fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &x) in (0..).zip(logits) {
        if x.is_nan() || x == f32::INFINITY {
            return Err(Error::new("the model's logits are not numbers")
                .at(format!("token {id}"))
                .expected("finite logits")
                .found(x.to_string())
                .next("the weights or the adapter have diverged: go back to an earlier checkpoint"));
        }
        if x > best.map_or(f32::NEG_INFINITY, |b| b.1) {
            best = Some((id, x));
        }
    }
    best.map(|b| b.0).ok_or_else(|| Error::new("the model rules out every token").expected("at least one finite logit"))
}

fn normalize(tokens: &mut [(u32, f64)]) {
    let sum: f64 = tokens.iter().map(|t| t.1).sum();
    tokens.iter_mut().for_each(|t| t.1 /= sum);
}
