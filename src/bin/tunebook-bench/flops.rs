//! Floating-point operations of a program, counted operation by operation.
//!
//! A multiplication and an addition are two. Counted is what the program really computes, so recomputed layers count
//! again and a frozen weight has no gradient product. Over a whole step that is, with T tokens and P the parameters of the
//! layers' linear modules:
//!
//! ```text
//! forward        2 P T                                  + 4 S H D for each layer
//! backward       2 P T (frozen: dx) or 4 P T (dx, dW)   + 10 S H D for each layer
//! recomputation  2 P T less the down projections        + 4 S H D for each recomputed layer
//! adapter        2 R (in + out) T forward, 4 R (in + out) T backward (dxa, dA, dB, dx), for each adapted module
//! lm_head        2 N C V forward, 2 N C V for dx, 2 N C V for dW when it is trained
//! ```
//!
//! S is the number of visible (query, key) pairs of a batch: L (L + 1) / 2 for each sequence of L tokens, fewer with a
//! sliding window. Forward attention is two products (scores, output); its backward pass five (scores again, dP, dV, dQ,
//! dK). N is the number of labelled tokens: rows without a label cost nothing. dx of a module is left out where nothing
//! before it is trained, as in the program. Norms, rotation, SwiGLU, dequantization and the optimizer are not counted:
//! they are bound by memory and small beside the products.

use std::collections::BTreeMap;

use tunebook::data::Batch;
use tunebook::engine::ops::{Heads, LinearIds, Lora, Op, TensorId};
use tunebook::plan::{Lifetime, MemoryPlan, Phase, Stage};

/// Floating-point operations of one run of a phase's program on `batch`, by kind of operation; kinds without any are
/// left out.
pub fn of_phase(plan: &MemoryPlan, phase: Phase, batch: &Batch) -> BTreeMap<&'static str, f64> {
    let mut out = BTreeMap::new();
    for op in plan.program(phase) {
        let n = of_op(plan, op, batch);
        if n > 0.0 {
            *out.entry(op.name()).or_default() += n;
        }
    }
    out
}

fn of_op(plan: &MemoryPlan, op: &Op, batch: &Batch) -> f64 {
    let t = batch.tokens() as f64;
    // [T, k] x [k, n].
    let product = |n: usize, k: usize| 2.0 * t * n as f64 * k as f64;
    let whole = |m: &LinearIds| product(m.out_features, m.in_features);
    let attention = |heads: &Heads, products: f64| products * 2.0 * pairs(batch, heads) * (heads.q * heads.dim) as f64;
    let head = |table: TensorId| -> f64 { plan.regions()[table.index()].shape.iter().map(|&n| n as f64).product() };
    let times = |n: bool| f64::from(u8::from(n));
    // dxa; A and B; dx.
    let lora_gradients = |m: &LinearIds, lora: &Lora, dx: bool| {
        let (out, into) = (product(lora.r, m.out_features), product(lora.r, m.in_features));
        out + times(lora.grads.is_some()) * (out + into) + times(dx) * into
    };
    match op {
        Op::Linear(o) => {
            let m = &o.linear;
            let adapter = match (&m.lora, o.xa) {
                // A x is LoraA's.
                (Some(lora), None) if o.beside.is_some() => product(m.out_features, lora.r),
                (Some(lora), Some(_)) => {
                    product(lora.r, m.in_features) + times(o.y.is_some()) * product(m.out_features, lora.r)
                }
                _ => 0.0,
            };
            times(o.y.is_some()) * whole(m) + adapter
        }
        Op::LinearBackward(o) => {
            let m = &o.linear;
            let mut n = times(o.dx.is_some()) * whole(m);
            if m.grad.is_some() && o.x.is_some() {
                n += whole(m);
            }
            if let (Some(lora), Some(_), Some(_)) = (&m.lora, o.x, o.xa) {
                n += lora_gradients(m, lora, o.dx.is_some());
            }
            n
        }
        Op::LoraA(o) => o.adapters.iter().map(|m| product(m.lora.r, o.in_features)).sum(),
        Op::LoraBackward(o) => {
            let of = |m: &LinearIds| Some(lora_gradients(m, m.lora.as_ref()?, o.dx.is_some()));
            o.modules.iter().filter_map(|m| of(&m.linear)).sum()
        }
        Op::Attention(o) => attention(&o.heads, 2.0),
        Op::AttentionBackward(o) => attention(&o.heads, 5.0),
        Op::LmHeadCe(o) => {
            let products = 1.0 + times(o.dx.is_some()) + times(o.grad.is_some());
            products * 2.0 * batch.num_items() as f64 * head(o.weight)
        }
        Op::LmHeadLogits(o) => 2.0 * if o.last_only { 1.0 } else { t } * head(o.weight),
        _ => 0.0,
    }
}

/// Visible (query, key) pairs: token p of a sequence sees p + 1 tokens, at most the window.
fn pairs(batch: &Batch, heads: &Heads) -> f64 {
    let window = heads.window.unwrap_or(usize::MAX);
    let one = |n: usize| {
        let w = n.min(window);
        // The first w tokens see 1 to w, the rest w each.
        (w * (w + 1) / 2 + (n - w) * w) as f64
    };
    batch.cu_seqlens.windows(2).map(|w| one((w[1] - w[0]) as usize)).sum()
}

/// Bytes that one run of a phase's program must move at least, by kind of operation: every tensor that an operation
/// touches once, activations in proportion to the batch's tokens, of an embedding table as many rows as there are tokens;
/// scratch and the key-value cache left out.
pub fn bytes_of_phase(plan: &MemoryPlan, phase: Phase, tokens: usize) -> BTreeMap<&'static str, f64> {
    let regions = plan.regions();
    let mut out = BTreeMap::new();
    for op in plan.program(phase) {
        let table = match op {
            Op::Embedding(o) => Some(o.table),
            Op::EmbeddingBackward(o) => Some(o.grad),
            _ => None,
        };
        let bytes = |id: TensorId| {
            let r = &regions[id.index()];
            let activation = matches!(r.lifetime, Lifetime::Within { .. }) && phase != Phase::Optimizer;
            let share = match r.stage {
                Stage::KvCache => 0.0,
                _ if (activation || table == Some(id)) && r.shape[0] > tokens => tokens as f64 / r.shape[0] as f64,
                _ => 1.0,
            };
            r.bytes() as f64 * share
        };
        *out.entry(op.name()).or_default() += op.tensors().into_iter().map(bytes).sum::<f64>();
    }
    out
}

/// The kinds of operation of a phase and how often each occurs.
pub fn calls_of_phase(plan: &MemoryPlan, phase: Phase) -> BTreeMap<&'static str, usize> {
    let mut out = BTreeMap::new();
    for op in plan.program(phase) {
        *out.entry(op.name()).or_default() += 1;
    }
    out
}
