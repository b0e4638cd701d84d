//! A real trained model, stories260K: its texts, logits and losses as transformers has them.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor, safetensors};
use serde_json::Value;
use tunebook::data::{Batch, DataConfig, Rows, Tokenizer, encode};
use tunebook::engine::Engine;
use tunebook::generate::{Decoder, Sampling, StopReason, generate, generate_with};
use tunebook::model::Base;
use tunebook::plan::MemoryPlan;

use crate::support::shared;

struct Stories {
    engine: Engine,
    tokenizer: Tokenizer,
    golden: Value,
    tensors: HashMap<String, Tensor>,
}

fn stories(batch: usize, context: usize) -> Option<Stories> {
    let dir: PathBuf = shared("real/models/stories260K")?;
    let base = Base::from_dir(&dir).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    tokenizer.check(base.spec()).unwrap();
    let plan = MemoryPlan::inference(base.spec()).cpu().batch(batch).seq(64).context(context).build().unwrap();
    let mut engine = Engine::new(&plan).unwrap();
    engine.load(&base).unwrap();
    let golden = serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    let tensors = safetensors::load(dir.join("golden.safetensors"), &Device::Cpu).unwrap();
    Some(Stories { engine, tokenizer, golden, tensors })
}

fn ids(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<i64>().unwrap().into_iter().map(|x| x as u32).collect()
}

fn worst(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn greedy_texts_are_transformers_to_the_letter() {
    let Some(mut s) = stories(1, 128) else { return };
    for (i, case) in s.golden["prompts"].as_array().unwrap().iter().enumerate() {
        let prompt = case["prompt"].as_str().unwrap();
        let prompt_ids = ids(&s.tensors[&format!("p{i}.input_ids")]);
        assert_eq!(s.tokenizer.encode(prompt).unwrap(), prompt_ids);
        for (key, text, penalty) in [("greedy_ids", "greedy_text", 1.0), ("greedy_rep12_ids", "greedy_rep12_text", 1.2)]
        {
            let expected = ids(&s.tensors[&format!("p{i}.{key}")])[prompt_ids.len()..].to_vec();
            let sampling = Sampling::greedy().repetition_penalty(penalty).max_new_tokens(expected.len());
            let mut streamed = String::new();
            let g = generate_with(&mut s.engine, &s.tokenizer, prompt, &sampling, &mut |t| streamed += t).unwrap();
            assert_eq!(g.tokens, expected, "{prompt}, {key}");
            assert_eq!(format!("{prompt}{}", g.text), case[text].as_str().unwrap());
            assert_eq!(streamed, g.text);
            assert_eq!((g.prompt_tokens, g.stop_reason), (prompt_ids.len(), StopReason::MaxNewTokens));
        }
    }
}

#[test]
fn logits_through_the_cache_are_transformers() {
    let Some(mut s) = stories(3, 64) else { return };
    let vocab = s.engine.vocab_size();
    let mut largest = 0f32;
    for i in 0..3 {
        let prompt = ids(&s.tensors[&format!("p{i}.input_ids")]);
        let expected: Vec<f32> = s.tensors[&format!("p{i}.logits")].flatten_all().unwrap().to_vec1().unwrap();
        // Token by token through the cache; then all at once.
        s.engine.reset();
        for (token, row) in prompt.iter().zip(expected.chunks(vocab)) {
            largest = largest.max(worst(&s.engine.forward(&[*token]).unwrap(), row));
        }
        s.engine.reset();
        let all = s.engine.forward(&prompt).unwrap();
        largest = largest.max(worst(&all, &expected[expected.len() - vocab..]));
    }
    // A padded batch without its padding.
    let rows = |name: &str| s.tensors[name].to_vec2::<i64>().unwrap();
    let (input, mask) = (rows("batch.input_ids"), rows("batch.attention_mask"));
    let input: Vec<Vec<u32>> = input.iter().map(|r| r.iter().map(|&x| x as u32).collect()).collect();
    let mask: Vec<Vec<u8>> = mask.iter().map(|r| r.iter().map(|&x| x as u8).collect()).collect();
    let labels: Vec<Vec<i32>> = input.iter().map(|r| r.iter().map(|&x| x as i32).collect()).collect();
    let batch = Batch::from_padded(&input, &mask, &labels).unwrap();
    assert!(batch.tokens() < 36);
    let logits = s.engine.logits(batch.clone()).unwrap();
    let expected: Vec<f32> = s.tensors["batch.logits"].flatten_all().unwrap().to_vec1().unwrap();
    let kept =
        expected.chunks(vocab).zip(mask.iter().flatten()).filter(|(_, m)| **m == 1).flat_map(|(row, _)| row.to_vec());
    largest = largest.max(worst(&logits, &kept.collect::<Vec<_>>()));
    println!("largest difference of a logit: {largest:e}");
    assert!(largest < 1e-3, "{largest}");
    let loss = s.engine.evaluate(batch).unwrap().mean();
    let expected = s.golden["batch_loss"].as_f64().unwrap();
    assert!((loss - expected).abs() < 1e-4, "{loss} {expected}");
}

#[test]
fn losses_of_texts_are_transformers() {
    let Some(mut s) = stories(1, 64) else { return };
    for case in s.golden["texts"].as_array().unwrap() {
        let rows = Rows::from_values(vec![case.clone()]).unwrap();
        let ds = encode(&rows, &s.tokenizer, &DataConfig::text("text").add_eos(false)).unwrap();
        assert_eq!(ds.total_tokens() as u64, case["n_tokens"].as_u64().unwrap());
        let loss = s.engine.evaluate(Batch::new(&ds, &[0])).unwrap().mean();
        let expected = case["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() < 1e-4, "{loss} {expected}");
    }
}

#[test]
fn a_full_cache_ends_the_text_and_a_longer_prompt_is_refused() {
    let Some(mut s) = stories(1, 16) else { return };
    let capacity = s.engine.capacity();
    let g = generate(&mut s.engine, &s.tokenizer, "Once upon a time", &Sampling::greedy()).unwrap();
    assert_eq!((g.tokens.len(), g.stop_reason), (capacity - 5 + 1, StopReason::CapacityFull));
    let long = "Once upon a time ".repeat(capacity);
    let e = generate(&mut s.engine, &s.tokenizer, &long, &Sampling::greedy()).unwrap_err().to_string();
    assert!(e.contains(&format!("at most {capacity} tokens")), "{e}");
    // The engine is as good as before.
    let again = generate(&mut s.engine, &s.tokenizer, "Once upon a time", &Sampling::greedy()).unwrap();
    assert_eq!(again.tokens, g.tokens);
}

#[test]
fn sampled_text_repeats_with_its_seed() {
    let Some(mut s) = stories(1, 64) else { return };
    let mut write = |sampling: Sampling| {
        generate(&mut s.engine, &s.tokenizer, "One day, a cat", &sampling.max_new_tokens(40)).unwrap().text
    };
    let warm = Sampling::temperature(1.0).top_k(40).top_p(0.9);
    assert_eq!(write(warm.clone().seed(1)), write(warm.clone().seed(1)));
    assert_ne!(write(warm.clone().seed(1)), write(warm.clone().seed(2)));
    // One candidate is greedy whatever the temperature.
    assert_eq!(write(Sampling::temperature(3.0).top_k(1)), write(Sampling::greedy()));
}
