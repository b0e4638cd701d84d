//! Made from 11_inside_the_kernels.ipynb by notebooks/program.py; edit the notebook.

#![allow(unused, missing_docs, clippy::all)]

use std::fmt::Debug;

/// Shows a cell's last expression as the kernel does: by its display where it has one, else by `Debug`.
struct Last<'a, T>(&'a T);
trait ByDisplay {
    fn show(&self);
}
impl<T: tunebook::display::Show> ByDisplay for Last<'_, T> {
    fn show(&self) {
        tunebook::display::show(self.0);
    }
}
trait ByDebug {
    fn show(&self);
}
impl<T: Debug> ByDebug for &Last<'_, T> {
    fn show(&self) {
        println!("EVCXR_BEGIN_CONTENT text/plain\n{:?}\nEVCXR_END_CONTENT", self.0);
    }
}

fn main() {
    // Before any thread is there.
    unsafe { std::env::set_var("EVCXR_IS_RUNTIME", "1") };
    if let Err(e) = cells() {
        eprintln!("{e}");
        std::process::exit(1);
    }
}

pub fn cells() -> std::result::Result<(), Box<dyn std::error::Error>> {
    println!("\nTUNEBOOK_CELL 1");
    use tunebook::lesson::*;
    use tunebook::prelude::*;
    {
        let last = { environment() };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 3");
    let plain = Nf4Config { double_quant: false, ..Nf4Config::default() };
    let weight = synthetic::normal(&[14_336, 4096], 0.02, 1)?.to_dtype(DType::BF16)?;
    let q = nf4::quantize(&weight, plain)?;
    let absmax = match &q.absmax {
        nf4::Absmax::F32(scales) => scales.clone(),
        nf4::Absmax::Nested { .. } => unreachable!("not asked for"),
    };
    println!("{} bytes of codes, {} scales", count(q.packed.len() as u64), count(absmax.len() as u64));
    println!("\nTUNEBOOK_CELL 5");
    fn decode(packed: &[u8], absmax: &[f32], i: usize) -> f32 {
        let byte = packed[i / 2];
        let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
        QuantType::Nf4.code()[code as usize] * absmax[i / 64]
    }
    let mine: Vec<f32> = (0..1000).map(|i| decode(&q.packed, &absmax, i)).collect();
    check("the first thousand", mine, q.dequantize_f32()?[..1000].to_vec())?;
    println!("{:?}", (0..8).map(|i| decode(&q.packed, &absmax, i)).collect::<Vec<f32>>());
    println!("\nTUNEBOOK_CELL 7");
    let exact = q.dequantize()?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let twin: Vec<u16> = exact.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    fn differ(a: &[u16], b: &[u16]) -> usize {
        a.iter().zip(b).filter(|(x, y)| x != y).count()
    }
    println!("{} values", count(twin.len() as u64));
    println!("\nTUNEBOOK_CELL 9");
    use tunebook::engine::cuda::{self, Arg, Launch, kernel_source};
    let gpu = cuda::Gpu::open(false)?;
    let codes = gpu.buffer(&q.packed)?;
    let scales = gpu.buffer(&absmax)?;
    let levels = gpu.buffer(&QuantType::Nf4.code())?;
    let out = gpu.zeros(2 * q.numel())?;
    println!("{}: {} multiprocessors, {}", gpu.name, gpu.sm_count, short_bytes(gpu.total_bytes));
    println!("\nTUNEBOOK_CELL 11");
    let simple = r#"
#include "common.cuh"
extern "C" __global__ void decode(const u8* codes, const float* absmax, const float* levels, elem* out, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 code = codes[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
    store(out + i, levels[code] * absmax[i / 64]);
}"#;
    let one_each = gpu.compile("decode.cu", simple)?;
    println!("\nTUNEBOOK_CELL 12");
    fn blocks(elements: usize, per_thread: usize) -> Launch {
        Launch { grid: [elements.div_ceil(256 * per_thread) as u32, 1, 1], block: 256, shared: 0 }
    }
    let n = q.numel();
    let args = [Arg::Ptr(codes.ptr), Arg::Ptr(scales.ptr), Arg::Ptr(levels.ptr), Arg::Ptr(out.ptr), Arg::U32(n as u32)];
    one_each.launch(&gpu, "decode", blocks(n, 1), &args)?;
    {
        let last = { check("values unlike the twin's", differ(&out.read::<u16>(&gpu)?, &twin), 0)? };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 14");
    let bytes = (codes.bytes() + scales.bytes() + out.bytes()) as f64;
    let seconds = gpu.seconds(20, || one_each.launch(&gpu, "decode", blocks(n, 1), &args))?;
    let mut speeds = vec![("one element a thread".to_string(), 1e6 * seconds, bytes / seconds / 1e12)];
    println!("{:.0} MB in {:.0} µs: {:.2} TB/s", bytes / 1e6, 1e6 * seconds, bytes / seconds / 1e12);
    let copy = gpu.zeros(out.bytes())?;
    let copying = gpu.seconds(20, || gpu.copy(copy.ptr, out.ptr, out.bytes() as u64))?;
    let roof = 2.0 * out.bytes() as f64 / copying / 1e12;
    println!("a copy moves {roof:.2} TB/s; the first kernel {:.0} % of that", 100.0 * speeds[0].2 / roof);
    println!("\nTUNEBOOK_CELL 16");
    let wide = r#"
#include "common.cuh"
extern "C" __global__ void decode(const u32* codes, const float* absmax, const float* levels, elem* out, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n / 8) return;
    u32 word = codes[i];
    float scale = absmax[i / 8], v[VEC];
    for (int j = 0; j < 8; j++) {
        u32 byte = word >> (j / 2 * 8);
        v[j] = levels[(j % 2 == 0 ? byte >> 4 : byte) & 15] * scale;
    }
    store_vec(out + i * 8, v);
}"#;
    let eight_each = gpu.compile("decode.cu", wide)?;
    println!("\nTUNEBOOK_CELL 17");
    gpu.fill(out.ptr, 0, out.bytes() as u64)?;
    eight_each.launch(&gpu, "decode", blocks(n, 8), &args)?;
    {
        let last = { check("values unlike the twin's", differ(&out.read::<u16>(&gpu)?, &twin), 0)? };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 18");
    let seconds = gpu.seconds(20, || eight_each.launch(&gpu, "decode", blocks(n, 8), &args))?;
    speeds.push(("eight elements a thread".to_string(), 1e6 * seconds, bytes / seconds / 1e12));
    println!("{:.0} µs: {:.2} TB/s", 1e6 * seconds, bytes / seconds / 1e12);
    println!("\nTUNEBOOK_CELL 20");
    let fill = "__shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = levels[threadIdx.x];
    __syncthreads();
    u32 i = ";
    let cached = wide.replace("u32 i = ", fill).replace("v[j] = levels[", "v[j] = table[");
    let shared = gpu.compile("decode.cu", &cached)?;
    gpu.fill(out.ptr, 0, out.bytes() as u64)?;
    shared.launch(&gpu, "decode", blocks(n, 8), &args)?;
    {
        let last = { check("values unlike the twin's", differ(&out.read::<u16>(&gpu)?, &twin), 0)? };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 21");
    let seconds = gpu.seconds(20, || shared.launch(&gpu, "decode", blocks(n, 8), &args))?;
    speeds.push(("and levels in shared memory".to_string(), 1e6 * seconds, bytes / seconds / 1e12));
    println!("{:.0} µs: {:.2} TB/s", 1e6 * seconds, bytes / seconds / 1e12);
    println!("\nTUNEBOOK_CELL 23");
    let how = blocks(n, 16);
    let (size, log2_blocksize, nf4) = (Arg::U64(n as u64), Arg::U32(6), Arg::U32(0));
    let weight = [Arg::Ptr(codes.ptr), Arg::Ptr(scales.ptr), size, log2_blocksize, nf4, Arg::Ptr(out.ptr)];
    // It can lay the rows apart (then it divides, by the number after their widths) and put an adapter's B
    // beside them; here rows of 4096 follow each other.
    let rows = [Arg::U32(4096), Arg::U32(4096), Arg::U64(0), Arg::Ptr(0), Arg::U32(0), Arg::U32(0), Arg::F32(0.0)];
    let library_args = [&weight[..], &rows[..]].concat();
    gpu.fill(out.ptr, 0, out.bytes() as u64)?;
    gpu.launch("nf4", "nf4_dequantize", how, &library_args)?;
    {
        let last = { check("values unlike the twin's", differ(&out.read::<u16>(&gpu)?, &twin), 0)? };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 25");
    let text = kernel_source("nf4")?;
    let one_by_one = "for (int i = 0; i < VEC; i++) store(out + part + i, w[i]);";
    let edited = text.replace("store_vec(out + part, w);", one_by_one);
    for (name, text) in [("the library's", text), ("the library's, stores of two bytes", edited.as_str())] {
        let module = gpu.compile("nf4.cu", text)?;
        let seconds = gpu.seconds(20, || module.launch(&gpu, "nf4_dequantize", how, &library_args))?;
        assert_eq!(differ(&out.read::<u16>(&gpu)?, &twin), 0);
        speeds.push((name.to_string(), 1e6 * seconds, bytes / seconds / 1e12));
    }
    println!("\nTUNEBOOK_CELL 26");

    {
        let last = {
            table(
                "Decoding 58.7 million weights",
                ["kernel", "µs", "TB/s", "of a copy"],
                speeds.iter().map(|(name, us, speed)| {
                    [name.clone(), format!("{us:.0}"), format!("{speed:.2}"), format!("{:.0} %", 100.0 * speed / roof)]
                }),
            )
        };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 28");
    let weights = 32.0 * (2.0 * 4096.0 * 4096.0 + 2.0 * 4096.0 * 1024.0 + 3.0 * 4096.0 * 14_336.0);
    let best = speeds.iter().map(|s| s.2).fold(0.0, f64::max);
    let pass = weights * (bytes / n as f64) / (best * 1e12);
    println!("{:.2} billion weights: {:.1} ms a pass; a step with recomputation has three", weights / 1e9, 1e3 * pass);
    println!("\nTUNEBOOK_CELL 30");
    let failed = (|| -> std::result::Result<(), Box<dyn std::error::Error>> {
        gpu.compile("decode.cu", &simple.replace("absmax[i / 64]", "absmaxx[i / 64]"))?;
        Ok(())
    })();
    match failed {
        Err(e) => println!("TUNEBOOK_STDERR\n{e}\nTUNEBOOK_END"),
        Ok(()) => return Err("cell 30 should fail".into()),
    }
    println!("\nTUNEBOOK_CELL 32");
    let swapped = gpu.compile("decode.cu", &simple.replace("? 4 : 0", "? 0 : 4"))?;
    swapped.launch(&gpu, "decode", blocks(n, 1), &args)?;
    let wrong = differ(&out.read::<u16>(&gpu)?, &twin);
    println!("{:.1} % of the values are wrong", 100.0 * wrong as f64 / n as f64);
    println!("\nTUNEBOOK_CELL 34");
    let my_threads = 256;
    let my_launch = Launch { grid: [n.div_ceil(8 * my_threads) as u32, 1, 1], block: my_threads as u32, shared: 0 };
    let seconds = gpu.seconds(20, || eight_each.launch(&gpu, "decode", my_launch, &args))?;
    println!("{my_threads} threads: {:.0} µs", 1e6 * seconds);
    println!("\nTUNEBOOK_CELL 36");
    let my_swiglu = gpu.compile(
        "my_swiglu.cu",
        r#"
#include "common.cuh"
extern "C" __global__ void swiglu(const elem* gate, const elem* up, elem* out, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(out + i, 0.0f);
}"#,
    )?;
    let ones = gpu.buffer(&[0x3f80_u16; 256])?;
    let result = gpu.zeros(512)?;
    let pointers = [Arg::Ptr(ones.ptr), Arg::Ptr(ones.ptr), Arg::Ptr(result.ptr), Arg::U32(256)];
    my_swiglu.launch(&gpu, "swiglu", blocks(256, 1), &pointers)?;
    {
        let last = { attempt("sigmoid(1) in bf16", result.read::<u16>(&gpu)?[0], 0x3f3b) };
        (&Last(&last)).show();
    }
    println!("\nTUNEBOOK_CELL 38");
    let few = gpu.zeros(200)?;
    let short = [Arg::Ptr(codes.ptr), Arg::Ptr(scales.ptr), Arg::Ptr(levels.ptr), Arg::Ptr(few.ptr), Arg::U32(100)];
    eight_each.launch(&gpu, "decode", blocks(100, 8), &short)?;
    println!("{} of 100 values unlike the twin's", differ(&few.read::<u16>(&gpu)?, &twin[..100]));
    println!("\nTUNEBOOK_CELL end");
    Ok(())
}
