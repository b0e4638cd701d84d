//! Dropout masks from counters: the same numbers whenever and wherever they are computed again.
//!
//! Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Key: the run's seed. Counter:
//! element / 4, module, micro-step. The mask of an element depends on nothing else.

use rayon::prelude::*;

/// Elements that one task handles.
const PART: usize = 1 << 14;

/// Four random words for a counter and a key.
pub fn philox(mut counter: [u32; 4], key: u64) -> [u32; 4] {
    let mut k = [key as u32, (key >> 32) as u32];
    for _ in 0..10 {
        let p0 = u64::from(counter[0]) * 0xD251_1F53;
        let p1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(p1 >> 32) as u32 ^ counter[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Sets each element to zero with probability `p`, and divides the others by `1 - p`.
pub(crate) fn dropout(x: &mut [f32], p: f32, seed: u64, micro_step: u64, module: u32) {
    let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
    let keep = 1.0 / (1.0 - p);
    x.par_chunks_mut(PART).enumerate().for_each(|(part, x)| {
        for (i, four) in x.chunks_mut(4).enumerate() {
            let at = (part * PART / 4 + i) as u32;
            let words = philox([at, module, micro_step as u32, (micro_step >> 32) as u32], seed);
            for (x, w) in four.iter_mut().zip(words) {
                *x = if w >= threshold { *x * keep } else { 0.0 };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // Random123 1.14, tests/kat_vectors, philox4x32 10.
        assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn keeps_the_mean_and_differs_between_modules() {
        let mut a = vec![1f32; 100_000];
        let mut b = a.clone();
        dropout(&mut a, 0.1, 7, 3, 0);
        dropout(&mut b, 0.1, 7, 3, 1);
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert_ne!(a, b);
    }
}
