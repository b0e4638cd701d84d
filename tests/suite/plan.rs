//! The plan: sizes known by hand, and what it proposes for a card.

use tunebook::engine::ops::Op;
use tunebook::lora::LoraConfig;
use tunebook::model::ModelSpec;
use tunebook::plan::{Checkpointing, Gpu, MemoryPlan, Phase, PlanBuilder, PlanConfig, Stage};
use tunebook::train::Optim;

fn mistral() -> ModelSpec {
    ModelSpec::preset("mistral-7b-v0.1").unwrap()
}

fn stage(plan: &MemoryPlan, stage: Stage) -> u64 {
    plan.table().iter().find(|r| r.stage == Some(stage)).map_or(0, |r| r.device)
}

#[test]
fn persistent_bytes_of_mistral_are_those_of_the_formulae() {
    let plan = MemoryPlan::qlora(&mistral()).r(64).batch(4).seq(512).build().unwrap();
    assert_eq!(plan.trainable_params(), 167_772_160);
    assert_eq!(plan.total_params(), 7_241_732_096 + 167_772_160);
    // 4-bit linears with nested scales, bf16 embedding, lm_head and norms; 4 bytes for each nested offset come with the
    // alignment of 256.
    let linear = 6_979_321_856u64;
    let exact = linear / 2 + linear / 64 + linear / 64 / 256 * 4 + 2 * (7_241_732_096 - linear);
    let weights = stage(&plan, Stage::Weights);
    assert!(weights >= exact && weights < exact + 224 * 512, "{weights} {exact}");
    assert_eq!(stage(&plan, Stage::Adapters), 4 * 167_772_160);
    assert_eq!(stage(&plan, Stage::Gradients), 4 * 167_772_160);
    assert_eq!(stage(&plan, Stage::OptimizerState), 8 * 167_772_160);
    assert_eq!(stage(&plan, Stage::Checkpoints), 32 * 2048 * 4096 * 2);
    let paged = MemoryPlan::qlora(&mistral()).r(64).optim(Optim::PagedAdamW8bit).build().unwrap();
    assert_eq!(paged.host_bytes(), 2 * 163_577_856);
}

#[test]
fn full_fine_tuning_of_the_article() {
    let pure = MemoryPlan::full(&mistral()).pure_bf16().seq(128).build().unwrap();
    let state: u64 = [Stage::Weights, Stage::Gradients, Stage::OptimizerState].iter().map(|&s| stage(&pure, s)).sum();
    assert_eq!(state, 8 * 7_241_732_096);
    let mixed = MemoryPlan::full(&mistral()).seq(128).build().unwrap();
    assert_eq!(stage(&mixed, Stage::MasterWeights), 4 * 7_241_732_096);
}

#[test]
fn the_table_adds_up_and_phases_share_space() {
    for checkpointing in [Checkpointing::All, Checkpointing::None, Checkpointing::Layers(10)] {
        let plan = MemoryPlan::qlora(&mistral()).batch(2).seq(256).checkpointing(checkpointing).build().unwrap();
        let rows = plan.table();
        assert_eq!(rows.iter().map(|r| r.device).sum::<u64>(), plan.arena_bytes());
        let spare = rows.iter().find(|r| r.stage.is_none()).map_or(0, |r| r.device);
        assert!(spare * 100 < plan.phase_space() * 3, "{spare} of {} unused", plan.phase_space());
        let largest =
            [Phase::MicroStep, Phase::Evaluate, Phase::Generate].map(|p| plan.phase_bytes(p)).into_iter().max();
        assert_eq!(plan.phase_space(), largest.unwrap());
    }
}

#[test]
fn recomputing_more_needs_less() {
    let bytes = |n| {
        MemoryPlan::qlora(&mistral())
            .batch(4)
            .seq(512)
            .checkpointing(Checkpointing::Layers(n))
            .build()
            .unwrap()
            .arena_bytes()
    };
    let all: Vec<u64> = (0..=32).step_by(4).map(bytes).collect();
    assert!(all.windows(2).all(|w| w[1] <= w[0]), "{all:?}");
}

