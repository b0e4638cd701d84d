//! bitsandbytes' 4-bit checkpoints: which keys they hold and what their quant state says.
//!
//! A module's weight `X.weight` (u8, two codes a byte, the first in the high nibble) is accompanied by
//! `X.weight.absmax`, `X.weight.quant_map`, with nested quantization `X.weight.nested_absmax` and
//! `X.weight.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON text as u8.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Checkpoint;
use crate::nf4::{Nf4Config, Nf4Tensor};
use crate::{Error, Result};

/// What `config.json` says under `quantization_config`, as far as it matters for reading.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantizationConfig {
    /// `nf4` or `fp4`.
    pub bnb_4bit_quant_type: String,
    /// Whether absmax is itself quantized to 8 bits.
    pub bnb_4bit_use_double_quant: bool,
    /// dtype of the matrix products in transformers, e.g. `bfloat16`.
    pub bnb_4bit_compute_dtype: String,
}

impl QuantizationConfig {
    /// Reads the `quantization_config` of a `config.json`; `None` if there is none.
    ///
    /// # Errors
    /// A quantization other than bitsandbytes' 4 bits, by name.
    pub fn from_config_json(json: &str) -> Result<Option<Self>> {
        let config: Value = serde_json::from_str(json).map_err(|e| Error::new("not valid JSON").caused_by(e))?;
        let Some(q) = config.get("quantization_config").filter(|v| !v.is_null()) else { return Ok(None) };
        let text = |key: &str| q.get(key).and_then(Value::as_str);
        let flag = |key: &str| q.get(key).and_then(Value::as_bool).unwrap_or(false);
        let method = text("quant_method").unwrap_or("bitsandbytes");
        let refuse = |found: String| {
            Error::new("this quantization is not supported")
                .at("quantization_config")
                .expected("bitsandbytes in 4 bits (nf4 or fp4)")
                .found(found)
                .next("use the original, unquantized checkpoint")
        };
        if method != "bitsandbytes" {
            return Err(refuse(format!("`{method}`")));
        }
        if !(flag("load_in_4bit") || flag("_load_in_4bit")) {
            return Err(refuse("bitsandbytes in 8 bits".into()));
        }
        let quant_type = text("bnb_4bit_quant_type").unwrap_or("fp4");
        if !matches!(quant_type, "nf4" | "fp4") {
            return Err(refuse(format!("bnb_4bit_quant_type `{quant_type}`")));
        }
        Ok(Some(QuantizationConfig {
            bnb_4bit_quant_type: quant_type.into(),
            bnb_4bit_use_double_quant: flag("bnb_4bit_use_double_quant"),
            bnb_4bit_compute_dtype: text("bnb_4bit_compute_dtype").unwrap_or("float32").into(),
        }))
    }

    /// What transformers writes for a model that it quantized with `cfg`, ready for `config.json`.
    ///
    /// `compute_dtype` is torch's name for the dtype of the matrix products, e.g. `bfloat16`.
    pub fn to_json(cfg: Nf4Config, compute_dtype: &str) -> Value {
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": cfg.quant_type.as_str(),
            "bnb_4bit_use_double_quant": cfg.double_quant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": null,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes"
        })
    }
}

/// The JSON of `quant_state.bitsandbytes__*`, as far as it is needed before the weight itself is read.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct QuantState {
    /// `[out_features, in_features]`.
    pub shape: Vec<usize>,
}

/// The quant state of a weight, or `None` if the checkpoint holds it dense.
pub(super) fn quant_state(checkpoint: &Checkpoint, weight: &str) -> Result<Option<QuantState>> {
    let key = ["nf4", "fp4"].map(|t| format!("{weight}.quant_state.bitsandbytes__{t}"));
    let Some(key) = key.into_iter().find(|k| checkpoint.contains(k)) else { return Ok(None) };
    let bytes = checkpoint.read_bytes(&key)?;
    let state: QuantState = serde_json::from_slice(&bytes).map_err(|e| {
        Error::new("the quant state of a 4-bit weight is not valid")
            .at(key.clone())
            .expected("JSON with quant_type, blocksize, dtype and shape")
            .caused_by(e)
            .next("save or download the checkpoint again")
    })?;
    Ok(Some(state))
}

/// A 4-bit weight with all its parts, or `None` if the checkpoint holds it dense.
pub(super) fn read(checkpoint: &Checkpoint, weight: &str) -> Result<Option<Nf4Tensor>> {
    if quant_state(checkpoint, weight)?.is_none() {
        return Ok(None);
    }
    let mut parts = Vec::new();
    for name in Nf4Tensor::bnb_names(weight) {
        if checkpoint.contains(&name) {
            let info = checkpoint.info(&name)?;
            let bytes = checkpoint.read_bytes(&name)?;
            parts.push((name, info.dtype, info.shape, bytes));
        }
    }
    Nf4Tensor::from_bnb(weight, parts).map(Some).map_err(|e| e.at_path(checkpoint.path()))
}

/// Whether `name` is one of the tensors that stand for a 4-bit weight of the checkpoint, the weight included.
pub(super) fn is_part(checkpoint: &Checkpoint, name: &str) -> bool {
    let has_state = |weight: &str| {
        ["nf4", "fp4"].iter().any(|t| checkpoint.contains(&format!("{weight}.quant_state.bitsandbytes__{t}")))
    };
    let weight = name.find(".weight.").map_or(name, |i| &name[..i + ".weight".len()]);
    has_state(weight)
}
