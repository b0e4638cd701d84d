//! Speed on this machine: medians of several runs. `cargo bench --profile dev` (or plain `cargo bench`, which builds the
//! dependencies once more).

use std::time::Instant;

use half::bf16;
use tunebook::data::{Batch, Dataset, Example};
use tunebook::engine::Engine;
use tunebook::engine::optimizer::{AdamWHyper, adamw, adamw_8bit, adamw_32bit_bnb, sum_of_squares};
use tunebook::model::ModelSpec;
use tunebook::nf4::{self, Absmax, AbsmaxRef, Nf4Config, QuantType};
use tunebook::plan::{Checkpointing, MemoryPlan};

fn main() {
    let only = std::env::args().nth(1).unwrap_or_default();
    let wanted = |name: &str| only.is_empty() || only.starts_with('-') || only == name;
    if wanted("nf4") {
        nf4_bench();
    }
    if wanted("optimizer") {
        optimizer_bench();
    }
    if wanted("step") {
        step_bench();
    }
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

/// One AdamW step and the gradient norm of four million f32 parameters.
fn optimizer_bench() {
    let n = 4 << 20;
    let g: Vec<f32> = normal_bf16(n).iter().map(|v| v.to_f32()).collect();
    let (mut p, mut m, mut v) = (g.clone(), vec![0f32; n], vec![0f32; n]);
    let (mut s1, mut s2) = (vec![0u8; n], vec![0u8; n]);
    let (mut a1, mut a2) = (vec![0f32; n / 256], vec![0f32; n / 256]);
    let h = AdamWHyper::default();
    println!("AdamW, {n} parameters, {} threads", rayon::current_num_threads());
    let line =
        |what: &str, seconds: f64| println!("{what:<52} {seconds:>8.4} s {:>7.2} ns each", seconds * 1e9 / n as f64);
    line("adamw", median(7, || adamw(&mut p, &g, &mut m, &mut v, &h)));
    line("adamw_32bit_bnb", median(7, || adamw_32bit_bnb(&mut p, &g, &mut m, &mut v, &h)));
    line("adamw_8bit", median(7, || adamw_8bit(&mut p, &g, &mut s1, &mut a1, &mut s2, &mut a2, &h)));
    line("sum_of_squares", median(7, || sum_of_squares(&g)));
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

/// A step on the CPU: hidden 256, intermediate 704, 4 layers, 8/4 heads, vocabulary 1024, batch 8 x 128, f32, AdamW, r 16 on
/// the seven projections. PyTorch eager on two AVX-512 cores: 4,100 tokens/s.
fn step_bench() {
    let config = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":1024,"hidden_size":256,
        "intermediate_size":704,"num_hidden_layers":4,"num_attention_heads":8,"num_key_value_heads":4,
        "max_position_embeddings":512,"rms_norm_eps":1e-5,"rope_theta":10000.0,"tie_word_embeddings":false,
        "hidden_act":"silu"}"#;
    let spec = ModelSpec::from_json("bench", config).expect("a valid config");
    let plans = [
        ("LoRA step", MemoryPlan::lora(&spec).checkpointing(Checkpointing::None)),
        ("LoRA step, every layer recomputed", MemoryPlan::lora(&spec).checkpointing(Checkpointing::All)),
        ("full fine-tuning step", MemoryPlan::full(&spec).checkpointing(Checkpointing::None)),
    ];
    println!("training step, 8 x 128 tokens, {} threads", rayon::current_num_threads());
    for (name, plan) in plans {
        let plan = plan.cpu().batch(8).seq(128).build().expect("a valid plan");
        let mut engine = Engine::new(&plan).expect("memory");
        engine.init_weights(1).expect("a dense base");
        if plan.config().lora.is_some() {
            engine.init_adapter(2).expect("an adapter");
        }
        let example = |i: u32| Example::all_trained((0..128).map(|t| (t * 37 + i * 101) % 1024).collect());
        let data = Dataset::new((0..8).map(example).collect()).expect("examples");
        let batch = Batch::new(&data, &[0, 1, 2, 3, 4, 5, 6, 7]);
        let hyper =
            AdamWHyper { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1, grad_scale: 1.0 };
        let seconds = median(9, || {
            engine.micro_step(batch.clone(), batch.num_items(), 1, 0).expect("a step");
            engine.optimizer_step(hyper, 1.0).expect("an update")
        });
        println!("{name:<52} {seconds:>8.4} s {:>7.0} tokens/s", 1024.0 / seconds);
        let mut times = engine.take_seconds();
        times.sort_by(|a, b| b.1.total_cmp(&a.1));
        let total: f64 = times.iter().map(|t| t.1).sum();
        let shares: Vec<String> =
            times.iter().take(6).map(|(op, s)| format!("{op} {:.0} %", 100.0 * s / total)).collect();
        println!("    {}", shares.join(", "));
    }
}
