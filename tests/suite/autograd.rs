//! Gradients of whole models against candle's autograd, through every method, target and checkpointing.

use std::collections::BTreeMap;

use candle_core::DType;
use serde_json::Value;
use tunebook::data::{Batch, Dataset};
use tunebook::engine::Engine;
use tunebook::lora::{Adapter, LoraConfig, Targets};
use tunebook::model::Base;
use tunebook::nf4::{self, Nf4Config};
use tunebook::plan::{Checkpointing, MemoryPlan, PlanBuilder};

use crate::oracle::{RandomModel, Reference, adapter, dataset, llama, mistral};

/// The micro-batches of a step: examples side by side, shorter and longer than the attention's tiles.
const MICRO_STEPS: [&[usize]; 3] = [&[0, 1], &[2], &[3, 4, 5]];
const LENGTHS: [usize; 6] = [7, 65, 130, 2, 20, 64];

/// Largest difference, relative to the largest element of each tensor, that rounding in f32 may bring.
const TOLERANCE: f64 = 1e-5;

type Gradients = BTreeMap<String, Vec<f32>>;

fn capacity(plan: PlanBuilder) -> PlanBuilder {
    plan.cpu().batch(2).seq(66).ce_chunk(33)
}

/// One accumulated step: the mean loss and every gradient.
fn step(plan: PlanBuilder, base: &Base, adapter: Option<&Adapter>, ds: &Dataset, c: Checkpointing) -> (f64, Gradients) {
    let plan = capacity(plan).checkpointing(c).build().unwrap();
    let mut engine = Engine::new(&plan).unwrap();
    engine.fill_dead_regions(true);
    engine.load(base).unwrap();
    if let Some(adapter) = adapter {
        engine.load_adapter(adapter).unwrap();
    }
    let batches = MICRO_STEPS.map(|indices| Batch::new(ds, indices));
    let items = batches.iter().map(Batch::num_items).sum();
    let mut loss = 0.0;
    for (i, batch) in batches.into_iter().enumerate() {
        loss += engine.micro_step(batch, items, 3, 40 + i as u64).unwrap().sum;
    }
    let names = engine.parameters().into_iter().map(|p| p.name);
    let gradients = names.map(|n| (n.clone(), engine.gradient(&n).unwrap())).collect();
    (loss / items as f64, gradients)
}

fn bits(gradients: &Gradients) -> BTreeMap<&str, Vec<u32>> {
    gradients.iter().map(|(n, g)| (n.as_str(), g.iter().map(|x| x.to_bits()).collect())).collect()
}

/// The largest relative difference of any gradient, and where it is.
fn worst(ours: &Gradients, theirs: &BTreeMap<String, Vec<f64>>) -> (f64, String) {
    let mut worst = (0.0, String::new());
    for (name, ours) in ours {
        let theirs = theirs.get(name).unwrap_or_else(|| panic!("candle has no gradient of {name}"));
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let scale = theirs.iter().fold(0f64, |m, x| m.max(x.abs()));
        assert!(scale > 0.0, "the gradient of {name} is zero");
        for (a, b) in ours.iter().zip(theirs) {
            let error = (f64::from(*a) - b).abs() / scale;
            if error > worst.0 || error.is_nan() {
                worst = (error, name.clone());
            }
        }
    }
    worst
}

/// Compares with candle, and the recomputed layers with the stored ones.
pub fn check(what: &str, plan: PlanBuilder, base: &Base, reference: &Reference, adapter: Option<&Adapter>) {
    check_to(TOLERANCE, what, plan, base, reference, adapter);
}

pub fn check_to(
    tolerance: f64,
    what: &str,
    plan: PlanBuilder,
    base: &Base,
    reference: &Reference,
    adapter: Option<&Adapter>,
) {
    let ds = dataset(base.spec(), &LENGTHS, 5);
    let (expected_loss, expected) = reference.gradients(&ds);
    let (loss, stored) = step(plan.clone(), base, adapter, &ds, Checkpointing::None);
    assert!((loss - expected_loss).abs() < 1e-6 * expected_loss, "{what}: loss {loss}, candle {expected_loss}");
    let (error, name) = worst(&stored, &expected);
    println!("{what}: {} gradients, worst {error:.1e} at {name}", stored.len());
    assert!(error < tolerance, "{what}: {name} differs by {error}");
    for c in [Checkpointing::All, Checkpointing::Layers(1)] {
        let (again, recomputed) = step(plan.clone(), base, adapter, &ds, c);
        assert_eq!(loss.to_bits(), again.to_bits(), "{what}, {c} recomputed: loss");
        assert!(bits(&stored) == bits(&recomputed), "{what}, {c} recomputed: other bits");
    }
}

/// Scaled by 1.5: a much larger adapter saturates the attention, and rounding is amplified a hundredfold.
pub fn lora_config(r: usize, targets: impl Into<Targets>) -> LoraConfig {
    LoraConfig { r, lora_alpha: 1.5 * r as f64, target_modules: targets.into(), ..LoraConfig::default() }
}

#[test]
fn full_fine_tuning_untied_and_tied() {
    for (what, config) in [
        ("full, separate lm_head, window", mistral(3, Some(16))),
        ("full, separate lm_head", llama(2, false)),
        ("full, tied lm_head", llama(2, true)),
    ] {
        let model = RandomModel::new(&config, 1);
        let expected = model.spec().tensors().len();
        let reference = Reference::of(&model.base, None);
        assert_eq!(reference.weights.len(), expected);
        check(what, MemoryPlan::full(model.spec()), &model.base, &reference, None);
    }
}

