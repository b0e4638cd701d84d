//! `memory`: what plans predict for a process, against what the driver says that it holds, for a list of configurations.

use std::fmt::Write;

use serde_json::{Value, json};
use tunebook::Result;
use tunebook::engine::Engine;
use tunebook::files::write_atomic_bytes;
use tunebook::model::ModelSpec;
use tunebook::nf4::Nf4Config;
use tunebook::plan::{Checkpointing, DeviceKind, MemoryPlan, Method, PlanBuilder};
use tunebook::train::Optim;

use crate::args::{Args, Opt, opt, switch};
use crate::batches::{self, Lengths};
use crate::report::{self, gib};
use crate::setup;
use crate::train_step::Steps;
use crate::{device, rss};

/// One configuration of the list.
struct Case {
    name: &'static str,
    method: Method,
    /// Of linear weights under inference; the other methods say it themselves.
    nf4: bool,
    r: usize,
    batch: usize,
    seq: usize,
    checkpointing: Checkpointing,
    optim: Optim,
    /// Embeddings and the inputs of recomputed layers on the host.
    host: bool,
    keep_dequantized: bool,
    dequantized_layers: usize,
    double_quant: bool,
    dropout: f64,
}

const QLORA: Case = Case {
    name: "QLoRA",
    method: Method::Qlora,
    nf4: true,
    r: 64,
    batch: 1,
    seq: 512,
    checkpointing: Checkpointing::All,
    optim: Optim::PagedAdamW8bit,
    host: false,
    keep_dequantized: false,
    dequantized_layers: 0,
    double_quant: true,
    dropout: 0.0,
};
const LORA: Case = Case { name: "LoRA", method: Method::Lora, nf4: false, ..QLORA };
const INFERENCE: Case = Case { name: "inference", method: Method::Inference, r: 0, ..QLORA };

const CASES: [Case; 25] = [
    QLORA,
    Case { name: "QLoRA, batch 4", batch: 4, ..QLORA },
    Case { name: "QLoRA, batch 16", batch: 16, ..QLORA },
    Case { name: "QLoRA, long", seq: 4096, ..QLORA },
    Case { name: "QLoRA, nothing recomputed", checkpointing: Checkpointing::None, ..QLORA },
    Case { name: "QLoRA, half recomputed", batch: 4, checkpointing: Checkpointing::Layers(16), ..QLORA },
    Case { name: "QLoRA, AdamW", optim: Optim::AdamW, ..QLORA },
    Case { name: "QLoRA, 8-bit AdamW", batch: 4, optim: Optim::AdamW8bit, ..QLORA },
    Case { name: "QLoRA, r 16, AdamW", r: 16, optim: Optim::AdamW, ..QLORA },
    Case { name: "QLoRA, r 16, on the host what can be", r: 16, host: true, ..QLORA },
    Case { name: "QLoRA, on the host what can be", batch: 4, host: true, ..QLORA },
    Case { name: "QLoRA, decoded once", batch: 4, keep_dequantized: true, ..QLORA },
    Case { name: "QLoRA, 16 layers held dequantized", batch: 4, dequantized_layers: 16, ..QLORA },
    Case { name: "QLoRA, f32 scales", double_quant: false, ..QLORA },
    Case { name: "QLoRA, dropout 0.1", batch: 4, dropout: 0.1, ..QLORA },
    Case {
        name: "QLoRA, 8 x 1024, half recomputed",
        batch: 8,
        seq: 1024,
        checkpointing: Checkpointing::Layers(16),
        ..QLORA
    },
    Case { name: "QLoRA, paged 32-bit AdamW", optim: Optim::PagedAdamW32bit, ..QLORA },
    Case { name: "QLoRA, r 256", r: 256, optim: Optim::AdamW8bit, ..QLORA },
    LORA,
    Case { name: "LoRA, batch 4, AdamW", batch: 4, optim: Optim::AdamW, ..LORA },
    Case { name: "LoRA, nothing recomputed", checkpointing: Checkpointing::None, ..LORA },
    Case {
        name: "full fine-tuning, pure bf16, 8-bit AdamW",
        method: Method::FullPureBf16,
        r: 0,
        nf4: false,
        optim: Optim::AdamW8bit,
        ..QLORA
    },
    Case { name: "inference, 4-bit", ..INFERENCE },
    Case { name: "inference, 4-bit, 4 x 2048", batch: 4, seq: 2048, ..INFERENCE },
    Case { name: "inference, dense", nf4: false, ..INFERENCE },
];

pub fn options() -> Vec<Opt> {
    let mut out = vec![
        opt("device", "cpu|cuda", "what computes (cpu)"),
        opt("compute-dtype", "bf16|f32", "of activations and products (cuda: bf16, cpu: f32)"),
        opt("seed", "N", "of tokens and dropout (0)"),
        opt("only", "TEXT", "configurations whose name contains it"),
        switch("predict-only", "build the plans and measure nothing"),
        opt("markdown", "FILE", "where the table goes (stderr)"),
    ];
    out.splice(0..0, setup::shape_options());
    out.extend(device::options().into_iter().filter(|o| matches!(o.name, "gpu" | "context-bytes")));
    out
}

/// What one configuration gave.
struct Row {
    name: &'static str,
    sizes: String,
    arena: u64,
    host: u64,
    predicted: u64,
    measured: Option<u64>,
    /// Why there is no measurement.
    note: String,
}

