//! [`Run`]: training, one micro-step or one step at a time, that can be killed at any instant and resumed to the bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use safetensors::Dtype;
use serde_json::Value;

use super::progress::Progress;
use super::*;
use crate::data::{Batch, Dataset, epoch_order};
use crate::engine::optimizer::AdamWHyper;
use crate::engine::{Engine, LossSum, StateTensor};
use crate::lora::{Adapter, AdapterConfig};
use crate::model::{Base, SafetensorsWriter, TensorHeader, pt_metadata};
use crate::plan::{MemoryPlan, PlanConfig};
use crate::{Error, Result, interrupt};

/// Fingerprint of a run that began with random weights instead of a base.
const FROM_SCRATCH: &str = "random weights";
const EVAL_FILE: &str = "eval_dataset.safetensors";
const WEIGHTS_FILE: &str = "model.safetensors";

/// A training run: an engine, a data set, a configuration, and a directory that lets it be resumed.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
///
/// Checkpoints are written every `save_steps` steps, at the end, and by [`Run::checkpoint`]. A process that is killed at any
/// instant goes on from the last whole one by [`Run::resume`]; the losses and the adapter are then the same, bit for
/// bit, as if it had never stopped.
pub struct Run {
    dir: RunDir,
    record: RunRecord,
    engine: Engine,
    data: Dataset,
    eval: Option<Dataset>,
    state: TrainState,
    log: MetricsLog,
    total_steps: u64,
    order: Option<(u64, Vec<usize>)>,
    partial: Partial,
    /// Reports of steps that are done but could not be written, e.g. to a full disk.
    unlogged: Vec<StepReport>,
    saved: Option<u64>,
    /// Evaluation and checkpoint of the last step are still to be done: an interrupt came between.
    after_due: bool,
    /// Why the run cannot go on, when an engine failed in the middle.
    stopped: Option<String>,
}

/// What the micro-steps of the current step have gathered.
#[derive(Default)]
struct Partial {
    done: u64,
    loss: LossSum,
    tokens: u64,
    examples: u64,
    seconds: f64,
    data_seconds: f64,
    forward_seconds: f64,
    backward_seconds: f64,
}

/// One micro-step.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroReport {
    /// The optimizer step that it belongs to, from 1.
    pub step: u64,
    /// Which micro-step of that step, from 1.
    pub index: u64,
    /// Micro-steps of that step.
    pub of: u64,
    /// Mean cross-entropy over its trained tokens.
    pub loss: f64,
    /// Its tokens.
    pub tokens: u64,
    /// Those that had a label.
    pub trained_tokens: u64,
    /// Indices of its examples in the data set.
    pub examples: Vec<usize>,
    /// Wall-clock time.
    pub seconds: f64,
}

/// What [`Run::steps`] did.
#[derive(Clone, PartialEq)]
pub struct Steps {
    /// One report for each step.
    pub reports: Vec<StepReport>,
    /// An interrupt ended it early; everything is kept, and the next call goes on.
    pub interrupted: bool,
    /// Steps done in the whole run.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
}

impl Run {
    /// Makes a run in a new directory: loads the base into the plan's arena, draws the adapter from the seed, and writes
    /// everything that a resume needs.
    ///
    /// # Errors
    /// A directory that holds a run already; a configuration, plan, base and data set that do not fit together: an
    /// example longer than the plan's sequences, a micro-batch larger than the plan's, another optimizer.
    pub fn create(
        dir: impl AsRef<Path>,
        plan: MemoryPlan,
        base: Base,
        data: Dataset,
        config: TrainConfig,
    ) -> Result<Self> {
        let record = BaseRecord::of(base.dir())?;
        Self::begin(dir.as_ref(), plan, Some(base), record, data, config)
    }

    /// Makes a run that trains random weights (drawn from the seed): full fine-tuning from scratch.
    ///
    /// # Errors
    /// As [`Run::create`]; a plan that trains an adapter only.
    pub fn create_from_scratch(
        dir: impl AsRef<Path>,
        plan: MemoryPlan,
        data: Dataset,
        config: TrainConfig,
    ) -> Result<Self> {
        if !plan.config().method.is_full() {
            return Err(Error::new("random weights can only be trained as a whole")
                .at("method")
                .expected("full fine-tuning")
                .found(plan.config().method.label())
                .next("plan with MemoryPlan::full, or give a base to Run::create"));
        }
        let record = BaseRecord { dir: PathBuf::new(), fingerprint: FROM_SCRATCH.into() };
        Self::begin(dir.as_ref(), plan, None, record, data, config)
    }

