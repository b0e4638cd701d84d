//! What the engine refuses, and that it says so before anything is computed.

use candle_core::DType;
use tunebook::Result;
use tunebook::data::{Batch, IGNORE_INDEX};
use tunebook::engine::Engine;
use tunebook::engine::cuda;
use tunebook::engine::optimizer::AdamWHyper;
use tunebook::generate::Decoder;
use tunebook::lora::{Adapter, LoraConfig};
use tunebook::model::ModelSpec;
use tunebook::plan::MemoryPlan;

use crate::oracle::{RandomModel, adapter, llama, mistral};

fn engine(model: &RandomModel) -> Engine {
    let plan = MemoryPlan::lora(model.spec()).r(4).cpu().batch(2).seq(20).context(50).build().unwrap();
    let mut engine = Engine::new(&plan).unwrap();
    engine.load(&model.base).unwrap();
    engine.init_adapter(1).unwrap();
    engine
}

fn batch(n: usize) -> Batch {
    Batch {
        input_ids: vec![1; n],
        positions: (0..n as u32).collect(),
        cu_seqlens: vec![0, n as u32],
        labels: vec![1; n],
        examples: vec![0],
    }
}

/// The error's text must hold every word.
#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let error = result.err().expect("this must be refused").to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn batches_that_do_not_fit() {
    let model = RandomModel::new(&mistral(1, None), 31);
    let mut e = engine(&model);
    let good = e.evaluate(batch(40)).unwrap();
    type Change = fn(&mut Batch);
    let cases: [(usize, Change, &[&str]); 14] = [
        (41, |_| {}, &["more tokens than the plan", "40 = 2 x 20", "41", ".batch()"]),
        (0, |_| {}, &["no tokens"]),
        (5, |b| b.input_ids[2] = 101, &["token outside the vocabulary", "below 101", "101"]),
        (5, |b| b.input_ids[4] = u32::MAX, &["token outside the vocabulary"]),
        (5, |b| b.labels[0] = 101, &["label outside the vocabulary", "below 101"]),
        (5, |b| b.labels[0] = -1, &["label outside the vocabulary", "-1"]),
        (5, |b| b.labels[0] = i32::MIN, &["label outside the vocabulary"]),
        (5, |b| b.positions[1] = 512, &["too long", "max_position_embeddings = 512"]),
        (5, |b| b.labels.truncate(4), &["parts of different lengths", "4 labels"]),
        (5, |b| b.positions.push(1), &["parts of different lengths", "6 positions"]),
        (5, |b| b.cu_seqlens = vec![], &["cu_seqlens rising from 0 to 5"]),
        (5, |b| b.cu_seqlens = vec![0, 4], &["cu_seqlens rising from 0 to 5", "[0, 4]"]),
        (5, |b| b.cu_seqlens = vec![0, 9, 5], &["cu_seqlens"]),
        (5, |b| b.cu_seqlens = vec![0, 2, 2, 5], &["cu_seqlens"]),
    ];
    for (n, change, words) in cases {
        let mut b = batch(n);
        change(&mut b);
        refused(e.evaluate(b.clone()), words);
        refused(e.logits(b.clone()), words);
        refused(e.micro_step(b, 1, 0, 0), words);
        assert!(!e.has_failed());
    }
    // Refusals leave everything as it was.
    assert_eq!(e.evaluate(batch(40)).unwrap(), good);
}

#[test]
fn a_batch_without_labels_has_no_loss_and_no_gradient() {
    let model = RandomModel::new(&mistral(1, None), 31);
    let mut e = engine(&model);
    let mut b = batch(5);
    b.labels.fill(IGNORE_INDEX);
    let loss = e.micro_step(b, 0, 0, 0).unwrap();
    assert_eq!((loss.sum, loss.tokens), (0.0, 0));
    for p in e.parameters() {
        assert!(e.gradient(&p.name).unwrap().iter().all(|g| *g == 0.0), "{}", p.name);
    }
}

