//! LoRA: discovery by PEFT's rules, adapter files both ways, merging.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::DType;
use serde_json::{Value, json};
use tunebook::lora::{Adapter, AdapterConfig, LoraConfig, TargetStatus, Targets, discover};
use tunebook::model::{Checkpoint, ModelSpec, SafetensorsWriter, TensorHeader, pt_metadata};

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
        for (kind, targets) in [
            ("qv", Targets::from("q_proj,v_proj")),
            ("seven", Targets::seven()),
            ("all_linear", Targets::AllLinear),
        ] {
            let d = discover(&spec, targets).unwrap();
            for r in [8, 64] {
                let want = &want["peft"][format!("r{r}.{kind}")];
                assert_eq!(d.params(r), want["trainable"].as_u64().unwrap(), "{id} {kind} {r}");
                assert_eq!(d.params(r) + d.base_params, want["all"].as_u64().unwrap());
                assert_eq!(d.matched.len() as u64, want["modules"].as_u64().unwrap());
                let leaves: BTreeSet<&str> = d.matched.iter().map(|m| m.name.rsplit('.').next().unwrap()).collect();
                assert_eq!(json!(leaves), want["module_leaf"]);
                assert_eq!(d.groups().iter().map(|g| g.params(r)).sum::<u64>(), d.params(r));
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 14 * 6);
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
const READABLE: [(&str, &str); 11] = [
    ("tiny-mistral", "qv_r8"),
    ("tiny-mistral", "all_linear_r8"),
    ("tiny-mistral", "rslora"),
    ("tiny-mistral", "rank_alpha_pattern"),
    ("tiny-mistral", "regex"),
    ("tiny-mistral", "exclude_modules"),
    ("tiny-mistral", "layers_to_transform"),
    ("tiny-mistral", "bias_all"),
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
        ("tiny-mistral", "dora", "use_dora"),
        ("tiny-mistral", "modules_to_save", "modules_to_save"),
        ("tiny-mistral", "target_parameters_lora_bias", "lora_bias"),
        ("tiny-mistral", "lm_head_embed_target", "embedding table"),
        ("tiny-llama", "dora", "use_dora"),
    ] {
        let e = Adapter::load(golden(&format!("tiny/{model}/peft/{variant}"))).expect_err(variant).to_string();
        assert!(e.contains(word) && e.contains("merge it with PEFT"), "{variant}: {e}");
    }
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("init_lora_weights", json!("pissa_niter_4")),
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
    let named = format!("{q}.lora_A.other.weight");
    type Case<'a> = (&'a [(&'a str, [usize; 2])], &'a str);
    let cases: [Case; 7] = [
        (&[(&a, [4, 64])], "half of a LoRA pair"),
        (&[(&a, [4, 64]), (&b, [64, 3])], "rank of a LoRA pair"),
        (&[(&a, [8, 64]), (&b, [64, 8])], "rank of a LoRA pair"),
        (&[(&a, [4, 64]), (&b, [64, 4]), (&da, [4, 64])], "a matrix twice"),
        (&[(&named, [4, 64])], "a name other than default"),
        (&[("lm_head.weight", [4, 64])], "modules_to_save"),
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
