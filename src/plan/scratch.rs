//! The temporaries of each operation, in bytes: a pure function of the operation and the shapes, for each backend.

use candle_core::DType;

use super::region::Region;
use crate::engine::ops::{LinearIds, Op, TensorId, Weight};

/// Bytes of scratch that `op` needs, with activations in `compute` (F32: the CPU backend; BF16: a GPU).
pub fn scratch_bytes(op: &Op, regions: &[Region], compute: DType) -> u64 {
    let b = compute.size_in_bytes();
    let rows = |id: TensorId| regions[id.index()].shape[0];
    let width = |id: TensorId| regions[id.index()].numel() / rows(id);
    let bytes = match op {
        Op::Linear(o) => {
            let product = if o.y.is_some() { dequantized(&o.linear, b) } else { 0 };
            product + lora_casts(&o.linear, b) + dropped(&o.linear, rows(o.x), b)
        }
        Op::LinearBackward(o) => {
            let product = if o.dx.is_some() { dequantized(&o.linear, b) } else { 0 };
            let dxa = o.linear.lora.map_or(0, |l| rows(o.dy) * l.r * b);
            product + dxa.next_multiple_of(64) + lora_casts(&o.linear, b) + dropped(&o.linear, rows(o.dy), b)
        }
        // Per token and head: the dot product of the output and its gradient.
        Op::AttentionBackward(o) => rows(o.q) * o.heads.q * 4,
        // Gathered rows, their logits, their gradients, and which rows they are.
        Op::LmHeadCe(o) => {
            let (c, v) = (width(o.x), rows(o.weight));
            let gradients = if o.dx.is_some() { o.chunk * c * b } else { 0 };
            let rows = (rows(o.x) * 4).next_multiple_of(64);
            rows + o.chunk * c * b + gradients + o.chunk * v * 4
        }
        _ => 0,
    };
    bytes as u64
}

/// A 4-bit weight becomes one matrix of the compute dtype.
fn dequantized(linear: &LinearIds, b: usize) -> usize {
    match linear.weight {
        Weight::Dense { .. } => 0,
        Weight::Nf4 { .. } => (linear.out_features * linear.in_features * b).next_multiple_of(64),
    }
}

/// A and B are f32; 16-bit products read a 16-bit copy.
fn lora_casts(linear: &LinearIds, b: usize) -> usize {
    match linear.lora {
        Some(lora) if b == 2 => (lora.r * (linear.in_features + linear.out_features) * b).next_multiple_of(64),
        _ => 0,
    }
}

/// The input with LoRA dropout applied, or the gradient before it.
fn dropped(linear: &LinearIds, tokens: usize, b: usize) -> usize {
    match linear.lora {
        Some(lora) if lora.dropout > 0.0 => (tokens * linear.in_features * b).next_multiple_of(64),
        _ => 0,
    }
}
