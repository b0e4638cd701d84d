//! How well the plan places its regions, and how long that takes; the time is printed, because it depends on the machine.

use tunebook::model::ModelSpec;
use tunebook::plan::{Checkpointing, MemoryPlan, Phase};
use tunebook::train::Optim;

#[test]
fn plans_of_a_7b_model_are_tight_and_quick() {
    let spec = ModelSpec::preset("mistral-7b-v0.1").unwrap();
    let qlora = || MemoryPlan::qlora(&spec).r(64).optim(Optim::PagedAdamW8bit);
    let cases = [
        ("4 x 512, recomputed", qlora().batch(4).seq(512).checkpointing(Checkpointing::All)),
        ("4 x 512", qlora().batch(4).seq(512).checkpointing(Checkpointing::None)),
        ("1 x 2048, half recomputed", qlora().batch(1).seq(2048).checkpointing(Checkpointing::Layers(16))),
        ("1 x 2048, recomputed", qlora().batch(1).seq(2048).checkpointing(Checkpointing::All)),
        ("CPU, LoRA, 1 x 256", MemoryPlan::lora(&spec).cpu().seq(256).checkpointing(Checkpointing::None)),
    ];
    for (what, plan) in cases {
        let start = std::time::Instant::now();
        let plan = plan.build().unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let rows = plan.table();
        assert_eq!(rows.iter().map(|r| r.device).sum::<u64>(), plan.arena_bytes(), "{what}");
        assert_eq!(rows.iter().map(|r| r.host).sum::<u64>(), plan.host_bytes(), "{what}");
        for phase in [Phase::MicroStep, Phase::Optimizer, Phase::Evaluate, Phase::Logits, Phase::Generate] {
            // No placement needs less than what is alive at one operation.
            let persistent = plan.persistent_bytes();
            let alive = plan.timeline(phase).iter().map(|p| p.total() - persistent).max().unwrap();
            let placed = plan.phase_bytes(phase);
            let waste = placed as f64 / alive.max(1) as f64 - 1.0;
            println!("{what}, {}: {placed} bytes, {alive} alive at once: {:.2} % more", phase.label(), 100.0 * waste);
            assert!(placed >= alive, "{what}, {}", phase.label());
            assert!(phase != plan.largest_phase().unwrap() || waste < 0.03, "{what}, {}: {waste}", phase.label());
        }
        println!("{what}: planned in {seconds:.3} s");
        assert_eq!(plan.transient_bytes() > 0, what.starts_with("CPU"), "{what}");
    }
}