#[test]
fn what_does_not_fit_gets_changes_that_do() {
    let spec = mistral();
    let plan = MemoryPlan::qlora(&spec).r(64).batch(8).seq(2048).checkpointing(Checkpointing::None).build().unwrap();
    let fit = plan.fits(Gpu::preset("rtx-4090").unwrap()).unwrap();
    assert!(!fit.fits() && fit.margin_bytes() < 0);
    assert!(!fit.changes.is_empty() && fit.changes.len() <= 3, "{fit:?}");
    for change in &fit.changes {
        let changed = MemoryPlan::new(&spec, change.config.clone()).unwrap().fits(fit.gpu.clone()).unwrap();
        assert!(changed.fits(), "{}", change.what);
        assert_eq!(changed.needed_bytes, change.needed_bytes);
    }
    let hopeless = MemoryPlan::full(&spec).build().unwrap().fits(Gpu::preset("rtx-4090").unwrap()).unwrap();
    assert!(hopeless.changes.is_empty() && hopeless.smallest_bytes.unwrap() > hopeless.gpu.total_bytes);
}

#[test]
fn decoded_weights_are_kept_as_far_as_there_is_room() {
    let spec = mistral();
    let builder = || MemoryPlan::qlora(&spec).r(16).seq(512).optim(Optim::PagedAdamW8bit);
    let bytes = |plan: PlanBuilder| plan.build().unwrap().arena_bytes();
    let (none, all) = (bytes(builder()), bytes(builder().keep_dequantized(true)));
    let some = bytes(builder().keep_dequantized_modules(["q_proj", "k_proj", "v_proj", "o_proj"]));
    // Two bytes an element, and the columns of B beside all of them but attention's output.
    let kept = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 16 * (4096 + 2 * 1024)) as u64;
    assert!(none < some && some < all, "{none} {some} {all}");
    assert!((some - none).abs_diff(kept) < 1 << 20, "{} instead of {kept}", some - none);
    // A card on which half of them fits.
    let mut card = Gpu::preset("rtx-3060").unwrap();
    card.total_bytes = builder().build().unwrap().process_bytes(&card) + (all - none) / 2;
    let fitted = builder().checkpointing(Checkpointing::All).fit(card.clone()).unwrap();
    let config = fitted.plan.config();
    let modules = config.keep_dequantized_modules.as_ref().unwrap();
    assert!(config.keep_dequantized && !modules.is_empty() && modules.len() < 6, "{:?}", fitted.reasons);
    assert!(fitted.plan.process_bytes(&card) <= card.total_bytes);
    let e = builder().keep_dequantized_modules(["down_proj"]).build().unwrap_err().to_string();
    assert!(e.contains("down_proj") && e.contains("gate_proj"), "{e}");
}

