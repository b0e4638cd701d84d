//! Adapters that start from the base's own weights: PiSSA and LoftQ.
//!
//! Both move a part of each weight into the adapter: what is left is another base. It is written as a model directory of
//! its own, beside the adapter: everything else (training, resuming, merging) then is that of plain LoRA on that base.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::adapter::{Adapter, LoraPair};
use super::adapter_config::AdapterConfig;
use super::config::LoraConfig;
use super::low_rank::low_rank;
use super::merge::merge;
use super::merge_report::MergeBase;
use crate::model::bnb_write::{BnbWriter, MAX_SHARD_BYTES, quantize_streamed, torch_name};
use crate::model::outdir::OutDir;
use crate::model::{Base, LinearModule, QuantizationConfig};
use crate::nf4::{self, Nf4Config, Nf4Tensor};
use crate::{Error, Result, files};

/// Steps of the subspace iteration: PEFT's `pissa_niter_16` is near the exact decomposition.
const ITERATIONS: usize = 16;

/// An adapter that holds a part of the base's weights, and what is left of them.
pub struct Decomposition {
    base: Base,
    /// The adapter to start training from.
    pub adapter: Adapter,
    residual: Residual,
    /// `|W - (base + scaling B A)| / |W|` of each adapted module, Frobenius norms: what is lost before training.
    pub errors: BTreeMap<String, f64>,
}

enum Residual {
    /// `W - scaling B A`, in the base's dtype.
    Dense,
    /// The 4-bit weights of the adapted modules.
    Quantized(Nf4Config, BTreeMap<String, Nf4Tensor>),
}

/// PiSSA (arXiv 2404.02948): A and B are the `r` largest singular directions of each weight, the base the rest. PEFT's
/// `init_lora_weights="pissa"`.
///
/// # Errors
/// As [`Base::from_dir`] and [`LoraConfig::discover`]; a base that is in 4 bits already, DoRA.
pub fn pissa(base_dir: impl AsRef<Path>, config: &LoraConfig) -> Result<Decomposition> {
    let base = dense_base(base_dir.as_ref(), config)?;
    let (mut tensors, mut errors) = (BTreeMap::new(), BTreeMap::new());
    for (i, m) in targets(&base, config)?.into_iter().enumerate() {
        let w = weight(&base, &m)?;
        tensors.insert(m.name.clone(), principal(&w, &m, config, i as u64)?);
        errors.insert(m.name, 0.0);
    }
    let adapter = fresh(&base, config, tensors);
    Ok(Decomposition { base, adapter, residual: Residual::Dense, errors })
}

/// LoftQ (arXiv 2310.08659): the base is in 4 bits, A and B the `r` largest singular directions of what quantizing lost;
/// with more `iterations` the two are fitted to each other in turn.
///
/// # Errors
/// As [`pissa`]; no iteration.
pub fn loftq(
    base_dir: impl AsRef<Path>,
    config: &LoraConfig,
    quantization: Nf4Config,
    iterations: usize,
) -> Result<Decomposition> {
    quantization.validate()?;
    if iterations == 0 {
        return Err(Error::new("LoftQ needs at least one iteration").at("iterations").expected("1 or more").found("0"));
    }
    let base = dense_base(base_dir.as_ref(), config)?;
    let (mut tensors, mut weights, mut errors) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (i, m) in targets(&base, config)?.into_iter().enumerate() {
        let w = weight(&base, &m)?;
        let dtype = base.checkpoint().info(&format!("{}.weight", m.name))?.dtype;
        let mut product = w.zeros_like()?;
        let mut fit = None;
        for _ in 0..iterations {
            let q = nf4::quantize(&(&w - &product)?, quantization)?;
            let decoded = Tensor::from_vec(q.dequantize_f32()?, w.shape(), &Device::Cpu)?;
            let pair = principal(&(&w - &decoded)?, &m, config, i as u64)?;
            product = product_of(&pair)?;
            let norm = |t: &Tensor| -> Result<f64> { Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt()) };
            let error = norm(&((&w - &decoded)? - &product)?)? / norm(&w)?.max(f64::MIN_POSITIVE);
            fit = Some((q, pair, error));
        }
        if let Some((q, pair, error)) = fit {
            weights.insert(m.name.clone(), Nf4Tensor { dtype, ..q });
            tensors.insert(m.name.clone(), pair);
            errors.insert(m.name, error);
        }
    }
    let adapter = fresh(&base, config, tensors);
    Ok(Decomposition { base, adapter, residual: Residual::Quantized(quantization, weights), errors })
}

