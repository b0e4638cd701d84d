//! Merging an adapter into its base, one weight at a time, with a report of what the choice of base costs.

use std::fmt;
use std::path::Path;
use std::time::Instant;

use candle_core::DType;
use serde_json::Value;

use super::adapter::{AdapterFiles, EMBEDDING};
use super::delta::{round_to, to_bytes};
use super::merge_report::{MergeBase, MergeReport, dtype_text};
use super::merge_weight::{Job, Sink, Source};
use crate::model::bnb_write::{BnbWriter, MAX_SHARD_BYTES, copy_tensor, torch_name};
use crate::model::outdir::OutDir;
use crate::model::{Base, LinearModule, ModelSpec, QuantizationConfig, ShardedWriter, TensorHeader, pt_metadata};
use crate::nf4::{Nf4Config, Nf4Tensor};
use crate::{Error, Result, files};

/// A base model and an adapter that fits it. Say next what to merge [`onto`](Merge::onto).
#[derive(Clone)]
pub struct Merge {
    base: Base,
    adapter: AdapterFiles,
}

/// A merge that is ready to run: [`save`](MergeOnto::save) writes the model, [`report`](MergeOnto::report) only
/// measures.
#[derive(Clone)]
pub struct MergeOnto {
    merge: Merge,
    onto: MergeBase,
    compare: bool,
    trained_on_quantized: bool,
    max_shard_bytes: u64,
}

/// Opens a model directory and an adapter directory for merging; only headers are read.
///
/// `notebooks/08_merge_and_generate.ipynb` explains it.
///
/// ```no_run
/// use tunebook::lora::{self, MergeBase};
/// use tunebook::nf4::Nf4Config;
///
/// let report = lora::merge("mistral-7b", "runs/demo/checkpoints/step-200")?
///     .onto(MergeBase::Dequantized(Nf4Config::default()))
///     .save("merged")?;
/// println!("{report}");
/// # Ok::<(), tunebook::Error>(())
/// ```
///
/// # Errors
/// As [`Base::from_dir`] and [`Adapter::load`](super::Adapter::load), and an adapter for another model.
pub fn merge(base_dir: impl AsRef<Path>, adapter_dir: impl AsRef<Path>) -> Result<Merge> {
    let base = Base::from_dir(base_dir)?;
    let adapter = AdapterFiles::open(&adapter_dir)?;
    adapter.check(base.spec()).map_err(|e| e.at_path(&adapter_dir))?;
    check_tied(base.spec(), &adapter).map_err(|e| e.at_path(&adapter_dir))?;
    check_biases(&base, &adapter).map_err(|e| e.at_path(&adapter_dir))?;
    Ok(Merge { base, adapter })
}

impl Merge {
    /// Says which weights the adapter is added to.
    pub fn onto(self, onto: MergeBase) -> MergeOnto {
        MergeOnto { merge: self, onto, compare: true, trained_on_quantized: true, max_shard_bytes: MAX_SHARD_BYTES }
    }
}

impl fmt::Debug for Merge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Merge({:?}, {} adapted modules)", self.base, self.adapter.modules().count())
    }
}

impl fmt::Debug for MergeOnto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} onto {}", self.merge, self.onto)
    }
}

impl MergeOnto {
    /// The adapter was trained beside the original weights (LoRA), not beside quantized ones (QLoRA, the default):
    /// the report's distances are then from those.
    pub fn trained_on_original(mut self) -> Self {
        self.trained_on_quantized = false;
        self
    }

    /// Leaves out the costs of the choices that are not made: norms only, and less time.
    pub fn without_costs(mut self) -> Self {
        self.compare = false;
        self
    }

