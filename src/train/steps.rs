//! What follows from a [`TrainConfig`] and a number of examples: steps, epochs and the batches of each step.

use super::{Problem, TrainConfig};
use crate::{Error, Result};

/// The micro-batches of one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepBatches {
    /// The epoch, from 0: which order of the examples.
    pub epoch: u64,
    /// The first micro-batch, from 0, within that epoch: examples `first * batch ..` of the epoch's order.
    pub first: u64,
    /// How many micro-batches: `gradient_accumulation_steps`, or what is left of the epoch.
    pub count: u64,
}

impl TrainConfig {
    /// Examples in one optimizer step: `per_device_train_batch_size * gradient_accumulation_steps` (fewer at the end of an
    /// epoch).
    pub fn effective_batch(&self) -> usize {
        self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps)
    }

    /// Micro-batches in one epoch of `n_examples`; the last one may be smaller.
    pub fn batches_per_epoch(&self, n_examples: usize) -> u64 {
        n_examples.div_ceil(self.per_device_train_batch_size.max(1)) as u64
    }

    /// Optimizer steps in one epoch of `n_examples`: an epoch's last step takes what is left of it, so that no step mixes
    /// two epochs (as the Trainer of transformers 5 does).
    pub fn steps_per_epoch(&self, n_examples: usize) -> u64 {
        self.batches_per_epoch(n_examples).div_ceil(self.gradient_accumulation_steps.max(1) as u64).max(1)
    }

    /// Optimizer steps of the whole run: `max_steps`, or `ceil(num_train_epochs * steps per epoch)`.
    ///
    /// # Errors
    /// No examples, or a number of steps that cannot be counted.
    pub fn total_steps(&self, n_examples: usize) -> Result<u64> {
        if n_examples == 0 {
            return Err(Error::new("there is nothing to train on")
                .at("data set")
                .expected("at least one example")
                .found("0 examples")
                .next("look at why every row was left out"));
        }
        if let Some(steps) = self.max_steps {
            return Ok(steps);
        }
        let steps = (self.num_train_epochs * self.steps_per_epoch(n_examples) as f64).ceil();
        // 2^53: from there on f64 cannot count single steps.
        if (1.0..9_007_199_254_740_992.0).contains(&steps) {
            return Ok(steps as u64);
        }
        Err(Error::new("the number of steps cannot be counted")
            .at("num_train_epochs")
            .expected("at least one step, fewer than 2^53")
            .found(format!("{} epochs of {n_examples} examples: {steps} steps", self.num_train_epochs))
            .next("give `max_steps` instead"))
    }

    /// Warmup steps of a run of `total` steps: `warmup_steps`, or `ceil(warmup_ratio * total)`.
    pub fn warmup(&self, total: u64) -> u64 {
        if self.warmup_steps > 0 { self.warmup_steps } else { (self.warmup_ratio * total as f64).ceil() as u64 }
    }

    /// [`validate`](Self::validate), and that it makes sense for this many examples; returns the total number of steps.
    ///
    /// # Errors
    /// What [`validate`](Self::validate) and [`total_steps`](Self::total_steps) refuse; warmup as long as the whole run.
    pub fn validate_for(&self, n_examples: usize) -> Result<u64> {
        self.validate()?;
        let total = self.total_steps(n_examples)?;
        let warmup = self.warmup(total);
        if warmup > 0 && warmup >= total {
            let field = if self.warmup_steps > 0 { "warmup_steps" } else { "warmup_ratio" };
            return Err(Problem {
                field: field.into(),
                expected: format!("fewer than the {total} steps of this run"),
                found: format!("{warmup} warmup steps"),
                next: "the learning rate would never reach its peak: shorten the warmup or train longer".into(),
            }
            .into_error());
        }
        Ok(total)
    }

    /// The micro-batches of optimizer step `step` (from 0).
    pub fn step_batches(&self, step: u64, n_examples: usize) -> StepBatches {
        let per_epoch = self.steps_per_epoch(n_examples);
        let accumulation = self.gradient_accumulation_steps.max(1) as u64;
        let first = (step % per_epoch) * accumulation;
        let left = self.batches_per_epoch(n_examples).saturating_sub(first);
        StepBatches { epoch: step / per_epoch, first, count: accumulation.min(left) }
    }

    /// Epochs done after `steps` optimizer steps, as a fraction: what a report shows.
    pub fn epochs_done(&self, steps: u64, n_examples: usize) -> f64 {
        steps as f64 / self.steps_per_epoch(n_examples) as f64
    }
}
