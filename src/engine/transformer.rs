//! The decoder's forward and backward pass, written once: each phase as a list of operations.
//!
//! The residual stream is carried as a sum that is made inside the next norm: a layer reads `residual` and the `delta`
//! that the layer before it produced, adds them, and norms the sum ([`AddRmsnorm`]).
//!
//! What a layer keeps for the backward pass is what [`LayerActs`] names. The outputs of RMSNorm and SwiGLU are not kept:
//! they cost one pass over memory to make again.

use candle_core::DType;

use super::layout::{Layout, NormIds, Regions, places};
use super::ops::*;
use crate::model::ModelSpec;
use crate::plan::{DeviceKind, Lifetime, Phase, PlanConfig, Stage, kept_modules};

/// The operations of each phase.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// Forward and backward pass; empty when nothing is trained.
    pub micro_step: Vec<Op>,
    /// Clipping and the update; empty when nothing is trained.
    pub optimizer: Vec<Op>,
    /// Forward pass and loss.
    pub evaluate: Vec<Op>,
    /// Forward pass and all logits.
    pub logits: Vec<Op>,
    /// A piece of a prompt or one token.
    pub generate: Vec<Op>,
}

impl Programs {
    /// The operations of a phase.
    pub fn of(&self, phase: Phase) -> &[Op] {
        match phase {
            Phase::MicroStep => &self.micro_step,
            Phase::Optimizer => &self.optimizer,
            Phase::Evaluate => &self.evaluate,
            Phase::Logits => &self.logits,
            Phase::Generate => &self.generate,
        }
    }
}

// k stands between q and v.
const Q: usize = 0;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// What one layer's forward pass leaves behind.
#[derive(Clone, Copy)]
struct LayerActs {
    /// `[T, C]`: input of the layer, before the first norm.
    input: TensorId,
    input_rstd: TensorId,
    /// q and k before their norms, and those norms' rstd `[T, heads]`.
    qk_raw: Option<[(TensorId, TensorId); 2]>,
    q: TensorId,
    k: TensorId,
    v: TensorId,
    /// `[T, H, D]`: attention's output.
    o: TensorId,
    lse: TensorId,
    /// `[T, C]` and rstd: attention's projected output, where it is normed.
    attention_out: Option<(TensorId, TensorId)>,
    /// `[T, C]`: residual stream between attention and MLP.
    middle: TensorId,
    middle_rstd: TensorId,
    gate: TensorId,
    up: TensorId,
    /// `[T, C]` and rstd: the MLP's output, where it is normed.
    mlp_out: Option<(TensorId, TensorId)>,
    /// `dropout(x) A^T` of the seven modules.
    xa: [Option<TensorId>; 7],
    /// SwiGLU's output, when the backward pass comes right after it (recomputation).
    swiglu: Option<TensorId>,
    /// So are the outputs of both norms, where low-rank products lie beside them.
    normed: [Option<TensorId>; 2],
    /// Of a layer that is not recomputed: the low-rank products that lay beside an input, by the first place that reads it.
    low_rank: [Option<TensorId>; 7],
}

/// Writes one phase's program.
struct Pass<'a> {
    spec: &'a ModelSpec,
    cfg: &'a PlanConfig,
    layout: &'a Layout,
    regions: &'a mut Regions,
    phase: Phase,
    /// T at capacity.
    tokens: usize,
    ops: Vec<Op>,
    ids: BatchIds,
    /// In generation: the caches of each layer.
    caches: Vec<(TensorId, TensorId)>,
    /// The modules of the layer that is recomputed now, with the weights that are decoded for it and its backward pass.
    decoded: Option<(usize, [Option<LinearIds>; 7])>,
    /// Where the inputs of recomputed layers wait on the host.
    offloaded: Vec<TensorId>,
    /// The dropped inputs of the layer whose gradients come next.
    dropped: [Option<Dropped>; 7],
}

/// When the gradients of a layer's modules are computed.
#[derive(Clone, Copy, PartialEq)]
enum Gradients {
    /// Not from this pass over the layer.
    None,
    /// Right after it, while its inputs are there.
    Next,
    /// When other layers have used their memory.
    Later,
}

#[derive(Clone, Copy)]
struct BatchIds {
    tokens: TensorId,
    positions: TensorId,
    cu_seqlens: TensorId,
    labels: Option<TensorId>,
}

/// Appends every phase's regions to the layout and returns the programs. `context` is the KV cache's capacity.
pub(crate) fn programs(spec: &ModelSpec, cfg: &PlanConfig, layout: &mut Layout, context: usize) -> Programs {
    let mut regions = Regions { list: std::mem::take(&mut layout.regions) };
    let trains = !layout.trainables.is_empty();
    hold_dequantized(cfg, layout, &mut regions);
    let mut out = Programs::default();
    if trains {
        out.micro_step = Pass::new(spec, cfg, layout, &mut regions, Phase::MicroStep, cfg.capacity()).micro_step();
        out.optimizer = optimizer(cfg, layout, &mut regions);
    }
    out.evaluate = Pass::new(spec, cfg, layout, &mut regions, Phase::Evaluate, cfg.capacity()).evaluate();
    out.logits = Pass::new(spec, cfg, layout, &mut regions, Phase::Logits, cfg.capacity()).logits();
    out.generate = Pass::new(spec, cfg, layout, &mut regions, Phase::Generate, prompt_piece(cfg)).generate(context);
    layout.regions = regions.list;
    record(layout, &out);
    out
}

/// Tokens of a prompt that are fed at a time.
pub(crate) fn prompt_piece(cfg: &PlanConfig) -> usize {
    cfg.capacity().min(128)
}

