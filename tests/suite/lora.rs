//! LoRA: discovery by PEFT's rules, adapter files both ways, merging.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module};
use serde_json::{Value, json};
use tunebook::lora::{
    self, Adapter, AdapterConfig, FrozenLinear, LoraConfig, LoraLinear, LoraPair, MergeBase, MergeCost, MergeReport,
    Nf4Linear, TargetStatus, Targets, discover,
};
use tunebook::model::{Base, Checkpoint, ModelSpec, SafetensorsWriter, TensorHeader, pt_metadata};
use tunebook::nf4::{Nf4Config, Nf4Tensor};

use crate::support::golden;

fn read_json(path: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(path)).unwrap()).unwrap()
}

fn tiny(model: &str) -> ModelSpec {
    ModelSpec::from_dir(golden(&format!("tiny/{model}/base"))).unwrap()
}

fn names(list: &[tunebook::model::LinearModule]) -> BTreeSet<String> {
    list.iter().map(|m| m.name.clone()).collect()
}

#[test]
fn trainable_counts_are_those_of_peft() {
    let counts = read_json("configs/param_counts.json");
    let mut checked = 0;
    for id in ModelSpec::presets() {
        let spec = ModelSpec::preset(id).unwrap();
        let models = counts["models"].as_object().unwrap();
        let (_, want) =
            models.iter().find(|(hub, _)| ModelSpec::preset(hub).is_ok_and(|s| s.name == spec.name)).unwrap();
        for (kind, targets) in
            [("qv", Targets::from("q_proj,v_proj")), ("seven", Targets::seven()), ("all_linear", Targets::AllLinear)]
        {
            if want["peft"][format!("r8.{kind}")]["error"].is_string() {
                assert!(discover(&spec, targets).is_err(), "{id} {kind}");
                checked += 2;
                continue;
            }
            let leaf = |name: &str| spec.linears().iter().any(|m| m.name.ends_with(&format!(".{name}")));
            let targets = match targets {
                // PEFT passes over names that a fused model or a mixture does not have.
                Targets::List(list) => Targets::List(list.into_iter().filter(|t| leaf(t)).collect()),
                targets => targets,
            };
            let d = discover(&spec, targets).unwrap();
            for r in [8, 64] {
                let want = &want["peft"][format!("r{r}.{kind}")];
                assert_eq!(d.params(r), want["trainable"].as_u64().unwrap(), "{id} {kind} {r}");
                assert_eq!(d.params(r) + d.base_params, want["all"].as_u64().unwrap());
                assert_eq!(d.matched.len() as u64, want["modules"].as_u64().unwrap());
                let leaves: BTreeSet<&str> = d.matched.iter().map(|m| m.name.rsplit('.').next().unwrap()).collect();
                assert_eq!(json!(leaves), want["module_leaf"]);
                let experts = r as u64 * d.expert_params;
                assert_eq!(d.groups().iter().map(|g| g.params(r)).sum::<u64>() + experts, d.params(r));
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 23 * 6);
    let d = discover(&ModelSpec::preset("mistral-7b-v0.1").unwrap(), "q_proj,v_proj").unwrap();
    assert_eq!(
        d.trainable_parameters(8),
        "trainable params: 3,407,872 || all params: 7,245,139,968 || trainable%: 0.0470"
    );
    assert_eq!(d.bytes(8, DType::F32), 3_407_872 * 4);
}

#[test]
fn the_targeted_modules_are_those_of_peft() {
    for model in ["tiny-mistral", "tiny-llama"] {
        let spec = tiny(model);
        let results = read_json(&format!("tiny/{model}/peft_results.json"));
        let cases: [(&str, Targets, Option<Targets>); 5] = [
            ("qv_r8", "q_proj,v_proj".into(), None),
            ("all_linear_r8", "all-linear".into(), None),
            ("rank_alpha_pattern", "q_proj,v_proj,gate_proj".into(), None),
            ("regex", r".*\.layers\.0\.(self_attn\.[qk]_proj|mlp\.up_proj)".into(), None),
            ("exclude_modules", Targets::AllLinear, Some("down_proj,model.layers.0.self_attn.k_proj".into())),
        ];
        for (variant, target_modules, exclude_modules) in cases {
            let config = LoraConfig { target_modules, exclude_modules, ..LoraConfig::default() };
            let d = config.discover(&spec).unwrap();
            let Some(want) = results["results"][variant]["targeted"].as_array() else { continue };
            let want: BTreeSet<String> = want.iter().map(|v| v.as_str().unwrap().into()).collect();
            assert_eq!(names(&d.matched), want, "{model} {variant}");
            let all = d.matched.len() + d.unmatched.len() + d.excluded.len();
            assert_eq!(all, spec.linears().len());
        }
    }
    let config = LoraConfig { exclude_modules: Some("down_proj".into()), ..LoraConfig::default() };
    let d = config.discover(&tiny("tiny-mistral")).unwrap();
    assert_eq!((d.matched.len(), d.unmatched.len(), d.excluded.len()), (12, 1, 2));
    let g = d.groups();
    assert_eq!(g.iter().find(|g| g.leaf == "down_proj").unwrap().status, TargetStatus::Excluded);
    assert_eq!(g.iter().find(|g| g.leaf == "lm_head").unwrap().status, TargetStatus::Unmatched);
}

#[test]
fn the_text_of_a_discovery_is_a_table() {
    let d = discover(&tiny("tiny-mistral"), "q_proj,v_proj").unwrap();
    let want = "\
base: q_proj, v_proj matches 4 of 15 linear modules
  module       count  [out, in]                   params per rank
  q_proj           2  [64, 64]        matched                 256
  k_proj           2  [32, 64]        unmatched                 0
  v_proj           2  [32, 64]        matched                 192
  o_proj           2  [64, 64]        unmatched                 0
  gate_proj        2  [160, 64]       unmatched                 0
  up_proj          2  [160, 64]       unmatched                 0
  down_proj        2  [64, 160]       unmatched                 0
  lm_head          1  [320, 64]       unmatched                 0
  together         4                                          448";
    assert_eq!(format!("{d:?}"), want);
}

#[test]
fn a_target_that_is_not_there_names_the_nearest() {
    let spec = tiny("tiny-mistral");
    let cases = [
        (Targets::from("q_porj"), "did you mean `q_proj`?"),
        (Targets::from("q_proj,donw_proj"), "did you mean `down_proj`?"),
        (Targets::from("model.layers.0.self_attn.q_porj"), "did you mean `model.layers.0.self_attn.q_proj`?"),
        (Targets::from("embed_tokens"), "embedding table"),
        (Targets::from("input_layernorm"), "norms are vectors"),
        (Targets::from("self_attn"), "holds some: k_proj, o_proj, q_proj, v_proj"),
        (Targets::from("xyz"), "all-linear"),
        (Targets::List(vec![]), "name at least one"),
        (Targets::Regex("q_proj".into()), "a single string is a regular expression"),
        (Targets::Regex("(".into()), "for example"),
    ];
    for (targets, want) in cases {
        let e = discover(&spec, targets.clone()).expect_err(want).to_string();
        assert!(e.contains(want) && e.contains("target_modules"), "{targets}: {e}");
    }
    let config = LoraConfig { exclude_modules: Some("q_porj".into()), ..LoraConfig::default() };
    let e = config.discover(&spec).unwrap_err().to_string();
    assert!(e.contains("exclude_modules") && e.contains("`q_proj`"), "{e}");
    let config = LoraConfig { target_modules: "q_proj".into(), exclude_modules: Some("q_proj".into()), ..config };
    assert!(config.discover(&spec).unwrap_err().to_string().contains("exclude fewer"));
    let e = discover(&tiny("tiny-llama"), "lm_head").unwrap_err().to_string();
    assert!(e.contains("tied"), "{e}");
    assert_eq!(discover(&spec, "lm_head").unwrap().matched.len(), 1);
}

#[test]
fn scaling_and_numbers_are_checked() {
    let c = LoraConfig { r: 8, lora_alpha: 16.0, ..LoraConfig::default() };
    assert_eq!(c.scaling(), 2.0);
    assert_eq!(LoraConfig { use_rslora: true, r: 16, ..c.clone() }.scaling(), 4.0);
    for bad in [
        LoraConfig { r: 0, ..c.clone() },
        LoraConfig { lora_alpha: f64::NAN, ..c.clone() },
        LoraConfig { lora_alpha: 0.0, ..c.clone() },
        LoraConfig { lora_dropout: 1.0, ..c.clone() },
        LoraConfig { lora_dropout: -0.1, ..c.clone() },
    ] {
        assert!(bad.validate().is_err(), "{bad:?}");
    }
    c.validate().unwrap();
    let text = r#"{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}"#;
    let c: LoraConfig = serde_json::from_str(text).unwrap();
    assert_eq!((c.r, c.target_modules.clone(), c.lora_dropout), (4, Targets::AllLinear, 0.0));
    assert_eq!(serde_json::from_str::<LoraConfig>(&serde_json::to_string(&c).unwrap()).unwrap(), c);
}

/// Every adapter that PEFT wrote and this library supports.
const READABLE: [(&str, &str); 14] = [
    ("tiny-mistral", "qv_r8"),
    ("tiny-mistral", "all_linear_r8"),
    ("tiny-mistral", "rslora"),
    ("tiny-mistral", "rank_alpha_pattern"),
    ("tiny-mistral", "regex"),
    ("tiny-mistral", "exclude_modules"),
    ("tiny-mistral", "layers_to_transform"),
    ("tiny-mistral", "bias_all"),
    ("tiny-mistral", "dora"),
    ("tiny-llama", "dora"),
    ("tiny-llama", "bias_all"),
    ("tiny-llama", "all_linear_r8"),
    ("tiny-llama", "rank_alpha_pattern"),
    ("tiny-llama", "rslora"),
];

#[test]
fn adapters_of_peft_come_back_byte_for_byte() {
    for (model, variant) in READABLE {
        let dir = golden(&format!("tiny/{model}/peft/{variant}"));
        let adapter = Adapter::load(&dir).unwrap();
        adapter.check(&tiny(model)).unwrap();
        let results = read_json(&format!("tiny/{model}/peft_results.json"));
        let want = &results["results"][variant];
        assert_eq!(adapter.params(), want["trainable_params"].as_u64().unwrap(), "{variant}");
        let targeted: BTreeSet<String> =
            want["targeted"].as_array().unwrap().iter().map(|v| v.as_str().unwrap().into()).collect();
        assert_eq!(adapter.tensors.keys().cloned().collect::<BTreeSet<_>>(), targeted);
        let out = tempfile::tempdir().unwrap();
        adapter.save(out.path().join("a")).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let (ours, theirs) = (std::fs::read(out.path().join("a").join(file)), std::fs::read(dir.join(file)));
            assert!(ours.unwrap() == theirs.unwrap(), "{model} {variant} {file}");
        }
        assert_eq!(Adapter::load(out.path().join("a")).unwrap(), adapter);
    }
}

#[test]
fn patterns_give_each_module_its_rank_and_scaling() {
    let a = Adapter::load(golden("tiny/tiny-mistral/peft/rank_alpha_pattern")).unwrap();
    let of = |m: &str| {
        let p = &a.tensors[&format!("model.layers.{m}")];
        (p.r, p.scaling)
    };
    assert_eq!(of("0.self_attn.q_proj"), (4, 4.0));
    assert_eq!(of("0.self_attn.v_proj"), (8, 2.0));
    assert_eq!(of("1.self_attn.v_proj"), (2, 8.0));
    assert_eq!(of("1.mlp.gate_proj"), (8, 4.0));
    let rs = Adapter::load(golden("tiny/tiny-mistral/peft/rslora")).unwrap();
    assert_eq!(rs.tensors["model.layers.0.self_attn.q_proj"].scaling, 16.0 / 8f64.sqrt());
}

#[test]
fn unsupported_variants_are_refused_with_the_reason() {
    for (model, variant, word) in [
        ("tiny-mistral", "modules_to_save", "modules_to_save"),
        ("tiny-mistral", "target_parameters_lora_bias", "lora_bias"),
    ] {
        let e = Adapter::load(golden(&format!("tiny/{model}/peft/{variant}"))).expect_err(variant).to_string();
        assert!(e.contains(word) && e.contains("merge it with PEFT"), "{variant}: {e}");
    }
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("pissa")),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
        ("trainable_token_indices", json!([1])),
        ("layer_replication", json!([[0, 2]])),
        ("fan_in_fan_out", json!(true)),
        ("r", json!(0)),
        ("r", json!("8")),
        ("lora_alpha", json!(null)),
        ("target_modules", json!(3)),
        ("rank_pattern", json!({"q_proj": "x"})),
    ] {
        let mut c = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]});
        c[key] = value.clone();
        let result = AdapterConfig::from_json(&c.to_string());
        if key == "lora_alpha" {
            assert_eq!(result.unwrap().lora.lora_alpha, 8.0, "PEFT's default");
            continue;
        }
        let e = result.expect_err(key).to_string();
        assert!(e.contains(key), "{key} {value}: {e}");
    }
    assert!(AdapterConfig::from_json("[]").is_err());
    let c = AdapterConfig::from_json(r#"{"peft_type":"LORA","r":4,"lora_alpha":1.5,"new_key":7}"#).unwrap();
    assert_eq!(c.unknown_keys(), ["new_key"]);
    let text = c.to_json();
    assert!(text.contains("\"new_key\": 7") && text.contains("\"lora_alpha\": 1.5"), "{text}");
    let keys = serde_json::from_str::<Value>(&text).unwrap().as_object().unwrap().len();
    assert_eq!(keys, 41 + 1);
}

