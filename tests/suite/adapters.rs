//! Adapters beyond plain LoRA: PEFT's variants on the families, DoRA, patterns, layers, biases, embedding tables, several
//! adapters on one base.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use tunebook::engine::Engine;
use tunebook::engine::optimizer::AdamWHyper;
use tunebook::lora::{self, Adapter, AdapterConfig, LoraConfig, LoraPair, MergeBase, Targets};
use tunebook::model::{Base, Checkpoint, ModelSpec};
use tunebook::nf4::Nf4Config;
use tunebook::plan::{Checkpointing, DeviceKind, MemoryPlan, PlanBuilder};

use crate::autograd::{self, lora_config};
use crate::families::{Golden, compare_gradients, step};
use crate::oracle::{RandomModel, Reference, adapter, dataset, mistral, qwen2};
use crate::support::golden;

/// Adapter, its base, whether PEFT's training can be done here.
const FAMILIES: [(&str, &str); 4] =
    [("phi3", "phi3"), ("qwen2-dora", "qwen2"), ("gemma2-dora-rslora", "gemma2"), ("phi3-dora", "phi3")];

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0f32, |m, (x, y)| if (x - y).abs() <= m { m } else { (x - y).abs() })
}

fn engine(plan: PlanBuilder, base: &Base) -> Engine {
    let mut engine = Engine::new(&plan.cpu().batch(1).seq(24).ce_chunk(7).build().unwrap()).unwrap();
    engine.fill_dead_regions(true);
    engine.load(base).unwrap();
    engine
}

#[test]
fn logits_and_gradients_of_peft_on_the_families() {
    for (name, model) in FAMILIES {
        let dir = golden(&format!("families/peft/{name}"));
        let base = Base::from_dir(golden(&format!("families/{model}"))).unwrap();
        let (adapter, want) = (Adapter::load(&dir).unwrap(), Golden::open(&dir));
        adapter.check(base.spec()).unwrap();
        assert_eq!(adapter.config.lora.use_dora, name.contains("dora"));
        // Magnitudes are a dictionary in PEFT's module, whose entries are called weight.
        let theirs: BTreeMap<String, Vec<f32>> = want
            .gradients()
            .into_iter()
            .map(|(n, g)| (n.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"), g))
            .collect();
        let mut first: Option<BTreeMap<String, Vec<f32>>> = None;
        for c in [Checkpointing::None, Checkpointing::All] {
            let plan = MemoryPlan::lora(base.spec()).adapter(adapter.config.lora.clone()).checkpointing(c);
            let mut engine = engine(plan, &base);
            assert_eq!(engine.plan().trainable_params(), adapter.params());
            engine.load_adapter(&adapter).unwrap();
            for (i, batch) in want.batches().into_iter().enumerate() {
                let worst = apart(&engine.logits(batch).unwrap(), &want.values(&format!("logits.{i}")));
                assert!(worst < 1e-4, "{name}, text {i}: {worst}");
            }
            let (loss, gradients) = step(&mut engine, &want);
            assert!((loss - want.values("loss")[0]).abs() < 1e-5, "{name}: {loss}");
            compare_gradients(name, &gradients, &theirs);
            assert!(first.get_or_insert_with(|| gradients.clone()) == &gradients, "{name}: recomputed, other bits");
        }
    }
}

#[test]
fn files_of_peft_come_back_byte_for_byte() {
    for name in ["phi3", "qwen2-dora", "gemma2-dora-rslora", "phi3-dora"] {
        let dir = golden(&format!("families/peft/{name}"));
        let (adapter, out) = (Adapter::load(&dir).unwrap(), tempfile::tempdir().unwrap());
        adapter.save(out.path()).unwrap();
        let read = |dir: &std::path::Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert!(read(out.path()) == read(&dir), "{name}");
        assert_eq!(Adapter::load(out.path()).unwrap(), adapter);
    }
}

/// bf16 has 8 bits: a rounded value is off by at most 2^-9 of itself, and its neighbours in f32 by a little more.
fn bf16_close(ours: &[f32], theirs: &[f32]) -> bool {
    ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() <= b.abs() / 250.0 + 1e-6)
}

#[test]
fn merges_on_the_families_are_those_of_peft() {
    for (name, model) in FAMILIES.into_iter().chain([("qwen2-bias", "qwen2")]) {
        let (dir, base) = (golden(&format!("families/peft/{name}")), golden(&format!("families/{model}")));
        let tmp = tempfile::tempdir().unwrap();
        let out = tmp.path().join("merged");
        lora::merge(&base, &dir).unwrap().onto(MergeBase::Original).save(&out).unwrap();
        let (ours, was) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&base).unwrap());
        let want = Checkpoint::open(dir.join("merged.safetensors")).unwrap();
        let mut changed = 0;
        for tensor in want.names() {
            assert!(bf16_close(&ours.read_f32(&tensor).unwrap(), &want.read_f32(&tensor).unwrap()), "{name}: {tensor}");
            changed += usize::from(ours.read_bytes(&tensor).unwrap() != was.read_bytes(&tensor).unwrap());
        }
        assert!(changed >= 2, "{name}: {changed}");
        Base::from_dir(&out).unwrap();
        // In four bits, too: what is dense there keeps its place.
        let out = tmp.path().join("4bit");
        lora::merge(&base, &dir).unwrap().onto(MergeBase::Quantized(Nf4Config::default())).save(&out).unwrap();
        let four = Base::from_dir(&out).unwrap();
        for bias in want.names().iter().filter(|n| n.ends_with(".bias")) {
            let (a, b) = (four.checkpoint().read_f32(bias).unwrap(), want.read_f32(bias).unwrap());
            assert!(bf16_close(&a, &b), "{name}: {bias}");
        }
    }
}