/// Lifetimes: the first and the last operation of its phase that uses a region.
fn record(layout: &mut Layout, programs: &Programs) {
    for phase in [Phase::MicroStep, Phase::Optimizer, Phase::Evaluate, Phase::Logits, Phase::Generate] {
        for (i, op) in programs.of(phase).iter().enumerate() {
            for id in op.tensors() {
                if let Lifetime::Within { phase: p, first, last } = &mut layout.regions[id.index()].lifetime {
                    debug_assert_eq!(*p, phase);
                    *first = (*first).min(i as u32);
                    *last = (*last).max(i as u32);
                }
            }
        }
    }
    // A cache is filled over many runs of its program: it lives through all of them.
    let end = programs.generate.len().saturating_sub(1) as u32;
    for r in layout.regions.iter_mut().filter(|r| r.stage == Stage::KvCache) {
        r.lifetime = Lifetime::Within { phase: Phase::Generate, first: 0, last: end };
    }
}

/// The places of the modules that read the same input as the one in place `m`.
fn siblings(m: usize) -> std::ops::RangeInclusive<usize> {
    match m {
        Q..=V => Q..=V,
        GATE..=UP => GATE..=UP,
        _ => m..=m,
    }
}

/// The names of those modules.
fn sibling_names(m: usize) -> &'static str {
    match m {
        Q..=V => "q k v",
        GATE..=UP => "gate up",
        O => "attention output",
        _ => "down",
    }
}

/// The adapted modules of a layer that read the same input as the one in place `m`, each with the column of that input where its
/// low-rank product lies: on a GPU, where the base product takes it along. Not attention's output, which its kernels write and
/// read as heads, not widths that are no whole vectors, and not where DoRA scales the product after it.
fn adapters(cfg: &PlanConfig, linears: &[Option<LinearIds>; 7], m: usize) -> Vec<(usize, Beside)> {
    let dora = cfg.lora.as_ref().is_some_and(|l| l.use_dora);
    if cfg.device != DeviceKind::Cuda || m == O || dora {
        return Vec::new();
    }
    let mut out: Vec<(usize, Beside)> = Vec::new();
    for place in siblings(m) {
        let Some(linear) = &linears[place] else { continue };
        if linear.in_features % 8 != 0 {
            return Vec::new();
        }
        let Some(lora) = linear.lora else { continue };
        let first = out.last().map_or(linear.in_features, |(_, before)| before.end());
        out.push((place, Beside { lora, first }));
    }
    out
}

/// Where the low-rank product of the module in place `m` lies in its input, if it does.
fn beside(cfg: &PlanConfig, linears: &[Option<LinearIds>; 7], m: usize) -> Option<Beside> {
    adapters(cfg, linears, m).into_iter().find(|(place, _)| *place == m).map(|(_, beside)| beside)
}

/// A 4-bit weight of a layer in the compute dtype, with room for B beside it where it lies there: the operation that fills
/// it, and the module that has it. `None` for an empty place and a dense weight.
fn dequantized(
    cfg: &PlanConfig,
    linears: &[Option<LinearIds>; 7],
    m: usize,
    region: impl FnOnce(&[usize]) -> TensorId,
) -> Option<(Dequantize, LinearIds)> {
    let linear = linears[m].filter(|linear| matches!(linear.weight, Weight::Nf4 { .. }))?;
    let (weight, in_features, lora) = (linear.weight, linear.in_features, beside(cfg, linears, m));
    let out = region(&[linear.out_features, lora.map_or(in_features, |b| b.row())]);
    Some((Dequantize { weight, in_features, out, lora }, LinearIds { weight: Weight::Dense { w: out }, ..linear }))
}

/// The regions of the layers that are held dequantized, and what fills them.
fn hold_dequantized(cfg: &PlanConfig, layout: &mut Layout, regions: &mut Regions) {
    for (l, layer) in layout.layers.iter_mut().enumerate().take(cfg.dequantized_layers) {
        let mut linears = layer.linears;
        for (m, held) in linears.iter_mut().enumerate() {
            let name = format!("layer {l} weight {m} dequantized");
            let region = |shape: &[usize]| regions.persistent(&name, Stage::Weights, cfg.compute_dtype, shape);
            if let Some((op, linear)) = dequantized(cfg, &layer.linears, m, region) {
                layout.dequantize.push(op);
                *held = Some(linear);
            }
        }
        layer.dequantized = Some(linears);
    }
}

/// The update of every trained tensor. State that lives on the host passes through windows, or, on a GPU, is read and written over the
/// bus by the update itself.
fn optimizer(cfg: &PlanConfig, layout: &Layout, regions: &mut Regions) -> Vec<Op> {
    let grads: Vec<TensorId> = layout.trainables.iter().map(|t| t.grad).collect();
    let norm = layout.grad_norm;
    let mut ops = vec![Op::GradNorm(GradNorm { grads: grads.clone(), norm })];
    for t in &layout.trainables {
        let mut moments = t.moments;
        let mut pages = Vec::new();
        if t.paged && cfg.device == DeviceKind::Cpu {
            let mut page = |host: &mut TensorId| {
                let r = regions.list[host.index()].clone();
                let window = regions.within(Phase::Optimizer, &r.name, Stage::Window, r.dtype, &r.shape);
                pages.push((*host, window));
                *host = window;
            };
            match &mut moments {
                Moments::F32 { exp_avg, exp_avg_sq, .. } => [exp_avg, exp_avg_sq].into_iter().for_each(&mut page),
                Moments::Blockwise8bit { state1, state2, .. } => [state1, state2].into_iter().for_each(&mut page),
            }
        }
        ops.extend(pages.iter().map(|&(host, window)| Op::PageIn(PageIn { host, window })));
        let (param, copy, grad, decay) = (t.param, t.copy, t.grad, t.decay);
        ops.push(Op::AdamW(AdamW { param, copy, grad, norm, moments, decay }));
        ops.extend(pages.iter().map(|&(host, window)| Op::PageOut(PageOut { window, host })));
    }
    ops.push(Op::Zero(Zero { tensors: grads }));
    ops
}

