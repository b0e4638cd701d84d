//! What values show: plain text by its letters; HTML by what it must and must not hold.

use std::sync::{Arc, Mutex};

use serde_json::json;
use tunebook::data::{BatchView, Dataset, Example, Rows, TokenView};
use tunebook::display::html::escape;
use tunebook::display::{Card, Cell, MimeBundle, Show, Sink, Table, bundle, reset_sink, set_sink, svg, text, units};
use tunebook::generate::{Generation, StopReason};
use tunebook::lora::{MergeBase, MergeCost, MergeReport, ModuleMerge, discover};
use tunebook::model::{Base, ModelSpec};
use tunebook::nf4::{self, Nf4Config, derive_levels};
use tunebook::plan::{Estimate, EstimateConfig, Gpu, MemoryPlan};
use tunebook::train::{EvalReport, Metrics, Run, StepReport, TrainConfig};

use crate::support::golden;

/// A model small enough that its displays fit on this page.
pub fn tiny_spec(name: &str) -> ModelSpec {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 8,
        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2
    });
    ModelSpec::from_json(name, &config.to_string()).unwrap()
}

/// Trailing newline and indentation of a literal aside, the text must be equal.
pub fn assert_text(value: &dyn Show, expected: &str) {
    let text = bundle(value).text;
    assert_eq!(text, expected.trim_matches('\n'), "\n{text}\n");
}

#[test]
fn numbers_are_written_for_readers() {
    assert_eq!(units::bytes(4_650_301_440), "4.650 GB (4.331 GiB)");
    assert_eq!(units::bytes(999), "999 B");
    assert_eq!(units::count(7_241_732_096), "7,241,732,096");
    assert_eq!(units::short_count(7_241_732_096), "7.24 B");
    assert_eq!([0.0, 0.0002, 0.5, 1.0].map(units::percent), ["0.0 %", "< 0.1 %", "50.0 %", "100.0 %"]);
    assert_eq!(
        [2e-4, 1.5, 1234.5, 1e-7, f64::NAN].map(|x| units::number(x, 4)),
        ["0.0002000", "1.500", "1,234", "1.000e-7", "NaN"]
    );
    assert_eq!([16.0, 0.05, 2e-5, 10000.0].map(units::plain), ["16", "0.05", "2e-5", "10,000"]);
    assert_eq!(
        [0.0421, 3.25, 75.0, 245.0, 7380.0].map(units::seconds),
        ["42.1 ms", "3.25 s", "75.0 s", "4 min 05 s", "2 h 03 min"]
    );
}

#[test]
fn a_card_as_text() {
    let mut t = Table::new().caption("Parts").words("part").numbers("size", "GB").words("");
    t.row(["weights".into(), "4.650".into(), Cell::bar(1.0, 0)]);
    t.row(["adapter".into(), "0.67".into(), Cell::bar(0.145, 1)]);
    t.total(["together".into(), "5.32".into(), "".into()]);
    let card = Card::new("Title")
        .subtitle("below it")
        .facts([("r", "64".to_owned()), ("lora_alpha", "16".to_owned())])
        .table(t)
        .note("A note.");
    let expected = "
Title
below it

r           64
lora_alpha  16

Parts
part      size (GB)
─────────────────────────────────────────────
weights       4.650  ████████████████████████
adapter        0.67  ███▌
─────────────────────────────────────────────
together       5.32

A note.";
    assert_eq!(card.to_text(), expected.trim_matches('\n'), "\n{}", card.to_text());
}

#[test]
fn bars_and_sparklines() {
    assert_eq!(text::bar(0.5, 4), "██");
    assert_eq!(text::bar(0.001, 4), "▏", "something is never shown as nothing");
    assert_eq!(text::bar(0.0, 4), "");
    assert_eq!(text::bar(f64::NAN, 4), "");
    assert_eq!(text::sparkline(&[0.0, 1.0, 2.0, 7.0], 10), "▁▂▃█");
    assert_eq!(text::sparkline(&[3.0, 3.0, f64::NAN], 10), "▄▄!");
    assert_eq!(text::resample(&[1.0, 3.0, 5.0, 7.0], 2), [2.0, 6.0]);
}

