//! Weights, adapter, gradients and optimizer state, and the sheet that all components are written on.

use super::{Component, Estimate, EstimateConfig, EstimateMethod, Moment, Part, too_large};
use crate::Result;
use crate::model::ModelSpec;
use crate::train::Optim;

/// bitsandbytes pages a state tensor from this many elements (`optimizer.py`, `get_state_buffer`).
const PAGED_FROM: u128 = 100_000;
/// bitsandbytes keeps smaller tensors' moments in f32 (`min_8bit_size`).
const MIN_8BIT: u128 = 4096;

/// The sizes that the formulae use. u128, so that no product of sizes overflows before [`Sheet::finish`] refuses it.
pub(super) struct Shape {
    pub cfg: EstimateConfig,
    pub l: u128,
    pub c: u128,
    pub f: u128,
    /// Norms of a layer.
    pub norms: u128,
    pub q: u128,
    pub kv: u128,
    pub v: u128,
    pub heads: u128,
    pub head_dim: u128,
    /// micro_batch_size x seq.
    pub t: u128,
    pub r: u128,
    /// Leaf name, in, out of the linear modules of one layer.
    pub linears: Vec<(String, u128, u128)>,
    /// Elements of embedding table, `lm_head` when separate, norms, biases, and the experts of a mixture.
    pub rest: u128,
    pub lm_head_tied: bool,
    pub total_params: u128,
}

impl Shape {
    pub fn new(spec: &ModelSpec, cfg: &EstimateConfig) -> Shape {
        let n = |x: usize| x as u128;
        let c = n(spec.hidden_size);
        let linears: Vec<_> = spec
            .linears()
            .into_iter()
            .filter(|m| m.layer == Some(0))
            .map(|m| (m.name.rsplit('.').next().unwrap_or_default().to_owned(), n(m.in_features), n(m.out_features)))
            .collect();
        let l = n(spec.num_hidden_layers);
        let linear: u128 = linears.iter().map(|(_, i, o)| i * o).sum();
        let rest = u128::from(spec.total_params()) - l * linear;
        Shape {
            cfg: cfg.clone(),
            l,
            c,
            // A token goes through some of a mixture's experts.
            f: n(spec.intermediate_size) * spec.experts.map_or(1, |e| n(e.num_experts_per_tok)),
            norms: n(spec.norms().len()),
            q: n(spec.num_attention_heads) * n(spec.head_dim),
            kv: n(spec.num_key_value_heads) * n(spec.head_dim),
            v: n(spec.vocab_size),
            heads: n(spec.num_attention_heads),
            head_dim: n(spec.head_dim),
            t: n(cfg.micro_batch_size) * n(cfg.seq),
            r: n(cfg.r),
            linears,
            rest,
            lm_head_tied: spec.tie_word_embeddings,
            total_params: rest + l * linear,
        }
    }

    /// Bytes per element of the residual stream: f32 after `prepare_model_for_kbit_training`, else bf16.
    pub fn residual(&self) -> u128 {
        if self.cfg.method == EstimateMethod::Qlora { 4 } else { 2 }
    }

    /// Elements of one layer's linear weights.
    pub fn layer_linear(&self) -> u128 {
        self.linears.iter().map(|(_, i, o)| i * o).sum()
    }

    /// Elements of the largest linear weight of a layer.
    pub fn largest_linear(&self) -> u128 {
        self.linears.iter().map(|(_, i, o)| i * o).max().unwrap_or(0)
    }

    /// Elements of each trained tensor, with how often it occurs.
    fn trained(&self) -> Vec<(u128, u128)> {
        if !self.cfg.method.has_adapter() {
            let mut out: Vec<_> = self.linears.iter().map(|(_, i, o)| (i * o, self.l)).collect();
            out.push((self.v * self.c, if self.lm_head_tied { 1 } else { 2 }));
            out.push((self.c, self.norms * self.l + 1));
            // Biases, norms of heads, a mixture's experts.
            let counted: u128 = out.iter().map(|(n, times)| n * times).sum();
            out.push((self.total_params - counted, 1));
            return out;
        }
        let adapted = self.linears.iter().filter(|(leaf, ..)| self.cfg.adapts(leaf));
        let mut out: Vec<_> = adapted.flat_map(|(_, i, o)| [(self.r * i, self.l), (self.r * o, self.l)]).collect();
        if self.cfg.adapts("lm_head") {
            out.extend([(self.r * self.c, 1), (self.r * self.v, 1)]);
        }
        out
    }

