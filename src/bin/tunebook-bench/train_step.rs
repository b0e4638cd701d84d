//! `train-step`: whole training steps, or forward passes with the loss for a method that trains nothing.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tunebook::Result;
use tunebook::data::Batch;
use tunebook::engine::{Engine, LossSum};
use tunebook::plan::{MemoryPlan, Phase};

use crate::args::{Args, Opt, opt, switch};
use crate::batches::{self, Lengths};
use crate::report::{self, gib, least, median, timed};
use crate::setup::{self, Setup};
use crate::{device, flops};

/// Steps that are profiled: waiting after each operation makes them slower, so they are apart from the timed ones.
const PROFILED: usize = 2;

pub fn options() -> Vec<Opt> {
    let mut out = setup::options();
    out.extend([
        opt("steps", "N", "timed steps (10)"),
        opt("warmup", "N", "steps before them (3)"),
        opt("accumulation", "N", "micro-batches per step (1)"),
        opt("lengths", "full|mixed", "of the sequences of a batch (full)"),
        switch("profile", "seconds by kind of operation, in further steps"),
    ]);
    out
}

/// Takes steps over the same few batches.
pub struct Steps {
    pub engine: Engine,
    batches: Vec<Batch>,
    seed: u64,
    /// Steps so far.
    taken: u32,
}

impl Steps {
    pub fn new(engine: Engine, batches: Vec<Batch>, seed: u64) -> Steps {
        Steps { engine, batches, seed, taken: 0 }
    }

    /// One step over all batches: its mean loss.
    ///
    /// # Errors
    /// What the engine reports.
    pub fn step(&mut self) -> Result<f64> {
        let method = self.engine.plan().config().method;
        let trains = self.engine.plan().trainable_params() > 0;
        let items: usize = self.batches.iter().map(Batch::num_items).sum();
        let mut loss = LossSum::default();
        for (i, batch) in self.batches.iter().enumerate() {
            let of_batch = if trains {
                let micro_step = u64::from(self.taken) * self.batches.len() as u64 + i as u64;
                self.engine.micro_step(batch.clone(), items, self.seed, micro_step)?
            } else {
                self.engine.evaluate(batch.clone())?
            };
            loss.sum += of_batch.sum;
            loss.tokens += of_batch.tokens;
        }
        self.taken += 1;
        if trains {
            self.engine.optimizer_step(setup::hyper(method, self.taken), 1.0)?;
        }
        Ok(loss.mean())
    }
}

