//! What the engine asks of a device beside executing operations: memory in and out.

use std::borrow::Cow;

use candle_core::{DType, Device, Tensor};

use super::layout::WeightSlot;
use super::ops::{LinearIds, NestedAbsmax, Ops, Scratch, TensorId};
use super::optimizer::AdamWHyper;
use crate::data::Batch;
use crate::model::Checkpoint;
use crate::nf4::{Absmax, Nf4Config, Nf4Tensor, quantize};
use crate::{Error, Result};

/// What changes from step to step: read by the operations, never part of them.
#[derive(Clone, Debug)]
pub struct StepState {
    /// Factor of every token's gradient: 1 / number of labels in the whole accumulated batch.
    pub loss_scale: f32,
    /// Key of the dropout masks.
    pub dropout_seed: u64,
    /// Number of the micro-step since the run began: every micro-step has masks of its own.
    pub micro_step: u64,
    /// Dropout is applied (training) or not (evaluation, generation).
    pub training: bool,
    /// The adapter takes part.
    pub adapter: bool,
    /// The text at hand is beyond [`ModelSpec::rope_switch`](crate::model::ModelSpec::rope_switch).
    pub long_text: bool,
    /// Hyper-parameters of the update.
    pub adamw: AdamWHyper,
    /// Gradients are scaled down to this global norm; 0: never.
    pub max_grad_norm: f64,
}

impl Default for StepState {
    fn default() -> Self {
        StepState {
            loss_scale: 1.0,
            dropout_seed: 0,
            micro_step: 0,
            training: false,
            adapter: true,
            long_text: false,
            adamw: AdamWHyper { lr: 0.0, weight_decay: 0.0, ..AdamWHyper::default() },
            max_grad_norm: 0.0,
        }
    }
}

/// A device with its arena: executes operations and moves tensors in and out.
pub trait Backend: Ops + Send {
    /// Scalars of the step, read by the operations.
    fn state(&mut self) -> &mut StepState;

    /// The batch that `load_batch` copies in.
    fn set_batch(&mut self, batch: Batch);

    /// What the last `lm_head_logits` computed, `[rows, V]`.
    fn logits(&self) -> &[f32];

    /// A region's bytes.
    ///
    /// # Errors
    /// What the device reports.
    fn read(&self, id: TensorId) -> Result<Cow<'_, [u8]>>;

    /// Replaces a region's bytes; `bytes` has its length.
    ///
    /// # Errors
    /// What the device reports.
    fn write(&mut self, id: TensorId, bytes: &[u8]) -> Result<()>;

    /// Fills the regions of a base weight from its source, converting or quantizing on the way.
    ///
    /// # Errors
    /// What the source and the device report.
    fn load(&mut self, slot: &WeightSlot, source: &mut WeightSource<'_>) -> Result<()>;

    /// The lengths of the rows of a module's base weight, `[out]`: DoRA's magnitudes before training.
    ///
    /// # Errors
    /// What the device reports.
    fn row_lengths(&mut self, linear: &LinearIds) -> Result<Vec<f32>>;

    /// Fills regions and scratch with NaN (all bits set): what is read after the end of its life shows.
    ///
    /// # Errors
    /// What the device reports.
    fn poison(&mut self, ids: &[TensorId], scratch: Scratch) -> Result<()>;

    /// Called before the operations of a phase.
    ///
    /// # Errors
    /// What the device reports.
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    /// Waits until everything that was asked for is done.
    ///
    /// # Errors
    /// What the device reports, of any operation since the last wait.
    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    /// Runs once before the first step, with the state that it leaves forgotten: whatever a library loads when it is first
    /// used is loaded then. False: there is nothing to load.
    fn wants_rehearsal(&self) -> bool {
        false
    }

    /// Sets the arena to zero.
    ///
    /// # Errors
    /// What the device reports.
    fn clear(&mut self) -> Result<()> {
        Ok(())
    }

    /// Bytes of device memory that this process holds; `None` on the CPU, or where the driver does not say.
    fn process_bytes(&self) -> Option<u64> {
        None
    }

    /// The device's name.
    fn device_name(&self) -> String {
        "cpu".into()
    }
}

/// Where a base weight comes from.
pub enum WeightSource<'a> {
    /// A tensor of a checkpoint, F32, BF16 or F16.
    File {
        /// The files.
        checkpoint: &'a Checkpoint,
        /// The tensor's name.
        name: &'a str,
    },
    /// A weight that was stored in 4 bits.
    Quantized(Nf4Tensor),
    /// A random weight: matrices normal with standard deviation 0.02, vectors constant.
    Drawn {
        /// Row-major shape.
        shape: &'a [usize],
        /// Every element of a vector.
        constant: f32,
        /// Fills a slice with the next values; on the host.
        draw: &'a mut dyn FnMut(&mut [f32]),
        /// For a device that draws by itself: the weight's own.
        seed: u64,
    },
}

impl WeightSource<'_> {
    /// All values as f32.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn read_f32(&mut self, out: &mut [f32]) -> Result<()> {
        match self {
            WeightSource::File { checkpoint, name } => checkpoint.read_f32_into(name, out),
            WeightSource::Quantized(q) => {
                out.copy_from_slice(&q.dequantize_f32()?);
                Ok(())
            }
            WeightSource::Drawn { draw, .. } => {
                draw(out);
                Ok(())
            }
        }
    }

    /// The weight in 4 bits, quantized on the host; a stored one with these block sizes is taken as it is.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn quantize(&mut self, config: Nf4Config) -> Result<Nf4Tensor> {
        match self {
            WeightSource::File { checkpoint, name } => quantize(&checkpoint.read_tensor(name)?, config),
            WeightSource::Quantized(q) if q.config() == config => Ok(q.clone()),
            WeightSource::Quantized(q) => quantize(&q.dequantize()?, config),
            WeightSource::Drawn { shape, draw, .. } => {
                let mut values = vec![0f32; shape.iter().product()];
                draw(&mut values);
                let tensor = Tensor::from_vec(values, *shape, &Device::Cpu)?.to_dtype(DType::BF16)?;
                quantize(&tensor, config)
            }
        }
    }
}

/// Copies a quantized weight into its regions.
pub(super) fn write_quantized(
    backend: &mut dyn Backend,
    q: &Nf4Tensor,
    packed: TensorId,
    absmax: TensorId,
    nested: Option<NestedAbsmax>,
) -> Result<()> {
    backend.write(packed, &q.packed)?;
    match (&q.absmax, nested) {
        (Absmax::F32(values), None) => backend.write(absmax, bytemuck::cast_slice(values)),
        (Absmax::Nested { codes, absmax: scales, offset, .. }, Some(nested)) => {
            backend.write(absmax, codes)?;
            backend.write(nested.absmax, bytemuck::cast_slice(scales))?;
            backend.write(nested.offset, bytemuck::bytes_of(offset))
        }
        _ => Err(Error::new("the weight's scales are not nested as the plan says")),
    }
}