/// Layers that are held dequantized: their weights in bf16 with the columns of B beside them, and nothing to decode in a step.
#[test]
fn weights_held_dequantized_are_not_decoded_in_a_step() {
    let spec = mistral();
    let builder = || MemoryPlan::qlora(&spec).r(16).batch(2).optim(Optim::PagedAdamW8bit).keep_dequantized(true);
    let plan = |layers: usize| builder().dequantized_layers(layers).build().unwrap();
    let (none, some, all) = (plan(0), plan(5), plan(32));
    let row = |k: usize, ranks: usize| (k + 16 * ranks).next_multiple_of(64);
    let attention = 4096 * row(4096, 1) + 1024 * (row(4096, 2) + row(4096, 3)) + 4096 * 4096;
    let layer = 2 * (attention + 14336 * (row(4096, 1) + row(4096, 2)) + 4096 * row(14336, 1)) as u64;
    assert_eq!(some.persistent_bytes() - none.persistent_bytes(), 5 * layer);
    assert_eq!(all.persistent_bytes() - none.persistent_bytes(), 32 * layer);
    // The rest needs less: no weight is decoded on the way.
    assert!(all.phase_bytes(Phase::MicroStep) < none.phase_bytes(Phase::MicroStep));
    let count =
        |plan: &MemoryPlan, name: &str| plan.program(Phase::MicroStep).iter().filter(|op| op.name() == name).count();
    // Six of a recomputed layer's seven are decoded for its gradients; B lies beside all but attention's output.
    assert_eq!([&none, &some, &all].map(|p| count(p, "dequantize")), [32 * 6, 27 * 6, 0]);
    assert_eq!([&none, &some, &all].map(|p| count(p, "lora_b")), [0, 5 * 6, 32 * 6]);
    for phase in [Phase::Evaluate, Phase::Logits, Phase::Generate] {
        let names = |plan: &MemoryPlan| plan.program(phase).iter().map(Op::name).collect::<Vec<_>>();
        assert_eq!(names(&all), names(&none), "{phase:?}");
    }
    // What does not fit is first of all not held.
    let mut card = Gpu::preset("rtx-4090").unwrap();
    card.total_bytes = none.process_bytes(&card);
    let fit = all.fits(card).unwrap();
    assert_eq!(fit.changes[0].what, ".dequantized_layers(0)");
    // Asked to fit, it holds as many as there is room for, and no fewer.
    for (name, expected) in [("rtx-4060", 0..1), ("rtx-3060", 1..32), ("rtx-4090", 32..33)] {
        let card = Gpu::preset(name).unwrap();
        let fitted = builder().dequantized_layers(32).fit(card.clone()).unwrap();
        let config = fitted.plan.config().clone();
        let n = config.dequantized_layers;
        assert!(expected.contains(&n) && fitted.plan.process_bytes(&card) <= card.total_bytes, "{name}: {n}");
        if n < 32 {
            let more = MemoryPlan::new(&spec, PlanConfig { dequantized_layers: n + 1, ..config }).unwrap();
            assert!(more.process_bytes(&card) > card.total_bytes, "{name}: {n} and one more");
        }
        assert!(fitted.reasons.iter().any(|r| r.contains("dequantized")), "{:?}", fitted.reasons);
    }
    let e = builder().dequantized_layers(33).build().unwrap_err().to_string();
    assert!(e.contains("dequantized_layers") && e.contains("32"), "{e}");
    let e = MemoryPlan::lora(&spec).dequantized_layers(1).build().unwrap_err().to_string();
    assert!(e.contains("dequantized_layers") && e.contains("LoRA"), "{e}");
}

/// With dropout, on a GPU: the low-rank product just before a module's gradients leaves its dropped input and mask for them; that of the
/// forward pass leaves nothing, for it would live until then.
#[test]
fn dropped_inputs_are_kept_for_the_gradients_alone() {
    let spec = mistral();
    for layers in [Checkpointing::All, Checkpointing::Layers(5), Checkpointing::None] {
        let lora = LoraConfig { lora_dropout: 0.1, ..LoraConfig::default() };
        let plan = MemoryPlan::qlora(&spec).adapter(lora).batch(4).checkpointing(layers).build().unwrap();
        let program = plan.program(Phase::MicroStep);
        let loss = program.iter().position(|op| op.name() == "lm_head_ce").unwrap();
        let (mut kept, mut used) = (Vec::new(), 0);
        for (i, op) in program.iter().enumerate() {
            match op {
                Op::LoraA(o) if o.dropped.is_empty() => assert!(i < loss, "operation {i} keeps nothing"),
                Op::LoraA(o) => {
                    assert!(i > loss && o.dropped.len() == o.adapters.len(), "operation {i}");
                    kept.extend(&o.dropped);
                }
                Op::LoraBackward(o) => {
                    for m in &o.modules {
                        let found = kept.iter().position(|d| Some(*d) == m.dropped);
                        kept.remove(found.unwrap_or_else(|| panic!("operation {i} reads what was not kept")));
                        used += 1;
                    }
                }
                _ => {}
            }
        }
        // All but attention's output have a pair beside their input.
        assert!(kept.is_empty() && used == 6 * 32, "{layers}: {used} used, {} left", kept.len());
        let without = MemoryPlan::qlora(&spec).batch(4).checkpointing(layers).build().unwrap();
        let more = plan.arena_bytes() - without.arena_bytes();
        // At most those of all six, two bytes and a bit an element, and what attention's output drops on the way.
        let most = 2048 * (5 * 4096 + 14336) * 17 / 8 + 2048 * 4096 * 2;
        assert!(0 < more && more <= most, "{layers}: {more} bytes more");
    }
}

