//! The plain computation keeps scores in f32 and rounds what goes into a matrix product in bf16 (probabilities, the
//! gradients of scores) and what is written.

use super::*;
use crate::engine::ops::{Attention, AttentionBackward, CachedAttention, Heads, Score};

const TOLERANCE: f64 = 1e-5;

/// Rows `start..start + n` of one head of x `[_, heads, dim]`: `[n, dim]`.
fn head(x: &[f32], (start, n): (usize, usize), (h, heads): (usize, usize), dim: usize) -> Vec<f32> {
    (start..start + n).flat_map(|t| x[(t * heads + h) * dim..][..dim].to_vec()).collect()
}

/// Adds `[n, dim]` to those rows.
fn add_head(x: &mut [f32], part: &[f32], start: usize, (h, heads): (usize, usize), dim: usize) {
    for (i, row) in part.chunks_exact(dim).enumerate() {
        let to = &mut x[((start + i) * heads + h) * dim..][..dim];
        to.iter_mut().zip(row).for_each(|(t, r)| *t += r);
    }
}

/// exp(scores - lse) of n queries at `shift..` over keys `0..n + shift`, `[n, n + shift]`, and each row's maximum and sum
/// before the division.
struct Probabilities {
    p: Vec<f32>,
    sums: Vec<f32>,
}

fn probabilities(q: &[f32], k: &[f32], shift: usize, heads: Heads) -> Probabilities {
    let (n, m) = (q.len() / heads.dim, k.len() / heads.dim);
    let mut p = product(q, &transposed(k, m, heads.dim), n, heads.dim, m);
    let mut sums = Vec::new();
    for (i, row) in p.chunks_exact_mut(m).enumerate() {
        let sees = |j: usize| j <= i + shift && heads.window.is_none_or(|w| i + shift - j < w);
        let factor = 1.0 / (heads.dim as f32).sqrt();
        let top = (0..m).filter(|&j| sees(j)).map(|j| row[j]).fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().enumerate().for_each(|(j, s)| *s = if sees(j) { ((*s - top) * factor).exp() } else { 0.0 });
        sums.push(row.iter().sum());
    }
    Probabilities { p, sums }
}

/// Softmax(q k^T / sqrt(D)) v, `[n, dim]`.
fn plain_head(q: &[f32], k: &[f32], v: &[f32], shift: usize, heads: Heads) -> Vec<f32> {
    let (n, m, d) = (q.len() / heads.dim, k.len() / heads.dim, heads.dim);
    let Probabilities { p, sums } = probabilities(q, k, shift, heads);
    let out = product(&rounded(&p), v, n, m, d);
    out.iter().enumerate().map(|(i, x)| round(x / sums[i / d])).collect()
}

/// The spans of the examples and the pairs of query head and key head.
fn tasks(lengths: &[usize], heads: Heads) -> Vec<((usize, usize), usize, usize)> {
    let mut start = 0;
    let mut out = Vec::new();
    for &n in lengths {
        out.extend((0..heads.q).map(|h| ((start, n), h, h / (heads.q / heads.kv))));
        start += n;
    }
    out
}

fn plain_forward(q: &[f32], k: &[f32], v: &[f32], lengths: &[usize], heads: Heads) -> Vec<f32> {
    let (Heads { q: nq, kv, dim, .. }, mut out) = (heads, vec![0f32; q.len()]);
    for (span, h, g) in tasks(lengths, heads) {
        let (q, k, v) = (head(q, span, (h, nq), dim), head(k, span, (g, kv), dim), head(v, span, (g, kv), dim));
        add_head(&mut out, &plain_head(&q, &k, &v, 0, heads), span.0, (h, nq), dim);
    }
    out
}

