//! Embedding, RMSNorm, rotary embedding, SwiGLU, and the operations around the optimizer.

use candle_core::{DType, Tensor};

use super::*;
use crate::data::Batch;
use crate::engine::ops::*;
use crate::engine::optimizer::{adamw, adamw_8bit};
use crate::model::Activation;

const TOLERANCE: f64 = 3e-6;

#[test]
fn embedding() {
    for t in TOKENS {
        for (v, c, scale) in [(33, 16, 1.0), (5, 130, 1.0), (9, 20, 4.5f32)] {
            let mut b = Bench::new(t);
            let (table, before, dout) = (b.random(v * c), b.random(v * c), b.random(t * c));
            let tokens: Vec<u32> = (0..t).map(|_| b.rng.random_range(0..v as u32)).collect();
            let (table_id, out) = (b.weight(&[v, c], &table), b.out(c));
            let (tokens_id, dout_id, grad) = (b.u32s(&tokens), b.act(c, &dout), b.weight(&[v, c], &before));
            let cpu = b.run(&[
                Op::Embedding(Embedding { table: table_id, tokens: tokens_id, out, scale }),
                Op::EmbeddingBackward(EmbeddingBackward { tokens: tokens_id, dout: dout_id, grad, scale }),
            ]);
            let w = var(&table, &[v, c]);
            let expected = (w.index_select(&ids(&tokens), 0).unwrap() * f64::from(scale)).unwrap();
            close("embedding", &rows(&cpu, out), &flat(&expected), if scale == 1.0 { 0.0 } else { 1e-7 });
            let [dw] = &gradients(&expected, &tensor(&dout, &[t, c]), &[&w])[..] else { unreachable!() };
            close("embedding gradient", &cpu.read(grad), &plus(&before, dw), TOLERANCE);
        }
    }
}

/// The residual sum and its norm.
fn rmsnorm(x: &Tensor, w: &Tensor) -> Tensor {
    let mean = x.sqr().unwrap().mean_keepdim(1).unwrap();
    let rstd = (mean + 1e-5).unwrap().sqrt().unwrap().recip().unwrap();
    x.broadcast_mul(&rstd).unwrap().broadcast_mul(w).unwrap()
}

#[test]
fn add_rmsnorm_and_its_gradient() {
    for t in TOKENS {
        for c in [8, 64, 100, 130] {
            for adds in [false, true] {
                for accumulate in [false, true] {
                    norm_case(t, c, adds, accumulate, 0.0);
                }
                norm_case(t, c, adds, true, 1.0);
            }
        }
    }
}

fn norm_case(t: usize, c: usize, adds: bool, accumulate: bool, offset: f32) {
    let what = format!("T {t}, C {c}, adds {adds}, accumulate {accumulate}, offset {offset}");
    let mut b = Bench::new(t);
    let (x, delta, w, dout) = (b.random(t * c), b.random(t * c), b.random(c), b.random(t * c));
    let (dx_before, dw_before) = (b.random(t * c), b.random(c));
    let (residual, delta_id, weight) = (b.act(c, &x), b.act(c, &delta), b.weight(&[c], &w));
    let (sum, out, again, rstd) = (b.out(c), b.out(c), b.out(c), b.out(1));
    let dout_id = b.act(c, &dout);
    let dx = if accumulate { b.act(c, &dx_before) } else { b.out(c) };
    let grad = b.weight(&[c], &dw_before);
    let normed = if adds { sum } else { residual };
    let cpu = b.run(&[
        Op::AddRmsnorm(AddRmsnorm {
            residual,
            delta: adds.then_some(delta_id),
            sum: adds.then_some(sum),
            weight,
            offset,
            out,
            rstd,
        }),
        Op::Rescale(Rescale { x: normed, rstd, weight, offset, out: again }),
        Op::RmsnormBackward(RmsnormBackward {
            dout: dout_id,
            x: normed,
            rstd,
            weight,
            offset,
            dx,
            accumulate,
            grad: Some(grad),
        }),
    ]);
    let (xv, wv) = (var(&x, &[t, c]), var(&w, &[c]));
    let input = if adds { (xv.as_tensor() + tensor(&delta, &[t, c])).unwrap() } else { xv.as_tensor().clone() };
    let expected = rmsnorm(&input, &(wv.as_tensor() + f64::from(offset)).unwrap());
    if adds {
        close(&what, &rows(&cpu, sum), &flat(&input), 1e-7);
    }
    close(&what, &rows(&cpu, out), &flat(&expected), TOLERANCE);
    assert_eq!(rows(&cpu, out), rows(&cpu, again), "{what}: the norm made again has other bits");
    let [gx, gw] = &gradients(&expected, &tensor(&dout, &[t, c]), &[&xv, &wv])[..] else { unreachable!() };
    let gx = if accumulate { plus(&dx_before, gx) } else { gx.clone() };
    close(&format!("{what} dx"), &rows(&cpu, dx), &gx, TOLERANCE);
    close(&format!("{what} dw"), &cpu.read(grad), &plus(&dw_before, gw), TOLERANCE);
}