    fn begin(
        dir: &Path,
        plan: MemoryPlan,
        base: Option<Base>,
        base_record: BaseRecord,
        data: Dataset,
        config: TrainConfig,
    ) -> Result<Self> {
        let total_steps = check(&plan, &data, &config)?;
        let engine = engine(&plan, base.as_ref(), config.seed)?;
        let run_dir = RunDir::create(dir)?;
        save_dataset(run_dir.dataset(), &data)?;
        let plan_value = to_value("the plan", plan.config())?;
        let lora = to_value("the LoRA configuration", &plan.config().lora)?;
        let dataset = DatasetRecord::of(&data);
        let record = RunRecord::new(plan.spec().clone(), lora, config, plan_value, base_record, dataset);
        let log = MetricsLog::create(&run_dir)?;
        run_dir.commit(&record)?;
        let state = TrainState { rng: RngState { seed: record.train.seed, micro_steps: 0 }, ..TrainState::default() };
        Ok(Run {
            dir: run_dir,
            record,
            engine,
            data,
            eval: None,
            state,
            log,
            total_steps,
            order: None,
            partial: Partial::default(),
            unlogged: Vec::new(),
            saved: None,
            after_due: false,
            stopped: None,
        })
    }

    /// Opens a run again and goes on from its last whole checkpoint, or from the start when there is none.
    ///
    /// # Errors
    /// No run there, a run of another version, another process that trains it, a base or data that changed since, a
    /// checkpoint that cannot be read.
    pub fn resume(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (run_dir, record) = RunDir::open(dir)?;
        let config: PlanConfig = serde_json::from_value(record.plan.clone()).map_err(|e| {
            Error::new("the plan's inputs in run.json cannot be read").at_path(dir.join("run.json")).caused_by(e)
        })?;
        let plan = MemoryPlan::new(&record.spec, config)?;
        let base = reopen_base(&record)?;
        let data = load_dataset(run_dir.dataset())?;
        record.dataset.check(&data)?;
        let eval_path = dir.join(EVAL_FILE);
        let eval = if eval_path.exists() { Some(load_dataset(eval_path)?) } else { None };
        let total_steps = check(&plan, &data, &record.train)?;
        let mut engine = engine(&plan, base.as_ref(), record.train.seed)?;
        clean_leftovers(&run_dir)?;
        let scan = scan_checkpoints(dir)?;
        if let (None, Some(damaged)) = (&scan.newest, scan.damaged.first()) {
            return Err(Error::new("no checkpoint of the run is whole")
                .at_path(&damaged.path)
                .found(damaged.problem.clone())
                .next("restore a checkpoint from a copy, or remove the damaged ones to start again from step 0"));
        }
        let mut state = match &scan.newest {
            Some(checkpoint) => restore(&mut engine, checkpoint)?,
            None => TrainState { rng: RngState { seed: record.train.seed, micro_steps: 0 }, ..TrainState::default() },
        };
        let log = MetricsLog::resume(&run_dir, state.step)?;
        state.resumes.push(state.step);
        let saved = scan.newest.map(|c| c.step());
        Ok(Run {
            dir: run_dir,
            record,
            engine,
            data,
            eval,
            state,
            log,
            total_steps,
            order: None,
            partial: Partial::default(),
            unlogged: Vec::new(),
            saved,
            after_due: false,
            stopped: None,
        })
    }

    /// The data set that `eval_steps` evaluates on; saved with the run.
    ///
    /// # Errors
    /// An example beyond the plan; a file that cannot be written.
    pub fn set_eval_dataset(&mut self, eval: Dataset) -> Result<()> {
        check_lengths(self.engine.plan(), &eval, 1)?;
        save_dataset(self.dir.path().join(EVAL_FILE), &eval)?;
        self.eval = Some(eval);
        Ok(())
    }