#[test]
fn bases_that_are_not_the_plans() {
    let model = RandomModel::new(&mistral(1, None), 32);
    let mut e = engine(&model);
    refused(
        e.load(&RandomModel::new(&mistral(2, None), 1).base),
        &["another shape", "parameters", "MemoryPlan::qlora"],
    );
    refused(e.load(&RandomModel::new(&llama(1, true), 1).base), &["another shape"]);
    // The same shapes, but another function.
    let changes = [
        ("rope_theta", serde_json::json!(5000.0)),
        ("rms_norm_eps", serde_json::json!(1e-6)),
        ("sliding_window", serde_json::json!(16)),
    ];
    for (field, value) in changes {
        let mut config = mistral(1, None);
        config[field] = value;
        refused(e.load(&RandomModel::new(&config, 1).base), &["computes in another way", field]);
    }
    let mut config = mistral(1, None);
    (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) =
        (8.into(), 4.into(), 10.into());
    refused(e.load(&RandomModel::new(&config, 1).base), &["computes in another way", "num_attention_heads"]);
    e.load(&RandomModel::new(&mistral(1, None), 99).base).unwrap();
}

#[test]
fn adapters_that_are_not_the_plans() {
    let model = RandomModel::new(&mistral(1, None), 33);
    let mut e = engine(&model);
    let config = |r: usize, targets: &str| LoraConfig { r, target_modules: targets.into(), ..LoraConfig::default() };
    let adapter = |spec: &ModelSpec, config: &LoraConfig| -> Adapter { adapter(spec, config, 1) };
    let before = e.evaluate(batch(5)).unwrap();
    refused(e.load_adapter(&adapter(model.spec(), &config(8, "all-linear"))), &["other shapes", "r = 4", "r = 8"]);
    refused(e.load_adapter(&adapter(model.spec(), &config(4, "q_proj"))), &["lacks a module", "down_proj"]);
    let two = RandomModel::new(&mistral(2, None), 1);
    refused(e.load_adapter(&adapter(two.spec(), &config(4, "all-linear"))), &["does not adapt", "model.layers.1"]);
    let other = LoraConfig { lora_alpha: 4.0, ..config(4, "all-linear") };
    refused(e.load_adapter(&adapter(model.spec(), &other)), &["scaled in another way", "4", "1"]);
    // Half an adapter is never taken: the last module lacks.
    let mut partial = adapter(model.spec(), &config(4, "all-linear"));
    partial.tensors.pop_last();
    refused(e.load_adapter(&partial), &["lacks a module", "v_proj"]);
    assert_eq!(e.evaluate(batch(5)).unwrap(), before);
    e.load_adapter(&adapter(model.spec(), &config(4, "all-linear"))).unwrap();
    assert_ne!(e.evaluate(batch(5)).unwrap(), before);
    let plan = MemoryPlan::inference(model.spec()).cpu().seq(20).build().unwrap();
    refused(Engine::new(&plan).unwrap().init_adapter(1), &["no adapter"]);
    let mut inference = Engine::new(&plan).unwrap();
    refused(inference.micro_step(batch(5), 4, 0, 0), &["nothing is trained", "inference"]);
    e.enable_adapter(false);
    refused(e.micro_step(batch(5), 4, 0, 0), &["switched off", "enable_adapter(true)"]);
}