    /// Largest size of a shard in bytes; 5 GB unless said otherwise.
    pub fn max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = bytes;
        self
    }

    /// Measures what [`save`](Self::save) would do, and writes nothing.
    ///
    /// # Errors
    /// As [`save`](Self::save), but for those of writing.
    pub fn report(&self) -> Result<MergeReport> {
        let start = Instant::now();
        let run = Run::new(self)?;
        let mut report = run.empty_report();
        for m in run.base.spec().matrices() {
            run.weight(&m, Sink::Nothing, &mut report)?;
        }
        report.seconds = start.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Merges and writes a whole model directory: weights in the base's dtype (or bitsandbytes' 4 bits for
    /// [`MergeBase::Quantized`]), `config.json`, generation config, tokenizer, chat template.
    ///
    /// Weights stream through in blocks of rows, multi-threaded; the sum is in f32 and rounded once. The directory
    /// appears whole or not at all.
    ///
    /// # Errors
    /// An output directory that is not empty or cannot be written, [`MergeBase::Original`] where only 4-bit weights
    /// are known, a quantization other than the base's own, and weights that become infinite or NaN.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<MergeReport> {
        let start = Instant::now();
        let run = Run::new(self)?;
        let out = OutDir::create(&dir)?;
        let mut report = run.empty_report();
        report.bytes = match self.onto {
            MergeBase::Quantized(_) => run.write_quantized(out.path(), &mut report)?,
            _ => run.write_dense(out.path(), &mut report)?,
        };
        out.copy_side_files(run.base.dir())?;
        out.write_config(run.base, run.quantization_json()?)?;
        out.commit()?;
        report.dir = Some(dir.as_ref().to_path_buf());
        report.seconds = start.elapsed().as_secs_f64();
        Ok(report)
    }
}

/// One merge under way.
struct Run<'a> {
    plan: &'a MergeOnto,
    base: &'a Base,
    adapter: &'a AdapterFiles,
    /// The quantization of the dequantized and quantized choices.
    cfg: Nf4Config,
}

impl<'a> Run<'a> {
    fn new(plan: &'a MergeOnto) -> Result<Self> {
        let (base, adapter) = (&plan.merge.base, &plan.merge.adapter);
        let stored = match base.spec().linears().first() {
            Some(m) => base.nf4(&m.name)?.map(|q| q.config()),
            None => None,
        };
        let asked = match plan.onto {
            MergeBase::Original => None,
            MergeBase::Dequantized(c) | MergeBase::Quantized(c) => Some(c),
        };
        if let Some(c) = asked {
            c.validate()?;
        }
        match (stored, asked) {
            (Some(_), None) => Err(Error::new("the original weights are not there")
                .at_path(base.dir())
                .expected("the unquantized checkpoint")
                .found("bitsandbytes 4-bit weights")
                .next("give the original model's directory, or merge onto MergeBase::Dequantized")),
            (Some(stored), Some(asked)) if stored != asked => Err(Error::new("the base is quantized in another way")
                .at_path(base.dir())
                .expected(format!("{stored:?}"))
                .found(format!("{asked:?}"))
                .next("name the base's own quantization, or give the original model's directory")),
            _ => Ok(Run { plan, base, adapter, cfg: stored.or(asked).unwrap_or_default() }),
        }
    }

    fn empty_report(&self) -> MergeReport {
        let dtype = match self.plan.onto {
            MergeBase::Quantized(_) => DType::U8,
            _ => self.base.spec().dtype,
        };
        let mut notes = Vec::new();
        let unknown = self.adapter.config.unknown_keys();
        if !unknown.is_empty() {
            notes.push(format!("adapter_config.json has keys that were passed over: {}", unknown.join(", ")));
        }
        MergeReport {
            model: self.base.spec().name.clone(),
            onto: self.plan.onto,
            trained_on_quantized: self.plan.trained_on_quantized,
            quantization: self.cfg,
            modules: Vec::new(),
            dir: None,
            dtype: dtype_text(dtype),
            bytes: 0,
            seconds: 0.0,
            notes,
        }
    }

