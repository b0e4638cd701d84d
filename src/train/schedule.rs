//! The learning rate of every step.

use super::{LrScheduler, TrainConfig};

/// The learning rate of optimizer step `step` (from 0) in a run of `total` steps.
///
/// With `w` = [`TrainConfig::warmup`], `T` = `total` and `k` = `step`, the factor on `learning_rate` is
///
/// - `k / w` while `k < w`: the first step of a warmup has a learning rate of 0;
/// - `constant`, `constant_with_warmup`: 1;
/// - `linear`: `(T - k) / (T - w)`;
/// - `cosine`: `(1 + cos(pi (k - w) / (T - w))) / 2`.
///
/// These are the factors of transformers' `get_*_schedule*` functions, computed in f64 in the same order. Steps from `T` on
/// have the value of the curve's end (0 for `linear` and `cosine`).
///
/// ```
/// use tunebook::train::{lr_at, LrScheduler, TrainConfig};
/// let cfg = TrainConfig::default().learning_rate(0.002).lr_scheduler_type(LrScheduler::Linear).warmup_steps(2);
/// assert_eq!([0, 1, 2, 11, 20].map(|k| lr_at(&cfg, k, 20)), [0.0, 0.001, 0.002, 0.001, 0.0]);
/// ```
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
pub fn lr_at(cfg: &TrainConfig, step: u64, total: u64) -> f64 {
    cfg.learning_rate * factor(cfg, step, total)
}

/// The learning rates of all `total` steps: what a plot shows.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
pub fn lr_curve(cfg: &TrainConfig, total: u64) -> Vec<f64> {
    (0..total).map(|step| lr_at(cfg, step, total)).collect()
}

fn factor(cfg: &TrainConfig, step: u64, total: u64) -> f64 {
    if cfg.lr_scheduler_type == LrScheduler::Constant {
        return 1.0;
    }
    let warmup = cfg.warmup(total);
    if step < warmup {
        return step as f64 / warmup as f64;
    }
    let after = total.saturating_sub(warmup).max(1) as f64;
    let step = step.min(total.max(warmup));
    match cfg.lr_scheduler_type {
        LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
        LrScheduler::Linear => total.saturating_sub(step) as f64 / after,
        LrScheduler::Cosine => {
            let progress = (step - warmup) as f64 / after;
            (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
        }
    }
}
