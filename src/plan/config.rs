//! What is asked of a plan: method, sizes, optimizer, recomputation.

use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::fmt;

use crate::lora::LoraConfig;
use crate::model::ModelSpec;
use crate::nf4::Nf4Config;
use crate::train::Optim;
use crate::{Error, Result};

/// What is trained, and in which form the base weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Every weight is trained. With 16-bit compute: f32 master weights beside a bf16 copy, f32 gradients and moments.
    Full,
    /// Every weight is trained with weights, gradients and moments all in bf16: the 8 bytes per parameter that are often
    /// quoted. Rounding loses small updates; planned so that it can be compared.
    FullPureBf16,
    /// LoRA on a dense base.
    Lora,
    /// LoRA on a 4-bit base (QLoRA, arXiv 2305.14314).
    Qlora,
    /// Nothing is trained.
    Inference,
}

impl Method {
    /// The name shown in tables.
    pub fn label(self) -> &'static str {
        match self {
            Method::Full => "full fine-tuning",
            Method::FullPureBf16 => "full fine-tuning, pure bf16",
            Method::Lora => "LoRA",
            Method::Qlora => "QLoRA",
            Method::Inference => "inference",
        }
    }

    /// Whether every weight is trained.
    pub fn is_full(self) -> bool {
        matches!(self, Method::Full | Method::FullPureBf16)
    }
}

/// Which layers keep only their input and are computed again in the backward pass (gradient checkpointing).
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// Every layer: least memory, about a third more work.
    All,
    /// No layer.
    None,
    /// The first n layers: theirs are the activations that would be held longest.
    Layers(usize),
}

impl Checkpointing {
    /// Number of recomputed layers out of `layers`.
    pub fn recomputed(self, layers: usize) -> usize {
        match self {
            Checkpointing::All => layers,
            Checkpointing::None => 0,
            Checkpointing::Layers(n) => n.min(layers),
        }
    }
}

impl fmt::Display for Checkpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Checkpointing::All => f.write_str("all layers"),
            Checkpointing::None => f.write_str("no layer"),
            Checkpointing::Layers(n) => write!(f, "the first {n} layers"),
        }
    }
}

/// What computes: the plan's temporaries and libraries' workspaces differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// The host's processor, in f32.
    Cpu,
    /// An NVIDIA GPU, in bf16, or in f32 for validation.
    #[default]
    Cuda,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
        })
    }
}

/// Everything that a plan depends on beside the model. Saved with a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanConfig {
    /// What is trained.
    pub method: Method,
    /// How the linear weights are quantized; `None`: dense.
    pub quantization: Option<Nf4Config>,
    /// The adapter; `None`: none.
    pub lora: Option<LoraConfig>,
    /// The optimizer.
    pub optim: Optim,
    /// A paged optimizer keeps its state on the device all the same, because there is room.
    pub resident_state: bool,
    /// Sequences per micro-batch.
    pub micro_batch_size: usize,
    /// Tokens per sequence; the capacity is `micro_batch_size * max_seq_length` tokens in any lengths.
    pub max_seq_length: usize,
    /// Recomputed layers.
    pub checkpointing: Checkpointing,
    /// What computes.
    pub device: DeviceKind,
    /// dtype of activations and matrix products: F32 on the CPU; BF16 on a GPU, or F32 for validation.
    #[serde(with = "crate::model::dtype_name")]
    pub compute_dtype: DType,
    /// Rows of logits that the loss holds at a time.
    pub ce_chunk: usize,
    /// The embedding table stays in pinned host memory, from which a GPU reads the rows that it needs.
    #[serde(default)]
    pub host_embeddings: bool,
    /// The inputs of recomputed layers wait in pinned host memory, copied beside the computation.
    #[serde(default)]
    pub host_checkpoints: bool,
    /// A recomputed layer's 4-bit weights are decoded once for the recomputation and the backward pass: faster, and one
    /// layer's weights in the compute dtype more memory.
    #[serde(default)]
    pub keep_dequantized: bool,
    /// Of these: only the modules with these names (`q_proj`); `None`: all. `down_proj` is never among them: its product is not
    /// recomputed.
    #[serde(default)]
    pub keep_dequantized_modules: Option<Vec<String>>,
    /// Number of layers, from the first on, whose 4-bit weights are also held in the compute dtype, so that training need not decode them. See
    /// [`PlanBuilder::dequantized_layers`](super::PlanBuilder::dequantized_layers).
    #[serde(default)]
    pub dequantized_layers: usize,
    /// Positions of the KV cache; `None`: what fits into the space that training needs anyway, at least 256.
    pub max_context: Option<usize>,
}

/// The modules whose decoded weights can be kept, with the elements of each, in the order of a layer.
pub(crate) fn kept_modules(spec: &ModelSpec) -> Vec<(String, usize)> {
    let linears = spec.linears();
    let layer = linears.iter().filter(|m| m.layer == Some(0));
    let mut out: Vec<_> = layer.map(|m| (m.leaf().to_owned(), m.out_features * m.in_features)).collect();
    // The product of the last is not recomputed.
    out.pop();
    out
}