/// Without dropout, on a GPU: the low-rank products of a layer that is not recomputed are kept for its gradients; those of a recomputed
/// one are there when they come.
#[test]
fn low_rank_products_are_computed_once_where_nothing_is_recomputed() {
    let spec = mistral();
    for (layers, recomputed) in [(Checkpointing::All, 32), (Checkpointing::Layers(5), 5), (Checkpointing::None, 0)] {
        let plan = MemoryPlan::qlora(&spec).batch(4).checkpointing(layers).build().unwrap();
        let (mut computed, mut kept, mut used) = (0, Vec::new(), 0);
        for op in plan.program(Phase::MicroStep) {
            match op {
                Op::LoraA(o) => {
                    computed += 1;
                    kept.extend(o.kept);
                }
                Op::LoraBackward(o) => {
                    used += 1;
                    let Some(xa) = o.xa else { continue };
                    assert_eq!(plan.regions()[xa.index()].shape[1], 16 * o.modules.len());
                    kept.remove(kept.iter().position(|k| *k == xa).expect("kept, and read once"));
                }
                _ => {}
            }
        }
        // Inputs of attention, of gate and up, of down.
        assert_eq!((computed, used, kept.len()), (3 * (32 + recomputed), 3 * 32, 0), "{layers}");
    }
}

/// On a GPU the update reads and writes paged state where it is; on the CPU it passes through windows.
#[test]
fn paged_state_needs_windows_on_the_cpu_alone() {
    let spec = mistral();
    let windows = |plan: PlanBuilder| {
        let plan = plan.optim(Optim::PagedAdamW8bit).build().unwrap();
        plan.regions().iter().filter(|r| r.stage == Stage::Window).count()
    };
    assert_eq!(windows(MemoryPlan::qlora(&spec).r(64)), 0);
    assert!(windows(MemoryPlan::qlora(&spec).r(64).cpu()) > 0);
}

#[test]
fn fit_spends_the_card_on_speed() {
    let card = |name| Gpu::preset(name).unwrap();
    let spec = mistral();
    let builder = || MemoryPlan::qlora(&spec).r(64).batch(8).seq(512).optim(Optim::PagedAdamW8bit);
    let big = builder().fit(card("h200")).unwrap();
    assert_eq!(big.plan.config().checkpointing, Checkpointing::None);
    assert_eq!(big.plan.config().micro_batch_size, 8);
    assert!(big.plan.config().resident_state && big.plan.host_bytes() == 0);
    let small = builder().fit(card("rtx-4060")).unwrap();
    assert!(small.plan.fits(card("rtx-4060")).unwrap().fits(), "{:?}", small.reasons);
    let e = builder().fit(card("rtx-2060")).map(|f| f.plan.arena_bytes());
    if let Err(e) = e {
        assert!(e.to_string().contains("no plan for this model fits"), "{e}");
    }
    let e = MemoryPlan::full(&spec).fit(card("rtx-4090")).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("no plan for this model fits"), "{e}");
}

#[test]
fn a_plan_from_its_saved_configuration_is_the_same() {
    let plan = MemoryPlan::qlora(&mistral()).r(8).targets("q_proj,v_proj").double_quant(false).build().unwrap();
    let text = serde_json::to_string(plan.config()).unwrap();
    let again = MemoryPlan::new(&mistral(), serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(plan.arena_bytes(), again.arena_bytes());
    assert_eq!(plan.regions(), again.regions());
}