#[test]
fn heads_are_normed_one_by_one() {
    for t in TOKENS {
        for (heads, d) in [(1, 16), (4, 24), (3, 10)] {
            let mut b = Bench::new(t);
            let (x, w, dout) = (b.random(t * heads * d), b.random(d), b.random(t * heads * d));
            let dw_before = b.random(d);
            let (residual, weight) = (b.act(heads * d, &x), b.weight(&[d], &w));
            let (out, rstd, dx) = (b.out(heads * d), b.out(heads), b.out(heads * d));
            let (dout_id, grad) = (b.act(heads * d, &dout), b.weight(&[d], &dw_before));
            let (delta, sum, offset, accumulate) = (None, None, 0.0, false);
            let grad_id = Some(grad);
            let cpu = b.run(&[
                Op::AddRmsnorm(AddRmsnorm { residual, delta, sum, weight, offset, out, rstd }),
                Op::RmsnormBackward(RmsnormBackward {
                    dout: dout_id,
                    x: residual,
                    rstd,
                    weight,
                    offset,
                    dx,
                    accumulate,
                    grad: grad_id,
                }),
            ]);
            let (xv, wv) = (var(&x, &[t * heads, d]), var(&w, &[d]));
            let expected = rmsnorm(&xv, &wv);
            close("heads", &rows(&cpu, out), &flat(&expected), TOLERANCE);
            let [gx, gw] = &gradients(&expected, &tensor(&dout, &[t * heads, d]), &[&xv, &wv])[..] else {
                unreachable!()
            };
            close("heads dx", &rows(&cpu, dx), gx, TOLERANCE);
            close("heads dw", &cpu.read(grad), &plus(&dw_before, gw), TOLERANCE);
        }
    }
}

#[test]
fn columns_are_split_and_joined() {
    for t in TOKENS {
        let mut b = Bench::new(t);
        let x = b.random(t * 35);
        let (whole, again) = (b.act(35, &x), b.out(35));
        let parts: Vec<TensorId> = [16, 8, 11].map(|n| b.out(n)).into();
        let cpu = b.run(&[
            Op::SplitColumns(SplitColumns { whole, parts: parts.clone() }),
            Op::JoinColumns(JoinColumns { parts: parts.clone(), whole: again }),
        ]);
        for (part, (first, n)) in parts.iter().zip([(0, 16), (16, 8), (24, 11)]) {
            let expected: Vec<f32> = x.chunks_exact(35).flat_map(|row| &row[first..first + n]).copied().collect();
            assert_eq!(rows(&cpu, *part), expected);
        }
        assert_eq!(rows(&cpu, again), x);
    }
}

/// transformers' `apply_rotary_pos_emb` on `[T, heads, D]`.
fn rotate(x: &Tensor, positions: &[u32], inv_freq: &[f32], heads: usize, d: usize) -> Tensor {
    let t = positions.len();
    let angles: Vec<f32> = positions.iter().flat_map(|p| inv_freq.iter().map(move |f| *p as f32 * f)).collect();
    let angles = tensor(&angles, &[t, 1, d / 2]);
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let x = x.reshape((t, heads, d)).unwrap();
    let (a, b) = (x.narrow(2, 0, d / 2).unwrap(), x.narrow(2, d / 2, d / 2).unwrap());
    let mul = |x: &Tensor, y: &Tensor| x.broadcast_mul(y).unwrap();
    let first = (mul(&a, &cos) - mul(&b, &sin)).unwrap();
    let second = (mul(&b, &cos) + mul(&a, &sin)).unwrap();
    Tensor::cat(&[first, second], 2).unwrap().reshape((t, heads * d)).unwrap()
}

