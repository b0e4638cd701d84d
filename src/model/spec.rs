//! [`ModelSpec`]: the shape of a model, from a Hugging Face `config.json`.

use candle_core::DType;
use serde::{Deserialize, Serialize};

/// The architectures that are known; the engine runs all but Mixtral. The text form in files is transformers'
/// `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `MistralForCausalLM`: sliding-window attention where the config asks for it.
    Mistral,
    /// `LlamaForCausalLM`: also TinyLlama, SmolLM2, Yi and many others.
    Llama,
    /// `Qwen2ForCausalLM` (Qwen2, Qwen2.5): q, k and v with a bias.
    Qwen2,
    /// `Qwen3ForCausalLM`: RMSNorm over each head of q and k.
    Qwen3,
    /// `Phi3ForCausalLM`: q, k, v in one matrix, gate and up in another.
    Phi3,
    /// `GemmaForCausalLM`: GeGLU, scaled embeddings, norms with weight + 1.
    Gemma,
    /// `Gemma2ForCausalLM`: as Gemma, with norms after attention and MLP, soft caps, a window in every other layer.
    Gemma2,
    /// `MixtralForCausalLM`: a mixture of experts. Counted and inspected; it cannot be run.
    Mixtral,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 8] = [
        Family::Mistral,
        Family::Llama,
        Family::Qwen2,
        Family::Qwen3,
        Family::Phi3,
        Family::Gemma,
        Family::Gemma2,
        Family::Mixtral,
    ];

    /// transformers' `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Mistral => "mistral",
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Phi3 => "phi3",
            Family::Gemma => "gemma",
            Family::Gemma2 => "gemma2",
            Family::Mixtral => "mixtral",
        }
    }

    /// transformers' class of the model with its output projection.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Mistral => "MistralForCausalLM",
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Phi3 => "Phi3ForCausalLM",
            Family::Gemma => "GemmaForCausalLM",
            Family::Gemma2 => "Gemma2ForCausalLM",
            Family::Mixtral => "MixtralForCausalLM",
        }
    }

    /// The name that people use.
    pub fn label(self) -> &'static str {
        match self {
            Family::Mistral => "Mistral",
            Family::Llama => "Llama",
            Family::Qwen2 => "Qwen2",
            Family::Qwen3 => "Qwen3",
            Family::Phi3 => "Phi-3",
            Family::Gemma => "Gemma",
            Family::Gemma2 => "Gemma 2",
            Family::Mixtral => "Mixtral",
        }
    }

    /// Gemma's: GeGLU, embeddings scaled by sqrt(C), norms that multiply by weight + 1.
    pub fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma | Family::Gemma2)
    }

    /// q, k, v and gate, up are one linear module each.
    pub fn is_fused(self) -> bool {
        self == Family::Phi3
    }
}

/// What the gate of the MLP passes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`: SwiGLU (arXiv 2002.05202).
    #[default]
    Silu,
    /// GELU in its tanh form, `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: GeGLU.
    GeluTanh,
}

/// The experts of a mixture (Mixtral): each has a gate, an up and a down matrix of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    /// Experts of a layer.
    pub num_local_experts: usize,
    /// Experts that a token goes through.
    pub num_experts_per_tok: usize,
}

