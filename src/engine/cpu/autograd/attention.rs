//! Attention: forward, gradients, cache.

use candle_core::Tensor;

use super::*;
use crate::engine::ops::*;

const TOLERANCE: f64 = 6e-6;

/// Softmax(q k^T / sqrt(D)) v of one example, `[T, H D]`, with what a token may see spelt out.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, score: Score) -> Tensor {
    let t = q.dims()[0];
    let Heads { q: h, kv, dim, window } = heads;
    let split = |x: &Tensor, n: usize| x.reshape((t, n, dim)).unwrap().transpose(0, 1).unwrap().contiguous().unwrap();
    let repeat = |x: Tensor| {
        let x = x.reshape((kv, 1, t, dim)).unwrap().broadcast_as((kv, h / kv, t, dim)).unwrap();
        x.reshape((h, t, dim)).unwrap()
    };
    let (q, k, v) = (split(q, h), repeat(split(k, kv)), repeat(split(v, kv)));
    let mut scores =
        (q.matmul(&k.transpose(1, 2).unwrap().contiguous().unwrap()).unwrap() * f64::from(score.scale)).unwrap();
    if let Some(cap) = score.softcap.map(f64::from) {
        scores = ((scores / cap).unwrap().tanh().unwrap() * cap).unwrap();
    }
    let sees = |i: usize, j: usize| j <= i && window.is_none_or(|w| i - j < w);
    let mask: Vec<f32> = (0..t * t).map(|n| if sees(n / t, n % t) { 0.0 } else { -1e30 }).collect();
    let scores = scores.broadcast_add(&tensor(&mask, &[t, t])).unwrap();
    let shifted = scores.broadcast_sub(&scores.max_keepdim(2).unwrap().detach()).unwrap().exp().unwrap();
    let p = shifted.broadcast_div(&shifted.sum_keepdim(2).unwrap()).unwrap();
    p.matmul(&v).unwrap().transpose(0, 1).unwrap().reshape((t, h * dim)).unwrap()
}

/// Several examples side by side.
fn attend_all(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[usize], heads: Heads, score: Score) -> Tensor {
    let mut start = 0;
    let parts: Vec<Tensor> = lengths
        .iter()
        .map(|&n| {
            let [q, k, v] = [q, k, v].map(|x| x.narrow(0, start, n).unwrap());
            start += n;
            attend(&q, &k, &v, heads, score)
        })
        .collect();
    Tensor::cat(&parts, 0).unwrap()
}

fn check(lengths: &[usize], heads: Heads) {
    check_score(lengths, heads, Score::of(heads.dim));
}

fn check_score(lengths: &[usize], heads: Heads, score: Score) {
    let what = |part: &str| format!("{lengths:?} {heads:?} {score:?} {part}");
    let t = lengths.iter().sum();
    let (wq, wk) = (heads.q * heads.dim, heads.kv * heads.dim);
    let mut b = Bench::new(t);
    let (q, k, v, dout) = (b.random(t * wq), b.random(t * wk), b.random(t * wk), b.random(t * wq));
    let mut ends = vec![0u32];
    ends.extend(lengths.iter().scan(0, |end, n| {
        *end += *n as u32;
        Some(*end)
    }));
    b.cu_seqlens = ends.clone();
    let cu_seqlens = b.u32s(&ends);
    let (q_id, k_id, v_id, dout_id) = (b.act(wq, &q), b.act(wk, &k), b.act(wk, &v), b.act(wq, &dout));
    let (out, lse, dq, dk, dv) = (b.out(wq), b.out(heads.q), b.out(wq), b.out(wk), b.out(wk));
    let cpu = b.run(&[
        Op::Attention(Attention { q: q_id, k: k_id, v: v_id, out, lse, cu_seqlens, heads, score }),
        Op::AttentionBackward(AttentionBackward {
            q: q_id,
            k: k_id,
            v: v_id,
            out,
            lse,
            cu_seqlens,
            dout: dout_id,
            dq,
            dk,
            dv,
            heads,
            score,
        }),
    ]);
    let leaves = [var(&q, &[t, wq]), var(&k, &[t, wk]), var(&v, &[t, wk])];
    let expected = attend_all(&leaves[0], &leaves[1], &leaves[2], lengths, heads, score);
    close(&what("out"), &rows(&cpu, out), &flat(&expected), TOLERANCE);
    let g = gradients(&expected, &tensor(&dout, &[t, wq]), &leaves.each_ref());
    // The gradient of q and k is a difference of terms of this size: zero where a token sees itself alone.
    let largest = g[2].iter().fold(0f64, |m, x| m.max(x.abs()));
    close_to(&what("dq"), &rows(&cpu, dq), &g[0], TOLERANCE, largest);
    close_to(&what("dk"), &rows(&cpu, dk), &g[1], TOLERANCE, largest);
    close_to(&what("dv"), &rows(&cpu, dv), &g[2], TOLERANCE, largest);
}

