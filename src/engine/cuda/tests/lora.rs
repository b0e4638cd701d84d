//! LoRA beside the input of several modules. The plain computation in bf16 is that of `linear.rs`: every product rounded.

use super::linear::{SCALING, TOLERANCE, base, scaled};
use super::*;
use crate::engine::dropout::dropout;
use crate::engine::ops::{
    AdaptedModule, Beside, Dequantize, Dropped, Linear, LinearBackward, LinearIds, Lora, LoraA, LoraB, LoraBackward,
    SplitColumns, Weight, low_rank_columns,
};
use crate::nf4::{Nf4Config, QuantType};

/// How the base weights are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    Dense,
    FourBit(Nf4Config),
    /// Decoded before the forward pass, with B beside them.
    Decoded(Nf4Config),
    /// So, and another B after that.
    Held(Nf4Config),
}

/// One module of a group.
struct Module {
    n: usize,
    linear: LinearIds,
    /// `[out, in]`, rounded to bf16.
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    grads: [Vec<f32>; 2],
    first: usize,
}

fn module(b: &mut Bench, (n, k): (usize, usize), r: usize, kept: Kept, p: f32, first: usize, number: u32) -> Module {
    b.part(format!("{n} x {k}, r {r}, {kept:?}, dropout {p}, module {number}"));
    let quant = match kept {
        Kept::Dense => None,
        Kept::FourBit(config) | Kept::Decoded(config) | Kept::Held(config) => Some(config),
    };
    let (weight, w) = base(b, (n, k), quant);
    let (a, bb) = (b.random(r * k), b.random(n * r));
    let grads = [b.random(r * k), b.random(n * r)];
    let lora = Lora {
        a: b.f32s("A", &[r, k], &a),
        b: b.f32s("B", &[n, r], &bb),
        grads: Some((b.f32s("grad A", &[r, k], &grads[0]), b.f32s("grad B", &[n, r], &grads[1]))),
        r,
        scaling: SCALING,
        dropout: p,
        module: number,
        magnitude: None,
    };
    let mut linear = LinearIds { out_features: n, in_features: k, weight, grad: None, bias: None, lora: Some(lora) };
    if matches!(kept, Kept::Decoded(_) | Kept::Held(_)) {
        // What is beyond the columns of B stays NaN, and nobody reads it.
        let beside = Beside { lora, first };
        let out = b.between("decoded", &[n, beside.row()], &[]);
        let mut before = beside;
        if matches!(kept, Kept::Held(_)) {
            let other = b.random(n * r);
            before.lora.b = b.f32s("B before", &[n, r], &other);
        }
        b.op(Op::Dequantize(Dequantize { weight, in_features: k, out, lora: Some(before) }));
        if matches!(kept, Kept::Held(_)) {
            b.op(Op::LoraB(LoraB { lora: beside, in_features: k, out }));
        }
        linear.weight = Weight::Dense { w: out };
    }
    Module { n, linear, w, a, b: bb, grads, first }
}

/// What the forward pass leaves for the gradients beside x.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Left {
    Nothing,
    DroppedInputs,
    /// The low-rank columns, which x has no longer.
    LowRank,
}

/// Modules of these widths and ranks side by side.
fn group(b: &mut Bench, k: usize, sizes: &[(usize, usize)], kept: Kept, p: f32, dx: bool) {
    group_of(b, k, sizes, kept, p, dx, Left::Nothing);
}

