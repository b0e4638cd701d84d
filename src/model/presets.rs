//! Shapes of well-known models, so that memory can be planned without downloading anything.

use candle_core::DType;

use super::spec::{Family, ModelSpec, RopeScaling};
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
    rope_theta: f64,
    /// Factor of Llama 3.1's scaling; 1.0 is no scaling.
    llama3_factor: f64,
    sliding_window: Option<usize>,
    tied: bool,
    dtype: DType,
    bos_eos: (u32, u32),
}

const LLAMA: Preset = Preset {
    name: "",
    hub_id: "",
    family: Family::Llama,
    sizes: [0; 6],
    head_dim: 128,
    max_position_embeddings: 4096,
    rope_theta: 10_000.0,
    llama3_factor: 1.0,
    sliding_window: None,
    tied: false,
    dtype: DType::BF16,
    bos_eos: (1, 2),
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
            rms_norm_eps: 1e-5,
            rope_theta: self.rope_theta,
            rope_scaling,
            sliding_window: self.sliding_window,
            tie_word_embeddings: self.tied,
            dtype: self.dtype,
            bos_token_id: Some(self.bos_eos.0),
            eos_token_id: vec![self.bos_eos.1],
            pad_token_id: None,
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
