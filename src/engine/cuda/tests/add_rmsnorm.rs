//! In bf16 the sum is rounded, and everything after it is computed from the rounded sum: the plain computation's
//! roundings are the sum's and the output's.

use super::*;
use crate::engine::ops::{AddRmsnorm, Rescale, RmsnormBackward};

const TOLERANCE: f64 = 3e-6;
const EPS: f32 = 1e-5;

fn widths() -> impl Iterator<Item = usize> {
    WIDTHS.into_iter().chain([8, 2056, 4100])
}

/// `1 / sqrt(mean(x^2) + eps)` of each row.
fn rstds(x: &[f32], c: usize) -> Vec<f32> {
    x.chunks_exact(c).map(|row| 1.0 / (row.iter().map(|x| x * x).sum::<f32>() / c as f32 + EPS).sqrt()).collect()
}

#[test]
fn sum_and_norm() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        let mut same = Vec::new();
        for c in widths() {
            for (adds, offset) in [(false, 0.0), (true, 0.0), (true, 1.0)] {
                b.part(format!("C {c}, adds {adds}, offset {offset}"));
                let (x, d, w) = (b.random(t * c), b.random(t * c), b.random(c));
                let residual = b.act("residual", c, &x);
                let delta = adds.then(|| b.act("delta", c, &d));
                let sum = adds.then(|| b.out("sum", c));
                let weight = b.elems("weight", &[c], &w);
                let (out, again, rstd) = (b.out("out", c), b.out("out again", c), b.out_f32("rstd", 1));
                b.op(Op::AddRmsnorm(AddRmsnorm { residual, delta, sum, weight, offset, out, rstd }));
                b.op(Op::Rescale(Rescale { x: sum.unwrap_or(residual), rstd, weight, offset, out: again }));
                let x = if adds { rounded(&plus(&x, &d)) } else { x };
                let scales = rstds(&x, c);
                let plain: Vec<f32> = (0..t * c).map(|i| round(x[i] * scales[i / c] * (w[i % c] + offset))).collect();
                if let Some(sum) = sum {
                    b.want(sum, 0.0, Plain::Rounded);
                }
                // No element of the sum is off by more than 2^-9 of itself.
                b.want(rstd, TOLERANCE, Plain::Within(if adds { 2e-3 } else { TOLERANCE }));
                b.want(out, TOLERANCE, Plain::Values(plain.clone()));
                b.want(again, TOLERANCE, Plain::Values(plain));
                same.push((out, again));
            }
        }
        for done in b.check() {
            for &(out, again) in &same {
                assert!(
                    done.regions[out.index()] == done.regions[again.index()],
                    "{}: the norm made again has other bits",
                    b.fields[out.index()].name
                );
            }
        }
    }
}

#[test]
fn gradient() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for c in widths() {
            for (accumulate, trained, offset) in
                [(false, false, 0.0), (true, false, 0.0), (true, true, 0.0), (true, true, 1.0)]
            {
                b.part(format!("C {c}, accumulate {accumulate}, trained {trained}, offset {offset}"));
                let (x, w, dout, before) = (b.random(t * c), b.random(c), b.random(t * c), b.random(t * c));
                let (rstd, grad_before) = (rstds(&x, c), b.random(c));
                let (x, dout) = (b.act("x", c, &x), b.act("dout", c, &dout));
                let (weight, rstd) = (b.elems("weight", &[c], &w), b.f32s("rstd", &[t], &rstd));
                let dx = if accumulate { b.act("dx", c, &before) } else { b.out("dx", c) };
                let grad = trained.then(|| b.f32s("grad", &[c], &grad_before));
                b.op(Op::RmsnormBackward(RmsnormBackward { dout, x, rstd, weight, offset, dx, accumulate, grad }));
                b.want(dx, TOLERANCE, Plain::Rounded);
                if let Some(grad) = grad {
                    b.want(grad, TOLERANCE, Plain::Within(TOLERANCE));
                    let elem = b.elems("grad in elem", &[c], &grad_before);
                    let unused = b.out("dx again", c);
                    b.op(Op::RmsnormBackward(RmsnormBackward {
                        dout,
                        x,
                        rstd,
                        weight,
                        offset,
                        dx: unused,
                        accumulate: false,
                        grad: Some(elem),
                    }));
                    b.want(elem, TOLERANCE, Plain::Rounded);
                    b.want(unused, TOLERANCE, Plain::Rounded);
                }
            }
        }
        b.check();
    }
}

/// q of several heads under one weight, as wide as a head.
#[test]
fn heads_one_by_one() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for (heads, d) in [(1, 16), (4, 24), (3, 10), (8, 128)] {
            b.part(format!("{heads} heads of {d}"));
            let width = heads * d;
            let (x, w, dout, grad) = (b.random(t * width), b.random(d), b.random(t * width), b.random(d));
            let (residual, weight, dout) =
                (b.act("q", width, &x), b.elems("weight", &[d], &w), b.act("dout", width, &dout));
            let (out, rstd, dx) = (b.out("out", width), b.out_f32("rstd", heads), b.out("dx", width));
            let grad = b.f32s("grad", &[d], &grad);
            let (delta, sum, offset) = (None, None, 0.0);
            b.op(Op::AddRmsnorm(AddRmsnorm { residual, delta, sum, weight, offset, out, rstd }));
            let (x, accumulate) = (residual, false);
            b.op(Op::RmsnormBackward(RmsnormBackward {
                dout,
                x,
                rstd,
                weight,
                offset,
                dx,
                accumulate,
                grad: Some(grad),
            }));
            b.want(rstd, TOLERANCE, Plain::Within(TOLERANCE));
            b.want(out, TOLERANCE, Plain::Rounded);
            b.want(dx, TOLERANCE, Plain::Rounded);
            b.want(grad, TOLERANCE, Plain::Within(TOLERANCE));
        }
        b.check();
    }
}
