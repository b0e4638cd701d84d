//! `ops`: each kind of operation at a model's shape, over one phase after another with a wait after each operation.

use serde_json::{Value, json};
use tunebook::Result;
use tunebook::data::Batch;
use tunebook::engine::Engine;
use tunebook::generate::Decoder;
use tunebook::plan::{MemoryPlan, Phase};

use crate::args::{Args, Opt, opt};
use crate::batches::{self, Lengths};
use crate::report;
use crate::setup::{self, Setup};
use crate::{device, flops};

/// Tokens in the cache when decoding is timed, unless the cache or the batch is smaller.
const PROMPT: usize = 512;

pub fn options() -> Vec<Opt> {
    let mut out = setup::options();
    out.extend([
        opt("phases", "LIST", "of micro-step,optimizer,evaluate,generate (the first two; evaluate for inference)"),
        opt("repeats", "N", "timed runs of each phase (5)"),
        opt("lengths", "full|mixed", "of the sequences of a batch (full)"),
    ]);
    out
}

pub fn run(args: &Args) -> Result<()> {
    let setup = Setup::new(args, |plan| plan)?;
    let plan = &setup.plan;
    let phases = phases(args, plan)?;
    let repeats = args.at_least_one("repeats", 5)?;
    let lengths = args.one_of("lengths", &["full", "mixed"])?;
    let c = plan.config();
    let (batch, seq, vocab) = (c.micro_batch_size, c.max_seq_length, plan.spec().vocab_size);
    let batch = batches::random(1, batch, seq, Lengths::named(lengths)?, vocab, setup.seed)?.swap_remove(0);
    let _ballast = device::cap(args, plan)?;
    let (mut engine, _) = setup.engine()?;
    engine.profile(true);
    for phase in phases {
        let batch = if phase == Phase::Generate {
            // Decoding reads what a prompt has left in the cache.
            engine.reset();
            let prompt = batch.tokens().min(PROMPT).min(engine.capacity().saturating_sub(1).max(1));
            engine.forward(&batch.input_ids[..prompt])?;
            one_token(&batch)
        } else {
            batch.clone()
        };
        once(&mut engine, phase, &batch, setup.seed)?;
        engine.take_seconds();
        for _ in 0..repeats {
            once(&mut engine, phase, &batch, setup.seed)?;
        }
        let seconds = engine.take_seconds();
        report_phase(args, &setup, &engine, phase, &batch, repeats, seconds)?;
    }
    Ok(())
}

/// The phases by name.
fn phases(args: &Args, plan: &MemoryPlan) -> Result<Vec<Phase>> {
    let trains = plan.trainable_params() > 0;
    let default = if trains { "micro-step,optimizer" } else { "evaluate" };
    let known = [Phase::MicroStep, Phase::Optimizer, Phase::Evaluate, Phase::Generate];
    let mut out = Vec::new();
    for word in args.text("phases").unwrap_or(default).split(',') {
        let Some(phase) = known.into_iter().find(|p| p.label() == word) else {
            return Err(args.bad("phases", &known.map(Phase::label).join(", "), format!("`{word}`")));
        };
        if matches!(phase, Phase::MicroStep | Phase::Optimizer) {
            setup::must_train(args, plan)?;
        }
        out.push(phase);
    }
    Ok(out)
}

fn once(engine: &mut Engine, phase: Phase, batch: &Batch, seed: u64) -> Result<()> {
    let method = engine.plan().config().method;
    match phase {
        Phase::MicroStep => engine.micro_step(batch.clone(), batch.num_items(), seed, 0).map(|_| ()),
        Phase::Optimizer => engine.optimizer_step(setup::hyper(method, 1), 1.0).map(|_| ()),
        Phase::Generate => {
            if engine.position() + 1 > engine.capacity() {
                engine.reset();
            }
            engine.forward(&batch.input_ids).map(|_| ())
        }
        _ => engine.evaluate(batch.clone()).map(|_| ()),
    }
}

/// What generation feeds: one token.
fn one_token(batch: &Batch) -> Batch {
    Batch {
        input_ids: batch.input_ids[..1].to_vec(),
        positions: vec![0],
        cu_seqlens: vec![0, 1],
        labels: vec![tunebook::data::IGNORE_INDEX],
        examples: vec![0],
    }
}

fn report_phase(
    args: &Args,
    setup: &Setup,
    engine: &Engine,
    phase: Phase,
    batch: &Batch,
    repeats: usize,
    mut seconds: Vec<(&'static str, f64)>,
) -> Result<()> {
    let plan = &setup.plan;
    seconds.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = seconds.iter().map(|s| s.1).sum();
    let counted = flops::of_phase(plan, phase, batch);
    let moved = flops::bytes_of_phase(plan, phase, batch.tokens());
    let calls = flops::calls_of_phase(plan, phase);
    eprintln!("{}: {:.5} s in all, {} tokens", phase.label(), total / repeats as f64, batch.tokens());
    eprintln!(
        "{:<20} {:>6} {:>12} {:>7} {:>10} {:>9}",
        "operation", "calls", "ms per call", "share", "TFLOP/s", "GB/s"
    );
    for (op, s) in seconds {
        let per_phase = s / repeats as f64;
        let n = calls.get(op).copied().unwrap_or(0);
        let per_call = per_phase / n.max(1) as f64;
        let rate = counted.get(op).map(|f| f / per_phase);
        let bandwidth = moved.get(op).map(|b| b / per_phase);
        eprintln!(
            "{op:<20} {n:>6} {:>12.4} {:>6.1}% {:>10} {:>9.1}",
            1e3 * per_call,
            100.0 * s / total,
            rate.map_or(String::new(), |r| format!("{:.2}", r / 1e12)),
            bandwidth.unwrap_or(0.0) / 1e9,
        );
        let mut line = setup.asked();
        line.insert("bench".into(), "ops".into());
        line.extend(setup::fields(json!({
            "device": device::name(engine),
            "phase": phase.label(),
            "tokens": batch.tokens(),
            "repeats": repeats,
            "op": op,
            "calls": n,
            "seconds_per_phase": per_phase,
            "seconds_per_call": per_call,
            "share": s / total,
            "flops": counted.get(op),
            "flops_per_s": rate,
            "bytes_touched": moved.get(op),
            "bytes_per_s": bandwidth,
        })));
        if let Some(rate) = rate {
            line.extend(setup::fields(device::utilisation(args, plan.config().device, rate)?));
        }
        report::line(&Value::Object(line))?;
    }
    Ok(())
}