/// Gradients of q, k and v.
fn plain_backward([q, k, v, out, dout]: [&[f32]; 5], lengths: &[usize], heads: Heads) -> [Vec<f32>; 3] {
    let Heads { q: nq, kv, dim, .. } = heads;
    let (mut dq, mut dk, mut dv) = (vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]);
    let factor = 1.0 / (dim as f32).sqrt();
    for (span, h, g) in tasks(lengths, heads) {
        let n = span.1;
        let (q, out, dout) =
            (head(q, span, (h, nq), dim), head(out, span, (h, nq), dim), head(dout, span, (h, nq), dim));
        let (k, v) = (head(k, span, (g, kv), dim), head(v, span, (g, kv), dim));
        let Probabilities { mut p, sums } = probabilities(&q, &k, 0, heads);
        p.chunks_exact_mut(n).zip(&sums).for_each(|(row, sum)| row.iter_mut().for_each(|p| *p /= sum));
        let delta: Vec<f32> = out
            .chunks_exact(dim)
            .zip(dout.chunks_exact(dim))
            .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum())
            .collect();
        let dp = product(&dout, &transposed(&v, n, dim), n, dim, n);
        let ds: Vec<f32> = (0..n * n).map(|i| round(p[i] * (dp[i] - delta[i / n]))).collect();
        let scaled = |x: Vec<f32>| x.iter().map(|x| x * factor).collect::<Vec<f32>>();
        add_head(&mut dq, &scaled(product(&ds, &k, n, n, dim)), span.0, (h, nq), dim);
        add_head(&mut dk, &scaled(product(&transposed(&ds, n, n), &q, n, n, dim)), span.0, (g, kv), dim);
        add_head(&mut dv, &product(&transposed(&rounded(&p), n, n), &dout, n, n, dim), span.0, (g, kv), dim);
    }
    [dq, dk, dv].map(|x| rounded(&x))
}

/// The outputs of the forward pass on the CPU: what the backward pass starts from.
fn kept(q: &[f32], k: &[f32], v: &[f32], lengths: &[usize], heads: Heads, score: Score) -> (Vec<f32>, Vec<f32>) {
    let mut b = Bench::examples(lengths);
    let (wq, wk, n) = (heads.q * heads.dim, heads.kv * heads.dim, b.tokens);
    let (q, k, v) = (b.act("q", wq, q), b.act("k", wk, k), b.act("v", wk, v));
    let (out, lse, cu_seqlens) = (b.out("out", wq), b.out_f32("lse", heads.q), b.load.cu_seqlens);
    b.op(Op::Attention(Attention { q, k, v, out, lse, cu_seqlens, heads, score }));
    let done = b.on_cpu();
    (rounded(&done.f32s(out, n * wq)), done.f32s(lse, n * heads.q))
}

/// Adds the forward and the backward pass of one kind of heads to a bench.
fn case(b: &mut Bench, lengths: &[usize], heads: Heads) {
    b.part(format!("{lengths:?}, {heads:?}"));
    let (wq, wk, t) = (heads.q * heads.dim, heads.kv * heads.dim, b.tokens);
    let (q, k, v, dout) = (b.random(t * wq), b.random(t * wk), b.random(t * wk), b.random(t * wq));
    let score = Score::of(heads.dim);
    let (out_kept, lse_kept) = kept(&q, &k, &v, lengths, heads, score);
    let plain = plain_forward(&q, &k, &v, lengths, heads);
    let [plain_dq, plain_dk, plain_dv] = plain_backward([&q, &k, &v, &out_kept, &dout], lengths, heads);
    let size = rms(&plain_dv);
    let (q, k, v) = (b.act("q", wq, &q), b.act("k", wk, &k), b.act("v", wk, &v));
    let (out, lse, cu_seqlens) = (b.out("out", wq), b.out_f32("lse", heads.q), b.load.cu_seqlens);
    b.op(Op::Attention(Attention { q, k, v, out, lse, cu_seqlens, heads, score }));
    b.want(out, TOLERANCE, Plain::Values(plain));
    b.want(lse, TOLERANCE, Plain::Within(TOLERANCE)).scale(1.0);
    let (out, dout) = (b.act("out of the forward pass", wq, &out_kept), b.act("dout", wq, &dout));
    let lse = b.f32s("lse of the forward pass", &[t + SPARE, heads.q], &lse_kept);
    let (dq, dk, dv) = (b.out("dq", wq), b.out("dk", wk), b.out("dv", wk));
    b.op(Op::AttentionBackward(AttentionBackward { q, k, v, out, lse, cu_seqlens, dout, dq, dk, dv, heads, score }));
    // The gradients of q and k are differences: zero where a token sees itself alone.
    b.want(dq, TOLERANCE, Plain::Values(plain_dq)).scale(size);
    b.want(dk, TOLERANCE, Plain::Values(plain_dk)).scale(size);
    b.want(dv, TOLERANCE, Plain::Values(plain_dv)).scale(size);
}