impl<'a> Pass<'a> {
    fn new(
        spec: &'a ModelSpec,
        cfg: &'a PlanConfig,
        layout: &'a Layout,
        regions: &'a mut Regions,
        phase: Phase,
        tokens: usize,
    ) -> Self {
        let mut small = |name: &str, dtype: DType, n: usize| regions.within(phase, name, Stage::Batch, dtype, &[n]);
        let ids = BatchIds {
            tokens: small("tokens", DType::U32, tokens),
            positions: small("positions", DType::U32, tokens),
            // At worst every token is an example of its own.
            cu_seqlens: small("cu_seqlens", DType::U32, tokens + 1),
            labels: (phase != Phase::Generate && phase != Phase::Logits).then(|| small("labels", DType::I32, tokens)),
        };
        let (ops, caches, offloaded) = (Vec::new(), Vec::new(), Vec::new());
        let (decoded, dropped) = (None, [None; 7]);
        Pass { spec, cfg, layout, regions, phase, tokens, ops, ids, caches, decoded, offloaded, dropped }
    }

    /// An activation `[T, width]` in the compute dtype.
    fn act(&mut self, name: &str, stage: Stage, width: usize) -> TensorId {
        let shape = [self.tokens, width];
        self.regions.within(self.phase, name, stage, self.cfg.compute_dtype, &shape)
    }

    /// One f32 per token, or per token and head.
    fn stat(&mut self, name: &str, width: usize) -> TensorId {
        let shape = [self.tokens, width];
        self.regions.within(self.phase, name, Stage::Activations, DType::F32, &shape)
    }

    fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    fn hidden(&self) -> usize {
        self.spec.hidden_size
    }

    fn heads(&self, l: usize) -> Heads {
        let s = self.spec;
        Heads { q: s.num_attention_heads, kv: s.num_key_value_heads, dim: s.head_dim, window: s.window(l) }
    }

    fn score(&self) -> Score {
        let softcap = self.spec.attn_logit_softcapping.map(|cap| cap as f32);
        Score { scale: self.spec.attention_scale(), softcap }
    }

    /// The factor as the compute dtype holds it, as transformers multiplies by it.
    fn embedding_scale(&self) -> f32 {
        let scale = self.spec.embedding_scale();
        if self.cfg.compute_dtype == DType::BF16 { half::bf16::from_f32(scale).to_f32() } else { scale }
    }

    fn rotary(&mut self, l: usize, q: TensorId, k: TensorId, inverse: bool) {
        let (heads, positions, inv_freq) = (self.heads(l), self.ids.positions, self.layout.inv_freq);
        let scale = self.spec.rope_attention_factor();
        self.push(Op::Rotary(Rotary { q, k, positions, inv_freq, inverse, scale, heads }));
    }

    /// Loads the batch and embeds it: the residual stream at the first layer.
    fn embed(&mut self, stage: Stage) -> TensorId {
        let BatchIds { tokens, positions, cu_seqlens, labels } = self.ids;
        self.push(Op::LoadBatch(LoadBatch { tokens, positions, labels, cu_seqlens }));
        let out = self.act("layer 0 input", stage, self.hidden());
        let (table, scale) = (self.layout.embedding.weight, self.embedding_scale());
        self.push(Op::Embedding(Embedding { table, tokens, out, scale }));
        out
    }

    fn add_norm(
        &mut self,
        residual: TensorId,
        delta: Option<(TensorId, TensorId)>,
        norm: NormIds,
        at: &str,
    ) -> (TensorId, TensorId) {
        self.norm(residual, delta, norm, at, 1, self.hidden())
    }

    /// The norm of each of `groups` equal parts of a row; the rows of the output have `row` elements.
    fn norm(
        &mut self,
        residual: TensorId,
        delta: Option<(TensorId, TensorId)>,
        norm: NormIds,
        at: &str,
        groups: usize,
        row: usize,
    ) -> (TensorId, TensorId) {
        let out = self.act(&format!("{at} normed"), Stage::Activations, row);
        let rstd = self.stat(&format!("{at} rstd"), groups);
        self.push(Op::AddRmsnorm(AddRmsnorm {
            residual,
            delta: delta.map(|d| d.0),
            sum: delta.map(|d| d.1),
            weight: norm.weight,
            offset: self.spec.norm_offset(),
            out,
            rstd,
        }));
        (out, rstd)
    }

    /// The places of the modules whose decoded weights are kept from a layer's recomputation to its gradients.
    fn kept(&self) -> Vec<usize> {
        let all = places(self.spec).iter().zip(kept_modules(self.spec));
        all.filter(|(_, (name, _))| self.cfg.keeps_dequantized(name)).map(|(&place, _)| place).collect()
    }

    /// Decodes those of the 4-bit weights in the places `kept` that both the recomputation and the backward pass of layer `l` read.
    fn decode(&mut self, l: usize, kept: &[usize]) {
        let mut linears = *self.linears(l);
        for &m in kept {
            let (phase, dtype, name) = (self.phase, self.cfg.compute_dtype, format!("layer {l} weight {m} decoded"));
            let region = |shape: &[usize]| self.regions.within(phase, &name, Stage::Scratch, dtype, shape);
            if let Some((op, linear)) = dequantized(self.cfg, &linears, m, region) {
                self.push(Op::Dequantize(op));
                linears[m] = Some(linear);
            }
        }
        self.decoded = Some((l, linears));
    }