    /// Number of trained parameters.
    pub fn trainable(&self) -> u128 {
        self.trained().iter().map(|(n, times)| n * times).sum()
    }
}

/// When a component is live.
#[derive(Clone, Copy)]
pub(super) enum Live {
    /// At every moment.
    Always,
    /// Bytes at each moment: the backward pass of the loss, of the last layer, of layer 0.
    At([u128; 3]),
}

pub(super) struct Sheet {
    trains: bool,
    rows: Vec<(Component, [u128; 3], u128)>,
    paged: u128,
}

impl Sheet {
    pub fn new(trains: bool) -> Sheet {
        Sheet { trains, rows: Vec::new(), paged: 0 }
    }

    pub fn add(&mut self, part: Part, name: &str, bytes: u128, live: Live, formula: String) {
        if bytes == 0 {
            return;
        }
        let at = match live {
            Live::Always => [bytes; 3],
            Live::At(at) => at,
        };
        let row = Component { name: name.to_owned(), part, bytes: 0, live: Vec::new(), formula };
        self.rows.push((row, at, bytes));
    }

    pub fn finish(
        self,
        spec: &ModelSpec,
        config: EstimateConfig,
        layer: Vec<(String, u128, String)>,
        shape: &Shape,
    ) -> Result<Estimate> {
        let narrow = |x: u128| u64::try_from(x).map_err(|_| too_large(spec));
        let top = format!("backward of layer {}", shape.l.saturating_sub(1));
        let names: &[&str] =
            if self.trains { &["backward of the loss", &top, "backward of layer 0"] } else { &["prefill"] };
        let mut moments = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let bytes = narrow(self.rows.iter().map(|(_, at, _)| at[i]).sum())?;
            moments.push(Moment { name: (*name).to_owned(), bytes });
        }
        let mut components = Vec::new();
        for (mut row, at, bytes) in self.rows {
            row.bytes = narrow(bytes)?;
            row.live = at[..names.len()].iter().map(|&b| narrow(b)).collect::<Result<_>>()?;
            components.push(row);
        }
        let saved = |(name, bytes, formula): (String, u128, String)| {
            Ok(Component { name, part: Part::Activations, bytes: narrow(bytes)?, live: Vec::new(), formula })
        };
        Ok(Estimate {
            model: spec.name.clone(),
            total: moments.iter().map(|m| m.bytes).max().unwrap_or(0),
            paged_bytes: narrow(self.paged)?,
            layer: layer.into_iter().map(saved).collect::<Result<_>>()?,
            trainable_params: if config.method.trains() { narrow(shape.trainable())? } else { 0 },
            config,
            components,
            moments,
        })
    }
}

