//! Dropout masks from counters: the same numbers whenever and wherever they are computed again.
//!
//! Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Key: the run's seed. Counter:
//! element / 8, module, micro-step. The mask of an element depends on nothing else: 16 bits of the four words, so that a GPU, which
//! computes them anew for each pass, has half the work.

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

/// Below which of 65,536 numbers an element is dropped, and the factor of the others: `p` in steps of 1/65,536, at least one unless it
/// is zero, and the factor of that step, so that the mean stays.
pub(crate) fn threshold(p: f32) -> (u32, f32) {
    let least = if p > 0.0 { 1.0 } else { 0.0 };
    let threshold = (f64::from(p) * 65_536.0).round().clamp(least, 65_535.0);
    (threshold as u32, (65_536.0 / (65_536.0 - threshold)) as f32)
}

/// Sets each element to zero with probability `p`, and divides the others by `1 - p`.
pub(crate) fn dropout(x: &mut [f32], p: f32, seed: u64, micro_step: u64, module: u32) {
    let (threshold, keep) = threshold(p);
    x.par_chunks_mut(PART).enumerate().for_each(|(part, x)| {
        for (i, eight) in x.chunks_mut(8).enumerate() {
            let at = (part * PART / 8 + i) as u32;
            let words = philox([at, module, micro_step as u32, (micro_step >> 32) as u32], seed);
            let halves = words.iter().flat_map(|w| [w & 0xffff, w >> 16]);
            for (x, half) in eight.iter_mut().zip(halves) {
                *x = if half >= threshold { *x * keep } else { 0.0 };
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

    #[test]
    fn steps_of_the_probability() {
        assert_eq!(threshold(0.5), (32_768, 2.0));
        assert_eq!(threshold(0.1), (6_554, 65_536.0 / 58_982.0));
        assert_eq!(threshold(0.0), (0, 1.0));
        // Never nothing, never everything.
        assert_eq!(threshold(1e-6).0, 1);
        assert_eq!(threshold(0.999_999), (65_535, 65_536.0));
        for p in [0.05, 0.3, 0.9] {
            let mut x = vec![1f32; 1 << 20];
            dropout(&mut x, p, 1, 2, 3);
            let zeros = x.iter().filter(|x| **x == 0.0).count() as f32 / x.len() as f32;
            // Four standard deviations.
            assert!((zeros - p).abs() < 4.0 * (p * (1.0 - p) / x.len() as f32).sqrt(), "{p}: {zeros}");
            // Both halves of a word, and all words.
            for first in 0..8 {
                let zeros = x.iter().skip(first).step_by(8).filter(|x| **x == 0.0).count() as f32 / 131_072.0;
                assert!((zeros - p).abs() < 4.0 * (p * (1.0 - p) / 131_072.0).sqrt(), "{p}, {first}: {zeros}");
            }
        }
    }
}