    /// A product's output normed on its own, where the layer has such a norm: what is added to the stream, and what the
    /// backward pass reads.
    fn out_norm(&mut self, x: TensorId, norm: Option<NormIds>, at: &str) -> (TensorId, Option<(TensorId, TensorId)>) {
        let Some(norm) = norm else { return (x, None) };
        let (out, rstd) = self.add_norm(x, None, norm, at);
        (out, Some((x, rstd)))
    }

    /// A linear module of layer `l`; `(y, xa)`.
    fn linear(&mut self, l: usize, m: usize, x: TensorId, at: &str) -> (TensorId, Option<TensorId>) {
        let linear = self.module(l, m);
        let y = self.act(at, Stage::Activations, linear.out_features);
        let beside = self.beside(l, m).map(|b| b.first);
        let xa = if beside.is_some() { None } else { self.lora_a(&linear, at) };
        self.push(Op::Linear(Linear { linear, x, y: Some(y), xa, beside }));
        (y, xa)
    }

    /// See [`adapters`].
    fn adapters(&self, l: usize, m: usize) -> Vec<(usize, Beside)> {
        adapters(self.cfg, &self.layout.layers[l].linears, m)
    }

    /// See [`beside`].
    fn beside(&self, l: usize, m: usize) -> Option<Beside> {
        beside(self.cfg, &self.layout.layers[l].linears, m)
    }

    /// Elements from row to row of the input of the module in place `m`, which has `width` columns.
    fn input_row(&self, l: usize, m: usize, width: usize) -> usize {
        self.adapters(l, m).last().map_or(width, |(_, last)| last.row())
    }

    /// The low-rank products of the module in place `m` and of its siblings, beside their input; the tensor that keeps them, if their
    /// gradients come later.
    fn low_rank(&mut self, l: usize, m: usize, x: TensorId, gradients: Gradients) -> Option<TensorId> {
        let places = self.adapters(l, m);
        let (Some((_, first)), Some((_, last))) = (places.first(), places.last()) else { return None };
        let in_features = self.module(l, m).in_features;
        let drops = places.iter().any(|(_, beside)| beside.lora.dropout > 0.0);
        let columns = last.end() - first.first;
        let kept = (gradients == Gradients::Later && !drops)
            .then(|| self.act(&format!("layer {l} {} x A^T", sibling_names(m)), Stage::Activations, columns));
        let mut dropped = Vec::new();
        for &(place, _) in places.iter().filter(|_| gradients == Gradients::Next && drops) {
            let input = self.act(&format!("layer {l} dropped {place}"), Stage::Activations, in_features);
            let (name, shape) = (format!("layer {l} dropout mask {place}"), [self.tokens, in_features / 8]);
            let mask = self.regions.within(self.phase, &name, Stage::Activations, DType::U8, &shape);
            self.dropped[place] = Some(Dropped { input, mask });
            dropped.extend(self.dropped[place]);
        }
        let adapters = places.into_iter().map(|(_, beside)| beside).collect();
        self.push(Op::LoraA(LoraA { x, in_features, adapters, dropped, kept }));
        kept
    }

    /// The module that stands in a place; empty places are never asked for.
    fn module(&self, l: usize, m: usize) -> LinearIds {
        self.linears(l)[m].expect("the family has a module in this place")
    }

    /// The modules of layer `l` with the weights that this phase computes with.
    fn linears(&self, l: usize) -> &[Option<LinearIds>; 7] {
        let layer = &self.layout.layers[l];
        match (&self.decoded, &layer.dequantized) {
            (Some((of, linears)), _) if *of == l => linears,
            // Where B is put beside them.
            (_, Some(linears)) if self.phase == Phase::MicroStep => linears,
            _ => &layer.linears,
        }
    }

    /// B beside those weights of layer `l` that are held dequantized.
    fn place_b(&mut self, l: usize) {
        let Some(held) = self.layout.layers[l].dequantized else { return };
        for (m, linear) in held.into_iter().enumerate() {
            let Some(LinearIds { weight: Weight::Dense { w: out }, in_features, .. }) = linear else { continue };
            if let Some(lora) = self.beside(l, m) {
                self.push(Op::LoraB(LoraB { lora, in_features, out }));
            }
        }
    }

    /// The modules of the places from `first` on, computed from `x`: as many tensors as `names` has, of these widths.
    fn side_by_side<const N: usize>(
        &mut self,
        l: usize,
        first: usize,
        x: TensorId,
        names: [(&str, usize); N],
        xa: &mut [Option<TensorId>; 7],
    ) -> [TensorId; N] {
        if self.layout.layers[l].linears[first + 1].is_some() {
            return std::array::from_fn(|i| {
                let (y, a) = self.linear(l, first + i, x, &format!("layer {l} {}", names[i].0));
                xa[first + i] = a;
                y
            });
        }
        let together = names.map(|(name, _)| name).join(" ");
        let whole;
        (whole, xa[first]) = self.linear(l, first, x, &format!("layer {l} {together}"));
        let parts = names.map(|(name, width)| self.act(&format!("layer {l} {name}"), Stage::Activations, width));
        self.push(Op::SplitColumns(SplitColumns { whole, parts: parts.to_vec() }));
        parts
    }

    fn lora_a(&mut self, linear: &LinearIds, at: &str) -> Option<TensorId> {
        linear.lora.map(|lora| self.act(&format!("{at} x A^T"), Stage::Activations, lora.r))
    }

