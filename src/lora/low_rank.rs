//! The best approximation of a matrix by one of low rank: a truncated singular value decomposition by randomised subspace
//! iteration (Halko, Martinsson, Tropp, arXiv 0909.4061).

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// Directions beyond the rank that are carried along.
const SPARE: usize = 8;

/// `W ~ u diag(s) v`, singular values falling.
pub(super) struct LowRank {
    /// Row-major `[m, r]`, orthonormal columns.
    pub u: Vec<f32>,
    /// `[r]`.
    pub s: Vec<f32>,
    /// Row-major `[r, n]`, orthonormal rows.
    pub v: Vec<f32>,
}

/// The `r` largest singular values of `w` `[m, n]` (f32) with their vectors; more `iterations`, more exact.
pub(super) fn low_rank(w: &Tensor, r: usize, iterations: usize, seed: u64) -> Result<LowRank> {
    let (m, n) = w.dims2()?;
    if r > m.min(n) {
        return Err(Error::new("the rank is above the weight's own")
            .expected(format!("at most {}", m.min(n)))
            .found(r.to_string())
            .next("choose a smaller r"));
    }
    let l = (r + SPARE).min(m.min(n));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let start: Vec<f32> = (0..n * l).map(|_| (0..4).map(|_| rng.random_range(-1f32..1.0)).sum()).collect();
    let wt = w.t()?.contiguous()?;
    let mut q = orthonormal(&w.matmul(&Tensor::from_vec(start, (n, l), &Device::Cpu)?)?)?;
    for _ in 0..iterations {
        let z = orthonormal(&wt.matmul(&q)?)?;
        q = orthonormal(&w.matmul(&z)?)?;
    }
    // W ~ q (q^T W), and the small matrix (q^T W)(q^T W)^T has the squares of the singular values.
    let b = q.t()?.contiguous()?.matmul(w)?;
    let wide = b.to_dtype(DType::F64)?;
    let mut gram = wide.matmul(&wide.t()?.contiguous()?)?.to_vec2::<f64>()?;
    let vectors = eigenvectors(&mut gram);
    let mut order: Vec<usize> = (0..l).collect();
    order.sort_by(|&i, &j| gram[j][j].total_cmp(&gram[i][i]));
    order.truncate(r);
    let s: Vec<f32> = order.iter().map(|&i| gram[i][i].max(0.0).sqrt() as f32).collect();
    let e: Vec<f32> =
        (0..l).flat_map(|row| order.iter().map(move |&i| (row, i))).map(|(row, i)| vectors[row][i] as f32).collect();
    let e = Tensor::from_vec(e, (l, r), &Device::Cpu)?;
    let u = q.matmul(&e)?.flatten_all()?.to_vec1::<f32>()?;
    let mut v = e.t()?.contiguous()?.matmul(&b)?.flatten_all()?.to_vec1::<f32>()?;
    for (row, s) in v.chunks_exact_mut(n).zip(&s) {
        // A singular value of 0 has no direction: it takes no part.
        let inverse = if *s > 0.0 { 1.0 / s } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= inverse);
    }
    Ok(LowRank { u, s, v })
}

/// Orthonormal columns that span those of `x` `[m, l]`: Gram-Schmidt in f64, twice.
fn orthonormal(x: &Tensor) -> Result<Tensor> {
    let (m, l) = x.dims2()?;
    let mut columns = x.t()?.contiguous()?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    for i in 0..l {
        let (before, rest) = columns.split_at_mut(i);
        let column = &mut rest[0];
        for _ in 0..2 {
            for other in before.iter() {
                let along: f64 = column.iter().zip(other).map(|(a, b)| a * b).sum();
                column.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let length = column.iter().map(|x| x * x).sum::<f64>().sqrt();
        let factor = if length > 1e-30 { 1.0 / length } else { 0.0 };
        column.iter_mut().for_each(|x| *x *= factor);
    }
    let flat: Vec<f32> = (0..m).flat_map(|row| columns.iter().map(move |c| c[row] as f32)).collect();
    Ok(Tensor::from_vec(flat, (m, l), &Device::Cpu)?)
}

/// Jacobi's method on a symmetric matrix, which becomes diagonal: the eigenvectors as columns.
fn eigenvectors(a: &mut [Vec<f64>]) -> Vec<Vec<f64>> {
    let n = a.len();
    let mut v: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let size: f64 = a.iter().flatten().map(|x| x * x).sum();
    for _ in 0..60 {
        let off: f64 = (0..n)
            .flat_map(|i| (0..n).filter(move |&j| j != i).map(move |j| (i, j)))
            .map(|(i, j)| a[i][j].powi(2))
            .sum();
        if off <= 1e-26 * size {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q] == 0.0 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for row in a.iter_mut().chain(v.iter_mut()) {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                let (above, below) = a.split_at_mut(q);
                for (x, y) in above[p].iter_mut().zip(&mut below[0]) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
            }
        }
    }
    v
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_low_rank_is_found_again() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1f32..1.0)).collect() };
        for (m, n, r) in [(40, 60, 5), (60, 40, 3), (10, 12, 10), (300, 90, 16)] {
            let (a, b) = (draw(m * r), draw(r * n));
            let w = Tensor::from_vec(a, (m, r), &Device::Cpu)
                .unwrap()
                .matmul(&Tensor::from_vec(b, (r, n), &Device::Cpu).unwrap())
                .unwrap();
            let found = low_rank(&w, r, 3, 1).unwrap();
            let w = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut worst = 0f32;
            for i in 0..m {
                for j in 0..n {
                    let x: f32 = (0..r).map(|k| found.u[i * r + k] * found.s[k] * found.v[k * n + j]).sum();
                    worst = worst.max((x - w[i * n + j]).abs());
                }
            }
            assert!(worst < 1e-4, "{m} x {n}, rank {r}: {worst}");
            assert!(found.s.is_sorted_by(|a, b| a >= b));
        }
        assert!(low_rank(&Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap(), 4, 1, 1).is_err());
    }
}
