//! Updates against the CPU's, bit for bit, and against PyTorch and bitsandbytes on a GPU (tests/golden/optim).

use candle_core::DType;
use half::bf16;

use super::super::optimizer::{Array, State, Update, adamw, grad_norm};
use super::super::scratch::grad_norm_bytes;
use super::card::{Card, Golden, Noise, bits};
use crate::engine::optimizer::{self, AdamWHyper, STATE_BLOCKSIZE, sum_of_squares};

const SIZES: [usize; 10] = [1, 3, 63, 64, 65, 255, 257, 4096, 4097, 1_000_003];

fn hyper(step: u32, weight_decay: f32) -> AdamWHyper {
    AdamWHyper { step, weight_decay, ..AdamWHyper::default() }
}

fn halves(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}

/// What a bf16 array holds after `x` is stored there.
fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

impl Card {
    /// `values` as f32 or bf16.
    fn array(&self, dtype: DType, values: &[f32]) -> Array {
        let ptr = if dtype == DType::BF16 { self.put(&halves(values)) } else { self.put(values) };
        Array { ptr, dtype }
    }

    fn values(&self, a: Array, n: usize) -> Vec<f32> {
        match a.dtype {
            DType::BF16 => self.get::<bf16>(a.ptr, n).into_iter().map(bf16::to_f32).collect(),
            _ => self.get(a.ptr, n),
        }
    }
}

/// A few gradients are much larger than the others, some are zero.
fn gradient(n: usize, seed: u64) -> Vec<f32> {
    let mut noise = Noise(seed);
    let mut one = || match noise.word() % 16 {
        0 => 0.0,
        1 => noise.unit() * 1e3,
        _ => noise.unit() * 1e-2,
    };
    (0..n).map(|_| one()).collect()
}

/// The dtypes of parameters, gradients and 32-bit state that there are kernels for.
const DTYPES: [[DType; 3]; 3] = [
    [DType::F32, DType::F32, DType::F32],
    [DType::F32, DType::BF16, DType::F32],
    [DType::BF16, DType::BF16, DType::BF16],
];

#[test]
fn updates_with_32_bit_state_equal_the_cpu() {
    let Some(card) = Card::open(false) else { return };
    for n in SIZES {
        for [p_dtype, g_dtype, s_dtype] in DTYPES {
            for bitsandbytes in [false, true] {
                let what = format!("{n} elements, {p_dtype:?} {g_dtype:?} {s_dtype:?}, bitsandbytes {bitsandbytes}");
                let keep = |dtype: DType, x: Vec<f32>| if dtype == DType::BF16 { rounded(&x) } else { x };
                let mut p = keep(p_dtype, Noise(1).units(n));
                let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
                let param = card.array(p_dtype, &p);
                let (exp_avg, exp_avg_sq) = (card.array(s_dtype, &m), card.array(s_dtype, &v));
                let copy = (p_dtype == DType::F32).then(|| card.out::<bf16>(n));
                for step in 1..=3 {
                    let g = keep(g_dtype, gradient(n, u64::from(step)));
                    let clip = [1.0, 0.37, 1.0][step as usize - 1];
                    let u = Update {
                        param,
                        copy,
                        grad: card.array(g_dtype, &g),
                        state: State::Full { exp_avg, exp_avg_sq, bitsandbytes },
                        n,
                        norm: card.put(&[f64::NAN, clip]),
                    };
                    let h = hyper(step, if step == 2 { 0.0 } else { 0.1 });
                    adamw(&card.gpu, &[(u, h)]).unwrap();
                    let h = AdamWHyper { grad_scale: clip as f32, ..h };
                    let on_cpu = if bitsandbytes { optimizer::adamw_32bit_bnb } else { optimizer::adamw };
                    on_cpu(&mut p, &g, &mut m, &mut v, &h);
                    (p, m, v) = (keep(p_dtype, p), keep(s_dtype, m), keep(s_dtype, v));
                    for (part, ours, cpu) in
                        [("p", param, &p), ("exp_avg", exp_avg, &m), ("exp_avg_sq", exp_avg_sq, &v)]
                    {
                        assert!(bits(&card.values(ours, n)) == bits(cpu), "{what}, step {step}: {part}");
                    }
                    if let Some(copy) = copy {
                        assert!(card.get::<bf16>(copy, n) == halves(&p), "{what}, step {step}: the copy");
                    }
                }
                card.clear();
            }
        }
    }
}