#[test]
fn every_head_size() {
    if !gpu() {
        return;
    }
    for lengths in [&[1][..], &[3], &[65, 7], &[130]] {
        let mut b = Bench::examples(lengths);
        for dim in [64, 80, 96, 128, 256, 8, 16, 40, 112] {
            for (q, kv) in [(6, 3), (4, 1), (2, 2)] {
                case(&mut b, lengths, Heads { q, kv, dim, window: None });
            }
        }
        b.check();
    }
}

#[test]
fn every_window() {
    if !gpu() {
        return;
    }
    for lengths in [&[1][..], &[64], &[65], &[200], &[1, 7, 65, 130], &[130, 1, 64, 7], &[63, 64, 65], &[1, 1, 1, 1]] {
        let mut b = Bench::examples(lengths);
        for window in [None, Some(1), Some(5), Some(64), Some(100)] {
            for dim in [24, 64, 128] {
                case(&mut b, lengths, Heads { q: 4, kv: 2, dim, window });
            }
        }
        b.check();
    }
}

/// Scaled in another way or capped: the plain kernels, whose arithmetic is f32 and whose outputs are rounded once.
#[test]
fn scales_and_soft_caps() {
    if !gpu() {
        return;
    }
    for lengths in [&[1][..], &[65, 7], &[130]] {
        let mut b = Bench::examples(lengths);
        for (softcap, scale) in [(None, 0.3), (Some(0.5), 0.2), (Some(4.0), 0.2), (Some(50.0), 1.0)] {
            for (dim, window) in [(16, None), (64, Some(5)), (256, None)] {
                let (heads, score) = (Heads { q: 4, kv: 2, dim, window }, Score { scale, softcap });
                b.part(format!("{lengths:?}, {heads:?}, {score:?}"));
                let (wq, wk, t) = (4 * dim, 2 * dim, b.tokens);
                let (q, k, v, dout) = (b.random(t * wq), b.random(t * wk), b.random(t * wk), b.random(t * wq));
                let (out_kept, lse_kept) = kept(&q, &k, &v, lengths, heads, score);
                let size = rms(&v);
                let (q, k, v) = (b.act("q", wq, &q), b.act("k", wk, &k), b.act("v", wk, &v));
                let (out, lse, cu_seqlens) = (b.out("out", wq), b.out_f32("lse", heads.q), b.load.cu_seqlens);
                b.op(Op::Attention(Attention { q, k, v, out, lse, cu_seqlens, heads, score }));
                b.want(out, TOLERANCE, Plain::Rounded);
                b.want(lse, TOLERANCE, Plain::Within(TOLERANCE)).scale(1.0);
                let (out, dout) = (b.act("out of the forward pass", wq, &out_kept), b.act("dout", wq, &dout));
                let lse = b.f32s("lse of the forward pass", &[t + SPARE, heads.q], &lse_kept);
                let (dq, dk, dv) = (b.out("dq", wq), b.out("dk", wk), b.out("dv", wk));
                b.op(Op::AttentionBackward(AttentionBackward {
                    q,
                    k,
                    v,
                    out,
                    lse,
                    cu_seqlens,
                    dout,
                    dq,
                    dk,
                    dv,
                    heads,
                    score,
                }));
                for id in [dq, dk, dv] {
                    b.want(id, TOLERANCE, Plain::Rounded).scale(size);
                }
            }
        }
        b.check();
    }
}