impl PlanConfig {
    /// Whether the decoded weights of a recomputed layer's modules of this name are kept.
    pub(crate) fn keeps_dequantized(&self, name: &str) -> bool {
        self.keep_dequantized
            && self.keep_dequantized_modules.as_ref().is_none_or(|some| some.iter().any(|m| m == name))
    }

    /// Tokens of a micro-batch.
    pub fn capacity(&self) -> usize {
        self.micro_batch_size * self.max_seq_length
    }

    /// Checks the values against each other and against the model.
    ///
    /// # Errors
    /// Names the field, what was expected and what was found.
    pub fn validate(&self, spec: &ModelSpec) -> Result<()> {
        let bad = |field: &str, expected: &str, found: String| {
            Err(Error::new("the plan's configuration cannot be used").at(field).expected(expected).found(found))
        };
        if let Some(experts) = spec.experts {
            return Err(Error::new("a mixture of experts can be counted, but not run")
                .at(format!("{}: model_type", spec.name))
                .expected("a model with one MLP in each layer")
                .found(format!("`{}` with {} experts", spec.family.model_type(), experts.num_local_experts))
                .next("use a dense model; Estimate says what other programs need for this one"));
        }
        if self.micro_batch_size == 0 || self.max_seq_length == 0 {
            return bad("batch, seq", "at least 1", format!("{} x {}", self.micro_batch_size, self.max_seq_length));
        }
        if self.max_seq_length > spec.max_position_embeddings {
            let expected = format!("at most max_position_embeddings = {}", spec.max_position_embeddings);
            return bad("seq", &expected, self.max_seq_length.to_string());
        }
        if self.micro_batch_size.checked_mul(self.max_seq_length).is_none_or(|t| t > 1 << 28) {
            return bad(
                "batch, seq",
                "at most 2^28 tokens",
                format!("{} x {}", self.micro_batch_size, self.max_seq_length),
            );
        }
        if let Some(n) = self.max_context
            && (n == 0 || n > spec.max_position_embeddings)
        {
            let expected = format!("1 to max_position_embeddings = {}", spec.max_position_embeddings);
            return bad("context", &expected, n.to_string());
        }
        if self.ce_chunk == 0 {
            return bad("ce_chunk", "at least 1 row", "0".into());
        }
        if !matches!(self.compute_dtype, DType::F32 | DType::BF16) {
            return bad("compute_dtype", "f32 or bf16", format!("{:?}", self.compute_dtype));
        }
        if self.device == DeviceKind::Cpu && self.compute_dtype != DType::F32 {
            return bad("compute_dtype", "f32 on the CPU", format!("{:?}", self.compute_dtype));
        }
        if self.method == Method::FullPureBf16 && self.compute_dtype != DType::BF16 {
            return bad("compute_dtype", "bf16 for pure bf16 training", format!("{:?}", self.compute_dtype));
        }
        if self.host_embeddings && spec.tie_word_embeddings {
            return bad("host_embeddings", "an embedding table apart from lm_head", "tied embeddings".into());
        }
        if self.host_embeddings && self.method.is_full() {
            return bad("host_embeddings", "a frozen embedding table", self.method.label().into());
        }
        if let Some(modules) = &self.keep_dequantized_modules {
            let known = kept_modules(spec);
            if let Some(name) = modules.iter().find(|name| !known.iter().any(|(k, _)| k == *name)) {
                let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
                return bad("keep_dequantized_modules", &names.join(", "), name.clone());
            }
        }
        if self.dequantized_layers > spec.num_hidden_layers {
            let expected = format!("at most the {} layers of the model", spec.num_hidden_layers);
            return bad("dequantized_layers", &expected, self.dequantized_layers.to_string());
        }
        if self.dequantized_layers > 0 && self.method != Method::Qlora {
            return bad("dequantized_layers", "0 where no 4-bit weight is trained on", self.method.label().into());
        }
        if let Some(lora) = &self.lora {
            lora.validate()?;
            let dora = |expected: &str, found: String, next: &str| {
                Err(Error::new("the plan's configuration cannot be used")
                    .at("use_dora")
                    .expected(expected)
                    .found(found)
                    .next(next))
            };
            if lora.use_dora && lora.lora_dropout > 0.0 {
                // PEFT multiplies the dropped input by the whole weight: a second product of the base's size.
                let next = "set lora_dropout to 0, or train plain LoRA";
                return dora("no dropout beside DoRA", format!("lora_dropout = {}", lora.lora_dropout), next);
            }
        }
        if let Some(q) = &self.quantization {
            q.validate()?;
        }
        let lora = self.lora.is_some();
        match self.method {
            Method::Full | Method::FullPureBf16 if lora => bad("lora", "no adapter in full fine-tuning", "one".into()),
            Method::Full | Method::FullPureBf16 if self.quantization.is_some() => {
                bad("quantization", "a dense base in full fine-tuning", "4-bit".into())
            }
            Method::Lora | Method::Qlora if !lora => bad("lora", "an adapter", "none".into()),
            Method::Qlora if self.quantization.is_none() => bad("quantization", "a 4-bit base", "none".into()),
            Method::Lora if self.quantization.is_some() => bad("quantization", "a dense base", "4-bit".into()),
            _ => Ok(()),
        }
    }
}