/// Writes an adapter of one module with these keys and shapes.
fn write_adapter(dir: &Path, tensors: &[(&str, [usize; 2])]) {
    std::fs::write(dir.join("adapter_config.json"), r#"{"peft_type":"LORA","r":4,"lora_alpha":8}"#).unwrap();
    let headers: Vec<_> = tensors
        .iter()
        .map(|(k, s)| TensorHeader::new(format!("base_model.model.{k}"), DType::F32, s.to_vec()))
        .collect();
    let mut w =
        SafetensorsWriter::create(dir.join("adapter_model.safetensors"), headers.clone(), &pt_metadata()).unwrap();
    for h in &headers {
        w.write_f32(&h.name, &vec![0.5; h.shape.iter().product()]).unwrap();
    }
    w.finish().unwrap();
}

#[test]
fn damaged_adapters_and_those_of_other_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let q = "model.layers.0.self_attn.q_proj";
    let (a, b) = (format!("{q}.lora_A.weight"), format!("{q}.lora_B.weight"));
    let (da, db) = (format!("{q}.lora_A.default.weight"), format!("{q}.lora_B.default.weight"));
    let (named, m) = (format!("{q}.lora_A.other.weight"), format!("{q}.lora_magnitude_vector"));
    type Case<'a> = (&'a [(&'a str, [usize; 2])], &'a str);
    let cases: [Case; 8] = [
        (&[(&a, [4, 64])], "half of a LoRA pair"),
        (&[(&a, [4, 64]), (&b, [64, 3])], "rank of a LoRA pair"),
        (&[(&a, [8, 64]), (&b, [64, 8])], "rank of a LoRA pair"),
        (&[(&a, [4, 64]), (&b, [64, 4]), (&da, [4, 64])], "a matrix twice"),
        (&[(&named, [4, 64])], "a name other than default"),
        (&[("lm_head.weight", [4, 64])], "modules_to_save"),
        (&[(&a, [4, 64]), (&b, [64, 4]), (&m, [8, 8])], "magnitudes of DoRA"),
        (&[], "no LoRA matrices"),
    ];
    for (tensors, want) in cases {
        write_adapter(dir.path(), tensors);
        let e = Adapter::load(dir.path()).expect_err(want).to_string();
        assert!(e.contains(want) && e.contains("adapter_model.safetensors"), "{want}: {e}");
    }
    write_adapter(dir.path(), &[(&da, [4, 64]), (&db, [64, 4])]);
    let good = Adapter::load(dir.path()).unwrap();
    assert_eq!(good.tensors[q].b, vec![0.5; 256]);
    good.check(&tiny("tiny-mistral")).unwrap();
    let e = good.check(&tiny("tiny-llama")).unwrap_err().to_string();
    assert!(e.contains("another model") && e.contains("[96, 96]") && e.contains("[64, 64]"), "{e}");
    let other = Adapter::load(golden("tiny/tiny-llama/peft/all_linear_r8")).unwrap();
    assert!(other.check(&tiny("tiny-mistral")).unwrap_err().to_string().contains("another model"));
    std::fs::remove_file(dir.path().join("adapter_model.safetensors")).unwrap();
    std::fs::write(dir.path().join("adapter_model.bin"), "x").unwrap();
    assert!(Adapter::load(dir.path()).unwrap_err().to_string().contains("save_pretrained"));
    std::fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
    assert!(Adapter::load(dir.path()).unwrap_err().to_string().contains("adapter_config.json"));
}

#[test]
fn a_fresh_adapter_is_a_seeded_draw_and_changes_nothing_yet() {
    let spec = tiny("tiny-mistral");
    let config = LoraConfig { r: 8, ..LoraConfig::default() };
    let a = Adapter::init(&spec, &config, 7).unwrap();
    assert_eq!(a, Adapter::init(&spec, &config, 7).unwrap());
    assert_ne!(a, Adapter::init(&spec, &config, 8).unwrap());
    assert_eq!(a.tensors.len(), 14);
    for (m, p) in &a.tensors {
        assert!(p.b.iter().all(|&v| v == 0.0));
        let bound = 1.0 / (p.in_features as f32).sqrt();
        let most = p.a.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(most <= bound && most > 0.9 * bound, "{m}");
        let mean = p.a.iter().sum::<f32>() / p.a.len() as f32;
        assert!(mean.abs() < 0.1 * bound, "{m} {mean}");
    }
    let q = "model.layers.1.self_attn.q_proj";
    let fewer = LoraConfig { target_modules: "q_proj".into(), ..config };
    assert_eq!(Adapter::init(&spec, &fewer, 7).unwrap().tensors[q], a.tensors[q]);
    // What was trained here is written as PEFT writes it.
    let dir = tempfile::tempdir().unwrap();
    a.save(dir.path()).unwrap();
    let c = Checkpoint::open(dir.path().join("adapter_model.safetensors")).unwrap();
    assert_eq!(c.info(&format!("base_model.model.{q}.lora_A.weight")).unwrap().shape, [8, 64]);
    assert_eq!(c.metadata(), BTreeMap::from([("format".into(), "pt".into())]));
    let back = Adapter::load(dir.path()).unwrap();
    assert_eq!(back.tensors, a.tensors);
    assert_eq!(names(&back.config.lora.discover(&spec).unwrap().matched), a.tensors.keys().cloned().collect());
}

/// Largest absolute difference between a tensor here and there.
fn differ(a: &Checkpoint, b: &Checkpoint, name: &str) -> f32 {
    let (a, b) = (a.read_f32(name).unwrap(), b.read_f32(name).unwrap());
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn merges_onto_the_original_are_those_of_peft() {
    let mut checked = 0;
    for (model, variant) in READABLE {
        let (base, adapter) = (golden(&format!("tiny/{model}/base")), golden(&format!("tiny/{model}/peft/{variant}")));
        if !adapter.join("merged_changed.safetensors").exists() {
            continue;
        }
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("merged");
        let report = lora::merge(&base, &adapter).unwrap().onto(MergeBase::Original).save(&dir).unwrap();
        let want = Checkpoint::open(adapter.join("merged_changed.safetensors")).unwrap();
        let (ours, was) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&base).unwrap());
        assert_eq!(ours.names_in_file_order(), was.names_in_file_order());
        let mut changed = BTreeSet::new();
        for name in was.names() {
            if ours.read_bytes(&name).unwrap() != was.read_bytes(&name).unwrap() {
                // DoRA divides by a length, which PEFT sums in f32.
                let tolerance = if variant == "dora" { 1e-6 } else { 2e-7 };
                assert!(differ(&ours, &want, &name) <= tolerance, "{variant} {name} {}", differ(&ours, &want, &name));
                changed.insert(name);
                checked += 1;
            }
        }
        assert_eq!(changed, want.names().into_iter().collect());
        assert_eq!(report.modules.len(), changed.len());
        assert_eq!(report.bytes, was.bytes());
        let config = std::fs::read(dir.join("config.json")).unwrap();
        assert_eq!(config, std::fs::read(base.join("config.json")).unwrap());
        assert_eq!(Base::from_dir(&dir).unwrap().spec().tensors(), tiny(model).tensors());
    }
    assert_eq!(checked, 54);
}

