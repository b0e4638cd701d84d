//! `config.json` to the plan of a run: no shape may overflow on the way.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunebook::lora::{self, Targets};
use tunebook::model::ModelSpec;
use tunebook::plan::MemoryPlan;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(spec) = ModelSpec::from_json("fuzz", text) else { return };
    let _ = spec.total_params();
    // A list of tensors as long as the layers are many.
    if spec.num_hidden_layers <= 64 {
        let _ = spec.tensors();
        let _ = lora::discover(&spec, Targets::AllLinear);
        let _ = MemoryPlan::qlora(&spec).cpu().r(8).batch(1).seq(16).build();
    }
});
