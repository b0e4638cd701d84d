//! Weights from files into the arena, one tensor at a time.

use std::time::{Duration, Instant};

use candle_core::DType;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Engine;
use super::backend::WeightSource;
use super::ops::{Lora, TensorId, Weight};
use crate::display;
use crate::interrupt;
use crate::lora::{Adapter, LoraPair};
use crate::model::Base;
use crate::{Error, Result};

/// A load that takes longer than this tells how far it is.
const BETWEEN_LINES: Duration = Duration::from_secs(2);

impl Engine {
    /// Loads the base weights, quantizing those that the plan holds in 4 bits; a load that takes seconds prints how far it
    /// is.
    ///
    /// A base that is stored in 4 bits with the plan's block sizes is copied code by code; with others it is
    /// dequantized first.
    ///
    /// # Errors
    /// A base of another shape than the plan's, files that are damaged, an interrupt: load again before anything else.
    pub fn load(&mut self, base: &Base) -> Result<()> {
        self.check_base(base)?;
        let slots = self.plan.layout().weights.clone();
        let mut told = Instant::now();
        self.half_loaded = true;
        for (i, slot) in slots.iter().enumerate() {
            if told.elapsed() >= BETWEEN_LINES {
                told = Instant::now();
                display::line(&format!("loading {}: {i} of {} tensors", base.spec().name, slots.len()));
            }
            interrupt::check(|| format!("loading tensor {i} of {}", slots.len())).map_err(|e| e.at_path(base.dir()))?;
            let stored = match slot.name.strip_suffix(".weight") {
                Some(module) if slot.shape.len() == 2 => base.nf4(module)?,
                _ => None,
            };
            let mut source = match stored {
                Some(q) => WeightSource::Quantized(q),
                None => WeightSource::File { checkpoint: base.checkpoint(), name: &slot.name },
            };
            self.ops.load(slot, &mut source).map_err(|e| e.at(slot.name.clone()))?;
        }
        self.dequantize_held()?;
        self.half_loaded = false;
        self.cached = None;
        Ok(())
    }

    /// Decodes the weights that the plan holds dequantized, and waits for the device.
    fn dequantize_held(&mut self) -> Result<()> {
        let plan = self.plan.clone();
        for op in &plan.layout().dequantize {
            self.ops.dequantize(op)?;
        }
        self.ops.wait()
    }

    fn check_base(&self, base: &Base) -> Result<()> {
        let (a, b) = (self.plan.spec(), base.spec());
        let next = "plan with the spec of this base: MemoryPlan::qlora(base.spec())";
        if a.tensors() != b.tensors() {
            return Err(Error::new("the base has another shape than the plan's model")
                .at_path(base.dir())
                .expected(format!("{} ({} parameters)", a.name, a.total_params()))
                .found(format!("{} ({} parameters)", b.name, b.total_params()))
                .next(next));
        }
        // What changes the arithmetic and not the shapes.
        let fields = |s: &crate::model::ModelSpec| {
            [
                ("num_attention_heads", format!("{} of {}", s.num_attention_heads, s.head_dim)),
                ("rms_norm_eps", s.rms_norm_eps.to_string()),
                ("rope_theta", s.rope_theta.to_string()),
                ("rope_scaling", format!("{:?}", s.rope_scaling)),
                ("sliding_window", format!("{:?} but in layers {:?}", s.sliding_window, s.full_attention_layers)),
                ("model_type", s.family.model_type().to_string()),
                ("hidden_act", format!("{:?}", s.activation)),
                ("query_pre_attn_scalar", format!("{:?}", s.query_pre_attn_scalar)),
                ("attn_logit_softcapping", format!("{:?}", s.attn_logit_softcapping)),
                ("final_logit_softcapping", format!("{:?}", s.final_logit_softcapping)),
            ]
        };
        let differs = fields(a).into_iter().zip(fields(b)).find(|(a, b)| a != b);
        if let Some(((field, expected), (_, found))) = differs {
            return Err(Error::new("the base computes in another way than the plan's model")
                .at(field)
                .at_path(base.dir())
                .expected(expected)
                .found(found)
                .next(next));
        }
        base.validate()
    }

    /// Draws random base weights, normal with standard deviation 0.02, norms that multiply by one and biases of zero: a model from scratch, or of a
    /// shape whose files are not at hand. 4-bit weights are drawn in bf16 and quantized. A GPU draws by itself, other values
    /// than the CPU's.
    ///
    /// # Errors
    /// What the device reports.
    pub fn init_weights(&mut self, seed: u64) -> Result<()> {
        let slots = self.plan.layout().weights.clone();
        let norm = 1.0 - self.plan.spec().norm_offset();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        self.half_loaded = true;
        for (i, slot) in slots.iter().enumerate() {
            let normal = rand_distr_normal(0.02);
            let constant = if slot.name.ends_with(".bias") { 0.0 } else { norm };
            let mut draw = |out: &mut [f32]| match slot.shape.len() {
                1 => out.fill(constant),
                _ => out.iter_mut().for_each(|x| *x = normal(&mut rng)),
            };
            interrupt::check(|| format!("drawing tensor {i} of {}", slots.len()))?;
            let seed = seed.wrapping_mul(1_000_003).wrapping_add(i as u64);
            self.ops.load(slot, &mut WeightSource::Drawn { shape: &slot.shape, constant, draw: &mut draw, seed })?;
        }
        self.dequantize_held()?;
        self.half_loaded = false;
        self.cached = None;
        Ok(())
    }