#[test]
fn merges_onto_the_quantized_base_are_those_of_peft() {
    let root = golden("tiny/tiny-mistral");
    let (dense, quantized, adapter) = (root.join("base"), root.join("bnb_nf4_dq"), root.join("peft_on_nf4_dq"));
    let cfg = Nf4Config::default();
    let tmp = tempfile::tempdir().unwrap();
    let run = |base: &Path, onto, name: &str| {
        lora::merge(base, &adapter).unwrap().onto(onto).save(tmp.path().join(name)).unwrap();
        Checkpoint::open(tmp.path().join(name)).unwrap()
    };
    let want = Checkpoint::open(adapter.join("merged_into_f32.safetensors")).unwrap();
    let ours = run(&dense, MergeBase::Original, "f32");
    let want_dequant = Checkpoint::open(adapter.join("merged_into_dequant.safetensors")).unwrap();
    let dequant = run(&quantized, MergeBase::Dequantized(cfg), "dequant");
    // The same from the dense base: quantized here, where the CPU's nested codes may be one off.
    let here = run(&dense, MergeBase::Dequantized(cfg), "dequant-here");
    for name in want.names() {
        assert!(differ(&ours, &want, &name) <= 2e-7, "{name}");
        assert!(differ(&dequant, &want_dequant, &name) <= 2e-7, "{name} {}", differ(&dequant, &want_dequant, &name));
        assert!(differ(&here, &want_dequant, &name) <= 3e-3, "{name} {}", differ(&here, &want_dequant, &name));
    }
    for dir in ["dequant", "dequant-here"] {
        let base = Base::from_dir(tmp.path().join(dir)).unwrap();
        assert!(base.quantization().is_none() && base.checkpoint().names().len() == 21);
    }

    let four = run(&quantized, MergeBase::Quantized(cfg), "4bit");
    let want = Checkpoint::open(adapter.join("merged4bit/model.safetensors")).unwrap();
    assert_eq!(four.names(), want.names());
    let (mut codes, mut other) = (0usize, 0usize);
    for name in want.names() {
        let (a, b) = (four.read_bytes(&name).unwrap(), want.read_bytes(&name).unwrap());
        if name.ends_with("_proj.weight") {
            codes += a.len();
            other += a.iter().zip(&b).filter(|(a, b)| a != b).count();
        } else if name.ends_with(".absmax") && !name.contains("nested") {
            assert!(a.iter().zip(&b).all(|(a, b)| a.abs_diff(*b) <= 1), "{name}");
        } else if !name.contains("quant_state") && !name.contains("nested_absmax") {
            assert_eq!(a, b, "{name}");
        }
    }
    assert!(other * 1000 <= codes, "{other} of {codes} packed bytes differ");
    let text = |p: &Path| std::fs::read_to_string(p.join("config.json")).unwrap();
    assert_eq!(text(&tmp.path().join("4bit")), text(&adapter.join("merged4bit")), "a copy of the base's");
    assert_eq!(Base::from_dir(tmp.path().join("4bit")).unwrap().quantization().unwrap().bnb_4bit_quant_type, "nf4");
    // From the dense base, the same model.
    let here = run(&dense, MergeBase::Quantized(cfg), "4bit-here");
    assert_eq!(here.names(), want.names());
}