impl Decomposition {
    /// Writes `base`, a model directory, and `adapter`, PEFT's files, into `dir`; each appears whole or not at all.
    ///
    /// Plan with the spec of the new base, give it to the run, and the adapter to
    /// [`Run::load_adapter`](crate::train::Run::load_adapter).
    ///
    /// # Errors
    /// Directories that are not empty or cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(PathBuf, PathBuf)> {
        let dir = dir.as_ref();
        files::create_dir_all(dir)?;
        let (base, adapter) = (dir.join("base"), dir.join("adapter"));
        match &self.residual {
            Residual::Dense => self.write_dense(&base)?,
            Residual::Quantized(config, weights) => self.write_quantized(&base, *config, weights)?,
        }
        let mut own = self.adapter.clone();
        own.config.base_model_name_or_path = Some(base.to_string_lossy().into_owned());
        own.save(&adapter)?;
        Ok((base, adapter))
    }

    /// The base without the adapter's part: a merge of its opposite.
    fn write_dense(&self, out: &Path) -> Result<()> {
        let mut opposite = self.adapter.clone();
        opposite.tensors.values_mut().for_each(|p| p.b.iter_mut().for_each(|b| *b = -*b));
        let tmp = tempfile::tempdir().map_err(|e| Error::io("create a directory", std::env::temp_dir(), e))?;
        opposite.save(tmp.path())?;
        merge(self.base.dir(), tmp.path())?.onto(MergeBase::Original).without_costs().save(out)?;
        Ok(())
    }

    fn write_quantized(&self, out: &Path, config: Nf4Config, weights: &BTreeMap<String, Nf4Tensor>) -> Result<()> {
        let out = OutDir::create(out)?;
        let mut writer = BnbWriter::create(out.path())?;
        let checkpoint = self.base.checkpoint();
        for m in self.base.spec().linears().iter().filter(|m| m.layer.is_some()) {
            let name = format!("{}.weight", m.name);
            match weights.get(&m.name) {
                Some(q) => writer.add(&name, q)?,
                None => writer.add(&name, &quantize_streamed(checkpoint, &name, config)?)?,
            }
        }
        writer.finish(checkpoint, MAX_SHARD_BYTES)?;
        out.copy_side_files(self.base.dir())?;
        let dtype = torch_name(self.base.spec().dtype);
        out.write_config(&self.base, Some(QuantizationConfig::to_json(config, dtype)))?;
        out.commit()
    }
}

fn dense_base(dir: &Path, config: &LoraConfig) -> Result<Base> {
    config.validate()?;
    let base = Base::from_dir(dir)?;
    if base.quantization().is_some() {
        return Err(Error::new("the base's own weights are needed")
            .at_path(dir)
            .expected("the unquantized checkpoint")
            .found("bitsandbytes 4-bit weights")
            .next("give the original model's directory"));
    }
    if config.use_dora {
        return Err(Error::new("DoRA starts from the base as it is")
            .at("use_dora")
            .expected("false")
            .found("true")
            .next("choose one of the two"));
    }
    Ok(base)
}

/// The adapted modules of the decoder layers.
fn targets(base: &Base, config: &LoraConfig) -> Result<Vec<LinearModule>> {
    let matched = config.discover(base.spec())?.matched;
    match matched.iter().find(|m| m.layer.is_none()) {
        Some(m) => Err(Error::new("this module cannot be adapted in the engine")
            .at("target_modules")
            .expected("linear modules of the decoder layers")
            .found(m.name.clone())
            .next("leave it out")),
        None => Ok(matched),
    }
}

fn weight(base: &Base, m: &LinearModule) -> Result<Tensor> {
    Ok(base.checkpoint().read_tensor(&format!("{}.weight", m.name))?.to_dtype(DType::F32)?)
}

/// The pair whose `scaling B A` is the best approximation of `w`: `A = sqrt(S / scaling) V`, `B = U sqrt(S / scaling)`.
fn principal(w: &Tensor, m: &LinearModule, config: &LoraConfig, seed: u64) -> Result<LoraPair> {
    let own = config.of(&m.name)?;
    let (r, scaling) = (own.r, own.scaling());
    let found = low_rank(w, r, ITERATIONS, seed).map_err(|e| e.at(m.name.clone()))?;
    let roots: Vec<f32> = found.s.iter().map(|s| (f64::from(*s) / scaling).sqrt() as f32).collect();
    let (in_features, out_features) = (m.in_features, m.out_features);
    let a = found.v.iter().enumerate().map(|(i, v)| v * roots[i / in_features]).collect();
    let b = found.u.iter().enumerate().map(|(i, u)| u * roots[i % r]).collect();
    Ok(LoraPair { a, b, r, in_features, out_features, scaling, magnitude: None })
}

fn product_of(p: &LoraPair) -> Result<Tensor> {
    let b = Tensor::from_slice(&p.b, (p.out_features, p.r), &Device::Cpu)?;
    let a = Tensor::from_slice(&p.a, (p.r, p.in_features), &Device::Cpu)?;
    Ok((b.matmul(&a)? * p.scaling)?)
}

fn fresh(base: &Base, config: &LoraConfig, tensors: BTreeMap<String, LoraPair>) -> Adapter {
    let config = AdapterConfig::new(config.clone(), Some(base.spec().name.clone()));
    Adapter { config, tensors, biases: BTreeMap::new() }
}

impl fmt::Debug for Decomposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.residual {
            Residual::Dense => "PiSSA",
            Residual::Quantized(..) => "LoftQ",
        };
        write!(f, "{kind}({:?}, {:?})", self.base, self.adapter)
    }
}