pub fn run(args: &Args) -> Result<()> {
    let setup = Setup::new(args, |plan| plan)?;
    let (steps, warmup) = (args.at_least_one("steps", 10)?, args.or("warmup", 3)?);
    let accumulation = args.at_least_one("accumulation", 1)?;
    let lengths = args.one_of("lengths", &["full", "mixed"])?;
    let (plan, c) = (&setup.plan, setup.plan.config());
    let predicted = device::predicted_process_bytes(args, plan)?;
    eprintln!("{} of {}: arena {}", c.method.label(), plan.spec().name, gib(plan.arena_bytes()));
    let ballast = device::cap(args, plan)?;
    let (batch, seq, vocab) = (c.micro_batch_size, c.max_seq_length, plan.spec().vocab_size);
    let batches = batches::random(accumulation, batch, seq, Lengths::named(lengths)?, vocab, setup.seed)?;
    let tokens: usize = batches.iter().map(Batch::tokens).sum();
    let flops_per_step: f64 = batches.iter().map(|b| flops::of_phase(plan, phase(plan), b).values().sum::<f64>()).sum();

    let (engine, [new_seconds, weights_seconds, adapter_seconds]) = setup.engine()?;
    let mut run = Steps::new(engine, batches, setup.seed);
    let mut losses = Vec::with_capacity(warmup + steps);
    for _ in 0..warmup {
        losses.push(run.step()?);
    }
    run.engine.take_pass_seconds();
    let mut seconds = Vec::with_capacity(steps);
    for _ in 0..steps {
        let (loss, s) = timed(|| run.step());
        losses.push(loss?);
        seconds.push(s);
    }
    let process_bytes = device::process_bytes(&run.engine, ballast.as_ref());
    let profile = if args.has("profile") { Some(profile(&mut run, plan)?) } else { None };

    let (middle, best) = (median(&seconds), least(&seconds));
    let flops_per_s = flops_per_step / middle;
    let mut line = setup.asked();
    line.insert("bench".into(), "train-step".into());
    line.extend(setup::fields(json!({
        "lengths": lengths,
        "accumulation": accumulation,
        "steps": steps,
        "warmup": warmup,
        "vram_cap_bytes": args.size("vram-cap")?,
        "device": device::name(&run.engine),
        "tokens_per_step": tokens,
        "tokens_per_s_median": tokens as f64 / middle,
        "tokens_per_s_best": tokens as f64 / best,
        "step_seconds_median": middle,
        "step_seconds": seconds,
        "arena_bytes": plan.arena_bytes(),
        "host_bytes": plan.host_bytes(),
        "predicted_process_bytes": predicted,
        "process_device_bytes": process_bytes,
        "trainable_params": plan.trainable_params(),
        "flops_per_step": flops_per_step,
        "flops_per_s": flops_per_s,
    })));
    line.extend(setup::fields(device::utilisation(args, c.device, flops_per_s)?));
    line.extend(setup::fields(json!({
        "loss_first": losses.first(),
        "loss_last": losses.last(),
        "engine_seconds": new_seconds,
        "weights_seconds": weights_seconds,
        "adapter_seconds": adapter_seconds,
        "profile": profile,
    })));
    eprintln!(
        "{tokens} tokens per step: {:.0} tokens/s median, {:.0} best, {:.4} s per step, {:.2} TFLOP/s, loss {:.4} to {:.4}",
        tokens as f64 / middle,
        tokens as f64 / best,
        middle,
        flops_per_s / 1e12,
        losses.first().unwrap_or(&f64::NAN),
        losses.last().unwrap_or(&f64::NAN),
    );
    if let Some(measured) = process_bytes {
        eprintln!("process: {} predicted, {} measured", gib(predicted), gib(measured));
    }
    report::line(&Value::Object(line))
}

/// The phase that a step consists of beside the optimizer's.
pub fn phase(plan: &MemoryPlan) -> Phase {
    if plan.trainable_params() > 0 { Phase::MicroStep } else { Phase::Evaluate }
}

/// Seconds by kind of operation of one step, largest first; shares are of their sum.
fn profile(run: &mut Steps, plan: &MemoryPlan) -> Result<Value> {
    run.engine.take_seconds();
    run.engine.profile(true);
    for _ in 0..PROFILED {
        run.step()?;
    }
    run.engine.profile(false);
    let mut counted: BTreeMap<&str, f64> = BTreeMap::new();
    for batch in &run.batches {
        for (op, n) in flops::of_phase(plan, phase(plan), batch) {
            *counted.entry(op).or_default() += n;
        }
    }
    let mut times = run.engine.take_seconds();
    times.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = times.iter().map(|t| t.1).sum();
    let mut rows = Vec::new();
    eprintln!("{:<20} {:>10} {:>7} {:>10}", "operation", "s per step", "share", "TFLOP/s");
    for (op, s) in times {
        let (per_step, share) = (s / PROFILED as f64, s / total);
        let rate = counted.get(op).map(|n| n / per_step);
        let shown = rate.map_or(String::new(), |r| format!("{:.2}", r / 1e12));
        eprintln!("{op:<20} {per_step:>10.5} {:>6.1}% {shown:>10}", 100.0 * share);
        rows.push(json!({
            "op": op, "seconds": per_step, "share": share, "flops": counted.get(op), "flops_per_s": rate,
        }));
    }
    Ok(rows.into())
}