#[test]
fn updates_with_8_bit_state_equal_the_cpu() {
    let Some(card) = Card::open(false) else { return };
    for n in SIZES {
        for [p_dtype, g_dtype, _] in DTYPES {
            let what = format!("{n} elements, {p_dtype:?} {g_dtype:?}");
            let keep = |dtype: DType, x: Vec<f32>| if dtype == DType::BF16 { rounded(&x) } else { x };
            let blocks = n.div_ceil(STATE_BLOCKSIZE);
            let mut p = keep(p_dtype, Noise(1).units(n));
            let (mut s1, mut s2) = (vec![0u8; n], vec![0u8; n]);
            let (mut a1, mut a2) = (vec![0f32; blocks], vec![0f32; blocks]);
            let param = card.array(p_dtype, &p);
            let (state1, state2) = (card.put(&s1), card.put(&s2));
            let (absmax1, absmax2) = (card.put(&a1), card.put(&a2));
            let copy = (p_dtype == DType::F32).then(|| card.out::<bf16>(n));
            for step in 1..=4 {
                let mut g = match step {
                    // A block without any gradient, and then one.
                    1 => vec![0.0; n],
                    _ => keep(g_dtype, gradient(n, u64::from(step))),
                };
                if step == 3 && n > 200 {
                    (g[7], g[200]) = (f32::NAN, f32::NEG_INFINITY);
                }
                let clip = [1.0, 0.37, 1.0, 0.9][step as usize - 1];
                let u = Update {
                    param,
                    copy,
                    grad: card.array(g_dtype, &g),
                    state: State::Blockwise8bit { state1, absmax1, state2, absmax2 },
                    n,
                    norm: card.put(&[f64::NAN, clip]),
                };
                let h = hyper(step, 0.1);
                adamw(&card.gpu, &[(u, h)]).unwrap();
                let h = AdamWHyper { grad_scale: clip as f32, ..h };
                optimizer::adamw_8bit(&mut p, &g, &mut s1, &mut a1, &mut s2, &mut a2, &h);
                p = keep(p_dtype, p);
                assert!(bits(&card.values(param, n)) == bits(&p), "{what}, step {step}: p");
                assert!(card.get::<u8>(state1, n) == s1, "{what}, step {step}: state1");
                assert!(card.get::<u8>(state2, n) == s2, "{what}, step {step}: state2");
                assert!(bits(&card.get(absmax1, blocks)) == bits(&a1), "{what}, step {step}: absmax1");
                assert!(bits(&card.get(absmax2, blocks)) == bits(&a2), "{what}, step {step}: absmax2");
                if let Some(copy) = copy {
                    assert!(card.get::<bf16>(copy, n) == halves(&p), "{what}, step {step}: the copy");
                }
            }
            card.clear();
        }
    }
}

