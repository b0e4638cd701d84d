//! `load`: [`Engine::load`] from the page cache, with what it takes of the host's memory.

use serde_json::{Value, json};
use tunebook::Result;
use tunebook::engine::Engine;
use tunebook::model::Base;
use tunebook::plan::MemoryPlan;

use crate::args::{Args, Opt, opt};
use crate::files::{self, warm};
use crate::report::{self, gib, least, median, timed};
use crate::setup::{self, Setup};
use crate::{device, rss};

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
            let dir = directory.insert(files::directory(args)?);
            files::write_checkpoint(plan.spec(), dir.path(), setup.seed)?;
            Base::from_dir(dir.path())?
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
