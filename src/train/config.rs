//! [`TrainConfig`]: what to train with, under the names of transformers' `TrainingArguments`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::config_check;
use crate::{Error, Result};

/// The optimizer. All are AdamW; they differ in the memory of their two moments and in where that memory is.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Optim {
    /// `adamw` (`adamw_torch`): moments in f32, 8 bytes for each trained parameter; decays before the update.
    #[serde(rename = "adamw", alias = "adamw_torch")]
    AdamW,
    /// `adamw_8bit` (`adamw_bnb_8bit`): moments in blockwise 8 bit, about 2 bytes for each parameter; tensors of fewer than
    /// 4096 elements keep f32 moments; decays after the update.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    AdamW8bit,
    /// `paged_adamw_8bit`: the arithmetic of `adamw_8bit`; the moments may live on the host.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamW8bit,
    /// `paged_adamw_32bit` (`paged_adamw`): f32 moments with bitsandbytes' order of operations; they may live on the host.
    #[serde(rename = "paged_adamw_32bit", alias = "paged_adamw")]
    PagedAdamW32bit,
}

impl Optim {
    /// Every optimizer, in the order of the documentation.
    pub const ALL: [Optim; 4] = [Optim::AdamW, Optim::AdamW8bit, Optim::PagedAdamW8bit, Optim::PagedAdamW32bit];

    /// The name in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Optim::AdamW => "adamw",
            Optim::AdamW8bit => "adamw_8bit",
            Optim::PagedAdamW8bit => "paged_adamw_8bit",
            Optim::PagedAdamW32bit => "paged_adamw_32bit",
        }
    }

    /// Whether the moments are stored in blockwise 8 bit (in tensors of at least 4096 elements).
    pub fn is_8bit(self) -> bool {
        matches!(self, Optim::AdamW8bit | Optim::PagedAdamW8bit)
    }

    /// Whether the moments may live on the host.
    pub fn is_paged(self) -> bool {
        matches!(self, Optim::PagedAdamW8bit | Optim::PagedAdamW32bit)
    }
}

impl fmt::Display for Optim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Optim {
    type Err = Error;

    /// Reads a name as it stands in configuration files, bitsandbytes' and transformers' other names included.
    fn from_str(name: &str) -> Result<Self> {
        config_check::named("optim", name, &Optim::ALL.map(Optim::name))
    }
}

/// The shape of the learning rate over the steps; see [`lr_at`](super::lr_at) for the formulae.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// The same at every step. It has no warmup: transformers ignores one silently, this crate refuses it.
    Constant,
    /// A linear warmup, then the same at every step.
    ConstantWithWarmup,
    /// A linear warmup, then a straight line to 0 at the end.
    Linear,
    /// A linear warmup, then half a cosine wave to 0 at the end.
    Cosine,
}

impl LrScheduler {
    /// Every scheduler, in the order of the documentation.
    pub const ALL: [LrScheduler; 4] =
        [LrScheduler::Constant, LrScheduler::ConstantWithWarmup, LrScheduler::Linear, LrScheduler::Cosine];

    /// The name in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            LrScheduler::Constant => "constant",
            LrScheduler::ConstantWithWarmup => "constant_with_warmup",
            LrScheduler::Linear => "linear",
            LrScheduler::Cosine => "cosine",
        }
    }
}

impl fmt::Display for LrScheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LrScheduler {
    type Err = Error;

    /// Reads a name as it stands in configuration files.
    fn from_str(name: &str) -> Result<Self> {
        config_check::named("lr_scheduler_type", name, &LrScheduler::ALL.map(LrScheduler::name))
    }
}

