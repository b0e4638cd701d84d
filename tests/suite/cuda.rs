//! The whole engine on a GPU: against the golden runs, against the CPU, against itself. Without a GPU nothing is tested
//! here, and each test says so.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::DType;
use tunebook::data::Batch;
use tunebook::engine::Engine;
use tunebook::engine::cuda;
use tunebook::engine::optimizer::AdamWHyper;
use tunebook::generate::Decoder;
use tunebook::lora::{Adapter, LoraConfig};
use tunebook::model::{Base, ModelSpec};
use tunebook::nf4::Nf4Config;
use tunebook::plan::{Checkpointing, DeviceKind, MemoryPlan, Method, PlanBuilder};
use tunebook::train::{Optim, Run, TrainConfig};

use crate::autograd::dequantized;
use crate::families;
use crate::oracle::{RandomModel, Reference, adapter, dataset};
use crate::support::golden;
use crate::trajectory;

/// The GPU, for one test at a time: some look at what the process holds. Says so when there is none.
fn gpu() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    match cuda::check() {
        Ok(()) => Some(ONE.lock().unwrap_or_else(PoisonError::into_inner)),
        Err(e) => {
            println!("skipped: {}", e.what());
            None
        }
    }
}

fn model(head_dim: usize) -> RandomModel {
    let config = serde_json::json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 256, "intermediate_size": 520,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": head_dim,
        "vocab_size": 301, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 100, "tie_word_embeddings": false, "hidden_act": "silu"
    });
    RandomModel::new(&config, 21)
}

/// What is compared between engines: named values, by their bits.
type Trace = Vec<(String, Vec<u8>)>;

/// Everything that three steps, an evaluation and some decoding leave behind.
fn steps(model: &RandomModel, plan: PlanBuilder, lora: Option<&LoraConfig>) -> Trace {
    let spec: &ModelSpec = model.spec();
    let ds = dataset(spec, &[130, 7, 200, 64, 90, 300, 1, 31], 22);
    let mut engine = Engine::new(&plan.batch(2).seq(300).ce_chunk(100).build().unwrap()).unwrap();
    engine.fill_dead_regions(true);
    engine.load(&model.base).unwrap();
    if let Some(lora) = lora {
        let mut pairs = adapter(spec, lora, 23);
        for pair in pairs.tensors.values_mut().filter(|_| lora.use_dora) {
            pair.magnitude = Some((0..pair.b.len() / pair.r).map(|i| 1.2 + (i % 7) as f32 / 10.0).collect());
        }
        engine.load_adapter(&pairs).unwrap();
    }
    let mut out = Trace::new();
    for step in 0..3u32 {
        for micro in 0..2 {
            let first = (4 * step as usize + 2 * micro) % 8;
            let batch = Batch::new(&ds, &[first, first + 1]);
            let loss = engine.micro_step(batch, 300, 1, u64::from(step) * 2 + micro as u64).unwrap();
            assert!(loss.sum.is_finite());
            out.push((format!("loss {step} {micro}"), loss.sum.to_le_bytes().to_vec()));
        }
        for p in engine.parameters() {
            let gradient = engine.gradient(&p.name).unwrap();
            out.push((format!("gradient {step} {}", p.name), bytemuck::cast_slice(&gradient).to_vec()));
        }
        let hyper = AdamWHyper { lr: 1e-3, step: step + 1, ..AdamWHyper::default() };
        let norm = engine.optimizer_step(hyper, 0.3).unwrap();
        out.push((format!("norm {step}"), norm.norm.to_le_bytes().to_vec()));
    }
    for p in engine.parameters().into_iter().chain(engine.optimizer_state()) {
        out.push((p.name.clone(), engine.state_bytes(&p).unwrap().into_owned()));
    }
    let loss = engine.evaluate(Batch::new(&ds, &[0, 2])).unwrap();
    out.push(("evaluation".into(), loss.sum.to_le_bytes().to_vec()));
    // The last token by itself: other kernels, over a cache of all before it, give what the whole pass gives.
    let ids = ds.get(0).input_ids.clone();
    engine.reset();
    engine.forward(&ids[..ids.len() - 1]).unwrap();
    let logits = engine.forward(&ids[ids.len() - 1..]).unwrap();
    let whole = engine.logits(Batch::new(&ds, &[0])).unwrap();
    let (of_cache, of_pass) =
        (bytemuck::cast_slice(&logits), bytemuck::cast_slice(&whole[whole.len() - logits.len()..]));
    let apart = distance(of_cache, of_pass);
    assert!(apart < 3e-2, "decoding: {apart:e}");
    out.push(("logits".into(), bytemuck::cast_slice(&logits).to_vec()));
    out
}

