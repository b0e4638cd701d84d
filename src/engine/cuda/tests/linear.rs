//! The plain computation in bf16 is PEFT's: the base product, both products of the adapter and the scaled result are each
//! rounded, and so is the sum. A and B are cast to bf16, a 4-bit weight is dequantized to bf16.

use super::*;
use crate::engine::dropout::dropout;
use crate::engine::ops::{Bias, Linear, LinearBackward, LinearIds, Lora, NestedAbsmax, Weight};
use crate::nf4::{Absmax, Nf4Config, QuantType, quantize_f32};

pub(super) const TOLERANCE: f64 = 1e-5;
pub(super) const SCALING: f32 = 1.75;
const MODULE: u32 = 9;

/// What a module is made of.
#[derive(Clone, Copy, Debug)]
struct Case {
    out: usize,
    k: usize,
    quant: Option<Nf4Config>,
    /// Rank; 0: no adapter.
    r: usize,
    dropout: f32,
    accumulate: bool,
    /// The weight is trained, its gradient f32 or elem.
    trained: Option<DType>,
    bias: bool,
    /// Whether the gradient of the input is wanted.
    dx: bool,
}

impl Case {
    fn new((out, k): (usize, usize)) -> Self {
        Case { out, k, quant: None, r: 0, dropout: 0.0, accumulate: false, trained: None, bias: false, dx: true }
    }
}

/// The base weight in the bench, and its values in bf16.
pub(super) fn base(b: &mut Bench, (n, k): (usize, usize), quant: Option<Nf4Config>) -> (Weight, Vec<f32>) {
    let w = b.random(n * k);
    let Some(config) = quant else { return (Weight::Dense { w: b.elems("weight", &[n, k], &w) }, w) };
    let q = quantize_f32(&w, &[n, k], DType::F32, config).unwrap();
    let packed = b.bytes("packed", DType::U8, &[q.packed.len()], &q.packed);
    let (absmax, nested) = match &q.absmax {
        Absmax::F32(values) => (b.f32s("absmax", &[values.len()], values), None),
        Absmax::Nested { codes, absmax, offset, .. } => {
            let nested = NestedAbsmax {
                absmax: b.f32s("nested absmax", &[absmax.len()], absmax),
                offset: b.f32s("offset", &[1], &[*offset]),
            };
            (b.bytes("absmax codes", DType::U8, &[codes.len()], codes), Some(nested))
        }
    };
    (Weight::Nf4 { packed, absmax, nested, config }, rounded(&q.dequantize_f32().unwrap()))
}

pub(super) fn scaled(x: &[f32], factor: f32) -> Vec<f32> {
    x.iter().map(|x| x * factor).collect()
}

