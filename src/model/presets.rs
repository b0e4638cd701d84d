//! Shapes of well-known models, so that memory can be planned without downloading anything.

use candle_core::DType;

use super::spec::{Activation, Experts, Family, ModelSpec, RopeScaling};
use crate::{Error, Result};

/// One row of the table: the numbers of the model's `config.json`.
struct Preset {
    name: &'static str,
    hub_id: &'static str,
    family: Family,
    /// vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
    sizes: [usize; 6],
    head_dim: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    /// Factor of Llama 3.1's scaling; 1.0 is no scaling.
    llama3_factor: f64,
    sliding_window: Option<usize>,
    tied: bool,
    dtype: DType,
    bos_eos: (u32, u32),
    pad: Option<u32>,
}

const LLAMA: Preset = Preset {
    name: "",
    hub_id: "",
    family: Family::Llama,
    sizes: [0; 6],
    head_dim: 128,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    rope_theta: 10_000.0,
    llama3_factor: 1.0,
    sliding_window: None,
    tied: false,
    dtype: DType::BF16,
    bos_eos: (1, 2),
    pad: None,
};
const LLAMA2: Preset = Preset { dtype: DType::F16, ..LLAMA };
const LLAMA3: Preset =
    Preset { max_position_embeddings: 131_072, rope_theta: 500_000.0, bos_eos: (128_000, 128_001), ..LLAMA };
const MISTRAL: Preset = Preset {
    family: Family::Mistral,
    sizes: [32_000, 4096, 14_336, 32, 32, 8],
    max_position_embeddings: 32_768,
    ..LLAMA
};
const QWEN2: Preset = Preset {
    family: Family::Qwen2,
    max_position_embeddings: 131_072,
    rope_theta: 1e6,
    bos_eos: (151_643, 151_643),
    ..LLAMA
};
const GEMMA2: Preset = Preset {
    family: Family::Gemma2,
    head_dim: 256,
    max_position_embeddings: 8192,
    rms_norm_eps: 1e-6,
    sliding_window: Some(4096),
    tied: true,
    dtype: DType::F32,
    bos_eos: (2, 1),
    pad: Some(0),
    ..LLAMA
};

const PRESETS: &[Preset] = &[
    Preset { name: "mistral-7b-v0.1", hub_id: "mistralai/Mistral-7B-v0.1", sliding_window: Some(4096), ..MISTRAL },
    Preset {
        name: "mistral-7b-instruct-v0.1",
        hub_id: "mistralai/Mistral-7B-Instruct-v0.1",
        sliding_window: Some(4096),
        ..MISTRAL
    },
    Preset {
        name: "mistral-7b-instruct-v0.2",
        hub_id: "mistralai/Mistral-7B-Instruct-v0.2",
        rope_theta: 1e6,
        ..MISTRAL
    },
    Preset {
        name: "mistral-7b-instruct-v0.3",
        hub_id: "mistralai/Mistral-7B-Instruct-v0.3",
        sizes: [32_768, 4096, 14_336, 32, 32, 8],
        rope_theta: 1e6,
        ..MISTRAL
    },
    Preset {
        name: "llama-2-7b",
        hub_id: "meta-llama/Llama-2-7b-hf",
        sizes: [32_000, 4096, 11_008, 32, 32, 32],
        ..LLAMA2
    },
    Preset {
        name: "llama-2-13b",
        hub_id: "meta-llama/Llama-2-13b-hf",
        sizes: [32_000, 5120, 13_824, 40, 40, 40],
        ..LLAMA2
    },
    Preset {
        name: "llama-2-70b",
        hub_id: "meta-llama/Llama-2-70b-hf",
        sizes: [32_000, 8192, 28_672, 80, 64, 8],
        ..LLAMA2
    },
    Preset {
        name: "llama-3-8b",
        hub_id: "meta-llama/Meta-Llama-3-8B",
        sizes: [128_256, 4096, 14_336, 32, 32, 8],
        max_position_embeddings: 8192,
        ..LLAMA3
    },
    Preset {
        name: "llama-3.1-8b",
        hub_id: "meta-llama/Meta-Llama-3.1-8B",
        sizes: [128_256, 4096, 14_336, 32, 32, 8],
        llama3_factor: 8.0,
        ..LLAMA3
    },
    Preset {
        name: "llama-3.2-1b",
        hub_id: "meta-llama/Llama-3.2-1B",
        sizes: [128_256, 2048, 8192, 16, 32, 8],
        head_dim: 64,
        llama3_factor: 32.0,
        tied: true,
        ..LLAMA3
    },
    Preset {
        name: "llama-3.2-3b",
        hub_id: "meta-llama/Llama-3.2-3B",
        sizes: [128_256, 3072, 8192, 28, 24, 8],
        llama3_factor: 32.0,
        tied: true,
        ..LLAMA3
    },
    Preset {
        name: "tinyllama-1.1b",
        hub_id: "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        sizes: [32_000, 2048, 5632, 22, 32, 4],
        head_dim: 64,
        max_position_embeddings: 2048,
        ..LLAMA
    },
    Preset {
        name: "smollm2-135m",
        hub_id: "HuggingFaceTB/SmolLM2-135M",
        sizes: [49_152, 576, 1536, 30, 9, 3],
        head_dim: 64,
        max_position_embeddings: 8192,
        rope_theta: 100_000.0,
        tied: true,
        bos_eos: (0, 0),
        ..LLAMA
    },
    Preset { name: "yi-6b", hub_id: "01-ai/Yi-6B", sizes: [64_000, 4096, 11_008, 32, 32, 4], rope_theta: 5e6, ..LLAMA },
    Preset {
        name: "qwen2.5-0.5b",
        hub_id: "Qwen/Qwen2.5-0.5B",
        sizes: [151_936, 896, 4864, 24, 14, 2],
        head_dim: 64,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        tied: true,
        ..QWEN2
    },
    Preset {
        name: "qwen2.5-7b",
        hub_id: "Qwen/Qwen2.5-7B",
        sizes: [152_064, 3584, 18_944, 28, 28, 4],
        rms_norm_eps: 1e-6,
        ..QWEN2
    },
    Preset { name: "qwen2.5-14b", hub_id: "Qwen/Qwen2.5-14B", sizes: [152_064, 5120, 13_824, 48, 40, 8], ..QWEN2 },
    Preset { name: "qwen2.5-32b", hub_id: "Qwen/Qwen2.5-32B", sizes: [152_064, 5120, 27_648, 64, 40, 8], ..QWEN2 },
    Preset {
        name: "qwen3-8b",
        hub_id: "Qwen/Qwen3-8B",
        family: Family::Qwen3,
        sizes: [151_936, 4096, 12_288, 36, 32, 8],
        max_position_embeddings: 40_960,
        rms_norm_eps: 1e-6,
        ..QWEN2
    },
    Preset {
        name: "phi-3-mini-4k-instruct",
        hub_id: "microsoft/Phi-3-mini-4k-instruct",
        family: Family::Phi3,
        sizes: [32_064, 3072, 8192, 32, 32, 32],
        head_dim: 96,
        sliding_window: Some(2047),
        bos_eos: (1, 32_000),
        pad: Some(32_000),
        ..LLAMA
    },
    Preset { name: "gemma-2-2b", hub_id: "google/gemma-2-2b", sizes: [256_000, 2304, 9216, 26, 8, 4], ..GEMMA2 },
    Preset { name: "gemma-2-9b", hub_id: "google/gemma-2-9b", sizes: [256_000, 3584, 14_336, 42, 16, 8], ..GEMMA2 },
    Preset {
        name: "mixtral-8x7b-v0.1",
        hub_id: "mistralai/Mixtral-8x7B-v0.1",
        family: Family::Mixtral,
        rope_theta: 1e6,
        ..MISTRAL
    },
];