/// How rotary frequencies are changed for contexts longer than the pretrained one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// No change.
    #[default]
    Default,
    /// Every frequency divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A base that grows with the text beyond `max_position_embeddings` (dynamic NTK). Up to that length, which no text
    /// may exceed here, it changes nothing.
    Dynamic {
        /// How much longer texts could become.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071; transformers `_compute_yarn_parameters`): low frequencies divided, high ones kept, a ramp
    /// between; scores scaled.
    Yarn {
        /// Division of the lowest frequencies.
        factor: f64,
        /// Rotations within the pretrained length above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// The ramp starts and ends at whole dimensions.
        truncate: bool,
        /// Factor of cosine and sine.
        attention_factor: f64,
        /// The pretrained context length in tokens.
        original_max_position_embeddings: usize,
    },
    /// LongRoPE (arXiv 2402.13753; transformers `_compute_longrope_parameters`): a divisor for each frequency, one list
    /// for texts up to the pretrained length and one for longer ones.
    Longrope {
        /// `head_dim / 2` divisors.
        short_factor: Vec<f64>,
        /// `head_dim / 2` divisors for texts above `original_max_position_embeddings`.
        long_factor: Vec<f64>,
        /// Factor of cosine and sine.
        attention_factor: f64,
        /// The pretrained context length in tokens.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1's piecewise scaling by wavelength (transformers `modeling_rope_utils.py`, `_compute_llama3_parameters`).
    Llama3 {
        /// Division of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The pretrained context length in tokens.
        original_max_position_embeddings: usize,
    },
}

/// The shape of a decoder-only transformer. All sizes are element counts; ids are token ids.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// The name shown for it: a preset's name, a directory's name or a hub id.
    pub name: String,
    /// The architecture.
    pub family: Family,
    /// V: rows of the embedding table and of `lm_head`.
    pub vocab_size: usize,
    /// C: width of the residual stream.
    pub hidden_size: usize,
    /// F: width inside the MLP.
    pub intermediate_size: usize,
    /// L: number of decoder layers.
    pub num_hidden_layers: usize,
    /// H: query heads.
    pub num_attention_heads: usize,
    /// Key and value heads (grouped-query attention when fewer than H).
    pub num_key_value_heads: usize,
    /// D: width of one head.
    pub head_dim: usize,
    /// The longest position that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// A token sees itself and the `sliding_window - 1` tokens before it; `None`: all before it.
    pub sliding_window: Option<usize>,
    /// Layers in which it sees all tokens before it in spite of `sliding_window`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub full_attention_layers: Vec<usize>,
    /// q, k and v have a bias.
    #[serde(default)]
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    #[serde(default)]
    pub o_bias: bool,
    /// gate, up and down have a bias.
    #[serde(default)]
    pub mlp_bias: bool,
    /// The MLP's activation.
    #[serde(default)]
    pub activation: Activation,
    /// Attention scores are divided by the root of this; `None`: of `head_dim`.
    #[serde(default)]
    pub query_pre_attn_scalar: Option<f64>,
    /// Attention scores become `cap * tanh(score / cap)`.
    #[serde(default)]
    pub attn_logit_softcapping: Option<f64>,
    /// Logits become `cap * tanh(logit / cap)`.
    #[serde(default)]
    pub final_logit_softcapping: Option<f64>,
    /// The experts of a mixture; `None`: one MLP for every token.
    #[serde(default)]
    pub experts: Option<Experts>,
    /// `lm_head` is the embedding table.
    pub tie_word_embeddings: bool,
    /// The dtype of the files, as the config says (`torch_dtype` or `dtype`); F32 when it does not.
    #[serde(with = "dtype_name")]
    pub dtype: DType,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// End of sequence: generation stops at any of them.
    pub eos_token_id: Vec<u32>,
    /// Padding.
    pub pad_token_id: Option<u32>,
}

/// One `nn.Linear` of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinearModule {
    /// Full module path, e.g. `model.layers.0.self_attn.q_proj`; the weight is `<name>.weight`.
    pub name: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// It adds a bias, `<name>.bias`.
    pub bias: bool,
    /// Decoder layer, `None` for `lm_head`.
    pub layer: Option<usize>,
}

impl LinearModule {
    /// The last part of its path: `q_proj`.
    pub fn leaf(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }
}

/// One tensor that a checkpoint of the model must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Key in the safetensors file, e.g. `model.embed_tokens.weight`.
    pub name: String,
    /// Row-major shape; a linear weight is `[out_features, in_features]`.
    pub shape: Vec<usize>,
}

impl ModelSpec {
    /// Every linear module in the order of the network: layer by layer q, k, v, o, gate, up, down (fused: qkv, o, gate_up,
    /// down; the experts of a mixture are none), then `lm_head`.
    ///
    /// `lm_head` is listed even when it is tied to the embedding table.
    pub fn linears(&self) -> Vec<LinearModule> {
        let (c, f) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let attention = match self.family.is_fused() {
            true => vec![("self_attn.qkv_proj", q + 2 * kv, c, self.qkv_bias)],
            false => vec![
                ("self_attn.q_proj", q, c, self.qkv_bias),
                ("self_attn.k_proj", kv, c, self.qkv_bias),
                ("self_attn.v_proj", kv, c, self.qkv_bias),
            ],
        };
        let mlp = match self.family.is_fused() {
            _ if self.experts.is_some() => Vec::new(),
            true => vec![("mlp.gate_up_proj", 2 * f, c, self.mlp_bias), ("mlp.down_proj", c, f, self.mlp_bias)],
            false => vec![
                ("mlp.gate_proj", f, c, self.mlp_bias),
                ("mlp.up_proj", f, c, self.mlp_bias),
                ("mlp.down_proj", c, f, self.mlp_bias),
            ],
        };
        let shapes = [attention, vec![("self_attn.o_proj", c, q, self.o_bias)], mlp].concat();
        let mut out = Vec::with_capacity(self.num_hidden_layers * shapes.len() + 1);
        for layer in 0..self.num_hidden_layers {
            for &(path, out_features, in_features, bias) in &shapes {
                let name = format!("model.layers.{layer}.{path}");
                out.push(LinearModule { name, out_features, in_features, bias, layer: Some(layer) });
            }
        }
        let (name, out_features) = ("lm_head".into(), self.vocab_size);
        out.push(LinearModule { name, out_features, in_features: c, bias: false, layer: None });
        out
    }

