//! Choosing tokens, stopping, streaming.

use candle_core::{Device, Tensor};
use tunebook::data::{ChatTemplate, Tokenizer, message};
use tunebook::generate::{Decoder, Generation, Sampling, StopReason, generate, generate_chat, generate_with};
use tunebook::{Error, Result};

use crate::tiny_tokenizer::tiny_tokenizer;

/// A model that writes `script` whatever it is given, then end of sequence; with a little probability for other tokens.
struct Scripted {
    script: Vec<u32>,
    capacity: usize,
    fed: Vec<u32>,
    prompt: usize,
    vocab: usize,
}

impl Scripted {
    fn new(script: Vec<u32>) -> Self {
        Scripted { script, capacity: 64, fed: vec![], prompt: 0, vocab: tiny_tokenizer().vocab_size() }
    }

    fn says(tokenizer: &Tokenizer, text: &str) -> Self {
        let mut script = tokenizer.encode_plain(text).unwrap();
        script.push(tokenizer.eos_id().unwrap());
        Scripted::new(script)
    }
}

impl Decoder for Scripted {
    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn reset(&mut self) {
        self.fed.clear();
    }

    fn position(&self) -> usize {
        self.fed.len()
    }

    fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        assert!(!tokens.is_empty());
        if self.fed.len() + tokens.len() > self.capacity {
            return Err(Error::new("too many tokens"));
        }
        if self.fed.is_empty() {
            self.prompt = tokens.len();
        }
        self.fed.extend(tokens);
        let next = self.script.get(self.fed.len() - self.prompt).copied().unwrap_or(2);
        Ok((0..self.vocab as u32).map(|id| if id == next { 5.0 } else { 1.0 - (id % 7) as f32 }).collect())
    }
}

fn run(model: &mut Scripted, sampling: &Sampling) -> (Generation, Vec<String>) {
    let mut pieces = vec![];
    let generation =
        generate_with(model, &tiny_tokenizer(), "hello", sampling, &mut |text| pieces.push(text.to_string())).unwrap();
    assert_eq!(pieces.concat(), generation.text);
    assert!(pieces.iter().all(|p| !p.is_empty()));
    (generation, pieces)
}

#[test]
fn greedy_text_streams_in_whole_characters_and_stops_at_eos() {
    let t = tiny_tokenizer();
    let mut model = Scripted::says(&t, "the cat é日 the");
    let (g, pieces) = run(&mut model, &Sampling::greedy());
    assert_eq!(g.text, " the cat é日 the");
    assert_eq!(g.stop_reason, StopReason::StopToken(2));
    assert_eq!(g.tokens, model.script);
    assert_eq!((g.prompt.as_str(), g.prompt_tokens), ("hello", 2));
    assert!(pieces.contains(&"日".to_string()), "{pieces:?}");
    // Each token was fed once, bos once, and the end of sequence never.
    assert_eq!(model.fed.len(), g.prompt_tokens + g.tokens.len() - 1);
    assert_eq!(model.fed.iter().filter(|&&id| id == 1).count(), 1);
    assert!(format!("{g:?}").starts_with("hello the cat"));
}

#[test]
fn generation_stops_for_each_reason() {
    let t = tiny_tokenizer();
    let text = "the cat hello the end";
    let model = || Scripted::says(&t, text);
    let (g, _) = run(&mut model(), &Sampling::greedy().max_new_tokens(2));
    assert_eq!((g.text.as_str(), g.stop_reason, g.tokens.len()), (" the cat", StopReason::MaxNewTokens, 2));
    let hello = model().script[2];
    let (g, _) = run(&mut model(), &Sampling::greedy().stop_tokens(vec![hello]));
    assert_eq!((g.text.as_str(), g.stop_reason), (" the cat", StopReason::StopToken(hello)));
    let stop = |s: &[&str]| Sampling::greedy().stop_strings(s.iter().map(|s| s.to_string()).collect());
    let (g, pieces) = run(&mut model(), &stop(&["never", "lo th"]));
    assert_eq!((g.text.as_str(), g.stop_reason), (" the cat hel", StopReason::StopString("lo th".into())));
    assert_eq!(pieces, [" the", " cat", " hel"]);
    // What looked like a stop string and was none comes out in the end.
    let (g, _) = run(&mut model(), &stop(&["", "end of all"]));
    assert_eq!((g.text, g.stop_reason), (format!(" {text}"), StopReason::StopToken(2)));
    let mut small = model();
    small.capacity = 4;
    let (g, _) = run(&mut small, &Sampling::greedy());
    // Two tokens of the prompt and two more are fed; what follows the last one is still known.
    assert_eq!((g.tokens.len(), g.stop_reason), (3, StopReason::CapacityFull));
}