#[test]
fn large_scores_do_not_overflow() {
    if !gpu() {
        return;
    }
    let t = 130;
    let mut b = Bench::new(t);
    for dim in [40, 64, 128] {
        let heads = Heads { q: 1, kv: 1, dim, window: None };
        let score = Score::of(dim);
        b.part(format!("{heads:?}"));
        let q: Vec<f32> = b.random(t * dim).iter().map(|x| round(x * 100.0)).collect();
        let v = b.random(t * dim);
        let plain = plain_forward(&q, &q, &v, &[t], heads);
        let (q, k, v) = (b.act("q", dim, &q), b.act("k", dim, &q), b.act("v", dim, &v));
        let (out, lse, cu_seqlens) = (b.out("out", dim), b.out_f32("lse", 1), b.load.cu_seqlens);
        b.op(Op::Attention(Attention { q, k, v, out, lse, cu_seqlens, heads, score }));
        // Scores of 10^5: what an f32 cannot hold of them is in the exponent.
        b.want(out, 1e-2, Plain::Values(plain));
        b.want(lse, 1e-6, Plain::Within(1e-6));
    }
    b.check();
}

#[test]
fn cached_attention() {
    if !gpu() {
        return;
    }
    for t in [1, 3, 16, 65, 130] {
        for base in [0, 1, 63, 64, 257, 1000] {
            let mut b = Bench::new(t);
            b.batch.positions = (base as u32..(base + t) as u32).collect();
            for window in [None, Some(5), Some(100)] {
                for (q, kv, dim) in [(4, 2, 40), (4, 1, 64), (2, 2, 80), (8, 2, 128), (1, 1, 256)] {
                    cached_case(&mut b, base, Heads { q, kv, dim, window });
                }
            }
            b.check();
        }
    }
}

fn cached_case(b: &mut Bench, base: usize, heads: Heads) {
    let Heads { q: nq, kv, dim, .. } = heads;
    let (wq, wk, t) = (nq * dim, kv * dim, b.tokens);
    let total = base + t;
    b.part(format!("after {base}, {heads:?}"));
    let (q, k, v) = (b.random(t * wq), b.random(total * wk), b.random(total * wk));
    let mut plain = vec![0f32; t * wq];
    for (_, h, g) in tasks(&[t], heads) {
        let q = head(&q, (0, t), (h, nq), dim);
        let (k, v) = (head(&k, (0, total), (g, kv), dim), head(&v, (0, total), (g, kv), dim));
        add_head(&mut plain, &plain_head(&q, &k, &v, base, heads), 0, (h, nq), dim);
    }
    let (old, new) = (base * wk, total * wk);
    let score = Score::of(dim);
    let cache_shape = [total + SPARE, wk];
    // What is beyond the text in the cache must not matter: it is NaN.
    let (k_cache, v_cache) = (b.elems("k_cache", &cache_shape, &k[..old]), b.elems("v_cache", &cache_shape, &v[..old]));
    let (q, k, v) = (b.act("q", wq, &q), b.act("k", wk, &k[old..]), b.act("v", wk, &v[old..]));
    let (out, positions) = (b.out("out", wq), b.load.positions);
    b.op(Op::CachedAttention(CachedAttention { q, k, v, out, k_cache, v_cache, positions, heads, score }));
    for cache in [k_cache, v_cache] {
        b.fields[cache.index()].used = new;
        b.want(cache, 0.0, Plain::Within(0.0));
    }
    b.want(out, TOLERANCE, Plain::Values(plain));
}