#[test]
fn plans_for_other_devices() {
    let spec = RandomModel::new(&mistral(1, None), 34).spec().clone();
    let plan = MemoryPlan::qlora(&spec).seq(20).build().unwrap();
    match cuda::check() {
        Ok(()) => drop(Engine::new(&plan).unwrap()),
        // Which file lacks, and the way without a GPU.
        Err(e) => refused(Engine::new(&plan), &[e.what(), "at:", ".cpu()"]),
    }
    refused(MemoryPlan::qlora(&spec).cpu().compute_dtype(DType::BF16).build(), &["compute_dtype", "f32 on the CPU"]);
    let mut wide = mistral(1, None);
    wide["head_dim"] = 258.into();
    let spec = ModelSpec::from_json("wide", &wide.to_string()).unwrap();
    refused(Engine::new(&MemoryPlan::lora(&spec).cpu().seq(20).build().unwrap()), &["head_dim", "256", "258"]);
    for context in [0, 513, usize::MAX] {
        refused(MemoryPlan::lora(&spec).cpu().seq(20).context(context).build(), &["context", "512"]);
    }
    // More than any machine has.
    let spec = ModelSpec::preset("mistral-7b-v0.1").unwrap();
    let plan = MemoryPlan::full(&spec).cpu().batch(8000).seq(32768).checkpointing(tunebook::plan::Checkpointing::None);
    refused(Engine::new(&plan.build().unwrap()), &["arena", "bytes", "smaller"]);
}

#[test]
fn an_engine_that_failed_says_so_and_keeps_its_parameters() {
    let model = RandomModel::new(&mistral(1, None), 35);
    let mut e = engine(&model);
    let first = &e.parameters()[0];
    let good = e.state_bytes(first).unwrap().to_vec();
    // A gradient that is not finite is noticed before the update.
    let name = first.name.clone();
    let bad: Vec<u8> = std::iter::repeat_n(f32::INFINITY.to_le_bytes(), good.len() / 4).flatten().collect();
    e.set_state_bytes(&e.parameters()[1].clone(), &vec![0xff; e.state_bytes(&e.parameters()[1]).unwrap().len()])
        .unwrap();
    e.micro_step(batch(5), 4, 0, 0).unwrap();
    assert!(e.gradient(&name).unwrap().iter().any(|g| !g.is_finite()));
    refused(e.optimizer_step(AdamWHyper::default(), 1.0), &["gradient norm is not finite"]);
    assert!(e.has_failed());
    assert_eq!(e.state_bytes(&e.parameters()[0]).unwrap(), good);
    let words = ["stopped in the middle", "optimizer", "checkpoint"];
    refused(e.optimizer_step(AdamWHyper::default(), 1.0), &words);
    refused(e.micro_step(batch(5), 4, 0, 0), &words);
    refused(e.evaluate(batch(5)), &words);
    e.reset();
    refused(e.forward(&[1]), &words);
    refused(e.set_state_bytes(&e.parameters()[0].clone(), &bad[4..]), &["another size", &good.len().to_string()]);
    refused(e.gradient("model.norm.weight"), &["no tensor of this name", "model.norm.weight"]);
}

#[test]
fn the_cache_overflows_or_was_overwritten() {
    let model = RandomModel::new(&mistral(1, None), 36);
    let mut e = engine(&model);
    e.reset();
    assert_eq!((e.capacity(), e.vocab_size(), e.position()), (50, 101, 0));
    let first = e.forward(&[1, 2, 3]).unwrap();
    refused(e.forward(&[]), &["no token"]);
    refused(e.forward(&[1; 48]), &["longer than the key-value cache", "50", "51", ".context(n)"]);
    refused(e.forward(&[1, 101]), &["outside the vocabulary", "101"]);
    assert_eq!(e.position(), 3, "a refused text leaves the cache as it was");
    e.forward(&[1; 47]).unwrap();
    refused(e.forward(&[1]), &["longer than the key-value cache"]);
    type Use = fn(&mut Engine);
    let uses: [Use; 4] = [
        |e| _ = e.evaluate(batch(5)).unwrap(),
        |e| _ = e.logits(batch(5)).unwrap(),
        |e| _ = e.micro_step(batch(5), 4, 0, 0).unwrap(),
        |e| e.enable_adapter(true),
    ];
    for overwrite in uses {
        e.reset();
        e.forward(&[1, 2]).unwrap();
        overwrite(&mut e);
        refused(e.forward(&[3]), &["overwritten", "reset()"]);
        e.reset();
        assert_eq!(e.forward(&[1, 2, 3]).unwrap(), first);
    }
}
