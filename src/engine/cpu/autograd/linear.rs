//! Linear modules: dense, trained, 4-bit, with and without LoRA and dropout.

use candle_core::{DType, Tensor};

use super::*;
use crate::engine::dropout::dropout;
use crate::engine::ops::*;
use crate::nf4::{Absmax, Nf4Config, QuantType, quantize_f32};

const TOLERANCE: f64 = 3e-6;

/// What a module is made of.
#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    out: usize,
    k: usize,
    quant: Option<Nf4Config>,
    /// Rank; 0: no adapter.
    r: usize,
    dropout: f32,
    accumulate: bool,
    trained: bool,
    bias: bool,
    /// Whether the gradient of the input is wanted.
    dx: bool,
}

impl Case {
    fn new(tokens: usize, (out, k): (usize, usize)) -> Self {
        Case {
            tokens,
            out,
            k,
            quant: None,
            r: 0,
            dropout: 0.0,
            accumulate: false,
            trained: false,
            bias: false,
            dx: true,
        }
    }
}

const SCALING: f32 = 1.75;

/// The base weight in the bench, and its values.
fn base(b: &mut Bench, case: &Case) -> (Weight, Vec<f32>) {
    let (n, k) = (case.out, case.k);
    let w = b.random(n * k);
    let Some(config) = case.quant else { return (Weight::Dense { w: b.weight(&[n, k], &w) }, w) };
    let q = quantize_f32(&w, &[n, k], DType::F32, config).unwrap();
    let packed = b.region(DType::U8, &[q.packed.len()], &q.packed);
    let (absmax, nested) = match &q.absmax {
        Absmax::F32(values) => (b.weight(&[values.len()], values), None),
        Absmax::Nested { codes, absmax, offset, .. } => {
            let nested = NestedAbsmax { absmax: b.weight(&[absmax.len()], absmax), offset: b.weight(&[1], &[*offset]) };
            (b.region(DType::U8, &[codes.len()], codes), Some(nested))
        }
    };
    (Weight::Nf4 { packed, absmax, nested, config }, q.dequantize_f32().unwrap())
}

fn check(case: Case) {
    let Case { tokens: t, out: n, k, r, .. } = case;
    let what = |part: &str| format!("{case:?} {part}");
    let mut b = Bench::new(t);
    let (weight, w) = base(&mut b, &case);
    let (x, dy, dx_before, dw_before) = (b.random(t * k), b.random(t * n), b.random(t * k), b.random(n * k));
    let (a, bb, da_before, db_before) = (b.random(r * k), b.random(n * r), b.random(r * k), b.random(n * r));
    let grad = case.trained.then(|| b.weight(&[n, k], &dw_before));
    let lora = (r > 0).then(|| Lora {
        a: b.weight(&[r, k], &a),
        b: b.weight(&[n, r], &bb),
        grads: Some((b.weight(&[r, k], &da_before), b.weight(&[n, r], &db_before))),
        r,
        scaling: SCALING,
        dropout: case.dropout,
        module: 9,
        magnitude: None,
    });
    let (bias_values, dbias_before) = (b.random(n), b.random(n));
    let bias = case
        .bias
        .then(|| Bias { b: b.weight(&[n], &bias_values), grad: case.trained.then(|| b.weight(&[n], &dbias_before)) });
    let linear = LinearIds { out_features: n, in_features: k, weight, grad, bias, lora };
    let (x_id, y, dy_id) = (b.act(k, &x), b.out(n), b.act(n, &dy));
    let (xa, xa_again) = (lora.map(|_| b.out(r)), lora.map(|_| b.out(r)));
    let dx = case.dx.then(|| if case.accumulate { b.act(k, &dx_before) } else { b.out(k) });
    let mut ops = vec![Op::Linear(Linear { linear, x: x_id, y: Some(y), xa, beside: None })];
    if lora.is_some() {
        ops.push(Op::Linear(Linear { linear, x: x_id, y: None, xa: xa_again, beside: None }));
    }
    let learns = lora.is_some() || grad.is_some();
    let x_kept = learns.then_some(x_id);
    ops.push(Op::LinearBackward(LinearBackward { linear, x: x_kept, xa, dy: dy_id, dx, accumulate: case.accumulate }));
    let (seed, micro_step) = (b.state.dropout_seed, b.state.micro_step);
    let cpu = b.run(&ops);

    let mut mask = vec![1f32; t * k];
    dropout(&mut mask, case.dropout, seed, micro_step, 9);
    assert_eq!(case.dropout > 0.0, mask.contains(&0.0), "{}", what("mask"));
    let (xv, wv) = (var(&x, &[t, k]), var(&w, &[n, k]));
    let product = |a: &Tensor, b: &Tensor| a.matmul(&b.t().unwrap()).unwrap();
    let mut expected = product(&xv, &wv);
    let bv = var(&bias_values, &[n]);
    if case.bias {
        expected = expected.broadcast_add(&bv).unwrap();
    }
    let pair = (r > 0).then(|| (var(&a, &[r, k]), var(&bb, &[n, r])));
    if let Some((av, bv)) = &pair {
        let inner = product(&(xv.as_tensor() * tensor(&mask, &[t, k])).unwrap(), av);
        close(&what("xa"), &rows(&cpu, xa.unwrap()), &flat(&inner), TOLERANCE);
        assert_eq!(rows(&cpu, xa.unwrap()), rows(&cpu, xa_again.unwrap()), "{}", what("xa again"));
        expected = (expected + (product(&inner, bv) * f64::from(SCALING)).unwrap()).unwrap();
    }
    close(&what("y"), &rows(&cpu, y), &flat(&expected), TOLERANCE);
    let mut leaves = vec![&xv, &wv];
    leaves.extend(pair.iter().flat_map(|(a, b)| [a, b]));
    leaves.extend(case.bias.then_some(&bv));
    let g = gradients(&expected, &tensor(&dy, &[t, n]), &leaves);
    if let Some(dx) = dx {
        let gx = if case.accumulate { plus(&dx_before, &g[0]) } else { g[0].clone() };
        close(&what("dx"), &rows(&cpu, dx), &gx, TOLERANCE);
    }
    if let Some(grad) = grad {
        close(&what("dw"), &cpu.read(grad), &plus(&dw_before, &g[1]), TOLERANCE);
    }
    if let Some(grad) = bias.and_then(|b| b.grad) {
        close(&what("db"), &cpu.read(grad), &plus(&dbias_before, g.last().unwrap()), TOLERANCE);
    }
    if let Some((da, db)) = lora.and_then(|l| l.grads) {
        close(&what("dA"), &cpu.read(da), &plus(&da_before, &g[2]), TOLERANCE);
        close(&what("dB"), &cpu.read(db), &plus(&db_before, &g[3]), TOLERANCE);
    }
}

