//! What the lessons use beside the library: surveys, plans side by side, blocks, and their displays.

use candle_core::{DType, Device, Tensor};
use tunebook::display::{bundle, chart, matrices, table};
use tunebook::lesson::{attempt, attempt_close, check, synthetic};
use tunebook::lora::LoraConfig;
use tunebook::model::{Base, ModelSpec};
use tunebook::nf4::{self, Nf4Config};
use tunebook::plan::{Checkpointing, MemoryPlan, Stage, side_by_side};
use tunebook::survey::survey;

use crate::display::{assert_text, stands_alone};
use crate::support::golden;

#[test]
fn a_check_as_text() {
    assert_text(
        &check("bytes of a step", 57_498_880_u64, 57_498_880).unwrap(),
        "
Check: bytes of a step

yours     57,498,880
expected  57,498,880
          ✓ equal",
    );
    let wrong = attempt_close("GB", 3.62, 4.125, 0.001);
    assert!(bundle(&wrong).text.contains("✗ not yet within 0.1 %"), "{wrong}");
    stands_alone(&bundle(&wrong));
    stands_alone(&bundle(&attempt("<script>alert(1)</script>", "<img src=x onerror=\"y\">", "b")));
}

#[test]
fn a_table_puts_numbers_to_the_right() {
    let rows = [["weights", "4.125"], ["moments", "0.014"]].map(|r| r.map(String::from));
    assert_text(
        &table("GB", ["stage", "GB"], rows),
        "
GB

stage       GB
──────────────
weights  4.125
moments  0.014",
    );
}

#[test]
fn matrices_show_their_values_and_shapes() {
    let w = Tensor::new(&[[1.0f32, -0.5], [0.0, 0.25]], &Device::Cpu).unwrap();
    let shown = matrices([("W", &w)]).unwrap();
    assert_text(&shown, "\nW [2, 2]\n      1   -0.50\n      0    0.25");
    stands_alone(&bundle(&shown));
    let large = Tensor::zeros((40, 40), DType::F32, &Device::Cpu).unwrap();
    assert!(bundle(&matrices([("large", &large)]).unwrap()).text.ends_with('…'));
    let cube = Tensor::zeros((2, 2, 2), DType::F32, &Device::Cpu).unwrap();
    assert!(matrices([("cube", &cube)]).unwrap_err().to_string().contains("cube"));
}

#[test]
fn a_chart_has_a_key_and_a_twin() {
    let shown = bundle(&chart("Loss", "step", "loss").line("<one>", [(0.0, 3.0), (1.0, 1.0)]).mark(0.5, "here"));
    stands_alone(&shown);
    assert!(shown.html.contains("&lt;one&gt;") && shown.html.contains("<svg role=\"img\" aria-label=\"Loss: "));
    assert!(shown.text.starts_with("Loss\n") && shown.text.contains("█▁  <one>"), "{}", shown.text);
    stands_alone(&bundle(&chart("empty", "x", "y")));
}

#[test]
fn plans_side_by_side_add_up() {
    let spec = ModelSpec::preset("mistral-7b-v0.1").unwrap();
    let plan = |seq| MemoryPlan::qlora(&spec).r(64).seq(seq).build().unwrap();
    let (short, long) = (plan(512), plan(2048));
    let shown = bundle(&side_by_side([("short", short.clone()), ("long", long.clone())]));
    stands_alone(&shown);
    let gb = |bytes: u64| format!("{:.3}", bytes as f64 / 1e9);
    let total = shown.text.lines().find(|l| l.starts_with("arena ")).unwrap();
    assert!(total.contains(&gb(short.arena_bytes())) && total.contains(&gb(long.arena_bytes())), "{total}");
    let difference = shown.text.lines().find(|l| l.starts_with("against the first")).unwrap();
    assert!(difference.ends_with(&format!("+{}", gb(long.arena_bytes() - short.arena_bytes()))), "{difference}");
}