fn same(what: &str, a: &Trace, b: &Trace) {
    assert_eq!(a.len(), b.len());
    for ((name, a), (_, b)) in a.iter().zip(b) {
        assert!(a == b, "{what}: {name} has other bits");
    }
}

/// Every method with the options that change its arithmetic.
fn plans(spec: &ModelSpec) -> Vec<(&'static str, PlanBuilder, Option<LoraConfig>)> {
    let lora = LoraConfig { r: 8, lora_dropout: 0.1, ..LoraConfig::default() };
    let dora = LoraConfig { use_dora: true, lora_dropout: 0.0, ..lora.clone() };
    vec![
        ("qlora", MemoryPlan::qlora(spec).adapter(lora.clone()).optim(Optim::AdamW8bit), Some(lora.clone())),
        (
            "qlora, paged",
            MemoryPlan::qlora(spec).adapter(lora.clone()).optim(Optim::PagedAdamW8bit),
            Some(lora.clone()),
        ),
        ("lora", MemoryPlan::lora(spec).adapter(lora.clone()).optim(Optim::AdamW), Some(lora)),
        ("dora", MemoryPlan::qlora(spec).adapter(dora.clone()).optim(Optim::AdamW), Some(dora.clone())),
        ("dora on a dense base", MemoryPlan::lora(spec).adapter(dora.clone()).optim(Optim::AdamW), Some(dora)),
        ("full", MemoryPlan::full(spec).optim(Optim::PagedAdamW32bit), None),
        ("full, 8-bit", MemoryPlan::full(spec).optim(Optim::AdamW8bit), None),
    ]
}

#[test]
fn the_same_bits_twice_and_with_any_layer_recomputed() {
    let Some(_gpu) = gpu() else { return };
    for head_dim in [64, 40, 128] {
        let model = model(head_dim);
        for (name, plan, lora) in plans(model.spec()) {
            let all = plan.clone().checkpointing(Checkpointing::All);
            let first = steps(&model, all.clone(), lora.as_ref());
            same(name, &first, &steps(&model, all, lora.as_ref()));
            for layers in [0, 2] {
                let some = plan.clone().checkpointing(Checkpointing::Layers(layers));
                same(&format!("{name}, {layers} recomputed"), &first, &steps(&model, some, lora.as_ref()));
            }
            // Where things lie, and when weights are decoded, changes no bit.
            for layers in [2, 3] {
                let hosted = plan.clone().checkpointing(Checkpointing::Layers(layers));
                let hosted = hosted.host_checkpoints(true).host_embeddings(lora.is_some());
                let some = hosted.clone().keep_dequantized_modules(["k_proj", "up_proj"]);
                for (kept, plan) in [("all", hosted.keep_dequantized(true)), ("some", some)] {
                    let what = format!("{name}, {layers} recomputed, on the host, {kept} decoded once");
                    same(&what, &first, &steps(&model, plan, lora.as_ref()));
                }
            }
            let qlora = plan.clone().build().unwrap().config().method == Method::Qlora;
            for held in [1, 3].into_iter().filter(|_| qlora) {
                for layers in [0, 3] {
                    let plan = plan.clone().checkpointing(Checkpointing::Layers(layers)).dequantized_layers(held);
                    let what = format!("{name}, {layers} recomputed, {held} held dequantized");
                    same(&what, &first, &steps(&model, plan, lora.as_ref()));
                }
            }
        }
        let pure = MemoryPlan::full(model.spec()).pure_bf16();
        same("pure bf16", &steps(&model, pure.clone(), None), &steps(&model, pure, None));
    }
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    match bytes.len() {
        8 => vec![f64::from_le_bytes(bytes.try_into().unwrap())],
        _ => bytemuck::pod_collect_to_vec::<u8, f32>(bytes).into_iter().map(f64::from).collect(),
    }
}