    /// Starts from an adapter instead of a fresh one; before the first step only. Writes a checkpoint of step 0.
    ///
    /// # Errors
    /// A run that has begun; an adapter of another shape than the plan's.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        if self.state.step > 0 || self.partial.done > 0 {
            return Err(Error::new("the run has begun: its adapter cannot be replaced")
                .found(format!("step {}", self.state.step))
                .next("create a new run to start from this adapter"));
        }
        self.engine.load_adapter(adapter)?;
        self.checkpoint()?;
        Ok(())
    }

    /// Forward and backward pass of the next micro-batch; gradients accumulate until [`Run::step`] updates.
    ///
    /// # Errors
    /// The step's micro-batches are all done; the run is over; an interrupt; a loss that is not finite: the batch is then
    /// saved in the run's directory and named.
    pub fn micro_step(&mut self) -> Result<MicroReport> {
        self.ready()?;
        self.finish_last_step()?;
        interrupt::check(|| "training, between two micro-steps".into())?;
        self.accumulate()
    }

    fn accumulate(&mut self) -> Result<MicroReport> {
        let batches = self.batches();
        if self.partial.done == batches.count {
            return Err(Error::new("every micro-batch of this step has been accumulated")
                .found(format!("{} of {}", self.partial.done, batches.count))
                .next("call step(): it clips, updates, and begins the next step"));
        }
        let start = Instant::now();
        let num_items = self.num_items(batches);
        let batch = self.batch(batches.epoch, batches.first + self.partial.done);
        let data_seconds = start.elapsed().as_secs_f64();
        let (tokens, examples) = (batch.tokens() as u64, batch.examples.clone());
        let seed = self.state.rng.seed;
        let counter = self.state.rng.micro_steps + self.partial.done;
        let loss = self.engine.micro_step(batch, num_items, seed, counter).inspect_err(|e| self.stop(e))?;
        if !loss.sum.is_finite() {
            return Err(self.not_finite("loss", loss.mean(), &examples));
        }
        let (forward, backward) = self.engine.take_pass_seconds();
        let seconds = start.elapsed().as_secs_f64();
        let p = &mut self.partial;
        p.done += 1;
        p.loss.sum += loss.sum;
        p.loss.tokens += loss.tokens;
        p.tokens += tokens;
        p.examples += examples.len() as u64;
        p.seconds += seconds;
        p.data_seconds += data_seconds;
        p.forward_seconds += forward;
        p.backward_seconds += backward;
        Ok(MicroReport {
            step: self.state.step + 1,
            index: p.done,
            of: batches.count,
            loss: loss.mean(),
            tokens,
            trained_tokens: loss.tokens,
            examples,
            seconds,
        })
    }

    /// One optimizer step: the micro-batches that are left, clipping, the update. Saves and evaluates when the
    /// configuration says so.
    ///
    /// # Errors
    /// As [`Run::micro_step`]; a checkpoint that cannot be written (the step itself is then done and kept in memory).
    pub fn step(&mut self) -> Result<StepReport> {
        self.ready()?;
        let count = self.batches().count;
        while self.partial.done < count {
            self.micro_step()?;
        }
        let report = self.update()?;
        self.after_due = true;
        self.finish_last_step()?;
        Ok(report)
    }

    /// Up to `n` steps, with a line of progress for each `logging_steps`; ends at the end of the run, or early by an
    /// interrupt between two micro-steps, with everything kept: the next call goes on with the micro-batch that comes.
    ///
    /// # Errors
    /// As [`Run::step`]; an interrupt that holds from before, as in a cell that calls this again after it.
    pub fn steps(&mut self, n: u64) -> Result<Steps> {
        let held = interrupt::begin();
        let last = self.total_steps.min(self.state.step.saturating_add(n));
        let first = self.state.step;
        if held {
            return Err(interrupt::taken("training was to go on".into()));
        }
        let mut reports = Vec::new();
        let mut interrupted = false;
        let mut progress = Progress::new(first, last, self.total_steps, self.record.train.logging_steps);
        if self.stopped.is_none() {
            self.finish_last_step()?;
        }
        'steps: while !self.after_due && self.state.step < last {
            self.ready()?;
            let count = self.batches().count;
            while self.partial.done < count {
                if take_interrupt() {
                    interrupted = true;
                    break 'steps;
                }
                self.accumulate()?;
            }
            let report = self.update()?;
            progress.step(&report);
            reports.push(report);
            self.after_due = true;
            self.finish_last_step()?;
        }
        interrupted |= self.after_due && take_interrupt();
        progress.finish(interrupted);
        Ok(Steps { reports, interrupted, step: self.state.step, total_steps: self.total_steps })
    }

    /// All steps that are left.
    ///
    /// # Errors
    /// As [`Run::step`].
    pub fn train(&mut self) -> Result<Steps> {
        self.steps(u64::MAX)
    }

    /// Mean loss over a data set, without dropout; logged with the run.
    ///
    /// # Errors
    /// An example longer than the plan's capacity; an interrupt.
    pub fn evaluate(&mut self, data: &Dataset) -> Result<EvalReport> {
        self.evaluate_unless_interrupted(data)?.ok_or_else(|| interrupt::taken("evaluating".into()))
    }

    /// `None`: there was an interrupt, and still is.
    fn evaluate_unless_interrupted(&mut self, data: &Dataset) -> Result<Option<EvalReport>> {
        check_lengths(self.engine.plan(), data, 1)?;
        let start = Instant::now();
        let (mut loss, mut tokens) = (LossSum::default(), 0);
        for indices in pieces(data, self.engine.plan().config().capacity()) {
            if interrupted() {
                return Ok(None);
            }
            let batch = Batch::new(data, &indices);
            tokens += batch.tokens() as u64;
            let part = self.engine.evaluate(batch).inspect_err(|e| self.stop(e))?;
            loss.sum += part.sum;
            loss.tokens += part.tokens;
        }
        let report = EvalReport {
            step: self.state.step,
            loss: loss.mean(),
            examples: data.len() as u64,
            tokens,
            trained_tokens: loss.tokens,
            seconds: start.elapsed().as_secs_f64(),
        };
        self.log.append_evaluation(&report)?;
        Ok(Some(report))
    }

    /// Writes a checkpoint of the last whole step now; micro-steps accumulated since are replayed by a resume.
    ///
    /// # Errors
    /// A full disk or an unwritable directory: older checkpoints stay whole.
    pub fn checkpoint(&mut self) -> Result<CheckpointDir> {
        if let Some(why) = &self.stopped {
            return Err(Error::new("a run that failed is not saved")
                .found(why.clone())
                .next("resume it from its last checkpoint"));
        }
        let engine = &self.engine;
        let optimizer = engine.optimizer_state();
        let mut slices = Vec::with_capacity(optimizer.len());
        for t in &optimizer {
            slices.push(TensorSlice {
                name: t.name.clone(),
                dtype: file_dtype(t)?,
                shape: t.shape.clone(),
                data: engine.state_bytes(t)?,
            });
        }
        let adapter = self.adapter_config();
        let mut write = |dir: &Path| write_parameters(engine, adapter.clone(), dir);
        let limit = self.record.train.save_total_limit;
        let out = write_checkpoint(&self.dir, &self.state, &slices, limit, &mut write)?;
        self.saved = Some(self.state.step);
        Ok(out)
    }

    /// The adapter as it is now.
    ///
    /// # Errors
    /// Full fine-tuning has none.
    pub fn adapter(&self) -> Result<Adapter> {
        let config = self.adapter_config().ok_or_else(no_adapter)?;
        Ok(Adapter { config, tensors: self.engine.adapter_pairs()?.into_iter().collect(), biases: BTreeMap::new() })
    }

    /// Saves the adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// Full fine-tuning has no adapter; a directory that cannot be written.
    pub fn save_adapter(&self, dir: impl AsRef<Path>) -> Result<PathBuf> {
        let dir = dir.as_ref();
        crate::files::create_dir_all(dir)?;
        self.adapter()?.save(dir)?;
        Ok(dir.to_owned())
    }

    /// Every report of the run so far, those before a resume included.
    ///
    /// # Errors
    /// A damaged file.
    pub fn history(&self) -> Result<Metrics> {
        Metrics::read(self.dir.path())
    }

    /// Every step of the run so far as a polars DataFrame, one row for each step.
    ///
    /// # Errors
    /// A damaged file.
    #[cfg(feature = "polars")]
    pub fn metrics(&self) -> Result<polars::prelude::DataFrame> {
        metrics_frame(&self.history()?.steps)
    }

    /// The engine: a [`Decoder`](crate::generate::Decoder), to generate with what has been learnt so far.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// The plan.
    pub fn plan(&self) -> &MemoryPlan {
        self.engine.plan()
    }

    /// The configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.record.train
    }

    /// The data set.
    pub fn dataset(&self) -> &Dataset {
        &self.data
    }

    /// The run's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Steps done.
    pub fn step_count(&self) -> u64 {
        self.state.step
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Whether all steps are done.
    pub fn is_finished(&self) -> bool {
        self.state.step >= self.total_steps
    }

    /// Where the run stands.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The next micro-batch, without running it: to be looked at.
    ///
    /// # Errors
    /// The run is over.
    pub fn next_batch(&mut self) -> Result<Batch> {
        self.ready()?;
        let batches = self.batches();
        Ok(self.batch(batches.epoch, batches.first + self.partial.done.min(batches.count - 1)))
    }

    fn ready(&self) -> Result<()> {
        if let Some(why) = &self.stopped {
            return Err(Error::new("the run stopped and cannot go on as it is")
                .at_path(self.dir.path())
                .found(why.clone())
                .next(format!("Run::resume({:?}) goes on from step {}", self.dir.path(), self.saved.unwrap_or(0))));
        }
        if self.is_finished() {
            return Err(Error::new("the run is over")
                .at_path(self.dir.path())
                .found(format!("{} of {} steps done", self.state.step, self.total_steps))
                .next("create a new run for more steps; it can start from this one's adapter"));
        }
        self.dir.check()
    }

    fn batches(&self) -> StepBatches {
        self.record.train.step_batches(self.state.step, self.data.len())
    }

    /// Micro-batch `n` of an epoch.
    fn batch(&mut self, epoch: u64, n: u64) -> Batch {
        let config = &self.record.train;
        let size = config.per_device_train_batch_size;
        if self.order.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let order = if config.shuffle || config.group_by_length {
                epoch_order(&self.data, config.seed, epoch, size, config.group_by_length)
            } else {
                (0..self.data.len()).collect()
            };
            self.order = Some((epoch, order));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        let from = (n as usize * size).min(order.len());
        Batch::new(&self.data, &order[from..(from + size).min(order.len())])
    }

    /// Labels in all micro-batches of the step.
    fn num_items(&mut self, b: StepBatches) -> usize {
        (b.first..b.first + b.count).map(|n| self.batch(b.epoch, n).num_items()).sum()
    }

    /// Clips and updates; the step's report, logged.
    fn update(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let (step, config) = (self.state.step, self.record.train.clone());
        let learning_rate = lr_at(&config, step, self.total_steps);
        let hyper = AdamWHyper {
            lr: learning_rate as f32,
            beta1: config.adam_beta1 as f32,
            beta2: config.adam_beta2 as f32,
            eps: config.adam_epsilon as f32,
            weight_decay: config.weight_decay as f32,
            step: (step + 1) as u32,
            grad_scale: 1.0,
        };
        let norm = match self.engine.optimizer_step(hyper, config.max_grad_norm) {
            Ok(norm) => norm,
            Err(e) => {
                self.stop(&e);
                return Err(e.at(format!("step {}", step + 1)));
            }
        };
        self.engine.take_seconds();
        let optimizer_seconds = start.elapsed().as_secs_f64();
        let p = std::mem::take(&mut self.partial);
        let batches = self.batches();
        let s = &mut self.state;
        s.step += 1;
        s.examples += p.examples;
        s.total_tokens += p.tokens;
        s.trained_tokens += p.loss.tokens;
        s.rng.micro_steps += batches.count;
        let next = config.step_batches(s.step, self.data.len());
        (s.epoch, s.next_batch) = (next.epoch, next.first);
        let seconds = p.seconds + optimizer_seconds;
        self.unlogged.push(StepReport {
            step: s.step,
            epoch: config.epochs_done(s.step, self.data.len()),
            loss: p.loss.mean(),
            grad_norm: norm.norm,
            learning_rate,
            tokens: p.tokens,
            trained_tokens: p.loss.tokens,
            tokens_per_second: p.tokens as f64 / seconds,
            seconds,
            data_seconds: p.data_seconds,
            forward_seconds: p.forward_seconds,
            backward_seconds: p.backward_seconds,
            optimizer_seconds,
            arena_bytes: self.engine.plan().arena_bytes(),
            clipped: norm.clip < 1.0,
            resumed: false,
        });
        self.flush_log()
    }

    /// Appends what is not in the log yet; the newest report. A full disk leaves it for the next call.
    fn flush_log(&mut self) -> Result<StepReport> {
        loop {
            let report = self.unlogged[0].clone();
            let written = self.log.append(report)?;
            self.unlogged.remove(0);
            if self.unlogged.is_empty() {
                return Ok(written);
            }
        }
    }

    /// Evaluates and saves after a step, when the configuration says so. What an interrupt prevents is done before the next
    /// step: with the same adapter, so with the same result.
    fn finish_last_step(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.after_due) {
            return Ok(());
        }
        let (step, config) = (self.state.step, &self.record.train);
        let save = config.save_steps > 0 && step % config.save_steps == 0;
        let evaluate = config.eval_steps.is_some_and(|n| n > 0 && step % n == 0);
        // First, so that a run killed in between evaluates again.
        if evaluate
            && let Some(eval) = self.eval.clone()
            && self.evaluate_unless_interrupted(&eval)?.is_none()
        {
            self.after_due = true;
            return Ok(());
        }
        if save || self.is_finished() {
            self.checkpoint()?;
        }
        Ok(())
    }

    fn adapter_config(&self) -> Option<AdapterConfig> {
        let base = self.record.base.dir.display().to_string();
        self.plan().config().lora.clone().map(|lora| AdapterConfig::new(lora, Some(base)))
    }

    fn stop(&mut self, e: &Error) {
        // A batch that the engine refused changed nothing.
        if self.engine.has_failed() {
            self.stopped = Some(e.what().to_owned());
        }
    }

    /// Saves the batch whose loss is not finite, stops the run, and says so.
    fn not_finite(&mut self, what: &str, value: f64, examples: &[usize]) -> Error {
        let step = self.state.step + 1;
        self.stopped = Some(format!("the {what} of step {step} was {value}"));
        let path = self.dir.path().join(format!("not-finite-step-{step}.json"));
        let rows: Vec<Value> = examples
            .iter()
            .map(|&i| {
                let e = self.data.get(i);
                serde_json::json!({ "example": i, "input_ids": e.input_ids, "labels": e.labels })
            })
            .collect();
        let saved = serde_json::json!({ "step": step, "what": what, "value": value.to_string(), "batch": rows });
        let written = crate::files::write_atomic_bytes(&path, saved.to_string().as_bytes());
        let place = match written {
            Ok(()) => format!("step {step}, examples {examples:?}, saved in {}", path.display()),
            Err(e) => format!("step {step}, examples {examples:?} (not saved: {})", e.what()),
        };
        Error::new(format!("the {what} is not finite"))
            .at(place)
            .expected("a finite number")
            .found(value.to_string())
            .next("look at these examples; lower the learning rate or max_grad_norm; then Run::resume")
    }
}