pub fn run(args: &Args) -> Result<()> {
    let spec = setup::shape(args)?;
    let device = setup::device(args)?;
    let dtype = setup::compute_dtype(args, device)?;
    let only = args.text("only").unwrap_or_default();
    let seed = args.or("seed", 0)?;
    let mut rows = Vec::new();
    for case in CASES.iter().filter(|c| c.name.contains(only)) {
        // Some do not exist everywhere: the CPU has no pure bf16, a small model no long sequences.
        let plan = match case.plan(&spec).device(device).compute_dtype(dtype).build() {
            Ok(plan) => plan,
            Err(e) => {
                eprintln!("{}: not planned: {}", case.name, e.what());
                report::line(&json!({ "bench": "memory", "name": case.name, "error": e.to_string() }))?;
                continue;
            }
        };
        rows.push(one(args, case, &plan, seed)?);
    }
    let table = markdown(&spec, &rows);
    match args.text("markdown") {
        Some(path) => write_atomic_bytes(path, table.as_bytes()),
        None => {
            eprint!("{table}");
            Ok(())
        }
    }
}

impl Case {
    fn plan(&self, spec: &ModelSpec) -> PlanBuilder {
        let mut plan = setup::builder(spec, self.method)
            .batch(self.batch)
            .seq(self.seq)
            .checkpointing(self.checkpointing)
            .optim(self.optim)
            .host_embeddings(self.host)
            .host_checkpoints(self.host)
            .keep_dequantized(self.keep_dequantized);
        if self.r > 0 {
            plan = plan.r(self.r).lora_dropout(self.dropout);
        }
        if self.method == Method::Qlora {
            let layers = self.dequantized_layers.min(spec.num_hidden_layers);
            plan = plan.double_quant(self.double_quant).dequantized_layers(layers);
        }
        if self.method == Method::Inference {
            plan = plan.quantization(self.nf4.then(Nf4Config::default));
        }
        plan
    }
}

fn one(args: &Args, case: &Case, plan: &MemoryPlan, seed: u64) -> Result<Row> {
    let predicted = device::predicted_process_bytes(args, plan)?;
    let (mut measured, mut host_growth, mut name, mut error) = (None, None, None, None);
    if !args.has("predict-only") {
        // One that the device has no room for is a result too, and the next may fit.
        match rss::watch(|| measure(plan, seed)) {
            (Ok((bytes, device)), growth) => (measured, host_growth, name) = (bytes, growth.peak, Some(device)),
            (Err(e), _) => error = Some(e),
        }
    }
    let c = plan.config();
    let mut line = setup::asked(plan, "zero", seed);
    line.insert("bench".into(), "memory".into());
    line.extend(setup::fields(json!({
        "name": case.name,
        "device": name,
        "arena_bytes": plan.arena_bytes(),
        "host_bytes": plan.host_bytes(),
        "predicted_process_bytes": predicted,
        "process_device_bytes": measured,
        "predicted_over_measured": measured.map(|m| predicted as f64 / m as f64),
        "beside_the_arena_bytes": measured.map(|m| m as i64 - plan.arena_bytes() as i64),
        "host_peak_growth_bytes": host_growth,
        "error": error.as_ref().map(|e: &tunebook::Error| e.to_string()),
    })));
    report::line(&Value::Object(line))?;
    let note = match (&error, measured) {
        (Some(e), _) => e.what().into(),
        _ if args.has("predict-only") => "not measured".into(),
        (None, None) if c.device == DeviceKind::Cpu => "ran on the CPU".into(),
        (None, None) => "the driver does not say".into(),
        _ => String::new(),
    };
    eprintln!(
        "{:<42} {} predicted, {}",
        case.name,
        gib(predicted),
        measured.map_or(note.clone(), |m| gib(m) + " measured")
    );
    Ok(Row {
        name: case.name,
        sizes: format!("{} x {}", c.micro_batch_size, c.max_seq_length),
        arena: plan.arena_bytes(),
        host: plan.host_bytes(),
        predicted,
        measured,
        note,
    })
}

/// One step over weights that are all zero, which changes no size: bytes of the process after it, and the device.
fn measure(plan: &MemoryPlan, seed: u64) -> Result<(Option<u64>, String)> {
    let (c, vocab) = (plan.config(), plan.spec().vocab_size);
    let batches = batches::random(1, c.micro_batch_size, c.max_seq_length, Lengths::Full, vocab, seed)?;
    let mut steps = Steps::new(Engine::new(plan)?, batches, seed);
    steps.step()?;
    Ok((device::process_bytes(&steps.engine, None), device::name(&steps.engine)))
}

fn markdown(spec: &ModelSpec, rows: &[Row]) -> String {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / (1 << 20) as f64);
    let mut out = format!("Memory of a process in MiB, {} ({} layers)\n\n", spec.name, spec.num_hidden_layers);
    out += "| configuration | batch x seq | arena | on the host | predicted | measured | predicted / measured |\n";
    out += "|---|---|---:|---:|---:|---:|---:|\n";
    for r in rows {
        let measured = r.measured.map_or_else(|| r.note.replace('|', "/"), mib);
        let ratio = r.measured.map_or(String::new(), |m| format!("{:.4}", r.predicted as f64 / m as f64));
        let (arena, host, predicted) = (mib(r.arena), mib(r.host), mib(r.predicted));
        let _ = writeln!(out, "| {} | {} | {arena} | {host} | {predicted} | {measured} | {ratio} |", r.name, r.sizes);
    }
    out
}