fn distance(a: &[u8], b: &[u8]) -> f64 {
    let (a, b) = (floats(a), floats(b));
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-30)
}

/// f32 on the GPU is the CPU's arithmetic in another order; bf16 stays near.
#[test]
fn steps_agree_with_the_cpu() {
    let Some(_gpu) = gpu() else { return };
    for head_dim in [64, 40, 128] {
        let model = model(head_dim);
        for (name, plan, lora) in plans(model.spec()) {
            let cpu = steps(&model, plan.clone().cpu(), lora.as_ref());
            let f32 = steps(&model, plan.clone().compute_dtype(DType::F32), lora.as_ref());
            let bf16 = steps(&model, plan, lora.as_ref());
            for ((what, expected), ((_, f32), (_, bf16))) in cpu.iter().zip(f32.iter().zip(&bf16)) {
                // Later steps and 8-bit codes amplify differences; what the optimizer leaves is tested by itself.
                let first_step = what.starts_with("gradient 0") || what.starts_with("loss 0");
                if first_step {
                    let (exact, rounded) = (distance(f32, expected), distance(bf16, expected));
                    assert!(exact < 2e-5, "{name}: {what} in f32: {exact:e}");
                    // How near, the next test says.
                    assert!(rounded < 0.2, "{name}: {what} in bf16: {rounded:e}");
                } else if what.starts_with("loss") || what == "evaluation" || what == "logits" {
                    assert!(distance(f32, expected) < 2e-2, "{name}: {what} in f32: {:e}", distance(f32, expected));
                    assert!(distance(bf16, expected) < 0.2, "{name}: {what} in bf16: {:e}", distance(bf16, expected));
                }
            }
        }
    }
}

/// DoRA starts from the lengths of the base's rows: with it the model is the base.
#[test]
fn dora_starts_as_the_base() {
    let Some(_gpu) = gpu() else { return };
    let model = model(64);
    let ds = dataset(model.spec(), &[130, 7], 22);
    let dora = LoraConfig { r: 8, use_dora: true, ..LoraConfig::default() };
    for plan in [MemoryPlan::qlora(model.spec()), MemoryPlan::lora(model.spec())] {
        let plan = plan.adapter(dora.clone()).batch(2).seq(130);
        let started = |plan: PlanBuilder| {
            let mut engine = Engine::new(&plan.build().unwrap()).unwrap();
            engine.load(&model.base).unwrap();
            engine.init_adapter(3).unwrap();
            engine
        };
        let magnitudes = |engine: &Engine| -> Vec<f64> {
            let pairs = engine.adapter_pairs().unwrap();
            pairs.into_iter().flat_map(|(_, pair)| pair.magnitude.unwrap()).map(f64::from).collect()
        };
        let cpu = started(plan.clone().cpu());
        for (dtype, most) in [(DType::F32, 1e-5), (DType::BF16, 1e-2)] {
            let mut engine = started(plan.clone().compute_dtype(dtype));
            let (ours, theirs) = (magnitudes(&engine), magnitudes(&cpu));
            let worst = ours.iter().zip(&theirs).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
            assert!(worst < most, "{dtype:?}: {worst:e}");
            let batch = || Batch::new(&ds, &[0, 1]);
            let with = engine.logits(batch()).unwrap();
            engine.enable_adapter(false);
            let without = engine.logits(batch()).unwrap();
            let apart = distance(bytemuck::cast_slice(&with), bytemuck::cast_slice(&without));
            assert!(apart < 2.0 * most, "{dtype:?}: {apart:e}");
        }
    }
}

