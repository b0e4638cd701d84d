//! The same bits for any number of threads.

use tunebook::data::Batch;
use tunebook::engine::Engine;
use tunebook::engine::optimizer::AdamWHyper;
use tunebook::generate::Decoder;
use tunebook::lora::LoraConfig;
use tunebook::model::ModelSpec;
use tunebook::plan::{Checkpointing, MemoryPlan, PlanBuilder};
use tunebook::train::Optim;

use crate::oracle::{RandomModel, adapter, dataset};

/// Wide enough that every product is cut into several tiles.
fn model() -> RandomModel {
    let config = serde_json::json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 256, "intermediate_size": 520,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 301,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 100,
        "tie_word_embeddings": false, "hidden_act": "silu"
    });
    RandomModel::new(&config, 21)
}

/// Everything that three steps, an evaluation and some decoding leave behind, as bits.
fn steps(model: &RandomModel, plan: PlanBuilder, lora: Option<&LoraConfig>, threads: usize) -> Vec<(String, Vec<u32>)> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let spec: &ModelSpec = model.spec();
        let ds = dataset(spec, &[130, 7, 200, 64, 90, 300, 1, 31], 22);
        let plan = plan.cpu().batch(2).seq(300).ce_chunk(100).build().unwrap();
        let mut engine = Engine::new(&plan).unwrap();
        engine.load(&model.base).unwrap();
        if let Some(lora) = lora {
            engine.load_adapter(&adapter(spec, lora, 23)).unwrap();
        }
        let mut out = Vec::new();
        let f64s =
            |values: &[f64]| values.iter().flat_map(|x| [x.to_bits() as u32, (x.to_bits() >> 32) as u32]).collect();
        for step in 0..3u32 {
            for micro in 0..2 {
                let batch =
                    Batch::new(&ds, &[(4 * step as usize + 2 * micro) % 8, (4 * step as usize + 2 * micro + 1) % 8]);
                let loss = engine.micro_step(batch, 300, 1, u64::from(step) * 2 + micro as u64).unwrap();
                out.push((format!("loss {step} {micro}"), f64s(&[loss.sum])));
            }
            for p in engine.parameters() {
                let gradient = engine.gradient(&p.name).unwrap().iter().map(|x| x.to_bits()).collect();
                out.push((format!("gradient {step} {}", p.name), gradient));
            }
            let hyper = AdamWHyper { lr: 1e-3, step: step + 1, ..AdamWHyper::default() };
            let norm = engine.optimizer_step(hyper, 0.3).unwrap();
            out.push((format!("norm {step}"), f64s(&[norm.norm, norm.clip])));
        }
        for p in engine.parameters().into_iter().chain(engine.optimizer_state()) {
            let bytes = engine.state_bytes(&p).unwrap().iter().map(|b| u32::from(*b)).collect();
            out.push((p.name, bytes));
        }
        let loss = engine.evaluate(Batch::new(&ds, &[0, 2])).unwrap();
        out.push(("evaluation".into(), f64s(&[loss.sum])));
        engine.reset();
        let logits = engine.forward(&ds.get(0).input_ids).unwrap();
        out.push(("logits".into(), logits.iter().map(|x| x.to_bits()).collect()));
        out
    })
}

fn same_bits(model: &RandomModel, plan: PlanBuilder, lora: Option<&LoraConfig>) {
    let one = steps(model, plan.clone(), lora, 1);
    for threads in [2, 3, 7] {
        let more = steps(model, plan.clone(), lora, threads);
        assert_eq!(one.len(), more.len());
        for ((name, a), (_, b)) in one.iter().zip(&more) {
            assert!(a == b, "{name} has other bits with {threads} threads");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let model = model();
    let lora = LoraConfig { r: 8, lora_dropout: 0.1, ..LoraConfig::default() };
    let qlora = MemoryPlan::qlora(model.spec()).adapter(lora.clone());
    same_bits(&model, qlora.optim(Optim::PagedAdamW8bit), Some(&lora));
    same_bits(&model, MemoryPlan::full(model.spec()).optim(Optim::AdamW8bit), None);
    same_bits(&model, MemoryPlan::full(model.spec()), None);
}

/// Layer inputs and embeddings on the host, weights decoded once or held dequantized: other places and other operations, the same numbers.
#[test]
fn where_tensors_lie_changes_no_bit() {
    let model = model();
    let lora = LoraConfig { r: 8, lora_dropout: 0.1, ..LoraConfig::default() };
    let plain = MemoryPlan::qlora(model.spec()).adapter(lora.clone());
    let expected = steps(&model, plain.clone(), Some(&lora), 2);
    for layers in [Checkpointing::All, Checkpointing::Layers(1), Checkpointing::None] {
        let moved = plain.clone().checkpointing(layers).host_checkpoints(true).host_embeddings(true);
        let some = moved.clone().keep_dequantized_modules(["q_proj", "up_proj"]);
        let held = [1, 2].map(|n| moved.clone().keep_dequantized(true).dequantized_layers(n));
        for plan in [moved.clone(), moved.keep_dequantized(true), some].into_iter().chain(held) {
            let found = steps(&model, plan, Some(&lora), 2);
            for ((name, a), (_, b)) in expected.iter().zip(&found) {
                assert!(a == b, "{name} has other bits with {layers}");
            }
        }
    }
}

/// What lies on the host is not in the arena.
#[test]
fn the_host_takes_from_the_arena() {
    let spec = ModelSpec::preset("mistral-7b-v0.1").unwrap();
    let plan = || MemoryPlan::qlora(&spec).r(16).optim(Optim::PagedAdamW8bit);
    let bytes = |plan: PlanBuilder| {
        let plan = plan.build().unwrap();
        (plan.arena_bytes() as i64, plan.host_bytes() as i64)
    };
    let (arena, host) = bytes(plan());
    let (less, more) = bytes(plan().host_embeddings(true));
    let table = 32_000 * 4096 * 2;
    assert_eq!((arena - less, more - host), (table, table));
    let (less, more) = bytes(plan().host_checkpoints(true));
    let input = 512 * 4096 * 2;
    assert_eq!(more - host, 32 * input);
    // One input is on its way out, or one is used while the next arrives.
    assert!((30 * input..=31 * input).contains(&(arena - less)), "{} inputs", (arena - less) as f64 / input as f64);
    let tied = ModelSpec::preset("llama-3.2-1b").unwrap();
    let error = MemoryPlan::qlora(&tied).host_embeddings(true).build().unwrap_err().to_string();
    assert!(error.contains("tied"), "{error}");
}