/// Neither side is always a multiple of a register, a tile or a quantization block.
const SHAPES: [(usize, usize); 5] = [(1, 8), (24, 40), (130, 64), (97, 33), (260, 100)];

#[test]
fn dense_frozen_and_trained() {
    for t in TOKENS {
        for shape in SHAPES {
            for accumulate in [false, true] {
                for trained in [false, true] {
                    check(Case { accumulate, trained, ..Case::new(t, shape) });
                }
            }
            check(Case { trained: true, dx: false, ..Case::new(t, shape) });
            check(Case { trained: true, bias: true, ..Case::new(t, shape) });
            check(Case { r: 3, bias: true, ..Case::new(t, shape) });
        }
    }
}

#[test]
fn lora_on_a_dense_base() {
    for t in TOKENS {
        for shape in SHAPES {
            for r in [1, 3, 8] {
                for accumulate in [false, true] {
                    check(Case { r, accumulate, ..Case::new(t, shape) });
                }
            }
            check(Case { r: 3, dx: false, ..Case::new(t, shape) });
        }
    }
}

#[test]
fn lora_on_a_4_bit_base() {
    let plain = Nf4Config { double_quant: false, ..Nf4Config::default() };
    let fp4 = Nf4Config { quant_type: QuantType::Fp4, blocksize: 128, ..plain };
    for t in TOKENS {
        for shape in SHAPES {
            for quant in [Nf4Config::default(), plain, fp4] {
                for (r, accumulate, dx) in [(0, false, true), (3, true, true), (8, false, true), (1, false, false)] {
                    check(Case { quant: Some(quant), r, accumulate, dx, ..Case::new(t, shape) });
                }
            }
        }
    }
}

#[test]
fn lora_with_dropout() {
    for t in [7, 65, 130] {
        for shape in [(24, 40), (97, 33)] {
            for quant in [None, Some(Nf4Config::default())] {
                for accumulate in [false, true] {
                    check(Case { quant, r: 3, dropout: 0.3, accumulate, ..Case::new(t, shape) });
                }
            }
        }
    }
}

/// Forward pass of a module with dropout, in a state.
fn forward(change: impl Fn(&mut StepState)) -> Vec<f32> {
    let (t, n, k, r) = (7, 24, 40, 3);
    let mut b = Bench::new(t);
    let (x, w, a, bb) = (b.random(t * k), b.random(n * k), b.random(r * k), b.random(n * r));
    let weight = Weight::Dense { w: b.weight(&[n, k], &w) };
    let (a, bb) = (b.weight(&[r, k], &a), b.weight(&[n, r], &bb));
    let lora = Some(Lora { a, b: bb, grads: None, r, scaling: SCALING, dropout: 0.3, module: 9, magnitude: None });
    let (x, y, xa) = (b.act(k, &x), b.out(n), b.out(r));
    change(&mut b.state);
    let linear = LinearIds { out_features: n, in_features: k, weight, grad: None, bias: None, lora };
    let cpu = b.run(&[Op::Linear(Linear { linear, x, y: Some(y), xa: Some(xa), beside: None })]);
    rows(&cpu, y)
}

#[test]
fn dropout_is_off_in_evaluation_and_the_adapter_can_be_off() {
    let training = forward(|_| {});
    assert_eq!(training, forward(|_| {}), "the same step has the same masks");
    assert_ne!(training, forward(|s| s.micro_step += 1));
    assert_ne!(training, forward(|s| s.dropout_seed += 1));
    let evaluation = forward(|s| s.training = false);
    assert_ne!(training, evaluation);
    assert_eq!(evaluation, forward(|s| (s.training, s.micro_step) = (false, 77)));
    let base = forward(|s| s.adapter = false);
    assert_ne!(base, evaluation);
    // Over many masks the mean is what evaluation gives.
    let n = 4000;
    let mut mean = vec![0f64; training.len()];
    for i in 0..n {
        let y = forward(|s| s.micro_step = i);
        mean.iter_mut().zip(&y).for_each(|(m, y)| *m += f64::from(*y) / n as f64);
    }
    let adapter = |y: &[f64]| y.iter().zip(&base).map(|(y, b)| (y - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
    let evaluation: Vec<f64> = evaluation.iter().map(|x| f64::from(*x)).collect();
    let apart: f64 = mean.iter().zip(&evaluation).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    assert!(apart < 0.05 * adapter(&evaluation), "{apart} of {}", adapter(&evaluation));
}
