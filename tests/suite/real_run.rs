//! The whole job on a real model and real instructions: stories260K and dolly rows, when they are at hand.

use tunebook::data::{DataConfig, InstructionTemplate, Rows, Tokenizer, encode};
use tunebook::engine::Engine;
use tunebook::generate::{Sampling, generate};
use tunebook::lora::{MergeBase, merge};
use tunebook::model::Base;
use tunebook::nf4::Nf4Config;
use tunebook::plan::MemoryPlan;
use tunebook::train::{LrScheduler, Run, TrainConfig};

use crate::support::shared;

#[test]
fn stories260k_learns_from_dolly_stops_resumes_merges_and_talks() {
    let (Some(model), Some(rows)) = (shared("real/models/stories260K"), shared("real/data/dolly_1000.jsonl")) else {
        return;
    };
    let base = Base::from_dir(&model).unwrap();
    let tokenizer = Tokenizer::from_dir(&model).unwrap();
    tokenizer.check(base.spec()).unwrap();
    let rows = Rows::from_jsonl(&rows).unwrap();
    let template = InstructionTemplate::new("### Instruction:\n{instruction}\n\n### Response:\n", "{response}");
    let data = encode(&rows, &tokenizer, &DataConfig::instruction(template.clone()).max_length(256)).unwrap();
    assert!(data.len() > 500, "{:?}", data.report());
    let (eval, train) = data.split_at(24).unwrap();

    let plan = MemoryPlan::qlora(base.spec()).cpu().r(8).batch(8).seq(256).build().unwrap();
    let config = TrainConfig::default()
        .max_steps(30)
        .per_device_train_batch_size(8)
        .learning_rate(5e-3)
        .lr_scheduler_type(LrScheduler::Cosine)
        .warmup_steps(3)
        .save_steps(10)
        .seed(7);
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    let mut run = Run::create(&run_dir, plan, base.clone(), train, config).unwrap();
    let before = run.evaluate(&eval).unwrap().loss;
    run.steps(13).unwrap();
    drop(run);

    let mut run = Run::resume(&run_dir).unwrap();
    assert_eq!(run.step_count(), 10, "the last checkpoint");
    run.train().unwrap();
    assert!(run.is_finished());
    let after = run.evaluate(&eval).unwrap().loss;
    println!("held-out loss {before:.4} before, {after:.4} after 30 steps");
    assert!(after < before - 0.1, "{before} -> {after}");
    assert_eq!(run.history().unwrap().steps.len(), 30);

    let adapter = run.save_adapter(dir.path().join("adapter")).unwrap();
    let merged = dir.path().join("merged");
    merge(&model, &adapter).unwrap().onto(MergeBase::Dequantized(Nf4Config::default())).save(&merged).unwrap();
    let merged = Base::from_dir(&merged).unwrap();
    let mut engine = Engine::new(&MemoryPlan::inference(merged.spec()).cpu().context(256).build().unwrap()).unwrap();
    engine.load(&merged).unwrap();
    let prompt = template.prompt_for(&[("instruction", "What is a cat?")]).unwrap();
    let sampling = Sampling::greedy().max_new_tokens(24);
    let said = generate(&mut engine, &tokenizer, &prompt, &sampling).unwrap();
    let adapted = generate(run.engine(), &tokenizer, &prompt, &sampling).unwrap();
    assert!(!said.text.trim().is_empty());
    assert_eq!(said.text, adapted.text, "merged onto what the adapter was trained on, the words are the same");
}