/// `1234567` -> `1,234,567`.
pub(super) fn n(x: u128) -> String {
    let digits = x.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

pub(super) fn weights(s: &Shape, sheet: &mut Sheet) {
    if !s.cfg.method.is_4bit() {
        let formula = format!("{} parameters x 2 (bf16)", n(s.total_params));
        return sheet.add(Part::Weights, "weights", 2 * s.total_params, Live::Always, formula);
    }
    let (mut packed, mut blocks, mut nested) = (0, 0, 0);
    for (_, i, o) in &s.linears {
        let b = (i * o).div_ceil(64);
        packed += s.l * (i * o).div_ceil(2);
        blocks += s.l * b;
        nested += s.l * b.div_ceil(256);
    }
    let modules = s.l * s.linears.len() as u128;
    let elements = s.l * s.layer_linear();
    let w = Part::Weights;
    sheet.add(w, "NF4 codes", packed, Live::Always, format!("{} weights / 2", n(elements)));
    if s.cfg.double_quant {
        sheet.add(w, "absmax codes", blocks, Live::Always, format!("{} blocks of 64 x 1", n(blocks)));
        sheet.add(w, "nested absmax", 4 * nested, Live::Always, format!("{} blocks of 256 x 4", n(nested)));
        sheet.add(w, "code tables", modules * 1088, Live::Always, format!("{} modules x (16 + 256) x 4", n(modules)));
    } else {
        sheet.add(w, "absmax", 4 * blocks, Live::Always, format!("{} blocks of 64 x 4", n(blocks)));
        sheet.add(w, "code tables", modules * 64, Live::Always, format!("{} modules x 16 x 4", n(modules)));
    }
    let (size, dtype) = if s.residual() == 4 { (4, "f32, prepare_model_for_kbit_training") } else { (2, "bf16") };
    let name = if s.lm_head_tied { "embeddings, norms" } else { "embeddings, lm_head, norms" };
    sheet.add(w, name, size * s.rest, Live::Always, format!("{} x {size} ({dtype})", n(s.rest)));
}

pub(super) fn adapter(s: &Shape, sheet: &mut Sheet) {
    if s.cfg.method.has_adapter() {
        let p = s.trainable();
        sheet.add(Part::Adapter, "LoRA A and B", 4 * p, Live::Always, format!("{} parameters x 4 (f32)", n(p)));
        // at::autocast caches the cast of a leaf that requires grad until the outermost autocast region ends.
        let formula = format!("{} x 2 (autocast's cache of the f32 parameters)", n(p));
        sheet.add(Part::Adapter, "LoRA A and B in bf16", 2 * p, Live::Always, formula);
    }
    if s.residual() == 4 {
        // The f32 lm_head is cast for the product, and the copy is saved for the gradient of its input.
        let copy = 2 * s.v * s.c;
        let formula = format!("{} x {} x 2 (cast for the product)", n(s.v), n(s.c));
        sheet.add(Part::Workspace, "lm_head in bf16", copy, Live::At([copy, 0, 0]), formula);
    }
}

pub(super) fn gradients(s: &Shape, sheet: &mut Sheet) {
    let (size, dtype) = if s.cfg.method.has_adapter() { (4, "f32") } else { (2, "bf16") };
    let p = s.trainable();
    let all = size * p;
    // Set to None by zero_grad, so they grow from layer to layer; with accumulation they stay.
    let live = if s.cfg.gradient_accumulation_steps > 1 { [all; 3] } else { [0, all / s.l.max(1), all] };
    sheet.add(Part::Gradients, "gradients", all, Live::At(live), format!("{} parameters x {size} ({dtype})", n(p)));
}

pub(super) fn optimizer(s: &Shape, sheet: &mut Sheet) {
    let p = s.trainable();
    if s.cfg.method == EstimateMethod::FullMixed {
        sheet.add(Part::Optimizer, "master weights", 4 * p, Live::Always, format!("{} x 4 (f32)", n(p)));
    }
    let (mut state, mut absmax, mut paged) = (0, 0, 0);
    for (size, times) in s.trained() {
        let (codes, scales) = moments(s, size);
        absmax += times * scales;
        if s.cfg.optim.is_paged() && size >= PAGED_FROM { paged += times * codes } else { state += times * codes }
    }
    let name = s.cfg.optim.name();
    sheet.add(
        Part::Optimizer,
        "exp_avg, exp_avg_sq",
        state,
        Live::Always,
        format!("{name}: both moments of the resident tensors"),
    );
    sheet.add(
        Part::Optimizer,
        "absmax of the moments",
        absmax,
        Live::Always,
        format!("{name}: 2 x 4 per 256 parameters"),
    );
    sheet.paged = paged;
}

/// Bytes of the two moments of a tensor of `size` parameters, and of their absmax.
fn moments(s: &Shape, size: u128) -> (u128, u128) {
    match s.cfg.optim {
        // torch's AdamW keeps the parameter's dtype.
        Optim::AdamW if s.cfg.method == EstimateMethod::FullBf16 => (4 * size, 0),
        Optim::AdamW | Optim::PagedAdamW32bit => (8 * size, 0),
        _ if size < MIN_8BIT => (8 * size, 0),
        _ => (2 * size, 8 * size.div_ceil(256)),
    }
}