    /// One layer. `delta` is what the layer before it adds to the stream, and where the sum goes.
    ///
    /// With `last` the down projection is computed and its output returned; without it only what the backward pass
    /// reads is (recomputation).
    fn layer(
        &mut self,
        l: usize,
        residual: TensorId,
        delta: Option<(TensorId, TensorId)>,
        last: bool,
    ) -> (LayerActs, Option<TensorId>) {
        let at = |what: &str| format!("layer {l} {what}");
        let ids = self.layout.layers[l].clone();
        let gradients = match last {
            false => Gradients::Next,
            true if self.phase == Phase::MicroStep && l >= self.recomputed() => Gradients::Later,
            true => Gradients::None,
        };
        let mut low_rank = [None; 7];
        let row = self.input_row(l, Q, self.hidden());
        let (n1, input_rstd) = self.norm(residual, delta, ids.input_norm, &at("attention"), 1, row);
        low_rank[Q] = self.low_rank(l, Q, n1, gradients);
        let input = delta.map_or(residual, |d| d.1);
        let offloads = last && l < self.offloaded.len();
        if offloads {
            self.push(Op::Offload(Offload { device: input, host: self.offloaded[l] }));
        }
        let mut xa = [None; 7];
        let heads = self.heads(l);
        let (wide, narrow) = (heads.q * heads.dim, heads.kv * heads.dim);
        let [mut q, mut k, v] = self.side_by_side(l, Q, n1, [("q", wide), ("k", narrow), ("v", narrow)], &mut xa);
        let qk_raw = ids.qk_norm.map(|[q_norm, k_norm]| {
            let (raw_q, raw_k) = (q, k);
            let (q_rstd, k_rstd);
            (q, q_rstd) = self.norm(q, None, q_norm, &at("q"), heads.q, wide);
            (k, k_rstd) = self.norm(k, None, k_norm, &at("k"), heads.kv, narrow);
            [(raw_q, q_rstd), (raw_k, k_rstd)]
        });
        self.rotary(l, q, k, false);
        let (o, lse) = self.attend(l, q, k, v);
        let (attn, attn_xa) = self.linear(l, O, o, &at("attention output"));
        xa[O] = attn_xa;
        let (attn, attention_out) = self.out_norm(attn, ids.attention_out_norm, &at("attention output"));
        let middle = self.act(&at("middle"), Stage::Activations, self.hidden());
        let row = self.input_row(l, GATE, self.hidden());
        let (n2, middle_rstd) = self.norm(input, Some((attn, middle)), ids.post_norm, &at("mlp"), 1, row);
        low_rank[GATE] = self.low_rank(l, GATE, n2, gradients);
        let f = self.spec.intermediate_size;
        let [gate, up] = self.side_by_side(l, GATE, n2, [("gate", f), ("up", f)], &mut xa);
        let h = self.swiglu(l, gate, up);
        low_rank[DOWN] = self.low_rank(l, DOWN, h, gradients);
        let (mut down, mut swiglu, mut mlp_out) = (None, None, None);
        // A norm after the MLP needs its input in the backward pass.
        if last || ids.mlp_out_norm.is_some() {
            let (y, down_xa) = self.linear(l, DOWN, h, &at("down"));
            xa[DOWN] = down_xa;
            let (y, kept) = self.out_norm(y, ids.mlp_out_norm, &at("down"));
            (down, mlp_out) = (Some(y), kept);
        } else {
            let linear = self.module(l, DOWN);
            if self.beside(l, DOWN).is_none() {
                xa[DOWN] = self.lora_a(&linear, &at("down"));
            }
            if xa[DOWN].is_some() {
                self.push(Op::Linear(Linear { linear, x: h, y: None, xa: xa[DOWN], beside: None }));
            }
        }
        if offloads {
            self.push(Op::Transferred(Transferred { device: input }));
        }
        let mut normed = [None; 2];
        if !last {
            swiglu = Some(h);
            normed = [(Q, n1), (GATE, n2)].map(|(m, x)| Some(x).filter(|_| !self.adapters(l, m).is_empty()));
        }
        let acts = LayerActs {
            input,
            input_rstd,
            qk_raw,
            q,
            k,
            v,
            o,
            lse,
            attention_out,
            middle,
            middle_rstd,
            gate,
            up,
            mlp_out,
            xa,
            swiglu,
            normed,
            low_rank,
        };
        (acts, down)
    }

    fn attend(&mut self, l: usize, q: TensorId, k: TensorId, v: TensorId) -> (TensorId, TensorId) {
        let (heads, score) = (self.heads(l), self.score());
        let out = self.act(&format!("layer {l} attention heads"), Stage::Activations, heads.q * heads.dim);
        let cu_seqlens = self.ids.cu_seqlens;
        if let Some(&(k_cache, v_cache)) = self.caches.get(l) {
            let positions = self.ids.positions;
            self.push(Op::CachedAttention(CachedAttention { q, k, v, out, k_cache, v_cache, positions, heads, score }));
            return (out, out);
        }
        let lse = self.stat(&format!("layer {l} lse"), heads.q);
        self.push(Op::Attention(Attention { q, k, v, out, lse, cu_seqlens, heads, score }));
        (out, lse)
    }

    fn swiglu(&mut self, l: usize, gate: TensorId, up: TensorId) -> TensorId {
        let row = self.input_row(l, DOWN, self.spec.intermediate_size);
        let out = self.act(&format!("layer {l} swiglu"), Stage::Activations, row);
        let activation = self.spec.activation;
        self.push(Op::Swiglu(Swiglu { gate, up, out, activation }));
        out
    }