#[test]
fn rotary_and_its_gradient() {
    for t in TOKENS {
        for (q, kv, dim) in [(6, 3, 16), (4, 1, 24), (1, 1, 80), (2, 2, 128), (1, 1, 256)] {
            let heads = Heads { q, kv, dim, window: None };
            let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
            for (inverse, scale) in [(false, 1.0f32), (true, 1.0), (false, 1.25), (true, 1.25)] {
                let mut b = Bench::new(t);
                // Two examples where there is room for them.
                let positions: Vec<u32> = (0..t as u32).map(|i| if i < 40 { i } else { i - 40 }).collect();
                let (x, y) = (b.random(t * q * dim), b.random(t * kv * dim));
                let (q_id, k_id, positions_id) = (b.act(q * dim, &x), b.act(kv * dim, &y), b.u32s(&positions));
                let inv_freq_id = b.weight(&[dim / 2], &inv_freq);
                let cpu = b.run(&[Op::Rotary(Rotary {
                    q: q_id,
                    k: k_id,
                    positions: positions_id,
                    inv_freq: inv_freq_id,
                    inverse,
                    scale,
                    heads,
                })]);
                for (id, data, n) in [(q_id, &x, q), (k_id, &y, kv)] {
                    let v = var(data, &[t, n * dim]);
                    let out = (rotate(&v, &positions, &inv_freq, n, dim) * f64::from(scale)).unwrap();
                    // The inverse rotation is the gradient of the rotation.
                    let expected = match inverse {
                        false => flat(&out),
                        true => gradients(&out, &tensor(data, &[t, n * dim]), &[&v]).remove(0),
                    };
                    close(&format!("T {t}, {heads:?}, inverse {inverse}"), &rows(&cpu, id), &expected, TOLERANCE);
                }
            }
        }
    }
}

/// GELU's tanh form, spelt out.
fn gelu(x: &Tensor) -> Tensor {
    let inner =
        ((x + (x.powf(3.0).unwrap() * 0.044715).unwrap()).unwrap() * (2.0 / std::f64::consts::PI).sqrt()).unwrap();
    ((x * 0.5).unwrap() * (inner.tanh().unwrap() + 1.0).unwrap()).unwrap()
}

#[test]
fn swiglu_and_its_gradient() {
    for t in TOKENS {
        for (f, activation) in
            [1, 33, 160, 1000].into_iter().flat_map(|f| [(f, Activation::Silu), (f, Activation::GeluTanh)])
        {
            let mut b = Bench::new(t);
            let (gate, up, dout) = (b.random(t * f), b.random(t * f), b.random(t * f));
            // Also where exp overflows and where it vanishes.
            let gate: Vec<f32> = gate.iter().enumerate().map(|(i, g)| if i % 7 == 0 { g * 60.0 } else { *g }).collect();
            let (gate_id, up_id, out, dout_id) = (b.act(f, &gate), b.act(f, &up), b.out(f), b.act(f, &dout));
            let cpu = b.run(&[
                Op::Swiglu(Swiglu { gate: gate_id, up: up_id, out, activation }),
                Op::SwigluBackward(SwigluBackward { gate: gate_id, up: up_id, dout: dout_id, activation }),
            ]);
            let (g, u) = (var(&gate, &[t, f]), var(&up, &[t, f]));
            let act = match activation {
                Activation::Silu => g.silu().unwrap(),
                Activation::GeluTanh => gelu(&g),
            };
            let expected = (act * u.as_tensor()).unwrap();
            close("swiglu", &rows(&cpu, out), &flat(&expected), TOLERANCE);
            let [dg, du] = &gradients(&expected, &tensor(&dout, &[t, f]), &[&g, &u])[..] else { unreachable!() };
            close("gate gradient", &rows(&cpu, gate_id), dg, TOLERANCE);
            close("up gradient", &rows(&cpu, up_id), du, TOLERANCE);
        }
    }
}

#[test]
fn batch_arrives_as_it_is() {
    let mut b = Bench::new(5);
    let (tokens, positions, cu_seqlens) = (b.u32s(&[0; 5]), b.u32s(&[0; 5]), b.u32s(&[0; 5]));
    let labels = b.region(DType::I32, &[8], &[0i32; 5]);
    let mut cpu = b.run(&[]);
    let batch = Batch {
        input_ids: vec![4, 9, 2],
        positions: vec![0, 1, 0],
        cu_seqlens: vec![0, 2, 3],
        labels: vec![9, -100, -100],
        examples: vec![0, 1],
    };
    cpu.batch = Some(batch);
    let op = LoadBatch { tokens, positions, labels: Some(labels), cu_seqlens };
    cpu.load_batch(&op).unwrap();
    assert_eq!(cpu.tokens, 3);
    assert_eq!(cpu.read::<u32>(tokens)[..3], [4, 9, 2]);
    assert_eq!(cpu.read::<u32>(positions)[..3], [0, 1, 0]);
    assert_eq!(cpu.read::<u32>(cu_seqlens)[..3], [0, 2, 3]);
    assert_eq!(cpu.read::<i32>(labels)[..3], [9, -100, -100]);
    assert!(cpu.load_batch(&op).unwrap_err().to_string().contains("no batch"));
}