/// Every gradient in bf16 is at most twice as far from the exact one as the plain computation in bf16 is.
#[test]
fn gradients_in_bf16_are_as_good_as_bf16_allows() {
    let Some(_gpu) = gpu() else { return };
    for head_dim in [64, 40, 128] {
        let model = model(head_dim);
        let ds = dataset(model.spec(), &[130, 7, 64, 90], 22);
        let lora = LoraConfig { r: 8, ..LoraConfig::default() };
        let pairs = adapter(model.spec(), &lora, 23);
        let quant = Nf4Config::default();
        let dense = |name: &str| model.base.checkpoint().read_f32(name).unwrap();
        let four_bit = dequantized(&model.base, quant);
        type Case<'a> = (&'a str, PlanBuilder, Option<&'a Adapter>, &'a dyn Fn(&str) -> Vec<f32>);
        let cases: [Case; 3] = [
            ("qlora", MemoryPlan::qlora(model.spec()).adapter(lora.clone()), Some(&pairs), &four_bit),
            ("lora", MemoryPlan::lora(model.spec()).adapter(lora.clone()), Some(&pairs), &dense),
            ("full", MemoryPlan::full(model.spec()), None, &dense),
        ];
        for (name, plan, pairs, weight) in cases {
            let mut engine = Engine::new(&plan.batch(4).seq(130).build().unwrap()).unwrap();
            engine.load(&model.base).unwrap();
            if let Some(pairs) = pairs {
                engine.load_adapter(pairs).unwrap();
            }
            let batch = Batch::new(&ds, &[0, 1, 2, 3]);
            let items = batch.num_items();
            let loss = engine.micro_step(batch, items, 1, 0).unwrap().mean();
            let (exact_loss, exact) = Reference::new(model.spec(), DType::F64, weight, pairs).gradients(&ds);
            let (_, plain) = Reference::new(model.spec(), DType::BF16, weight, pairs).gradients(&ds);
            assert!((loss - exact_loss).abs() < 0.01 * exact_loss, "{name}: loss {loss}, exact {exact_loss}");
            let mut worst = (0.0, String::new());
            for p in engine.parameters() {
                let ours: Vec<f64> = engine.gradient(&p.name).unwrap().into_iter().map(f64::from).collect();
                let error =
                    |x: &[f64]| x.iter().zip(&exact[&p.name]).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
                let ratio = error(&ours) / error(&plain[&p.name]);
                if ratio > worst.0 || ratio.is_nan() {
                    worst = (ratio, p.name.clone());
                }
            }
            println!("{name}, heads of {head_dim}: error at most {:.2} times the plain one's ({})", worst.0, worst.1);
            assert!(worst.0 <= 2.0, "{name}: {} is {} times as far as plain bf16", worst.1, worst.0);
        }
    }
}

/// Every family in f32: transformers' logits, losses and gradients.
#[test]
fn families_are_those_of_transformers() {
    if let Some(_gpu) = gpu() {
        families::follow_all(DeviceKind::Cuda);
    }
}