/// An engine with its base loaded and a fresh adapter.
fn engine(plan: &MemoryPlan, base: Option<&Base>, seed: u64) -> Result<Engine> {
    let mut engine = Engine::new(plan)?;
    match base {
        Some(base) => engine.load(base)?,
        None => engine.init_weights(seed)?,
    }
    if plan.config().lora.is_some() {
        engine.init_adapter(seed)?;
    }
    Ok(engine)
}

/// Plan, data and configuration against each other; the total number of steps.
fn check(plan: &MemoryPlan, data: &Dataset, config: &TrainConfig) -> Result<u64> {
    let wrong = |field: &str, expected: String, found: String, next: &str| {
        Err(Error::new("the plan and the configuration do not fit together")
            .at(field)
            .expected(expected)
            .found(found)
            .next(next))
    };
    let p = plan.config();
    if plan.trainable_params() == 0 {
        let next = "plan with MemoryPlan::qlora, ::lora or ::full";
        return wrong("method", "something to train".into(), p.method.label().into(), next);
    }
    if config.optim != p.optim {
        let (a, b) = (p.optim.name().to_owned(), config.optim.name().to_owned());
        return wrong("optim", a, b, "give both the same optimizer: its state is part of the plan");
    }
    check_lengths(plan, data, config.per_device_train_batch_size)?;
    config.validate_for(data.len())
}

