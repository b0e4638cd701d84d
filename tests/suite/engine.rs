//! The engine against transformers' and PEFT's outputs.

use candle_core::{Device, Tensor, safetensors};
use std::collections::HashMap;

use tunebook::data::Batch;
use tunebook::engine::Engine;
use tunebook::model::Base;
use tunebook::plan::MemoryPlan;

use crate::support::golden;

pub const MODELS: [&str; 2] = ["tiny-mistral", "tiny-llama"];

fn load(path: &str) -> HashMap<String, Tensor> {
    safetensors::load(golden(path), &Device::Cpu).unwrap()
}

fn rows<T: candle_core::WithDType>(t: &Tensor) -> Vec<Vec<T>> {
    t.to_vec2::<T>().unwrap()
}

/// The padded golden batch, as a flat one, and which rows of the rectangle are tokens.
fn golden_batch(io: &HashMap<String, Tensor>) -> (Batch, Vec<usize>) {
    let ids: Vec<Vec<u32>> = rows::<i64>(&io["input_ids"]).into_iter().map(|r| r.into_iter().map(|x| x as u32).collect()).collect();
    let mask: Vec<Vec<u8>> = rows::<i64>(&io["attention_mask"]).into_iter().map(|r| r.into_iter().map(|x| x as u8).collect()).collect();
    let labels: Vec<Vec<i32>> = rows::<i64>(&io["labels"]).into_iter().map(|r| r.into_iter().map(|x| x as i32).collect()).collect();
    let width = ids[0].len();
    let kept = mask.iter().flatten().enumerate().filter(|(_, m)| **m == 1).map(|(i, _)| i).collect();
    assert_eq!(mask.len() * width, mask.iter().flatten().count());
    (Batch::from_padded(&ids, &mask, &labels).unwrap(), kept)
}

/// The largest difference between our logits and those of the golden rectangle, over tokens.
fn worst_logit(ours: &[f32], theirs: &Tensor, kept: &[usize]) -> f32 {
    let v = theirs.dims()[2];
    let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut worst = 0f32;
    for (row, &at) in ours.chunks(v).zip(kept) {
        for (a, b) in row.iter().zip(&theirs[at * v..][..v]) {
            worst = worst.max((a - b).abs());
        }
    }
    worst
}

#[test]
fn base_logits_and_loss() {
    for model in MODELS {
        let base = Base::from_dir(golden(&format!("tiny/{model}/base"))).unwrap();
        let io = load(&format!("tiny/{model}/base_io.safetensors"));
        let (batch, kept) = golden_batch(&io);
        let plan = MemoryPlan::inference(base.spec()).cpu().batch(3).seq(40).ce_chunk(16).build().unwrap();
        let mut engine = Engine::new(&plan).unwrap();
        engine.fill_dead_regions(true);
        engine.load(&base).unwrap();
        let logits = engine.logits(batch.clone()).unwrap();
        let worst = worst_logit(&logits, &io["logits"], &kept);
        assert!(worst < 1e-4, "{model}: {worst}");
        let json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(golden(&format!("tiny/{model}/base_io.json"))).unwrap()).unwrap();
        let loss = engine.evaluate(batch).unwrap().mean();
        let expected = json["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() < 1e-5, "{model}: {loss} {expected}");
    }
}
