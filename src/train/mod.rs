//! Training: what to do ([`TrainConfig`]), what happened ([`StepReport`], [`Metrics`]), and what survives
//! ([`RunDir`], [`CheckpointDir`]).
//!
//! A run's directory is described at [`RunDir`] and in `state.rs`; a checkpoint is written beside, synced and renamed, and
//! found again by its manifest, so that a process killed at any instant goes on from the last whole one.

mod checkpoint;
mod checkpoint_read;
mod config;
mod config_check;
mod dataset_file;
mod exact_json;
mod fingerprint;
mod lock;
mod metrics;
#[cfg(feature = "polars")]
mod metrics_frame;
mod progress;
mod run;
mod schedule;
mod state;
mod steps;
mod tensor_file;

pub use crate::interrupt::{clear_interrupt, interrupt, interrupt_until_cleared, interrupted, take_interrupt};
pub use checkpoint::{Manifest, ManifestFile, write_checkpoint};
pub use checkpoint_read::{
    CheckpointDir, CheckpointScan, DamagedCheckpoint, clean_leftovers, latest_checkpoint, scan_checkpoints,
};
pub use config::{LrScheduler, Optim, TrainConfig};
pub use config_check::Problem;
pub use dataset_file::{load_dataset, save_dataset};
pub use fingerprint::fingerprint_dir;
pub use metrics::{EVALUATIONS_FILE, EvalReport, METRICS_FILE, Metrics, MetricsLog, StepReport};
#[cfg(feature = "polars")]
pub use metrics_frame::metrics_frame;
pub use run::{MicroReport, Run, Steps};
pub use schedule::{lr_at, lr_curve};
pub use state::{BaseRecord, DatasetRecord, RUN_FORMAT_VERSION, RngState, RunDir, RunRecord, TrainState};
pub use steps::StepBatches;
pub use tensor_file::{TensorFile, TensorSlice};