/// Whether any micro-batch of `batch` examples can exceed the plan.
fn check_lengths(plan: &MemoryPlan, data: &Dataset, batch: usize) -> Result<()> {
    let (capacity, spec) = (plan.config().capacity(), plan.spec());
    let mut lengths = data.lengths();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let most: usize = lengths.iter().take(batch.max(1)).sum();
    if most > capacity {
        return Err(Error::new("the data set does not fit into the plan")
            .at("data set")
            .expected(format!("at most {capacity} tokens in a micro-batch of {batch}"))
            .found(format!("{most} tokens in the {} longest examples", batch.min(lengths.len())))
            .next("plan with a larger .batch() or .seq(), lower per_device_train_batch_size, or encode with a smaller max_length"));
    }
    if lengths.first().is_some_and(|&l| l > spec.max_position_embeddings) {
        return Err(Error::new("an example is longer than the model's context")
            .at("data set")
            .expected(format!("at most {} tokens", spec.max_position_embeddings))
            .found(format!("{} tokens", lengths[0]))
            .next("encode with a smaller max_length"));
    }
    if data.max_token_id() as usize >= spec.vocab_size {
        return Err(Error::new("the data set has token ids outside the model's vocabulary")
            .at("data set")
            .expected(format!("ids below {}", spec.vocab_size))
            .found(data.max_token_id().to_string())
            .next("encode it with the tokenizer of this model"));
    }
    Ok(())
}