/// What to train with: the fields of transformers' `TrainingArguments` that apply, under their names.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
///
/// The defaults are those of the QLoRA paper for 7B models where it gives one (learning rate, clipping, betas, constant
/// schedule), not transformers', which are for full fine-tuning. Nothing derived is stored: see
/// [`total_steps`](Self::total_steps), [`effective_batch`](Self::effective_batch) and
/// [`warmup`](Self::warmup).
///
/// ```
/// use tunebook::train::{LrScheduler, TrainConfig};
/// let cfg = TrainConfig::default()
///     .max_steps(60)
///     .learning_rate(2e-4)
///     .lr_scheduler_type(LrScheduler::Cosine)
///     .warmup_steps(5);
/// assert_eq!(cfg.validate_for(1000)?, 60);
/// assert_eq!(TrainConfig::from_toml_str(&cfg.to_toml()?)?, cfg);
///
/// let e = TrainConfig::from_toml_str("learing_rate = 2e-4").unwrap_err();
/// assert_eq!(e.next_step(), Some("did you mean `learning_rate`?"));
/// # Ok::<(), tunebook::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Times through the data set; a fraction stops inside the last one. More epochs fit the data better and, on small data
    /// sets, repeat it instead of learning from it. Ignored when `max_steps` is given.
    pub num_train_epochs: f64,
    /// Optimizer steps in all, whatever the size of the data set; `None` (leave it out): from `num_train_epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Sequences in one forward and backward pass (micro-step). Larger uses the device better and costs activation memory in
    /// proportion.
    pub per_device_train_batch_size: usize,
    /// Micro-steps in one optimizer step. Multiplies the effective batch without memory, and the time of a step with it. The
    /// loss is the mean over all trained tokens of the step, so 8x1 and 4x2 give the same result.
    pub gradient_accumulation_steps: usize,
    /// The optimizer: 8-bit ones save 6 bytes for each trained parameter, paged ones keep the rest off the device.
    pub optim: Optim,
    /// The peak of the learning rate. Higher learns faster until it diverges; LoRA bears about ten times what full
    /// fine-tuning does.
    pub learning_rate: f64,
    /// Decoupled weight decay: each step also multiplies the trained weights by `1 - lr * weight_decay`. Pulls LoRA towards
    /// the unchanged base model.
    pub weight_decay: f64,
    /// Decay of the first moment: the gradient is averaged over about `1 / (1 - adam_beta1)` steps.
    pub adam_beta1: f64,
    /// Decay of the second moment: lower adapts faster to changes in the size of gradients, and is noisier.
    pub adam_beta2: f64,
    /// Added to the root of the second moment. Larger damps the steps of weights with tiny gradients.
    pub adam_epsilon: f64,
    /// Gradients whose total norm is above this are scaled down to it: one bad batch cannot throw the run off. 0: off.
    pub max_grad_norm: f64,
    /// Steps over which the learning rate rises from 0 to its peak. Not together with `warmup_ratio`. The first step then has
    /// a learning rate of exactly 0.
    pub warmup_steps: u64,
    /// The same as a share of all steps, rounded up: from 0 to below 1. Not together with `warmup_steps`.
    pub warmup_ratio: f64,
    /// The curve of the learning rate after warmup. `constant` refuses warmup (use `constant_with_warmup`).
    pub lr_scheduler_type: LrScheduler,
    /// A new order of the examples in every epoch, from `seed`; `false`: the order of the file, as for curricula.
    pub shuffle: bool,
    /// Batches of similar length: fewer token-count buckets and steadier steps, for a less random order. Nothing is padded
    /// either way.
    pub group_by_length: bool,
    /// Steps between checkpoints: what a killed run can lose. The last step always has one. 0: only the last.
    pub save_steps: u64,
    /// Steps between lines of progress; every step is recorded in any case.
    pub logging_steps: u64,
    /// Checkpoints to keep; older ones are deleted. `None` (leave it out): all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_total_limit: Option<usize>,
    /// Steps between evaluations, when the run has an evaluation set; `None` (leave it out): only when asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_steps: Option<u64>,
    /// The source of all randomness: order of examples, initial LoRA weights, dropout. The same seed gives the same bits.
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            num_train_epochs: 1.0,
            max_steps: None,
            per_device_train_batch_size: 4,
            gradient_accumulation_steps: 1,
            optim: Optim::AdamW,
            learning_rate: 2e-4,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 0.3,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            lr_scheduler_type: LrScheduler::Constant,
            shuffle: true,
            group_by_length: false,
            save_steps: 50,
            logging_steps: 10,
            save_total_limit: Some(3),
            eval_steps: None,
            seed: 42,
        }
    }
}

/// One setter for each field, so that a cell reads as a sentence.
macro_rules! setters {
    ($($field:ident: $ty:ty => $wrap:expr;)*) => {
        impl TrainConfig {
            $(
                #[doc = concat!("This configuration with another [`", stringify!($field), "`](#structfield.", stringify!($field), ").")]
                pub fn $field(mut self, value: $ty) -> Self {
                    self.$field = $wrap(value);
                    self
                }
            )*
        }
    };
}

setters! {
    num_train_epochs: f64 => std::convert::identity;
    max_steps: u64 => Some;
    per_device_train_batch_size: usize => std::convert::identity;
    gradient_accumulation_steps: usize => std::convert::identity;
    optim: Optim => std::convert::identity;
    learning_rate: f64 => std::convert::identity;
    weight_decay: f64 => std::convert::identity;
    adam_beta1: f64 => std::convert::identity;
    adam_beta2: f64 => std::convert::identity;
    adam_epsilon: f64 => std::convert::identity;
    max_grad_norm: f64 => std::convert::identity;
    warmup_steps: u64 => std::convert::identity;
    warmup_ratio: f64 => std::convert::identity;
    lr_scheduler_type: LrScheduler => std::convert::identity;
    shuffle: bool => std::convert::identity;
    group_by_length: bool => std::convert::identity;
    save_steps: u64 => std::convert::identity;
    logging_steps: u64 => std::convert::identity;
    save_total_limit: usize => Some;
    eval_steps: u64 => Some;
    seed: u64 => std::convert::identity;
}
