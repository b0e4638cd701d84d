//! Speed on this machine: medians of several runs. `cargo bench --profile dev` (or plain `cargo bench`, which builds the
//! dependencies once more).

use std::time::Instant;

use half::bf16;
use tunebook::nf4::{self, Absmax, AbsmaxRef, Nf4Config, QuantType};

fn main() {
    nf4_bench();
}

/// The median time of `runs` calls in seconds, after one that is not counted.
fn median<R>(runs: usize, mut f: impl FnMut() -> R) -> f64 {
    drop(f());
    let mut seconds: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            let result = f();
            let elapsed = start.elapsed().as_secs_f64();
            // Freeing the result is not part of the work.
            drop(result);
            elapsed
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[runs / 2]
}

fn report(what: &str, seconds: f64, gigabytes: f64, target: f64) {
    println!("{what:<52} {seconds:>8.4} s {:>7.1} GB/s   target {target:.3} s", gigabytes / seconds);
}

/// NF4 of a 4096 x 14336 bf16 weight (Mistral-7B's down_proj). The targets come from bitsandbytes 0.50.2 on two AVX-512
/// cores: 1.6 s to quantize with nested absmax (ten times as fast is the target) and 0.049 s to dequantize.
fn nf4_bench() {
    let shape = [4096usize, 14336];
    let n = shape[0] * shape[1];
    let w = normal_bf16(n);
    println!("NF4, {} x {} bf16, {} threads", shape[0], shape[1], rayon::current_num_threads());
    let quantize = |cfg| nf4::quantize_bf16(&w, &shape, cfg).expect("finite weights");
    let nested = Nf4Config::default();
    let (read, packed) = (2e-9 * n as f64, 0.5e-9 * n as f64);
    report("quantize, nested absmax", median(7, || quantize(nested)), read + packed, 0.16);
    report(
        "quantize, f32 absmax",
        median(7, || quantize(Nf4Config { double_quant: false, ..nested })),
        read + packed,
        0.16,
    );
    let fp4 = Nf4Config { quant_type: QuantType::Fp4, ..nested };
    report("quantize, FP4", median(7, || quantize(fp4)), read + packed, 1.6);
    let q = quantize(nested);
    report("dequantize to a new bf16 tensor", median(7, || q.dequantize().expect("whole")), read + packed, 0.049);
    let Absmax::Nested { codes, absmax, offset, blocksize } = &q.absmax else { return };
    let scales = AbsmaxRef::Nested { codes, absmax, offset: *offset, blocksize: *blocksize };
    let mut out = vec![bf16::ZERO; n];
    let seconds = median(7, || nf4::dequantize_bf16_into(&q.packed, scales, q.quant_type, q.blocksize, &mut out));
    report("dequantize into bf16 memory", seconds, read + packed, 0.049);
    let mut out = vec![0f32; n];
    let seconds = median(7, || nf4::dequantize_into(&q.packed, scales, q.quant_type, q.blocksize, &mut out));
    report("dequantize into f32 memory", seconds, 2.0 * read + packed, 0.098);
}

/// Normally distributed weights of size 0.02, the same every time.
fn normal_bf16(n: usize) -> Vec<bf16> {
    let mut x = 1u64;
    let mut uniform = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as f32 / (1 << 24) as f32
    };
    // Twelve uniform numbers less six are normal enough for timing.
    let few: Vec<bf16> =
        (0..1 << 20).map(|_| bf16::from_f32(0.02 * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0))).collect();
    few.into_iter().cycle().take(n).collect()
}
