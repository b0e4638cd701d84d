//! AdamW against ten steps of PyTorch and of bitsandbytes on a GPU (tests/golden/optim).

use safetensors::SafeTensors;
use tunebook::engine::optimizer::{
    AdamWHyper, MIN_8BIT_SIZE, STATE_BLOCKSIZE, adamw, adamw_8bit, adamw_32bit_bnb, sum_of_squares,
};

use crate::support::golden;

struct File(Vec<u8>);

impl File {
    fn load(name: &str) -> Self {
        File(std::fs::read(golden("optim").join(name)).unwrap())
    }

    fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        file.tensor(name).ok().map(|t| t.data().to_vec())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let bytes = self.bytes(name)?;
        Some(bytes.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect())
    }
}

const NAMES: [&str; 5] = ["b4352", "m64x80", "n4095", "n4096", "n5000"];

fn hyper(step: u32, weight_decay: f32) -> AdamWHyper {
    AdamWHyper { step, weight_decay, ..AdamWHyper::default() }
}

/// b4352 has ordinary gradients, the others a heavy tail.
fn tolerance(name: &str) -> f32 {
    if name == "b4352" { 1e-6 } else { 2e-5 }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

fn assert_close(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    let d = largest_difference(a, b);
    assert!(d <= tolerance, "{what}: {d:e} > {tolerance:e}");
}

type Step32 = fn(&mut [f32], &[f32], &mut [f32], &mut [f32], &AdamWHyper);

/// Ten steps of an optimizer with 32-bit state; the number of comparisons made.
fn check_32bit(optimizer: &str, step: Step32, weight_decay: f32, states: [&str; 2], names: &[&str]) -> usize {
    let (inputs, golden) = (File::load("inputs.safetensors"), File::load("golden.cuda.safetensors"));
    let mut compared = 0;
    for name in names {
        let mut p = inputs.floats(&format!("{name}.p0")).unwrap();
        let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
        let mut largest = vec![0f32; p.len()];
        for t in 1..=10 {
            let g = inputs.floats(&format!("{name}.g{t}")).unwrap();
            largest.iter_mut().zip(&g).for_each(|(l, g)| *l = l.max(g.abs()));
            step(&mut p, &g, &mut m, &mut v, &hyper(t, weight_decay));
            let key = format!("{optimizer}.f32.{name}.t{t}");
            let Some(theirs) = golden.floats(&format!("{key}.p")) else { continue };
            assert_close(&key, &p, &theirs, tolerance(name).min(2e-6));
            for (ours, state, power) in [(&m, states[0], 1), (&v, states[1], 2)] {
                let theirs = golden.floats(&format!("{key}.{state}")).unwrap();
                for ((a, b), g) in ours.iter().zip(&theirs).zip(&largest) {
                    // Relative to the gradients that went in: their mean may be near zero.
                    assert!((a - b).abs() <= 5e-7 * g.powi(power), "{key}.{state}: {a:e} {b:e} of {g:e}");
                }
            }
            compared += 1;
        }
    }
    compared
}

#[test]
fn adamw_equals_torch() {
    let compared = check_32bit("torch_adamw", adamw, 0.01, ["exp_avg", "exp_avg_sq"], &NAMES);
    assert!(compared >= 10, "{compared}");
}

#[test]
fn adamw_32bit_equals_bitsandbytes() {
    let states = ["state1", "state2"];
    let mut compared = check_32bit("adamw32bit", adamw_32bit_bnb, 0.01, states, &NAMES);
    compared += check_32bit("pagedadamw32bit", adamw_32bit_bnb, 0.01, states, &NAMES);
    // Below the smallest size the 8-bit optimizers keep 32-bit state.
    const { assert!(4095 < MIN_8BIT_SIZE) };
    compared += check_32bit("adamw8bit", adamw_32bit_bnb, 0.01, states, &["n4095"]);
    assert!(compared >= 13, "{compared}");
}

#[test]
fn adamw_8bit_equals_bitsandbytes() {
    let (inputs, golden) = (File::load("inputs.safetensors"), File::load("golden.cuda.safetensors"));
    let (mut compared, mut codes, mut differ, mut largest) = (0, 0, 0, [0f32; 2]);
    for (optimizer, weight_decay) in [("adamw8bit", 0.01), ("pagedadamw8bit_wd0", 0.0)] {
        for name in NAMES.into_iter().filter(|n| *n != "n4095") {
            let mut p = inputs.floats(&format!("{name}.p0")).unwrap();
            let blocks = p.len().div_ceil(STATE_BLOCKSIZE);
            let (mut s1, mut s2) = (vec![0u8; p.len()], vec![0u8; p.len()]);
            let (mut a1, mut a2) = (vec![0f32; blocks], vec![0f32; blocks]);
            for t in 1..=10 {
                let g = inputs.floats(&format!("{name}.g{t}")).unwrap();
                adamw_8bit(&mut p, &g, &mut s1, &mut a1, &mut s2, &mut a2, &hyper(t, weight_decay));
                let key = format!("{optimizer}.f32.{name}.t{t}");
                let Some(theirs) = golden.floats(&format!("{key}.p")) else { continue };
                let d = largest_difference(&p, &theirs);
                assert!(d <= tolerance(name), "{key}: {d:e}");
                let kind = usize::from(name != "b4352");
                largest[kind] = largest[kind].max(d);
                for (ours, part) in [(&s1, "state1"), (&s2, "state2")] {
                    let Some(theirs) = golden.bytes(&format!("{key}.{part}")) else { continue };
                    codes += ours.len();
                    differ += ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
                }
                for (ours, part) in [(&a1, "absmax1"), (&a2, "absmax2")] {
                    let theirs = golden.floats(&format!("{key}.{part}")).unwrap();
                    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()), "{key}.{part}");
                }
                compared += 1;
            }
        }
    }
    println!(
        "8-bit AdamW: {compared} states, {differ} of {codes} codes differ, p within {largest:?} (plain, heavy tail)"
    );
    assert!(compared >= 8 && codes > 50_000 && differ * 10_000 <= codes, "{differ} of {codes}");
}

