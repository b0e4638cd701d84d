//! What a merge did to each weight, and what the other two choices would have done.

use std::fmt;
use std::path::PathBuf;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::nf4::Nf4Config;

/// The weights that `ΔW = scaling * B A` is added to. There is no default: the choice changes the model.
///
/// `notebooks/08_merge_and_generate.ipynb` explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MergeBase {
    /// The original 16- or 32-bit weights W: `round(W + ΔW)`. A QLoRA adapter was trained beside other weights (the
    /// quantized ones), so the error of the quantization comes back: the distance in the report.
    Original,
    /// The quantized weights, decoded: `round(dequantize(quantize(W)) + ΔW)`. What a QLoRA adapter was trained on;
    /// only the rounding is lost.
    Dequantized(Nf4Config),
    /// As `Dequantized`, and quantized again: `quantize(dequantize(quantize(W)) + ΔW)`. Small, but most of an adapter
    /// of usual size falls between the 16 levels.
    Quantized(Nf4Config),
}

impl fmt::Display for MergeBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |c: &Nf4Config| {
            let nested = if c.double_quant { ", nested" } else { "" };
            format!("{} (blocksize {}{nested})", c.quant_type.as_str(), c.blocksize)
        };
        match self {
            MergeBase::Original => f.write_str("the original weights"),
            MergeBase::Dequantized(c) => write!(f, "the weights dequantized from {}", name(c)),
            MergeBase::Quantized(c) => write!(f, "the weights in {}, quantized again", name(c)),
        }
    }
}

/// What one choice of base costs one weight; all are shares of `‖ΔW‖` (Frobenius norms).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeCost {
    /// Share of ΔW that arrives: `<E, ΔW> / <ΔW, ΔW>` with E = result - base. 1 when all of it does.
    pub kept: f64,
    /// `‖E - ΔW‖ / ‖ΔW‖`: what rounding or quantizing did to the change itself.
    pub error: f64,
    /// `‖result - (T + ΔW)‖ / ‖ΔW‖`: distance from the function that was trained, T being the weights that the
    /// adapter was trained beside.
    pub distance: f64,
}

/// One merged weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModuleMerge {
    /// Module path.
    pub module: String,
    /// Decoder layer; `None` for `lm_head` and `embed_tokens`.
    pub layer: Option<usize>,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rank of the adapter here.
    pub r: usize,
    /// `‖W‖` of the weights in the base directory (decoded if they are 4-bit).
    pub norm_w: f64,
    /// `‖ΔW‖`.
    pub norm_delta: f64,
    /// The cost onto the original weights; `None` if they are not known or ΔW is zero.
    pub original: Option<MergeCost>,
    /// The cost onto the dequantized weights; `None` if ΔW is zero or costs were not asked for.
    pub dequantized: Option<MergeCost>,
    /// The cost of quantizing again; `None` likewise.
    pub quantized: Option<MergeCost>,
}

impl ModuleMerge {
    /// `‖ΔW‖ / ‖W‖`.
    pub fn ratio(&self) -> f64 {
        self.norm_delta / self.norm_w
    }

    /// The cost of a choice, whatever its configuration.
    pub fn cost(&self, onto: MergeBase) -> Option<MergeCost> {
        match onto {
            MergeBase::Original => self.original,
            MergeBase::Dequantized(_) => self.dequantized,
            MergeBase::Quantized(_) => self.quantized,
        }
    }
}

/// What a merge did, weight by weight. The text form is a table by layer.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// The base model's name.
    pub model: String,
    /// What was merged onto.
    pub onto: MergeBase,
    /// Whether distances are from the quantized weights (QLoRA) or, `false`, from the original ones.
    pub trained_on_quantized: bool,
    /// The quantization behind the dequantized and quantized columns.
    pub quantization: Nf4Config,
    /// Every merged weight, in the order of the network.
    pub modules: Vec<ModuleMerge>,
    /// The model directory that was written; `None` for a report without one.
    pub dir: Option<PathBuf>,
    /// dtype of the merged weights in the files ("u8" for 4-bit ones).
    pub dtype: String,
    /// Bytes of all tensors written.
    pub bytes: u64,
    /// Wall-clock time in seconds.
    pub seconds: f64,
    /// What else a reader should know.
    pub notes: Vec<String>,
}

/// The weights of one layer together: root of the sum of squares for norms, weighted likewise for costs.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerMerge {
    /// Decoder layer; `None` for the modules outside the layers, and for the whole model.
    pub layer: Option<usize>,
    /// How many weights.
    pub modules: usize,
    /// `‖W‖` over all of them.
    pub norm_w: f64,
    /// `‖ΔW‖` over all of them.
    pub norm_delta: f64,
    /// Cost onto the original weights.
    pub original: Option<MergeCost>,
    /// Cost onto the dequantized weights.
    pub dequantized: Option<MergeCost>,
    /// Cost of quantizing again.
    pub quantized: Option<MergeCost>,
}