#[test]
fn trained_biases_are_read_merged_and_not_loaded() {
    let dir = golden("families/peft/qwen2-bias");
    let base = Base::from_dir(golden("families/qwen2")).unwrap();
    let adapter = Adapter::load(&dir).unwrap();
    assert_eq!(adapter.biases.len(), 6);
    let out = tempfile::tempdir().unwrap();
    adapter.save(out.path()).unwrap();
    assert_eq!(Adapter::load(out.path()).unwrap(), adapter);
    let mut engine = engine(MemoryPlan::lora(base.spec()).adapter(adapter.config.lora.clone()), &base);
    let e = engine.load_adapter(&adapter).unwrap_err().to_string();
    assert!(e.contains("bias") && e.contains("lora::merge"), "{e}");
    let e = lora::merge(golden("families/phi3"), &dir).unwrap_err().to_string();
    assert!(e.contains("another model"), "{e}");
}

#[test]
fn dora_merged_onto_what_it_was_trained_beside_gives_its_logits() {
    let model = RandomModel::new(&mistral(2, None), 41);
    let config = LoraConfig { use_dora: true, ..lora_config(4, "all-linear") };
    let quant = Nf4Config::default();
    let mut engine =
        engine(MemoryPlan::qlora(model.spec()).quantization(Some(quant)).adapter(config.clone()), &model.base);
    engine.init_adapter(3).unwrap();
    let batch = || tunebook::data::Batch::new(&dataset(model.spec(), &[20], 5), &[0]);
    let fresh = engine.logits(batch()).unwrap();
    engine.enable_adapter(false);
    let worst = apart(&fresh, &engine.logits(batch()).unwrap());
    assert!(worst < 2e-5, "a fresh DoRA adapter changes nothing: {worst}");
    engine.enable_adapter(true);
    // A few steps, so that magnitudes and matrices move.
    let before = engine.evaluate(batch()).unwrap().mean();
    for step in 1..=8 {
        engine.micro_step(batch(), batch().num_items(), 1, step).unwrap();
        let hyper = AdamWHyper { lr: 2e-2, step: step as u32, ..AdamWHyper::default() };
        engine.optimizer_step(hyper, 1.0).unwrap();
    }
    let after = engine.evaluate(batch()).unwrap().mean();
    assert!(after < before - 0.1, "{before} -> {after}");
    let tensors = engine.adapter_pairs().unwrap().into_iter().collect();
    let trained = Adapter { config: AdapterConfig::new(config, None), tensors, biases: BTreeMap::new() };
    assert!(trained.tensors.values().all(|p| p.magnitude.is_some()));
    let tmp = tempfile::tempdir().unwrap();
    trained.save(tmp.path().join("adapter")).unwrap();
    assert_eq!(Adapter::load(tmp.path().join("adapter")).unwrap().tensors, trained.tensors);
    let out = tmp.path().join("merged");
    let merge = lora::merge(model.dir.path(), tmp.path().join("adapter")).unwrap();
    let report = merge.onto(MergeBase::Dequantized(quant)).save(&out).unwrap();
    assert!((report.chosen().unwrap().kept - 1.0).abs() < 1e-3, "{report}");
    let merged = Base::from_dir(&out).unwrap();
    let mut plain = engine_of(&merged);
    let worst = apart(&plain.logits(batch()).unwrap(), &engine.logits(batch()).unwrap());
    assert!(worst < 1e-4, "{worst}");
}