fn case(b: &mut Bench, case: Case) {
    let (t, n, k, r) = (b.tokens, case.out, case.k, case.r);
    b.part(format!("{case:?}"));
    let drop = |b: &Bench, x: &[f32]| {
        let mut x = x.to_vec();
        if case.dropout > 0.0 && b.state.training {
            dropout(&mut x, case.dropout, b.state.dropout_seed, b.state.micro_step, MODULE);
        }
        rounded(&x)
    };
    let (weight, w) = base(b, (case.out, case.k), case.quant);
    let (x, dy, before, dw_before) = (b.random(t * k), b.random(t * n), b.random(t * k), b.random(n * k));
    let (a, bb, xa_kept) = (b.random(r * k), b.random(n * r), b.random(t * r));
    let (da_before, db_before) = (b.random(r * k), b.random(n * r));
    let grad = case.trained.map(|dtype| match dtype {
        DType::F32 => b.f32s("grad", &[n, k], &dw_before),
        _ => b.elems("grad in elem", &[n, k], &dw_before),
    });
    let lora = (r > 0).then(|| Lora {
        a: b.f32s("A", &[r, k], &a),
        b: b.f32s("B", &[n, r], &bb),
        grads: Some((b.f32s("grad A", &[r, k], &da_before), b.f32s("grad B", &[n, r], &db_before))),
        r,
        scaling: SCALING,
        dropout: case.dropout,
        module: MODULE,
        magnitude: None,
    });
    let (bias_values, dbias_before) = (b.random(n), b.random(n));
    let bias = case.bias.then(|| Bias {
        b: b.elems("bias", &[n], &bias_values),
        grad: case.trained.map(|dtype| match dtype {
            DType::F32 => b.f32s("bias grad", &[n], &dbias_before),
            _ => b.elems("bias grad in elem", &[n], &dbias_before),
        }),
    });
    let linear = LinearIds { out_features: n, in_features: k, weight, grad, bias, lora };
    let with_adapter = lora.is_some() && b.state.adapter;

    // Forward.
    let plain_xa = rounded(&product(&drop(b, &x), &transposed(&a, r, k), t, k, r));
    let mut plain_y = rounded(&product(&x, &transposed(&w, n, k), t, k, n));
    if case.bias {
        let repeated: Vec<f32> = (0..t * n).map(|i| bias_values[i % n]).collect();
        plain_y = rounded(&plus(&plain_y, &repeated));
    }
    if with_adapter {
        let through = rounded(&product(&plain_xa, &transposed(&bb, n, r), t, r, n));
        plain_y = rounded(&plus(&plain_y, &rounded(&scaled(&through, SCALING))));
    }
    let (x_id, y) = (b.act("x", k, &x), b.out("y", n));
    let (xa, xa_alone) = (lora.map(|_| b.out("xa", r)), lora.map(|_| b.out("xa alone", r)));
    b.op(Op::Linear(Linear { linear, x: x_id, y: Some(y), xa, beside: None }));
    b.want(y, TOLERANCE, Plain::Values(plain_y));
    if with_adapter {
        b.op(Op::Linear(Linear { linear, x: x_id, y: None, xa: xa_alone, beside: None }));
        for xa in [xa, xa_alone].into_iter().flatten() {
            b.want(xa, TOLERANCE, Plain::Values(plain_xa.clone()));
        }
    }

    // Backward, from other numbers for xa.
    let dy_id = b.act("dy", n, &dy);
    let xa = lora.map(|_| b.act("xa kept", r, &xa_kept));
    let dx = case.dx.then(|| if case.accumulate { b.act("dx", k, &before) } else { b.out("dx", k) });
    let learns = lora.is_some() || grad.is_some();
    let x_kept = learns.then_some(x_id);
    b.op(Op::LinearBackward(LinearBackward { linear, x: x_kept, xa, dy: dy_id, dx, accumulate: case.accumulate }));
    let scaled_dy = rounded(&scaled(&dy, SCALING));
    let plain_dxa = rounded(&product(&scaled_dy, &bb, t, n, r));
    if let Some(dx) = dx {
        let mut plain = rounded(&product(&dy, &w, t, n, k));
        if r > 0 {
            let through = drop(b, &rounded(&product(&plain_dxa, &a, t, r, k)));
            plain = rounded(&plus(&plain, &through));
        }
        if case.accumulate {
            plain = rounded(&plus(&plain, &before));
        }
        b.want(dx, TOLERANCE, Plain::Values(plain));
    }
    if let Some(grad) = grad {
        let dw = rounded(&product(&transposed(&dy, t, n), &x, n, t, k));
        let sum = plus(&dw_before, &dw);
        let sum = if case.trained == Some(DType::F32) { sum } else { rounded(&sum) };
        b.want(grad, TOLERANCE, Plain::Values(sum));
    }
    if let Some(grad) = bias.and_then(|b| b.grad) {
        let exact = case.trained == Some(DType::F32);
        b.want(grad, TOLERANCE, if exact { Plain::Within(TOLERANCE) } else { Plain::Rounded });
    }
    if let Some((grad_a, grad_b)) = lora.and_then(|l| l.grads) {
        let da = rounded(&product(&transposed(&plain_dxa, t, r), &drop(b, &x), r, t, k));
        let db = rounded(&product(&transposed(&scaled_dy, t, n), &xa_kept, n, t, r));
        b.want(grad_a, TOLERANCE, Plain::Values(plus(&da_before, &da)));
        b.want(grad_b, TOLERANCE, Plain::Values(plus(&db_before, &db)));
    }
}

