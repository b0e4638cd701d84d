//! bitsandbytes' 4-bit checkpoints: which keys they hold and what their quant state says.
//!
//! A module's weight `X.weight` (u8, two codes a byte, the first in the high nibble) is accompanied by
//! `X.weight.absmax`, `X.weight.quant_map`, with nested quantization `X.weight.nested_absmax` and
//! `X.weight.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON text as u8.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Checkpoint;
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
        let config: Value =
            serde_json::from_str(json).map_err(|e| Error::new("not valid JSON").caused_by(e))?;
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
}

/// The JSON of `quant_state.bitsandbytes__*`.
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