#[test]
fn gradient_norm_clips_and_updates_follow() {
    let n = 5000;
    let mut b = Bench::new(1);
    let (p, g, small) = (b.random(n), b.random(n), b.random(3));
    let norm2: f64 = g.iter().chain(&small).map(|x| f64::from(*x).powi(2)).sum();
    let norm = norm2.sqrt();
    b.state.max_grad_norm = norm / 4.0;
    b.state.adamw = AdamWHyper { lr: 0.1, weight_decay: 0.5, step: 3, ..AdamWHyper::default() };
    let hyper = AdamWHyper { grad_scale: (norm / 4.0 / (norm + 1e-6)) as f32, ..b.state.adamw };
    let zeros = vec![0f32; n];
    let [p1, p2, p3] = [(); 3].map(|()| b.weight(&[n], &p));
    let (g_id, small_id) = (b.weight(&[n], &g), b.weight(&[3], &small));
    let [m1, v1, m2, v2] = [(); 4].map(|()| b.weight(&[n], &zeros));
    let blocks = n.div_ceil(256);
    let [s1, s2] = [(); 2].map(|()| b.region(DType::U8, &[n], &vec![0u8; n]));
    let [a1, a2] = [(); 2].map(|()| b.weight(&[blocks], &vec![0f32; blocks]));
    let norm_id = b.region(DType::F64, &[2], &[0f64; 2]);
    let f32_state = |exp_avg, exp_avg_sq| Moments::F32 { exp_avg, exp_avg_sq, bitsandbytes: false };
    let update =
        |param, moments, decay| Op::AdamW(AdamW { param, copy: None, grad: g_id, norm: norm_id, moments, decay });
    let cpu = b.run(&[
        Op::GradNorm(GradNorm { grads: vec![g_id, small_id], norm: norm_id }),
        update(p1, f32_state(m1, v1), true),
        update(p2, f32_state(m2, v2), false),
        update(p3, Moments::Blockwise8bit { state1: s1, absmax1: a1, state2: s2, absmax2: a2 }, true),
        Op::Zero(Zero { tensors: vec![small_id] }),
        Op::PageOut(PageOut { window: m1, host: m2 }),
    ]);
    let found = cpu.read::<f64>(norm_id);
    assert!((found[0] / norm - 1.0).abs() < 1e-12 && (found[1] - 0.25).abs() < 1e-5, "{found:?} {norm}");
    let expected = |hyper: &AdamWHyper| {
        let (mut p, mut m, mut v) = (p.clone(), zeros.clone(), zeros.clone());
        adamw(&mut p, &g, &mut m, &mut v, hyper);
        p
    };
    assert_eq!(cpu.read::<f32>(p1), expected(&hyper));
    assert_eq!(cpu.read::<f32>(p2), expected(&AdamWHyper { weight_decay: 0.0, ..hyper }));
    let (mut p, mut s, mut t) = (p.clone(), vec![0u8; n], vec![0u8; n]);
    let (mut a, mut c) = (vec![0f32; blocks], vec![0f32; blocks]);
    adamw_8bit(&mut p, &g, &mut s, &mut a, &mut t, &mut c, &hyper);
    assert_eq!(cpu.read::<f32>(p3), p);
    assert_eq!(cpu.read::<u8>(s1), s);
    assert_eq!(cpu.read::<f32>(small_id), [0.0; 3]);
    assert_eq!(cpu.read::<f32>(m1), cpu.read::<f32>(m2));
}

#[test]
fn a_gradient_norm_that_is_not_finite_is_an_error() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut b = Bench::new(1);
        let (g, norm) = (b.weight(&[2], &[1.0, bad]), b.region(DType::F64, &[2], &[0f64; 2]));
        let mut cpu = b.run(&[]);
        let error = cpu.grad_norm(&GradNorm { grads: vec![g], norm }, Scratch::default()).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
    }
}