/// Neither side is always a multiple of a tile, of a vector, or of a quantization block.
const SHAPES: [(usize, usize); 5] = [(48, 72), (104, 48), (72, 104), (260, 100), (97, 33)];

#[test]
fn dense_frozen_and_trained() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for shape in SHAPES {
            for accumulate in [false, true] {
                for trained in [None, Some(DType::F32), Some(DType::BF16)] {
                    case(&mut b, Case { accumulate, trained, ..Case::new(shape) });
                }
            }
            case(&mut b, Case { trained: Some(DType::F32), dx: false, ..Case::new(shape) });
            for trained in [Some(DType::F32), Some(DType::BF16)] {
                case(&mut b, Case { trained, bias: true, ..Case::new(shape) });
            }
            case(&mut b, Case { r: 8, bias: true, ..Case::new(shape) });
        }
        b.check();
    }
}

#[test]
fn lora_on_a_dense_base() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for shape in SHAPES {
            for r in [1, 3, 8, 16] {
                // One rounded number alone may be off by more than twice what another is.
                if r * t == 1 {
                    continue;
                }
                for accumulate in [false, true] {
                    case(&mut b, Case { r, accumulate, ..Case::new(shape) });
                }
            }
            case(&mut b, Case { r: 3, dx: false, ..Case::new(shape) });
        }
        b.check();
    }
}

#[test]
fn lora_on_a_4_bit_base() {
    if !gpu() {
        return;
    }
    let plain = Nf4Config { double_quant: false, ..Nf4Config::default() };
    let fp4 = Nf4Config { quant_type: QuantType::Fp4, blocksize: 128, ..plain };
    for t in TOKENS {
        let mut b = Bench::new(t);
        for shape in SHAPES {
            for quant in [Nf4Config::default(), plain, fp4] {
                for (r, accumulate, dx) in [(0, false, true), (3, true, true), (8, false, true), (16, false, false)] {
                    case(&mut b, Case { quant: Some(quant), r, accumulate, dx, ..Case::new(shape) });
                }
            }
        }
        b.check();
    }
}

/// Decoding: one token, not in training, rows of whole 32s.
#[test]
fn one_token() {
    if !gpu() {
        return;
    }
    let plain = Nf4Config { double_quant: false, ..Nf4Config::default() };
    let small = Nf4Config { blocksize: 32, ..Nf4Config::default() };
    let fp4 = Nf4Config { quant_type: QuantType::Fp4, blocksize: 4096, ..plain };
    for adapter in [true, false] {
        let mut b = Bench::new(1);
        b.state.training = false;
        b.state.adapter = adapter;
        for (n, k) in [(48, 64), (97, 96), (33, 32), (260, 1024), (40, 4096), (5000, 224), (40, 14336)] {
            for quant in [Some(Nf4Config::default()), Some(plain), Some(small), Some(fp4), None] {
                for r in [0, 3, 64] {
                    one(&mut b, (n, k), quant, r);
                }
            }
        }
        b.check();
    }
}

fn one(b: &mut Bench, (n, k): (usize, usize), quant: Option<Nf4Config>, r: usize) {
    let case = Case { quant, r, ..Case::new((n, k)) };
    b.part(format!("{case:?}"));
    let (weight, w) = base(b, (case.out, case.k), case.quant);
    let (x, a, bb) = (b.random(k), b.random(r * k), b.random(n * r));
    let lora = (r > 0).then(|| {
        let (a, b) = (b.f32s("A", &[r, k], &a), b.f32s("B", &[n, r], &bb));
        Lora { a, b, grads: None, r, scaling: SCALING, dropout: 0.0, module: MODULE, magnitude: None }
    });
    let mut plain = rounded(&product(&x, &transposed(&w, n, k), 1, k, n));
    if r > 0 && b.state.adapter {
        let xa = rounded(&product(&x, &transposed(&a, r, k), 1, k, r));
        plain = rounded(&plus(
            &plain,
            &rounded(&scaled(&rounded(&product(&xa, &transposed(&bb, n, r), 1, r, n)), SCALING)),
        ));
    }
    let linear = LinearIds { out_features: n, in_features: k, weight, bias: None, grad: None, lora };
    let (x, y, xa) = (b.act("x", k, &x), b.out("y", n), lora.map(|_| b.out("xa", r)));
    b.op(Op::Linear(Linear { linear, x, y: Some(y), xa, beside: None }));
    b.want(y, TOLERANCE, Plain::Values(plain));
    if let Some(xa) = xa.filter(|_| b.state.adapter) {
        // Three numbers alone can be off by more than twice what others are.
        b.want(xa, TOLERANCE, Plain::Within(3e-2));
    }
}