    /// All layers, and the last norm: what each layer kept, the final stream, its norm and rstd.
    fn forward(&mut self, recomputed: usize) -> (Vec<LayerActs>, TensorId, TensorId, TensorId) {
        // On the host, a layer's input is an activation like any other here.
        let kept = recomputed > 0 && self.offloaded.is_empty();
        let stage = |l: usize| if kept && l < recomputed { Stage::Checkpoints } else { Stage::Activations };
        let mut residual = self.embed(stage(0));
        let mut delta = None;
        let mut all = Vec::with_capacity(self.spec.num_hidden_layers);
        if self.phase == Phase::MicroStep {
            // Next to each other: a backend may write all of them at once.
            (0..self.spec.num_hidden_layers).for_each(|l| self.place_b(l));
        }
        for l in 0..self.spec.num_hidden_layers {
            let (acts, down) = self.layer(l, residual, delta, true);
            all.push(acts);
            residual = acts.middle;
            let next = l + 1;
            let sum = if next < self.spec.num_hidden_layers {
                self.act(&format!("layer {next} input"), stage(next), self.hidden())
            } else {
                self.act("final residual", Stage::Activations, self.hidden())
            };
            delta = down.map(|d| (d, sum));
        }
        let (normed, rstd) = self.add_norm(residual, delta, self.layout.norm, "final");
        (all, delta.map_or(residual, |d| d.1), normed, rstd)
    }

    fn micro_step(mut self) -> Vec<Op> {
        let recomputed = self.recomputed();
        if self.cfg.host_checkpoints {
            let (dtype, shape) = (self.cfg.compute_dtype, [self.tokens, self.hidden()]);
            for l in 0..recomputed {
                let host = self.regions.host(&format!("layer {l} input"), Stage::Checkpoints, dtype, &shape);
                self.offloaded.push(host);
            }
        }
        let (acts, last, normed, rstd) = self.forward(recomputed);
        let dnormed = self.act("final normed gradient", Stage::ActivationGradients, self.hidden());
        self.loss(normed, Some(dnormed));
        let dres = self.act("residual gradient", Stage::ActivationGradients, self.hidden());
        let NormIds { weight, grad } = self.layout.norm;
        self.push(Op::RmsnormBackward(RmsnormBackward {
            dout: dnormed,
            x: last,
            rstd,
            weight,
            offset: self.spec.norm_offset(),
            dx: dres,
            accumulate: false,
            grad,
        }));
        let (mut fetched, kept) = (None, self.kept());
        for l in (0..self.spec.num_hidden_layers).rev() {
            if !self.trained_before(l, 4) {
                break;
            }
            // The input of the layer before this one comes back while this one computes.
            let next = if l < recomputed { self.arrived(l, &mut fetched) } else { None };
            if l > 0 && l <= recomputed {
                fetched = self.fetch(l - 1);
            }
            let acts = if l < recomputed {
                self.decode(l, &kept);
                self.layer(l, next.unwrap_or(acts[l].input), None, false).0
            } else {
                acts[l]
            };
            self.layer_backward(l, &acts, dres);
        }
        if let Some(grad) = self.layout.embedding.grad {
            let (tokens, scale) = (self.ids.tokens, self.embedding_scale());
            self.push(Op::EmbeddingBackward(EmbeddingBackward { tokens, dout: dres, grad, scale }));
        }
        self.ops
    }

    /// Layers that are recomputed: the first ones.
    fn recomputed(&self) -> usize {
        self.cfg.checkpointing.recomputed(self.spec.num_hidden_layers)
    }

    /// Starts to bring the input of layer `l` back from the host, where it is there.
    fn fetch(&mut self, l: usize) -> Option<TensorId> {
        let host = *self.offloaded.get(l)?;
        let device = self.act(&format!("layer {l} input again"), Stage::Checkpoints, self.hidden());
        self.push(Op::Fetch(Fetch { host, device }));
        Some(device)
    }

    /// Waits for the input of layer `l`.
    fn arrived(&mut self, l: usize, fetched: &mut Option<TensorId>) -> Option<TensorId> {
        let device = fetched.take().or_else(|| self.fetch(l))?;
        self.push(Op::Transferred(Transferred { device }));
        Some(device)
    }

    /// Whether anything is trained before step `group` of layer `l`; the steps are q k v, o, gate up, down.
    fn trained_before(&self, l: usize, group: usize) -> bool {
        if self.cfg.method.is_full() {
            return true;
        }
        let order = |m: usize| [0, 0, 0, 1, 2, 2, 3][m];
        self.layout.layers.iter().enumerate().any(|(i, layer)| {
            let adapted = |linear: &Option<LinearIds>| linear.is_some_and(|linear| linear.lora.is_some());
            layer.linears.iter().enumerate().any(|(m, linear)| adapted(linear) && (i, order(m)) < (l, group))
        })
    }