#[test]
fn what_cannot_be_merged_is_refused_and_leaves_nothing() {
    let root = golden("tiny/tiny-mistral");
    let (dense, quantized, adapter) = (root.join("base"), root.join("bnb_nf4_dq"), root.join("peft/qv_r8"));
    let cfg = Nf4Config::default();
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("out");
    let e = lora::merge(&quantized, &adapter).unwrap().onto(MergeBase::Original).save(&out).unwrap_err().to_string();
    assert!(e.contains("original weights are not there"), "{e}");
    let other = MergeBase::Dequantized(Nf4Config { blocksize: 128, ..cfg });
    let e = lora::merge(&quantized, &adapter).unwrap().onto(other).save(&out).unwrap_err().to_string();
    assert!(e.contains("quantized in another way"), "{e}");
    let bad = MergeBase::Dequantized(Nf4Config { blocksize: 100, ..cfg });
    assert!(lora::merge(&dense, &adapter).unwrap().onto(bad).save(&out).is_err());
    let e = lora::merge(golden("tiny/tiny-llama/base"), &adapter).unwrap_err().to_string();
    assert!(e.contains("another model") && e.contains("qv_r8"), "{e}");
    // An adapter that overflows.
    let mut a = Adapter::load(&adapter).unwrap();
    a.config.lora.lora_alpha = 1e38;
    a.tensors.values_mut().for_each(|p| p.b.iter_mut().for_each(|b| *b *= 1e10));
    a.save(tmp.path().join("huge")).unwrap();
    for onto in [MergeBase::Original, MergeBase::Dequantized(cfg), MergeBase::Quantized(cfg)] {
        for shard in [u64::MAX, 30_000] {
            let merge = lora::merge(&dense, tmp.path().join("huge")).unwrap().onto(onto).max_shard_bytes(shard);
            let e = merge.save(&out).unwrap_err().to_string();
            assert!(e.contains("finite") && e.contains("q_proj"), "{e}");
        }
    }
    assert!(lora::merge(&dense, &adapter).unwrap().onto(MergeBase::Original).save("/proc/x/y").is_err());
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let e = lora::merge(&dense, &adapter).unwrap().onto(MergeBase::Original).save(&out).unwrap_err().to_string();
    assert!(e.contains("not empty"), "{e}");
    let left: BTreeSet<String> =
        std::fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(left, BTreeSet::from(["huge".to_string(), "out".to_string()]));
    std::fs::remove_file(out.join("precious")).unwrap();
    lora::merge(&dense, &adapter).unwrap().onto(MergeBase::Original).save(&out).unwrap();
}