    /// Merges one weight into `sink`, and adds its line to the report; `None` if the adapter leaves it alone.
    fn weight(&self, m: &LinearModule, sink: Sink<'_>, report: &mut MergeReport) -> Result<Option<Nf4Tensor>> {
        let Some(pair) = self.adapter.pair(&m.name)? else { return Ok(None) };
        let source = self.source(m)?;
        let job = Job {
            module: m,
            pair: &pair,
            source: &source,
            cfg: self.cfg,
            onto: self.plan.onto,
            compare: self.plan.compare,
            trained_on_quantized: self.plan.trained_on_quantized,
        };
        let (line, quantized) = job.run(sink).map_err(|e| e.at(m.name.clone()))?;
        report.modules.push(line);
        Ok(quantized)
    }

    fn source(&self, m: &LinearModule) -> Result<Source> {
        let name = format!("{}.weight", m.name);
        Ok(match self.base.nf4(&m.name)? {
            Some(q) => Source::Nf4(q),
            None => Source::Dense(self.base.checkpoint().clone(), name),
        })
    }

    /// Streams all tensors, in the base's order, with the adapted ones merged.
    fn write_dense(&self, dir: &Path, report: &mut MergeReport) -> Result<u64> {
        let linears = by_weight(self.base.spec());
        let headers = self.dense_headers()?;
        let bytes = headers.iter().map(TensorHeader::bytes).sum();
        let mut out = ShardedWriter::create(dir, headers.clone(), self.plan.max_shard_bytes, &pt_metadata())?;
        for h in &headers {
            let linear = linears.get(&h.name);
            let before = report.modules.len();
            if let Some(m) = linear {
                self.weight(m, Sink::Dense(&mut |bytes| out.write(&h.name, bytes), h.dtype), report)?;
            }
            if report.modules.len() > before {
                continue;
            }
            if let Some(bias) = h.name.strip_suffix(".bias").map(|m| self.adapter.bias(m)).transpose()?.flatten() {
                out.write_f32(&h.name, &bias)?;
                continue;
            }
            // A 4-bit weight without an adapter is decoded all the same: the output is dense.
            match linear.map(|m| self.base.nf4(&m.name)).transpose()?.flatten() {
                Some(q) => out.write_f32(&h.name, &q.dequantize_f32()?)?,
                None => copy_tensor(self.base.checkpoint(), h, &mut out)?,
            }
        }
        out.finish()?;
        sort_as_network(report, self.base.spec());
        Ok(bytes)
    }

    /// Headers of the output: the base's own for a dense base, the spec's for one that is decoded.
    fn dense_headers(&self) -> Result<Vec<TensorHeader>> {
        let checkpoint = self.base.checkpoint();
        if self.base.quantization().is_none() {
            let header = |name: String| {
                let info = checkpoint.info(&name)?;
                Ok(TensorHeader::new(name, info.dtype, info.shape))
            };
            return checkpoint.names_in_file_order().into_iter().map(header).collect();
        }
        let mut out = Vec::new();
        for t in self.base.spec().tensors() {
            let module = t.name.strip_suffix(".weight").unwrap_or(&t.name);
            let dtype = match self.base.nf4(module)? {
                Some(q) => q.dtype,
                None => checkpoint.info(&t.name)?.dtype,
            };
            out.push(TensorHeader::new(t.name, dtype, t.shape));
        }
        crate::model::canonical_order(&mut out);
        Ok(out)
    }