fn engine_of(base: &Base) -> Engine {
    engine(MemoryPlan::inference(base.spec()), base)
}

#[test]
fn dora_refuses_dropout_and_nothing_else() {
    let spec = ModelSpec::preset("tinyllama-1.1b").unwrap();
    let dora = LoraConfig { use_dora: true, ..LoraConfig::default() };
    for device in [DeviceKind::Cpu, DeviceKind::Cuda] {
        let plan = |config: LoraConfig| MemoryPlan::qlora(&spec).adapter(config).device(device).build();
        let lora = plan(LoraConfig { use_dora: false, ..dora.clone() }).unwrap();
        assert!(plan(dora.clone()).unwrap().trainable_params() > lora.trainable_params());
        let e = plan(LoraConfig { lora_dropout: 0.1, ..dora.clone() }).unwrap_err().to_string();
        assert!(e.contains("use_dora") && e.contains("lora_dropout = 0.1"), "{e}");
    }
}

#[test]
fn patterns_give_each_module_a_rank_of_its_own_in_training() {
    let model = RandomModel::new(&qwen2(2), 42);
    let config = LoraConfig {
        rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 2), ("down_proj".into(), 5), (".*v_proj".into(), 1)],
        alpha_pattern: vec![("[kv]_proj".into(), 3.0)],
        ..lora_config(4, "all-linear")
    };
    let adapter = adapter(model.spec(), &config, 9);
    let of = |m: &str| (adapter.tensors[m].r, adapter.tensors[m].scaling);
    assert_eq!(of("model.layers.0.self_attn.q_proj"), (4, 1.5));
    assert_eq!(of("model.layers.1.self_attn.q_proj"), (2, 3.0));
    assert_eq!(of("model.layers.0.self_attn.v_proj"), (1, 3.0));
    assert_eq!(of("model.layers.1.mlp.down_proj"), (5, 6.0 / 5.0));
    let plan = MemoryPlan::lora(model.spec()).adapter(config.clone());
    let built = plan.clone().cpu().build().unwrap();
    assert_eq!(built.trainable_params(), adapter.params());
    assert_eq!(built.total_params(), adapter.params() + model.spec().total_params());
    let reference = Reference::of(&model.base, Some(&adapter));
    autograd::check("patterns", plan, &model.base, &reference, Some(&adapter));
    let dir = tempfile::tempdir().unwrap();
    adapter.save(dir.path()).unwrap();
    assert_eq!(Adapter::load(dir.path()).unwrap().tensors, adapter.tensors);
    for (field, bad) in [
        ("rank_pattern", LoraConfig { rank_pattern: vec![("(".into(), 2)], ..config.clone() }),
        ("rank_pattern", LoraConfig { rank_pattern: vec![("q_proj".into(), 0)], ..config.clone() }),
        ("alpha_pattern", LoraConfig { alpha_pattern: vec![("q_proj".into(), -1.0)], ..config.clone() }),
    ] {
        let e = MemoryPlan::lora(model.spec()).adapter(bad).cpu().build().unwrap_err().to_string();
        assert!(e.contains(field), "{e}");
    }
}

