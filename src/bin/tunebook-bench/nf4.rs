//! `nf4`: quantization and dequantization of one bf16 weight.

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tunebook::Result;
use tunebook::nf4::{self, Nf4Config};
use tunebook::plan::DeviceKind;

use crate::args::{Args, Opt, opt, switch};
use crate::report::{self, least, median, timed};
use crate::{device, setup};

/// Elements that are drawn; the weight repeats them.
const DRAWN: usize = 1 << 20;

pub fn options() -> Vec<Opt> {
    vec![
        opt("shape", "RxC", "rows and columns of the weight (4096x14336)"),
        opt("device", "cpu|cuda", "what computes (cpu)"),
        opt("blocksize", "N", "elements that share a scale (64)"),
        switch("f32-absmax", "f32 scales instead of nested ones"),
        opt("repeats", "N", "timed runs (9)"),
        opt("seed", "N", "of the weight (0)"),
    ]
}

pub fn run(args: &Args) -> Result<()> {
    let (rows, columns) = shape(args)?;
    let blocksize = args.at_least_one("blocksize", 64)?;
    let config = Nf4Config { blocksize, double_quant: !args.has("f32-absmax"), ..Nf4Config::default() };
    config.validate()?;
    let repeats = args.at_least_one("repeats", 9)?;
    let (quantize, dequantize, name) = match setup::device(args)? {
        DeviceKind::Cpu => {
            let (q, d) = on_cpu(rows, columns, config, repeats, args.or("seed", 0)?)?;
            (q, d, device::cpu_name())
        }
        DeviceKind::Cuda => {
            let t = tunebook::engine::cuda::bench_nf4(rows, columns, config, repeats)?;
            (t.quantize_seconds, t.dequantize_seconds, "cuda".to_string())
        }
    };
    let numel = rows * columns;
    let dense = 2 * numel as u64;
    let packed = nf4::storage(numel, config).total();
    eprintln!("NF4, {rows} x {columns} bf16, blocks of {blocksize}, {name}");
    for (what, seconds) in [("quantize", quantize), ("dequantize", dequantize)] {
        let (middle, best) = (median(&seconds), least(&seconds));
        // Each reads one form and writes the other.
        let bytes = (dense + packed) as f64;
        eprintln!(
            "{what:<12} {middle:.6} s median, {:.1} GB/s median, {:.1} GB/s best",
            bytes / middle / 1e9,
            bytes / best / 1e9
        );
        report::line(&json!({
            "bench": "nf4",
            "what": what,
            "device": name,
            "rows": rows,
            "columns": columns,
            "blocksize": blocksize,
            "double_quant": config.double_quant,
            "dense_bytes": dense,
            "packed_bytes": packed,
            "seconds_median": middle,
            "gb_per_s_median": bytes / middle / 1e9,
            "gb_per_s_best": bytes / best / 1e9,
            "seconds": seconds,
        }))?;
    }
    Ok(())
}

fn shape(args: &Args) -> Result<(usize, usize)> {
    let text = args.text("shape").unwrap_or("4096x14336");
    let sizes = text.split_once('x').and_then(|(r, c)| Some((r.parse().ok()?, c.parse().ok()?)));
    match sizes {
        Some((r, c)) if r > 0 && c > 0 => Ok((r, c)),
        _ => Err(args.bad("shape", "rows and columns, such as 4096x14336", format!("`{text}`"))),
    }
}

/// Seconds of each run on the host, after one of each that is not counted; dequantization into memory that is there.
fn on_cpu(rows: usize, columns: usize, config: Nf4Config, repeats: usize, seed: u64) -> Result<(Vec<f64>, Vec<f64>)> {
    let w: Vec<bf16> = normal(seed).into_iter().cycle().take(rows * columns).collect();
    let mut q = nf4::quantize_bf16(&w, &[rows, columns], config)?;
    let mut quantize = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        let (out, s) = timed(|| nf4::quantize_bf16(&w, &[rows, columns], config));
        q = out?;
        quantize.push(s);
    }
    let mut out = vec![bf16::ZERO; w.len()];
    let mut dequantize = Vec::with_capacity(repeats + 1);
    for _ in 0..=repeats {
        let into = || nf4::dequantize_bf16_into(&q.packed, q.absmax.borrow(), q.quant_type, q.blocksize, &mut out);
        dequantize.push(timed(into).1);
    }
    dequantize.remove(0);
    Ok((quantize, dequantize))
}

/// Numbers as in a weight: normal enough, standard deviation 0.02.
pub fn normal(seed: u64) -> Vec<bf16> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // The sum of twelve uniform numbers less six has a variance of one.
    let mut draw = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    (0..DRAWN).map(|_| bf16::from_f32(0.02 * draw())).collect()
}