    /// All linear modules of the layers in 4 bits, the rest as it is.
    fn write_quantized(&self, dir: &Path, report: &mut MergeReport) -> Result<u64> {
        let mut out = BnbWriter::create(dir)?;
        for module in self.adapter.biased() {
            let (name, bias) = (format!("{module}.bias"), self.adapter.bias(module)?.unwrap_or_default());
            let info = self.base.checkpoint().info(&name)?;
            let dtype = info.dtype;
            out.add_dense(TensorHeader::new(name, dtype, info.shape), |w| {
                let mut bias = bias;
                round_to(dtype, &mut bias);
                w.write_all(&to_bytes(dtype, &bias)).map_err(|e| Error::io("write", dir, e))
            })?;
        }
        for m in self.base.spec().matrices() {
            let name = format!("{}.weight", m.name);
            if m.layer.is_none() && self.base.nf4(&m.name)?.is_none() {
                // lm_head stays dense, as transformers leaves it; tied, it is not in the file.
                if self.adapter.pair(&m.name)?.is_some() {
                    let info = self.base.checkpoint().info(&name)?;
                    let header = TensorHeader::new(name, info.dtype, info.shape);
                    let dtype = header.dtype;
                    out.add_dense(header, |w| {
                        let mut write = |bytes: &[u8]| w.write_all(bytes).map_err(|e| Error::io("write", dir, e));
                        self.weight(&m, Sink::Dense(&mut write, dtype), report).map(|_| ())
                    })?;
                }
                continue;
            }
            let q = match self.weight(&m, Sink::Quantized, report)? {
                Some(q) => q,
                None => match self.source(&m)? {
                    Source::Nf4(q) => q,
                    Source::Dense(checkpoint, name) => {
                        crate::model::bnb_write::quantize_streamed(&checkpoint, &name, self.cfg)?
                    }
                },
            };
            out.add(&name, &q)?;
        }
        out.finish(self.base.checkpoint(), self.plan.max_shard_bytes)
    }

    /// The `quantization_config` of the output.
    fn quantization_json(&self) -> Result<Option<Value>> {
        if !matches!(self.plan.onto, MergeBase::Quantized(_)) {
            return Ok(None);
        }
        let path = self.base.dir().join("config.json");
        let config: Value = serde_json::from_str(&files::read_to_string(&path)?)
            .map_err(|e| Error::new("not valid JSON").at_path(&path).caused_by(e))?;
        let own = config.get("quantization_config").filter(|v| !v.is_null()).cloned();
        let dtype = torch_name(self.base.spec().dtype);
        Ok(Some(own.unwrap_or_else(|| QuantizationConfig::to_json(self.cfg, dtype))))
    }
}

/// A tied table is both the embeddings and `lm_head`: what an adapter adds to one of them, a merge would add to both.
fn check_tied(spec: &ModelSpec, adapter: &AdapterFiles) -> Result<()> {
    let tied = adapter.modules().find(|m| ["lm_head", EMBEDDING].contains(m) && spec.tie_word_embeddings);
    match tied {
        None => Ok(()),
        Some(module) => Err(Error::new("an adapter on a tied embedding table cannot be merged")
            .at(module.to_string())
            .expected("modules with a weight of their own")
            .found(format!("the table that {} also uses at its other end", spec.name))
            .next("give the base a lm_head.weight of its own and set tie_word_embeddings to false in its config.json")),
    }
}

/// A trained bias replaces one that the base has.
fn check_biases(base: &Base, adapter: &AdapterFiles) -> Result<()> {
    for module in adapter.biased() {
        let name = format!("{module}.bias");
        let have = if base.checkpoint().contains(&name) { base.checkpoint().info(&name)?.shape } else { Vec::new() };
        let found = adapter.bias(module)?.map_or(0, |b| b.len());
        if have != [found] {
            return Err(Error::new("the adapter has a bias that does not fit the base")
                .at(name)
                .expected(if have.is_empty() { "no bias".into() } else { format!("{have:?}") })
                .found(format!("[{found}]"))
                .next("use the base model that the adapter was trained on"));
        }
    }
    Ok(())
}

fn by_weight(spec: &ModelSpec) -> std::collections::HashMap<String, LinearModule> {
    spec.matrices().into_iter().map(|m| (format!("{}.weight", m.name), m)).collect()
}

/// Files are in another order than the network.
fn sort_as_network(report: &mut MergeReport, spec: &ModelSpec) {
    let order: std::collections::HashMap<String, usize> =
        spec.matrices().into_iter().map(|m| m.name).zip(0..).collect();
    report.modules.sort_by_key(|m| order.get(&m.module).copied());
}