#[test]
fn layers_are_chosen_by_pefts_rule() {
    let spec = ModelSpec::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let results: Value =
        serde_json::from_str(&std::fs::read_to_string(golden("tiny/tiny-mistral/peft_results.json")).unwrap()).unwrap();
    let names = |config: &LoraConfig| -> BTreeSet<String> {
        config.discover(&spec).unwrap().matched.into_iter().map(|m| m.name).collect()
    };
    let want = results["results"]["layers_to_transform"]["targeted"].as_array().unwrap();
    let want: BTreeSet<String> = want.iter().map(|v| v.as_str().unwrap().into()).collect();
    let read = Adapter::load(golden("tiny/tiny-mistral/peft/layers_to_transform")).unwrap();
    assert_eq!(read.config.lora.layers_to_transform, Some(vec![1]));
    assert_eq!(names(&read.config.lora), want);
    let config = |targets: Targets, layers: Vec<usize>| LoraConfig {
        target_modules: targets,
        layers_to_transform: Some(layers),
        ..LoraConfig::default()
    };
    assert_eq!(names(&config(Targets::AllLinear, vec![0])).len(), 7);
    assert!(names(&config("q_proj".into(), vec![0, 1])).len() == 2);
    // An entry that is a whole path is adapted in spite of the layers.
    let exact = Targets::List(vec!["q_proj".into(), "model.layers.0.mlp.up_proj".into()]);
    let both = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"].map(String::from);
    assert_eq!(names(&config(exact, vec![1])), BTreeSet::from(both));
    let other = LoraConfig { layers_pattern: vec!["h".into()], ..config("q_proj".into(), vec![1]) };
    assert!(other.discover(&spec).unwrap_err().to_string().contains("no linear module"));
    for (bad, word) in [
        (config("q_proj".into(), vec![2]), "no such layer"),
        (config(Targets::Regex(".*q_proj".into()), vec![1]), "layers_to_transform"),
        (LoraConfig { layers_pattern: vec!["layers".into()], ..LoraConfig::default() }, "layers_pattern"),
    ] {
        let e = MemoryPlan::lora(&spec).adapter(bad).cpu().build().unwrap_err().to_string();
        assert!(e.contains(word), "{word}: {e}");
    }
    // Written in PEFT's form, read again.
    let dir = tempfile::tempdir().unwrap();
    let adapter = Adapter::init(&spec, &config("q_proj".into(), vec![1]), 1).unwrap();
    adapter.save(dir.path()).unwrap();
    let text = std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["layers_to_transform"], json!([1]));
    assert_eq!(Adapter::load(dir.path()).unwrap().config.lora.layers_to_transform, Some(vec![1]));
    let one = AdapterConfig::from_json(r#"{"peft_type":"LORA","layers_to_transform":3,"layers_pattern":"h"}"#).unwrap();
    assert_eq!((one.lora.layers_to_transform, one.lora.layers_pattern), (Some(vec![3]), vec!["h".to_string()]));
}

#[test]
fn adapters_on_lm_head_and_the_embedding_table() {
    let (base, dir) = (golden("tiny/tiny-mistral/base"), golden("tiny/tiny-mistral/peft/lm_head_embed_target"));
    let adapter = Adapter::load(&dir).unwrap();
    let spec = ModelSpec::from_dir(&base).unwrap();
    adapter.check(&spec).unwrap();
    let table = &adapter.tensors["model.embed_tokens"];
    assert_eq!((table.out_features, table.in_features, table.r), (320, 64, 8));
    let tmp = tempfile::tempdir().unwrap();
    adapter.save(tmp.path().join("again")).unwrap();
    assert_eq!(Adapter::load(tmp.path().join("again")).unwrap(), adapter);
    let want = Checkpoint::open(dir.join("merged_changed.safetensors")).unwrap();
    for (onto, name) in [(MergeBase::Original, "dense"), (MergeBase::Quantized(Nf4Config::default()), "4bit")] {
        let out = tmp.path().join(name);
        let report = lora::merge(&base, &dir).unwrap().onto(onto).save(&out).unwrap();
        assert_eq!(report.layers().iter().filter(|l| l.layer.is_none()).count(), 1);
        assert!(report.to_string().contains("embed_tokens, lm_head"), "{report}");
        let ours = Base::from_dir(&out).unwrap();
        let worst =
            apart(&ours.checkpoint().read_f32("lm_head.weight").unwrap(), &want.read_f32("lm_head.weight").unwrap());
        assert!(worst < 1e-6, "{name}: {worst}");
    }
    // PEFT starts an embedding's A from zero, and so does that file: with other numbers, token by token.
    let mut moved = adapter.clone();
    let table = moved.tensors.get_mut("model.embed_tokens").unwrap();
    table.b.iter_mut().enumerate().for_each(|(i, b)| *b = (i % 7) as f32 * 0.01 - 0.03);
    let change = product(table);
    moved.save(tmp.path().join("moved")).unwrap();
    assert_eq!(Adapter::load(tmp.path().join("moved")).unwrap(), moved);
    let file = Checkpoint::open(tmp.path().join("moved/adapter_model.safetensors")).unwrap();
    let embedding = |half: &str| format!("base_model.model.model.embed_tokens.lora_embedding_{half}");
    assert_eq!(file.info(&embedding("A")).unwrap().shape, [8, 320]);
    assert_eq!(file.info(&embedding("B")).unwrap().shape, [64, 8]);
    // Row k of A belongs to column k of b.
    let a = file.read_f32(&embedding("A")).unwrap();
    assert!((0..8 * 320).all(|n| a[n] == moved.tensors["model.embed_tokens"].b[n % 320 * 8 + n / 320]));
    let out = tmp.path().join("moved-merged");
    lora::merge(&base, tmp.path().join("moved")).unwrap().onto(MergeBase::Original).save(&out).unwrap();
    let read = |dir: &std::path::Path| Checkpoint::open(dir).unwrap().read_f32("model.embed_tokens.weight").unwrap();
    let want: Vec<f32> = read(&base).iter().zip(&change).map(|(w, d)| w + d).collect();
    assert!(apart(&read(&out), &want) < 1e-6);
    // Training them is refused by name, and so is a merge into a tied table.
    let e = MemoryPlan::lora(&spec).targets("q_proj,lm_head").cpu().build().unwrap_err().to_string();
    assert!(e.contains("lm_head") && e.contains("lora::merge"), "{e}");
    let tied = golden("tiny/tiny-llama/base");
    let adapter = golden("tiny/tiny-llama/peft/lm_head_embed_target");
    assert_eq!(Adapter::load(&adapter).unwrap().tensors.len(), 5);
    let e = lora::merge(&tied, &adapter).unwrap_err().to_string();
    assert!(e.contains("tied") && e.contains("tie_word_embeddings"), "{e}");
}