fn group_of(b: &mut Bench, k: usize, sizes: &[(usize, usize)], kept: Kept, p: f32, dx: bool, left: Left) {
    let t = b.tokens;
    let mut first = k;
    let mut modules = Vec::new();
    for (i, &(n, r)) in sizes.iter().enumerate() {
        modules.push(module(b, (n, k), r, kept, p, first, i as u32));
        first += low_rank_columns(r);
    }
    let row = first.next_multiple_of(64);
    b.part(format!("group of {sizes:?} at {k}, {kept:?}, dropout {p}, dx {dx}, left {left:?}"));
    let drop = |b: &Bench, x: &[f32], module: usize| {
        let mut x = x.to_vec();
        if p > 0.0 && b.state.training {
            dropout(&mut x, p, b.state.dropout_seed, b.state.micro_step, module as u32);
        }
        rounded(&x)
    };

    // Forward. Beside x: NaN until it is written.
    let x = b.random(t * k);
    let beside = |tail: &[f32]| -> Vec<f32> {
        x.chunks(k).zip(tail.chunks(row - k)).flat_map(|(x, tail)| [x, tail].concat()).collect()
    };
    let x_id = b.between("x", &[t + SPARE, row], &beside(&vec![f32::NAN; t * (row - k)]));
    let loras: Vec<Lora> = modules.iter().map(|m| m.linear.lora.unwrap()).collect();
    let adapters = modules.iter().zip(&loras).map(|(m, &lora)| Beside { lora, first: m.first }).collect();
    let dropped: Vec<Dropped> = modules
        .iter()
        .filter(|_| left == Left::DroppedInputs)
        .map(|_| {
            let input = b.between("dropped", &[t + SPARE, k], &[]);
            let mask = b.bytes::<u8>("mask", DType::U8, &[t + SPARE, k / 8], &[]);
            b.fields[mask.index()].unseen = true;
            Dropped { input, mask }
        })
        .collect();
    let kept_xa = (left == Left::LowRank).then(|| b.out("xa kept", first - k));
    let op = LoraA { x: x_id, in_features: k, adapters, dropped: dropped.clone(), kept: kept_xa };
    b.op(Op::LoraA(op));
    let mut all_xa = vec![Vec::new(); t];
    let mut parts = vec![b.out("x again", k)];
    b.want(parts[0], 0.0, Plain::Within(0.0));
    for (i, (m, lora)) in modules.iter().zip(&loras).enumerate() {
        let (n, r, columns) = (m.n, lora.r, low_rank_columns(lora.r));
        let xa = rounded(&product(&drop(b, &x, i), &transposed(&m.a, r, k), t, k, r));
        if b.state.adapter {
            let part = b.out("xa", columns);
            let padded: Vec<f32> = xa.chunks(r).flat_map(|xa| [xa, &vec![0.0; columns - r]].concat()).collect();
            all_xa.iter_mut().zip(padded.chunks(columns)).for_each(|(all, xa)| all.extend_from_slice(xa));
            b.want(part, TOLERANCE, Plain::Values(padded));
            parts.push(part);
        }
        let y = b.out("y", n);
        b.op(Op::Linear(Linear { linear: m.linear, x: x_id, y: Some(y), xa: None, beside: Some(m.first) }));
        let mut plain = rounded(&product(&x, &transposed(&m.w, n, k), t, k, n));
        if b.state.adapter {
            let through = rounded(&product(&xa, &transposed(&m.b, n, r), t, r, n));
            plain = rounded(&plus(&plain, &rounded(&scaled(&through, SCALING))));
        }
        b.want(y, TOLERANCE, Plain::Values(plain));
    }
    b.op(Op::SplitColumns(SplitColumns { whole: x_id, parts }));
    if let Some(kept) = kept_xa {
        b.want(kept, TOLERANCE, Plain::Values(all_xa.concat()));
    }
    if !b.state.adapter {
        return;
    }

    // Backward, from other numbers for the low-rank products.
    let tail = b.random(t * (row - k));
    let low_rank = (left == Left::LowRank).then(|| {
        let columns: Vec<f32> = tail.chunks(row - k).flat_map(|tail| &tail[..first - k]).copied().collect();
        b.act("xa again", first - k, &columns)
    });
    let x_id = match left {
        Left::LowRank => b.between("x again", &[t + SPARE, row], &beside(&vec![f32::NAN; t * (row - k)])),
        _ => b.act("x kept", row, &beside(&tail)),
    };
    let dx_id = dx.then(|| b.out("dx", k));
    let mut plain_dx = vec![0f32; t * k];
    let mut adapted = Vec::new();
    for (i, (m, lora)) in modules.iter().zip(&loras).enumerate() {
        let (n, r) = (m.n, lora.r);
        let dy = b.random(t * n);
        let dy_id = b.act("dy", n, &dy);
        adapted.push(AdaptedModule { linear: m.linear, first: m.first, dy: dy_id, dropped: dropped.get(i).copied() });
        let xa: Vec<f32> = tail.chunks(row - k).flat_map(|tail| &tail[m.first - k..][..r]).copied().collect();
        let scaled_dy = rounded(&scaled(&dy, SCALING));
        let dxa = rounded(&product(&scaled_dy, &m.b, t, n, r));
        let through = drop(b, &rounded(&product(&dxa, &m.a, t, r, k)), i);
        plain_dx = rounded(&plus(&plain_dx, &rounded(&product(&dy, &m.w, t, n, k))));
        plain_dx = rounded(&plus(&plain_dx, &through));
        let (grad_a, grad_b) = lora.grads.unwrap();
        let da = rounded(&product(&transposed(&dxa, t, r), &drop(b, &x, i), r, t, k));
        let db = rounded(&product(&transposed(&scaled_dy, t, n), &xa, n, t, r));
        b.want(grad_a, TOLERANCE, Plain::Values(plus(&m.grads[0], &da)));
        b.want(grad_b, TOLERANCE, Plain::Values(plus(&m.grads[1], &db)));
    }
    let op = LoraBackward { x: x_id, in_features: k, xa: low_rank, modules: adapted.clone(), dx: dx_id };
    b.op(Op::LoraBackward(op));
    let Some(dx) = dx_id else { return };
    for m in adapted {
        let linear = LinearIds { lora: None, ..m.linear };
        b.op(Op::LinearBackward(LinearBackward { linear, x: None, xa: None, dy: m.dy, dx: dx_id, accumulate: true }));
    }
    b.want(dx, TOLERANCE, Plain::Values(plain_dx));
}

