//! Logits against candle-transformers' models of every family, and the key-value cache against the whole text at once.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    gemma as candle_gemma, gemma2 as candle_gemma2, llama as candle_llama, mistral as candle_mistral,
    phi3 as candle_phi3, qwen2 as candle_qwen2, qwen3 as candle_qwen3,
};
use serde_json::{Value, json};
use tunebook::data::Batch;
use tunebook::engine::Engine;
use tunebook::generate::Decoder;
use tunebook::lora::LoraConfig;
use tunebook::plan::MemoryPlan;

use crate::oracle::{RandomModel, adapter, dataset, gemma, gemma2, llama, mistral, phi3, qwen2, qwen3};

fn builder(model: &RandomModel) -> VarBuilder<'static> {
    let path = model.dir.path().join("model.safetensors");
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

fn tokens(model: &RandomModel, n: usize) -> Vec<u32> {
    dataset(model.spec(), &[n], 8).get(0).input_ids.clone()
}

fn engine(model: &RandomModel, tokens: usize) -> Engine {
    let plan = MemoryPlan::inference(model.spec()).cpu().batch(1).seq(tokens).context(512).ce_chunk(50);
    let mut engine = Engine::new(&plan.build().unwrap()).unwrap();
    engine.fill_dead_regions(true);
    engine.load(&model.base).unwrap();
    engine
}

/// Logits at every position, as rows.
fn all_logits(engine: &mut Engine, tokens: &[u32]) -> Vec<Vec<f32>> {
    let n = tokens.len() as u32;
    let labels = vec![-100; tokens.len()];
    let batch = Batch {
        input_ids: tokens.to_vec(),
        positions: (0..n).collect(),
        cu_seqlens: vec![0, n],
        labels,
        examples: vec![0],
    };
    let v = engine.plan().spec().vocab_size;
    engine.logits(batch).unwrap().chunks(v).map(<[f32]>::to_vec).collect()
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // NaN is the worst.
    a.iter().zip(b).fold(0f32, |m, (x, y)| if (x - y).abs() <= m { m } else { (x - y).abs() })
}

/// Positions at which candle's model, which gives the last logits only, is asked.
const ENDS: [usize; 9] = [1, 2, 15, 16, 17, 18, 64, 65, 150];

