//! What the world is for: the share of held-out instructions that are answered exactly, before and after QLoRA.

use std::path::Path;
use std::time::Instant;

use tunebook::Result;
use tunebook::data::{ChatTemplate, DataConfig, Rows, Tokenizer, encode};
use tunebook::generate::exact_match;
use tunebook::model::Base;
use tunebook::plan::{Checkpointing, MemoryPlan};
use tunebook::train::{LrScheduler, Run, TrainConfig};

const BATCH: usize = 16;

/// Fine-tunes `world`/model on `world`/data/train.jsonl and prints the exact matches on `world`/data/test.jsonl,
/// with the questions that are still answered wrongly.
pub fn qlora(world: &Path, run_dir: &Path, seed: u64) -> Result<()> {
    let base = Base::from_dir(world.join("tiny-mistral"))?;
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
    let before = exact_match(run.engine(), &tokenizer, &template, &test)?;
    println!("base: {:.1} % exact", 100.0 * before.share());
    let began = Instant::now();
    run.train()?;
    let seconds = began.elapsed().as_secs_f64();
    let after = exact_match(run.engine(), &tokenizer, &template, &test)?;
    println!("after QLoRA ({seconds:.0} s): {:.1} % exact", 100.0 * after.share());
    for answer in after.answers.iter().filter(|a| !a.is_exact()) {
        println!("{}\n  wanted: {}\n  wrote:  {}\n", answer.question, answer.wanted, answer.wrote);
    }
    Ok(())
}