    /// Draws the adapter: A uniform in ±1/sqrt(in_features) (PEFT's kaiming_uniform with a = sqrt 5), B zero, DoRA's
    /// magnitudes the lengths of the base's rows (load the base first), so that the first forward pass gives what the base
    /// gives.
    ///
    /// # Errors
    /// A plan without an adapter.
    pub fn init_adapter(&mut self, seed: u64) -> Result<()> {
        let Some(lora) = &self.plan.config().lora else {
            return Err(Error::new("the plan has no adapter").at("lora").next("plan with MemoryPlan::lora or ::qlora"));
        };
        let mut adapter = Adapter::init(self.plan.spec(), lora, seed)?;
        if lora.use_dora {
            for (name, lengths) in self.row_lengths()? {
                adapter.tensors.entry(name).and_modify(|pair| pair.magnitude = Some(lengths));
            }
        }
        self.load_adapter(&adapter)
    }

    /// The lengths of the rows of every adapted base weight.
    fn row_lengths(&mut self) -> Result<Vec<(String, Vec<f32>)>> {
        let plan = self.plan.clone();
        let mut out = Vec::new();
        for linear in plan.layout().layers.iter().flat_map(|l| l.linears.iter().flatten()) {
            let Some(lora) = linear.lora else { continue };
            let name = plan.layout().adapters.iter().find(|(_, l)| l.a == lora.a).map(|(name, _)| name.clone());
            out.extend(name.map(|name| Ok::<_, Error>((name, self.ops.row_lengths(linear)?))).transpose()?);
        }
        Ok(out)
    }

    /// The adapter as it is now.
    ///
    /// # Errors
    /// What the device reports.
    pub fn adapter_pairs(&self) -> Result<Vec<(String, LoraPair)>> {
        let layout = self.plan.layout();
        let pair = |lora: &Lora| -> Result<LoraPair> {
            let shape = |id: TensorId| self.plan.regions()[id.index()].shape.clone();
            Ok(LoraPair {
                a: self.read(lora.a)?,
                b: self.read(lora.b)?,
                r: lora.r,
                in_features: shape(lora.a)[1],
                out_features: shape(lora.b)[0],
                scaling: f64::from(lora.scaling),
                magnitude: lora.magnitude.map(|m| self.read(m.m)).transpose()?,
            })
        };
        layout.adapters.iter().map(|(name, lora)| Ok((name.clone(), pair(lora)?))).collect()
    }