/// Consecutive examples, as many as the capacity holds.
fn pieces(data: &Dataset, capacity: usize) -> Vec<Vec<usize>> {
    let mut out: Vec<Vec<usize>> = Vec::new();
    let mut tokens = usize::MAX;
    for (i, length) in data.lengths().into_iter().enumerate() {
        match out.last_mut() {
            Some(piece) if tokens + length <= capacity => {
                piece.push(i);
                tokens += length;
            }
            _ => {
                out.push(vec![i]);
                tokens = length;
            }
        }
    }
    out
}

/// The base of a run, unchanged since the run was made.
fn reopen_base(record: &RunRecord) -> Result<Option<Base>> {
    if record.base.fingerprint == FROM_SCRATCH {
        return Ok(None);
    }
    record.base.check()?;
    Base::from_dir(&record.base.dir).map(Some)
}

/// Parameters and optimizer state of a checkpoint into the engine; where the run stood.
fn restore(engine: &mut Engine, checkpoint: &CheckpointDir) -> Result<TrainState> {
    if engine.plan().config().lora.is_some() {
        engine.load_adapter(&Adapter::load(checkpoint.path())?)?;
    } else {
        let file = TensorFile::open(checkpoint.path().join(WEIGHTS_FILE))?;
        for t in engine.parameters() {
            let bytes = file.read(&t.name, file_dtype(&t)?, &t.shape)?;
            engine.set_state_bytes(&t, &bytes)?;
        }
    }
    let file = checkpoint.optimizer()?;
    for t in engine.optimizer_state() {
        let bytes = file.read(&t.name, file_dtype(&t)?, &t.shape)?;
        engine.set_state_bytes(&t, &bytes)?;
    }
    checkpoint.state()
}