    /// From the gradient of the layer's output (in `dres`) to that of its input (in `dres` again).
    fn layer_backward(&mut self, l: usize, a: &LayerActs, dres: TensorId) {
        let ids = self.layout.layers[l].clone();
        let (o, down) = (self.module(l, O), self.module(l, DOWN));
        // MLP
        let h = match a.swiglu {
            _ if !self.learns(&down) => None,
            Some(h) => Some(h),
            None => {
                let h = self.swiglu(l, a.gate, a.up);
                self.low_rank_again(l, DOWN, h, a);
                Some(h)
            }
        };
        let dmlp = self.out_norm_backward(l, "down", dres, a.mlp_out, ids.mlp_out_norm);
        let dh = self.grad_act(l, "swiglu", self.spec.intermediate_size, self.trained_before(l, 3));
        if !self.low_rank_backward(l, &[(DOWN, down, dmlp)], h, dh, a) {
            self.linear_backward(down, h, a.xa[DOWN], dmlp, dh, false);
        }
        let Some(dh) = dh else { return };
        let activation = self.spec.activation;
        self.push(Op::SwigluBackward(SwigluBackward { gate: a.gate, up: a.up, dout: dh, activation }));
        let n2 = self.normed_again(l, GATE, a, "mlp", (a.middle, a.middle_rstd), ids.post_norm);
        let dn2 = self.grad_act(l, "mlp normed", self.hidden(), self.trained_before(l, 2));
        self.side_by_side_backward(l, GATE, n2, &[a.gate, a.up], dn2, a);
        let Some(dn2) = dn2 else { return };
        self.norm_backward(dn2, a.middle, a.middle_rstd, ids.post_norm, dres);
        // Attention
        let (heads, score) = (self.heads(l), self.score());
        let dattn = self.out_norm_backward(l, "attention output", dres, a.attention_out, ids.attention_out_norm);
        let do_ = self.grad_act(l, "attention heads", heads.q * heads.dim, self.trained_before(l, 1));
        let x = self.learns(&o).then_some(a.o);
        self.linear_backward(o, x, a.xa[O], dattn, do_, false);
        let Some(dout) = do_ else { return };
        let dq = self.act(&format!("layer {l} q gradient"), Stage::ActivationGradients, heads.q * heads.dim);
        let dk = self.act(&format!("layer {l} k gradient"), Stage::ActivationGradients, heads.kv * heads.dim);
        let dv = self.act(&format!("layer {l} v gradient"), Stage::ActivationGradients, heads.kv * heads.dim);
        let cu_seqlens = self.ids.cu_seqlens;
        let LayerActs { q, k, v, o: out, lse, .. } = *a;
        self.push(Op::AttentionBackward(AttentionBackward {
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            dout,
            dq,
            dk,
            dv,
            heads,
            score,
        }));
        self.rotary(l, dq, dk, true);
        let [dq, dk] = self.qk_norm_backward(l, a, [dq, dk]);
        self.qkv_backward(l, a, [dq, dk, dv], dres);
    }

    /// From the gradients of the normed q and k to those of what was normed.
    fn qk_norm_backward(&mut self, l: usize, a: &LayerActs, dout: [TensorId; 2]) -> [TensorId; 2] {
        let (Some(norms), Some(raw)) = (self.layout.layers[l].qk_norm, a.qk_raw) else { return dout };
        let heads = self.heads(l);
        let widths = [("q before its norm", heads.q * heads.dim), ("k before its norm", heads.kv * heads.dim)];
        std::array::from_fn(|i| {
            let (name, width) = widths[i];
            let dx = self.act(&format!("layer {l} {name} gradient"), Stage::ActivationGradients, width);
            let (x, rstd) = raw[i];
            self.norm_gradient(dout[i], x, rstd, norms[i], dx, false);
            dx
        })
    }

    /// From the gradient of the stream to that of an output that was normed before it was added.
    fn out_norm_backward(
        &mut self,
        l: usize,
        what: &str,
        dres: TensorId,
        kept: Option<(TensorId, TensorId)>,
        norm: Option<NormIds>,
    ) -> TensorId {
        let (Some((x, rstd)), Some(norm)) = (kept, norm) else { return dres };
        let dx = self.act(&format!("layer {l} {what} gradient"), Stage::ActivationGradients, self.hidden());
        self.norm_gradient(dres, x, rstd, norm, dx, false);
        dx
    }

    fn qkv_backward(&mut self, l: usize, a: &LayerActs, dy: [TensorId; 3], dres: TensorId) {
        let norm = self.layout.layers[l].input_norm;
        let n1 = self.normed_again(l, Q, a, "attention", (a.input, a.input_rstd), norm);
        let dn1 = self.grad_act(l, "attention normed", self.hidden(), self.trained_before(l, 0));
        self.side_by_side_backward(l, Q, n1, &dy, dn1, a);
        if let Some(dn1) = dn1 {
            self.norm_backward(dn1, a.input, a.input_rstd, norm, dres);
        }
    }

    /// The gradients of modules that were computed side by side from one input.
    fn side_by_side_backward(
        &mut self,
        l: usize,
        first: usize,
        x: Option<TensorId>,
        dy: &[TensorId],
        dx: Option<TensorId>,
        a: &LayerActs,
    ) {
        if self.layout.layers[l].linears[first + 1].is_some() {
            let modules: Vec<_> =
                dy.iter().enumerate().map(|(i, &dy)| (first + i, self.module(l, first + i), dy)).collect();
            if self.low_rank_backward(l, &modules, x, dx, a) {
                return;
            }
            for (i, &dy) in dy.iter().enumerate() {
                self.linear_backward(self.module(l, first + i), x, a.xa[first + i], dy, dx, i > 0);
            }
            return;
        }
        let linear = self.module(l, first);
        if self.learns(&linear) || dx.is_some() {
            let name = format!("layer {l} {} gradient", sibling_names(first));
            let whole = self.act(&name, Stage::ActivationGradients, linear.out_features);
            self.push(Op::JoinColumns(JoinColumns { parts: dy.to_vec(), whole }));
            if !self.low_rank_backward(l, &[(first, linear, whole)], x, dx, a) {
                self.linear_backward(linear, x, a.xa[first], whole, dx, false);
            }
        }
    }

    /// The gradients of modules whose low-rank products lie beside their input `x`: those of all adapters, then each base weight's
    /// part of `dx`. False: they do not lie there, and nothing is done. Modules as place, module, gradient of its output.
    fn low_rank_backward(
        &mut self,
        l: usize,
        modules: &[(usize, LinearIds, TensorId)],
        x: Option<TensorId>,
        dx: Option<TensorId>,
        a: &LayerActs,
    ) -> bool {
        let adapted: Vec<AdaptedModule> = modules
            .iter()
            .filter_map(|&(m, linear, dy)| {
                Some(AdaptedModule { linear, first: self.beside(l, m)?.first, dy, dropped: self.dropped[m] })
            })
            .collect();
        modules.iter().for_each(|&(m, ..)| self.dropped[m] = None);
        let (Some(x), Some(first), Some(&(m, ..))) = (x, adapted.first(), modules.first()) else { return false };
        let in_features = first.linear.in_features;
        self.push(Op::LoraBackward(LoraBackward { x, in_features, xa: a.low_rank[m], modules: adapted, dx }));
        for &(_, linear, dy) in modules {
            let base = LinearIds { lora: None, ..linear };
            self.linear_backward(base, None, None, dy, dx, true);
        }
        true
    }

