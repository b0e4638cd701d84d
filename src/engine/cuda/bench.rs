//! Timing of single kernels on data that the arena does not hold: for benchmarks.

use candle_core::DType;

use super::gpu::{Arg, Gpu, Launch};
use super::nf4::{self, Scales};
use crate::Result;
use crate::nf4::{Nf4Config, storage};
use std::time::Instant;

/// Seconds of each repetition.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4Timing {
    /// bf16 to 4 bits, nested scales included where the configuration has them.
    pub quantize_seconds: Vec<f64>,
    /// 4 bits to bf16.
    pub dequantize_seconds: Vec<f64>,
}

/// Times quantization and dequantization of a bf16 matrix of random values on the card.
///
/// Each measurement covers as many matrices as make the caches useless, and is divided by their number.
///
/// # Errors
/// No card, too little memory on it.
pub fn bench_nf4(rows: usize, columns: usize, config: Nf4Config, repeats: usize) -> Result<Nf4Timing> {
    const COPIES: usize = 8;
    let gpu = Gpu::open(false)?;
    let n = rows * columns;
    let bytes = storage(n, config);
    let blocks = n.div_ceil(config.blocksize);
    let part = |bytes: usize| bytes.next_multiple_of(256);
    let sizes = [n * 2, bytes.packed as usize, blocks * 4, blocks, bytes.nested_absmax as usize + 4, 256];
    let one: usize = sizes.iter().map(|b| part(*b)).sum();
    let start = gpu.allocate((one * COPIES) as u64)?;
    let place =
        |copy: usize, what: usize| start + (copy * one + sizes[..what].iter().map(|b| part(*b)).sum::<usize>()) as u64;
    let [dense, packed, scales, codes, groups, offset] = [0, 1, 2, 3, 4, 5];
    let nested = config.double_quant;
    let quantize = |copy: usize| -> Result<()> {
        let at = |what| place(copy, what);
        nf4::quantize(&gpu, (at(dense), DType::BF16, n), config, at(packed), at(scales))?;
        if !nested {
            return Ok(());
        }
        nf4::mean(&gpu, at(scales), blocks, at(offset))?;
        nf4::nest(&gpu, (at(scales), blocks), config.nested_blocksize, at(codes), at(groups), at(offset))
    };
    let dequantize = |copy: usize| {
        let at = |what| place(copy, what);
        let scales = if nested {
            Scales::Nested { codes: at(codes), absmax: at(groups), offset: at(offset) }
        } else {
            Scales::Plain(at(scales))
        };
        nf4::dequantize(&gpu, at(packed), scales, config, n, at(dense), nf4::Rows::dense(columns))
    };
    let time = |work: &dyn Fn(usize) -> Result<()>| -> Result<Vec<f64>> {
        let mut seconds = Vec::with_capacity(repeats);
        // The first is not counted.
        for i in 0..=repeats {
            gpu.wait()?;
            let begin = Instant::now();
            (0..COPIES).try_for_each(work)?;
            gpu.wait()?;
            if i > 0 {
                seconds.push(begin.elapsed().as_secs_f64() / COPIES as f64);
            }
        }
        Ok(seconds)
    };
    let run = || {
        for copy in 0..COPIES {
            let how = Launch { grid: [n.div_ceil(1024) as u32, 1, 1], block: 256, shared: 0 };
            let (first, seed, std, constant) = (Arg::U64(0), Arg::U64(copy as u64), Arg::F32(0.02), Arg::F32(0.0));
            let args = [Arg::Ptr(place(copy, dense)), first, Arg::U64(n as u64), seed, std, constant];
            gpu.launch("weights", "random_weights", how, &args)?;
        }
        Ok(Nf4Timing { quantize_seconds: time(&quantize)?, dequantize_seconds: time(&dequantize)? })
    };
    let out = run();
    let _ = gpu.wait();
    gpu.free(start);
    out
}
