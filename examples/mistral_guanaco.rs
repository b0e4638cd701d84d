//! Fine-tuning Mistral-7B by QLoRA in ten steps, as the well-known scripts of transformers, PEFT and bitsandbytes do it:
//! `cargo run --example mistral_guanaco`
//!
//! Without a model it runs on the small one of the notebooks, on the CPU, in about a minute. With `--model` it runs on that
//! model, on a GPU. Each step has the name that the scripts give it; where they are wrong, the comment says how.
//!
//!     --model DIR    a model directory of the Mistral or Llama family
//!     --data FILE    rows: conversations, instructions, or a column `text` (guanaco-llama2-1k)
//!     --steps N      150
//!     --out DIR      runs/mistral-guanaco

use std::path::PathBuf;

use tunebook::data::detect;
use tunebook::lora;
use tunebook::plan::Gpu;
use tunebook::prelude::*;

struct Arguments {
    model: PathBuf,
    data: PathBuf,
    steps: u64,
    out: PathBuf,
}

impl Arguments {
    fn read() -> Result<Self> {
        use lexopt::prelude::*;
        let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("notebooks/tiny-world");
        let mut given = Arguments {
            model: tiny.join("tiny-mistral"),
            data: tiny.join("data/train.jsonl"),
            steps: 150,
            out: "runs/mistral-guanaco".into(),
        };
        let mut parser = lexopt::Parser::from_env();
        let bad = |e: lexopt::Error| Error::new("bad argument").caused_by(e).next("see the top of this example");
        while let Some(argument) = parser.next().map_err(bad)? {
            match argument {
                Long("model") => given.model = parser.value().map_err(bad)?.into(),
                Long("data") => given.data = parser.value().map_err(bad)?.into(),
                Long("out") => given.out = parser.value().map_err(bad)?.into(),
                Long("steps") => given.steps = parser.value().and_then(|v| v.parse()).map_err(bad)?,
                other => return Err(bad(other.unexpected())),
            }
        }
        Ok(given)
    }
}

fn main() -> Result<()> {
    let given = Arguments::read()?;
    if given.out.exists() {
        return Err(Error::new("the output directory exists already")
            .at_path(&given.out)
            .next("choose another: --out"));
    }

    title(1, "Set up the environment");
    println!("{}", environment());
    // A card decides the precision: bf16 there, f32 on the CPU. fp16 is not needed for 4 bits, and not forbidden by them.
    let gpu = Gpu::detect().ok();

    title(2, "Load the tokenizer");
    let base = Base::from_dir(&given.model)?;
    let tokenizer = Tokenizer::from_dir(base.dir())?;
    // `tokenizer.pad_token = tokenizer.eos_token` is the trap of most scripts.
    println!("{tokenizer:?}\n{}", tokenizer.padding());

    title(3, "Load and format the data set");
    // The scripts ask for columns that their data set has not. Here the form is found, or an error says what was.
    let rows = Rows::from_path(&given.data)?;
    let found = detect(&rows, &tokenizer)?;
    println!("{found:?}");
    let (train, test) = rows.split((rows.len() / 10).max(1), 42)?;

    title(4, "Tokenize");
    // Labels are not a copy of the ids: prompts have none. No bos is doubled, and each answer ends with its end of sequence.
    let longest = if gpu.is_some() { 1024 } else { 256 };
    let config = found.config.max_length(longest.min(base.spec().max_position_embeddings));
    let data = encode(&train, &tokenizer, &config)?;
    let test = encode(&test, &tokenizer, &config)?;
    println!("{data}\n{}", BatchView::of_example(data.get(0), &tokenizer)?);
    // No collator: a batch is a flat list of tokens, and packing fills it.
    let data = data.packed(longest)?;

    title(5, "Configure 4-bit quantization");
    // NF4 in blocks of 64, scales quantized again: 4.127 bits per weight, a factor of 3.88 and not 4.
    let quantization = Nf4Config::default();
    println!("{quantization:?}");

    title(6, "Configure LoRA");
    // All linear layers, as the QLoRA paper found necessary. At rank 64 on Mistral-7B that is 167,772,160 parameters, not the
    // 33,554,432 that are often quoted.
    let (r, alpha) = if gpu.is_some() { (64, 16.0) } else { (16, 32.0) };
    println!("{}", lora::discover(base.spec(), Targets::AllLinear)?);

    title(7, "Set the training arguments");
    // The memory is a result of the arguments, and exact, before a weight is loaded.
    let plan = MemoryPlan::qlora(base.spec()).r(r).lora_alpha(alpha).quantization(Some(quantization));
    let plan = plan.batch(4).seq(longest).optim(Optim::PagedAdamW8bit);
    let plan = if gpu.is_some() { plan } else { plan.cpu() }.build()?;
    println!("{plan}");
    if let Some(gpu) = gpu {
        println!("{}", plan.fits(gpu)?);
    }
    // `constant` has no warm-up whatever the warm-up says; this schedule has one.
    let arguments = TrainConfig::default()
        .optim(Optim::PagedAdamW8bit)
        .per_device_train_batch_size(4)
        .learning_rate(if longest > 256 { 2e-4 } else { 3e-3 })
        .lr_scheduler_type(LrScheduler::Cosine)
        .warmup_ratio(0.03)
        .max_grad_norm(0.3)
        .max_steps(given.steps)
        .save_steps(50)
        .logging_steps(25);

    title(8, "Train");
    let mut run = Run::create(given.out.join("run"), plan, base.clone(), data, arguments)?;
    println!("before: {}", run.evaluate(&test)?);
    run.train()?;
    println!("after: {}", run.evaluate(&test)?);

    title(9, "Save the adapter and merge");
    let adapter = run.save_adapter(given.out.join("adapter"))?;
    drop(run);
    // W + (alpha / r) B A, onto the weights that the adapter was trained beside: the decoded 4-bit ones. Onto the original
    // ones, the error of the quantization comes back; the report says how much that is.
    let merged = given.out.join("merged");
    println!("{}", lora::merge(base.dir(), adapter)?.onto(MergeBase::Dequantized(quantization)).save(&merged)?);

    title(10, "Generate");
    let merged = Base::from_dir(merged)?;
    let plan = MemoryPlan::inference(merged.spec()).context(longest);
    let mut model = Engine::new(&if Gpu::detect().is_ok() { plan } else { plan.cpu() }.build()?)?;
    model.load(&merged)?;
    for i in 0..3.min(test.len()) {
        // The prompt of a row that it was not trained on, and what the row says.
        let (ids, labels) = (&test.get(i).input_ids, &test.get(i).labels);
        let prompt = labels.iter().take_while(|&&label| label < 0).count().max(1);
        let text = tokenizer.decode_with_special_tokens(&ids[..prompt])?;
        let said = generate(&mut model, &tokenizer, &text, &Sampling::greedy().max_new_tokens(64))?;
        println!("{text}\n  model: {}\n  row:   {}\n", said.text.trim(), tokenizer.decode(&ids[prompt..])?.trim());
    }
    Ok(())
}

fn title(n: usize, name: &str) {
    println!("\n=== Step {n}: {name}\n");
}
