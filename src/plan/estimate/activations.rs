//! What the forward pass leaves for the backward pass, the logits, and temporaries.

use super::components::{Live, Shape, Sheet, n};
use super::{Attention, EstimateLoss, Part};

/// PyTorch's default cuBLAS workspace, taken from its allocator: `:4096:2:16:8` KiB (`CUDABlas.cpp`). The one constant
/// here that is no tensor of the model; compute capability 9.0 reserves 32 MiB in some versions.
const CUBLAS_WORKSPACE: u128 = (4096 * 2 + 16 * 8) * 1024;

/// The tensors that autograd saves in one decoder layer: name, bytes, formula.
///
/// Under bf16 autocast each product saves its bf16 input. Where the residual stream is f32 (QLoRA), bitsandbytes'
/// linear returns f32, RMSNorm needs no upcast copy, and each adapted module casts the f32 input for itself; where it
/// is bf16, RMSNorm saves an f32 upcast and the modules after it share one bf16 input.
pub(super) fn layer(s: &Shape) -> Vec<(String, u128, String)> {
    let mut out = Vec::new();
    let mut add = |name: &str, per_token: u128, formula: String| {
        if per_token > 0 {
            out.push((name.to_owned(), s.t * per_token, format!("T x {formula}")));
        }
    };
    add("RMSNorm inputs", s.norms * (4 * s.c + 4), format!("{} x ({} + 1) x 4 (f32, and 1/rms)", s.norms, n(s.c)));
    let full = !s.cfg.method.has_adapter();
    if full {
        let formula = format!("{} x {} x 2 (for the norms' gradients)", s.norms, n(s.c));
        add("normalized inputs", 2 * s.norms * s.c, formula);
    }
    let inputs = linear_inputs(s);
    add("inputs of the linear layers", inputs, format!("{} (bf16)", n(inputs)));
    let masks: u128 = adapted(s).map(|(_, i, _)| *i).sum();
    if s.cfg.lora_dropout > 0.0 {
        add("dropout masks", masks, format!("{} x 1", n(masks)));
    }
    add(
        "LoRA A outputs",
        2 * s.r * adapted(s).count() as u128,
        format!("{} modules x {} x 2", adapted(s).count(), s.r),
    );
    add("query, key, value", 2 * (s.q + 2 * s.kv), format!("({} + 2 x {}) x 2", n(s.q), n(s.kv)));
    add("attention output", 2 * s.q, format!("{} x 2", n(s.q)));
    let b = s.residual();
    add("gate, silu(gate), up", 3 * b * s.f, format!("3 x {} x {b}", n(s.f)));
    let seq = s.cfg.seq as u128;
    match s.cfg.attention {
        Attention::Flash => add("log-sum-exp", 4 * s.heads, format!("{} heads x 4", s.heads)),
        // Scores are softmaxed in f32 and cast; keys and values are repeated for the query heads.
        Attention::Eager => {
            add("attention probabilities", 6 * s.heads * seq, format!("{} heads x {} x (4 + 2)", s.heads, n(seq)));
            add("repeated keys and values", 4 * s.q, format!("2 x {} x 2", n(s.q)));
        }
    }
    out
}

/// The linear modules of one layer that have an adapter.
fn adapted(s: &Shape) -> impl Iterator<Item = &(String, u128, u128)> {
    s.linears.iter().filter(|(leaf, ..)| s.cfg.adapts(leaf))
}

/// bf16 bytes per token that the trained products of one layer save of their inputs.
///
/// A frozen product saves only its weight. `o_proj` reads the attention output, which is counted there.
fn linear_inputs(s: &Shape) -> u128 {
    let full = !s.cfg.method.has_adapter();
    let own_copy = s.residual() == 4 || s.cfg.lora_dropout > 0.0;
    let trained = |names: &[&str]| -> Vec<u128> {
        let wanted = |leaf: &String| names.contains(&leaf.as_str()) && (full || s.cfg.adapts(leaf));
        s.linears.iter().filter(|(leaf, ..)| wanted(leaf)).map(|(_, i, _)| *i).collect()
    };
    let one = |inputs: Vec<u128>| -> u128 {
        if own_copy && !full { inputs.iter().sum() } else { inputs.into_iter().max().unwrap_or(0) }
    };
    let mut elements = one(trained(&["q_proj", "k_proj", "v_proj", "qkv_proj"]))
        + one(trained(&["gate_proj", "up_proj", "gate_up_proj"]));
    elements += one(trained(&["down_proj"]));
    if s.cfg.lora_dropout > 0.0 {
        elements += one(trained(&["o_proj"]));
    }
    2 * elements
}