    /// Takes an adapter's matrices.
    ///
    /// # Errors
    /// Modules, ranks or a scaling other than the plan's, and trained biases.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        let adapters = self.plan.layout().adapters.clone();
        if let Some(module) = adapter.biases.keys().next() {
            return Err(Error::new("an adapter with biases of its own cannot be loaded beside its base")
                .at(format!("{module}.bias"))
                .expected("an adapter that was trained with bias = \"none\"")
                .next("merge it, and use the merged model: lora::merge"));
        }
        if let Some(extra) = adapter.tensors.keys().find(|name| !adapters.contains_key(*name)) {
            return Err(Error::new("the adapter has a module that the plan does not adapt")
                .at(extra.clone())
                .next("plan with the adapter's own configuration: .adapter(LoraConfig of the adapter)"));
        }
        for (name, lora) in &adapters {
            let Some(pair) = adapter.tensors.get(name) else {
                return Err(Error::new("the adapter lacks a module that the plan adapts").at(name.clone()));
            };
            self.check_pair(lora, pair).map_err(|e| e.at(name.clone()))?;
        }
        // Only now, so that half an adapter is never taken.
        for (lora, pair) in adapters.values().zip(adapter.tensors.values()) {
            self.ops.write(lora.a, bytemuck::cast_slice(&pair.a))?;
            self.ops.write(lora.b, bytemuck::cast_slice(&pair.b))?;
            if let (Some(to), Some(m)) = (lora.magnitude, &pair.magnitude) {
                self.ops.write(to.m, bytemuck::cast_slice(m))?;
            }
        }
        self.cached = None;
        Ok(())
    }

    /// Takes an adapter for generation and evaluation: the next call computes with it. Several adapters share one base this
    /// way: plan with [`LoraConfig::covering`](crate::lora::LoraConfig::covering) them all, keep the [`Adapter`]s, and name
    /// one before each call; [`Engine::enable_adapter`] switches between the last one and the base alone.
    ///
    /// A rank below the plan's is filled up with zeros, a planned module that the adapter leaves alone gets zeros.
    ///
    /// # Errors
    /// A plan that trains (there [`Engine::load_adapter`] is meant), modules or ranks beyond the plan's, DoRA beside an
    /// adapter without it, trained biases. Nothing is taken then.
    pub fn use_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        if !self.plan.layout().trainables.is_empty() {
            return Err(Error::new("a plan that trains holds one adapter")
                .at("method")
                .expected("MemoryPlan::inference with .adapter(LoraConfig::covering(..))")
                .found(self.plan.config().method.label())
                .next("load_adapter replaces the adapter that is trained"));
        }
        let adapters = self.plan.layout().adapters.clone();
        let mut lengths: std::collections::BTreeMap<String, Vec<f32>> = Default::default();
        let lacks_one = |lora: &Lora, name: &str| lora.magnitude.is_some() && !adapter.tensors.contains_key(name);
        if adapters.iter().any(|(name, lora)| lacks_one(lora, name)) {
            lengths.extend(self.row_lengths()?);
        }
        let mut padded =
            Adapter { config: adapter.config.clone(), tensors: Default::default(), biases: adapter.biases.clone() };
        for (name, lora) in &adapters {
            let shape = |id: TensorId| self.plan.regions()[id.index()].shape.clone();
            let (in_features, out_features) = (shape(lora.a)[1], shape(lora.b)[0]);
            let pair = match adapter.tensors.get(name) {
                Some(pair) => pair.padded(lora.r, f64::from(lora.scaling)).map_err(|e| e.at(name.clone()))?,
                None => LoraPair {
                    a: vec![0.0; lora.r * in_features],
                    b: vec![0.0; out_features * lora.r],
                    r: lora.r,
                    in_features,
                    out_features,
                    scaling: f64::from(lora.scaling),
                    magnitude: lora.magnitude.and(lengths.remove(name)),
                },
            };
            padded.tensors.insert(name.clone(), pair);
        }
        if let Some(extra) = adapter.tensors.keys().find(|name| !adapters.contains_key(*name)) {
            return Err(Error::new("the adapter has a module that the plan does not adapt")
                .at(extra.clone())
                .next("plan with .adapter(LoraConfig::covering(&[..])) of all adapters"));
        }
        self.load_adapter(&padded)
    }

    fn check_pair(&self, lora: &Lora, pair: &LoraPair) -> Result<()> {
        let numel = |id: TensorId| self.plan.regions()[id.index()].numel();
        let (a, b) = (numel(lora.a), numel(lora.b));
        if pair.r != lora.r || pair.a.len() != a || pair.b.len() != b {
            return Err(Error::new("the adapter's matrices have other shapes than the plan's")
                .expected(format!("r = {}, {a} and {b} elements", lora.r))
                .found(format!("r = {}, {} and {} elements", pair.r, pair.a.len(), pair.b.len()))
                .next("plan with the adapter's own r; if it differs between modules, merge first: lora::merge"));
        }
        let lengths = |found: Option<usize>| found.map_or("none".to_string(), |n| format!("{n} magnitudes"));
        let (expected, found) = (lora.magnitude.map(|m| numel(m.m)), pair.magnitude.as_ref().map(Vec::len));
        if expected != found {
            return Err(Error::new("the adapter's magnitudes (DoRA) are not the plan's")
                .expected(lengths(expected))
                .found(lengths(found))
                .next("plan with the adapter's own use_dora"));
        }
        let scaling = f64::from(lora.scaling);
        if (pair.scaling - scaling).abs() > 1e-6 * scaling.abs() {
            return Err(Error::new("the adapter is scaled in another way than the plan's")
                .expected(scaling.to_string())
                .found(pair.scaling.to_string())
                .next(
                    "plan with the adapter's own lora_alpha; if it differs between modules, merge first: lora::merge",
                ));
        }
        Ok(())
    }

    /// A dense weight as it is now, e.g. after full fine-tuning: f32, row-major.
    ///
    /// # Errors
    /// A name that the model does not have, a 4-bit weight.
    pub fn weight(&self, name: &str) -> Result<Vec<f32>> {
        let slot = self.plan.layout().weights.iter().find(|s| s.name == name);
        let slot = slot.ok_or_else(|| Error::new("the model has no such weight").at(name.to_string()))?;
        match slot.weight {
            Weight::Dense { w } => self.read_f32(slot.master.unwrap_or(w)),
            Weight::Nf4 { .. } => Err(Error::new("the weight is held in 4 bits")
                .at(name.to_string())
                .expected(DType::F32.as_str())
                .next("read it from the base, or plan a dense base")),
        }
    }
}

/// A normal distribution by the polar method, with nothing kept between calls but the generator.
fn rand_distr_normal(std: f32) -> impl Fn(&mut ChaCha8Rng) -> f32 {
    move |rng| loop {
        let (x, y): (f32, f32) = (rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0));
        let s = x * x + y * y;
        if s > 0.0 && s < 1.0 {
            return x * (-2.0 * s.ln() / s).sqrt() * std;
        }
    }
}
