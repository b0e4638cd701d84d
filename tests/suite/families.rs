//! Every family against transformers' own logits, losses and gradients (tests/golden/families), against candle's autograd,
//! and its cache against the whole text.

use std::collections::BTreeMap;

use candle_core::DType;
use serde_json::{Value, json};
use tunebook::data::{Batch, Dataset, Example, IGNORE_INDEX};
use tunebook::engine::Engine;
use tunebook::generate::Decoder;
use tunebook::lora::Targets;
use tunebook::model::{Base, Checkpoint, ModelSpec, RopeScaling};
use tunebook::nf4::Nf4Config;
use tunebook::plan::{Checkpointing, DeviceKind, MemoryPlan};

use crate::autograd::{self, dequantized, lora_config};
use crate::oracle::{RandomModel, Reference, adapter, gemma, gemma2, llama_bias, phi3, qwen2, qwen3};
use crate::support::golden;

const MODELS: [&str; 11] = [
    "llama-bias-linear",
    "llama-dynamic",
    "llama-llama3",
    "mistral-yarn",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
    "phi3",
    "phi3-longrope",
    "gemma",
    "gemma2",
];

/// What transformers computed: the texts, their logits, the loss over both, gradients.
pub struct Golden {
    io: Checkpoint,
    pub texts: Dataset,
}

impl Golden {
    pub fn open(dir: &std::path::Path) -> Self {
        let io = Checkpoint::open(dir.join("io.safetensors")).unwrap();
        let texts = (0..2).map(|i| {
            let ids = io.read_tensor(&format!("ids.{i}")).unwrap().to_dtype(DType::U32).unwrap();
            let input_ids = ids.to_vec1::<u32>().unwrap();
            let n = input_ids.len();
            let label = |(i, id): (usize, &u32)| if i < n / 3 { IGNORE_INDEX } else { *id as i32 };
            Example { labels: input_ids.iter().enumerate().map(label).collect(), input_ids }
        });
        let texts = Dataset::new(texts.collect()).unwrap();
        Golden { io, texts }
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        self.io.read_f32(name).unwrap()
    }

    pub fn gradients(&self) -> BTreeMap<String, Vec<f32>> {
        let names = self.io.names().into_iter();
        names.filter_map(|n| Some((n.strip_prefix("grad.")?.to_string(), self.values(&n)))).collect()
    }

    /// Both texts, each as a batch of its own.
    pub fn batches(&self) -> [Batch; 2] {
        [Batch::new(&self.texts, &[0]), Batch::new(&self.texts, &[1])]
    }
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0f32, |m, (x, y)| if (x - y).abs() <= m { m } else { (x - y).abs() })
}

/// The gradients of both texts, and the loss over them.
pub fn step(engine: &mut Engine, golden: &Golden) -> (f32, BTreeMap<String, Vec<f32>>) {
    let batches = golden.batches();
    let items = batches.iter().map(Batch::num_items).sum();
    let mut loss = 0.0;
    for (i, batch) in batches.into_iter().enumerate() {
        loss += engine.micro_step(batch, items, 1, i as u64).unwrap().sum;
    }
    let names = engine.parameters().into_iter().map(|p| p.name);
    let gradients = names.map(|n| (n.clone(), engine.gradient(&n).unwrap())).collect();
    ((loss / items as f64) as f32, gradients)
}

/// The largest difference relative to the largest element of each gradient.
pub fn compare_gradients(what: &str, ours: &BTreeMap<String, Vec<f32>>, theirs: &BTreeMap<String, Vec<f32>>) {
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{what}");
    let mut worst = (0f32, String::new());
    for (name, g) in ours {
        let scale = theirs[name].iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        let error = apart(g, &theirs[name]) / scale;
        if error > worst.0 || error.is_nan() {
            worst = (error, name.clone());
        }
    }
    println!("{what}: {} gradients, worst {:.1e} at {}", ours.len(), worst.0, worst.1);
    assert!(worst.0 < 2e-4, "{what}: {} differs by {}", worst.1, worst.0);
}

#[test]
fn logits_losses_and_gradients_are_those_of_transformers() {
    follow_all(DeviceKind::Cpu);
}