/// A random model in `dtype` with weights N(0, 0.02), and an adapter whose ΔW has this share of the norm of W.
pub fn synthetic(dir: &Path, dtype: DType, hidden: usize, r: usize, ratio: f32) {
    use rand::{Rng, SeedableRng};
    let config = json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": hidden * 3 / 2,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "torch_dtype": "bfloat16"});
    std::fs::create_dir_all(dir.join("base")).unwrap();
    std::fs::write(dir.join("base/config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("base/tokenizer.json"), "{}").unwrap();
    std::fs::write(dir.join("base/chat_template.jinja"), "x").unwrap();
    std::fs::write(dir.join("base/pytorch_model.bin"), "x").unwrap();
    let spec = ModelSpec::from_dir(dir.join("base")).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    // The sum of twelve uniforms: near enough to a normal.
    let mut normal = |n: usize, std: f32| -> Vec<f32> {
        (0..n).map(|_| ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0) * std).collect()
    };
    let headers: Vec<_> = spec.tensors().into_iter().map(|t| TensorHeader::new(t.name, dtype, t.shape)).collect();
    let path = dir.join("base/model.safetensors");
    let mut w = SafetensorsWriter::create(path, headers.clone(), &pt_metadata()).unwrap();
    for h in &headers {
        w.write_f32(&h.name, &normal(h.shape.iter().product(), 0.02)).unwrap();
    }
    w.finish().unwrap();
    let config = LoraConfig { r, lora_alpha: r as f64, ..LoraConfig::default() };
    let mut a = Adapter::init(&spec, &config, 1).unwrap();
    for p in a.tensors.values_mut() {
        p.a = normal(p.a.len(), 1.0);
        p.b = normal(p.b.len(), ratio * 0.02 / (r as f32).sqrt());
    }
    a.save(dir.join("adapter")).unwrap();
}

#[test]
fn the_costs_are_those_measured_with_peft() {
    // (dW/W, kept of the 4-bit merge, its error, error onto dequantized bf16, distance onto the original): measured on
    // 4096 x 4096 weights N(0, 0.02), r 64, NF4 nested. Smaller weights here, so a tolerance.
    let table = [(0.01f32, 0.02, 1.11, 0.165, 9.2), (0.1, 0.84, 0.79, 0.017, 0.92)];
    for (ratio, kept, error, rounding, distance) in table {
        let tmp = tempfile::tempdir().unwrap();
        synthetic(tmp.path(), DType::BF16, 512, 64, ratio);
        let merge = lora::merge(tmp.path().join("base"), tmp.path().join("adapter")).unwrap();
        let report = merge.onto(MergeBase::Original).report().unwrap();
        let t = report.total();
        let near = |what: &str, found: f64, want: f64, tolerance: f64| {
            assert!((found - want).abs() <= tolerance, "{what} at {ratio}: {found}, table {want}\n{report}");
        };
        near("dW/W", t.norm_delta / t.norm_w, f64::from(ratio), 0.03 * f64::from(ratio));
        let (o, d, q) = (t.original.unwrap(), t.dequantized.unwrap(), t.quantized.unwrap());
        near("kept", q.kept, kept, 0.03);
        near("error", q.error, error, 0.08);
        near("rounding", d.error, rounding, 0.06 * rounding);
        near("distance", o.distance, distance, 0.06 * distance);
        assert_eq!((d.error, q.error), (d.distance, q.distance));
        assert!((o.kept - 1.0).abs() < 0.01 && (d.kept - 1.0).abs() < 0.01);
        assert_eq!(report.layers().len(), 2);
        assert_eq!(report.modules.len(), 14);
        println!("{report}");
    }
}

#[test]
fn merged_weights_are_rounded_once_and_do_not_depend_on_threads() {
    let tmp = tempfile::tempdir().unwrap();
    let tmp = tmp.path();
    for (dtype, name) in [(DType::BF16, "bf16"), (DType::F16, "f16"), (DType::F32, "f32")] {
        let dir = tmp.join(name);
        synthetic(&dir, dtype, 128, 8, 0.05);
        let run = |threads: usize, onto: MergeBase, out: &str| -> MergeReport {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let m = lora::merge(dir.join("base"), dir.join("adapter")).unwrap();
                m.onto(onto).max_shard_bytes(100_000).save(dir.join(out)).unwrap()
            })
        };
        for (onto, out) in [
            (MergeBase::Original, "o"),
            (MergeBase::Dequantized(Nf4Config::default()), "d"),
            (MergeBase::Quantized(Nf4Config::default()), "q"),
        ] {
            let (mut a, b) = (run(1, onto, &format!("{out}1")), run(3, onto, &format!("{out}3")));
            (a.seconds, a.dir) = (b.seconds, b.dir.clone());
            assert_eq!(a, b);
            let (a, b) = (dir.join(format!("{out}1")), dir.join(format!("{out}3")));
            let (ca, cb) = (Checkpoint::open(&a).unwrap(), Checkpoint::open(&b).unwrap());
            assert!(ca.shards().len() > 1);
            for n in ca.names() {
                assert_eq!(ca.read_bytes(&n).unwrap(), cb.read_bytes(&n).unwrap(), "{n}");
            }
            assert!(a.join("tokenizer.json").exists() && a.join("chat_template.jinja").exists());
            assert!(!a.join("pytorch_model.bin").exists());
        }
        // By the definition, in f64.
        let (base, out) = (Checkpoint::open(dir.join("base")).unwrap(), Checkpoint::open(dir.join("o1")).unwrap());
        let adapter = Adapter::load(dir.join("adapter")).unwrap();
        let (mut off, mut all) = (0, 0);
        for (module, p) in &adapter.tensors {
            let key = format!("{module}.weight");
            let (w, got) = (base.read_f32(&key).unwrap(), out.read_f32(&key).unwrap());
            for i in 0..p.out_features {
                for j in 0..p.in_features {
                    let dot: f64 =
                        (0..p.r).map(|k| f64::from(p.b[i * p.r + k]) * f64::from(p.a[k * p.in_features + j])).sum();
                    let at = i * p.in_features + j;
                    let exact = (f64::from(w[at]) + p.scaling * dot) as f32;
                    let want = match dtype {
                        DType::BF16 => half::bf16::from_f32(exact).to_f32(),
                        DType::F16 => half::f16::from_f32(exact).to_f32(),
                        _ => exact,
                    };
                    all += 1;
                    off += usize::from(want != got[at] && dtype != DType::F32);
                    assert!((want - got[at]).abs() <= 0.01 * want.abs() + 1e-6, "{key} {i} {j}");
                }
            }
        }
        // f32 sums may fall on the other side of a tie now and then.
        assert!(off * 1000 < all, "{off} of {all}");
    }
}