/// Targets at which the backward pass starts late, ends early or skips gradients of inputs.
fn targets() -> Vec<Targets> {
    vec![
        "all-linear".into(),
        "q_proj".into(),
        "v_proj,down_proj".into(),
        Targets::List(vec!["layers.2.mlp.down_proj".into()]),
        Targets::List(vec!["layers.2.self_attn.k_proj".into()]),
        Targets::Regex(r".*layers\.0\..*".into()),
        Targets::List(vec!["layers.0.self_attn.v_proj".into()]),
        Targets::List(vec!["layers.0.mlp.down_proj".into()]),
        Targets::List(vec!["layers.1.mlp.up_proj".into(), "layers.1.self_attn.o_proj".into()]),
        "o_proj".into(),
        "gate_proj".into(),
    ]
}

#[test]
fn lora_on_every_kind_of_target() {
    let model = RandomModel::new(&mistral(3, None), 2);
    for (i, targets) in targets().into_iter().enumerate() {
        let config = lora_config([1, 3, 8][i % 3], targets.clone());
        let adapter = adapter(model.spec(), &config, 9);
        let reference = Reference::of(&model.base, Some(&adapter));
        let plan = MemoryPlan::lora(model.spec()).adapter(config);
        check(&format!("LoRA on {targets}"), plan, &model.base, &reference, Some(&adapter));
    }
}

#[test]
fn lora_beside_a_tied_head() {
    let model = RandomModel::new(&llama(2, true), 3);
    let config = LoraConfig { use_rslora: true, lora_alpha: 3.0, ..lora_config(4, "all-linear") };
    let adapter = adapter(model.spec(), &config, 9);
    let reference = Reference::of(&model.base, Some(&adapter));
    check("rsLoRA", MemoryPlan::lora(model.spec()).adapter(config), &model.base, &reference, Some(&adapter));
}

/// The base as its 4-bit form gives it back: linear modules of the layers only.
pub fn dequantized(base: &Base, config: Nf4Config) -> impl Fn(&str) -> Vec<f32> {
    move |name| {
        if !name.ends_with("_proj.weight") {
            return base.checkpoint().read_f32(name).unwrap();
        }
        let t = base.checkpoint().read_tensor(name).unwrap();
        nf4::quantize(&t, config).unwrap().dequantize_f32().unwrap()
    }
}

#[test]
fn qlora_nested_and_plain() {
    let configs: [(Value, &str); 2] =
        [(mistral(3, Some(5)), "all-linear"), (llama(2, true), "k_proj,up_proj,down_proj")];
    for (config, targets) in configs {
        let model = RandomModel::new(&config, 4);
        for double_quant in [true, false] {
            let quant = Nf4Config { double_quant, ..Nf4Config::default() };
            let lora = lora_config(8, targets);
            let adapter = adapter(model.spec(), &lora, 9);
            let reference = Reference::new(model.spec(), DType::F64, dequantized(&model.base, quant), Some(&adapter));
            let plan = MemoryPlan::qlora(model.spec()).quantization(Some(quant)).adapter(lora);
            check(&format!("QLoRA, nested {double_quant}"), plan, &model.base, &reference, Some(&adapter));
        }
    }
}

#[test]
fn dropout_is_the_same_when_a_layer_is_recomputed() {
    let model = RandomModel::new(&mistral(3, None), 6);
    let ds = dataset(model.spec(), &LENGTHS, 5);
    let without = lora_config(8, "all-linear");
    let config = LoraConfig { lora_dropout: 0.1, ..without.clone() };
    let adapter = adapter(model.spec(), &config, 9);
    for quantized in [false, true] {
        let plan = |lora: &LoraConfig| {
            let plan = if quantized { MemoryPlan::qlora(model.spec()) } else { MemoryPlan::lora(model.spec()) };
            plan.adapter(lora.clone())
        };
        let run = |lora: &LoraConfig, c| step(plan(lora), &model.base, Some(&adapter), &ds, c);
        let (loss, stored) = run(&config, Checkpointing::None);
        for c in [Checkpointing::All, Checkpointing::Layers(1)] {
            let (again, recomputed) = run(&config, c);
            assert_eq!(loss.to_bits(), again.to_bits());
            assert!(bits(&stored) == bits(&recomputed), "{c} recomputed: other bits");
        }
        let (plain, _) = run(&without, Checkpointing::None);
        assert_ne!(loss, plain, "dropout must do something in training");
        // Evaluation has none.
        let evaluate = |lora: &LoraConfig| {
            let mut engine = Engine::new(&capacity(plan(lora)).build().unwrap()).unwrap();
            engine.load(&model.base).unwrap();
            engine.load_adapter(&adapter).unwrap();
            let batch = || Batch::new(&ds, &[0, 1]);
            let loss = engine.evaluate(batch()).unwrap();
            // A step of training in between changes nothing.
            engine.micro_step(batch(), 1, 3, 0).unwrap();
            assert_eq!(loss, engine.evaluate(batch()).unwrap());
            loss
        };
        assert_eq!(evaluate(&config), evaluate(&without));
    }
}
