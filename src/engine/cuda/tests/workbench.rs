//! Kernels from text: what a cell's mistakes look like.

use super::super::gpu::{Arg, Gpu, Launch};
use super::super::kernel_source;
use super::gpu;

const DOUBLE: &str = "#include \"common.cuh\"
extern \"C\" __global__ void twice(const float* x, float* y, u32 n) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = 2.0f * x[i];
}";

#[test]
fn text_becomes_a_kernel() {
    if !gpu() {
        return;
    }
    let gpu = Gpu::open(false).unwrap();
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let (from, to) = (gpu.buffer(&x).unwrap(), gpu.zeros(4 * x.len()).unwrap());
    let module = gpu.compile("twice.cu", DOUBLE).unwrap();
    let how = Launch { grid: [4, 1, 1], block: 256, shared: 0 };
    let args = [Arg::Ptr(from.ptr), Arg::Ptr(to.ptr), Arg::U32(1000)];
    module.launch(&gpu, "twice", how, &args).unwrap();
    assert_eq!(to.read::<f32>(&gpu).unwrap(), x.iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    let seconds = gpu.seconds(3, || module.launch(&gpu, "twice", how, &args)).unwrap();
    assert!(seconds > 0.0 && seconds < 1.0, "{seconds}");

    let e = module.launch(&gpu, "thrice", how, &args).unwrap_err().to_string();
    assert!(e.contains("twice.cu: thrice"), "{e}");
    for wrong in [&args[..2], &[args[0], args[1], Arg::U64(1000)]] {
        let e = module.launch(&gpu, "twice", how, wrong).unwrap_err().to_string();
        assert!(e.contains("twice.cu: twice") && e.contains("3 of [8, 8, 4] bytes"), "{e}");
    }
    let e = to.read::<[u8; 3]>(&gpu).unwrap_err().to_string();
    assert!(e.contains("multiple of 3") && e.contains("4000"), "{e}");
    // What was made on a card outlives its value.
    drop(gpu);
    drop((from, to, module));
}

#[test]
fn a_mistake_comes_with_its_line() {
    if !gpu() {
        return;
    }
    let gpu = Gpu::open(false).unwrap();
    let e = gpu.compile("twice.cu", &DOUBLE.replace("2.0f * x[i]", "2.0f * z[i]")).unwrap_err().to_string();
    assert!(e.contains("twice.cu(4)") && e.contains("\"z\" is undefined"), "{e}");
}

#[test]
fn shipped_kernels_compile_from_their_text() {
    if gpu() {
        Gpu::open(false).unwrap().compile("swiglu.cu", kernel_source("swiglu").unwrap()).unwrap();
    }
    let e = kernel_source("nf5").unwrap_err().to_string();
    assert!(e.contains("nf5.cu") && e.contains("swiglu"), "{e}");
}

/// The whole card is opened again beside an engine, as a notebook does.
#[test]
fn two_at_a_time() {
    if !gpu() {
        return;
    }
    let first = Gpu::open(false).unwrap();
    let kept = first.buffer(&[1.0_f32; 256]).unwrap();
    for _ in 0..3 {
        let second = Gpu::open(false).unwrap();
        assert_eq!(second.buffer(&[2.0_f32]).unwrap().read::<f32>(&second).unwrap(), [2.0]);
        let timing = crate::engine::cuda::bench_nf4(512, 512, crate::nf4::Nf4Config::default(), 2).unwrap();
        assert_eq!(timing.dequantize_seconds.len(), 2);
    }
    assert_eq!(kept.read::<f32>(&first).unwrap(), [1.0; 256]);
}
