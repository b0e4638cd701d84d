//! What an [`Estimate`](super::Estimate) is asked.

use crate::model::ModelSpec;
use crate::plan::{Checkpointing, MemoryPlan, Method};
use crate::train::Optim;
use crate::{Error, Result};

/// What is held in which precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EstimateMethod {
    /// Full fine-tuning with weights, gradients and both Adam moments in bf16: 8 bytes per parameter.
    FullBf16,
    /// Full fine-tuning in mixed precision: bf16 weights and gradients, f32 master weights and moments: 16 bytes per
    /// parameter.
    FullMixed,
    /// LoRA on a bf16 base; the adapter is f32 (PEFT's `autocast_adapter_dtype`) under bf16 autocast.
    Lora,
    /// LoRA on an NF4 base after `prepare_model_for_kbit_training`, which casts embeddings, norms and `lm_head` to f32
    /// and so makes the residual stream f32.
    Qlora,
    /// Generating with bf16 weights.
    Inference,
    /// Generating with an NF4 base.
    Inference4bit,
}

impl EstimateMethod {
    /// Whether there is a backward pass.
    pub fn trains(self) -> bool {
        !matches!(self, EstimateMethod::Inference | EstimateMethod::Inference4bit)
    }

    /// Whether the linear layers are NF4.
    pub fn is_4bit(self) -> bool {
        matches!(self, EstimateMethod::Qlora | EstimateMethod::Inference4bit)
    }

    /// Whether only an adapter is trained.
    pub fn has_adapter(self) -> bool {
        matches!(self, EstimateMethod::Lora | EstimateMethod::Qlora)
    }

    /// The name that a table shows.
    pub fn name(self) -> &'static str {
        match self {
            EstimateMethod::FullBf16 => "full fine-tuning, bf16",
            EstimateMethod::FullMixed => "full fine-tuning, mixed precision",
            EstimateMethod::Lora => "LoRA, bf16 base",
            EstimateMethod::Qlora => "QLoRA, NF4 base",
            EstimateMethod::Inference => "inference, bf16",
            EstimateMethod::Inference4bit => "inference, NF4",
        }
    }
}

/// How attention is computed.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Flash attention or `scaled_dot_product_attention`: memory grows with the length.
    Flash,
    /// The plain products: memory grows with the square of the length.
    Eager,
}

/// How the loss is computed from the last hidden state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EstimateLoss {
    /// All logits at once, as transformers does.
    Full,
    /// That many tokens at a time, recomputed in the backward pass.
    Chunked(usize),
}

/// The run whose memory is estimated.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
///
/// Start from one of the constructors and change fields with `..`:
/// `EstimateConfig { seq: 2048, ..EstimateConfig::qlora() }`.
#[derive(Clone, Debug, PartialEq)]
pub struct EstimateConfig {
    /// What is held in which precision.
    pub method: EstimateMethod,
    /// Quantize the absmax of NF4 too (`bnb_4bit_use_double_quant`).
    pub double_quant: bool,
    /// LoRA's rank.
    pub r: usize,
    /// Last parts of the names of the adapted modules (`q_proj`); empty means all-linear: every one but `lm_head`.
    pub target_modules: Vec<String>,
    /// Above zero, each adapted module keeps a dropped-out copy of its input and a mask of one byte per element.
    pub lora_dropout: f64,
    /// Sequences per forward pass.
    pub micro_batch_size: usize,
    /// Tokens per sequence, padding included; in inference, prompt and completion together.
    pub seq: usize,
    /// Forward passes per update; above one, gradients are live while the logits are.
    pub gradient_accumulation_steps: usize,
    /// Keep only each layer's input and recompute the layer in the backward pass.
    pub gradient_checkpointing: bool,
    /// The optimizer. `AdamW` is `adamw_torch_fused`, with both moments in the parameter's dtype; bitsandbytes' 8-bit
    /// ones keep f32 absmax per 256 parameters on the device, and page tensors from 100,000 elements.
    pub optim: Optim,
    /// How attention is computed.
    pub attention: Attention,
    /// How the loss is computed.
    pub loss: EstimateLoss,
    /// The model's output object, and so its 16-bit logits, is still referenced in the backward pass.
    pub keep_outputs: bool,
}

impl EstimateConfig {
    /// QLoRA as in the paper and the article: NF4 with nested quantization, r 64 on every linear layer, paged 8-bit
    /// AdamW, checkpointing, 4 x 512 tokens.
    pub fn qlora() -> Self {
        EstimateConfig {
            method: EstimateMethod::Qlora,
            double_quant: true,
            r: 64,
            target_modules: Vec::new(),
            lora_dropout: 0.0,
            micro_batch_size: 4,
            seq: 512,
            gradient_accumulation_steps: 1,
            gradient_checkpointing: true,
            optim: Optim::PagedAdamW8bit,
            attention: Attention::Flash,
            loss: EstimateLoss::Full,
            keep_outputs: false,
        }
    }

    /// The same run on a bf16 base, with 32-bit AdamW.
    pub fn lora() -> Self {
        EstimateConfig { method: EstimateMethod::Lora, optim: Optim::AdamW, ..Self::qlora() }
    }