/// The trained parameters as files: an adapter as PEFT writes it, or all weights.
fn write_parameters(engine: &Engine, adapter: Option<AdapterConfig>, dir: &Path) -> Result<()> {
    if let Some(config) = adapter {
        let tensors = engine.adapter_pairs()?.into_iter().collect();
        return Adapter { config, tensors, biases: BTreeMap::new() }.save(dir);
    }
    let parameters = engine.parameters();
    let headers = parameters.iter().map(|t| TensorHeader::new(t.name.clone(), t.dtype, t.shape.clone())).collect();
    let mut out = SafetensorsWriter::create(dir.join(WEIGHTS_FILE), headers, &pt_metadata())?;
    for t in &parameters {
        out.write(&t.name, &engine.state_bytes(t)?)?;
    }
    out.finish()
}

fn file_dtype(t: &StateTensor) -> Result<Dtype> {
    use candle_core::DType;
    match t.dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::BF16 => Ok(Dtype::BF16),
        DType::U8 => Ok(Dtype::U8),
        other => {
            Err(Error::new("a state tensor has a dtype that is not saved").at(t.name.clone()).found(other.as_str()))
        }
    }
}

fn to_value(what: &str, value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| Error::new(format!("{what} cannot be written as JSON")).caused_by(e))
}

fn no_adapter() -> Error {
    Error::new("full fine-tuning has no adapter").next("the trained weights are in the run's checkpoints")
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Run({}, step {} of {}, {} examples, {})",
            self.dir.path().display(),
            self.state.step,
            self.total_steps,
            self.data.len(),
            self.plan().config().method.label()
        )
    }
}
