//! Made from 10_mistral_7b_on_your_gpu.ipynb by notebooks/program.py; edit the notebook.

#![allow(unused, missing_docs, clippy::all)]

use std::fmt::Debug;

/// Shows a cell's last expression as the kernel does: by its display where it has one, else by `Debug`.
struct Last<'a, T>(&'a T);
trait ByDisplay {
    fn show(&self);
}
impl<T: tunebook::display::Show> ByDisplay for Last<'_, T> {
    fn show(&self) {
        tunebook::display::show(self.0);
    }
}
trait ByDebug {
    fn show(&self);
}
impl<T: Debug> ByDebug for &Last<'_, T> {
    fn show(&self) {
        println!("EVCXR_BEGIN_CONTENT text/plain\n{:?}\nEVCXR_END_CONTENT", self.0);
    }
}

fn main() {
    // Before any thread is there.
    unsafe { std::env::set_var("EVCXR_IS_RUNTIME", "1") };
    if let Err(e) = cells() {
        eprintln!("{e}");
        std::process::exit(1);
    }
}

pub fn cells() -> std::result::Result<(), Box<dyn std::error::Error>> {
    println!("\nTUNEBOOK_CELL 1");
    use tunebook::lesson::*;
    use tunebook::prelude::*;
    {
        let last = { environment() };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 3");
    let card = Gpu::detect()?;
    {
        let last = { card.clone() };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 5");
    let spec = ModelSpec::preset("mistral-7b-v0.1")?;
    let builder = MemoryPlan::qlora(&spec).r(64).batch(8).seq(512).optim(Optim::PagedAdamW8bit);
    let fitted = builder.clone().fit(card.clone())?;
    {
        let last = { fitted.clone() };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 7");
    let plan = fitted.plan.clone();
    let mut engine = Engine::new(&plan)?;
    engine.init_weights(42)?;
    engine.init_adapter(42)?;
    let held = engine.process_bytes().unwrap_or(0) as f64 / 1e9;
    {
        let last = { check_close("GB that the process holds", held, plan.process_bytes(&card) as f64 / 1e9, 0.01)? };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 9");
    use tunebook::data::{Batch, Example};
    use tunebook::engine::optimizer::AdamWHyper;
    fn random_batch(sequences: usize, tokens: usize, seed: u64) -> Result<Batch> {
        let values = synthetic::normal(&[sequences * tokens], 1e6, seed)?.to_vec1::<f32>()?;
        let ids: Vec<u32> = values.iter().map(|v| v.abs() as u32 % 32_000).collect();
        let examples: Vec<Example> = ids.chunks(tokens).map(|c| Example::all_trained(c.to_vec())).collect();
        Ok(Batch::new(&Dataset::new(examples)?, &(0..sequences).collect::<Vec<_>>()))
    }
    let config = plan.config().clone();
    let batch = random_batch(config.micro_batch_size, config.max_seq_length, 1)?;
    println!("{} tokens in {} sequences", batch.tokens(), batch.len());
    println!("\nTUNEBOOK_CELL 10");
    let first = engine.micro_step(batch.clone(), batch.num_items(), 42, 0)?;
    let norm = engine.optimizer_step(AdamWHyper { lr: 2e-4, ..AdamWHyper::default() }, 0.3)?;
    println!("loss {:.3}, gradient norm {:.3}", first.mean(), norm.norm);
    let blank = 32_000.0_f64.ln() + 4096.0 * 0.02 * 0.02 / 2.0;
    {
        let last = { check_close("loss of a blank model", first.mean(), blank, 0.03)? };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 12");
    let mut curve = vec![(1.0, first.mean())];
    let began = std::time::Instant::now();
    for step in 2..=11_u32 {
        let loss = engine.micro_step(batch.clone(), batch.num_items(), 42, u64::from(step) - 1)?;
        engine.optimizer_step(AdamWHyper { lr: 2e-4, step, ..AdamWHyper::default() }, 0.3)?;
        curve.push((f64::from(step), loss.mean()));
    }
    let seconds = began.elapsed().as_secs_f64() / 10.0;
    println!("{:.0} ms a step, {:.0} tokens per second", 1e3 * seconds, batch.tokens() as f64 / seconds);
    {
        let last = { chart("One batch, learnt by heart", "step", "loss").line("loss", curve.clone()) };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 14");
    let after = engine.process_bytes().unwrap_or(0) as f64 / 1e9;
    {
        let last = { check_close("GB after eleven steps", after, held, 0.0)? };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 16");
    engine.profile(true);
    engine.take_seconds();
    engine.micro_step(batch.clone(), batch.num_items(), 42, 11)?;
    let mut seconds = engine.take_seconds();
    engine.profile(false);
    seconds.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all: f64 = seconds.iter().map(|s| s.1).sum();
    {
        let last = {
            table(
                "One micro-step by operation",
                ["operation", "ms", "share"],
                seconds
                    .iter()
                    .take(8)
                    .map(|(op, s)| [op.to_string(), format!("{:.1}", 1e3 * s), format!("{:.1} %", 100.0 * s / all)]),
            )
        };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 18");
    let timing = tunebook::engine::cuda::bench_nf4(14_336, 4096, Nf4Config::default(), 20)?;
    let best = timing.dequantize_seconds.iter().copied().fold(f64::INFINITY, f64::min);
    let moved = 2.0 * 14_336.0 * 4096.0 * (1.0 + 4.127 / 16.0);
    println!("{:.0} µs for a matrix of 117 MB: {:.2} TB/s", 1e6 * best, moved / best / 1e12);
    println!("\nTUNEBOOK_CELL 20");
    fn tokens_per_second(plan: &MemoryPlan, batch: &Batch) -> Result<f64> {
        let mut engine = Engine::new(plan)?;
        engine.init_weights(1)?;
        engine.init_adapter(1)?;
        engine.micro_step(batch.clone(), batch.num_items(), 1, 0)?;
        let began = std::time::Instant::now();
        for step in 1..=5 {
            engine.micro_step(batch.clone(), batch.num_items(), 1, step)?;
        }
        Ok(5.0 * batch.tokens() as f64 / began.elapsed().as_secs_f64())
    }
    drop(engine);
    let all_layers = builder.clone().checkpointing(Checkpointing::All).build()?;
    let recomputed = tokens_per_second(&all_layers, &batch)?;
    println!("all layers recomputed: {recomputed:.0} tokens/s in {}", short_bytes(all_layers.arena_bytes()));
    println!("\nTUNEBOOK_CELL 21");
    let no_layer = builder.clone().checkpointing(Checkpointing::None).build()?;
    if no_layer.process_bytes(&card) <= card.total_bytes {
        let kept = tokens_per_second(&no_layer, &batch)?;
        println!("no layer recomputed: {kept:.0} tokens/s in {}", short_bytes(no_layer.arena_bytes()));
        println!("{:.2} times as fast", kept / recomputed);
    } else {
        println!("no layer recomputed needs {}: not on this card", short_bytes(no_layer.process_bytes(&card)));
    }
    println!("\nTUNEBOOK_CELL 23");
    let held = builder.clone().checkpointing(Checkpointing::All).dequantized_layers(32).build()?;
    if held.process_bytes(&card) <= card.total_bytes {
        let decoded = tokens_per_second(&held, &batch)?;
        println!("all layers recomputed, none decoded: {decoded:.0} tokens/s in {}", short_bytes(held.arena_bytes()));
        println!("{:.2} times as fast", decoded / recomputed);
    } else {
        println!("all layers held dequantized need {}: not on this card", short_bytes(held.process_bytes(&card)));
    }
    println!("\nTUNEBOOK_CELL 25");
    match std::env::var("TUNEBOOK_MODEL") {
        Err(_) => println!("TUNEBOOK_MODEL is not set: the run above used random weights"),
        Ok(dir) => {
            let base = Base::from_dir(&dir)?;
            let tokenizer = Tokenizer::from_dir(base.dir())?;
            let inst = Tokenizer::from_dir("tiny-world/tiny-mistral")?.chat_template_source().unwrap_or("").to_string();
            let template = ChatTemplate::new(&inst, tokenizer.bos_token(), tokenizer.eos_token())?;
            let rows = Rows::from_jsonl("tiny-world/data/train.jsonl")?;
            let data = encode(&rows, &tokenizer, &DataConfig::messages(template).max_length(256))?;
            let plan = MemoryPlan::qlora(base.spec()).r(16).batch(8).seq(256).fit(card.clone())?.plan;
            let settings = TrainConfig::default().per_device_train_batch_size(8).max_steps(60);
            println!("{:?}", Run::create("../runs/lesson-10", plan, base, data, settings)?.train()?);
        }
    }
    println!("\nTUNEBOOK_CELL 27");
    let my_gb = 10.0;
    let longer = builder.clone().seq(1024).checkpointing(Checkpointing::All).build()?;
    {
        let last =
            { attempt_close("GB with eight sequences of 1,024", my_gb, longer.arena_bytes() as f64 / 1e9, 0.02) };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 29");
    fn my_held(bytes: u64) -> u64 {
        bytes
    }
    {
        let last = { attempt("bytes held for 5,000,000", my_held(5_000_000), 6_291_456) };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 31");
    let my_speed = batch.len() as f64 / (batch.tokens() as f64 / recomputed);
    println!("{my_speed:.1} tokens per second");
    println!("\nTUNEBOOK_CELL end");
    Ok(())
}
