//! What other programs read of us, and we of them: the Rust side of `tests/interop/check.py`.
//!
//!     cargo run --example interop write DIR    an adapter, a 4-bit checkpoint and a merged model, with their logits
//!     cargo run --example interop read DIR     the same from PEFT, bitsandbytes and transformers, compared

use std::path::Path;

use candle_core::DType;
use serde_json::{Value, json};
use tunebook::data::{Batch, ChatOptions, Example, message};
use tunebook::lora;
use tunebook::model::{SafetensorsWriter, TensorHeader, pt_metadata, write_bnb_4bit};
use tunebook::plan::PlanBuilder;
use tunebook::prelude::*;

/// Logits of f32 models in two programs.
const F32: f32 = 1e-3;
const NEW_TOKENS: usize = 24;
const TEXTS: [&str; 3] = [
    "Mia lives by the river. Mia has a brown dog.",
    "<s>[INST] Ben has a black cat. Ben likes honey.\nWho has a cat? [/INST]",
    "Once there was a",
];

fn main() -> Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    match given.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["write", dir] => write(Path::new(dir)),
        ["read", dir] => read(Path::new(dir)),
        _ => Err(Error::new("bad arguments").expected("write DIR or read DIR").found(given.join(" "))),
    }
}

fn tiny() -> Result<Base> {
    Base::from_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("notebooks/tiny-world/tiny-mistral"))
}

/// A copy with the file that a merge must carry over.
fn with_generation_config(base: &Base, dir: &Path) -> Result<Base> {
    let bad = |e: std::io::Error| Error::new("cannot copy the model").at_path(dir).caused_by(e);
    std::fs::create_dir_all(dir).map_err(bad)?;
    for file in std::fs::read_dir(base.dir()).map_err(bad)?.flatten() {
        std::fs::copy(file.path(), dir.join(file.file_name())).map_err(bad)?;
    }
    let config = json!({"bos_token_id": 1, "eos_token_id": [2, 0], "do_sample": false, "max_new_tokens": NEW_TOKENS});
    std::fs::write(dir.join("generation_config.json"), config.to_string()).map_err(bad)?;
    Base::from_dir(dir)
}

/// `[N, V]` of all prompts, one after the other.
fn logits(engine: &mut Engine, prompts: &[Vec<u32>]) -> Result<Vec<f32>> {
    let ds = Dataset::new(prompts.iter().map(|ids| Example::all_trained(ids.clone())).collect())?;
    engine.logits(Batch::new(&ds, &(0..ds.len()).collect::<Vec<_>>()))
}

/// A model's logits, with an adapter or without.
fn logits_of(plan: PlanBuilder, base: &Base, adapter: Option<&Adapter>, prompts: &[Vec<u32>]) -> Result<Vec<f32>> {
    let mut engine = Engine::new(&plan.cpu().batch(prompts.len()).seq(64).build()?)?;
    engine.load(base)?;
    if let Some(adapter) = adapter {
        engine.load_adapter(adapter)?;
    }
    logits(&mut engine, prompts)
}

fn greedy(base: &Base, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
    let mut engine = Engine::new(&MemoryPlan::inference(base.spec()).cpu().context(128).build()?)?;
    engine.load(base)?;
    let sampling = Sampling::greedy().max_new_tokens(NEW_TOKENS);
    TEXTS.iter().map(|text| Ok(generate(&mut engine, tokenizer, text, &sampling)?.tokens)).collect()
}

