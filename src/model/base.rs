//! [`Base`]: a model directory, its shape and its tensors together.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;

use super::bnb::{self, QuantizationConfig};
use super::{Checkpoint, ModelSpec};
use crate::nf4::Nf4Tensor;
use crate::{Error, Result, files};

/// A model directory: `config.json`, safetensors, tokenizer. Cheap to clone; only headers are in memory.
///
/// `notebooks/00_start_here.ipynb` explains it.
#[derive(Clone)]
pub struct Base(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    quantization: Option<QuantizationConfig>,
}

impl Base {
    /// Opens a model directory and checks that every tensor of its config is there with its shape
    /// ([`Base::validate`]).
    ///
    /// # Errors
    /// As [`ModelSpec::from_dir`], [`Checkpoint::open`] and [`Base::validate`].
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        let spec = ModelSpec::from_dir(&dir)?;
        let config = dir.join("config.json");
        let quantization =
            QuantizationConfig::from_config_json(&files::read_to_string(&config)?).map_err(|e| e.at_path(&config))?;
        let checkpoint = Checkpoint::open(&dir)?;
        let base = Base(Arc::new(Inner { dir, spec, checkpoint, quantization }));
        base.validate()?;
        Ok(base)
    }

    /// The shape of the model.
    pub fn spec(&self) -> &ModelSpec {
        &self.0.spec
    }

    /// Its tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.0.checkpoint
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The `quantization_config` of a bitsandbytes 4-bit checkpoint; `None` for a dense one.
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        self.0.quantization.as_ref()
    }

    /// The 4-bit weight of a linear module (`model.layers.0.self_attn.q_proj`), all its parts checked and in memory;
    /// `None` if the checkpoint holds it dense.
    ///
    /// # Errors
    /// Parts that are missing, cannot be read or contradict each other.
    pub fn nf4(&self, module: &str) -> Result<Option<Nf4Tensor>> {
        bnb::read(&self.0.checkpoint, &format!("{module}.weight"))
    }

    /// Checks that every tensor of [`ModelSpec::tensors`] is there, with its shape and a floating-point dtype; a
    /// weight that bitsandbytes stored in 4 bits counts with the shape in its quant state.
    ///
    /// Tensors beyond these are allowed (old checkpoints hold rotary frequencies).
    ///
    /// # Errors
    /// The first tensor that is missing or different.
    pub fn validate(&self) -> Result<()> {
        for t in self.0.spec.tensors() {
            self.check_tensor(&t.name, &t.shape).map_err(|e| e.at_path(&self.0.dir))?;
        }
        Ok(())
    }

    fn check_tensor(&self, name: &str, shape: &[usize]) -> Result<()> {
        let checkpoint = &self.0.checkpoint;
        if !checkpoint.contains(name) {
            let e = Error::new("the checkpoint lacks a tensor that config.json asks for")
                .expected(format!("{name} {shape:?}"))
                .found(format!("{} other tensors", checkpoint.names().len()));
            return Err(if name == "lm_head.weight" {
                e.next(
                    "if the model ties lm_head to the embedding table, config.json must say tie_word_embeddings: true",
                )
            } else {
                e.next("config.json and the safetensors files belong to different models, or the download is not whole")
            });
        }
        let found = match bnb::quant_state(checkpoint, name)? {
            Some(state) => state.shape,
            None => {
                let info = checkpoint.info(name)?;
                if !matches!(info.dtype, DType::F32 | DType::BF16 | DType::F16) {
                    return Err(Error::new("a weight does not hold floating-point numbers")
                        .at(name.to_string())
                        .expected("F32, BF16 or F16, or 4-bit with its quant state")
                        .found(info.dtype.as_str())
                        .next("use the original checkpoint, or one of bitsandbytes' 4-bit format"));
                }
                info.shape
            }
        };
        if found != shape {
            return Err(Error::new("a tensor has another shape than config.json says")
                .at(name.to_string())
                .expected(format!("{shape:?}"))
                .found(format!("{found:?}"))
                .next("config.json and the safetensors files belong to different models"));
        }
        Ok(())
    }
}

impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.0.spec;
        let kind = if self.0.quantization.is_some() { "4-bit" } else { s.dtype.as_str() };
        write!(f, "Base({}: {} parameters, {kind}, {})", s.name, s.total_params(), self.0.dir.display())
    }
}