#[test]
fn several_adapters_take_turns_on_one_base() {
    let model = RandomModel::new(&mistral(2, None), 43);
    let configs = [
        lora_config(8, "q_proj,v_proj"),
        LoraConfig { use_rslora: true, ..lora_config(3, "all-linear") },
        lora_config(5, "layers.1.mlp.up_proj"),
    ];
    let adapters: Vec<Adapter> = configs.iter().zip(50..).map(|(c, seed)| adapter(model.spec(), c, seed)).collect();
    let batch = || tunebook::data::Batch::new(&dataset(model.spec(), &[20], 5), &[0]);
    let alone: Vec<Vec<f32>> = configs
        .iter()
        .zip(&adapters)
        .map(|(config, adapter)| {
            let mut engine = engine(MemoryPlan::inference(model.spec()).adapter(config.clone()), &model.base);
            engine.load_adapter(adapter).unwrap();
            engine.logits(batch()).unwrap()
        })
        .collect();
    let covering = LoraConfig::covering(&adapters.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(covering.r, 8);
    let mut together = engine(MemoryPlan::inference(model.spec()).adapter(covering), &model.base);
    let base = engine_of(&model.base).logits(batch()).unwrap();
    for i in [0, 1, 2, 0, 2, 1] {
        together.use_adapter(&adapters[i]).unwrap();
        let worst = apart(&together.logits(batch()).unwrap(), &alone[i]);
        assert!(worst < 2e-5, "adapter {i}: {worst}");
        assert!(apart(&alone[i], &base) > 1e-2, "adapter {i} must do something");
        together.enable_adapter(false);
        assert!(apart(&together.logits(batch()).unwrap(), &base) < 1e-6);
        together.enable_adapter(true);
    }
    let wide = adapter(model.spec(), &lora_config(9, "q_proj"), 1);
    let e = together.use_adapter(&wide).unwrap_err().to_string();
    assert!(e.contains("rank") && e.contains("covering"), "{e}");
    let mut training = engine(MemoryPlan::lora(model.spec()).adapter(configs[0].clone()), &model.base);
    let e = training.use_adapter(&adapters[0]).unwrap_err().to_string();
    assert!(e.contains("MemoryPlan::inference"), "{e}");
    assert!(LoraConfig::covering(&[]).is_err());
}

/// `scaling B A`, `[out, in]`.
fn product(p: &LoraPair) -> Vec<f32> {
    let (r, n) = (p.r, p.in_features);
    let one = |i: usize, j: usize| (0..r).map(|k| p.b[i * r + k] * p.a[k * n + j]).sum::<f32>() * p.scaling as f32;
    (0..p.out_features).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| one(i, j)).collect()
}

