//! What the benchmark asks about the device that computes.

use std::fs;

use serde_json::{Value, json};
use tunebook::engine::Engine;
use tunebook::engine::cuda::{Ballast, reserve_all_but};
use tunebook::plan::{DeviceKind, Gpu, MemoryPlan};
use tunebook::{Error, Result};

use crate::args::{Args, Opt, opt};
use crate::report::gib;

/// Dense bf16 products of H100 and H200 in FLOP/s, as measured and not as the datasheet says (989e12).
const PEAK: f64 = 790e12;
const PEAK_LABEL: &str = "8192^3 bf16 product of random data, measured on H100 and H200";

/// Options about the device.
pub fn options() -> Vec<Opt> {
    vec![
        opt("gpu", "NAME", "card whose context is used in predictions, cuda only (the card at hand, measured)"),
        opt("context-bytes", "SIZE", "bytes of the CUDA context in predictions, instead of the card's"),
        opt("vram-cap", "SIZE", "cuda: refuse a plan that is predicted to exceed it, and leave no more than that free"),
        opt("peak-tflops", "N", "what utilisation is measured against, in TFLOP/s (cuda: 790, dense bf16)"),
    ]
}

/// Bytes that the process will hold: on a GPU the arena and the context, on the CPU the arena, temporaries and host state.
///
/// # Errors
/// An unknown card.
pub fn predicted_process_bytes(args: &Args, plan: &MemoryPlan) -> Result<u64> {
    if plan.config().device == DeviceKind::Cpu {
        return Ok(plan.arena_bytes() + plan.transient_bytes() + plan.host_bytes());
    }
    let mut gpu = match args.text("gpu") {
        Some(name) => Gpu::preset(name)?,
        None => Gpu::detect()?,
    };
    if let Some(bytes) = args.size("context-bytes")? {
        gpu.context_bytes = bytes;
    }
    Ok(plan.process_bytes(&gpu))
}

/// Refuses a plan that does not fit under `--vram-cap`; on a GPU, occupies everything beyond it as long as the result
/// lives.
///
/// # Errors
/// A plan that is predicted to need more; what the device reports.
pub fn cap(args: &Args, plan: &MemoryPlan) -> Result<Option<Ballast>> {
    let Some(cap) = args.size("vram-cap")? else { return Ok(None) };
    let predicted = predicted_process_bytes(args, plan)?;
    if predicted > cap {
        return Err(Error::new("the plan does not fit under the cap")
            .at("--vram-cap")
            .expected(format!("at most {cap} bytes ({})", gib(cap)))
            .found(format!("{predicted} bytes ({}) predicted for the process", gib(predicted)))
            .next("a smaller --batch or --seq, --checkpointing all, a paged --optimizer"));
    }
    match plan.config().device {
        DeviceKind::Cpu => Ok(None),
        DeviceKind::Cuda => reserve_all_but(cap).map(Some),
    }
}

/// What the process holds on the device without the ballast; `None` on the CPU, or where the driver does not say.
pub fn process_bytes(engine: &Engine, ballast: Option<&Ballast>) -> Option<u64> {
    Some(engine.process_bytes()?.saturating_sub(ballast.map_or(0, |b| b.bytes)))
}

/// The device's name; for the CPU its model and the number of threads.
pub fn name(engine: &Engine) -> String {
    match engine.plan().config().device {
        DeviceKind::Cpu => cpu_name(),
        DeviceKind::Cuda => engine.device_name(),
    }
}

/// The processor as the system names it.
pub fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split(':').nth(1));
    format!("{}, {} threads", model.unwrap_or("cpu").trim(), tunebook::environment().threads)
}

/// `peak_flops_per_s`, `peak_label` and `utilisation`; null on the CPU unless a peak was given.
///
/// # Errors
/// A peak that is not a number.
pub fn utilisation(args: &Args, device: DeviceKind, flops_per_s: f64) -> Result<Value> {
    let (peak, label) = match args.maybe::<f64>("peak-tflops")? {
        Some(t) => (Some(t * 1e12), Some("--peak-tflops")),
        None if device == DeviceKind::Cuda => (Some(PEAK), Some(PEAK_LABEL)),
        None => (None, None),
    };
    Ok(json!({
        "peak_flops_per_s": peak,
        "peak_label": label,
        "utilisation": peak.map(|p| flops_per_s / p),
    }))
}
