//! `adapter_config.json`: read, matched against a model, written.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tunebook::lora::{self, AdapterConfig};
use tunebook::model::ModelSpec;

static SPEC: LazyLock<ModelSpec> = LazyLock::new(|| {
    let text = include_str!("../../tests/golden/tiny/tiny-mistral/base/config.json");
    ModelSpec::from_json("tiny", text).expect("a good config")
});

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(config) = AdapterConfig::from_json(text) else { return };
    let _ = lora::discover(&SPEC, config.lora.target_modules.clone());
    let _ = config.scaling_of("model.layers.0.self_attn.q_proj");
    // What is written can be read.
    AdapterConfig::from_json(&config.to_json()).expect("its own text");
});
