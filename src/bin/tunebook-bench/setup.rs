//! From options to a model's shape, a plan and an engine with weights.

use candle_core::DType;
use serde_json::{Map, Value, json};
use tunebook::engine::Engine;
use tunebook::engine::optimizer::AdamWHyper;
use tunebook::model::{Base, ModelSpec};
use tunebook::nf4::Nf4Config;
use tunebook::plan::{Checkpointing, DeviceKind, MemoryPlan, Method, PlanBuilder};
use tunebook::train::Optim;
use tunebook::{Error, Result};

use crate::args::{Args, Opt, opt, switch};
use crate::device;
use crate::report::timed;

/// Options that say which model and which plan.
pub fn options() -> Vec<Opt> {
    let mut out = model_options();
    out.extend(plan_options());
    out.extend(device::options());
    out
}

/// Options that say which model.
pub fn model_options() -> Vec<Opt> {
    vec![
        opt("preset", "NAME", "a known model's shape (mistral-7b-v0.1 when there is no --model)"),
        opt("model", "DIR", "a model directory, loaded unless --random-weights"),
        switch("random-weights", "random weights of the shape: no files are read; required without --model"),
        opt("layers", "N", "another number of layers, for quick checks; needs --random-weights"),
        opt("seed", "N", "of weights, adapter, tokens and dropout (0)"),
    ]
}

fn plan_options() -> Vec<Opt> {
    vec![
        opt("device", "cpu|cuda", "what computes (cpu)"),
        opt("compute-dtype", "bf16|f32", "of activations and products (cuda: bf16, cpu: f32)"),
        opt("method", "NAME", "qlora, lora, full, full-pure-bf16 or inference (qlora)"),
        opt("base", "nf4|dense", "how linear weights are held under inference (dense)"),
        opt("r", "N", "LoRA rank, 0 for no adapter (16 for qlora and lora, else 0)"),
        opt("targets", "NAMES", "adapted modules: all-linear, q_proj,v_proj or a regular expression (all-linear)"),
        opt("dropout", "P", "LoRA dropout (0)"),
        opt("batch", "N", "sequences per micro-batch (1)"),
        opt("seq", "N", "tokens per sequence (512)"),
        opt("checkpointing", "all|none|N", "recomputed layers (all)"),
        opt("optimizer", "NAME", "adamw, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit (adamw)"),
        switch("resident-state", "a paged optimizer keeps its state on the device"),
        switch("host-embeddings", "the embedding table stays in host memory"),
        switch("host-checkpoints", "inputs of recomputed layers wait in host memory"),
        switch("keep-dequantized", "a recomputed layer's weights are decoded once"),
        opt("keep-dequantized-modules", "A,B", "those of these modules alone: q_proj,up_proj"),
        opt("dequantized-layers", "N", "the weights of the first N layers are held dequantized as well (0)"),
        opt("ce-chunk", "N", "rows of logits that the loss holds at a time (256)"),
    ]
}

/// What was asked for, as a plan.
pub struct Setup {
    /// Where the weights are; `None`: they are random.
    pub base: Option<Base>,
    /// The plan.
    pub plan: MemoryPlan,
    /// Seed of everything random.
    pub seed: u64,
}

/// The model's shape, and its files when they are wanted.
///
/// # Errors
/// Options that contradict each other, an unknown preset, a directory that cannot be read.
pub fn model(args: &Args) -> Result<(ModelSpec, Option<Base>)> {
    let random = args.has("random-weights");
    let (mut spec, base) = match (args.text("model"), args.text("preset")) {
        (Some(_), Some(_)) => return Err(args.bad("preset", "either --model or --preset", "both".into())),
        (Some(dir), None) if random => (ModelSpec::from_dir(dir)?, None),
        (Some(dir), None) => {
            let base = Base::from_dir(dir)?;
            (base.spec().clone(), Some(base))
        }
        (None, preset) => {
            if !random {
                return Err(args.bad("random-weights", "given: a preset has a shape and no weights", "absent".into()));
            }
            (ModelSpec::preset(preset.unwrap_or("mistral-7b-v0.1"))?, None)
        }
    };
    override_layers(args, &mut spec, base.is_none())?;
    Ok((spec, base))
}