#[test]
fn pissa_takes_the_principal_directions_as_peft_does() {
    let base = golden("families/qwen2");
    let theirs = Adapter::load(golden("families/peft/qwen2-pissa")).unwrap();
    let config =
        LoraConfig { r: 3, lora_alpha: 5.0, target_modules: "q_proj,down_proj".into(), ..LoraConfig::default() };
    let found = lora::pissa(&base, &config).unwrap();
    assert_eq!(found.adapter.tensors.len(), 4);
    for (name, ours) in &found.adapter.tensors {
        let worst = apart(&product(ours), &product(&theirs.tensors[name]));
        assert!(worst < 1e-4, "{name}: {worst}");
    }
    let dir = tempfile::tempdir().unwrap();
    let (residual, adapter) = found.save(dir.path().join("out")).unwrap();
    let (residual, adapter) = (Base::from_dir(residual).unwrap(), Adapter::load(adapter).unwrap());
    assert_eq!(adapter.tensors, found.adapter.tensors);
    // Base and adapter together are the model that they come from, up to the rounding of the rest to bf16.
    let original = Base::from_dir(&base).unwrap();
    let want = Golden::open(&base);
    let mut engine = engine(MemoryPlan::lora(residual.spec()).adapter(config.clone()), &residual);
    engine.load_adapter(&adapter).unwrap();
    for (i, batch) in want.batches().into_iter().enumerate() {
        let worst = apart(&engine.logits(batch.clone()).unwrap(), &want.values(&format!("logits.{i}")));
        assert!(worst < 0.05, "text {i}: {worst}");
        engine.enable_adapter(false);
        assert!(apart(&engine.logits(batch).unwrap(), &want.values(&format!("logits.{i}"))) > 0.2);
        engine.enable_adapter(true);
    }
    let changed =
        |name: &str| residual.checkpoint().read_bytes(name).unwrap() != original.checkpoint().read_bytes(name).unwrap();
    assert!(changed("model.layers.0.self_attn.q_proj.weight") && !changed("model.layers.0.self_attn.k_proj.weight"));
    let e = lora::pissa(&base, &LoraConfig { r: 25, ..config.clone() }).unwrap_err().to_string();
    assert!(e.contains("rank") && e.contains("q_proj"), "{e}");
    let e = lora::pissa(&base, &LoraConfig { use_dora: true, ..config }).unwrap_err().to_string();
    assert!(e.contains("use_dora"), "{e}");
}

#[test]
fn loftq_starts_nearer_to_the_base_than_its_quantization() {
    let model = RandomModel::new(&mistral(2, None), 44);
    let config = lora_config(8, "all-linear");
    let quant = Nf4Config::default();
    let (one, five) = (1, 5);
    let [first, last] = [one, five].map(|n| lora::loftq(model.dir.path(), &config, quant, n).unwrap());
    let mean = |d: &lora::Decomposition| d.errors.values().sum::<f64>() / d.errors.len() as f64;
    let mut plain = Vec::new();
    for name in first.errors.keys() {
        let w = model.base.checkpoint().read_tensor(&format!("{name}.weight")).unwrap();
        let q = tunebook::nf4::quantize(&w, quant).unwrap().dequantize_f32().unwrap();
        let w = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        plain.push(norm(&mut w.iter().zip(&q).map(|(a, b)| a - b)) / norm(&mut w.iter().copied()));
    }
    let plain = plain.iter().sum::<f64>() / plain.len() as f64;
    println!("lost: NF4 {plain:.4}, LoftQ {:.4} after 1, {:.4} after 5", mean(&first), mean(&last));
    assert!(mean(&first) < 0.95 * plain && mean(&last) < mean(&first));
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = last.save(dir.path()).unwrap();
    let (base, adapter) = (Base::from_dir(base).unwrap(), Adapter::load(adapter).unwrap());
    assert!(base.quantization().is_some());
    let batch = || tunebook::data::Batch::new(&dataset(model.spec(), &[20], 5), &[0]);
    let want = engine_of(&model.base).logits(batch()).unwrap();
    let mut tuned = engine(MemoryPlan::qlora(base.spec()).quantization(Some(quant)).adapter(config.clone()), &base);
    tuned.load_adapter(&adapter).unwrap();
    let started = apart(&tuned.logits(batch()).unwrap(), &want);
    let mut quantized =
        engine(MemoryPlan::qlora(model.spec()).quantization(Some(quant)).adapter(config.clone()), &model.base);
    quantized.init_adapter(1).unwrap();
    let lost = apart(&quantized.logits(batch()).unwrap(), &want);
    assert!(started < lost, "{started} {lost}");
    let e = lora::loftq(golden("tiny/tiny-mistral/bnb_nf4"), &config, quant, 1).unwrap_err().to_string();
    assert!(e.contains("4-bit"), "{e}");
    assert!(lora::loftq(model.dir.path(), &config, quant, 0).is_err());
}
