//! `merge`: an adapter merged into its base, from the page cache into a new directory.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tunebook::Result;
use tunebook::lora::{self, Adapter, LoraConfig, MergeBase};
use tunebook::model::{Base, ModelSpec};
use tunebook::nf4::Nf4Config;

use crate::args::{Args, Opt, opt, switch};
use crate::report::{self, gib, least, median, timed};
use crate::{device, files, nf4, rss, setup};

pub fn options() -> Vec<Opt> {
    let mut out = vec![
        opt("model", "DIR", "a base, and --adapter an adapter for it, instead of random ones"),
        opt("adapter", "DIR", "the adapter"),
        opt("r", "N", "LoRA rank, on every linear module of the layers (64)"),
        opt("onto", "original|dequantized|quantized", "which weights the adapter is added to (original)"),
        switch(
            "costs",
            "measure what each choice of base costs as well, as MergeOnto::save does unless told otherwise",
        ),
        opt("repeats", "N", "timed merges, each into a directory of its own (3)"),
        opt("dir", "DIR", "where the temporary directories are written (the system's)"),
        opt("seed", "N", "of weights and adapter (0)"),
    ];
    out.splice(2..2, setup::shape_options());
    out
}

pub fn run(args: &Args) -> Result<()> {
    let onto = args.one_of("onto", &["original", "dequantized", "quantized"])?;
    let base = match onto {
        "dequantized" => MergeBase::Dequantized(Nf4Config::default()),
        "quantized" => MergeBase::Quantized(Nf4Config::default()),
        _ => MergeBase::Original,
    };
    let repeats = args.at_least_one("repeats", 3)?;
    let directory = files::directory(args)?;
    let (model, adapter) = match (args.text("model"), args.text("adapter")) {
        (Some(model), Some(adapter)) => (model.into(), adapter.into()),
        (None, None) => write_both(args, directory.path())?,
        (Some(_), None) => return Err(args.bad("adapter", "with --model", "nothing".into())),
        (None, Some(_)) => return Err(args.bad("model", "with --adapter", "nothing".into())),
    };
    let opened = Base::from_dir(&model)?;
    let spec = opened.spec();
    files::warm(&opened)?;
    let (mut seconds, mut growth, mut bytes, mut r) = (Vec::new(), Vec::new(), 0, None);
    for i in 0..repeats {
        let out = directory.path().join(format!("merged-{i}"));
        let merge = lora::merge(&model, &adapter)?.onto(base);
        let merge = if args.has("costs") { merge } else { merge.without_costs() };
        let ((report, s), grown) = rss::watch(|| timed(|| merge.save(&out)));
        let report = report?;
        (bytes, r) = (report.bytes, report.modules.first().map(|m| m.r));
        seconds.push(s);
        growth.push(grown);
        std::fs::remove_dir_all(&out).map_err(|e| tunebook::Error::io("remove", &out, e))?;
    }
    let anonymous = growth.iter().filter_map(|g| g.anonymous_peak).max();
    eprintln!(
        "{} in {:.2} s median, {:.2} s best, {} of anonymous memory",
        gib(bytes),
        median(&seconds),
        least(&seconds),
        anonymous.map_or("an unknown amount".into(), gib)
    );
    let line = setup::fields(json!({
        "bench": "merge",
        "model": spec.name,
        "layers": spec.num_hidden_layers,
        "r": r,
        "onto": onto,
        "costs": args.has("costs"),
        "device": device::cpu_name(),
        "threads": rayon::current_num_threads(),
        "bytes": bytes,
        "seconds_median": median(&seconds),
        "seconds_best": least(&seconds),
        "seconds": seconds,
        "host_anonymous_peak_growth_bytes": growth.iter().map(|g| g.anonymous_peak).collect::<Vec<_>>(),
    }));
    report::line(&Value::Object(line))
}

/// A base of random weights and an adapter for it; their directories.
fn write_both(args: &Args, dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let spec = setup::shape(args)?;
    let (r, seed) = (args.at_least_one("r", 64)?, args.or("seed", 0)?);
    let (model, adapter) = (dir.join("base"), dir.join("adapter"));
    std::fs::create_dir(&model).map_err(|e| tunebook::Error::io("create", &model, e))?;
    files::write_checkpoint(&spec, &model, seed)?;
    write_adapter(&spec, &adapter, r, seed)?;
    Ok((model, adapter))
}

/// An adapter on every linear module, with random A and B.
fn write_adapter(spec: &ModelSpec, dir: &Path, r: usize, seed: u64) -> Result<()> {
    let mut adapter = Adapter::init(spec, &LoraConfig { r, ..LoraConfig::default() }, seed)?;
    let values = nf4::normal(seed + 1);
    for pair in adapter.tensors.values_mut() {
        let drawn = values.iter().cycle();
        pair.b.iter_mut().zip(drawn).for_each(|(b, v)| *b = v.to_f32());
    }
    adapter.save(dir)
}
