//! One run under every method: what it takes here, exactly, and what it takes elsewhere, estimated.

use candle_core::DType;

use super::{Estimate, EstimateConfig, MemoryPlan, Method, PlanConfig};
use crate::Result;
use crate::lora::LoraConfig;
use crate::nf4::Nf4Config;

/// One method: our plan, and the estimate for transformers + PEFT + bitsandbytes.
#[derive(Clone, Debug)]
pub struct MethodRow {
    /// E.g. `QLoRA`, `inference, 4-bit`.
    pub name: String,
    /// Ours: exact, because the engine allocates it.
    pub plan: MemoryPlan,
    /// Theirs: an estimate of the peak of PyTorch's allocator.
    pub estimate: Estimate,
}

/// The same sizes under every method; made by [`MemoryPlan::methods`].
///
/// `notebooks/09_trade_offs.ipynb` explains it.
#[derive(Clone)]
pub struct MethodTable {
    /// The model's name.
    pub model: String,
    /// Sequences per micro-batch.
    pub micro_batch_size: usize,
    /// Tokens per sequence.
    pub seq: usize,
    /// Full fine-tuning, LoRA, QLoRA, inference.
    pub rows: Vec<MethodRow>,
}

impl MemoryPlan {
    /// This plan's model, batch, rank and recomputation under every method, in the 16-bit compute of a GPU: full
    /// fine-tuning (pure bf16, and with f32 master weights), LoRA, QLoRA, and inference with dense and 4-bit weights.
    ///
    /// The full methods use AdamW, the others this plan's optimizer.
    ///
    /// # Errors
    /// Sizes that one of the methods refuses.
    pub fn methods(&self) -> Result<MethodTable> {
        let base = PlanConfig { compute_dtype: DType::BF16, ..self.config().clone() };
        let lora = || Some(base.lora.clone().unwrap_or_default());
        let nf4 = || Some(base.quantization.unwrap_or_default());
        let with = |method, lora: Option<LoraConfig>, quantization: Option<Nf4Config>| {
            let optim = if lora.is_some() { base.optim } else { crate::train::Optim::AdamW };
            PlanConfig { method, lora, quantization, optim, ..base.clone() }
        };
        let configs = [
            ("full fine-tuning, pure bf16", with(Method::FullPureBf16, None, None)),
            ("full fine-tuning, mixed precision", with(Method::Full, None, None)),
            ("LoRA", with(Method::Lora, lora(), None)),
            ("QLoRA", with(Method::Qlora, lora(), nf4())),
            ("inference, 16-bit", with(Method::Inference, None, None)),
            ("inference, 4-bit", with(Method::Inference, None, nf4())),
        ];
        let row = |(name, config): (&str, PlanConfig)| -> Result<MethodRow> {
            let plan = MemoryPlan::new(self.spec(), config)?;
            let estimate = Estimate::new(self.spec(), EstimateConfig::like(&plan))?;
            Ok(MethodRow { name: name.to_owned(), plan, estimate })
        };
        Ok(MethodTable {
            model: self.spec().name.clone(),
            micro_batch_size: base.micro_batch_size,
            seq: base.max_seq_length,
            rows: configs.into_iter().map(row).collect::<Result<_>>()?,
        })
    }
}
