//! A plan against a card: does it fit, what would make it fit, and which plan uses the card best.

use super::config::kept_modules;
use super::{Checkpointing, DeviceKind, Gpu, MemoryPlan, PlanBuilder, PlanConfig};
use crate::model::ModelSpec;
use crate::train::Optim;
use crate::{Error, Result};

/// A plan on a card.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone)]
pub struct Fit {
    /// The card.
    pub gpu: Gpu,
    /// Bytes of the plan's arena.
    pub arena_bytes: u64,
    /// Bytes that the whole process needs: the arena and what the card's runtime holds beside it.
    pub needed_bytes: u64,
    /// Changes that make it fit, the cheapest first, at most three; empty when it fits.
    pub changes: Vec<Change>,
    /// The smallest that this model and method can be made, with every change at once and one sequence, when that does not
    /// fit either: bytes of the whole process.
    pub smallest_bytes: Option<u64>,
}

/// One way to need less.
#[derive(Clone, Debug)]
pub struct Change {
    /// What to change, in the words of the plan's builder.
    pub what: String,
    /// What it costs.
    pub cost: String,
    /// Bytes of the whole process with it.
    pub needed_bytes: u64,
    /// The configuration with it: [`MemoryPlan::new`] builds the plan.
    pub config: PlanConfig,
}

/// A plan on every known card.
#[derive(Clone)]
pub struct FitTable {
    /// What was planned, e.g. `QLoRA of mistral-7b-v0.1`.
    pub plan: String,
    /// One for each card, by memory; without suggestions.
    pub fits: Vec<Fit>,
}

/// A plan chosen for a card, and why.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone)]
pub struct Fitted {
    /// The plan.
    pub plan: MemoryPlan,
    /// The card.
    pub gpu: Gpu,
    /// What was chosen and why, one sentence for each choice.
    pub reasons: Vec<String>,
}

impl Fit {
    /// Whether it fits.
    pub fn fits(&self) -> bool {
        self.needed_bytes <= self.gpu.total_bytes
    }

    /// Bytes that are left on the card; negative when they are missing.
    pub fn margin_bytes(&self) -> i64 {
        self.gpu.total_bytes as i64 - self.needed_bytes as i64
    }
}

impl MemoryPlan {
    /// Whether the plan fits on a card, with the margin and, when it does not fit, the three cheapest changes.
    ///
    /// # Errors
    /// None for a plan that was built; it returns what building a changed plan returns.
    pub fn fits(&self, gpu: Gpu) -> Result<Fit> {
        let mut fit = self.on(gpu);
        if !fit.fits() {
            fit.changes = self.changes(&fit.gpu)?;
            if fit.changes.is_empty() {
                let smallest = smallest(self.spec(), self.config());
                fit.smallest_bytes = Some(self.with(smallest)?.process_bytes(&fit.gpu));
            }
        }
        Ok(fit)
    }

    /// The plan on every known card, by memory; without suggestions.
    pub fn on_known_gpus(&self) -> FitTable {
        let plan = format!("{} of {}", self.config().method.label(), self.spec().name);
        FitTable { plan, fits: Gpu::presets().into_iter().map(|gpu| self.on(gpu)).collect() }
    }

    fn on(&self, gpu: Gpu) -> Fit {
        let needed_bytes = self.process_bytes(&gpu);
        Fit { gpu, arena_bytes: self.arena_bytes(), needed_bytes, changes: Vec::new(), smallest_bytes: None }
    }

    fn with(&self, config: PlanConfig) -> Result<MemoryPlan> {
        MemoryPlan::new(self.spec(), config)
    }

    /// The changes that fit, cheapest first: each alone, or all in order until they fit together.
    fn changes(&self, gpu: &Gpu) -> Result<Vec<Change>> {
        let (mut alone, mut together) = (Vec::new(), None);
        let mut all = self.config().clone();
        let mut said: Vec<String> = Vec::new();
        for (what, cost, apply) in candidates(self, gpu) {
            let mut config = self.config().clone();
            apply(&mut config);
            if config == *self.config() {
                continue;
            }
            let needed_bytes = self.with(config.clone())?.process_bytes(gpu);
            if needed_bytes <= gpu.total_bytes {
                alone.push(Change { what: what.clone(), cost, needed_bytes, config });
            }
            if together.is_none() {
                apply(&mut all);
                said.push(what);
                let needed_bytes = self.with(all.clone())?.process_bytes(gpu);
                if needed_bytes <= gpu.total_bytes && said.len() > 1 {
                    let cost = "the costs of each".into();
                    together = Some(Change { what: said.join(" and "), cost, needed_bytes, config: all.clone() });
                }
            }
        }
        if alone.is_empty() {
            alone.extend(together);
        }
        alone.truncate(3);
        Ok(alone)
    }
}