pub(super) fn training(s: &Shape, sheet: &mut Sheet) {
    let saved: u128 = layer(s).iter().map(|(_, bytes, _)| bytes).sum();
    let b = s.residual();
    let kept = s.t * s.c * b;
    let a = Part::Activations;
    if s.cfg.gradient_checkpointing {
        let formula = format!("{} layers x T x {} x {b}", s.l, n(s.c));
        sheet.add(a, "layer inputs", s.l * kept, Live::At([s.l * kept, s.l * kept, kept]), formula);
        // In f32 the layer's input is the first RMSNorm's input: the same tensor.
        let again = saved - if b == 4 { kept } else { 0 };
        sheet.add(a, "one recomputed layer", again, Live::At([0, again, again]), "the tensors of one layer".into());
    } else {
        let all = s.l * saved;
        sheet.add(a, "saved activations", all, Live::At([all, all, saved]), format!("{} layers x {}", s.l, n(saved)));
    }
    let norm = 4 * s.t * s.c;
    sheet.add(a, "input of the last norm", norm, Live::At([norm, 0, 0]), format!("T x {} x 4 (f32)", n(s.c)));
    if !s.cfg.method.has_adapter() || s.cfg.adapts("lm_head") {
        let input = 2 * s.t * s.c;
        sheet.add(a, "input of lm_head", input, Live::At([input, 0, 0]), format!("T x {} x 2 (bf16)", n(s.c)));
    }
    let rotary = 2 * b * s.cfg.seq as u128 * s.head_dim;
    sheet.add(
        a,
        "rotary cos and sin",
        rotary,
        Live::Always,
        format!("2 x {} x {} x {b}", n(s.cfg.seq as u128), s.head_dim),
    );
    logits(s, sheet);
    backward(s, sheet);
    sheet.add(Part::Workspace, "cuBLAS workspace", CUBLAS_WORKSPACE, Live::Always, "PyTorch's default".into());
}

/// The temporaries of one layer's backward pass, at the larger of two places. In the product of gate and up, the
/// gradients of product, silu(gate) and up are alive together, and down_proj's saved input is gone. In a 4-bit
/// down_proj, its dequantized weight is alive with the gradient of its input.
fn backward(s: &Shape, sheet: &mut Sheet) {
    let b = s.residual();
    let down_input = if s.cfg.method.has_adapter() && !s.cfg.adapts("down_proj") { 0 } else { 2 };
    let mlp = s.t * ((3 * b - down_input) * s.f + b * s.c);
    let weight = 2 * s.largest_linear();
    let down = weight + s.t * (2 * s.f + (b + 2) * s.c);
    let (bytes, formula) = if s.cfg.method.is_4bit() && down > mlp {
        (
            down,
            format!(
                "{} x 2 (dequantized down_proj) + T x (2 x {} + {} x {})",
                n(s.largest_linear()),
                n(s.f),
                b + 2,
                n(s.c)
            ),
        )
    } else {
        (mlp, format!("T x ({} x {} + {b} x {})", 3 * b - down_input, n(s.f), n(s.c)))
    };
    sheet.add(Part::Workspace, "gradients inside one layer", bytes, Live::At([0, bytes, bytes]), formula);
}

/// The loss: log-probabilities (saved), their gradient, and the gradient of the logits, all f32 and alive together in
/// the backward pass of the cross-entropy.
fn logits(s: &Shape, sheet: &mut Sheet) {
    let (tokens, letter) = match s.cfg.loss {
        EstimateLoss::Full => (s.t, "T".to_owned()),
        EstimateLoss::Chunked(chunk) => (s.t.min(chunk as u128), n(chunk as u128)),
    };
    let three = 3 * 4 * tokens * s.v;
    let formula = format!("3 x {letter} x {} x 4 (log-probabilities, two gradients)", n(s.v));
    sheet.add(Part::Logits, "logits", three, Live::At([three, 0, 0]), formula);
    if s.cfg.keep_outputs && s.cfg.loss == EstimateLoss::Full {
        let kept = 2 * s.t * s.v;
        sheet.add(
            Part::Logits,
            "logits of the output object",
            kept,
            Live::Always,
            format!("T x {} x 2 (bf16)", n(s.v)),
        );
    }
}

pub(super) fn inference(s: &Shape, sheet: &mut Sheet) {
    let cache = 4 * s.l * s.t * s.kv;
    sheet.add(Part::Activations, "KV cache", cache, Live::Always, format!("2 x {} layers x T x {} x 2", s.l, n(s.kv)));
    let hidden = s.t * (4 * s.c + 2 * s.c);
    sheet.add(
        Part::Workspace,
        "hidden state",
        hidden,
        Live::Always,
        format!("T x {} x (2 + 4) (bf16, f32 in RMSNorm)", n(s.c)),
    );
    let mlp = 6 * s.t * s.f;
    sheet.add(Part::Workspace, "gate, up, product", mlp, Live::Always, format!("3 x T x {} x 2", n(s.f)));
    // generate() asks for the logits of the last position only, and samples in f32.
    let logits = 4 * s.cfg.micro_batch_size as u128 * s.v;
    sheet.add(Part::Logits, "logits", logits, Live::Always, format!("{} x {} x 4", s.cfg.micro_batch_size, n(s.v)));
    if s.cfg.attention == Attention::Eager {
        let scores = 6 * s.heads * s.t * s.cfg.seq as u128;
        sheet.add(
            Part::Workspace,
            "attention scores",
            scores,
            Live::Always,
            format!("{} heads x T x {} x 6", s.heads, s.cfg.seq),
        );
    }
    if s.cfg.method.is_4bit() {
        let bytes = 2 * s.largest_linear();
        let formula = format!("{} x 2 (bf16)", n(s.largest_linear()));
        sheet.add(Part::Workspace, "one dequantized matrix", bytes, Live::Always, formula);
    }
    sheet.add(Part::Workspace, "cuBLAS workspace", CUBLAS_WORKSPACE, Live::Always, "PyTorch's default".into());
}