/// The count of lesson 01: two bytes for each number that a layer keeps, statistics, and x A^T of the seven modules.
#[test]
fn what_a_layer_keeps_is_what_one_counts_by_hand() {
    let spec = ModelSpec::preset("mistral-7b-v0.1").unwrap();
    let plan = MemoryPlan::qlora(&spec).r(64).batch(1).seq(512).checkpointing(Checkpointing::None).build().unwrap();
    let kept = plan.kept_by_layer(7);
    let bytes: u64 = kept.iter().map(|r| r.bytes()).sum();
    let activations = 2 * 512 * (4096 + 4096 + 1024 + 1024 + 4096 + 4096 + 2 * 14_336);
    assert_eq!(bytes, activations + 2 * 512 * 64 * 7 + 4 * 512 * (32 + 1 + 1));
    // With dropout the inputs are dropped again, and x A^T comes with them: of the output projection alone it is a tensor of its own.
    let dropout = LoraConfig { r: 64, lora_dropout: 0.1, ..LoraConfig::default() };
    let dropped =
        MemoryPlan::qlora(&spec).adapter(dropout).batch(1).seq(512).checkpointing(Checkpointing::None).build().unwrap();
    let bytes: u64 = dropped.kept_by_layer(7).iter().map(|r| r.bytes()).sum();
    assert_eq!(bytes, activations + 2 * 512 * 64 + 4 * 512 * (32 + 1 + 1));
    let recomputed = MemoryPlan::qlora(&spec).r(64).batch(1).seq(512).build().unwrap();
    let names: Vec<String> = recomputed.kept_by_layer(7).into_iter().map(|r| r.name).collect();
    assert_eq!(names, ["layer 7 input"]);
    assert!(MemoryPlan::inference(&spec).build().unwrap().kept_by_layer(7).is_empty());
    let rows = plan.table();
    for row in rows.iter().filter(|r| r.stage.is_some()) {
        assert_eq!(plan.at_peak(row.stage.unwrap()), row.device);
    }
    assert_eq!(plan.at_peak(Stage::KvCache), 0);
}

#[test]
fn a_survey_is_the_inspection_of_each_layer() {
    let base = Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let config = Nf4Config::default();
    let found = survey(&base, config).unwrap();
    assert_eq!(found.rows.len(), 7 * base.spec().num_hidden_layers);
    let row = found.row("layers.1.mlp.up_proj").unwrap();
    let weight = base.checkpoint().read_tensor("model.layers.1.mlp.up_proj.weight").unwrap();
    let q = nf4::quantize(&weight, config).unwrap();
    let error = q.inspect_against(&weight).unwrap().error.unwrap();
    assert_eq!((row.relative, row.mse, row.bytes), (error.relative, error.mse, q.bytes()));
    assert_eq!(row.worst_block_index, error.worst(1)[0].block);
    assert!(row.worst_block >= 1.0 && row.largest > 1.0 && (2.0..5.0).contains(&row.kurtosis), "{row:?}");
    let weights: usize = found.rows.iter().map(|r| r.shape[0] * r.shape[1]).sum();
    let rest = base.spec().total_params() - weights as u64;
    assert_eq!(found.model_bytes(), found.quantized_bytes() + 2 * rest);
    let shown = bundle(&found);
    stands_alone(&shown);
    assert!(shown.text.contains("q_proj") && shown.text.contains(&format!("{:.2} %", 100.0 * row.relative)));
    let four_bit = Base::from_dir(golden("tiny/tiny-mistral/bnb_nf4_dq")).unwrap();
    assert!(survey(&four_bit, config).unwrap_err().to_string().contains("stored in 4 bits"));
}

#[test]
fn a_block_shows_its_elements() {
    let w = synthetic::normal(&[2, 64], 0.02, 1).unwrap();
    let view = nf4::quantize(&w, Nf4Config::default()).unwrap().block(1, &w).unwrap();
    let shown = bundle(&view);
    stands_alone(&shown);
    assert!(shown.text.contains("… 48 more elements") && shown.text.contains("(exact: "), "{}", shown.text);
    assert!((0.05..0.15).contains(&view.relative_error()));
}
