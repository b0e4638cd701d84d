//! What the world is for: the share of held-out instructions that are answered exactly, before and after QLoRA.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use tunebook::Result;
use tunebook::data::{ChatTemplate, DataConfig, Rows, Tokenizer, encode};
use tunebook::generate::{Decoder, Sampling, generate_chat};
use tunebook::model::Base;
use tunebook::plan::{Checkpointing, MemoryPlan};
use tunebook::train::{LrScheduler, Run, TrainConfig};

const BATCH: usize = 16;

/// Fine-tunes the model in `model` on `data/train.jsonl` beside it and prints the exact matches on `data/test.jsonl`.
pub fn qlora(world: &Path, run_dir: &Path, seed: u64) -> Result<()> {
    let base = Base::from_dir(world.join("model"))?;
    let tokenizer = Tokenizer::from_dir(base.dir())?;
    let template = ChatTemplate::from_tokenizer(&tokenizer)?;
    let train = Rows::from_jsonl(world.join("data/train.jsonl"))?;
    let test = Rows::from_jsonl(world.join("data/test.jsonl"))?;
    let data = encode(&train, &tokenizer, &DataConfig::messages(template.clone()))?;
    println!("{} examples, {} tokens, longest {}", data.len(), data.total_tokens(), data.max_len());

    let plan = MemoryPlan::qlora(base.spec())
        .cpu()
        .r(16)
        .lora_alpha(32.0)
        .batch(BATCH)
        .seq(data.max_len())
        .checkpointing(Checkpointing::None)
        .build()?;
    let config = TrainConfig::default()
        .num_train_epochs(2.0)
        .per_device_train_batch_size(BATCH)
        .learning_rate(3e-3)
        .lr_scheduler_type(LrScheduler::Cosine)
        .warmup_ratio(0.05)
        .max_grad_norm(1.0)
        .logging_steps(50)
        .save_steps(0)
        .seed(seed);
    let mut run = Run::create(run_dir, plan, base, data, config)?;
    println!("base: {:.1} % exact", 100.0 * exact_match(run.engine(), &tokenizer, &template, &test, 0)?);
    let began = Instant::now();
    run.train()?;
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "after QLoRA ({seconds:.0} s): {:.1} % exact",
        100.0 * exact_match(run.engine(), &tokenizer, &template, &test, 5)?
    );
    Ok(())
}

/// The share of rows whose answer is exactly the greedy one; prints the first `show`.
fn exact_match(
    model: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    rows: &Rows,
    show: usize,
) -> Result<f64> {
    let mut exact = 0;
    for i in 0..rows.len() {
        let messages = rows.get(i).and_then(|row| row["messages"].as_array()).cloned().unwrap_or_default();
        let (question, wanted) = (&messages[..1], messages[1]["content"].as_str().unwrap_or_default());
        let sampling = Sampling::greedy().max_new_tokens(32);
        let answer = generate_chat(model, tokenizer, template, question, &sampling, &mut |_| {})?;
        exact += usize::from(answer.text.trim() == wanted);
        if i < show {
            println!("{}\n  wanted: {wanted}\n  wrote:  {}\n", text(question), answer.text.trim());
        }
    }
    Ok(exact as f64 / rows.len() as f64)
}

fn text(messages: &[Value]) -> &str {
    messages[0]["content"].as_str().unwrap_or_default()
}
