//! [`ModelSpec`]: the shape of a model, from a Hugging Face `config.json`.

use candle_core::DType;
use serde::{Deserialize, Serialize};

/// The architectures that the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `MistralForCausalLM`: sliding-window attention where the config asks for it.
    Mistral,
    /// `LlamaForCausalLM`: tied or separate `lm_head`, llama3 rope scaling.
    Llama,
}

/// How rotary frequencies are changed for contexts longer than the pretrained one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// No change.
    Default,
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
    /// Decoder layer, `None` for `lm_head`.
    pub layer: Option<usize>,
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
    /// Every linear module in the order of the network: layer by layer q, k, v, o, gate, up, down, then `lm_head`.
    ///
    /// `lm_head` is listed even when it is tied to the embedding table.
    pub fn linears(&self) -> Vec<LinearModule> {
        let (c, f) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let shapes = [
            ("self_attn.q_proj", q, c),
            ("self_attn.k_proj", kv, c),
            ("self_attn.v_proj", kv, c),
            ("self_attn.o_proj", c, q),
            ("mlp.gate_proj", f, c),
            ("mlp.up_proj", f, c),
            ("mlp.down_proj", c, f),
        ];
        let mut out = Vec::with_capacity(self.num_hidden_layers * shapes.len() + 1);
        for layer in 0..self.num_hidden_layers {
            for (path, out_features, in_features) in shapes {
                let name = format!("model.layers.{layer}.{path}");
                out.push(LinearModule { name, out_features, in_features, layer: Some(layer) });
            }
        }
        out.push(LinearModule { name: "lm_head".into(), out_features: self.vocab_size, in_features: c, layer: None });
        out
    }

    /// Every tensor of a checkpoint of this model, in the order of the network. A tied `lm_head` is left out.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let c = self.hidden_size;
        let tensor = |name: String, shape: Vec<usize>| TensorSpec { name, shape };
        let mut out = vec![tensor("model.embed_tokens.weight".into(), vec![self.vocab_size, c])];
        let mut layer = None;
        for m in self.linears() {
            if m.layer.is_none() && self.tie_word_embeddings {
                continue;
            }
            if m.layer != layer {
                layer = m.layer;
                match layer {
                    Some(l) => {
                        for norm in ["input_layernorm", "post_attention_layernorm"] {
                            out.push(tensor(format!("model.layers.{l}.{norm}.weight"), vec![c]));
                        }
                    }
                    None => out.push(tensor("model.norm.weight".into(), vec![c])),
                }
            }
            out.push(tensor(format!("{}.weight", m.name), vec![m.out_features, m.in_features]));
        }
        if self.tie_word_embeddings {
            out.push(tensor("model.norm.weight".into(), vec![c]));
        }
        out
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
