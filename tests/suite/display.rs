//! What values show: plain text by its letters; HTML by what it must and must not hold.

use serde_json::json;
use tunebook::data::{BatchView, Rows, TokenView};
use tunebook::display::html::escape;
use tunebook::display::{Card, Cell, MimeBundle, Show, Sink, Table, bundle, reset_sink, set_sink, svg, text, units};
use tunebook::lora::discover;
use tunebook::model::ModelSpec;
use tunebook::nf4::derive_levels;
use tunebook::plan::{Estimate, EstimateConfig, Gpu};

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
    assert_eq!([2e-4, 1.5, 1234.5, 1e-7, f64::NAN].map(|x| units::number(x, 4)), ["0.0002000", "1.500", "1,234", "1.000e-7", "NaN"]);
    assert_eq!([16.0, 0.05, 2e-5, 10000.0].map(units::plain), ["16", "0.05", "2e-5", "10,000"]);
    assert_eq!([0.0421, 3.14159, 75.0, 245.0, 7380.0].map(units::seconds), ["42.1 ms", "3.14 s", "75.0 s", "4 min 05 s", "2 h 03 min"]);
}

#[test]
fn a_card_as_text() {
    let mut t = Table::new().caption("Parts").words("part").numbers("size", "GB").words("");
    t.row(["weights".into(), "4.650".into(), Cell::bar(1.0, 0)]);
    t.row(["adapter".into(), "0.67".into(), Cell::bar(0.145, 1)]);
    t.total(["together".into(), "5.32".into(), "".into()]);
    let card = Card::new("Title").subtitle("below it").facts([("r", "64".to_owned()), ("lora_alpha", "16".to_owned())]).table(t).note("A note.");
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
    let shown: [&dyn Show; 7] = [&spec, &gpu, &rows, &view, &estimate, &levels, &discovery];
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
    assert_text(&tiny_spec("tiny"), "
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
");
    let spec = tiny_spec("tiny");
    assert_eq!(format!("{spec:?}"), format!("{spec}"));
    assert!(format!("{spec:#?}").contains("num_hidden_layers: 2"));
}

#[test]
fn targets_as_text() {
    assert_text(&discover(&tiny_spec("tiny"), vec!["q_proj", "down_proj"]).unwrap(), "
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
");
}

#[test]
fn a_batch_as_text() {
    let token = |text: &str, position, trained| TokenView { text: text.into(), id: 7, position, example: 0, trained };
    let tokens = vec![token("Say", 0, false), token(" hi:\n", 1, false), token(" hi", 2, true), token("</s>", 3, true)];
    assert_text(&BatchView { tokens, examples: vec![4] }, "
Batch: 1 examples, 4 tokens
2 (50.0 %) are trained on

trained on: ⟦so⟧

example 4: 4 tokens, 2 trained on
Say hi:
⟦ hi</s>⟧
");
}

#[test]
fn charts_take_any_numbers() {
    let frame = svg::Frame::around([f64::NAN], [f64::INFINITY, -0.0]);
    let line = svg::Line { points: vec![(0.0, f64::NAN), (1.0, 1.0), (f64::INFINITY, 2.0)], colour: 40, width: 20, opacity: 1.0, dots: true };
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

#[test]
fn a_sink_gets_displays_and_lines() {
    use std::sync::{Arc, Mutex};
    struct Log(Arc<Mutex<Vec<String>>>);
    impl Sink for Log {
        fn show(&mut self, bundle: &MimeBundle) {
            self.0.lock().unwrap().push(format!("show {}", bundle.text.lines().next().unwrap()));
        }
        fn update(&mut self, id: &str, _: &MimeBundle) {
            self.0.lock().unwrap().push(format!("update {id}"));
        }
        fn clear(&mut self, id: &str) {
            self.0.lock().unwrap().push(format!("clear {id}"));
        }
        fn text(&mut self, line: &str) {
            self.0.lock().unwrap().push(format!("text {line}"));
        }
        fn is_live(&self) -> bool {
            true
        }
    }
    let log = Arc::new(Mutex::new(Vec::new()));
    set_sink(Box::new(Log(log.clone())));
    let gpu = Gpu::preset("t4").unwrap();
    gpu.evcxr_display();
    tunebook::display::update("progress", &gpu);
    tunebook::display::line("step 1");
    tunebook::display::clear("progress");
    reset_sink();
    // Other tests may show something meanwhile: what was sent here is there, in this order.
    let got: Vec<String> = log.lock().unwrap().iter().filter(|l| !l.starts_with("show") || l.ends_with("t4")).cloned().collect();
    assert_eq!(got, ["show t4", "update progress", "text step 1", "clear progress"]);
}
