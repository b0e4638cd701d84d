//! Text from a model: greedy and sampled decoding with a key-value cache.

mod choose;
mod emit;
mod exact_match;
mod sampling;

use std::fmt;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use exact_match::{Answer, ExactMatch, answer, exact_match};
pub use sampling::Sampling;

use crate::data::{ChatOptions, ChatTemplate, Tokenizer};
use crate::interrupt::take_interrupt;
use crate::{Error, Result, interrupt};

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

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model wrote this stop token: the tokenizer's end of sequence or one of [`Sampling::stop_tokens`].
    StopToken(u32),
    /// The text came to one of [`Sampling::stop_strings`].
    StopString(String),
    /// [`Sampling::max_new_tokens`] were written.
    MaxNewTokens,
    /// The key-value cache was full.
    CapacityFull,
    /// An interrupt came between two tokens.
    Interrupted,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopReason::StopToken(id) => write!(f, "stop token {id}"),
            StopReason::StopString(s) => write!(f, "stop string {s:?}"),
            StopReason::MaxNewTokens => f.write_str("max_new_tokens reached"),
            StopReason::CapacityFull => f.write_str("key-value cache full"),
            StopReason::Interrupted => f.write_str("interrupted"),
        }
    }
}

/// A text that a model wrote.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// What it was given, as text.
    pub prompt: String,
    /// What it wrote after the prompt, without special tokens and without the stop string.
    pub text: String,
    /// Number of tokens of the prompt, bos included.
    pub prompt_tokens: usize,
    /// Ids that it wrote, the stop token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Seconds for the prompt, up to the first token.
    pub seconds_prefill: f64,
    /// Seconds for all further tokens.
    pub seconds_decode: f64,
    /// Further tokens per second; 0 when there were none.
    pub tokens_per_second: f64,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}{}", self.prompt, self.text)?;
        write!(
            f,
            "[{} + {} tokens, {:.1} tokens/s, {}]",
            self.prompt_tokens,
            self.tokens.len(),
            self.tokens_per_second,
            self.stop_reason
        )
    }
}

/// Continues a prompt.
///
/// `notebooks/08_merge_and_generate.ipynb` explains it.
///
/// The prompt is encoded by [`Tokenizer::encode`], so it gets a bos where the tokenizer wants one. The decoder is reset first.
///
/// # Errors
/// An empty prompt, one that is longer than the decoder's capacity, a tokenizer with ids that the model has not, settings
/// out of range, logits that are not finite, or an error of the decoder.
pub fn generate(
    decoder: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    sampling: &Sampling,
) -> Result<Generation> {
    generate_with(decoder, tokenizer, prompt, sampling, &mut |_| {})
}

/// [`generate`], with each piece of text as soon as it is certain.
///
/// - `on_text`: gets pieces that add up to [`Generation::text`]. A character is never split, and the beginning of a stop string is
///   held back until it is known not to be one.
///
/// # Errors
/// As [`generate`].
pub fn generate_with(
    decoder: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation> {
    generate_from(decoder, tokenizer, prompt.into(), &tokenizer.encode(prompt)?, sampling, on_text)
}

/// Answers a conversation: its text by the chat template, tokens as they are trained on, then as [`generate_with`].
///
/// # Errors
/// As [`generate`], and a conversation that the template refuses.
pub fn generate_chat(
    decoder: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Value],
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation> {
    let prompt = template.render(messages, &ChatOptions::prompt())?;
    let ids = tokenizer.encode_plain(&prompt)?;
    generate_from(decoder, tokenizer, prompt, &ids, sampling, on_text)
}

/// The loop: feed, choose, say, until there is a reason to stop.
fn generate_from(
    decoder: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    prompt: String,
    prompt_ids: &[u32],
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation> {
    sampling.check()?;
    check_prompt(decoder, prompt_ids)?;
    interrupt::check(|| "a text was to be written".into())?;
    let mut chooser = choose::Chooser::new(sampling);
    let mut emitter = emit::Emitter::new(tokenizer, prompt_ids, &sampling.stop_strings);
    let is_stop = |id: u32| Some(id) == tokenizer.eos_id() || sampling.stop_tokens.contains(&id);

    let start = Instant::now();
    decoder.reset();
    let mut logits = decoder.forward(prompt_ids)?;
    let mut ids = prompt_ids.to_vec();
    let seconds_prefill = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let stop_reason = loop {
        let id = chooser.next(&logits, &ids)?;
        ids.push(id);
        if is_stop(id) {
            break StopReason::StopToken(id);
        }
        if let Some(stop) = emitter.push(id, on_text)? {
            break StopReason::StopString(stop);
        }
        if ids.len() - prompt_ids.len() >= sampling.max_new_tokens {
            break StopReason::MaxNewTokens;
        }
        if decoder.position() >= decoder.capacity() {
            break StopReason::CapacityFull;
        }
        if take_interrupt() {
            break StopReason::Interrupted;
        }
        logits = decoder.forward(&[id])?;
    };
    let seconds_decode = start.elapsed().as_secs_f64();
    let text = emitter.finish(matches!(stop_reason, StopReason::StopString(_)), on_text)?;
    let tokens = ids.split_off(prompt_ids.len());
    let further = tokens.len().saturating_sub(1) as f64;
    let tokens_per_second = if further > 0.0 && seconds_decode > 0.0 { further / seconds_decode } else { 0.0 };
    let prompt_tokens = prompt_ids.len();
    Ok(Generation {
        prompt,
        text,
        prompt_tokens,
        tokens,
        stop_reason,
        seconds_prefill,
        seconds_decode,
        tokens_per_second,
    })
}

fn check_prompt(decoder: &dyn Decoder, ids: &[u32]) -> Result<()> {
    if ids.is_empty() {
        return Err(Error::new("the prompt is empty")
            .expected("at least one token")
            .next("this tokenizer adds no bos token: give it some text"));
    }
    if ids.len() > decoder.capacity() {
        return Err(Error::new("the prompt is longer than the key-value cache")
            .at("prompt")
            .expected(format!("at most {} tokens", decoder.capacity()))
            .found(format!("{} tokens", ids.len()))
            .next("shorten the prompt, or plan a longer cache"));
    }
    match ids.iter().find(|&&id| id as usize >= decoder.vocab_size()) {
        Some(id) => Err(Error::new("the prompt has a token that the model does not know")
            .at("prompt")
            .expected(format!("token ids below {}", decoder.vocab_size()))
            .found(id.to_string())
            .next("use the tokenizer from the model's own directory")),
        None => Ok(()),
    }
}