impl MergeReport {
    /// The report by layer, in the order of the network.
    pub fn layers(&self) -> Vec<LayerMerge> {
        let mut out: Vec<LayerMerge> = Vec::new();
        for m in &self.modules {
            if !out.iter().any(|l| l.layer == m.layer) {
                let same: Vec<&ModuleMerge> = self.modules.iter().filter(|o| o.layer == m.layer).collect();
                out.push(together(m.layer, &same));
            }
        }
        out
    }

    /// What a row of [`MergeReport::layers`] is called: its number, or the modules outside the layers.
    pub fn layer_name(&self, layer: Option<usize>) -> String {
        let leaf = |m: &ModuleMerge| m.module.rsplit('.').next().unwrap_or_default().to_string();
        match layer {
            Some(n) => n.to_string(),
            None => self.modules.iter().filter(|m| m.layer.is_none()).map(leaf).collect::<Vec<_>>().join(", "),
        }
    }

    /// All merged weights as one.
    pub fn total(&self) -> LayerMerge {
        together(None, &self.modules.iter().collect::<Vec<_>>())
    }

    /// The cost of the choice that was made, over all weights.
    pub fn chosen(&self) -> Option<MergeCost> {
        let t = self.total();
        match self.onto {
            MergeBase::Original => t.original,
            MergeBase::Dequantized(_) => t.dequantized,
            MergeBase::Quantized(_) => t.quantized,
        }
    }
}

fn together(layer: Option<usize>, modules: &[&ModuleMerge]) -> LayerMerge {
    let norm = |f: fn(&ModuleMerge) -> f64| modules.iter().map(|m| f(m) * f(m)).sum::<f64>().sqrt();
    let norm_delta = norm(|m| m.norm_delta);
    let cost = |f: fn(&ModuleMerge) -> Option<MergeCost>| {
        let (mut kept, mut error, mut distance, mut any) = (0.0, 0.0, 0.0, false);
        for m in modules {
            let d2 = m.norm_delta * m.norm_delta;
            // A weight that the adapter does not change costs nothing.
            if d2 == 0.0 {
                continue;
            }
            let c = f(m)?;
            any = true;
            kept += c.kept * d2;
            error += c.error * c.error * d2;
            distance += c.distance * c.distance * d2;
        }
        let d2 = norm_delta * norm_delta;
        any.then(|| MergeCost { kept: kept / d2, error: (error / d2).sqrt(), distance: (distance / d2).sqrt() })
    };
    LayerMerge {
        layer,
        modules: modules.len(),
        norm_w: norm(|m| m.norm_w),
        norm_delta,
        original: cost(|m| m.original),
        dequantized: cost(|m| m.dequantized),
        quantized: cost(|m| m.quantized),
    }
}

impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} weights merged onto {}", self.model, self.modules.len(), self.onto)?;
        let trained = if self.trained_on_quantized { "quantized" } else { "original" };
        writeln!(
            f,
            "  distance is from the adapter beside the {trained} weights; all columns but the norms are shares of |dW|"
        )?;
        writeln!(
            f,
            "  {:<8} {:>10} {:>10} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8}",
            "", "|W|", "|dW|", "dW/W", "original", "", "dequant", "", "requant", ""
        )?;
        writeln!(
            f,
            "  {:<8} {:>10} {:>10} {:>8} | {:>8} {:>8} | {:>8} {:>8} | {:>8} {:>8}",
            "layer", "", "", "", "kept", "distance", "kept", "distance", "kept", "distance"
        )?;
        for l in self.layers() {
            row(f, &self.layer_name(l.layer), &l)?;
        }
        row(f, "together", &self.total())?;
        if let Some(dir) = &self.dir {
            write!(f, "  {}: {} bytes, {:.1} s", dir.display(), self.bytes, self.seconds)?;
        }
        for note in &self.notes {
            write!(f, "\n  note: {note}")?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, l: &LayerMerge) -> fmt::Result {
    write!(f, "  {name:<8} {:>10.4} {:>10.4} {:>7.2}%", l.norm_w, l.norm_delta, 100.0 * l.norm_delta / l.norm_w)?;
    for cost in [l.original, l.dequantized, l.quantized] {
        match cost {
            Some(c) => write!(f, " | {:>7.1}% {:>8.3}", 100.0 * c.kept, c.distance)?,
            None => write!(f, " | {:>8} {:>8}", "-", "-")?,
        }
    }
    writeln!(f)
}

impl fmt::Debug for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A dtype's name in reports.
pub(super) fn dtype_text(dtype: DType) -> String {
    dtype.as_str().into()
}
