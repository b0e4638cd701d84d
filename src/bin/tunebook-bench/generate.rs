//! `generate`: one sequence, the prompt and then token by token, with and without the adapter.

use serde_json::{Value, json};
use tunebook::Result;
use tunebook::engine::Engine;
use tunebook::generate::Decoder;

use crate::args::{Args, Opt, opt};
use crate::batches::{self, Lengths};
use crate::device;
use crate::report::{self, median, timed};
use crate::setup::{self, Setup};

pub fn options() -> Vec<Opt> {
    let mut out = setup::options();
    out.extend([
        opt("prompt", "N", "tokens of the prompt (128)"),
        opt("new-tokens", "N", "tokens to write after it (128)"),
        opt("repeats", "N", "texts, after one that is not counted (3)"),
    ]);
    out
}

pub fn run(args: &Args) -> Result<()> {
    let (prompt, new) = (args.at_least_one("prompt", 128)?, args.at_least_one("new-tokens", 128)?);
    let repeats = args.at_least_one("repeats", 3)?;
    let setup = Setup::new(args, |plan| plan.context(prompt + new))?;
    let plan = &setup.plan;
    let ids =
        batches::random(1, 1, prompt, Lengths::Full, plan.spec().vocab_size, setup.seed)?.swap_remove(0).input_ids;
    let ballast = device::cap(args, plan)?;
    let (mut engine, _) = setup.engine()?;
    let adapters: &[bool] = if plan.config().lora.is_some() { &[true, false] } else { &[false] };
    for &adapter in adapters {
        engine.enable_adapter(adapter);
        text(&mut engine, &ids, new)?;
        let (mut prefill, mut decode, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..repeats {
            let t = text(&mut engine, &ids, new)?;
            prefill.push(t.0);
            decode.push(t.1.iter().sum::<f64>());
            tokens.extend(t.1);
        }
        let (p, d) = (median(&prefill), median(&decode));
        let named = if adapter { "with the adapter" } else { "without the adapter" };
        eprintln!("{named}: {:.1} tokens/s, prompt {:.1} tokens/s", new as f64 / d, prompt as f64 / p);
        let mut line = setup.asked();
        line.insert("bench".into(), "generate".into());
        line.extend(setup::fields(json!({
            "device": device::name(&engine),
            "adapter": adapter,
            "prompt_tokens": prompt,
            "new_tokens": new,
            "repeats": repeats,
            "decode_tokens_per_s": new as f64 / d,
            "token_seconds_median": median(&tokens),
            "prompt_tokens_per_s": prompt as f64 / p,
            "prompt_seconds": prefill,
            "decode_seconds": decode,
            "arena_bytes": plan.arena_bytes(),
            "process_device_bytes": device::process_bytes(&engine, ballast.as_ref()),
        })));
        report::line(&Value::Object(line))?;
    }
    Ok(())
}

/// Writes `new` tokens greedily: seconds of the prompt and of each token after it, the choice included.
fn text(engine: &mut Engine, prompt: &[u32], new: usize) -> Result<(f64, Vec<f64>)> {
    engine.reset();
    let (logits, prefill) = timed(|| engine.forward(prompt));
    let mut logits = logits?;
    let mut seconds = Vec::with_capacity(new);
    for _ in 0..new {
        let (next, s) = timed(|| engine.forward(&[largest(&logits)]));
        logits = next?;
        seconds.push(s);
    }
    Ok((prefill, seconds))
}

/// The token with the largest logit.
fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i as u32)
}
