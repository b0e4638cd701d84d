//! The model: its shape, training it from scratch, its files.

use std::path::Path;

use candle_core::DType;
use serde_json::json;
use tunebook::data::{DataConfig, Dataset, Rows, Tokenizer, encode};
use tunebook::engine::Engine;
use tunebook::files::write_atomic_bytes;
use tunebook::model::{ModelSpec, SafetensorsWriter, TensorHeader, canonical_order, pt_metadata};
use tunebook::plan::{Checkpointing, MemoryPlan};
use tunebook::train::{LrScheduler, Run, TrainConfig};
use tunebook::{Error, Result};

/// Tokens of the vocabulary: 256 bytes, the special tokens, and nearly every word of the world as one token.
pub const VOCAB: usize = 1024;
const BATCH: usize = 16;
const MAX_LENGTH: usize = 192;

/// Mistral's architecture, 1.8 million parameters: 3.6 MB in bf16.
pub fn write_config(dir: &Path) -> Result<ModelSpec> {
    let config = json!({
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": VOCAB,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "sliding_window": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "bos_token_id": crate::tokenizer::BOS,
        "eos_token_id": crate::tokenizer::EOS,
        "torch_dtype": "bfloat16",
    });
    write_atomic_bytes(dir.join("config.json"), format!("{config:#}\n").as_bytes())?;
    ModelSpec::from_dir(dir)
}

/// Whole texts as examples, each between `<s>` and `</s>`.
pub fn dataset(texts: &[String], tokenizer: &Tokenizer) -> Result<Dataset> {
    let rows = Rows::from_values(texts.iter().map(|text| json!({"text": text})).collect())?;
    encode(&rows, tokenizer, &DataConfig::text("text").max_length(MAX_LENGTH))
}

/// Full fine-tuning of random weights, one epoch; the weights go to `dir` in bf16. `run_dir` is resumed if it is there.
pub fn pretrain(
    spec: &ModelSpec,
    data: Dataset,
    held_out: &Dataset,
    seed: u64,
    run_dir: &Path,
    dir: &Path,
) -> Result<()> {
    let mut run = if run_dir.exists() {
        Run::resume(run_dir)?
    } else {
        let plan =
            MemoryPlan::full(spec).cpu().batch(BATCH).seq(MAX_LENGTH).checkpointing(Checkpointing::None).build()?;
        let config = TrainConfig::default()
            .per_device_train_batch_size(BATCH)
            .learning_rate(2e-3)
            .lr_scheduler_type(LrScheduler::Cosine)
            .warmup_ratio(0.03)
            .weight_decay(0.1)
            .adam_beta2(0.98)
            .max_grad_norm(1.0)
            .logging_steps(25)
            .save_steps(250)
            .seed(seed);
        Run::create_from_scratch(run_dir, plan, data, config)?
    };
    while !run.is_finished() {
        run.steps(250)?;
        println!("step {}: held-out loss {:.4}", run.step_count(), run.evaluate(held_out)?.loss);
    }
    save(run.engine(), spec, dir)
}

fn save(engine: &Engine, spec: &ModelSpec, dir: &Path) -> Result<()> {
    let mut headers: Vec<TensorHeader> =
        spec.tensors().into_iter().map(|t| TensorHeader::new(t.name, DType::BF16, t.shape)).collect();
    canonical_order(&mut headers);
    let names: Vec<String> = headers.iter().map(|t| t.name.clone()).collect();
    let path = dir.join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, headers, &pt_metadata())?;
    for name in names {
        writer.write_f32(&name, &engine.weight(&name)?)?;
    }
    writer.finish()?;
    let bytes = std::fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
    println!("{}: {bytes} bytes", path.display());
    Ok(())
}
