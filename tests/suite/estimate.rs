//! The estimate of transformers + PEFT + bitsandbytes against measured peaks and against counted bytes.

use tunebook::model::ModelSpec;
use tunebook::plan::{Attention, Estimate, EstimateConfig, EstimateLoss, EstimateMethod, Gpu, MemoryPlan, Part};
use tunebook::train::Optim;

fn mistral_7b() -> ModelSpec {
    ModelSpec::preset("mistral-7b-v0.1").unwrap()
}

fn bytes(e: &Estimate, name: &str) -> u64 {
    e.component(name).unwrap_or_else(|| panic!("no component {name}")).bytes
}

/// `torch.cuda.max_memory_allocated` of transformers + PEFT + bitsandbytes on Mistral-7B: NF4 nested, r 64 on the seven
/// projections, paged 8-bit AdamW.
#[test]
fn measured_peaks_within_five_percent() {
    let cases = [(512, true, 7_804_700_160_u64), (2048, true, 13_451_646_976), (512, false, 26_211_931_136)];
    for (seq, gradient_checkpointing, measured) in cases {
        let cfg = EstimateConfig { seq, gradient_checkpointing, ..EstimateConfig::qlora() };
        let e = Estimate::new(&mistral_7b(), cfg).unwrap();
        let ratio = e.total as f64 / measured as f64;
        println!("4 x {seq}, checkpointing {gradient_checkpointing}: {} / {measured} = {ratio:.4}", e.total);
        // 5 % is promised; derived, not fitted, it is within 1.1 % today.
        assert!((ratio - 1.0).abs() < 0.02, "{ratio}");
    }
}

#[test]
fn qlora_weights_of_mistral_are_counted_to_the_byte() {
    let e = Estimate::new(&mistral_7b(), EstimateConfig::qlora()).unwrap();
    assert_eq!(bytes(&e, "NF4 codes"), 3_489_660_928);
    assert_eq!(bytes(&e, "absmax codes"), 109_051_904);
    assert_eq!(bytes(&e, "nested absmax"), 1_703_936);
    assert_eq!(bytes(&e, "code tables"), 243_712);
    assert_eq!(bytes(&e, "embeddings, lm_head, norms"), 1_049_640_960);
    assert_eq!(bytes(&e, "LoRA A and B"), 671_088_640);
    assert_eq!(bytes(&e, "gradients"), 671_088_640);
    assert_eq!(e.trainable_params, 167_772_160);
    // 163,577,856 of the trained parameters are in tensors from 100,000 elements: 2 bytes each, out of the allocator's sight.
    assert_eq!(e.paged_bytes, 2 * 163_577_856);
    assert_eq!(bytes(&e, "exp_avg, exp_avg_sq"), 2 * (167_772_160 - 163_577_856));
    assert_eq!(bytes(&e, "absmax of the moments"), 8 * 167_772_160 / 256);
    // 4.650 GB after prepare_model_for_kbit_training.
    assert_eq!(e.at_peak(Part::Weights), 4_650_057_728 + 243_712);
    // 4.125 GB before it.
    let e = Estimate::new(&mistral_7b(), EstimateConfig::inference(true)).unwrap();
    assert_eq!(e.at_peak(Part::Weights), 4_125_237_248 + 243_712);
    // 4.451 GB without nested quantization.
    let cfg = EstimateConfig { double_quant: false, ..EstimateConfig::inference(true) };
    let e = Estimate::new(&mistral_7b(), cfg).unwrap();
    assert_eq!(e.at_peak(Part::Weights) - bytes(&e, "code tables"), 4_450_689_024);
}

#[test]
fn full_fine_tuning_costs_8_or_16_bytes_per_parameter() {
    const PARAMS: u64 = 7_241_732_096;
    for (mixed, per_param) in [(false, 8), (true, 16)] {
        let e = Estimate::new(&mistral_7b(), EstimateConfig::full(mixed)).unwrap();
        let states = [Part::Weights, Part::Gradients, Part::Optimizer];
        let sum: u64 = e.components.iter().filter(|c| states.contains(&c.part)).map(|c| c.bytes).sum();
        assert_eq!(sum, per_param * PARAMS);
        assert_eq!(e.trainable_params, PARAMS);
        assert_eq!(e.peak(), 2, "gradients and states are complete at the end of the backward pass");
    }
    // 57.92 GB and 115.9 GB as usually rounded.
    assert_eq!(8 * PARAMS, 57_933_856_768);
    assert_eq!(16 * PARAMS, 115_867_713_536);
}

#[test]
fn one_layer_lists_the_saved_tensors() {
    let e = Estimate::new(&mistral_7b(), EstimateConfig { micro_batch_size: 1, seq: 1, ..EstimateConfig::qlora() })
        .unwrap();
    let layer: Vec<(&str, u64)> = e.layer.iter().map(|c| (c.name.as_str(), c.bytes)).collect();
    let expected = [
        ("RMSNorm inputs", 32_776),
        ("inputs of the linear layers", 69_632),
        ("LoRA A outputs", 896),
        ("query, key, value", 12_288),
        ("attention output", 8_192),
        ("gate, silu(gate), up", 172_032),
        ("log-sum-exp", 128),
    ];
    assert_eq!(layer, expected);
}

