//! Logits are f32 in both dtypes. The plain computation rounds their gradient and what is written in bf16.

use rand::Rng;

use super::*;
use crate::engine::ops::{LmHeadCe, LmHeadLogits};

const TOLERANCE: f64 = 1e-5;
const SCALE: f32 = 1.0 / 37.0;

/// Logits of a few units, as a model's are.
fn weights(b: &mut Bench, v: usize, c: usize) -> Vec<f32> {
    let factor = 2.0 / (c as f32).sqrt();
    b.random(v * c).iter().map(|w| round(w * factor)).collect()
}

/// `dx` and what is added to `grad`.
fn plain(x: &[f32], w: &[f32], labels: &[i32], (v, c): (usize, usize), softcap: Option<f32>) -> (Vec<f32>, Vec<f32>) {
    let t = labels.len();
    let mut d = product(x, &transposed(w, v, c), t, c, v);
    for (row, &label) in d.chunks_exact_mut(v).zip(labels) {
        if label == IGNORE_INDEX {
            row.fill(0.0);
            continue;
        }
        if let Some(cap) = softcap {
            row.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        let slopes: Vec<f32> = row.iter().map(|x| softcap.map_or(1.0, |cap| 1.0 - (x / cap).powi(2))).collect();
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|x| *x = (*x - top).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|x| *x *= SCALE / sum);
        row[label as usize] -= SCALE;
        row.iter_mut().zip(&slopes).for_each(|(x, slope)| *x *= slope);
    }
    let d = rounded(&d);
    (rounded(&product(&d, w, t, v, c)), rounded(&product(&transposed(&d, t, v), x, v, t, c)))
}

fn case(b: &mut Bench, (v, c): (usize, usize), chunk: usize, trains: bool, head: bool) {
    capped_case(b, (v, c), chunk, trains, head, None);
}

fn capped_case(b: &mut Bench, (v, c): (usize, usize), chunk: usize, trains: bool, head: bool, softcap: Option<f32>) {
    b.part(format!("V {v}, C {c}, chunk {chunk}, trains {trains} head {head}, soft cap {softcap:?}"));
    let t = b.tokens;
    let (x, w, before) = (b.random(t * c), weights(b, v, c), b.random(v * c));
    let labels = b.batch.labels.clone();
    let (plain_dx, plain_grad) = plain(&x, &w, &labels, (v, c), softcap);
    let (x, weight) = (b.act("x", c, &x), b.elems("weight", &[v, c], &w));
    let dx = trains.then(|| b.out("dx", c));
    let grad = head.then(|| b.f32s("grad", &[v, c], &before));
    let loss = b.bytes("loss", DType::F64, &[2], &[f64::NAN; 2]);
    let labels = b.load.labels.unwrap();
    b.op(Op::LmHeadCe(LmHeadCe { x, weight, labels, dx, grad, loss, chunk, softcap }));
    b.want(loss, 1e-6, Plain::Within(1e-6));
    if let Some(dx) = dx {
        b.want(dx, TOLERANCE, Plain::Values(plain_dx));
    }
    if let Some(grad) = grad {
        b.want(grad, TOLERANCE, Plain::Values(plus(&before, &plain_grad)));
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        // No row has a label, every row, every third.
        for every in [0, 1, 3] {
            let mut b = Bench::new(t);
            b.state.loss_scale = SCALE;
            let labelled = |i: usize| every > 0 && i.is_multiple_of(every);
            b.batch.labels =
                (0..t).map(|i| if labelled(i) { b.rng.random_range(0..33) } else { IGNORE_INDEX }).collect();
            for shape in [(33, 48), (256, 72), (1001, 104), (1000, 33)] {
                for chunk in [1, 7, 64, t + SPARE] {
                    case(&mut b, shape, chunk.min(t + SPARE), true, true);
                }
                case(&mut b, shape, 7.min(t + SPARE), true, false);
                case(&mut b, shape, 7.min(t + SPARE), false, false);
                capped_case(&mut b, shape, 7.min(t + SPARE), true, true, Some(3.0));
            }
            b.check();
        }
    }
}

#[test]
fn a_sure_answer_costs_nothing_and_large_logits_do_not_overflow() {
    if !gpu() {
        return;
    }
    let (v, c) = (33, 8);
    let mut b = Bench::new(3);
    b.batch.labels = vec![5, 5, 4];
    let mut w = vec![0f32; v * c];
    w[5 * c] = 1000.0;
    let x: Vec<f32> = (0..3 * c).map(|i| if i % c == 0 { 1.0 } else { 0.0 }).collect();
    let (x, weight, dx) = (b.act("x", c, &x), b.elems("weight", &[v, c], &w), b.out("dx", c));
    let loss = b.bytes("loss", DType::F64, &[2], &[f64::NAN; 2]);
    let labels = b.load.labels.unwrap();
    b.op(Op::LmHeadCe(LmHeadCe { x, weight, labels, dx: Some(dx), grad: None, loss, chunk: 2, softcap: None }));
    b.want(loss, 0.0, Plain::Within(0.0));
    b.want(dx, TOLERANCE, Plain::Rounded);
    for done in b.check() {
        assert_eq!(done.values(loss), [1000.0, 3.0]);
    }
}

#[test]
fn logits_of_all_and_of_the_last_token() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        for (v, c) in [(33, 48), (1000, 104), (257, 33)] {
            for (chunk, last_only, softcap) in [(7, false, None), (1, true, None)] {
                let mut b = Bench::new(t);
                b.part(format!("V {v}, C {c}, last {last_only}"));
                let (x, w) = (b.random(t * c), b.random(v * c));
                let (x, weight) = (b.act("x", c, &x), b.elems("weight", &[v, c], &w));
                let logits = b.bytes::<f32>("logits", DType::F32, &[chunk, v], &[]);
                b.op(Op::LmHeadLogits(LmHeadLogits { x, weight, logits, chunk, last_only, softcap }));
                let cpu = b.on_cpu().logits;
                assert_eq!(cpu.len(), if last_only { v } else { t * v });
                // The region holds the last chunk, with what is left of the chunk before it.
                b.fields[logits.index()].used = chunk.min(t) * v;
                b.want(logits, TOLERANCE, Plain::Within(TOLERANCE));
                for done in b.check() {
                    assert_eq!(done.logits.len(), cpu.len());
                    let error = norm(done.logits.iter().zip(&cpu).map(|(a, b)| f64::from(a - b)));
                    assert!(error <= TOLERANCE * norm(cpu.iter().map(|x| f64::from(*x))), "{}: {error}", b.part);
                }
            }
        }
    }
}
