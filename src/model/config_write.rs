//! From a [`ModelSpec`] to the `config.json` that gives it back.

use candle_core::DType;
use serde_json::{Map, Value, json};

use super::spec::{Activation, Family, ModelSpec, RopeScaling};

impl ModelSpec {
    /// The `config.json` of this shape, with the keys of transformers: [`ModelSpec::from_json`] gives the spec back.
    pub fn to_config_json(&self) -> Value {
        let dtype = match self.dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        let act = match self.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        let mut config = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": act,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_scaling(&self.rope_scaling),
            "attention_bias": self.o_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": dtype,
        });
        let mut set = |key: &str, value: Value| _ = config.as_object_mut().map(|c| c.insert(key.into(), value));
        let longrope = match self.rope_scaling {
            RopeScaling::Longrope { original_max_position_embeddings: n, .. } => Some(n),
            _ => None,
        };
        match self.family {
            Family::Llama => set("mlp_bias", json!(self.mlp_bias)),
            Family::Gemma => set("hidden_activation", json!(act)),
            Family::Gemma2 => {
                set("hidden_activation", json!(act));
                set("query_pre_attn_scalar", json!(self.query_pre_attn_scalar));
                set("attn_logit_softcapping", json!(self.attn_logit_softcapping));
                set("final_logit_softcapping", json!(self.final_logit_softcapping));
            }
            Family::Qwen2 | Family::Qwen3 => set("use_sliding_window", json!(self.sliding_window.is_some())),
            Family::Phi3 => set("original_max_position_embeddings", json!(longrope.unwrap_or(4096))),
            Family::Mistral | Family::Mixtral => {}
        }
        if let Some(experts) = self.experts {
            set("num_local_experts", json!(experts.num_local_experts));
            set("num_experts_per_tok", json!(experts.num_experts_per_tok));
        }
        if !matches!(self.family, Family::Llama | Family::Gemma) {
            set("sliding_window", json!(self.sliding_window));
            if self.sliding_window.is_some() {
                let kind = |l: usize| if self.window(l).is_some() { "sliding_attention" } else { "full_attention" };
                set("layer_types", (0..self.num_hidden_layers).map(kind).collect());
            }
        }
        config
    }
}

fn rope_scaling(scaling: &RopeScaling) -> Value {
    let original = "original_max_position_embeddings";
    let mut map = Map::new();
    let mut set = |key: &str, value: Value| _ = map.insert(key.into(), value);
    match scaling {
        RopeScaling::Default => return Value::Null,
        RopeScaling::Linear { factor } => {
            set("rope_type", json!("linear"));
            set("factor", json!(factor));
        }
        RopeScaling::Dynamic { factor } => {
            set("rope_type", json!("dynamic"));
            set("factor", json!(factor));
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            set("rope_type", json!("llama3"));
            set("factor", json!(factor));
            set("low_freq_factor", json!(low_freq_factor));
            set("high_freq_factor", json!(high_freq_factor));
            set(original, json!(original_max_position_embeddings));
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
            original_max_position_embeddings,
        } => {
            set("rope_type", json!("yarn"));
            set("factor", json!(factor));
            set("beta_fast", json!(beta_fast));
            set("beta_slow", json!(beta_slow));
            set("truncate", json!(truncate));
            set("attention_factor", json!(attention_factor));
            set(original, json!(original_max_position_embeddings));
        }
        RopeScaling::Longrope { short_factor, long_factor, attention_factor, original_max_position_embeddings } => {
            set("rope_type", json!("longrope"));
            set("short_factor", json!(short_factor));
            set("long_factor", json!(long_factor));
            set("attention_factor", json!(attention_factor));
            set(original, json!(original_max_position_embeddings));
        }
    }
    Value::Object(map)
}
