//! Random tensors from a seed: the same numbers on every machine, which candle's generator on the CPU does not promise.

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// Normally distributed values with mean 0 and standard deviation `std`: `shape`, f32. What trained weights look like.
///
/// # Errors
/// A shape without elements, an `std` that is not finite.
pub fn normal(shape: &[usize], std: f64, seed: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    values(shape, std, || normal_value(&mut rng))
}

/// Student's t distribution, `std` times a variable with `degrees` of freedom: `shape`, f32. The fewer the degrees, the
/// more and the larger the outliers; from 30 on it is hardly different from [`normal`].
///
/// t = z / sqrt((z_1^2 + ... + z_n^2) / n) for n degrees and standard normal z.
///
/// # Errors
/// As [`normal`], and no degrees of freedom.
pub fn heavy_tailed(shape: &[usize], std: f64, degrees: usize, seed: u64) -> Result<Tensor> {
    if degrees == 0 {
        return Err(Error::new("no degrees of freedom").at("degrees").expected("at least 1").found("0"));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    values(shape, std, || {
        let z = normal_value(&mut rng);
        let square: f64 = (0..degrees).map(|_| normal_value(&mut rng).powi(2)).sum();
        z / (square / degrees as f64).sqrt()
    })
}

/// Box and Muller's sine: one normal value from two uniform ones.
fn normal_value(rng: &mut ChaCha8Rng) -> f64 {
    // 1 - u is above 0, so that the logarithm is finite.
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).sin()
}

fn values(shape: &[usize], std: f64, mut next: impl FnMut() -> f64) -> Result<Tensor> {
    let n = shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d)).filter(|n| (1..=1 << 30).contains(n));
    let Some(n) = n else {
        return Err(Error::new("not a shape to fill")
            .at("shape")
            .expected("1 to 2^30 elements")
            .found(format!("{shape:?}")));
    };
    if !std.is_finite() {
        return Err(Error::new("not a standard deviation").at("std").expected("a number").found(std.to_string()));
    }
    let data: Vec<f32> = (0..n).map(|_| (std * next()) as f32).collect();
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(t: &Tensor) -> (f64, f64, f64) {
        let x = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let n = x.len() as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let power = |p: i32| x.iter().map(|&v| (f64::from(v) - mean).powi(p)).sum::<f64>() / n;
        (mean, power(2).sqrt(), power(4) / power(2).powi(2))
    }

    #[test]
    fn the_moments_are_those_of_the_distribution() {
        let (mean, std, kurtosis) = moments(&normal(&[512, 512], 0.02, 1).unwrap());
        assert!(mean.abs() < 2e-4 && (std - 0.02).abs() < 1e-4 && (kurtosis - 3.0).abs() < 0.1);
        // Student's t with 5 degrees: variance 5/3, kurtosis 9 (slow to converge).
        let (_, std, kurtosis) = moments(&heavy_tailed(&[512, 512], 1.0, 5, 1).unwrap());
        assert!((std * std - 5.0 / 3.0).abs() < 0.1 && kurtosis > 5.0, "{std} {kurtosis}");
    }

    #[test]
    fn a_seed_gives_the_same_values() {
        let first = |seed| normal(&[4], 1.0, seed).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(first(7), first(7));
        assert_ne!(first(7), first(8));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert!(normal(&[0, 4], 1.0, 1).is_err() && normal(&[usize::MAX, 2], 1.0, 1).is_err());
        assert!(normal(&[4], f64::NAN, 1).is_err() && heavy_tailed(&[4], 1.0, 0, 1).is_err());
    }
}
