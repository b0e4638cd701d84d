//! Interrupts: what runs stops at its next piece, nothing is lost, nothing half-done is left under a final name.
//!
//! One test alone in its process: the flag is one for all threads.

#[allow(dead_code)]
#[path = "suite/support.rs"]
mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use tunebook::data::{Batch, Dataset, Example};
use tunebook::engine::Engine;
use tunebook::lora::MergeBase;
use tunebook::model::Base;
use tunebook::nf4::{self, Nf4Config};
use tunebook::plan::MemoryPlan;
use tunebook::train::{
    Run, TrainConfig, clear_interrupt, interrupt, interrupt_until_cleared, interrupted, take_interrupt,
};

use support::golden;

fn base() -> Base {
    Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap()
}

fn plan() -> MemoryPlan {
    MemoryPlan::lora(base().spec()).cpu().r(4).batch(2).seq(48).build().unwrap()
}

fn data() -> Dataset {
    Dataset::new((0..16).map(|i| Example::all_trained((1..30).map(|t| (t * 7 + i * 3) % 90 + 3).collect())).collect())
        .unwrap()
}

fn run(dir: &std::path::Path, name: &str) -> Run {
    let config =
        TrainConfig::default().max_steps(4).per_device_train_batch_size(2).gradient_accumulation_steps(2).save_steps(1);
    Run::create(dir.join(name), plan(), base(), data(), config).unwrap()
}

/// The same losses as without an interrupt, wherever it comes.
fn training(dir: &std::path::Path) {
    let losses = |run: &Run| -> Vec<f64> { run.history().unwrap().steps.iter().map(|r| r.loss).collect() };
    let mut straight = run(dir, "straight");
    straight.train().unwrap();
    let mut stopped = run(dir, "stopped");
    stopped.micro_step().unwrap();
    interrupt();
    let e = stopped.micro_step().unwrap_err().to_string();
    assert!(e.contains("interrupted while training"), "{e}");
    assert!(!interrupted(), "it is answered");
    interrupt();
    // A loop forgets an interrupt from before it began.
    assert!(!stopped.steps(1).unwrap().interrupted);
    // One that holds does not let it begin.
    interrupt_until_cleared();
    for _ in 0..2 {
        assert!(stopped.steps(1).unwrap_err().to_string().contains("interrupted"));
    }
    assert!(interrupted());
    clear_interrupt();
    assert_eq!(stopped.train().unwrap().step, 4);
    assert_eq!(losses(&stopped), losses(&straight));
    // From another thread, while steps run.
    let mut long = Run::create(
        dir.join("long"),
        plan(),
        base(),
        data(),
        TrainConfig::default().max_steps(100_000).per_device_train_batch_size(2).save_steps(0),
    )
    .unwrap();
    let done = AtomicBool::new(false);
    let steps = std::thread::scope(|s| {
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            while !done.load(Ordering::SeqCst) {
                interrupt();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let steps = long.train();
        // Before anything can fail: the other thread waits for it.
        done.store(true, Ordering::SeqCst);
        steps.unwrap()
    });
    clear_interrupt();
    assert!(steps.interrupted && steps.step < 100_000, "{}", steps.step);
    long.step().unwrap();
}

#[test]
fn what_runs_stops_and_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    training(dir.path());

    // A quantization.
    let weight = Tensor::ones((256, 256), DType::F32, &Device::Cpu).unwrap();
    interrupt();
    let e = nf4::quantize(&weight, Nf4Config::default()).unwrap_err().to_string();
    assert!(e.contains("interrupted while quantizing"), "{e}");
    nf4::quantize(&weight, Nf4Config::default()).unwrap();

    // A load: what is there in part is not used.
    let mut engine = Engine::new(&plan()).unwrap();
    let logits = |engine: &mut Engine| engine.logits(Batch::new(&data(), &[0]));
    interrupt();
    let e = engine.load(&base()).unwrap_err().to_string();
    assert!(e.contains("interrupted while loading tensor") && e.contains("tiny-mistral"), "{e}");
    let e = logits(&mut engine).unwrap_err().to_string();
    assert!(e.contains("loaded in part") && e.contains("load the base again"), "{e}");
    engine.load(&base()).unwrap();
    logits(&mut engine).unwrap();

    // A merge leaves no directory that looks whole.
    let mut trained = run(dir.path(), "trained");
    trained.step().unwrap();
    let adapter = dir.path().join("adapter");
    trained.save_adapter(&adapter).unwrap();
    let out = dir.path().join("merged");
    let merge = || tunebook::lora::merge(golden("tiny/tiny-mistral/base"), &adapter).unwrap().onto(MergeBase::Original);
    interrupt();
    let e = merge().save(&out).unwrap_err().to_string();
    assert!(e.contains("interrupted while"), "{e}");
    assert!(!out.join("config.json").exists() && !out.join("model.safetensors").exists());
    assert!(!take_interrupt());
    merge().save(&out).unwrap();
    Base::from_dir(&out).unwrap();
}
