//! The output projection with its loss, in chunks, and logits.

use candle_core::{DType, Tensor};

use super::*;
use crate::data::IGNORE_INDEX;
use crate::engine::ops::*;

const TOLERANCE: f64 = 5e-6;
const SCALE: f32 = 1.0 / 37.0;

/// Sum of the cross-entropies of the rows that have a label.
fn loss(x: &Tensor, w: &Tensor, labels: &[i32], softcap: Option<f32>) -> Tensor {
    let kept: Vec<u32> = (0..labels.len() as u32).filter(|&t| labels[t as usize] != IGNORE_INDEX).collect();
    let targets: Vec<u32> = kept.iter().map(|&t| labels[t as usize] as u32).collect();
    let logits = x.index_select(&ids(&kept), 0).unwrap().matmul(&w.t().unwrap()).unwrap();
    let logits = capped(logits, softcap);
    let top = logits.max_keepdim(1).unwrap().detach();
    let sum = logits.broadcast_sub(&top).unwrap().exp().unwrap().sum_keepdim(1).unwrap();
    let lse = (sum.log().unwrap() + top).unwrap();
    let chosen = logits.gather(&ids(&targets).unsqueeze(1).unwrap(), 1).unwrap();
    (lse - chosen).unwrap().sum_all().unwrap()
}

fn capped(logits: Tensor, softcap: Option<f32>) -> Tensor {
    let Some(cap) = softcap.map(f64::from) else { return logits };
    ((logits / cap).unwrap().tanh().unwrap() * cap).unwrap()
}

fn check(t: usize, (v, c): (usize, usize), chunk: usize, (trains, head): (bool, bool), every: usize) {
    capped_check(t, (v, c), chunk, (trains, head), every, None);
}

fn capped_check(
    t: usize,
    (v, c): (usize, usize),
    chunk: usize,
    (trains, head): (bool, bool),
    every: usize,
    softcap: Option<f32>,
) {
    let what = format!("T {t}, V {v}, C {c}, chunk {chunk}, trains {trains} head {head}, every {every}th labelled");
    let mut b = Bench::new(t);
    b.state.loss_scale = SCALE;
    let (x, mut w, dw_before) = (b.random(t * c), b.random(v * c), b.random(v * c));
    // Logits of a few units, as a model's are.
    w.iter_mut().for_each(|w| *w *= 2.0 / (c as f32).sqrt());
    let labels: Vec<i32> = (0..t)
        .map(|i| if every > 0 && i % every == 0 { b.rng.random_range(0..v as i32) } else { IGNORE_INDEX })
        .collect();
    let labelled = labels.iter().filter(|l| **l != IGNORE_INDEX).count();
    let (x_id, weight) = (b.act(c, &x), b.weight(&[v, c], &w));
    let labels_id = b.region(DType::I32, &[t + SPARE], &labels);
    let dx = trains.then(|| b.out(c));
    let grad = head.then(|| b.weight(&[v, c], &dw_before));
    let loss_id = b.region(DType::F64, &[2], &[f64::NAN; 2]);
    let cpu = b.run(&[Op::LmHeadCe(LmHeadCe {
        x: x_id,
        weight,
        labels: labels_id,
        dx,
        grad,
        loss: loss_id,
        chunk,
        softcap,
    })]);
    let found = cpu.read::<f64>(loss_id);
    assert_eq!(found[1], labelled as f64, "{what}");
    if labelled == 0 {
        assert_eq!(found[0], 0.0, "{what}");
        assert!(dx.is_none_or(|dx| rows(&cpu, dx).iter().all(|g| *g == 0.0)), "{what}");
        assert!(grad.is_none_or(|g| cpu.read::<f32>(g) == dw_before), "{what}");
        return;
    }
    // Near the cap its slope is a difference of nearly equal numbers.
    let tolerance = if softcap.is_some() { 3e-5 } else { TOLERANCE };
    let (xv, wv) = (var(&x, &[t, c]), var(&w, &[v, c]));
    let expected = loss(&xv, &wv, &labels, softcap);
    close(&what, &[found[0] as f32], &flat(&expected), 1e-6);
    let g = gradients(&expected, &Tensor::new(f64::from(SCALE), &Device::Cpu).unwrap(), &[&xv, &wv]);
    if let Some(dx) = dx {
        close(&format!("{what} dx"), &rows(&cpu, dx), &g[0], tolerance);
    }
    if let Some(grad) = grad {
        close(&format!("{what} dw"), &cpu.read(grad), &plus(&dw_before, &g[1]), tolerance);
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    for t in TOKENS {
        for (v, c) in [(2, 8), (33, 16), (257, 64), (1001, 100)] {
            for chunk in [1, 7, 64, t + SPARE] {
                for every in [0, 1, 3] {
                    check(t, (v, c), chunk.min(t + SPARE), (true, true), every);
                }
            }
            check(t, (v, c), 7, (true, false), 2);
            check(t, (v, c), 7, (false, false), 2);
            for cap in [0.7, 3.0, 30.0] {
                capped_check(t, (v, c), 7, (true, true), 2, Some(cap));
            }
        }
    }
}

#[test]
fn a_sure_answer_costs_nothing_and_large_logits_do_not_overflow() {
    let (t, v, c) = (3, 33, 8);
    let mut b = Bench::new(t);
    let mut w = vec![0f32; v * c];
    w[5 * c] = 1000.0;
    let x: Vec<f32> = (0..t * c).map(|i| if i % c == 0 { 1.0 } else { 0.0 }).collect();
    let (x, weight) = (b.act(c, &x), b.weight(&[v, c], &w));
    let labels = b.region(DType::I32, &[t], &[5i32, 5, 4]);
    let (dx, loss) = (b.out(c), b.region(DType::F64, &[2], &[0f64; 2]));
    let cpu =
        b.run(&[Op::LmHeadCe(LmHeadCe { x, weight, labels, dx: Some(dx), grad: None, loss, chunk: 2, softcap: None })]);
    assert_eq!(cpu.read::<f64>(loss), [1000.0, 3.0]);
    assert!(rows(&cpu, dx).iter().all(|g| g.is_finite()));
}

#[test]
fn logits_of_all_and_of_the_last_token() {
    for t in TOKENS {
        let (v, c, softcap) = (257, 64, (t % 2 == 0).then_some(1.5f32));
        let mut b = Bench::new(t);
        let (x, w) = (b.random(t * c), b.random(v * c));
        let (x_id, weight) = (b.act(c, &x), b.weight(&[v, c], &w));
        let (some, one) = (b.region::<f32>(DType::F32, &[7, v], &[]), b.region::<f32>(DType::F32, &[1, v], &[]));
        let mut cpu = b.run(&[]);
        let logits = tensor(&x, &[t, c]).matmul(&tensor(&w, &[v, c]).t().unwrap()).unwrap();
        let expected = flat(&capped(logits, softcap));
        cpu.lm_head_logits(&LmHeadLogits { x: x_id, weight, logits: some, chunk: 7, last_only: false, softcap })
            .unwrap();
        close("all logits", &cpu.logits, &expected, TOLERANCE);
        cpu.lm_head_logits(&LmHeadLogits { x: x_id, weight, logits: one, chunk: 1, last_only: true, softcap }).unwrap();
        close("last logits", &cpu.logits, &expected[(t - 1) * v..], TOLERANCE);
    }
}
