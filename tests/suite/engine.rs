//! The engine against transformers' and PEFT's outputs.

use candle_core::{Device, Tensor, safetensors};
use std::collections::HashMap;

use tunebook::data::Batch;
use tunebook::engine::Engine;
use tunebook::lora::{Adapter, LoraConfig, Targets};
use tunebook::model::Base;
use tunebook::nf4::{Nf4Config, QuantType};
use tunebook::plan::{MemoryPlan, PlanBuilder};

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
    let ids: Vec<Vec<u32>> =
        rows::<i64>(&io["input_ids"]).into_iter().map(|r| r.into_iter().map(|x| x as u32).collect()).collect();
    let mask: Vec<Vec<u8>> =
        rows::<i64>(&io["attention_mask"]).into_iter().map(|r| r.into_iter().map(|x| x as u8).collect()).collect();
    let labels: Vec<Vec<i32>> =
        rows::<i64>(&io["labels"]).into_iter().map(|r| r.into_iter().map(|x| x as i32).collect()).collect();
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
            serde_json::from_str(&std::fs::read_to_string(golden(&format!("tiny/{model}/base_io.json"))).unwrap())
                .unwrap();
        let loss = engine.evaluate(batch).unwrap().mean();
        let expected = json["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() < 1e-5, "{model}: {loss} {expected}");
    }
}

/// The adapter's own modules, by name: patterns over layers are already resolved in its file.
fn targets_of(adapter: &Adapter) -> LoraConfig {
    let modules = adapter.tensors.keys().cloned().collect();
    LoraConfig { target_modules: Targets::List(modules), exclude_modules: None, ..adapter.config.lora.clone() }
}

/// The worst logit of an adapter over a base; switched off, the base alone must be back to the bit.
fn adapted(plan: PlanBuilder, base: &Base, adapter: &Adapter, io: &str, batch: &Batch, kept: &[usize]) -> f32 {
    let plan = plan.cpu().batch(3).seq(40).adapter(targets_of(adapter));
    let mut engine = Engine::new(&plan.build().unwrap()).unwrap();
    engine.fill_dead_regions(true);
    engine.load(base).unwrap();
    engine.enable_adapter(false);
    let alone = engine.logits(batch.clone()).unwrap();
    engine.enable_adapter(true);
    engine.load_adapter(adapter).unwrap();
    let logits = engine.logits(batch.clone()).unwrap();
    engine.enable_adapter(false);
    assert_eq!(alone, engine.logits(batch.clone()).unwrap());
    worst_logit(&logits, &load(io)["logits"], kept)
}

#[test]
fn peft_adapters() {
    let variants = [
        "qv_r8",
        "all_linear_r8",
        "rslora",
        "regex",
        "exclude_modules",
        "layers_to_transform",
        "dora",
        "rank_alpha_pattern",
        "bias_all",
        "bias_lora_only",
    ];
    let mut seen = 0;
    for model in MODELS {
        let base = Base::from_dir(golden(&format!("tiny/{model}/base"))).unwrap();
        let (batch, kept) = golden_batch(&load(&format!("tiny/{model}/base_io.safetensors")));
        for variant in variants {
            let dir = format!("tiny/{model}/peft/{variant}");
            let io = format!("{dir}/io.safetensors");
            if !golden(&io).exists() {
                continue;
            }
            let adapter = Adapter::load(golden(&dir)).unwrap();
            let worst = adapted(MemoryPlan::lora(base.spec()), &base, &adapter, &io, &batch, &kept);
            println!("{model} {variant}: logits differ by at most {worst:.1e}");
            assert!(worst < 1e-4, "{model} {variant}: {worst}");
            seen += 1;
        }
    }
    assert_eq!(seen, 12);
}

fn four_bit(quant_type: QuantType, double_quant: bool) -> Nf4Config {
    Nf4Config { quant_type, double_quant, ..Nf4Config::default() }
}

#[test]
fn bitsandbytes_checkpoints() {
    let cases = [
        ("tiny-mistral", "bnb_nf4", four_bit(QuantType::Nf4, false)),
        ("tiny-mistral", "bnb_nf4_dq", four_bit(QuantType::Nf4, true)),
        ("tiny-mistral", "bnb_fp4", four_bit(QuantType::Fp4, false)),
        ("tiny-llama", "bnb_nf4_dq", four_bit(QuantType::Nf4, true)),
    ];
    for (model, name, config) in cases {
        let (batch, kept) = golden_batch(&load(&format!("tiny/{model}/base_io.safetensors")));
        let theirs = &load(&format!("tiny/{model}/{name}/io.safetensors"))["logits"];
        let stored = Base::from_dir(golden(&format!("tiny/{model}/{name}"))).unwrap();
        let original = Base::from_dir(golden(&format!("tiny/{model}/base"))).unwrap();
        let logits = |base: &Base, quantization: Option<Nf4Config>| {
            let plan =
                MemoryPlan::inference(base.spec()).cpu().batch(3).seq(40).quantization(quantization).build().unwrap();
            let mut engine = Engine::new(&plan).unwrap();
            engine.load(base).unwrap();
            engine.logits(batch.clone()).unwrap()
        };
        // Copied code by code; dequantized into a dense plan; quantized here, where nested codes may differ by one.
        let cases = [
            ("copied", logits(&stored, Some(config)), 1e-4),
            ("dequantized", logits(&stored, None), 1e-4),
            ("quantized here", logits(&original, Some(config)), if config.double_quant { 3e-3 } else { 1e-4 }),
        ];
        for (how, logits, tolerance) in cases {
            let worst = worst_logit(&logits, theirs, &kept);
            println!("{model} {name}, {how}: logits differ by at most {worst:.1e}");
            assert!(worst < tolerance, "{model} {name}, {how}: {worst}");
        }
    }
}

#[test]
fn a_peft_adapter_on_a_4_bit_base() {
    let dir = "tiny/tiny-mistral/peft_on_nf4_dq";
    let (batch, kept) = golden_batch(&load("tiny/tiny-mistral/base_io.safetensors"));
    let adapter = Adapter::load(golden(dir)).unwrap();
    let io = format!("{dir}/io.safetensors");
    for (from, tolerance) in [("bnb_nf4_dq", 1e-4), ("base", 3e-3)] {
        let base = Base::from_dir(golden(&format!("tiny/tiny-mistral/{from}"))).unwrap();
        let worst = adapted(MemoryPlan::qlora(base.spec()), &base, &adapter, &io, &batch, &kept);
        println!("adapter on {from}: logits differ by at most {worst:.1e}");
        assert!(worst < tolerance, "{from}: {worst}");
    }
}