/// Ten steps of a golden optimizer; the number of steps compared.
fn check_golden(card: &Card, optimizer: &str, name: &str, weight_decay: f32, eight_bit: bool) -> usize {
    let (inputs, golden) = (Golden::load("optim/inputs.safetensors"), Golden::load("optim/golden.cuda.safetensors"));
    let p = inputs.floats(&format!("{name}.p0")).unwrap();
    let (n, blocks) = (p.len(), p.len().div_ceil(STATE_BLOCKSIZE));
    let param = card.array(DType::F32, &p);
    let (s1, s2) = (card.put(&vec![0u8; n]), card.put(&vec![0u8; n]));
    let (a1, a2) = (card.put(&vec![0f32; blocks]), card.put(&vec![0f32; blocks]));
    let zeros = vec![0f32; n];
    let state = if eight_bit {
        State::Blockwise8bit { state1: s1, absmax1: a1, state2: s2, absmax2: a2 }
    } else {
        let (exp_avg, exp_avg_sq) = (card.array(DType::F32, &zeros), card.array(DType::F32, &zeros));
        State::Full { exp_avg, exp_avg_sq, bitsandbytes: optimizer != "torch_adamw" }
    };
    let norm = card.put(&[1f64, 1.0]);
    let mut compared = 0;
    for t in 1..=10 {
        let grad = card.array(DType::F32, &inputs.floats(&format!("{name}.g{t}")).unwrap());
        let update = Update { param, copy: None, grad, state, n, norm };
        adamw(&card.gpu, &[(update, hyper(t, weight_decay))]).unwrap();
        let key = format!("{optimizer}.f32.{name}.t{t}");
        let Some(theirs) = golden.floats(&format!("{key}.p")) else { continue };
        // b4352 has ordinary gradients, the others a heavy tail.
        let tolerance = if name == "b4352" { 1e-6 } else { 2e-5 };
        let ours: Vec<f32> = card.values(param, n);
        let worst = ours.iter().zip(&theirs).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= tolerance, "{key}: {worst:e}");
        if eight_bit {
            for (ours, part) in [(s1, "state1"), (s2, "state2")] {
                let Some(theirs) = golden.bytes(&format!("{key}.{part}")) else { continue };
                let differ = card.get::<u8>(ours, n).iter().zip(&theirs).filter(|(a, b)| a != b).count();
                assert!(differ * 10_000 <= n, "{key}.{part}: {differ} of {n} codes");
            }
        }
        compared += 1;
    }
    card.clear();
    compared
}

#[test]
fn golden_steps_equal_torch_and_bitsandbytes() {
    let Some(card) = Card::open(false) else { return };
    let mut compared = 0;
    for name in ["b4352", "m64x80", "n4095", "n4096", "n5000"] {
        compared += check_golden(&card, "torch_adamw", name, 0.01, false);
        compared += check_golden(&card, "adamw32bit", name, 0.01, false);
        if name != "n4095" {
            compared += check_golden(&card, "adamw8bit", name, 0.01, true);
            compared += check_golden(&card, "pagedadamw8bit_wd0", name, 0.0, true);
        }
    }
    println!("{compared} states");
    assert!(compared >= 20, "{compared}");
}

#[test]
fn norm_and_clip_factor() {
    let Some(card) = Card::open(false) else { return };
    let sizes = [1, 3, 65, 16_384, 16_385, 1_000_003, 5_000_000];
    let grads: Vec<Vec<f32>> = sizes.iter().map(|&n| gradient(n, n as u64)).collect();
    let partials = card.gpu.allocate(grad_norm_bytes(sizes.len()) as u64).unwrap();
    let norm = card.out::<f64>(2);
    for dtype in [DType::F32, DType::BF16] {
        let arrays: Vec<(Array, usize)> = grads.iter().map(|g| (card.array(dtype, g), g.len())).collect();
        let exact = |g: &Vec<f32>| sum_of_squares(&if dtype == DType::BF16 { rounded(g) } else { g.clone() });
        let expected = grads.iter().map(exact).sum::<f64>().sqrt();
        for limit in [0.0, 0.3, 1e9] {
            let run = || grad_norm(&card.gpu, arrays.iter().copied(), partials, limit, norm).unwrap();
            let found = run();
            assert!((found[0] - expected).abs() <= 1e-13 * expected, "{found:?}, expected {expected}");
            let clip = if limit > 0.0 { (limit / (found[0] + 1e-6)).min(1.0) } else { 1.0 };
            assert_eq!(found[1], clip);
            assert_eq!(found.map(f64::to_bits), run().map(f64::to_bits), "other bits the second time");
        }
    }
    let bad = [(card.array(DType::F32, &[1.0, f32::INFINITY]), 2), (card.array(DType::F32, &[f32::NAN]), 1)];
    for g in bad {
        assert!(!grad_norm(&card.gpu, [g].into_iter(), partials, 1.0, norm).unwrap()[0].is_finite());
    }
    card.gpu.free(partials);
    card.clear();
}
