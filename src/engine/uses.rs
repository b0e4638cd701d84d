//! Which tensors an operation touches: what the plan's lifetimes are read from.

use super::ops::{JoinColumns, Moments, Op, SplitColumns, TensorId, Weight};

impl Op {
    /// Every tensor that the operation reads or writes, in no particular order.
    pub fn tensors(&self) -> Vec<TensorId> {
        let mut ids = Vec::with_capacity(12);
        let mut add = |list: &[TensorId]| ids.extend_from_slice(list);
        match self {
            Op::LoadBatch(o) => {
                add(&[o.tokens, o.positions, o.cu_seqlens]);
                add(o.labels.as_slice());
            }
            Op::Embedding(o) => add(&[o.table, o.tokens, o.out]),
            Op::EmbeddingBackward(o) => add(&[o.tokens, o.dout, o.grad]),
            Op::AddRmsnorm(o) => {
                add(&[o.residual, o.weight, o.out, o.rstd]);
                add(o.delta.as_slice());
                add(o.sum.as_slice());
            }
            Op::Rescale(o) => add(&[o.x, o.rstd, o.weight, o.out]),
            Op::RmsnormBackward(o) => {
                add(&[o.dout, o.x, o.rstd, o.weight, o.dx]);
                add(o.grad.as_slice());
            }
            Op::Linear(o) => {
                add(&[o.x]);
                add(o.y.as_slice());
                add(o.xa.as_slice());
                if o.y.is_some() {
                    add(&weight_tensors(o.linear.weight));
                    add(o.linear.bias.map(|b| b.b).as_slice());
                }
                if let Some(lora) = &o.linear.lora {
                    add(&[lora.a, lora.b]);
                    add(lora.magnitude.map(|m| m.m).as_slice());
                }
            }
            Op::LinearBackward(o) => {
                add(&[o.dy]);
                for id in [o.x, o.xa, o.dx] {
                    add(id.as_slice());
                }
                if o.dx.is_some() || o.linear.lora.is_some_and(|l| l.magnitude.is_some()) {
                    add(&weight_tensors(o.linear.weight));
                }
                add(o.linear.grad.as_slice());
                add(o.linear.bias.and_then(|b| b.grad).as_slice());
                if let Some(lora) = &o.linear.lora {
                    add(&[lora.a, lora.b]);
                    if let Some(m) = lora.magnitude {
                        add(&[m.m]);
                        add(m.grad.as_slice());
                    }
                    if let Some((grad_a, grad_b)) = lora.grads {
                        add(&[grad_a, grad_b]);
                    }
                }
            }
            Op::LoraA(o) => {
                add(&[o.x]);
                o.adapters.iter().for_each(|m| add(&[m.lora.a]));
                o.dropped.iter().for_each(|d| add(&[d.input, d.mask]));
                add(o.kept.as_slice());
            }
            Op::LoraBackward(o) => {
                add(&[o.x]);
                add(o.xa.as_slice());
                add(o.dx.as_slice());
                for m in &o.modules {
                    add(&[m.dy]);
                    m.dropped.iter().for_each(|d| add(&[d.input, d.mask]));
                    // Where it is decoded, B is read beside it.
                    add(&weight_tensors(m.linear.weight));
                    if let Some(lora) = &m.linear.lora {
                        add(&[lora.a, lora.b]);
                        if let Some((grad_a, grad_b)) = lora.grads {
                            add(&[grad_a, grad_b]);
                        }
                    }
                }
            }
            Op::SplitColumns(SplitColumns { whole, parts }) | Op::JoinColumns(JoinColumns { whole, parts }) => {
                add(&[*whole]);
                add(parts);
            }
            Op::Rotary(o) => add(&[o.q, o.k, o.positions, o.inv_freq]),
            Op::Attention(o) => add(&[o.q, o.k, o.v, o.out, o.lse, o.cu_seqlens]),
            Op::AttentionBackward(o) => {
                add(&[o.q, o.k, o.v, o.out, o.lse, o.cu_seqlens, o.dout, o.dq, o.dk, o.dv]);
            }
            Op::CachedAttention(o) => add(&[o.q, o.k, o.v, o.out, o.k_cache, o.v_cache, o.positions]),
            Op::Swiglu(o) => add(&[o.gate, o.up, o.out]),
            Op::SwigluBackward(o) => add(&[o.gate, o.up, o.dout]),
            Op::LmHeadCe(o) => {
                add(&[o.x, o.weight, o.labels, o.loss]);
                add(o.dx.as_slice());
                add(o.grad.as_slice());
            }
            Op::LmHeadLogits(o) => add(&[o.x, o.weight, o.logits]),
            Op::GradNorm(o) => {
                add(&o.grads);
                add(&[o.norm]);
            }
            Op::AdamW(o) => {
                add(&[o.param, o.grad, o.norm]);
                add(o.copy.as_slice());
                match o.moments {
                    Moments::F32 { exp_avg, exp_avg_sq, .. } => add(&[exp_avg, exp_avg_sq]),
                    Moments::Blockwise8bit { state1, absmax1, state2, absmax2 } => {
                        add(&[state1, absmax1, state2, absmax2]);
                    }
                }
            }
            Op::PageIn(o) => add(&[o.host, o.window]),
            Op::PageOut(o) => add(&[o.host, o.window]),
            Op::Offload(o) => add(&[o.host, o.device]),
            Op::Fetch(o) => add(&[o.host, o.device]),
            Op::Transferred(o) => add(&[o.device]),
            Op::Dequantize(o) => {
                add(&weight_tensors(o.weight));
                add(&[o.out]);
                add(o.lora.map(|m| m.lora.b).as_slice());
            }
            Op::LoraB(o) => add(&[o.lora.lora.b, o.out]),
            Op::Zero(o) => add(&o.tensors),
        }
        ids
    }
}

/// The tensors that hold a linear module's base weight.
pub fn weight_tensors(weight: Weight) -> Vec<TensorId> {
    match weight {
        Weight::Dense { w } => vec![w],
        Weight::Nf4 { packed, absmax, nested, .. } => {
            let mut ids = vec![packed, absmax];
            ids.extend(nested.iter().flat_map(|n| [n.absmax, n.offset]));
            ids
        }
    }
}
