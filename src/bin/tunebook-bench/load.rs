//! `load`: [`Engine::load`] from the page cache, with what it takes of the host's memory.

use std::fs::File;
use std::io;
use std::path::Path;

use candle_core::DType;
use half::bf16;
use serde_json::{Value, json};
use tunebook::engine::Engine;
use tunebook::files::write_atomic_bytes;
use tunebook::model::{Base, ModelSpec, ShardedWriter, TensorHeader, pt_metadata};
use tunebook::plan::MemoryPlan;
use tunebook::{Error, Result};

use crate::args::{Args, Opt, opt};
use crate::report::{self, gib, least, median, timed};
use crate::setup::{self, Setup};
use crate::{device, nf4, rss};

/// Bytes of one file of the checkpoint that is written.
const SHARD: u64 = 5 << 30;

pub fn options() -> Vec<Opt> {
    let mut out = setup::options();
    out.extend([
        opt("repeats", "N", "timed loads into the same engine (3)"),
        opt("dir", "DIR", "where --random-weights writes its temporary directory (the system's)"),
    ]);
    out
}

pub fn run(args: &Args) -> Result<()> {
    let repeats = args.at_least_one("repeats", 3)?;
    let setup = Setup::new(args, |plan| plan)?;
    let plan = &setup.plan;
    // Lives until the end, then removes its files.
    let mut directory = None;
    let base = match &setup.base {
        Some(base) => base.clone(),
        None => {
            let parent = args.text("dir").map_or_else(std::env::temp_dir, Into::into);
            let dir = tempfile::Builder::new().prefix("tunebook-bench-").tempdir_in(&parent);
            let dir = dir.map_err(|e| Error::io("create a directory", &parent, e))?;
            let (written, seconds) = timed(|| write_checkpoint(plan.spec(), dir.path(), setup.seed));
            eprintln!("wrote {} in {seconds:.1} s", gib(written?));
            Base::from_dir(directory.insert(dir).path())?
        }
    };
    // A preset's name is not the directory's: the plan is made again for the base, with the same configuration.
    let plan = MemoryPlan::new(base.spec(), plan.config().clone())?;
    warm(&base)?;
    let ballast = device::cap(args, &plan)?;
    let mut engine = Engine::new(&plan)?;
    let (mut seconds, mut growth) = (Vec::with_capacity(repeats), Vec::with_capacity(repeats));
    for _ in 0..repeats {
        let ((done, s), grown) = rss::watch(|| timed(|| engine.load(&base)));
        done?;
        seconds.push(s);
        growth.push(grown);
    }
    let file_bytes = base.checkpoint().bytes();
    let (middle, best) = (median(&seconds), least(&seconds));
    let rate = |s: f64| file_bytes as f64 / s / 1e9;
    eprintln!(
        "{} in {middle:.2} s median, {:.2} GB/s median, {:.2} GB/s best",
        gib(file_bytes),
        rate(middle),
        rate(best)
    );
    let mut line = setup.asked();
    line.insert("bench".into(), "load".into());
    line.extend(setup::fields(json!({
        "device": device::name(&engine),
        "stored": if base.quantization().is_some() { "4-bit" } else { "dense" },
        "checkpoint_bytes": file_bytes,
        "arena_bytes": plan.arena_bytes(),
        "seconds_median": middle,
        "seconds_best": best,
        "gb_per_s_median": rate(middle),
        "gb_per_s_best": rate(best),
        "seconds": seconds,
        "process_device_bytes": device::process_bytes(&engine, ballast.as_ref()),
        // On the CPU the arena is host memory and becomes resident in the first load.
        "host_peak_growth_bytes": growth.iter().map(|g| g.peak).collect::<Vec<_>>(),
        "host_anonymous_peak_growth_bytes": growth.iter().map(|g| g.anonymous_peak).collect::<Vec<_>>(),
        "host_anonymous_growth_bytes": growth.iter().map(|g| g.anonymous_after).collect::<Vec<_>>(),
    })));
    report::line(&Value::Object(line))
}

/// Reads every file once, so that all of it is in the page cache.
fn warm(base: &Base) -> Result<()> {
    for path in base.checkpoint().shards() {
        let read = File::open(&path).and_then(|mut f| io::copy(&mut f, &mut io::sink()));
        read.map_err(|e| Error::io("read", &path, e))?;
    }
    Ok(())
}

/// Writes `config.json` and bf16 weights of a shape; the bytes of the weights.
fn write_checkpoint(spec: &ModelSpec, dir: &Path, seed: u64) -> Result<u64> {
    write_atomic_bytes(dir.join("config.json"), format!("{:#}\n", spec.to_config_json()).as_bytes())?;
    let header = |t: tunebook::model::TensorSpec| TensorHeader::new(t.name, DType::BF16, t.shape);
    let headers: Vec<TensorHeader> = spec.tensors().into_iter().map(header).collect();
    let values = nf4::normal(seed);
    let weights: &[u8] = bytemuck::cast_slice(&values);
    let ones = vec![bf16::ONE; spec.hidden_size];
    let mut writer = ShardedWriter::create(dir, headers.clone(), SHARD, &pt_metadata())?;
    for t in &headers {
        if t.shape.len() == 1 {
            writer.write(&t.name, bytemuck::cast_slice(&ones))?;
            continue;
        }
        let mut left = t.bytes() as usize;
        while left > 0 {
            let n = left.min(weights.len());
            writer.write(&t.name, &weights[..n])?;
            left -= n;
        }
    }
    writer.finish()?;
    Ok(headers.iter().map(TensorHeader::bytes).sum())
}