impl Preset {
    fn spec(&self) -> ModelSpec {
        let [vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads] =
            self.sizes;
        let rope_scaling = match self.llama3_factor {
            1.0 => RopeScaling::Default,
            factor => RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
        };
        let gemma2 = self.family == Family::Gemma2;
        ModelSpec {
            name: self.name.into(),
            family: self.family,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim: self.head_dim,
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta,
            rope_scaling,
            sliding_window: self.sliding_window,
            full_attention_layers: match gemma2 {
                true => (1..num_hidden_layers).step_by(2).collect(),
                false => Vec::new(),
            },
            qkv_bias: self.family == Family::Qwen2,
            o_bias: false,
            mlp_bias: false,
            activation: if self.family.is_gemma() { Activation::GeluTanh } else { Activation::Silu },
            query_pre_attn_scalar: gemma2.then_some(256.0),
            attn_logit_softcapping: gemma2.then_some(50.0),
            final_logit_softcapping: gemma2.then_some(30.0),
            experts: (self.family == Family::Mixtral)
                .then_some(Experts { num_local_experts: 8, num_experts_per_tok: 2 }),
            tie_word_embeddings: self.tied,
            dtype: self.dtype,
            bos_token_id: Some(self.bos_eos.0),
            eos_token_id: vec![self.bos_eos.1],
            pad_token_id: self.pad,
        }
    }
}

impl ModelSpec {
    /// A well-known model by its short name (`mistral-7b-v0.1`) or hub id (`mistralai/Mistral-7B-v0.1`), in any case.
    ///
    /// The numbers are those of the model's `config.json`; nothing is downloaded.
    ///
    /// # Errors
    /// An unknown name, with the nearest known one.
    pub fn preset(name: &str) -> Result<Self> {
        let wanted = name.trim();
        let found =
            PRESETS.iter().find(|p| wanted.eq_ignore_ascii_case(p.name) || wanted.eq_ignore_ascii_case(p.hub_id));
        found.map(Preset::spec).ok_or_else(|| {
            let wanted = wanted.to_lowercase();
            let wanted = wanted.rsplit('/').next().unwrap_or_default();
            let mut near: Vec<_> = PRESETS.iter().map(|p| (strsim::jaro_winkler(wanted, p.name), p.name)).collect();
            near.sort_by(|a, b| b.0.total_cmp(&a.0));
            let next = match near.first() {
                Some((score, name)) if *score > 0.7 => {
                    format!(
                        "did you mean `{name}`? ModelSpec::presets() lists all; any config.json works through from_dir"
                    )
                }
                _ => "ModelSpec::presets() lists all; any config.json works through ModelSpec::from_dir".into(),
            };
            Error::new("no preset has this name")
                .at("ModelSpec::preset")
                .expected(Self::presets().join(", "))
                .found(format!("`{name}`"))
                .next(next)
        })
    }

    /// The names that [`ModelSpec::preset`] knows.
    pub fn presets() -> Vec<&'static str> {
        PRESETS.iter().map(|p| p.name).collect()
    }
}