/// Deterministic noise.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let n = 100_003;
    let g = noise(n, 1);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut p, mut m, mut v) = (noise(n, 2), vec![0.0; n], vec![0.0; n]);
            adamw(&mut p, &g, &mut m, &mut v, &hyper(1, 0.01));
            adamw_32bit_bnb(&mut p, &g, &mut m, &mut v, &hyper(2, 0.01));
            let (mut s1, mut s2) = (vec![0u8; n], vec![0u8; n]);
            let (mut a1, mut a2) = (vec![0f32; n.div_ceil(256)], vec![0f32; n.div_ceil(256)]);
            adamw_8bit(&mut p, &g, &mut s1, &mut a1, &mut s2, &mut a2, &hyper(3, 0.01));
            let bits: Vec<u32> = p.iter().chain(&m).chain(&v).chain(&a1).chain(&a2).map(|x| x.to_bits()).collect();
            (bits, s1, s2, sum_of_squares(&g).to_bits())
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(5));
}

#[test]
fn sum_of_squares_is_right_for_any_length() {
    for n in [0, 1, 15, 16, 17, 16_383, 16_384, 16_385, 100_000] {
        let g = noise(n, 3);
        let expected: f64 = g.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((sum_of_squares(&g) - expected).abs() <= 1e-12 * expected, "{n}");
    }
    // 256 pieces are not enough for small ones: the pieces grow.
    assert_eq!(sum_of_squares(&vec![1.0; 5_000_000]), 5e6);
}

#[test]
fn a_gradient_that_is_not_finite_leaves_the_parameter_and_clears_the_state() {
    let n = 300;
    let g = noise(n, 4);
    let step = |g: &[f32]| {
        let (mut p, mut s1, mut s2) = (vec![0.5f32; n], vec![200u8; n], vec![200u8; n]);
        let (mut a1, mut a2) = (vec![1f32; 2], vec![1f32; 2]);
        adamw_8bit(&mut p, g, &mut s1, &mut a1, &mut s2, &mut a2, &hyper(1, 0.1));
        (p, s1, s2)
    };
    let mut bad = g.clone();
    (bad[7], bad[260]) = (f32::NAN, f32::INFINITY);
    let ((p, s1, s2), (plain, ..)) = (step(&bad), step(&g));
    for i in [7, 260] {
        // Code 127 is the signed zero, code 0 the unsigned one.
        assert_eq!((p[i], s1[i], s2[i]), (0.5, 127, 0));
        assert_ne!(plain[i], 0.5);
    }
    assert_eq!(p[8], plain[8]);
}

#[test]
fn grad_scale_is_a_scaled_gradient() {
    let n = 5000;
    let g = noise(n, 5);
    let halved: Vec<f32> = g.iter().map(|x| x * 0.5).collect();
    let run = |g: &[f32], grad_scale: f32| {
        let h = AdamWHyper { grad_scale, ..AdamWHyper::default() };
        let (mut p, mut m, mut v) = (noise(n, 6), vec![0.0; n], vec![0.0; n]);
        adamw(&mut p, g, &mut m, &mut v, &h);
        adamw_32bit_bnb(&mut p, g, &mut m, &mut v, &h);
        let (mut s1, mut s2) = (vec![0u8; n], vec![0u8; n]);
        let (mut a1, mut a2) = (vec![0f32; 20], vec![0f32; 20]);
        adamw_8bit(&mut p, g, &mut s1, &mut a1, &mut s2, &mut a2, &h);
        (p, m, v, s1, s2, a1, a2)
    };
    assert!(run(&g, 0.5) == run(&halved, 1.0));
}
