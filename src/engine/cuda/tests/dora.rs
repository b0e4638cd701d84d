//! DoRA. The plain computation in bf16 is PEFT's: `B A` and its sum with W are rounded before their rows are measured, and what is
//! scaled is rounded before and after.

use super::linear::{SCALING, TOLERANCE, base, scaled};
use super::*;
use crate::engine::ops::{Linear, LinearBackward, LinearIds, Lora, Magnitude};
use crate::nf4::Nf4Config;

fn case(b: &mut Bench, (n, k): (usize, usize), quant: Option<Nf4Config>, r: usize, accumulate: bool, dx: bool) {
    let t = b.tokens;
    b.part(format!("{n} x {k}, {quant:?}, r {r}, accumulate {accumulate}, dx {dx}"));
    let (weight, w) = base(b, (n, k), quant);
    let (x, dy, before) = (b.random(t * k), b.random(t * n), b.random(t * k));
    let (a, bb, xa_kept) = (b.random(r * k), b.random(n * r), b.random(t * r));
    let m: Vec<f32> = b.random(n).iter().map(|x| (x + 3.0) * (k as f32).sqrt()).collect();
    let (da_before, db_before, dm_before) = (b.random(r * k), b.random(n * r), b.random(n));
    let lora = Lora {
        a: b.f32s("A", &[r, k], &a),
        b: b.f32s("B", &[n, r], &bb),
        grads: Some((b.f32s("grad A", &[r, k], &da_before), b.f32s("grad B", &[n, r], &db_before))),
        r,
        scaling: SCALING,
        dropout: 0.0,
        module: 3,
        magnitude: Some(Magnitude {
            m: b.f32s("magnitudes", &[n], &m),
            grad: Some(b.f32s("grad magnitudes", &[n], &dm_before)),
        }),
    };
    let linear = LinearIds { out_features: n, in_features: k, weight, grad: None, bias: None, lora: Some(lora) };
    let low = rounded(&scaled(&rounded(&product(&bb, &a, n, r, k)), SCALING));
    let v = rounded(&plus(&w, &low));
    let inverse: Vec<f32> = v.chunks(k).map(|row| 1.0 / row.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
    let by_column = |x: &[f32], factor: &dyn Fn(usize) -> f32| -> Vec<f32> {
        x.iter().enumerate().map(|(i, x)| x * factor(i % n)).collect()
    };
    let scale = |o: usize| m[o] * inverse[o];
    let apart = |xa: &[f32]| {
        let through = rounded(&scaled(&rounded(&product(xa, &transposed(&bb, n, r), t, r, n)), SCALING));
        rounded(&plus(&rounded(&product(&x, &transposed(&w, n, k), t, k, n)), &through))
    };

    let plain_xa = rounded(&product(&x, &transposed(&a, r, k), t, k, r));
    let plain_y = rounded(&by_column(&apart(&plain_xa), &scale));
    let (x_id, y, xa) = (b.act("x", k, &x), b.out("y", n), b.out("xa", r));
    b.op(Op::Linear(Linear { linear, x: x_id, y: Some(y), xa: Some(xa), beside: None }));
    b.want(y, TOLERANCE, Plain::Values(plain_y));
    b.want(xa, TOLERANCE, Plain::Values(plain_xa));

    // Backward, from other numbers for xa.
    let dy_id = b.act("dy", n, &dy);
    let xa = Some(b.act("xa kept", r, &xa_kept));
    let dx = dx.then(|| if accumulate { b.act("dx", k, &before) } else { b.out("dx", k) });
    b.op(Op::LinearBackward(LinearBackward { linear, x: Some(x_id), xa, dy: dy_id, dx, accumulate }));
    let g = rounded(&by_column(&dy, &scale));
    let scaled_g = rounded(&scaled(&g, SCALING));
    let plain_dxa = rounded(&product(&scaled_g, &bb, t, n, r));
    if let Some(dx) = dx {
        let mut plain = rounded(&product(&g, &w, t, n, k));
        plain = rounded(&plus(&plain, &rounded(&product(&plain_dxa, &a, t, r, k))));
        if accumulate {
            plain = rounded(&plus(&plain, &before));
        }
        b.want(dx, TOLERANCE, Plain::Values(plain));
    }
    let (grad_a, grad_b) = lora.grads.unwrap();
    let da = rounded(&product(&transposed(&plain_dxa, t, r), &x, r, t, k));
    let db = rounded(&product(&transposed(&scaled_g, t, n), &xa_kept, n, t, r));
    b.want(grad_a, TOLERANCE, Plain::Values(plus(&da_before, &da)));
    b.want(grad_b, TOLERANCE, Plain::Values(plus(&db_before, &db)));
    let z = apart(&xa_kept);
    let mut dm = dm_before.clone();
    for (dy, z) in dy.chunks(n).zip(z.chunks(n)) {
        for (o, dm) in dm.iter_mut().enumerate() {
            *dm += round(dy[o] * z[o]) * inverse[o];
        }
    }
    b.want(lora.magnitude.unwrap().grad.unwrap(), TOLERANCE, Plain::Values(dm));
}

#[test]
fn rows_get_their_learnt_lengths() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for shape in [(48, 72), (104, 48), (260, 100), (97, 33)] {
            for quant in [None, Some(Nf4Config::default())] {
                for (r, accumulate, dx) in [(3, true, true), (8, false, true), (16, false, false)] {
                    case(&mut b, shape, quant, r, accumulate, dx);
                }
            }
        }
        b.check();
    }
}