#[test]
fn an_adapter_that_changes_nothing_leaves_every_byte() {
    let tmp = tempfile::tempdir().unwrap();
    let base = golden("tiny/tiny-mistral/base");
    let config = LoraConfig { target_modules: "q_proj,lm_head".into(), ..LoraConfig::default() };
    let mut a = Adapter::init(&tiny("tiny-mistral"), &config, 3).unwrap();
    a.save(tmp.path().join("zero")).unwrap();
    let dir = tmp.path().join("merged");
    let report = lora::merge(&base, tmp.path().join("zero")).unwrap().onto(MergeBase::Original).save(&dir).unwrap();
    let file = "model.safetensors";
    assert!(std::fs::read(dir.join(file)).unwrap() == std::fs::read(base.join(file)).unwrap());
    assert!(report.modules.iter().all(|m| m.original.is_none() && m.norm_delta == 0.0));
    assert!(report.chosen().is_none());
    // lm_head stays dense in a 4-bit merge, with its share of the adapter.
    a.tensors.get_mut("lm_head").unwrap().b.fill(0.01);
    a.save(tmp.path().join("head")).unwrap();
    let onto = MergeBase::Quantized(Nf4Config::default());
    let report = lora::merge(&base, tmp.path().join("head")).unwrap().onto(onto).save(tmp.path().join("q")).unwrap();
    let out = Checkpoint::open(tmp.path().join("q")).unwrap();
    assert_eq!(out.info("lm_head.weight").unwrap().dtype, DType::F32);
    assert!(differ(&out, &Checkpoint::open(&base).unwrap(), "lm_head.weight") > 0.001);
    let head = report.modules.iter().find(|m| m.module == "lm_head").unwrap();
    assert_eq!(head.original, head.quantized);
    let MergeCost { kept, .. } = head.original.unwrap();
    assert!((kept - 1.0).abs() < 1e-4);
    // An untouched weight is the quantized original.
    let name = "model.layers.0.mlp.up_proj";
    let q: Nf4Tensor = Base::from_dir(tmp.path().join("q")).unwrap().nf4(name).unwrap().unwrap();
    let w = Checkpoint::open(&base).unwrap().read_tensor(&format!("{name}.weight")).unwrap();
    assert_eq!(q, tunebook::nf4::quantize(&w, Nf4Config::default()).unwrap());
}