const WINDOWS: [Option<usize>; 5] = [None, Some(1), Some(5), Some(64), Some(100)];

#[test]
fn every_head_size() {
    for (q, kv) in [(6, 3), (4, 1), (2, 2)] {
        for dim in [16, 24, 64, 80, 128, 256] {
            check(&[65, 7], Heads { q, kv, dim, window: None });
        }
    }
}

#[test]
fn every_window() {
    for window in WINDOWS {
        for t in [1, 7, 64, 65, 130, 200] {
            check(&[t], Heads { q: 4, kv: 2, dim: 24, window });
        }
    }
}

#[test]
fn scales_and_soft_caps() {
    for softcap in [None, Some(0.5), Some(4.0), Some(50.0)] {
        for scale in [0.1, 1.0] {
            for window in [None, Some(5)] {
                let heads = Heads { q: 4, kv: 2, dim: 24, window };
                check_score(&[65, 7, 130], heads, Score { scale, softcap });
            }
        }
    }
}

#[test]
fn examples_do_not_see_each_other() {
    for window in WINDOWS {
        for lengths in [&[1, 1, 1, 1][..], &[1, 7, 65, 130], &[130, 1, 64, 7], &[63, 64, 65]] {
            check(lengths, Heads { q: 4, kv: 1, dim: 16, window });
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let heads = Heads { q: 1, kv: 1, dim: 16, window: None };
    let score = Score::of(heads.dim);
    let t = 130;
    let mut b = Bench::new(t);
    let q: Vec<f32> = b.random(t * 16).iter().map(|x| x * 200.0).collect();
    let v = b.random(t * 16);
    let (q_id, v_id, out, lse, cu_seqlens) =
        (b.act(16, &q), b.act(16, &v), b.out(16), b.out(1), b.u32s(&[0, t as u32]));
    let cpu = b.run(&[Op::Attention(Attention { q: q_id, k: q_id, v: v_id, out, lse, cu_seqlens, heads, score })]);
    let (q, v) = (tensor(&q, &[t, 16]), tensor(&v, &[t, 16]));
    close("large scores", &rows(&cpu, out), &flat(&attend(&q, &q, &v, heads, score)), 1e-3);
}

/// Feeds a text piece by piece through the cache.
#[test]
fn cached_attention_is_attention() {
    for window in WINDOWS {
        for (q, kv, dim) in [(4, 2, 24), (4, 1, 64), (1, 1, 80)] {
            for pieces in [&[1usize; 9][..], &[7, 1, 1, 1], &[65, 1, 64, 1], &[130], &[3, 128, 1]] {
                let score = Score { softcap: (dim == 64).then_some(2.0), ..Score::of(dim) };
                cached_case(pieces, Heads { q, kv, dim, window }, score);
            }
        }
    }
}

fn cached_case(pieces: &[usize], heads: Heads, score: Score) {
    let total: usize = pieces.iter().sum();
    let (wq, wk) = (heads.q * heads.dim, heads.kv * heads.dim);
    let mut source = Bench::new(total);
    let (q, k, v) = (source.random(total * wq), source.random(total * wk), source.random(total * wk));
    let expected =
        flat(&attend(&tensor(&q, &[total, wq]), &tensor(&k, &[total, wk]), &tensor(&v, &[total, wk]), heads, score));
    // What is beyond the text in the cache must not matter.
    let mut caches = vec![vec![f32::NAN; (total + SPARE) * wk]; 2];
    let mut at = 0;
    for &n in pieces {
        let mut b = Bench::new(n);
        let part = |x: &[f32], w: usize| x[at * w..][..n * w].to_vec();
        let (q, k, v) = (b.act(wq, &part(&q, wq)), b.act(wk, &part(&k, wk)), b.act(wk, &part(&v, wk)));
        let out = b.out(wq);
        let (k_cache, v_cache) =
            (b.weight(&[total + SPARE, wk], &caches[0]), b.weight(&[total + SPARE, wk], &caches[1]));
        let positions: Vec<u32> = (at as u32..(at + n) as u32).collect();
        let positions = b.u32s(&positions);
        let cpu =
            b.run(&[Op::CachedAttention(CachedAttention { q, k, v, out, k_cache, v_cache, positions, heads, score })]);
        close(&format!("{pieces:?} {heads:?} at {at}"), &rows(&cpu, out), &expected[at * wq..][..n * wq], TOLERANCE);
        caches = vec![cpu.read(k_cache), cpu.read(v_cache)];
        at += n;
    }
}