#[test]
fn bytes_that_are_no_character_are_shown_at_the_end() {
    let t = tiny_tokenizer();
    let byte = t.token_id("<0xE6>").unwrap();
    let (g, _) = run(&mut Scripted::new(vec![byte, 2]), &Sampling::greedy());
    assert_eq!(g.text, "\u{FFFD}");
    let (g, _) = run(&mut Scripted::new(vec![byte; 20]), &Sampling::greedy());
    assert!(g.text.starts_with('\u{FFFD}'));
}

#[test]
fn bad_prompts_and_settings_are_refused() {
    let t = tiny_tokenizer();
    let refuse = |model: &mut Scripted, prompt: &str, sampling: Sampling| {
        generate(model, &t, prompt, &sampling).unwrap_err().to_string()
    };
    let model = || Scripted::says(&t, "the");
    let mut small = model();
    small.capacity = 3;
    assert!(refuse(&mut small, "the cat the cat", Sampling::greedy()).contains("at most 3 tokens"));
    let mut other = model();
    other.vocab = 100;
    assert!(refuse(&mut other, "the cat", Sampling::greedy()).contains("below 100"));
    for (sampling, field) in [
        (Sampling::temperature(-1.0), "temperature"),
        (Sampling::temperature(f64::NAN), "temperature"),
        (Sampling::temperature(1.0).top_k(0), "top_k"),
        (Sampling::temperature(1.0).top_p(0.0), "top_p"),
        (Sampling::temperature(1.0).top_p(1.1), "top_p"),
        (Sampling::greedy().repetition_penalty(0.0), "repetition_penalty"),
        (Sampling::greedy().max_new_tokens(0), "max_new_tokens"),
    ] {
        assert!(refuse(&mut model(), "the", sampling).contains(field));
    }
    assert!(Sampling::greedy().distribution(&[0.0, f32::NAN], &[]).is_err());
    assert!(Sampling::greedy().distribution(&[f32::NEG_INFINITY], &[]).is_err());
    assert!(Sampling::greedy().distribution(&[], &[]).is_err());
}

#[test]
fn ties_go_to_the_lowest_id() {
    assert_eq!(Sampling::greedy().distribution(&[1.0, 3.0, 3.0, -1.0], &[]).unwrap(), [(1, 1.0)]);
}

/// Ids and probabilities, to six digits.
fn distribution(sampling: Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
    let round = |p: f64| (p * 1e6).round() / 1e6;
    sampling.distribution(logits, &[]).unwrap().into_iter().map(|(id, p)| (id, round(p))).collect()
}

#[test]
fn temperature_top_k_and_top_p_filter_as_in_transformers() {
    // Probabilities 0.4, 0.3, 0.2, 0.1.
    let logits: Vec<f32> = [0.2f32, 0.4, 0.1, 0.3].map(f32::ln).to_vec();
    let t = Sampling::temperature;
    assert_eq!(distribution(t(1.0), &logits), [(1, 0.4), (3, 0.3), (0, 0.2), (2, 0.1)]);
    // Squared and normalized: 0.16, 0.09, 0.04, 0.01 of 0.30.
    assert_eq!(distribution(t(0.5), &logits), [(1, 0.533333), (3, 0.3), (0, 0.133333), (2, 0.033333)]);
    assert_eq!(distribution(t(1.0).top_k(2), &logits), [(1, 0.571429), (3, 0.428571)]);
    assert_eq!(distribution(t(1.0).top_k(9), &logits).len(), 4);
    // 0.4 + 0.3 reach 0.65; 0.4 alone reaches 0.35.
    assert_eq!(distribution(t(1.0).top_p(0.65), &logits), [(1, 0.571429), (3, 0.428571)]);
    assert_eq!(distribution(t(1.0).top_p(0.35), &logits), [(1, 1.0)]);
    // top_p counts within what top_k left: 0.571 is not yet 0.6, where 0.4 + 0.3 of all would have been enough too.
    assert_eq!(distribution(t(1.0).top_k(2).top_p(0.5), &logits), [(1, 1.0)]);
    assert_eq!(distribution(t(1.0).top_k(2).top_p(0.6), &logits).len(), 2);
    // Equals of the k-th stay.
    assert_eq!(distribution(t(1.0).top_k(1), &[1.0, 1.0, 0.0]), [(0, 0.5), (1, 0.5)]);
}

