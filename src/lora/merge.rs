//! Merging an adapter into its base, one weight at a time, with a report of what the choice of base costs.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Instant;

use candle_core::DType;
use serde_json::Value;

use super::adapter::{AdapterFiles, EMBEDDING};
use super::delta::{round_to, to_bytes};
use super::merge_report::{MergeBase, MergeReport, ModuleMerge, dtype_text};
use super::merge_weight::{Job, Sink, Source, Spaces, WriteBytes};
use crate::model::bnb_write::{BnbWriter, MAX_SHARD_BYTES, copy_tensor, torch_name};
use crate::model::outdir::OutDir;
use crate::model::{Base, LinearModule, ModelSpec, QuantizationConfig, Shards, TensorHeader, pt_metadata};
use crate::nf4::{Nf4Config, Nf4Tensor};
use crate::{Error, Result, files};

/// Files that are written at a time.
const WRITERS: usize = 4;
/// Pieces that wait for the thread of a file: half a MiB each, 4 MiB of a tensor that is copied.
const QUEUE: usize = 24;

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
            run.weight(&m, Sink::Nothing, &mut report.modules)?;
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
    spaces: Spaces,
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
            _ => {
                let (cfg, spaces) = (stored.or(asked).unwrap_or_default(), Spaces::default());
                Ok(Run { plan, base, adapter, cfg, spaces })
            }
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

    /// Merges one weight into `sink`, and adds its line to the report's; `None` if the adapter leaves it alone.
    fn weight(&self, m: &LinearModule, sink: Sink<'_>, lines: &mut Vec<ModuleMerge>) -> Result<Option<Nf4Tensor>> {
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
            spaces: &self.spaces,
        };
        let (line, quantized) = job.run(sink).map_err(|e| e.at(m.name.clone()))?;
        lines.push(line);
        Ok(quantized)
    }

    fn source(&self, m: &LinearModule) -> Result<Source> {
        let name = format!("{}.weight", m.name);
        Ok(match self.base.nf4(&m.name)? {
            Some(q) => Source::Nf4(q),
            None => Source::Dense(self.base.checkpoint().clone(), name),
        })
    }

    /// Streams all tensors with the adapted ones merged. The files are written by threads of their own, a few at a time, while the next
    /// weights are computed: copying into one file takes a thread longer than a handful of cores take to merge.
    fn write_dense(&self, dir: &Path, report: &mut MergeReport) -> Result<u64> {
        let linears = by_weight(self.base.spec());
        let headers = self.dense_headers()?;
        let bytes = headers.iter().map(TensorHeader::bytes).sum();
        let shards = Shards::plan(dir, headers, self.plan.max_shard_bytes, &pt_metadata())?;
        let lines = &mut report.modules;
        std::thread::scope(|scope| {
            let mut next = 0..shards.files();
            let mut begin = || next.next().map(|file| FileWriter::begin(scope, &shards, file)).transpose();
            let (mut open, mut closed) = (Vec::new(), Vec::new());
            while open.len() < WRITERS
                && let Some(writer) = begin()?
            {
                open.push(writer);
            }
            // A tensor for each file in turn: all of them have something to write.
            let mut turn = 0;
            while !open.is_empty() {
                turn %= open.len();
                let writer: &mut FileWriter<'_> = &mut open[turn];
                if let Some(h) = writer.left.next() {
                    let done = self.tensor(h, &linears, &mut |bytes| writer.send(h, bytes), lines);
                    if writer.lost {
                        return written(open.swap_remove(turn).close());
                    }
                    done?;
                    turn += 1;
                    continue;
                }
                closed.push(open.remove(turn).close());
                if let Some(writer) = begin()? {
                    open.insert(turn, writer);
                }
            }
            closed.into_iter().try_for_each(written)
        })?;
        shards.write_index()?;
        sort_as_network(report, self.base.spec());
        Ok(bytes)
    }

    /// One tensor of the output, merged if it is adapted; its line goes to the report's.
    fn tensor(
        &self,
        h: &TensorHeader,
        linears: &HashMap<String, LinearModule>,
        write: WriteBytes<'_>,
        lines: &mut Vec<ModuleMerge>,
    ) -> Result<()> {
        let linear = linears.get(&h.name);
        let before = lines.len();
        if let Some(m) = linear {
            self.weight(m, Sink::Dense(&mut *write, h.dtype), lines)?;
        }
        if lines.len() > before {
            return Ok(());
        }
        let mut rounded = |mut values: Vec<f32>| {
            round_to(h.dtype, &mut values);
            write(to_bytes(h.dtype, &values))
        };
        if let Some(bias) = h.name.strip_suffix(".bias").map(|m| self.adapter.bias(m)).transpose()?.flatten() {
            return rounded(bias);
        }
        // A 4-bit weight without an adapter is decoded all the same: the output is dense.
        match linear.map(|m| self.base.nf4(&m.name)).transpose()?.flatten() {
            Some(q) => rounded(q.dequantize_f32()?),
            None => copy_tensor(self.base.checkpoint(), h, |bytes| write(bytes.to_vec())),
        }
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
                        let mut write = |bytes: Vec<u8>| w.write_all(&bytes).map_err(|e| Error::io("write", dir, e));
                        self.weight(&m, Sink::Dense(&mut write, dtype), &mut report.modules).map(|_| ())
                    })?;
                }
                continue;
            }
            let q = match self.weight(&m, Sink::Quantized, &mut report.modules)? {
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

/// A file that a thread writes; what it writes waits in a queue.
struct FileWriter<'a> {
    /// The tensors that are still to come.
    left: std::slice::Iter<'a, TensorHeader>,
    queue: SyncSender<(&'a str, Vec<u8>)>,
    thread: Writing<'a>,
    /// The thread has ended: it says why.
    lost: bool,
}

type Writing<'a> = ScopedJoinHandle<'a, Result<()>>;

impl<'a> FileWriter<'a> {
    fn begin(scope: &'a Scope<'a, '_>, shards: &'a Shards, file: usize) -> Result<Self> {
        let mut out = shards.writer(file)?;
        let (queue, pieces) = sync_channel::<(&str, Vec<u8>)>(QUEUE);
        let thread = scope.spawn(move || {
            for (name, bytes) in pieces {
                out.write(name, &bytes)?;
            }
            out.finish()
        });
        Ok(FileWriter { left: shards.tensors(file).iter(), queue, thread, lost: false })
    }

    fn send(&mut self, h: &'a TensorHeader, bytes: Vec<u8>) -> Result<()> {
        self.lost = self.queue.send((&h.name, bytes)).is_err();
        if self.lost { Err(Error::new("a file cannot be written").at(h.name.clone())) } else { Ok(()) }
    }

    /// Nothing more comes; the thread goes on until all is on the disk.
    fn close(self) -> Writing<'a> {
        self.thread
    }
}

/// What came of a file.
fn written(thread: Writing<'_>) -> Result<()> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn by_weight(spec: &ModelSpec) -> HashMap<String, LinearModule> {
    spec.matrices().into_iter().map(|m| (format!("{}.weight", m.name), m)).collect()
}

/// Files are in another order than the network.
fn sort_as_network(report: &mut MergeReport, spec: &ModelSpec) {
    let order: HashMap<String, usize> = spec.matrices().into_iter().map(|m| m.name).zip(0..).collect();
    report.modules.sort_by_key(|m| order.get(&m.module).copied());
}
