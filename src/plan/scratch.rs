//! The temporaries of each operation, in bytes: a pure function of the operation and the shapes, for each backend.

use candle_core::DType;

use super::DeviceKind;
use super::region::Region;
use crate::engine::cpu::linear::dora_len;
use crate::engine::cuda::scratch::{LinearScratch, LmHeadScratch, LoraScratch, grad_norm_bytes};
use crate::engine::ops::{LinearIds, Op, TensorId, Weight};

/// Bytes of scratch that `op` needs on `device`, with activations in `compute`.
pub fn scratch_bytes(op: &Op, regions: &[Region], device: DeviceKind, compute: DType) -> u64 {
    let bytes = match device {
        DeviceKind::Cpu => cpu(op, regions),
        DeviceKind::Cuda => cuda(op, regions, compute.size_in_bytes()),
    };
    bytes as u64
}

fn rows(regions: &[Region], id: TensorId) -> usize {
    regions[id.index()].shape[0]
}

fn width(regions: &[Region], id: TensorId) -> usize {
    regions[id.index()].numel() / rows(regions, id)
}

fn cuda(op: &Op, regions: &[Region], elem: usize) -> usize {
    let rows = |id| rows(regions, id);
    match op {
        Op::Linear(o) => LinearScratch::new(&o.linear, rows(o.x), elem, o.y.is_some(), false, o.low_rank()).total,
        Op::LinearBackward(o) => LinearScratch::new(&o.linear, rows(o.dy), elem, o.dx.is_some(), true, None).total,
        Op::LoraA(o) => LoraScratch::forward(o, rows(o.x), elem).total,
        Op::LoraBackward(o) => LoraScratch::backward(o, rows(o.x), elem).total,
        // Per token and head: the dot product of the output and its gradient.
        Op::AttentionBackward(o) => rows(o.q) * o.heads.q * 4,
        Op::LmHeadCe(o) => LmHeadScratch::new(o, rows(o.x), width(regions, o.x), rows(o.weight), elem).total,
        Op::GradNorm(o) => grad_norm_bytes(o.grads.len()),
        _ => 0,
    }
}

fn cpu(op: &Op, regions: &[Region]) -> usize {
    const F32: usize = 4;
    let rows = |id| rows(regions, id);
    match op {
        Op::Linear(o) => {
            let product = if o.y.is_some() { dequantized(&o.linear) } else { 0 };
            let dora = if o.y.is_some() { dora_len(&o.linear, rows(o.x), false) * F32 } else { 0 };
            product + dropped(&o.linear, rows(o.x)) + dora
        }
        Op::LinearBackward(o) => {
            let dora = dora_len(&o.linear, rows(o.dy), true) * F32;
            let product = if o.dx.is_some() || dora > 0 { dequantized(&o.linear) } else { 0 };
            let dxa = o.linear.lora.map_or(0, |l| rows(o.dy) * l.r * F32);
            product + dxa.next_multiple_of(64) + dropped(&o.linear, rows(o.dy)) + dora
        }
        // Per token and head: the dot product of the output and its gradient.
        Op::AttentionBackward(o) => rows(o.q) * o.heads.q * F32,
        // Which rows have a label, those rows, their logits and their gradients.
        Op::LmHeadCe(o) => {
            let (c, v) = (width(regions, o.x), rows(o.weight));
            let gradients = if o.dx.is_some() { o.chunk * c * F32 } else { 0 };
            (rows(o.x) * 4).next_multiple_of(64) + o.chunk * c * F32 + gradients + o.chunk * v * F32
        }
        _ => 0,
    }
}

/// A 4-bit weight becomes one matrix of f32.
fn dequantized(linear: &LinearIds) -> usize {
    match linear.weight {
        Weight::Dense { .. } => 0,
        Weight::Nf4 { .. } => (linear.out_features * linear.in_features * 4).next_multiple_of(64),
    }
}

/// The input with LoRA dropout applied, or the gradient before it.
fn dropped(linear: &LinearIds, tokens: usize) -> usize {
    match linear.lora {
        Some(lora) if lora.dropout > 0.0 => (tokens * linear.in_features * 4).next_multiple_of(64),
        _ => 0,
    }
}