    /// Full fine-tuning, 4 x 512 tokens, checkpointing; `mixed` keeps f32 master weights and moments.
    pub fn full(mixed: bool) -> Self {
        let method = if mixed { EstimateMethod::FullMixed } else { EstimateMethod::FullBf16 };
        EstimateConfig { method, optim: Optim::AdamW, ..Self::qlora() }
    }

    /// Generating one sequence of up to 2,048 tokens.
    pub fn inference(four_bit: bool) -> Self {
        let method = if four_bit { EstimateMethod::Inference4bit } else { EstimateMethod::Inference };
        EstimateConfig { method, micro_batch_size: 1, seq: 2048, ..Self::qlora() }
    }

    /// The same run as `plan`, as that stack would do it: all logits at once, and all layers recomputed or none.
    pub fn like(plan: &MemoryPlan) -> Self {
        let config = plan.config();
        let method = match config.method {
            Method::Full => EstimateMethod::FullMixed,
            Method::FullPureBf16 => EstimateMethod::FullBf16,
            Method::Lora => EstimateMethod::Lora,
            Method::Qlora => EstimateMethod::Qlora,
            Method::Inference if config.quantization.is_some() => EstimateMethod::Inference4bit,
            Method::Inference => EstimateMethod::Inference,
        };
        let mut target_modules: Vec<String> = Vec::new();
        for leaf in plan.targets().into_iter().flat_map(|t| &t.matched).filter_map(|m| m.name.rsplit('.').next()) {
            if !target_modules.iter().any(|t| t == leaf) {
                target_modules.push(leaf.to_owned());
            }
        }
        EstimateConfig {
            method,
            double_quant: config.quantization.is_none_or(|q| q.double_quant),
            r: config.lora.as_ref().map_or(0, |l| l.r),
            target_modules,
            lora_dropout: config.lora.as_ref().map_or(0.0, |l| l.lora_dropout),
            micro_batch_size: config.micro_batch_size,
            seq: config.max_seq_length,
            gradient_checkpointing: config.checkpointing != Checkpointing::None,
            optim: config.optim,
            ..Self::qlora()
        }
    }

    /// Refuses sizes of zero and targets that no linear module of the model has.
    pub(super) fn check(&self, spec: &ModelSpec) -> Result<()> {
        let sizes = [
            ("micro_batch_size", self.micro_batch_size),
            ("seq", self.seq),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("r", if self.method.has_adapter() { self.r } else { 1 }),
            ("loss chunk", if let EstimateLoss::Chunked(n) = self.loss { n } else { 1 }),
        ];
        if let Some((field, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return Err(Error::new("nothing to estimate").at(*field).expected("at least 1").found("0"));
        }
        check_sizes(spec, self)?;
        let leaves = leaves(spec);
        match self.target_modules.iter().find(|t| !leaves.contains(t)) {
            None => Ok(()),
            Some(t) => Err(unknown_target(t, &leaves)),
        }
    }

    /// Whether the linear module of that leaf name has an adapter.
    pub(super) fn adapts(&self, leaf: &str) -> bool {
        let all = self.target_modules.is_empty() && leaf != "lm_head";
        self.method.has_adapter() && (all || self.target_modules.iter().any(|t| t == leaf))
    }
}

/// Above these a product of sizes could overflow 128 bits; real models are far below.
const MAX_SIZE: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 16;

fn check_sizes(spec: &ModelSpec, config: &EstimateConfig) -> Result<()> {
    let sizes = [
        ("num_hidden_layers", spec.num_hidden_layers, MAX_LAYERS),
        ("hidden_size", spec.hidden_size, MAX_SIZE),
        ("intermediate_size", spec.intermediate_size, MAX_SIZE),
        ("vocab_size", spec.vocab_size, MAX_SIZE),
        ("num_attention_heads", spec.num_attention_heads, MAX_SIZE),
        ("num_key_value_heads", spec.num_key_value_heads, MAX_SIZE),
        ("head_dim", spec.head_dim, MAX_SIZE),
        ("micro_batch_size", config.micro_batch_size, MAX_SIZE),
        ("seq", config.seq, MAX_SIZE),
        ("r", config.r, MAX_SIZE),
    ];
    match sizes.iter().find(|(_, size, max)| size > max) {
        None => Ok(()),
        Some((field, size, max)) => Err(Error::new("a size is too large to estimate")
            .at(format!("{}: {field}", spec.name))
            .expected(format!("at most {max}"))
            .found(size.to_string())
            .next("check config.json and the batch")),
    }
}

/// Last name parts of the model's linear modules, each once.
fn leaves(spec: &ModelSpec) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for m in spec.linears() {
        let leaf = m.name.rsplit('.').next().unwrap_or_default();
        if !out.iter().any(|l| l == leaf) {
            out.push(leaf.to_owned());
        }
    }
    out
}

fn unknown_target(target: &str, leaves: &[String]) -> Error {
    let nearest =
        leaves.iter().max_by(|a, b| strsim::jaro_winkler(a, target).total_cmp(&strsim::jaro_winkler(b, target)));
    Error::new("target module not found")
        .at("target_modules")
        .expected(leaves.join(", "))
        .found(format!("`{target}`"))
        .next(nearest.map_or_else(String::new, |n| format!("did you mean `{n}`?")))
}