/// Every family in f32, on any device.
pub fn follow_all(device: DeviceKind) {
    for name in MODELS {
        let dir = golden(&format!("families/{name}"));
        let base = Base::from_dir(&dir).unwrap();
        let want = Golden::open(&dir);
        let mut first = None;
        for c in [Checkpointing::None, Checkpointing::All] {
            let plan =
                MemoryPlan::full(base.spec()).device(device).compute_dtype(DType::F32).batch(1).seq(24).ce_chunk(7);
            let plan = plan.checkpointing(c);
            let mut engine = Engine::new(&plan.build().unwrap()).unwrap();
            engine.fill_dead_regions(true);
            engine.load(&base).unwrap();
            for (i, batch) in want.batches().into_iter().enumerate() {
                let worst = apart(&engine.logits(batch).unwrap(), &want.values(&format!("logits.{i}")));
                println!("{name}, text {i}: logits differ from transformers' by at most {worst:.1e}");
                assert!(worst < 1e-4, "{name}, text {i}: {worst}");
            }
            let (loss, gradients) = step(&mut engine, &want);
            assert!((loss - want.values("loss")[0]).abs() < 1e-5, "{name}: {loss}");
            compare_gradients(name, &gradients, &want.gradients());
            match &first {
                None => first = Some(gradients),
                Some(stored) => assert!(*stored == gradients, "{name}: recomputed layers give other bits"),
            }
        }
    }
}