/// Options of a shape alone.
pub fn shape_options() -> [Opt; 2] {
    [
        opt("preset", "NAME", "a known model's shape (mistral-7b-v0.1)"),
        opt("layers", "N", "another number of layers, for quick checks"),
    ]
}

/// The shape that [`shape_options`] say.
///
/// # Errors
/// An unknown preset.
pub fn shape(args: &Args) -> Result<ModelSpec> {
    let mut spec = ModelSpec::preset(args.text("preset").unwrap_or("mistral-7b-v0.1"))?;
    override_layers(args, &mut spec, true)?;
    Ok(spec)
}

/// Applies `--layers`.
///
/// # Errors
/// Files of another number of layers.
pub fn override_layers(args: &Args, spec: &mut ModelSpec, random: bool) -> Result<()> {
    if args.has("layers") {
        if !random {
            return Err(args.bad("layers", "--random-weights with it", "weights from files".into()));
        }
        spec.num_hidden_layers = args.at_least_one("layers", 1)?;
    }
    Ok(())
}

/// The device, by `--device`.
///
/// # Errors
/// Any word but `cpu` and `cuda`.
pub fn device(args: &Args) -> Result<DeviceKind> {
    Ok(if args.one_of("device", &["cpu", "cuda"])? == "cpu" { DeviceKind::Cpu } else { DeviceKind::Cuda })
}

/// The compute dtype, by `--compute-dtype` or the device's own.
///
/// # Errors
/// Any word but `bf16` and `f32`.
pub fn compute_dtype(args: &Args, device: DeviceKind) -> Result<DType> {
    let words = if device == DeviceKind::Cpu { ["f32", "bf16"] } else { ["bf16", "f32"] };
    Ok(if args.one_of("compute-dtype", &words)? == "bf16" { DType::BF16 } else { DType::F32 })
}

/// The method's name in options.
pub fn method_name(method: Method) -> &'static str {
    match method {
        Method::Full => "full",
        Method::FullPureBf16 => "full-pure-bf16",
        Method::Lora => "lora",
        Method::Qlora => "qlora",
        Method::Inference => "inference",
    }
}

/// The builder of a method, with nothing else set.
pub fn builder(spec: &ModelSpec, method: Method) -> PlanBuilder {
    match method {
        Method::Full => MemoryPlan::full(spec),
        Method::FullPureBf16 => MemoryPlan::full(spec).pure_bf16(),
        Method::Lora => MemoryPlan::lora(spec),
        Method::Qlora => MemoryPlan::qlora(spec),
        Method::Inference => MemoryPlan::inference(spec),
    }
}

/// `all`, `none` or a number of layers.
///
/// # Errors
/// Anything else.
fn checkpointing(args: &Args) -> Result<Checkpointing> {
    match args.text("checkpointing") {
        None | Some("all") => Ok(Checkpointing::All),
        Some("none") => Ok(Checkpointing::None),
        Some(_) => Ok(Checkpointing::Layers(args.or("checkpointing", 0)?)),
    }
}

impl Setup {
    /// Reads the options and builds the plan; `change` sets what only one command has.
    ///
    /// # Errors
    /// Options that cannot be read or contradict each other, and what the plan refuses.
    pub fn new(args: &Args, change: impl FnOnce(PlanBuilder) -> PlanBuilder) -> Result<Setup> {
        let (spec, base) = model(args)?;
        let methods = [Method::Qlora, Method::Lora, Method::Full, Method::FullPureBf16, Method::Inference];
        let word = args.one_of("method", &methods.map(method_name))?;
        let method = methods.into_iter().find(|m| method_name(*m) == word).unwrap_or(Method::Qlora);
        let device = device(args)?;
        let mut plan = builder(&spec, method)
            .device(device)
            .compute_dtype(compute_dtype(args, device)?)
            .batch(args.at_least_one("batch", 1)?)
            .seq(args.at_least_one("seq", 512.min(spec.max_position_embeddings))?)
            .checkpointing(checkpointing(args)?)
            .optim(args.or("optimizer", Optim::AdamW)?)
            .resident_state(args.has("resident-state"))
            .host_embeddings(args.has("host-embeddings"))
            .host_checkpoints(args.has("host-checkpoints"))
            .keep_dequantized(args.has("keep-dequantized"))
            .dequantized_layers(args.or("dequantized-layers", 0)?)
            .ce_chunk(args.at_least_one("ce-chunk", 256)?);
        if let Some(names) = args.text("keep-dequantized-modules") {
            plan = plan.keep_dequantized_modules(names.split(','));
        }
        if args.has("base") {
            if method != Method::Inference {
                return Err(args.bad("base", "--method inference: the others say it themselves", word.into()));
            }
            let nf4 = args.one_of("base", &["nf4", "dense"])? == "nf4";
            plan = plan.quantization(nf4.then(Nf4Config::default));
        }
        let adapts = matches!(method, Method::Qlora | Method::Lora);
        let r = args.or("r", if adapts { 16 } else { 0 })?;
        if r > 0 {
            let targets = args.text("targets").unwrap_or("all-linear");
            plan = plan.r(r).targets(targets).lora_dropout(args.or("dropout", 0.0)?);
        } else if adapts {
            return Err(args.bad("r", "at least 1 with an adapter; without one, --method inference", "0".into()));
        }
        Ok(Setup { base, plan: change(plan).build()?, seed: args.or("seed", 0)? })
    }