#[test]
fn html_is_escaped_and_stands_alone() {
    assert_eq!(escape("<a href=\"x\">&'</a>"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;&lt;/a&gt;");
    let evil = "<script>alert('x')</script><img src=x onerror=\"y\">";
    let spec = tiny_spec(evil);
    let mut gpu = Gpu::preset("rtx-4090").unwrap();
    gpu.name = evil.into();
    let rows = Rows::from_values(vec![json!({ evil: evil })]).unwrap();
    let token = TokenView { text: evil.into(), id: 1, position: 0, example: 0, trained: true };
    let view = BatchView { tokens: vec![token], examples: vec![0] };
    let estimate = Estimate::new(&spec, EstimateConfig { r: 2, ..EstimateConfig::qlora() }).unwrap();
    let levels = derive_levels();
    let discovery = discover(&spec, "all-linear").unwrap();
    let (plan, merge, metrics) = (MemoryPlan::qlora(&spec).seq(16).build().unwrap(), merge_report(evil), metrics());
    let generation = generation(evil);
    let shown: [&dyn Show; 12] = [
        &spec,
        &gpu,
        &rows,
        &view,
        &estimate,
        &levels,
        &discovery,
        &plan,
        &merge,
        &metrics,
        &generation,
        &metrics.steps[0],
    ];
    for value in shown {
        stands_alone(&bundle(value));
    }
}

/// No script, no markup from names, no resource from elsewhere, both themes.
pub fn stands_alone(bundle: &MimeBundle) {
    let html = &bundle.html;
    assert!(!html.contains("<script") && !html.contains("<img") && !html.contains("onerror=\""), "{html}");
    let without_namespace = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for outside in ["http://", "https://", "url(", "@import", "src="] {
        let text = without_namespace.replace("&lt;img src=x", "");
        assert!(!text.contains(outside), "{outside} in {html}");
    }
    assert!(html.contains("prefers-color-scheme:dark") && html.contains("[data-jp-theme-light=\"false\"]"), "{html}");
    assert!(!html.contains("EVCXR") && !bundle.text.ends_with('\n') && !bundle.text.is_empty());
    // plotters' marker colours are all replaced.
    assert!(!html.contains("EE\"") || !html.contains("fill=\"#0"), "{html}");
}

#[test]
fn a_model_as_text() {
    assert_text(
        &tiny_spec("tiny"),
        "
tiny
Llama, 2.8 k parameters

layers             2
hidden_size        8
intermediate_size  16
attention          2 query heads, 1 key/value heads of 4
vocabulary         100
rotary base        10,000
longest context    64 tokens
weights            5.584 kB (5.453 KiB) in bf16

part          parameters    share           in QLoRA
────────────────────────────────────────────────────────
embed_tokens         800   28.7 %  ██████▉  stays 16-bit
attention            384   13.8 %  ███▎     NF4
mlp                  768   27.5 %  ██████▋  NF4
norms                 40    1.4 %  ▍        stay 16-bit
lm_head              800   28.7 %  ██████▉  stays 16-bit
────────────────────────────────────────────────────────
together           2,792  100.0 %
",
    );
    let spec = tiny_spec("tiny");
    assert_eq!(format!("{spec:?}"), format!("{spec}"));
    assert!(format!("{spec:#?}").contains("num_hidden_layers: 2"));
}

#[test]
fn targets_as_text() {
    assert_text(
        &discover(&tiny_spec("tiny"), vec!["q_proj", "down_proj"]).unwrap(),
        "
LoRA targets in tiny
q_proj, down_proj matches 4 of 15 linear modules

module     count  [out, in]                 parameters per rank
─────────────────────────────────────────────────────────────────────────────────────────
q_proj         2  [8, 8]     ✓ matched                       32  ████████████████
k_proj         2  [4, 8]     · not matched                    -
v_proj         2  [4, 8]     · not matched                    -
o_proj         2  [8, 8]     · not matched                    -
gate_proj      2  [16, 8]    · not matched                    -
up_proj        2  [16, 8]    · not matched                    -
down_proj      2  [8, 16]    ✓ matched                       48  ████████████████████████
lm_head        1  [100, 8]   · not matched                    -
─────────────────────────────────────────────────────────────────────────────────────────
together       4                                             80

What a rank costs
  r  trained parameters     of all      adapter file (f32)
──────────────────────────────────────────────────────────
  8                 640  18.6480 %    2.560 kB (2.500 KiB)
 16               1,280  31.4342 %    5.120 kB (5.000 KiB)
 64               5,120  64.7118 %  20.480 kB (20.000 KiB)
256              20,480  88.0028 %  81.920 kB (80.000 KiB)
",
    );
}

#[test]
fn a_batch_as_text() {
    let token = |text: &str, position, trained| TokenView { text: text.into(), id: 7, position, example: 0, trained };
    let tokens = vec![token("Say", 0, false), token(" hi:\n", 1, false), token(" hi", 2, true), token("</s>", 3, true)];
    assert_text(
        &BatchView { tokens, examples: vec![4] },
        "
Batch: 1 examples, 4 tokens
2 (50.0 %) are trained on

trained on: ⟦so⟧

example 4: 4 tokens, 2 trained on
Say hi:
⟦ hi</s>⟧
",
    );
}

#[test]
fn an_inspection_as_text() {
    // One block: every level exactly once, four times over.
    let levels = nf4::QuantType::Nf4.code();
    let values: Vec<f32> = levels.iter().cycle().take(64).map(|l| 2.0 * l).collect();
    let t = candle_core::Tensor::from_vec(values, (4, 16), &candle_core::Device::Cpu).unwrap();
    let config = Nf4Config { double_quant: false, ..Nf4Config::default() };
    let inspection = nf4::quantize(&t, config).unwrap().inspect_against(&t).unwrap();
    let shown = bundle(&inspection);
    let lines: Vec<&str> = shown.text.lines().collect();
    assert_eq!(lines[0], "4-bit tensor of 64 elements");
    for line in [
        "entropy of the codes    4.000 of 4 bits",
        "error / weight (norms)  0.0 %",
        "signal to noise (SQNR)  inf dB",
        "code    value  elements  share",
        "   7   0.0000         4  6.2 %  ████████████████████████",
        "  15   1.0000         4  6.2 %  ████████████████████████",
        "packed codes     32          4.00000  two elements per byte",
        "absmax            4          0.50000  one f32 per block",
    ] {
        assert!(lines.contains(&line), "{line}\n{}", shown.text);
    }
    assert_eq!(shown.html.matches("<svg").count(), 3, "levels, scales, blocks");
    stands_alone(&shown);
    let comparison = bundle(&nf4::compare(&t, 64).unwrap());
    assert!(comparison.text.contains("\nnf4 ") && comparison.text.contains("\nint4 + nested "), "{}", comparison.text);
    stands_alone(&comparison);
}

#[test]
fn charts_take_any_numbers() {
    let frame = svg::Frame::around([f64::NAN], [f64::INFINITY, -0.0]);
    let line = svg::Line {
        points: vec![(0.0, f64::NAN), (1.0, 1.0), (f64::INFINITY, 2.0)],
        colour: 40,
        width: 20,
        opacity: 1.0,
        dots: true,
    };
    for chart in [
        svg::lines(&frame, &[line], &[(f64::NAN, "never".into())]),
        svg::histogram(&frame, &[], 0, &[], 0),
        svg::heat(&[], 0, 3, ""),
        svg::heat(&[f64::NAN, 1.0], 1, 3, "two"),
        svg::stacked_area(&frame, &[], &[]),
        svg::stacked_bars(&[], &[], "GB", ""),
    ] {
        assert!(chart.starts_with("<svg role=\"img\"") && chart.trim_end().ends_with("</svg>"), "{chart}");
    }
}

fn step(step: u64, resumed: bool) -> StepReport {
    StepReport {
        step,
        epoch: step as f64 / 4.0,
        loss: 3.0 / step as f64,
        grad_norm: 0.5,
        learning_rate: 2e-4,
        tokens: 2048,
        trained_tokens: 900,
        tokens_per_second: 4096.0,
        seconds: 0.5,
        data_seconds: 0.03125,
        forward_seconds: 0.125,
        backward_seconds: 0.25,
        optimizer_seconds: 0.0625,
        arena_bytes: 6_450_545_664,
        clipped: true,
        resumed,
    }
}

fn metrics() -> Metrics {
    let eval = EvalReport { step: 4, loss: 1.0, examples: 10, tokens: 500, trained_tokens: 200, seconds: 0.1 };
    Metrics { steps: (1..=4).map(|i| step(i, i == 3)).collect(), evaluations: vec![eval] }
}

#[test]
fn a_step_as_text() {
    assert_text(
        &step(3, true),
        "
Step 3
epoch 0.75, the first after a resume

loss           1.0000 (perplexity 2.718)
gradient norm  0.5000, clipped
learning rate  0.0002000
tokens         2,048, 900 with a loss
speed          4,096 tokens/s
arena          6.451 GB (6.008 GiB)

time for             share
────────────────────────────────────────
data       31.2 ms   6.2 %  █▌
forward     0.12 s  25.0 %  ██████
backward    0.25 s  50.0 %  ████████████
optimizer  62.5 ms  12.5 %  ███
rest       31.2 ms   6.2 %  █▌
────────────────────────────────────────
step        0.50 s
",
    );
}

#[test]
fn a_run_as_text() {
    let metrics = metrics();
    assert_text(
        &metrics,
        "
Run
4 steps, 1.00 epochs

Loss: mean cross-entropy over the trained tokens of each step; evaluation with dots
loss           █▃▂▁  0.7500 to 3.000
learning rate  ▄▄▄▄  0.0002000 to 0.0002000
gradient norm  ▄▄▄▄  0.5000 to 0.5000

loss                3.0000 at step 1, 0.7500 at step 4
tokens              8,192 in 2.00 s, 4,096 tokens/s
evaluation          loss 1.0000 after step 4, perplexity 2.718
resumed after step  2
",
    );
    let html = bundle(&metrics).html;
    assert_eq!(html.matches("<svg").count(), 3);
    assert!(html.contains("resumed"));
    assert_eq!(format!("{metrics:?}"), format!("{metrics}"));
    assert!(format!("{metrics:#?}").contains("grad_norm: 0.5"));
}

fn merge_report(model: &str) -> MergeReport {
    let cost = |kept, error, distance| Some(MergeCost { kept, error, distance });
    let module = |layer: usize| ModuleMerge {
        module: format!("model.layers.{layer}.self_attn.q_proj"),
        layer: Some(layer),
        out_features: 8,
        in_features: 8,
        r: 2,
        norm_w: 3.0,
        norm_delta: 0.04,
        original: cost(1.0, 0.002, 9.2),
        dequantized: cost(0.999, 0.165, 0.165),
        quantized: cost(0.02, 1.11, 1.11),
    };
    MergeReport {
        model: model.into(),
        onto: MergeBase::Dequantized(Nf4Config::default()),
        trained_on_quantized: true,
        quantization: Nf4Config::default(),
        modules: vec![module(0), module(1)],
        dir: None,
        dtype: "bf16".into(),
        bytes: 0,
        seconds: 0.0,
        notes: vec!["A note.".into()],
    }
}

#[test]
fn a_merge_as_text() {
    assert_text(
        &merge_report("tiny"),
        "
Merge of tiny
onto the weights dequantized from nf4 (blocksize 64, nested)

What each base would cost, all weights together
merged onto                        kept                            error (‖ΔW‖)  distance (‖ΔW‖)
────────────────────────────────────────────────────────────────────────────────────────────────
original weights                100.0 %  ████████████████████████         0.002            9.200
dequantized from NF4  ◀ chosen   99.9 %  ████████████████████████         0.165            0.165
NF4, quantized again              2.0 %  ▌                                1.110            1.110

kept: the share of ΔW that arrives. error: what rounding or quantizing did to ΔW, and distance: how
far the result is from the function that was trained beside the quantized weights, both as multiples
of ‖ΔW‖.

By layer: kept and distance onto each base
   layer    ‖W‖     ‖ΔW‖  ‖ΔW‖/‖W‖  original  dist.  dequantized  dist.  quantized  dist.
─────────────────────────────────────────────────────────────────────────────────────────
       0  3.000  0.04000    1.33 %   100.0 %  9.200       99.9 %  0.165      2.0 %  1.110
       1  3.000  0.04000    1.33 %   100.0 %  9.200       99.9 %  0.165      2.0 %  1.110
─────────────────────────────────────────────────────────────────────────────────────────
together  4.243  0.05657    1.33 %   100.0 %  9.200       99.9 %  0.165      2.0 %  1.110

merged weights  2
stored as       bf16

A note.
",
    );
}

fn generation(text: &str) -> Generation {
    Generation {
        prompt: "Once upon".into(),
        text: format!(" a time {text}"),
        prompt_tokens: 3,
        tokens: vec![7; 4],
        stop_reason: StopReason::MaxNewTokens,
        seconds_prefill: 0.0125,
        seconds_decode: 0.1,
        tokens_per_second: 30.0,
    }
}

#[test]
fn a_generation_as_text() {
    assert_text(
        &generation("there"),
        "
Generation
3 + 4 tokens, 12.5 ms to the first, then 30.0 tokens/s; ended by max_new_tokens reached

Once upon⟦ a time there⟧
",
    );
}

#[test]
fn a_plan_adds_up_in_its_display() {
    let plan = MemoryPlan::qlora(&tiny_spec("tiny")).r(2).batch(2).seq(16).build().unwrap();
    let shown = bundle(&plan);
    assert!(
        shown.text.starts_with(
            "Memory plan: QLoRA of tiny\n2 x 16 tokens, r 2 on all-linear, NF4 with nested absmax, adamw,"
        )
    );
    let unit = units::ByteUnit::of(plan.arena_bytes());
    let total = shown.text.lines().find(|l| l.starts_with("arena  ")).unwrap();
    assert!(total.contains(&unit.decimal(plan.arena_bytes())) && total.contains("100.0 %"), "{total}");
    for row in plan.table() {
        let name = row.stage.map_or("unused by the placement", |s| s.label());
        assert!(shown.text.contains(&format!("\n{name} ")) && shown.html.contains(name), "{name}");
    }
    assert_eq!(shown.html.matches("<svg").count(), 2, "the bar and the timeline");
    assert!(shown.text.contains("operations of one micro-step: forward to the loss, then backward."));
    assert_eq!(format!("{plan:?}"), shown.text);
    assert!(format!("{plan:#?}").contains("arena_bytes:"));
}

#[test]
fn a_plan_on_cards_as_text() {
    let plan =
        MemoryPlan::qlora(&ModelSpec::preset("mistral-7b-v0.1").unwrap()).r(64).batch(4).seq(512).build().unwrap();
    let table = bundle(&plan.on_known_gpus());
    assert!(
        table.text.starts_with("QLoRA of mistral-7b-v0.1 on known cards\nthe smallest card that it fits is "),
        "{}",
        table.text
    );
    assert_eq!(table.text.matches("✓ fits").count() + table.text.matches("✗ too small").count(), Gpu::presets().len());
    stands_alone(&table);
    let fits = plan.fits(Gpu::preset("rtx-4090").unwrap()).unwrap();
    assert!(bundle(&fits).text.starts_with("✓ fits on rtx-4090\n"));
    let small = plan.fits(Gpu::preset("rtx-2060").unwrap()).unwrap();
    let shown = bundle(&small);
    assert!(
        shown.text.starts_with("✗ does not fit on rtx-2060\n") && shown.text.contains(" missing\n"),
        "{}",
        shown.text
    );
    assert_eq!(shown.text.contains("The cheapest changes"), !small.changes.is_empty());
    assert_eq!(format!("{small:?}"), shown.text);
    stands_alone(&shown);
}

#[test]
fn every_method_side_by_side() {
    let plan =
        MemoryPlan::qlora(&ModelSpec::preset("mistral-7b-v0.1").unwrap()).r(64).batch(4).seq(512).build().unwrap();
    let table = plan.methods().unwrap();
    let qlora = &table.rows[3];
    assert_eq!((qlora.name.as_str(), qlora.plan.arena_bytes()), ("QLoRA", plan.arena_bytes()));
    // 8 bytes per parameter are the same bytes everywhere.
    let full = &table.rows[0];
    assert!(full.plan.arena_bytes() > 8 * 7_241_732_096 && full.estimate.total > 8 * 7_241_732_096);
    let shown = bundle(&table);
    for row in &table.rows {
        let line = shown.text.lines().find(|l| l.starts_with(&format!("{}  ", row.name))).unwrap();
        assert!(line.contains(&format!("{:.3}", row.plan.arena_bytes() as f64 / 1e9)), "{line}");
        assert!(line.contains(&format!("{:.3}", row.estimate.total as f64 / 1e9)), "{line}");
    }
    stands_alone(&shown);
}

/// A sink that keeps what it is sent.
struct Log(Arc<Mutex<Vec<String>>>, bool);

impl Sink for Log {
    fn show(&mut self, bundle: &MimeBundle) {
        self.0.lock().unwrap().push(format!("show {}", bundle.text.lines().next().unwrap()));
    }
    fn update(&mut self, id: &str, bundle: &MimeBundle) {
        self.0.lock().unwrap().push(format!("update {id}: {}", bundle.text.lines().nth(1).unwrap_or_default()));
    }
    fn clear(&mut self, id: &str) {
        self.0.lock().unwrap().push(format!("clear {id}"));
    }
    fn text(&mut self, line: &str) {
        self.0.lock().unwrap().push(format!("text {line}"));
    }
    fn is_live(&self) -> bool {
        self.1
    }
}

/// One test for all that replaces the sink: there is one in the process. Other tests may send something meanwhile.
#[test]
fn a_sink_gets_displays_and_progress() {
    let log = Arc::new(Mutex::new(Vec::new()));
    set_sink(Box::new(Log(log.clone(), true)));
    let gpu = Gpu::preset("t4").unwrap();
    gpu.evcxr_display();
    tunebook::display::update("a card", &gpu);
    tunebook::display::line("a line");
    tunebook::display::clear("a card");
    let tmp = tempfile::TempDir::new().unwrap();
    let mut run = run(tmp.path());
    run.steps(2).unwrap();
    set_sink(Box::new(Log(log.clone(), false)));
    run.steps(9).unwrap();
    reset_sink();
    let got = log.lock().unwrap().clone();
    for expected in ["show t4", "update a card: ", "text a line", "clear a card"] {
        assert!(got.iter().any(|l| l == expected), "{expected} in {got:?}");
    }
    assert!(
        got.iter().any(|l| l.starts_with("update tunebook-run-") && l.contains(": step 2 of 3, to step 2, ")),
        "{got:?}"
    );
    assert!(!got.iter().any(|l| l.starts_with("text step 2/3 ")), "a live display needs no lines: {got:?}");
    assert!(got.iter().any(|l| l.starts_with("text step 3/3  loss ") && l.contains(" tokens/s")), "{got:?}");
    let shown = bundle(&run);
    assert!(shown.text.contains("\nstep 3 of 3, finished\n") && shown.text.contains("at step 3"), "{}", shown.text);
    stands_alone(&shown);
}

fn run(dir: &std::path::Path) -> Run {
    let base = Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let plan = MemoryPlan::lora(base.spec()).cpu().r(2).batch(2).seq(16).build().unwrap();
    let data = Dataset::new((0..6).map(|i| Example::all_trained((i..i + 9).collect())).collect()).unwrap();
    let config = TrainConfig::default().per_device_train_batch_size(2).max_steps(3).logging_steps(1);
    Run::create(dir.join("run"), plan, base, data, config).unwrap()
}