#[test]
fn the_cache_gives_the_logits_of_the_whole_text() {
    for name in MODELS {
        let base = Base::from_dir(golden(&format!("families/{name}"))).unwrap();
        let want = Golden::open(&golden(&format!("families/{name}")));
        let plan = MemoryPlan::inference(base.spec()).cpu().batch(1).seq(24).context(64).build().unwrap();
        let mut engine = Engine::new(&plan).unwrap();
        engine.fill_dead_regions(true);
        engine.load(&base).unwrap();
        let v = base.spec().vocab_size;
        // LongRoPE's cache holds for texts on one side of its length: the longer text is fed at once.
        let pieces: &[&[usize]] = if name == "phi3-longrope" { &[&[100]] } else { &[&[1], &[5, 1], &[9]] };
        for (text, pieces) in (0..2).flat_map(|t| pieces.iter().map(move |p| (t, *p))) {
            let (ids, all) = (&want.texts.get(text).input_ids, want.values(&format!("logits.{text}")));
            engine.reset();
            let mut at = 0;
            for &n in pieces.iter().cycle() {
                let n = n.min(ids.len() - at);
                let logits = engine.forward(&ids[at..at + n]).unwrap();
                at += n;
                let worst = apart(&logits, &all[(at - 1) * v..at * v]);
                assert!(worst < 1e-4, "{name}, text {text}, {at} tokens: {worst}");
                if at == ids.len() {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_text_that_outgrows_its_frequencies_is_refused() {
    let base = Base::from_dir(golden("families/phi3-longrope")).unwrap();
    let plan = MemoryPlan::inference(base.spec()).cpu().batch(1).seq(24).context(64).build().unwrap();
    let mut engine = Engine::new(&plan).unwrap();
    engine.load(&base).unwrap();
    engine.reset();
    engine.forward(&[1; 16]).unwrap();
    let e = engine.forward(&[1]).unwrap_err().to_string();
    assert!(e.contains("original_max_position_embeddings") && e.contains("reset()"), "{e}");
    assert_eq!(engine.position(), 16);
    engine.reset();
    engine.forward(&[1; 17]).unwrap();
    engine.forward(&[1]).unwrap();
}

/// Small models of each form, of any number of layers.
pub fn forms() -> Vec<(&'static str, Value)> {
    let mut yarn = qwen2(2);
    yarn["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    vec![
        ("Llama with biases", llama_bias(2)),
        ("Qwen2", qwen2(3)),
        ("Qwen2 with YaRN", yarn),
        ("Qwen3", qwen3(2)),
        ("Phi-3", phi3(2)),
        ("Gemma", gemma(2)),
        ("Gemma 2", gemma2(3)),
    ]
}

#[test]
fn full_gradients_are_those_of_candle() {
    for (what, config) in forms() {
        let model = RandomModel::new(&config, 31);
        let reference = Reference::of(&model.base, None);
        autograd::check(what, MemoryPlan::full(model.spec()), &model.base, &reference, None);
    }
}

#[test]
fn lora_gradients_are_those_of_candle() {
    for (what, config) in forms() {
        let model = RandomModel::new(&config, 32);
        let fused = model.spec().family.is_fused();
        let targets: [Targets; 4] = match fused {
            true => ["all-linear".into(), "qkv_proj".into(), "layers.1.mlp.gate_up_proj".into(), "o_proj".into()],
            false => ["all-linear".into(), "q_proj".into(), "layers.1.mlp.up_proj".into(), "v_proj,down_proj".into()],
        };
        for (i, targets) in targets.into_iter().enumerate() {
            let config = lora_config([3, 8][i % 2], targets.clone());
            let adapter = adapter(model.spec(), &config, 9);
            let reference = Reference::of(&model.base, Some(&adapter));
            let plan = MemoryPlan::lora(model.spec()).adapter(config);
            autograd::check(&format!("{what}: LoRA on {targets}"), plan, &model.base, &reference, Some(&adapter));
        }
        let quant = Nf4Config::default();
        let lora = lora_config(4, "all-linear");
        let adapter = adapter(model.spec(), &lora, 9);
        let reference = Reference::new(model.spec(), DType::F64, dequantized(&model.base, quant), Some(&adapter));
        let plan = MemoryPlan::qlora(model.spec()).quantization(Some(quant)).adapter(lora);
        // One head of keys for all queries (Gemma) adds up more rounding.
        autograd::check_to(3e-5, &format!("{what}: QLoRA"), plan, &model.base, &reference, Some(&adapter));
    }
}

#[test]
fn a_spec_writes_the_config_that_gives_it_back() {
    for name in ModelSpec::presets() {
        let spec = ModelSpec::preset(name).unwrap();
        let again = ModelSpec::from_json(name, &spec.to_config_json().to_string()).unwrap();
        assert_eq!(spec, again);
    }
    for name in MODELS {
        let spec = ModelSpec::from_dir(golden(&format!("families/{name}"))).unwrap();
        let mut again = ModelSpec::from_json(name, &spec.to_config_json().to_string()).unwrap();
        // Text may change the last bit of a factor.
        assert_eq!(spec.rope_attention_factor(), again.rope_attention_factor());
        assert_eq!((spec.inv_freq(), spec.long_inv_freq()), (again.inv_freq(), again.long_inv_freq()));
        again.rope_scaling = spec.rope_scaling.clone();
        assert_eq!(spec, again);
    }
}

#[test]
fn rope_scalings_are_read_in_every_form() {
    let of = |name: &str| ModelSpec::from_dir(golden(&format!("families/{name}"))).unwrap();
    assert_eq!(of("llama-bias-linear").rope_scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(of("llama-dynamic").rope_scaling, RopeScaling::Dynamic { factor: 2.0 });
    let long = of("phi3-longrope");
    assert_eq!((long.rope_switch(), long.rope_attention_factor()), (Some(16), (1.5f64).sqrt() as f32));
    let (short, far) = (long.inv_freq(), long.long_inv_freq().unwrap());
    assert!((short[2] / far[2] - 6.0 / 1.3).abs() < 1e-5);
    // Phi-3's first files say `su` or `yarn`; everyone else's yarn is YaRN.
    let mut config = long.to_config_json();
    for name in ["su", "yarn"] {
        config["rope_scaling"]["rope_type"] = json!(null);
        config["rope_scaling"]["type"] = json!(name);
        assert_eq!(ModelSpec::from_json("base", &config.to_string()).unwrap().rope_scaling, long.rope_scaling);
    }
    assert!(matches!(of("qwen2-yarn").rope_scaling, RopeScaling::Yarn { beta_fast: 32.0, truncate: true, .. }));
}

#[test]
fn a_mixture_of_experts_is_counted_and_not_run() {
    let spec = ModelSpec::preset("mixtral-8x7b-v0.1").unwrap();
    let e = MemoryPlan::qlora(&spec).build().unwrap_err().to_string();
    assert!(e.contains("mixtral") && e.contains("8 experts") && e.contains("Estimate"), "{e}");
}
