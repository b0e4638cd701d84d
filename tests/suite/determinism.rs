//! The same bits for any number of threads.

use tunebook::data::Batch;
use tunebook::engine::Engine;
use tunebook::engine::optimizer::AdamWHyper;
use tunebook::generate::Decoder;
use tunebook::lora::LoraConfig;
use tunebook::model::ModelSpec;
use tunebook::plan::{MemoryPlan, PlanBuilder};
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