    /// The linear modules and the embedding table (`model.embed_tokens`, `[V, C]`): every matrix that an adapter can change.
    pub fn matrices(&self) -> Vec<LinearModule> {
        let (name, out_features) = ("model.embed_tokens".into(), self.vocab_size);
        let table = LinearModule { name, out_features, in_features: self.hidden_size, bias: false, layer: None };
        [table].into_iter().chain(self.linears()).collect()
    }

    /// Every tensor of a checkpoint of this model, in the order of the network. A tied `lm_head` is left out.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let c = self.hidden_size;
        let tensor = |name: String, shape: Vec<usize>| TensorSpec { name, shape };
        let linears = self.linears();
        let mut out = vec![tensor("model.embed_tokens.weight".into(), vec![self.vocab_size, c])];
        for l in 0..self.num_hidden_layers {
            for norm in self.norms() {
                out.push(tensor(format!("model.layers.{l}.{norm}.weight"), vec![c]));
            }
            for m in linears.iter().filter(|m| m.layer == Some(l)) {
                out.push(tensor(format!("{}.weight", m.name), vec![m.out_features, m.in_features]));
                if m.bias {
                    out.push(tensor(format!("{}.bias", m.name), vec![m.out_features]));
                }
            }
            if self.has_qk_norm() {
                for norm in ["q_norm", "k_norm"] {
                    out.push(tensor(format!("model.layers.{l}.self_attn.{norm}.weight"), vec![self.head_dim]));
                }
            }
            if let Some(experts) = self.experts {
                let at = format!("model.layers.{l}.block_sparse_moe");
                out.push(tensor(format!("{at}.gate.weight"), vec![experts.num_local_experts, c]));
                for e in 0..experts.num_local_experts {
                    // w1 gate, w2 down, w3 up.
                    for (w, shape) in [("w1", true), ("w2", false), ("w3", true)] {
                        let f = self.intermediate_size;
                        let shape = if shape { vec![f, c] } else { vec![c, f] };
                        out.push(tensor(format!("{at}.experts.{e}.{w}.weight"), shape));
                    }
                }
            }
        }
        out.push(tensor("model.norm.weight".into(), vec![c]));
        if !self.tie_word_embeddings {
            out.push(tensor("lm_head.weight".into(), vec![self.vocab_size, c]));
        }
        out
    }

    /// The norms of a layer over the residual stream's width, in the order in which they are applied.
    pub fn norms(&self) -> &'static [&'static str] {
        match self.family {
            Family::Gemma2 => &[
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ],
            _ => &["input_layernorm", "post_attention_layernorm"],
        }
    }

    /// Whether each head of q and k is normed before it is rotated.
    pub fn has_qk_norm(&self) -> bool {
        self.family == Family::Qwen3
    }

    /// What norms multiply by beside their weight: 1 where the files hold `weight - 1` (Gemma), else 0.
    pub fn norm_offset(&self) -> f32 {
        if self.family.is_gemma() { 1.0 } else { 0.0 }
    }

    /// Factor of the embedded tokens: `sqrt(C)` in Gemma, else 1.
    pub fn embedding_scale(&self) -> f32 {
        if self.family.is_gemma() { (self.hidden_size as f64).sqrt() as f32 } else { 1.0 }
    }

    /// Factor of the attention scores.
    pub fn attention_scale(&self) -> f32 {
        (1.0 / self.query_pre_attn_scalar.unwrap_or(self.head_dim as f64).sqrt()) as f32
    }

    /// The window of one layer.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| !self.full_attention_layers.contains(&layer))
    }

    /// Number of parameters; a tied `lm_head` counts once.
    pub fn total_params(&self) -> u64 {
        self.tensors().iter().map(|t| t.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
    }
}

/// Serialises a candle dtype by its name (`bf16`, `f32`, ...).
pub(crate) mod dtype_name {
    use candle_core::DType;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::str::FromStr;

    pub fn serialize<S: Serializer>(d: &DType, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(d.as_str())
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<DType, D::Error> {
        let name = String::deserialize(d)?;
        DType::from_str(&name).map_err(|_| D::Error::custom(format!("unknown dtype {name}")))
    }
}