/// A random f32 tensor with a fixed seed per call site.
fn random(shape: &[usize], seed: u64) -> Tensor {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let n: usize = shape.iter().product();
    let v: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
}

fn close(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (i, (a, b)) in flat(a).into_iter().zip(flat(b)).enumerate() {
        assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{what}[{i}]: {a} {b}");
    }
}

#[test]
fn nf4_and_lora_linears_have_the_gradients_of_dense_ones() {
    let (r, i, o) = (4, 96, 40);
    let w = random(&[o, i], 1);
    let q = tunebook::nf4::quantize(&w, Nf4Config::default()).unwrap();
    let dense = q.dequantize().unwrap();
    let layer = Nf4Linear::new(q, None).unwrap();
    assert_eq!((layer.in_features(), layer.out_features()), (i, o));
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let pair = LoraPair {
        a: flat(&random(&[r, i], 2)),
        b: flat(&random(&[o, r], 3)),
        r,
        in_features: i,
        out_features: o,
        scaling: 0.5,
        magnitude: None,
    };
    for shape in [vec![7, i], vec![2, 3, i], vec![1, 2, 3, i]] {
        let x = Var::from_tensor(&random(&shape, 4)).unwrap();
        let weight = random(&[shape[..shape.len() - 1].to_vec(), vec![o]].concat(), 5);
        let loss = |y: &Tensor| (y.sqr().unwrap() * &weight).unwrap().sum_all().unwrap();
        // The 4-bit layer alone.
        let (ours, want) = (layer.forward(&x).unwrap(), Linear::new(dense.clone(), None).forward(&x).unwrap());
        close(&ours, &want, "y");
        let (g, h) = (loss(&ours).backward().unwrap(), loss(&want).backward().unwrap());
        close(g.get(&x).unwrap(), h.get(&x).unwrap(), "dx");
        // With a pair, on either base: y = x (W + s B A)^T.
        let (a, b) = (Var::from_tensor(&random(&[r, i], 2)).unwrap(), Var::from_tensor(&random(&[o, r], 3)).unwrap());
        let merged = (&dense + (b.matmul(&a).unwrap() * 0.5).unwrap()).unwrap();
        let want = Linear::new(merged, None).forward(&x).unwrap();
        let h = loss(&want).backward().unwrap();
        for base in [FrozenLinear::Nf4(layer.clone()), FrozenLinear::Dense(Linear::new(dense.clone(), None))] {
            let l = LoraLinear::new(base, pair.clone()).unwrap();
            let y = l.forward(&x).unwrap();
            close(&y, &want, "lora y");
            let g = loss(&y).backward().unwrap();
            close(g.get(&x).unwrap(), h.get(&x).unwrap(), "lora dx");
            close(g.get(&l.vars()[0]).unwrap(), h.get(&a).unwrap(), "dA");
            close(g.get(&l.vars()[1]).unwrap(), h.get(&b).unwrap(), "dB");
            assert_eq!(l.pair().unwrap(), pair);
            // Dropout with probability 0 is no dropout; with 0.5 it changes the pair's part only.
            close(&l.forward_train(&x, 0.0).unwrap(), &want, "no dropout");
            let dropped = l.forward_train(&x, 0.5).unwrap();
            assert_ne!(flat(&dropped), flat(&want));
        }
    }
    // Another dtype goes in and comes out.
    let x = random(&[3, i], 6).to_dtype(DType::BF16).unwrap();
    assert_eq!(layer.forward(&x).unwrap().dtype(), DType::BF16);
    assert!(layer.forward(&random(&[3, i + 1], 6)).is_err());
    let bias = random(&[o], 7);
    let q = layer.weight().clone();
    let with = Nf4Linear::new(q.clone(), Some(bias.clone())).unwrap();
    let x = random(&[3, i], 6);
    close(&with.forward(&x).unwrap(), &layer.forward(&x).unwrap().broadcast_add(&bias).unwrap(), "bias");
    assert!(Nf4Linear::new(q.clone(), Some(random(&[o + 1], 7))).is_err());
    assert!(Nf4Linear::new(Nf4Tensor { shape: vec![o * i], ..q }, None).is_err());
    let wrong = LoraPair { out_features: o + 1, ..pair };
    assert!(LoraLinear::new(FrozenLinear::Nf4(layer), wrong).is_err());
}