/// Modules of one token that share their input share launches: up to three, of other widths, with a bias or without, some adapted.
#[test]
fn siblings_of_one_token() {
    if !gpu() {
        return;
    }
    let mut b = Bench::new(1);
    b.state.training = false;
    for quant in [Some(Nf4Config::default()), None] {
        b.part(format!("{quant:?}"));
        let (k, r) = (256, 8);
        let values = b.random(k);
        let x = b.act("x", k, &values);
        for (i, n) in [40, 17, 300, 9, 64].into_iter().enumerate() {
            let (weight, w) = base(&mut b, (n, k), quant);
            let mut plain = rounded(&product(&values, &transposed(&w, n, k), 1, k, n));
            let (a, bb) = (b.random(r * k), b.random(n * r));
            // The fourth has its own low-rank product, before which those that wait are launched.
            let adapted = i == 3;
            let lora = adapted.then(|| {
                let (a, b) = (b.f32s("A", &[r, k], &a), b.f32s("B", &[n, r], &bb));
                Lora { a, b, grads: None, r, scaling: SCALING, dropout: 0.0, module: MODULE, magnitude: None }
            });
            if adapted {
                let xa = rounded(&product(&values, &transposed(&a, r, k), 1, k, r));
                let through = rounded(&scaled(&rounded(&product(&xa, &transposed(&bb, n, r), 1, r, n)), SCALING));
                plain = rounded(&plus(&plain, &through));
            }
            let bias = (i % 2 == 1).then(|| b.random(n));
            if let Some(bias) = &bias {
                plain = rounded(&plus(&plain, bias));
            }
            let bias = bias.map(|values| Bias { b: b.elems("bias", &[n], &values), grad: None });
            let linear = LinearIds { out_features: n, in_features: k, weight, bias, grad: None, lora };
            let (y, xa) = (b.out("y", n), lora.map(|_| b.out("xa", r)));
            b.op(Op::Linear(Linear { linear, x, y: Some(y), xa, beside: None }));
            b.want(y, TOLERANCE, Plain::Values(plain));
            if let Some(xa) = xa {
                b.want(xa, TOLERANCE, Plain::Within(3e-2));
            }
        }
    }
    b.check();
}

#[test]
fn lora_with_dropout() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        for training in [true, false] {
            let mut b = Bench::new(t);
            b.state.training = training;
            for shape in SHAPES {
                for quant in [None, Some(Nf4Config::default())] {
                    for accumulate in [false, true] {
                        case(&mut b, Case { quant, r: 8, dropout: 0.3, accumulate, ..Case::new(shape) });
                    }
                }
            }
            b.check();
        }
    }
}

#[test]
fn the_adapter_can_be_off() {
    if !gpu() {
        return;
    }
    let (t, n, k, r) = (65, 48, 72, 8);
    let mut b = Bench::new(t);
    b.state.adapter = false;
    b.state.training = false;
    let (x, w, a, bb) = (b.random(t * k), b.random(n * k), b.random(r * k), b.random(n * r));
    let weight = Weight::Dense { w: b.elems("weight", &[n, k], &w) };
    let (a, bb) = (b.f32s("A", &[r, k], &a), b.f32s("B", &[n, r], &bb));
    let lora = Some(Lora { a, b: bb, grads: None, r, scaling: SCALING, dropout: 0.0, module: MODULE, magnitude: None });
    let (x, y, xa) = (b.act("x", k, &x), b.out("y", n), b.out("xa", r));
    let linear = LinearIds { out_features: n, in_features: k, weight, grad: None, bias: None, lora };
    // xa is not written.
    b.op(Op::Linear(Linear { linear, x, y: Some(y), xa: Some(xa), beside: None }));
    b.want(y, TOLERANCE, Plain::Rounded);
    b.check();
}
