//! Twenty steps against the Trainer of transformers: losses, gradient norms, learning rates, adapters.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use serde_json::Value;
use tunebook::data::{Dataset, Example};
use tunebook::lora::Adapter;
use tunebook::model::Base;
use tunebook::plan::{Checkpointing, DeviceKind, MemoryPlan};
use tunebook::train::{LrScheduler, Optim, Run, TrainConfig};

use crate::support::golden;

/// The padded rows of the golden data set as examples.
pub fn dataset(model: &str) -> Dataset {
    let t = safetensors::load(golden(&format!("tiny/{model}/train/data.safetensors")), &Device::Cpu).unwrap();
    let get = |name: &str| t[name].to_vec2::<i64>().unwrap();
    let (ids, mask, labels) = (get("input_ids"), get("attention_mask"), get("labels"));
    let rows = ids.iter().zip(&mask).zip(&labels);
    let examples = rows.map(|((ids, mask), labels)| {
        let n = mask.iter().filter(|&&m| m == 1).count();
        Example {
            input_ids: ids[..n].iter().map(|&x| x as u32).collect(),
            labels: labels[..n].iter().map(|&x| x as i32).collect(),
        }
    });
    Dataset::new(examples.collect()).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// An adapter from the golden tensors, whose files carry no config.
fn adapter(model: &str, config: &str, tensors: &str) -> Adapter {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(
        golden(&format!("tiny/{model}/train/{config}/adapter_config.json")),
        dir.path().join("adapter_config.json"),
    )
    .unwrap();
    std::fs::copy(golden(&format!("tiny/{model}/train/{tensors}")), dir.path().join("adapter_model.safetensors"))
        .unwrap();
    Adapter::load(dir.path()).unwrap()
}

fn config(spec: &Value) -> (TrainConfig, Optim) {
    let optim = match spec["opt"].as_str().unwrap() {
        "adamw_torch" => Optim::AdamW,
        "adamw_8bit" => Optim::AdamW8bit,
        "paged_adamw_8bit" => Optim::PagedAdamW8bit,
        "paged_adamw_32bit" => Optim::PagedAdamW32bit,
        other => panic!("{other}"),
    };
    let scheduler = match spec["sched"].as_str().unwrap() {
        "constant" => LrScheduler::Constant,
        "constant_with_warmup" => LrScheduler::ConstantWithWarmup,
        "linear" => LrScheduler::Linear,
        "cosine" => LrScheduler::Cosine,
        other => panic!("{other}"),
    };
    let config = TrainConfig::default()
        .max_steps(20)
        .per_device_train_batch_size(2)
        .gradient_accumulation_steps(spec["ga"].as_u64().unwrap_or(2) as usize)
        .optim(optim)
        .learning_rate(2e-3)
        .weight_decay(0.001)
        .max_grad_norm(spec["clip"].as_f64().unwrap_or(0.3))
        .warmup_steps(spec["warm"].as_u64().unwrap_or(0))
        .lr_scheduler_type(scheduler)
        .shuffle(false)
        .save_steps(0);
    (config, optim)
}

fn close(what: &str, ours: f64, theirs: f64, tolerance: f64) {
    let scale = theirs.abs().max(1.0);
    assert!((ours - theirs).abs() <= tolerance * scale, "{what}: ours {ours}, theirs {theirs}");
}

fn worst(ours: &Adapter, theirs: &HashMap<String, Tensor>) -> f32 {
    let mut worst = 0f32;
    for (module, pair) in &ours.tensors {
        for (part, values) in [("lora_A", &pair.a), ("lora_B", &pair.b)] {
            let name = format!("base_model.model.{module}.{part}.weight");
            let expected = theirs[&name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(expected.len(), values.len());
            worst = values.iter().zip(&expected).fold(worst, |w, (a, b)| w.max((a - b).abs()));
        }
    }
    worst
}

/// Twenty steps of a golden run on a device; the tolerances are those of its arithmetic.
pub fn follow(model: &str, name: &str, device: DeviceKind, compute: DType) {
    let golden_run = json(&golden(&format!("tiny/{model}/train/{name}/run.json")));
    let spec = &golden_run["spec"];
    let r = spec["r"].as_u64().unwrap() as usize;
    let quantized = !spec["q"].is_null();
    let (config, optim) = config(spec);
    let base = Base::from_dir(golden(&format!("tiny/{model}/base"))).unwrap();
    let plan = if quantized { MemoryPlan::qlora(base.spec()) } else { MemoryPlan::lora(base.spec()) };
    let plan = plan
        .device(device)
        .compute_dtype(compute)
        .r(r)
        .lora_alpha(16.0)
        .batch(2)
        .seq(48)
        .optim(optim)
        .checkpointing(Checkpointing::Layers(1));
    let plan = plan.ce_chunk(32).build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::create(dir.path().join("run"), plan, base, dataset(model), config).unwrap();
    let init = if r == 8 { "t1_f32_adamw_constant" } else { "t5_f32_pagedadamw8bit_constant" };
    run.load_adapter(&adapter(model, name, &format!("{init}/adapter_init.safetensors"))).unwrap();
    run.engine().fill_dead_regions(true);
    let eight_bit = optim.is_8bit() && r > 8;
    let (loss, norm, weights) = match (quantized, eight_bit) {
        (true, _) => (1e-3, 2e-2, None),
        (false, true) => (2e-4, 5e-3, None),
        (false, false) => (1e-5, 1e-5, Some(1e-5)),
    };
    // In bf16 the losses within 1 %; the rest follows its own path.
    let bf16 = compute == DType::BF16;
    let (loss, norm, weights) = if bf16 { (1e-2, 0.1, None) } else { (loss, norm, weights) };
    for step in golden_run["steps"].as_array().unwrap() {
        let at = format!("{model} {name} step {}", step["step"]);
        let report = run.step().unwrap();
        close(&format!("{at} loss"), report.loss, step["exact_loss"].as_f64().unwrap(), loss);
        close(&format!("{at} learning rate"), report.learning_rate, step["learning_rate"].as_f64().unwrap(), 1e-12);
        if let Some(expected) = step["grad_norm"].as_f64() {
            close(&format!("{at} gradient norm"), report.grad_norm, expected, norm);
        }
    }
    let end = golden(&format!("tiny/{model}/train/{name}/adapter_step20.safetensors"));
    if let (Some(tolerance), true) = (weights, end.exists()) {
        let found = worst(&run.adapter().unwrap(), &safetensors::load(end, &Device::Cpu).unwrap());
        assert!(found < tolerance, "{model} {name}: adapter differs by {found}");
    }
}

/// Every golden run.
pub fn follow_all(device: DeviceKind, compute: DType) {
    for model in super::engine::MODELS {
        let mut names: Vec<String> = std::fs::read_dir(golden(&format!("tiny/{model}/train")))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.starts_with('t'))
            .collect();
        names.sort();
        assert!(names.len() >= 8, "{names:?}");
        for name in names {
            follow(model, &name, device, compute);
        }
    }
}

#[test]
fn trajectories_of_the_trainer() {
    follow_all(DeviceKind::Cpu, DType::F32);
}