fn write(dir: &Path) -> Result<()> {
    let base = with_generation_config(&tiny()?, &dir.join("base"))?;
    let tokenizer = Tokenizer::from_dir(base.dir())?;
    let prompts: Vec<Vec<u32>> = TEXTS.iter().map(|text| tokenizer.encode(text)).collect::<Result<_>>()?;
    // A trained adapter, whose B is not zero.
    let rows = Rows::from_path(tiny()?.dir().join("../data/train.jsonl"))?.head(200);
    let template = ChatTemplate::from_tokenizer(&tokenizer)?;
    let data = encode(&rows, &tokenizer, &DataConfig::messages(template.clone()))?;
    let plan = MemoryPlan::lora(base.spec()).cpu().r(8).lora_alpha(16.0).batch(4).seq(data.max_len()).build()?;
    let settings = TrainConfig::default().per_device_train_batch_size(4).learning_rate(3e-3).max_steps(20);
    let mut run = Run::create(dir.join("run"), plan, base.clone(), data, settings)?;
    run.train()?;
    run.save_adapter(dir.join("adapter"))?;
    drop(run);
    let adapter = Adapter::load(dir.join("adapter"))?;
    write_bnb_4bit(&base, dir.join("nf4"), Nf4Config::default())?;
    lora::merge(base.dir(), dir.join("adapter"))?.onto(MergeBase::Original).save(dir.join("merged"))?;
    let (four, merged) = (Base::from_dir(dir.join("nf4"))?, Base::from_dir(dir.join("merged"))?);

    let with = |base: &Base| MemoryPlan::lora(base.spec()).adapter(adapter.config.lora.clone());
    let all = [
        ("adapter", logits_of(with(&base), &base, Some(&adapter), &prompts)?),
        ("base", logits_of(MemoryPlan::lora(base.spec()), &base, None, &prompts)?),
        ("merged", logits_of(MemoryPlan::lora(merged.spec()), &merged, None, &prompts)?),
        ("nf4", logits_of(MemoryPlan::qlora(four.spec()), &four, None, &prompts)?),
    ];
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let shape = vec![tokens, base.spec().vocab_size];
    let headers = all.iter().map(|(name, _)| TensorHeader::new(*name, DType::F32, shape.clone())).collect();
    let mut out = SafetensorsWriter::create(dir.join("logits.safetensors"), headers, &pt_metadata())?;
    for (name, values) in &all {
        out.write_f32(name, values)?;
    }
    out.finish()?;
    let chat = [message("user", "Who has a cat?"), message("assistant", "Ben has a cat.")];
    let asked = json!({
        "base": base.dir(), "texts": TEXTS, "prompts": prompts, "new_tokens": NEW_TOKENS,
        "greedy": greedy(&merged, &tokenizer)?, "chat": chat, "chat_text": template.render(&chat, &ChatOptions::default())?,
    });
    tunebook::files::write_atomic_bytes(dir.join("asked.json"), asked.to_string().as_bytes())?;
    println!("written: {}", dir.display());
    Ok(())
}

fn read(dir: &Path) -> Result<()> {
    let (base, python) = (Base::from_dir(dir.join("base"))?, dir.join("python"));
    let bad = |e: serde_json::Error| Error::new("not what this program wrote").at_path(dir).caused_by(e);
    let asked: Value = serde_json::from_str(&tunebook::files::read_to_string(dir.join("asked.json"))?).map_err(bad)?;
    let prompts: Vec<Vec<u32>> = serde_json::from_value(asked["prompts"].clone()).map_err(bad)?;
    let expected = Checkpoint::open(python.join("logits.safetensors"))?;
    let (four, merged) = (Base::from_dir(python.join("nf4"))?, Base::from_dir(python.join("merged"))?);
    let adapter = Adapter::load(python.join("adapter"))?;
    let with = MemoryPlan::lora(base.spec()).adapter(adapter.config.lora.clone());
    for (name, found, tolerance) in [
        ("adapter", logits_of(with, &base, Some(&adapter), &prompts)?, F32),
        ("merged", logits_of(MemoryPlan::lora(merged.spec()), &merged, None, &prompts)?, F32),
        ("nf4", logits_of(MemoryPlan::qlora(four.spec()), &four, None, &prompts)?, F32),
    ] {
        let expected = expected.read_f32(name)?;
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("Python's {name}: logits differ by at most {worst:.1e}");
        if found.len() != expected.len() || worst.is_nan() || worst > tolerance {
            return Err(Error::new("logits differ").at(name).expected(format!("{tolerance}")).found(worst.to_string()));
        }
    }
    let tokenizer = Tokenizer::from_dir(merged.dir())?;
    let text = tunebook::files::read_to_string(python.join("greedy.json"))?;
    let texts: Vec<Vec<u32>> = serde_json::from_str(&text).map_err(bad)?;
    let found = greedy(&merged, &tokenizer)?;
    if found != texts {
        return Err(Error::new("greedy texts differ").expected(format!("{texts:?}")).found(format!("{found:?}")));
    }
    println!("Python's merged model: the same greedy text for {} prompts", texts.len());
    Ok(())
}