/// Every family in bf16 stays near, with every layer recomputed or none, and decodes as it evaluates.
#[test]
fn families_in_bf16() {
    let Some(_gpu) = gpu() else { return };
    for (what, config) in families::forms() {
        let model = RandomModel::new(&config, 31);
        let lora = LoraConfig { r: 8, ..LoraConfig::default() };
        for (name, plan, lora) in [
            ("qlora", MemoryPlan::qlora(model.spec()).adapter(lora.clone()), Some(&lora)),
            ("full", MemoryPlan::full(model.spec()), None),
        ] {
            let name = format!("{what}, {name}");
            let cpu = steps(&model, plan.clone().cpu(), lora);
            let bf16 = steps(&model, plan.clone().checkpointing(Checkpointing::All), lora);
            same(&name, &bf16, &steps(&model, plan.checkpointing(Checkpointing::None), lora));
            for ((part, expected), (_, found)) in cpu.iter().zip(&bf16) {
                if part.starts_with("loss 0") || part.starts_with("gradient 0") {
                    let error = distance(found, expected);
                    assert!(error < 0.3, "{name}: {part}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn trajectories_of_the_trainer_in_f32() {
    if let Some(_gpu) = gpu() {
        trajectory::follow_all(DeviceKind::Cuda, DType::F32);
    }
}

#[test]
fn trajectories_of_the_trainer_in_bf16() {
    if let Some(_gpu) = gpu() {
        trajectory::follow_all(DeviceKind::Cuda, DType::BF16);
    }
}

/// A run that stops and is resumed ends as one that never stopped, bit for bit.
#[test]
fn stop_and_resume() {
    let Some(_gpu) = gpu() else { return };
    let base = || Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let plan = |optim| {
        let plan = MemoryPlan::qlora(base().spec()).r(8).lora_dropout(0.1).batch(2).seq(48).optim(optim);
        plan.ce_chunk(32).build().unwrap()
    };
    for optim in [Optim::AdamW, Optim::AdamW8bit, Optim::PagedAdamW8bit] {
        let config = TrainConfig::default()
            .max_steps(8)
            .per_device_train_batch_size(2)
            .gradient_accumulation_steps(2)
            .optim(optim)
            .save_steps(0);
        let dir = tempfile::tempdir().unwrap();
        let finish = |mut run: Run, steps: usize| {
            let losses: Vec<u64> = (0..steps).map(|_| run.step().unwrap().loss.to_bits()).collect();
            (losses, run)
        };
        let data = || trajectory::dataset("tiny-mistral");
        let whole = Run::create(dir.path().join("whole"), plan(optim), base(), data(), config.clone()).unwrap();
        let (expected, mut whole) = finish(whole, 8);
        let parts = Run::create(dir.path().join("parts"), plan(optim), base(), data(), config).unwrap();
        let (mut found, mut parts) = finish(parts, 3);
        parts.checkpoint().unwrap();
        drop(parts);
        let (rest, mut parts) = finish(Run::resume(dir.path().join("parts")).unwrap(), 5);
        found.extend(rest);
        assert_eq!(found, expected, "{optim:?}");
        let bytes = |run: &mut Run| {
            let e = run.engine();
            let all = e.parameters().into_iter().chain(e.optimizer_state()).collect::<Vec<_>>();
            all.iter().map(|t| e.state_bytes(t).unwrap().into_owned()).collect::<Vec<_>>()
        };
        assert!(bytes(&mut whole) == bytes(&mut parts), "{optim:?}: the state differs");
    }
}

/// A step, wherever it runs, leaves the memory of the process as the engine's creation left it.
#[test]
fn nothing_is_allocated_after_the_start() {
    let Some(_gpu) = gpu() else { return };
    let model = model(64);
    let ds = dataset(model.spec(), &[130, 7, 200, 64, 90, 300, 1, 31], 22);
    let plan = MemoryPlan::qlora(model.spec()).r(8).batch(2).seq(300).optim(Optim::AdamW8bit).build().unwrap();
    let mut engine = Engine::new(&plan).unwrap();
    engine.load(&model.base).unwrap();
    engine.init_adapter(1).unwrap();
    let Some(before) = engine.process_bytes() else {
        println!("skipped: the driver does not say what a process holds");
        return;
    };
    assert!(before > plan.arena_bytes());
    for step in 1..=3 {
        engine.micro_step(Batch::new(&ds, &[2, 5]), 300, 1, step).unwrap();
        engine.optimizer_step(AdamWHyper { lr: 1e-3, step: step as u32, ..AdamWHyper::default() }, 0.3).unwrap();
    }
    engine.evaluate(Batch::new(&ds, &[0, 2])).unwrap();
    assert_eq!(engine.process_bytes(), Some(before));
}