type Candidate = (String, String, Box<dyn Fn(&mut PlanConfig)>);

/// Changes in the order of what they cost.
fn candidates(plan: &MemoryPlan, gpu: &Gpu) -> Vec<Candidate> {
    let (config, layers) = (plan.config(), plan.spec().num_hidden_layers);
    let mut out: Vec<Candidate> = Vec::new();
    let mut add = |what: &str, cost: &str, apply: Box<dyn Fn(&mut PlanConfig)>| {
        out.push((what.into(), cost.into(), apply));
    };
    if config.quantization.is_some() {
        let nested: fn(&mut PlanConfig) = |c| c.quantization.iter_mut().for_each(|q| q.double_quant = true);
        add(".double_quant(true)", "no measurable loss of quality", Box::new(nested));
    }
    add(".ce_chunk(256)", "nothing worth measuring", Box::new(|c| c.ce_chunk = c.ce_chunk.min(256)));
    let trains = plan.trainable_params() > 0;
    if config.dequantized_layers > 0 {
        let fewer: fn(&mut PlanConfig) = |c| c.dequantized_layers = 0;
        add(".dequantized_layers(0)", "4-bit weights are decoded in every pass", Box::new(fewer));
    }
    if trains {
        if config.optim == Optim::AdamW && !config.method.is_full() || config.optim == Optim::AdamW8bit {
            let page = |c: &mut PlanConfig| (c.optim, c.resident_state) = (Optim::PagedAdamW8bit, false);
            add(".optim(Optim::PagedAdamW8bit)", "8-bit moments, a transfer in each step", Box::new(page));
        } else if config.optim == Optim::AdamW {
            add(".optim(Optim::AdamW8bit)", "8-bit moments", Box::new(|c| c.optim = Optim::AdamW8bit));
        }
        let n = fewest_recomputed(plan, config, gpu);
        let recompute = move |c: &mut PlanConfig| {
            let more = n.max(c.checkpointing.recomputed(layers));
            c.checkpointing = if more == layers { Checkpointing::All } else { Checkpointing::Layers(more) };
        };
        let what = if n == layers { "Checkpointing::All".into() } else { format!("Checkpointing::Layers({n})") };
        let cost = format!(
            "{n} of {layers} layers computed twice: about {:.0} % more time",
            100.0 * n as f64 / layers as f64 / 3.0
        );
        add(&format!(".checkpointing({what})"), &cost, Box::new(recompute));
    }
    if config.device == DeviceKind::Cuda {
        if !plan.spec().tie_word_embeddings && !config.method.is_full() {
            add(
                ".host_embeddings(true)",
                "one row over the bus for each token",
                Box::new(|c| c.host_embeddings = true),
            );
        }
        if trains {
            let offload = |c: &mut PlanConfig| c.host_checkpoints = true;
            add(".host_checkpoints(true)", "transfers beside the computation", Box::new(offload));
        }
    }
    let mut batch = config.micro_batch_size / 2;
    while batch >= 1 {
        let times = config.micro_batch_size / batch;
        let cost = format!("{times} times the gradient_accumulation_steps for the same effective batch");
        add(&format!(".batch({batch})"), &cost, Box::new(move |c| c.micro_batch_size = batch));
        batch /= 2;
    }
    if config.method == super::Method::Lora {
        let quantize = |c: &mut PlanConfig| {
            (c.method, c.quantization) = (super::Method::Qlora, Some(crate::nf4::Nf4Config::default()));
        };
        add("MemoryPlan::qlora", "weights in 4 bits: some quality, 10-20 % more time", Box::new(quantize));
    }
    let half = config.max_seq_length / 2;
    if half >= 128 {
        let cost = "longer examples are cut";
        add(&format!(".seq({half})"), cost, Box::new(move |c| c.max_seq_length = half));
    }
    out
}

/// The fewest recomputed layers that fit, all when none do.
fn fewest_recomputed(plan: &MemoryPlan, config: &PlanConfig, gpu: &Gpu) -> usize {
    let layers = plan.spec().num_hidden_layers;
    let fits = |n: usize| {
        let config = PlanConfig { checkpointing: layers_recomputed(n, layers), ..config.clone() };
        plan.with(config).is_ok_and(|p| p.process_bytes(gpu) <= gpu.total_bytes)
    };
    // More recomputed layers never need more.
    first(layers, fits)
}