/// Anonymous memory of this process in bytes.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Two layers of Mistral-7B's shape, 1.4 GB: run by name, alone, with `--ignored --nocapture`.
#[test]
#[ignore = "writes 4 GB"]
fn two_layers_of_mistral_merge_in_little_memory() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    let tmp = tempfile::tempdir_in(std::env::var_os("TUNEBOOK_BIG").unwrap_or("/tmp".into())).unwrap();
    let tmp = tmp.path();
    let spec = ModelSpec { num_hidden_layers: 2, ..ModelSpec::preset("mistral-7b-v0.1").unwrap() };
    std::fs::create_dir(tmp.join("base")).unwrap();
    let config = std::fs::read_to_string(golden("configs/mistralai__Mistral-7B-v0.1.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["num_hidden_layers"] = json!(2);
    std::fs::write(tmp.join("base/config.json"), config.to_string()).unwrap();
    let headers: Vec<_> = spec.tensors().into_iter().map(|t| TensorHeader::new(t.name, DType::BF16, t.shape)).collect();
    let mut w = SafetensorsWriter::create(tmp.join("base/model.safetensors"), headers.clone(), &pt_metadata()).unwrap();
    let noise: Vec<f32> = (0..4096 * 64).map(|i| ((i as f32) * 12.9898).sin() * 0.03).collect();
    for h in &headers {
        let n: usize = h.shape.iter().product();
        for start in (0..n).step_by(noise.len()) {
            w.write_f32(&h.name, &noise[..noise.len().min(n - start)]).unwrap();
        }
    }
    w.finish().unwrap();
    let config = LoraConfig { r: 64, lora_alpha: 16.0, ..LoraConfig::default() };
    let mut a = Adapter::init(&spec, &config, 1).unwrap();
    a.tensors.values_mut().for_each(|p| p.b.iter_mut().zip(&noise).for_each(|(b, x)| *b = x * 0.1));
    a.save(tmp.join("adapter")).unwrap();
    drop((a, noise));
    let cfg = Nf4Config::default();
    for (onto, name) in
        [(MergeBase::Original, "o"), (MergeBase::Dequantized(cfg), "d"), (MergeBase::Quantized(cfg), "q")]
    {
        for costs in [true, false] {
            let (done, peak) = (AtomicBool::new(false), AtomicU64::new(0));
            let report = std::thread::scope(|s| {
                s.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        peak.fetch_max(anonymous(), Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                });
                let m = lora::merge(tmp.join("base"), tmp.join("adapter")).unwrap().onto(onto);
                let m = if costs { m } else { m.without_costs() };
                let report = m.save(tmp.join(format!("{name}{costs}"))).unwrap();
                done.store(true, Ordering::Relaxed);
                report
            });
            let peak = peak.into_inner();
            println!(
                "{onto}, costs {costs}: {:.2} s, {} bytes, anonymous peak {:.0} MB",
                report.seconds,
                report.bytes,
                peak as f64 / 1e6
            );
            assert!(peak < 500_000_000, "{peak}");
            if !costs {
                std::fs::remove_dir_all(tmp.join(format!("{name}false"))).unwrap();
            } else {
                println!("{report}");
            }
        }
    }
}
