//! Makes the model and the data that the notebooks use, from nothing: `cargo run --release --example make_tiny`
//!
//! A small world is invented, its stories written, a tokenizer and a model of Mistral's architecture trained on them, and
//! instructions about such stories written that the model cannot follow yet. Everything follows from `--seed`: the same
//! machine and build make the same bytes. Takes about 20 minutes on 2 cores; a run that was stopped goes on.
//!
//!     --seed N       42
//!     --stories N    40000: length of the pretraining, one epoch
//!     --out DIR      notebooks/tiny-world
//!     --work DIR     target/make_tiny: the pretraining run
//!     --check        only fine-tune what is there by QLoRA and print the exact matches before and after

mod check;
mod instruct;
mod model;
mod tokenizer;
mod world;

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tunebook::data::Tokenizer;
use tunebook::files::{create_dir_all, write_atomic_bytes};
use tunebook::generate::{Sampling, generate};
use tunebook::model::Base;
use tunebook::plan::MemoryPlan;
use tunebook::{Error, Result};
use world::Scene;

struct Arguments {
    seed: u64,
    stories: usize,
    out: PathBuf,
    work: PathBuf,
    check: bool,
}

fn arguments() -> Result<Arguments> {
    let mut out = Arguments {
        seed: 42,
        stories: 40_000,
        out: "notebooks/tiny-world".into(),
        work: "target/make_tiny".into(),
        check: false,
    };
    let bad =
        |name: &str| Error::new("bad argument").at(name.to_owned()).next("see the top of examples/make_tiny/main.rs");
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        if name == "--check" {
            out.check = true;
            continue;
        }
        let value = given.next().ok_or_else(|| bad(&name))?;
        match name.as_str() {
            "--seed" => out.seed = value.parse().map_err(|_| bad(&name))?,
            "--stories" => out.stories = value.parse().map_err(|_| bad(&name))?,
            "--out" => out.out = value.into(),
            "--work" => out.work = value.into(),
            _ => return Err(bad(&name)),
        }
    }
    Ok(out)
}

fn main() -> Result<()> {
    let args = arguments()?;
    if !args.check {
        make(&args)?;
    }
    // The run is only looked at: a new directory each time.
    let work = tempfile::tempdir().map_err(|e| Error::io("create a directory", std::env::temp_dir(), e))?;
    check::qlora(&args.out, &work.path().join("qlora"), args.seed)
}

fn make(args: &Arguments) -> Result<()> {
    let (model, data) = (args.out.join("tiny-mistral"), args.out.join("data"));
    create_dir_all(&model)?;
    create_dir_all(&data)?;

    // One generator for each part, so that a change of one leaves the others as they are.
    let stories = stories(args.stories, args.seed);
    let held_out = self::stories(200, args.seed + 1);
    let rows = instruct::rows(3200, &mut ChaCha8Rng::seed_from_u64(args.seed + 2));
    let (test, train) = rows.split_at(200);
    write_rows(&data.join("train.jsonl"), train)?;
    write_rows(&data.join("test.jsonl"), test)?;
    write_rows(&data.join("stories.jsonl"), &held_out.iter().map(|text| json!({"text": text})).collect::<Vec<_>>())?;
    println!("{}", stories[..3].join("\n\n"));

    tokenizer::train(&stories[..stories.len().min(5000)], model::VOCAB, &model)?;
    let tokenizer = Tokenizer::from_dir(&model)?;
    let spec = model::write_config(&model)?;
    let (texts, eval) = (model::dataset(&stories, &tokenizer)?, model::dataset(&held_out, &tokenizer)?);
    println!(
        "{} parameters, {} stories, {} tokens, longest {}",
        spec.total_params(),
        texts.len(),
        texts.total_tokens(),
        texts.max_len()
    );
    model::pretrain(&spec, texts, &eval, args.seed, &args.work, &model)?;
    tell(&model, &tokenizer)
}

/// Lets the base write a little.
fn tell(model: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let base = Base::from_dir(model)?;
    let mut engine = tunebook::engine::Engine::new(&MemoryPlan::inference(base.spec()).cpu().build()?)?;
    engine.load(&base)?;
    for prompt in ["Mia lives by the", "Tom has a red", "Anna likes"] {
        let sampling = Sampling::temperature(0.7).max_new_tokens(100).seed(1);
        println!("{:?}\n", generate(&mut engine, tokenizer, prompt, &sampling)?);
    }
    Ok(())
}

fn stories(n: usize, seed: u64) -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| Scene::draw(&mut rng).story(&mut rng)).collect()
}

fn write_rows(path: &Path, rows: &[Value]) -> Result<()> {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    write_atomic_bytes(path, lines.as_bytes())
}