/// The first of `0..n` from which on `is` holds, `n` where it holds for none: by halves.
fn first(n: usize, is: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = (low + high) / 2;
        if is(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

fn layers_recomputed(n: usize, layers: usize) -> Checkpointing {
    match n {
        0 => Checkpointing::None,
        n if n == layers => Checkpointing::All,
        n => Checkpointing::Layers(n),
    }
}

/// One sequence, everything recomputed, paged and kept on the host that can be.
fn smallest(spec: &ModelSpec, config: &PlanConfig) -> PlanConfig {
    let mut c = config.clone();
    let gpu = c.device == DeviceKind::Cuda;
    c.host_embeddings = gpu && !spec.tie_word_embeddings && !c.method.is_full();
    c.host_checkpoints = gpu;
    (c.keep_dequantized, c.keep_dequantized_modules, c.dequantized_layers) = (false, None, 0);
    c.micro_batch_size = 1;
    c.checkpointing = Checkpointing::All;
    c.ce_chunk = c.ce_chunk.min(256);
    (c.optim, c.resident_state) = (Optim::PagedAdamW8bit, false);
    if let Some(q) = &mut c.quantization {
        q.double_quant = true;
    }
    c
}

impl PlanBuilder {
    /// The plan that uses a card best: the fewest recomputed layers, then the largest micro-batch up to the one asked for,
    /// then optimizer state on the card rather than on the host, then weights held dequantized, of as many layers as were
    /// [asked for](Self::dequantized_layers). Spare memory is spent on speed.
    ///
    /// # Errors
    /// Nothing fits: the error says how much the smallest plan needs.
    pub fn fit(self, gpu: Gpu) -> Result<Fitted> {
        let asked = self.clone().build()?;
        let (config, layers) = (asked.config().clone(), asked.spec().num_hidden_layers);
        let fits = |c: &PlanConfig| asked.with(c.clone()).is_ok_and(|p| p.process_bytes(&gpu) <= gpu.total_bytes);
        let mut best =
            PlanConfig { micro_batch_size: 1, resident_state: false, dequantized_layers: 0, ..config.clone() };
        let n = fewest_recomputed(&asked, &best, &gpu);
        best.checkpointing = layers_recomputed(n, layers);
        if !fits(&best) {
            let needed = asked.with(smallest(asked.spec(), &best))?.process_bytes(&gpu);
            return Err(Error::new("no plan for this model fits on this card")
                .at(gpu.name.clone())
                .expected(format!("at most {} bytes", gpu.total_bytes))
                .found(format!("{needed} bytes for one sequence with every layer recomputed"))
                .next("shorter sequences, a smaller r, a smaller model, or a 4-bit base"));
        }
        let mut reasons = vec![format!("{n} of {layers} layers are recomputed: fewer do not fit")];
        if n == 0 {
            reasons[0] = "no layer is recomputed: there is room for all activations".into();
        }
        let batch =
            (1..=config.micro_batch_size).rev().find(|&b| fits(&PlanConfig { micro_batch_size: b, ..best.clone() }));
        best.micro_batch_size = batch.unwrap_or(1);
        reasons.push(if best.micro_batch_size == config.micro_batch_size {
            format!("the micro-batch is {}, as asked", best.micro_batch_size)
        } else {
            let of = config.micro_batch_size;
            format!(
                "the micro-batch is {} of the {of} asked for: accumulate gradients for the rest",
                best.micro_batch_size
            )
        });
        if best.checkpointing != Checkpointing::None && best.quantization.is_some() && best.device == DeviceKind::Cuda {
            (best.keep_dequantized, best.keep_dequantized_modules) = (true, None);
            let mut modules = kept_modules(asked.spec());
            while !fits(&best) && !modules.is_empty() {
                // Without the largest.
                let largest = (0..modules.len()).rev().max_by_key(|&i| modules[i].1).unwrap_or(0);
                modules.remove(largest);
                best.keep_dequantized = !modules.is_empty();
                best.keep_dequantized_modules = Some(modules.iter().map(|(name, _)| name.clone()).collect());
            }
            if best.keep_dequantized {
                let which =
                    best.keep_dequantized_modules.as_ref().map_or(String::new(), |m| format!(" of {}", m.join(", ")));
                reasons.push(format!("a recomputed layer's weights{which} are decoded once, not twice: there is room"));
            } else {
                best.keep_dequantized_modules = None;
            }
        }
        if config.optim.is_paged() {
            best.resident_state = true;
            best.resident_state = fits(&best);
            let place = if best.resident_state { "stays on the card: there is room" } else { "stays on the host" };
            reasons.push(format!("optimizer state {place}"));
        }
        let held = config.dequantized_layers;
        if held > 0 {
            // More layers never need less.
            let one_more = |n: usize| fits(&PlanConfig { dequantized_layers: n + 1, ..best.clone() });
            best.dequantized_layers = first(held, |n| !one_more(n));
            reasons.push(match best.dequantized_layers {
                0 => "no layer's weights are held dequantized: there is no room".into(),
                n if n == held => format!("the weights of {n} layers are held dequantized, as asked"),
                n => format!("the weights of {n} of the {held} layers asked for are held dequantized"),
            });
        }
        Ok(Fitted { plan: asked.with(best)?, gpu, reasons })
    }
}