#[test]
fn components_at_each_moment_sum_to_it() {
    for cfg in [
        EstimateConfig::qlora(),
        EstimateConfig::lora(),
        EstimateConfig::full(true),
        EstimateConfig::inference(false),
        EstimateConfig {
            keep_outputs: true,
            lora_dropout: 0.1,
            attention: Attention::Eager,
            ..EstimateConfig::qlora()
        },
    ] {
        let e = Estimate::new(&mistral_7b(), cfg).unwrap();
        for (i, moment) in e.moments.iter().enumerate() {
            assert_eq!(e.components.iter().map(|c| c.live[i]).sum::<u64>(), moment.bytes);
        }
        assert_eq!(e.total, e.moments.iter().map(|m| m.bytes).max().unwrap());
        assert!(e.components.iter().all(|c| c.live.iter().all(|&b| b <= c.bytes)));
    }
}

#[test]
fn choices_move_the_peak_the_way_they_should() {
    let total = |cfg: EstimateConfig| Estimate::new(&mistral_7b(), cfg).unwrap().total;
    let base = total(EstimateConfig::qlora());
    let with = |f: fn(&mut EstimateConfig)| {
        let mut cfg = EstimateConfig::qlora();
        f(&mut cfg);
        total(cfg)
    };
    assert!(with(|c| c.loss = EstimateLoss::Chunked(256)) < base);
    assert!(with(|c| c.gradient_checkpointing = false) > base);
    // 325,451,776 bytes: f32 absmax instead of codes and their nested absmax, less the nested code tables.
    assert_eq!(with(|c| c.double_quant = false) - base, 325_451_776 - 224 * 1024);
    // 2 x 4 bytes per parameter resident instead of 2 paged.
    assert_eq!(with(|c| c.optim = Optim::AdamW) - base, 8 * 167_772_160 - 2 * 4_194_304 - 5_242_880);
    assert_eq!(with(|c| c.gradient_accumulation_steps = 16) - base, 671_088_640);
    assert_eq!(with(|c| c.keep_outputs = true) - base, 2 * 2048 * 32000);
    assert!(with(|c| c.method = EstimateMethod::Lora) > base);
    assert!(with(|c| c.target_modules = vec!["q_proj".into(), "v_proj".into()]) < base);
}

#[test]
fn bad_requests_are_errors() {
    let refuse = |cfg: EstimateConfig| Estimate::new(&mistral_7b(), cfg).unwrap_err().to_string();
    let e = refuse(EstimateConfig { target_modules: vec!["q_porj".into()], ..EstimateConfig::qlora() });
    assert!(e.contains("`q_porj`") && e.contains("did you mean `q_proj`?"), "{e}");
    let e = refuse(EstimateConfig { seq: 0, ..EstimateConfig::qlora() });
    assert!(e.contains("seq") && e.contains("at least 1"), "{e}");
    let mut absurd = mistral_7b();
    absurd.hidden_size = 1 << 40;
    let e = Estimate::new(&absurd, EstimateConfig::qlora()).unwrap_err().to_string();
    assert!(e.contains("hidden_size"), "{e}");
}

#[test]
fn cards_by_name() {
    let gpu = Gpu::preset("NVIDIA GeForce RTX 4090").unwrap();
    assert_eq!((gpu.name.as_str(), gpu.total_bytes, gpu.compute_capability), ("rtx-4090", 24_564 << 20, (8, 9)));
    assert_eq!(gpu.usable_bytes(), (24_564 - 448) << 20);
    let e = Gpu::preset("rtx-4091").unwrap_err().to_string();
    assert!(e.contains("did you mean `rtx-4090`?"), "{e}");
    let cards = Gpu::presets();
    assert!(cards.windows(2).all(|w| w[0].total_bytes <= w[1].total_bytes));
    for card in &cards {
        assert_eq!(Gpu::preset(&card.name).unwrap(), *card);
    }
    assert!(!Gpu::preset("t4").unwrap().has_bf16());
    // QLoRA at 4 x 512 fits a 12 GB card and 4 x 2048 does not.
    let e = Estimate::new(&mistral_7b(), EstimateConfig::qlora()).unwrap();
    assert!(e.fits(&Gpu::preset("rtx-3060").unwrap()));
    let e = Estimate::new(&mistral_7b(), EstimateConfig { seq: 2048, ..EstimateConfig::qlora() }).unwrap();
    assert!(!e.fits(&Gpu::preset("rtx-3060").unwrap()));
    assert!(e.fits(&Gpu::preset("rtx-4060-ti-16gb").unwrap()));
}

#[test]
fn the_same_run_as_a_plan() {
    let plan = MemoryPlan::qlora(&mistral_7b()).r(64).batch(4).seq(512).optim(Optim::PagedAdamW8bit).build().unwrap();
    let like = EstimateConfig::like(&plan);
    let leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    assert_eq!(like, EstimateConfig { target_modules: leaves.map(String::from).to_vec(), ..EstimateConfig::qlora() });
    let estimate = Estimate::new(&mistral_7b(), like).unwrap();
    assert_eq!(estimate.total, Estimate::new(&mistral_7b(), EstimateConfig::qlora()).unwrap().total);
    // The same adapter, counted by both.
    assert_eq!(estimate.trainable_params, plan.trainable_params());
    println!("ours {} theirs {}", plan.arena_bytes(), estimate.total);
    assert!(plan.arena_bytes() < estimate.total);
}
