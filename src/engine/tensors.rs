//! What a run saves and restores: adapters or weights, and the optimizer's state, straight from the arena.

use std::borrow::Cow;

use candle_core::DType;

use super::Engine;
use super::ops::{Moments, TensorId, Zero};
use crate::{Error, Result};

/// A tensor of the training state: its name in a checkpoint and where it is.
#[derive(Clone, Debug, PartialEq)]
pub struct StateTensor {
    /// `<parameter>` or `<parameter>.<part>`, part one of exp_avg, exp_avg_sq, state1, state2, absmax1, absmax2.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    id: TensorId,
}

impl Engine {
    /// The trained parameters.
    pub fn parameters(&self) -> Vec<StateTensor> {
        let trainables = &self.plan.layout().trainables;
        trainables.iter().map(|t| self.state_tensor(t.name.clone(), t.param)).collect()
    }

    /// The optimizer's state.
    pub fn optimizer_state(&self) -> Vec<StateTensor> {
        let mut out = Vec::new();
        for t in &self.plan.layout().trainables {
            let parts = match t.moments {
                Moments::F32 { exp_avg, exp_avg_sq, .. } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
                Moments::Blockwise8bit { state1, absmax1, state2, absmax2 } => {
                    vec![("state1", state1), ("absmax1", absmax1), ("state2", state2), ("absmax2", absmax2)]
                }
            };
            out.extend(parts.into_iter().map(|(part, id)| self.state_tensor(format!("{}.{part}", t.name), id)));
        }
        out
    }

    fn state_tensor(&self, name: String, id: TensorId) -> StateTensor {
        let r = &self.plan.regions()[id.index()];
        StateTensor { name, dtype: r.dtype, shape: r.shape.clone(), id }
    }

    /// The bytes of a tensor, little-endian.
    ///
    /// # Errors
    /// What the device reports.
    pub fn state_bytes(&self, t: &StateTensor) -> Result<Cow<'_, [u8]>> {
        self.ops.read(t.id)
    }

    /// Restores the bytes of a tensor.
    ///
    /// # Errors
    /// Another number of bytes.
    pub fn set_state_bytes(&mut self, t: &StateTensor, bytes: &[u8]) -> Result<()> {
        let expected = self.plan.regions()[t.id.index()].bytes();
        if expected != bytes.len() as u64 {
            return Err(Error::new("a saved tensor has another size than the plan's")
                .at(t.name.clone())
                .expected(format!("{expected} bytes"))
                .found(format!("{} bytes", bytes.len())));
        }
        self.ops.write(t.id, bytes)?;
        self.cached = None;
        Ok(())
    }

    /// Sets accumulated gradients to zero: a partial accumulation is forgotten.
    ///
    /// # Errors
    /// What the device reports.
    pub fn zero_grads(&mut self) -> Result<()> {
        let tensors: Vec<TensorId> = self.plan.layout().trainables.iter().map(|t| t.grad).collect();
        self.ops.begin()?;
        self.ops.zero(&Zero { tensors })
    }

    /// The accumulated gradient of a trained tensor, f32; for inspection.
    ///
    /// # Errors
    /// A name that is not trained.
    pub fn gradient(&self, name: &str) -> Result<Vec<f32>> {
        let found = self.plan.layout().trainables.iter().find(|t| t.name == name);
        let t = found.ok_or_else(|| Error::new("no tensor of this name is trained").at(name.to_string()))?;
        self.read_f32(t.grad)
    }

    /// A region's elements.
    pub(super) fn read<T: bytemuck::Pod>(&self, id: TensorId) -> Result<Vec<T>> {
        Ok(bytemuck::pod_collect_to_vec(&self.ops.read(id)?))
    }

    /// A region of f32 or bf16 as f32.
    pub(super) fn read_f32(&self, id: TensorId) -> Result<Vec<f32>> {
        if self.plan.regions()[id.index()].dtype == DType::F32 {
            return self.read(id);
        }
        Ok(self.read::<half::bf16>(id)?.into_iter().map(half::bf16::to_f32).collect())
    }
}
