//! Loops that the compiler vectorises, compiled for the widest registers of the machine.

/// e^x to about one unit in the last place, without branches, so that a loop over it is vectorised.
///
/// Range reduction by ln 2 in two parts and a polynomial of degree 6 (Cephes `expf`); 0 below -87.3, clamped above 88.3.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.336_54, 88.376_26);
    let n = (clamped * LOG2E).round_ties_even();
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, clamped));
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_2e-3f32, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    let value = (p * r).mul_add(r, r) + 1.0;
    let scale = f32::from_bits((((n as i32) + 127) << 23) as u32);
    if x < -87.336_54 { 0.0 } else { value * scale }
}

/// Defines a function whose body is compiled for AVX-512, for AVX2 with FMA and for the baseline; the bits are the same.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the features were just detected.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the features were just detected.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// Parts of a sum that are added side by side: the order of additions is fixed, and registers are filled.
const LANES: usize = 16;

vectorised! {
    /// Dot product of two vectors of equal length.
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        let n = a.len().min(b.len());
        let (a, b) = (&a[..n], &b[..n]);
        let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
        for (x, y) in ca.zip(cb) {
            for i in 0..LANES {
                lanes[i] = x[i].mul_add(y[i], lanes[i]);
            }
        }
        lanes.iter().sum::<f32>() + tail
    }
}

vectorised! {
    /// Replaces `x` by `exp(x - shift)`; the sum.
    fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0f32; LANES];
        let mut chunks = x.chunks_exact_mut(LANES);
        for c in &mut chunks {
            for i in 0..LANES {
                c[i] = exp(c[i] - shift);
                lanes[i] += c[i];
            }
        }
        let mut tail = 0.0;
        for x in chunks.into_remainder() {
            *x = exp(*x - shift);
            tail += *x;
        }
        lanes.iter().sum::<f32>() + tail
    }
}

vectorised! {
    /// The largest element; -inf when there is none.
    fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = x.chunks_exact(LANES);
        let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m });
        for c in chunks {
            for i in 0..LANES {
                lanes[i] = if c[i] > lanes[i] { c[i] } else { lanes[i] };
            }
        }
        lanes.iter().fold(tail, |m, x| if *x > m { *x } else { m })
    }
}

vectorised! {
    /// Sum of `exp(x - shift)`.
    fn exp_sum_of(x: &[f32], shift: f32) -> f32 {
        let mut lanes = [0f32; LANES];
        let chunks = x.chunks_exact(LANES);
        let tail: f32 = chunks.remainder().iter().map(|x| exp(*x - shift)).sum();
        for c in chunks {
            for i in 0..LANES {
                lanes[i] += exp(c[i] - shift);
            }
        }
        lanes.iter().sum::<f32>() + tail
    }
}

vectorised! {
    /// `x` becomes `cap * tanh(x / cap)`.
    fn soft_cap(x: &mut [f32], cap: f32) {
        for x in x {
            let y = *x / cap;
            // tanh from e^-2|y|, which does not overflow; near 0, where 1 - e is inexact, from its series.
            let e = exp(-2.0 * y.abs());
            let square = y * y;
            let near = y * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))));
            let far = ((1.0 - e) / (1.0 + e)).copysign(y);
            *x = cap * if y.abs() < 0.15 { near } else { far };
        }
    }
}

vectorised! {
    /// Multiplies by a number.
    fn scale(x: &mut [f32], s: f32) {
        for x in x {
            *x *= s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_library_function() {
        let mut worst = 0f32;
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            worst = worst.max((exp(x) / x.exp() - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst}");
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_have_every_element() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&x, &x), (0..37).map(|i| (i * i) as f32).sum::<f32>());
        assert_eq!(max(&x), 36.0);
        let mut y = x.clone();
        assert!((exp_sum(&mut y, 36.0) - 1.581_976_7).abs() < 1e-5);
    }
}