    /// An engine with weights and adapter, and the seconds that each part took: allocation, weights, adapter.
    ///
    /// # Errors
    /// What the engine reports.
    pub fn engine(&self) -> Result<(Engine, [f64; 3])> {
        let (engine, new) = timed(|| Engine::new(&self.plan));
        let mut engine = engine?;
        let (done, weights) = timed(|| match &self.base {
            Some(base) => engine.load(base),
            None => engine.init_weights(self.seed),
        });
        done?;
        let (done, adapter) = timed(|| match self.plan.config().lora {
            Some(_) => engine.init_adapter(self.seed),
            None => Ok(()),
        });
        done?;
        eprintln!("ready: engine {new:.1} s, weights {weights:.1} s, adapter {adapter:.1} s");
        Ok((engine, [new, weights, adapter]))
    }

    /// Everything that was asked for, as fields of a JSON line.
    pub fn asked(&self) -> Map<String, Value> {
        asked(&self.plan, if self.base.is_some() { "files" } else { "random" }, self.seed)
    }
}

/// A plan's configuration as fields of a JSON line.
pub fn asked(plan: &MemoryPlan, weights: &str, seed: u64) -> Map<String, Value> {
    let (spec, c) = (plan.spec(), plan.config());
    fields(json!({
        "model": spec.name,
        "layers": spec.num_hidden_layers,
        "weights": weights,
        "device_kind": c.device.to_string(),
        "compute_dtype": c.compute_dtype.as_str(),
        "method": method_name(c.method),
        "base": if c.quantization.is_some() { "nf4" } else { "dense" },
        "r": c.lora.as_ref().map_or(0, |l| l.r),
        "targets": c.lora.as_ref().map(|l| l.target_modules.to_string()),
        "dropout": c.lora.as_ref().map_or(0.0, |l| l.lora_dropout),
        "batch": c.micro_batch_size,
        "seq": c.max_seq_length,
        "checkpointing": match c.checkpointing {
            Checkpointing::All => "all".into(),
            Checkpointing::None => "none".into(),
            Checkpointing::Layers(n) => n.to_string(),
        },
        "optimizer": c.optim.name(),
        "resident_state": c.resident_state,
        "host_embeddings": c.host_embeddings,
        "host_checkpoints": c.host_checkpoints,
        "keep_dequantized": c.keep_dequantized,
        "keep_dequantized_modules": c.keep_dequantized_modules,
        "dequantized_layers": c.dequantized_layers,
        "ce_chunk": c.ce_chunk,
        "seed": seed,
    }))
}

/// The fields of a JSON object.
pub fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The update of step `step` (from 1), with the learning rate that the method is usually given.
pub fn hyper(method: Method, step: u32) -> AdamWHyper {
    AdamWHyper { lr: if method.is_full() { 1e-5 } else { 2e-4 }, step, ..AdamWHyper::default() }
}

/// Refuses a method that trains nothing.
///
/// # Errors
/// Inference.
pub fn must_train(args: &Args, plan: &MemoryPlan) -> Result<()> {
    if plan.trainable_params() == 0 {
        return Err(args.bad("method", "one that trains", method_name(plan.config().method).into()));
    }
    Ok::<(), Error>(())
}