#[test]
fn the_repetition_penalty_is_candles_and_counts_each_token_once() {
    let logits: Vec<f32> = (0..40).map(|i| ((i * 37 % 23) as f32 - 11.0) * 0.3).collect();
    let seen = [3u32, 17, 3, 39, 0, 17];
    let tensor = Tensor::from_vec(logits.clone(), 40, &Device::Cpu).unwrap();
    let oracle: Vec<f32> =
        candle_transformers::utils::apply_repeat_penalty(&tensor, 1.2, &seen).unwrap().to_vec1().unwrap();
    let sampling = Sampling::temperature(1.0).repetition_penalty(1.2);
    let (ours, theirs) = (
        sampling.distribution(&logits, &seen).unwrap(),
        Sampling::temperature(1.0).distribution(&oracle, &[]).unwrap(),
    );
    assert_eq!(ours, theirs);
    assert_ne!(ours, Sampling::temperature(1.0).distribution(&logits, &[]).unwrap());
    // The prompt counts too: "hello" is in it, so the model that wants to say it says something else.
    let t = tiny_tokenizer();
    let mut model = Scripted::says(&t, "hello");
    let plain = generate(&mut model, &t, "hello", &Sampling::greedy().max_new_tokens(1)).unwrap();
    let penalized =
        generate(&mut model, &t, "hello", &Sampling::greedy().max_new_tokens(1).repetition_penalty(1e9)).unwrap();
    assert_eq!(plain.text, " hello");
    assert_ne!(penalized.tokens, plain.tokens);
}

#[test]
fn sampling_follows_the_distribution_and_the_seed() {
    let t = tiny_tokenizer();
    let sample = |seed: u64| {
        let mut model = Scripted::new(vec![50; 60]);
        generate(&mut model, &t, "hello", &Sampling::temperature(2.0).seed(seed).max_new_tokens(40)).unwrap().tokens
    };
    assert_eq!(sample(1), sample(1));
    assert_ne!(sample(1), sample(2));
    // Token 50 has a probability p; its share in many draws agrees within four standard deviations.
    let sampling = Sampling::temperature(2.0);
    let logits = Scripted::new(vec![50; 2]).forward(&[1]).unwrap();
    let p = sampling.distribution(&logits, &[]).unwrap().iter().find(|(id, _)| *id == 50).unwrap().1;
    let draws: Vec<u32> = (0..50).flat_map(&sample).collect();
    let share = draws.iter().filter(|&&id| id == 50).count() as f64 / draws.len() as f64;
    assert!((share - p).abs() < 4.0 * (p * (1.0 - p) / draws.len() as f64).sqrt(), "{share} of {p} in {}", draws.len());
}

#[test]
fn a_conversation_is_answered_without_a_second_bos() {
    let t = tiny_tokenizer();
    let template = ChatTemplate::from_tokenizer(&t).unwrap();
    let mut model = Scripted::says(&t, "hello");
    let g = generate_chat(&mut model, &t, &template, &[message("user", "the cat")], &Sampling::greedy(), &mut |_| {})
        .unwrap();
    assert_eq!(g.prompt, "<s><|user|>the cat<|end|><|assistant|>");
    assert_eq!(model.fed.iter().filter(|&&id| id == 1).count(), 1);
    assert_eq!(model.fed[..g.prompt_tokens], t.encode_plain(&g.prompt).unwrap());
}
