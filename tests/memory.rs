//! The heap of the process under a microscope: what the engine allocates is its plan.
//!
//! One test alone in its process: another one's allocations would be counted too.
//!
//! The C library's allocator is replaced by one that counts, for Rust and everything below it. (`#[global_allocator]`
//! would not see the standard library, which is linked dynamically here.)

#[path = "memory/counting.rs"]
mod counting;
#[allow(dead_code)]
#[path = "suite/oracle.rs"]
mod oracle;

use candle_core::{DType, Device, Tensor};
use counting::{heap, large_allocations, reset_peak};
use tunebook::data::{Batch, Dataset};
use tunebook::engine::Engine;
use tunebook::engine::optimizer::AdamWHyper;
use tunebook::generate::Decoder;
use tunebook::plan::{Checkpointing, MemoryPlan};
use tunebook::train::Optim;

use oracle::{RandomModel, dataset};

const MIB: usize = 1 << 20;

/// A model whose products are cut into many tiles, as deep as tiles are taken at a time.
fn model() -> RandomModel {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "hidden_act": "silu"
    });
    RandomModel::new(&config, 1)
}

/// One step: its batches are made, two micro-steps, an update. What was live before and after, and the most in between
/// beyond what was live before, batches included.
fn step(engine: &mut Engine, ds: &Dataset, number: u32) -> (counting::Heap, counting::Heap, usize) {
    let before = heap();
    reset_peak();
    let batches = [&[0usize, 1, 2, 3][..], &[4, 5, 6, 7, 8]].map(|indices| Batch::new(ds, indices));
    let items = batches.iter().map(Batch::num_items).sum();
    for (i, batch) in batches.into_iter().enumerate() {
        engine.micro_step(batch, items, 7, u64::from(number) * 2 + i as u64).unwrap();
    }
    engine.optimizer_step(AdamWHyper { step: number + 1, ..AdamWHyper::default() }, 0.3).unwrap();
    let after = heap();
    (before, after, after.peak - before.live)
}

/// Every method, kind of state and way of checkpointing at least once.
fn plans(model: &RandomModel) -> Vec<(&'static str, MemoryPlan)> {
    use Checkpointing::{All, Layers, None};
    use Optim::{AdamW, AdamW8bit, PagedAdamW8bit, PagedAdamW32bit};
    let spec = model.spec();
    let (full, lora, qlora) = (MemoryPlan::full(spec), MemoryPlan::lora(spec), MemoryPlan::qlora(spec));
    // Rank 200: matrices large enough to be paged.
    let list = [
        ("full, adamw", full.clone().optim(AdamW).checkpointing(None)),
        ("full, adamw_8bit, recomputed", full.clone().optim(AdamW8bit).checkpointing(All)),
        ("full, paged_adamw_8bit, one layer recomputed", full.clone().optim(PagedAdamW8bit).checkpointing(Layers(1))),
        ("full, paged_adamw_32bit, recomputed", full.optim(PagedAdamW32bit).checkpointing(All)),
        ("LoRA, adamw", lora.clone().optim(AdamW).checkpointing(None)),
        ("LoRA with dropout, adamw_8bit, recomputed", lora.lora_dropout(0.1).optim(AdamW8bit).checkpointing(All)),
        ("QLoRA nested, adamw", qlora.clone().optim(AdamW).checkpointing(None)),
        ("QLoRA nested, paged_adamw_8bit, recomputed", qlora.clone().r(200).optim(PagedAdamW8bit).checkpointing(All)),
        ("QLoRA plain, adamw_8bit", qlora.clone().double_quant(false).optim(AdamW8bit).checkpointing(None)),
        ("QLoRA plain, paged_adamw_32bit", qlora.double_quant(false).r(200).optim(PagedAdamW32bit).checkpointing(All)),
    ];
    list.map(|(what, plan)| (what, plan.cpu().batch(4).seq(128).build().unwrap())).into()
}

#[test]
fn the_engine_allocates_its_plan_and_nothing_that_lasts() {
    // Two threads whatever the machine, and the calling thread outside of them, as in a notebook.
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().unwrap();
    // The products' library makes a thread's buffer when the thread first takes part, which on a busy machine may be late.
    rayon::broadcast(|_| {
        let x = Tensor::ones((256, 256), DType::F32, &Device::Cpu).unwrap();
        x.matmul(&x).unwrap();
    });
    let model = model();
    let ds = dataset(model.spec(), &[128, 128, 100, 128, 77, 128, 128, 60, 1], 2);
    let mut highest = 0;
    for (what, plan) in plans(&model) {
        let (engine, large) = large_allocations(|| Engine::new(&plan).unwrap());
        let mut engine = engine;
        let paged = plan.host_bytes() > 0;
        assert_eq!(paged, plan.config().optim.is_paged(), "{what}");
        let mut expected = vec![plan.arena_bytes() as usize];
        expected.extend(paged.then_some(plan.host_bytes() as usize));
        assert_eq!(large, expected, "{what}: the large allocations of Engine::new");
        engine.load(&model.base).unwrap();
        if !plan.config().method.is_full() {
            engine.init_adapter(3).unwrap();
        }
        let bound = plan.transient_bytes() as usize;
        assert!(bound < MIB, "{what}: {bound}");
        // The first step starts the threads, their buffers and the table of seconds.
        step(&mut engine, &ds, 0);
        for number in 1..5 {
            let (before, after, peak) = step(&mut engine, &ds, number);
            // Every block is given back; the C library's rounding of single blocks differs by a few bytes.
            assert_eq!(before.blocks, after.blocks, "{what}, step {number}: blocks");
            assert!(before.live.abs_diff(after.live) <= 64, "{what}, step {number}: {before:?} {after:?}");
            highest = highest.max(peak);
            // The batches, which are the caller's, are in the peak too: a few KiB.
            assert!(peak <= bound, "{what}, step {number}: {peak} bytes beside the arena, at most {bound} announced");
        }
        evaluation_and_decoding(what, &mut engine, &ds);
    }
    println!("at most {highest} bytes beside the arena during a step");
}

/// Evaluating and generating leave nothing behind either.
fn evaluation_and_decoding(what: &str, engine: &mut Engine, ds: &Dataset) {
    let mut before = heap();
    for round in 0..3 {
        engine.evaluate(Batch::new(ds, &[0, 1])).unwrap();
        engine.reset();
        engine.forward(&ds.get(2).input_ids[..70]).unwrap();
        engine.forward(&[1]).unwrap();
        let after = heap();
        // The first round makes the host's copy of the logits.
        if round > 0 {
            assert_eq!(before.blocks, after.blocks, "{what}: evaluating, decoding");
            assert!(before.live.abs_diff(after.live) <= 64, "{what}: {before:?} {after:?}");
        }
        before = after;
    }
}