const WIDTHS_IN: [usize; 3] = [48, 72, 264];

fn kinds() -> [Kept; 6] {
    let nested = Nf4Config::default();
    let plain = Nf4Config { double_quant: false, ..nested };
    let fp4 = Nf4Config { quant_type: QuantType::Fp4, blocksize: 128, ..plain };
    [
        Kept::Dense,
        Kept::FourBit(nested),
        Kept::FourBit(fp4),
        Kept::Decoded(nested),
        Kept::Decoded(plain),
        Kept::Held(nested),
    ]
}

#[test]
fn modules_that_share_their_input() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for k in WIDTHS_IN {
            for kept in kinds() {
                group(&mut b, k, &[(104, 16), (40, 3), (33, 8)], kept, 0.0, true);
                group(&mut b, k, &[(72, 8), (97, 12)], kept, 0.0, true);
                group(&mut b, k, &[(100, 5)], kept, 0.0, false);
                group_of(&mut b, k, &[(104, 16), (40, 3), (33, 8)], kept, 0.0, true, Left::LowRank);
            }
        }
        b.check();
    }
}

#[test]
fn modules_that_share_their_input_with_dropout() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        for training in [true, false] {
            let mut b = Bench::new(t);
            b.state.training = training;
            for kept in kinds() {
                group(&mut b, 72, &[(104, 16), (40, 3), (33, 8)], kept, 0.3, true);
                group(&mut b, 72, &[(100, 5)], kept, 0.3, false);
                // Kept, with a kernel of its own for dx where widths allow it: 128s of columns, 16s of ranks.
                group_of(&mut b, 72, &[(104, 16), (40, 3), (33, 8)], kept, 0.3, true, Left::DroppedInputs);
                group_of(&mut b, 256, &[(104, 16), (40, 15), (33, 80)], kept, 0.3, true, Left::DroppedInputs);
                group_of(&mut b, 128, &[(72, 64)], kept, 0.3, true, Left::DroppedInputs);
                group_of(&mut b, 128, &[(72, 32)], kept, 0.3, false, Left::DroppedInputs);
                group_of(&mut b, 72, &[(104, 16), (40, 3), (33, 8)], kept, 0.3, true, Left::LowRank);
            }
            b.check();
        }
    }
}

/// Decoding: one token, not in training, rows of whole 32s.
#[test]
fn one_token_beside() {
    if !gpu() {
        return;
    }
    let mut b = Bench::new(1);
    b.state.training = false;
    for k in [96, 4096] {
        for kept in [Kept::Dense, Kept::FourBit(Nf4Config::default())] {
            group(&mut b, k, &[(104, 16), (40, 3)], kept, 0.0, true);
        }
    }
    b.check();
}

#[test]
fn the_adapter_beside_can_be_off() {
    if !gpu() {
        return;
    }
    for t in [1, 65] {
        let mut b = Bench::new(t);
        b.state.adapter = false;
        b.state.training = false;
        for kept in [Kept::Dense, Kept::FourBit(Nf4Config::default())] {
            group(&mut b, 72, &[(104, 16), (40, 3)], kept, 0.0, true);
        }
        b.check();
    }
}