fn compare(what: &str, model: &RandomModel, mut last_logits: impl FnMut(&Tensor) -> Tensor) {
    let tokens = tokens(model, 150);
    let ours = all_logits(&mut engine(model, 150), &tokens);
    let mut worst = 0f32;
    for end in ENDS {
        let input = Tensor::new(&tokens[..end], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let theirs = last_logits(&input).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        worst = worst.max(apart(&ours[end - 1], &theirs));
    }
    println!("{what}: logits differ from candle-transformers' by at most {worst:.1e}");
    assert!(worst < 1e-4, "{what}: {worst}");
}

/// candle-transformers counts the tokens before the one that looks; transformers and we count that one too.
fn candle_window(window: Option<usize>) -> Option<usize> {
    window.map(|w| w - 1)
}

#[test]
fn mistral_with_and_without_a_window() {
    for window in [None, Some(16)] {
        let model = RandomModel::new(&mistral(3, window), 11);
        let s = model.spec();
        assert_eq!(s.sliding_window, window);
        let config = candle_mistral::Config {
            vocab_size: s.vocab_size,
            hidden_size: s.hidden_size,
            intermediate_size: s.intermediate_size,
            num_hidden_layers: s.num_hidden_layers,
            num_attention_heads: s.num_attention_heads,
            head_dim: Some(s.head_dim),
            num_key_value_heads: s.num_key_value_heads,
            hidden_act: candle_nn::Activation::Silu,
            max_position_embeddings: s.max_position_embeddings,
            rms_norm_eps: s.rms_norm_eps,
            rope_theta: s.rope_theta,
            sliding_window: candle_window(window),
            use_flash_attn: false,
        };
        let mut theirs = candle_mistral::Model::new(&config, builder(&model)).unwrap();
        compare(&format!("Mistral, window {window:?}"), &model, |input| {
            theirs.clear_kv_cache();
            theirs.forward(input, 0).unwrap()
        });
    }
}

fn llama3_scaled() -> Value {
    let mut config = llama(2, false);
    config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    config["rope_theta"] = json!(10000.0);
    config
}

#[test]
fn llama_tied_separate_and_with_scaled_frequencies() {
    for (what, config) in [("tied", llama(2, true)), ("separate", llama(3, false)), ("llama3 rope", llama3_scaled())] {
        let model = RandomModel::new(&config, 12);
        let config: candle_llama::LlamaConfig = serde_json::from_value(config).unwrap();
        let config = config.into_config(false);
        let theirs = candle_llama::Llama::load(builder(&model), &config).unwrap();
        compare(&format!("Llama, {what}"), &model, |input| {
            let mut cache = candle_llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            theirs.forward(input, 0, &mut cache).unwrap()
        });
    }
}

/// One family: a random model of the configuration with `changes`, and candle's of the same file.
macro_rules! family {
    ($config:expr, $changes:tt, $of:ident :: $model:ident ( $($first:expr),* )) => {{
        let mut config = $config;
        let changes = json!($changes);
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let model = RandomModel::new(&config, 14);
        let config: $of::Config = serde_json::from_value(config).unwrap();
        let mut theirs = $of::$model::new($($first,)* &config, builder(&model)).unwrap();
        compare(stringify!($of), &model, |input| {
            theirs.clear_kv_cache();
            theirs.forward(input, 0).unwrap()
        });
    }};
}

/// Without windows, which candle-transformers counts otherwise, or leaves out; and Gemma 2 scaled by its head's size, as there.
#[test]
fn every_other_family() {
    family!(qwen2(3), { "use_sliding_window": false, "sliding_window": 512 }, candle_qwen2::ModelForCausalLM());
    family!(
        qwen3(3),
        { "attention_bias": false, "use_sliding_window": false, "sliding_window": null, "max_window_layers": 3 },
        candle_qwen3::ModelForCausalLM()
    );
    family!(phi3(3), { "sliding_window": null }, candle_phi3::Model());
    family!(gemma(3), { "attention_bias": false }, candle_gemma::Model(false));
    family!(gemma2(3), { "attention_bias": false, "sliding_window": null, "query_pre_attn_scalar": 20 }, candle_gemma2::Model(false));
}

/// Feeds the text in pieces; the logits after each piece must be those of the whole text at that position.
fn decode(engine: &mut Engine, tokens: &[u32], full: &[Vec<f32>], pieces: &[usize]) -> f32 {
    engine.reset();
    let (mut at, mut worst) = (0, 0f32);
    for &n in pieces.iter().cycle() {
        let n = n.min(tokens.len() - at);
        let logits = engine.forward(&tokens[at..at + n]).unwrap();
        at += n;
        assert_eq!(engine.position(), at);
        worst = worst.max(apart(&logits, &full[at - 1]));
        if at == tokens.len() {
            return worst;
        }
    }
    unreachable!("pieces are not empty")
}

const PIECES: [&[usize]; 6] = [&[1], &[7, 1, 1], &[64, 1], &[65], &[130, 3], &[1000]];

#[test]
fn the_cache_gives_the_logits_of_the_whole_text() {
    let configs = [mistral(3, None), mistral(3, Some(16)), mistral(2, Some(1)), llama(2, true), llama3_scaled()];
    for (i, config) in configs.iter().enumerate() {
        let model = RandomModel::new(config, 13);
        let tokens = tokens(&model, 200);
        let mut engine = engine(&model, 200);
        let full = all_logits(&mut engine, &tokens);
        for pieces in PIECES {
            let worst = decode(&mut engine, &tokens, &full, pieces);
            assert!(worst < 1e-4, "model {i}, pieces {pieces:?}: {worst}");
        }
    }
}

#[test]
fn the_cache_works_beside_training_with_the_adapter_on_and_off() {
    let model = RandomModel::new(&mistral(2, Some(16)), 14);
    let config = LoraConfig { r: 4, lora_dropout: 0.2, ..LoraConfig::default() };
    let plan = MemoryPlan::qlora(model.spec()).cpu().batch(2).seq(100).adapter(config.clone()).build().unwrap();
    assert!(plan.max_context() >= 256, "{}", plan.max_context());
    let mut engine = Engine::new(&plan).unwrap();
    engine.fill_dead_regions(true);
    engine.load(&model.base).unwrap();
    engine.load_adapter(&adapter(model.spec(), &config, 15)).unwrap();
    let tokens = tokens(&model, 180);
    let mut seen = Vec::new();
    for on in [true, false, true] {
        engine.enable_adapter(on);
        let full = all_logits(&mut engine, &tokens);
        for pieces in [&[7, 1][..], &[150, 1]] {
            let worst = decode(&mut engine, &tokens, &full, pieces);
            assert!(worst < 2e-5, "adapter {on}, pieces {pieces:?}: {worst}");
        }
        seen.push(full);
    }
    assert_ne!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
}
