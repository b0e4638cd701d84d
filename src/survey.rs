//! [`survey()`]: what quantizing does to each linear layer of a model.

use std::fmt;

use crate::Result;
use crate::model::{Base, ModelSpec};
use crate::nf4::{self, Nf4Config};

/// One linear layer, quantized and compared with itself.
#[derive(Clone, Debug, PartialEq)]
pub struct SurveyRow {
    /// Path of the module, e.g. `model.layers.0.mlp.up_proj`.
    pub module: String,
    /// Its decoder layer.
    pub layer: usize,
    /// Last part of the path.
    pub leaf: String,
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// Norm of the error divided by the norm of the weight.
    pub relative: f64,
    /// Mean of the squared errors.
    pub mse: f64,
    /// Kurtosis of the weights: 3 for the normal distribution, more with outliers.
    pub kurtosis: f64,
    /// The largest weight, as a multiple of the root mean square.
    pub largest: f64,
    /// The worst block's mean squared error, as a multiple of the layer's.
    pub worst_block: f64,
    /// Number of that block.
    pub worst_block_index: usize,
    /// Bytes of codes and scales.
    pub bytes: u64,
}

/// Every linear layer that QLoRA quantizes; made by [`survey()`]. Lesson 03 reads one.
#[derive(Clone, PartialEq)]
pub struct Survey {
    /// The model.
    pub spec: ModelSpec,
    /// How it was quantized.
    pub config: Nf4Config,
    /// In the order of the network; `lm_head` is not among them, it stays as it is.
    pub rows: Vec<SurveyRow>,
}

impl Survey {
    /// The row of a module, by the end of its path.
    pub fn row(&self, module: &str) -> Option<&SurveyRow> {
        self.rows.iter().find(|r| r.module.ends_with(module))
    }

    /// The layers with the largest relative error, the worst first.
    pub fn worst(&self, n: usize) -> Vec<SurveyRow> {
        let mut rows = self.rows.clone();
        rows.sort_by(|a, b| b.relative.total_cmp(&a.relative));
        rows.truncate(n);
        rows
    }

    /// Bits per weight of the quantized layers, scales counted.
    pub fn bits_per_quantized_weight(&self) -> f64 {
        let weights: usize = self.rows.iter().map(|r| r.shape[0] * r.shape[1]).sum();
        8.0 * self.quantized_bytes() as f64 / weights.max(1) as f64
    }

    /// Bytes of the quantized layers.
    pub fn quantized_bytes(&self) -> u64 {
        self.rows.iter().map(|r| r.bytes).sum()
    }

    /// Bytes of the whole model with what is not quantized in 16 bits.
    pub fn model_bytes(&self) -> u64 {
        let quantized: usize = self.rows.iter().map(|r| r.shape[0] * r.shape[1]).sum();
        self.quantized_bytes() + 2 * self.spec.total_params().saturating_sub(quantized as u64)
    }

    /// Bits per weight of the whole model, everything counted.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.model_bytes() as f64 / self.spec.total_params().max(1) as f64
    }
}

/// Quantizes every linear layer but `lm_head`, one at a time, and measures what that does to it.
///
/// A model that is stored in 4 bits has nothing to be compared with; give the original.
///
/// `notebooks/03_inspect_a_model.ipynb` explains it.
///
/// # Errors
/// A weight that cannot be read, or is stored in 4 bits.
pub fn survey(base: &Base, config: Nf4Config) -> Result<Survey> {
    let mut rows = Vec::new();
    for m in base.spec().linears() {
        let Some(layer) = m.layer else { continue };
        let name = format!("{}.weight", m.name);
        if base.nf4(&m.name)?.is_some() {
            return Err(crate::Error::new("the weight is stored in 4 bits: there is no original to compare it with")
                .at(name)
                .expected("a dense weight")
                .next("survey the model that this one was quantized from"));
        }
        let weight = base.checkpoint().read_tensor(&name)?;
        let quantized = nf4::quantize(&weight, config)?;
        let Some(error) = quantized.inspect_against(&weight)?.error else { continue };
        let (kurtosis, largest) = tails(&base.checkpoint().read_f32(&name)?);
        let worst = error.worst(1).first().copied();
        rows.push(SurveyRow {
            leaf: m.leaf().to_owned(),
            module: m.name,
            layer,
            shape: [m.out_features, m.in_features],
            relative: error.relative,
            mse: error.mse,
            kurtosis,
            largest,
            worst_block: worst.map_or(0.0, |b| f64::from(b.mse) / error.mse.max(f64::MIN_POSITIVE)),
            worst_block_index: worst.map_or(0, |b| b.block),
            bytes: quantized.bytes(),
        });
    }
    Ok(Survey { spec: base.spec().clone(), config, rows })
}

/// Kurtosis, and the largest magnitude over the root mean square.
fn tails(x: &[f32]) -> (f64, f64) {
    let n = x.len().max(1) as f64;
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let power = |p: i32| x.iter().map(|&v| (f64::from(v) - mean).powi(p)).sum::<f64>() / n;
    let variance = power(2).max(f64::MIN_POSITIVE);
    let rms = (x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n).sqrt().max(f64::MIN_POSITIVE);
    let largest = x.iter().fold(0.0_f64, |m, &v| m.max(f64::from(v.abs())));
    (power(4) / variance.powi(2), largest / rms)
}

impl fmt::Debug for Survey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            return f.debug_struct("Survey").field("config", &self.config).field("rows", &self.rows).finish();
        }
        fmt::Display::fmt(self, f)
    }
}