    /// Whether the gradients of any of these modules need their input.
    fn any_learns(&self, l: usize, places: std::ops::RangeInclusive<usize>) -> bool {
        self.layout.layers[l].linears[places].iter().flatten().any(|m| self.learns(m))
    }

    /// Whether the module's gradients need its input.
    fn learns(&self, linear: &LinearIds) -> bool {
        linear.grad.is_some() || linear.lora.is_some()
    }

    fn grad_act(&mut self, l: usize, what: &str, width: usize, wanted: bool) -> Option<TensorId> {
        wanted.then(|| self.act(&format!("layer {l} {what} gradient"), Stage::ActivationGradients, width))
    }

    /// The low-rank products beside an input that was made again, for its modules' gradients: those that were kept, or new ones.
    fn low_rank_again(&mut self, l: usize, m: usize, x: TensorId, a: &LayerActs) {
        if a.low_rank[m].is_none() {
            self.low_rank(l, m, x, Gradients::Next);
        }
    }

    /// The input of the modules from place `m` on, if their gradients need it: what was kept, or `x` normed again.
    fn normed_again(
        &mut self,
        l: usize,
        m: usize,
        a: &LayerActs,
        at: &str,
        (x, rstd): (TensorId, TensorId),
        norm: NormIds,
    ) -> Option<TensorId> {
        let kept = a.normed[usize::from(m == GATE)];
        if !self.any_learns(l, siblings(m)) || kept.is_some() {
            return kept;
        }
        let row = self.input_row(l, m, self.hidden());
        let out = self.act(&format!("layer {l} {at} normed again"), Stage::Activations, row);
        let offset = self.spec.norm_offset();
        self.push(Op::Rescale(Rescale { x, rstd, weight: norm.weight, offset, out }));
        self.low_rank_again(l, m, out, a);
        Some(out)
    }

    fn norm_backward(&mut self, dout: TensorId, x: TensorId, rstd: TensorId, norm: NormIds, dx: TensorId) {
        self.norm_gradient(dout, x, rstd, norm, dx, true);
    }

    fn norm_gradient(
        &mut self,
        dout: TensorId,
        x: TensorId,
        rstd: TensorId,
        norm: NormIds,
        dx: TensorId,
        accumulate: bool,
    ) {
        let (NormIds { weight, grad }, offset) = (norm, self.spec.norm_offset());
        self.push(Op::RmsnormBackward(RmsnormBackward { dout, x, rstd, weight, offset, dx, accumulate, grad }));
    }

    fn linear_backward(
        &mut self,
        linear: LinearIds,
        x: Option<TensorId>,
        xa: Option<TensorId>,
        dy: TensorId,
        dx: Option<TensorId>,
        accumulate: bool,
    ) {
        let learns = self.learns(&linear);
        if learns || dx.is_some() {
            let x = if learns { x } else { None };
            self.push(Op::LinearBackward(LinearBackward { linear, x, xa, dy, dx, accumulate }));
        }
    }

    fn loss(&mut self, x: TensorId, dx: Option<TensorId>) {
        let NormIds { weight, grad } = self.layout.lm_head;
        let labels = self.ids.labels.expect("phases with a loss have labels");
        let (loss, chunk) = (self.layout.loss, self.cfg.ce_chunk.min(self.tokens));
        let grad = if dx.is_some() { grad } else { None };
        let softcap = self.final_softcap();
        self.push(Op::LmHeadCe(LmHeadCe { x, weight, labels, dx, grad, loss, chunk, softcap }));
    }

    fn final_softcap(&self) -> Option<f32> {
        self.spec.final_logit_softcapping.map(|cap| cap as f32)
    }

    fn evaluate(mut self) -> Vec<Op> {
        let (_, _, normed, _) = self.forward(0);
        self.loss(normed, None);
        self.ops
    }

    fn logits(mut self) -> Vec<Op> {
        let (_, _, normed, _) = self.forward(0);
        let chunk = self.cfg.ce_chunk.min(self.tokens);
        self.all_logits(normed, chunk, false);
        self.ops
    }

    fn generate(mut self, context: usize) -> Vec<Op> {
        let shape = [context, self.spec.num_key_value_heads, self.spec.head_dim];
        for l in 0..self.spec.num_hidden_layers {
            let mut cache = |which: &str| {
                let name = format!("layer {l} {which} cache");
                self.regions.within(Phase::Generate, &name, Stage::KvCache, self.cfg.compute_dtype, &shape)
            };
            let pair = (cache("key"), cache("value"));
            self.caches.push(pair);
        }
        let (_, _, normed, _) = self.forward(0);
        self.all_logits(normed, 1, true);
        self.ops
    }

    fn all_logits(&mut self, x: TensorId, chunk: usize, last_only: bool) {
        let weight = self.layout.lm_head.weight;
        let shape = [chunk, self.spec.vocab_size];
        let logits = self.regions.within(self.phase, "logits", Stage::Activations, DType::F32, &shape);
        let softcap = self.final_softcap();
        self.push(Op::LmHeadLogits(LmHeadLogits { x, weight, logits, chunk, last_only, softcap }));
    }
}
