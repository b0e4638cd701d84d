//! The decoder's forward and backward pass, written once: each phase as a list of operations.
//!
//! The residual stream is carried as a sum that is made inside the next norm: a layer reads `residual` and the `delta`
//! that the layer before it produced, adds them, and norms the sum ([`AddRmsnorm`]).
//!
//! What a layer keeps for the backward pass is what [`LayerActs`] names. The outputs of RMSNorm and SwiGLU are not kept:
//! they cost one pass over memory to make again.

use candle_core::DType;

use super::layout::{Layout, NormIds, Regions};
use super::ops::*;
use crate::model::ModelSpec;
use crate::plan::{Lifetime, Phase, PlanConfig, Stage};

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

const Q: usize = 0;
const K: usize = 1;
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
    q: TensorId,
    k: TensorId,
    v: TensorId,
    /// `[T, H, D]`: attention's output.
    o: TensorId,
    lse: TensorId,
    /// `[T, C]`: residual stream between attention and MLP.
    middle: TensorId,
    middle_rstd: TensorId,
    gate: TensorId,
    up: TensorId,
    /// `dropout(x) A^T` of the seven modules.
    xa: [Option<TensorId>; 7],
    /// SwiGLU's output, when the backward pass comes right after it (recomputation).
    swiglu: Option<TensorId>,
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
    heads: Heads,
    ops: Vec<Op>,
    ids: BatchIds,
    /// In generation: the caches of each layer.
    caches: Vec<(TensorId, TensorId)>,
    /// The modules of the layer that is recomputed now, with the weights that are decoded for it and its backward pass.
    decoded: Option<(usize, [LinearIds; 7])>,
    /// Where the inputs of recomputed layers wait on the host.
    offloaded: Vec<TensorId>,
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
    let mut out = Programs::default();
    if trains {
        out.micro_step = Pass::new(spec, cfg, layout, &mut regions, Phase::MicroStep, cfg.capacity()).micro_step();
        out.optimizer = optimizer(layout, &mut regions);
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

/// The update of every trained tensor; state that lives on the host passes through windows.
fn optimizer(layout: &Layout, regions: &mut Regions) -> Vec<Op> {
    let grads: Vec<TensorId> = layout.trainables.iter().map(|t| t.grad).collect();
    let norm = layout.grad_norm;
    let mut ops = vec![Op::GradNorm(GradNorm { grads: grads.clone(), norm })];
    for t in &layout.trainables {
        let mut moments = t.moments;
        let mut pages = Vec::new();
        if t.paged {
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
        let heads = Heads {
            q: spec.num_attention_heads,
            kv: spec.num_key_value_heads,
            dim: spec.head_dim,
            window: spec.sliding_window,
        };
        let (ops, caches, offloaded) = (Vec::new(), Vec::new(), Vec::new());
        Pass { spec, cfg, layout, regions, phase, tokens, heads, ops, ids, caches, decoded: None, offloaded }
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

    /// Loads the batch and embeds it: the residual stream at the first layer.
    fn embed(&mut self, stage: Stage) -> TensorId {
        let BatchIds { tokens, positions, cu_seqlens, labels } = self.ids;
        self.push(Op::LoadBatch(LoadBatch { tokens, positions, labels, cu_seqlens }));
        let out = self.act("layer 0 input", stage, self.hidden());
        let table = self.layout.embedding.weight;
        self.push(Op::Embedding(Embedding { table, tokens, out }));
        out
    }

    fn add_norm(
        &mut self,
        residual: TensorId,
        delta: Option<(TensorId, TensorId)>,
        norm: NormIds,
        at: &str,
    ) -> (TensorId, TensorId) {
        let out = self.act(&format!("{at} normed"), Stage::Activations, self.hidden());
        let rstd = self.stat(&format!("{at} rstd"), 1);
        self.push(Op::AddRmsnorm(AddRmsnorm {
            residual,
            delta: delta.map(|d| d.0),
            sum: delta.map(|d| d.1),
            weight: norm.weight,
            out,
            rstd,
        }));
        (out, rstd)
    }

    /// The modules of layer `l`.
    fn linears(&self, l: usize) -> [LinearIds; 7] {
        match self.decoded {
            Some((of, linears)) if of == l => linears,
            _ => self.layout.layers[l].linears,
        }
    }

    /// Decodes the 4-bit weights that both the recomputation and the backward pass of layer `l` read.
    fn decode(&mut self, l: usize) {
        let mut linears = self.layout.layers[l].linears;
        // Not the last: its product is not recomputed.
        for (m, linear) in linears.iter_mut().enumerate().take(DOWN) {
            if matches!(linear.weight, Weight::Nf4 { .. }) {
                let shape = [linear.out_features, linear.in_features];
                let name = format!("layer {l} weight {m} decoded");
                let out = self.regions.within(self.phase, &name, Stage::Scratch, self.cfg.compute_dtype, &shape);
                self.push(Op::Dequantize(Dequantize { weight: linear.weight, out }));
                linear.weight = Weight::Dense { w: out };
            }
        }
        self.decoded = Some((l, linears));
    }

    /// A linear module of layer `l`; `(y, xa)`.
    fn linear(&mut self, l: usize, m: usize, x: TensorId, at: &str) -> (TensorId, Option<TensorId>) {
        let linear = self.linears(l)[m];
        let y = self.act(at, Stage::Activations, linear.out_features);
        let xa = self.lora_a(&linear, at);
        self.push(Op::Linear(Linear { linear, x, y: Some(y), xa }));
        (y, xa)
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
        let (n1, input_rstd) = self.add_norm(residual, delta, ids.input_norm, &at("attention"));
        let input = delta.map_or(residual, |d| d.1);
        let offloads = last && l < self.offloaded.len();
        if offloads {
            self.push(Op::Offload(Offload { device: input, host: self.offloaded[l] }));
        }
        let mut xa = [None; 7];
        let (q, k, v);
        (q, xa[Q]) = self.linear(l, Q, n1, &at("q"));
        (k, xa[K]) = self.linear(l, K, n1, &at("k"));
        (v, xa[V]) = self.linear(l, V, n1, &at("v"));
        let (heads, positions, inv_freq) = (self.heads, self.ids.positions, self.layout.inv_freq);
        self.push(Op::Rotary(Rotary { q, k, positions, inv_freq, inverse: false, heads }));
        let (o, lse) = self.attend(l, q, k, v);
        let (attn, attn_xa) = self.linear(l, O, o, &at("attention output"));
        xa[O] = attn_xa;
        let middle = self.act(&at("middle"), Stage::Activations, self.hidden());
        let (n2, middle_rstd) = self.add_norm(input, Some((attn, middle)), ids.post_norm, &at("mlp"));
        let (gate, up);
        (gate, xa[GATE]) = self.linear(l, GATE, n2, &at("gate"));
        (up, xa[UP]) = self.linear(l, UP, n2, &at("up"));
        let h = self.swiglu(l, gate, up);
        let (mut down, mut swiglu) = (None, None);
        if last {
            let (y, down_xa) = self.linear(l, DOWN, h, &at("down"));
            (down, xa[DOWN]) = (Some(y), down_xa);
        } else {
            swiglu = Some(h);
            let linear = ids.linears[DOWN];
            xa[DOWN] = self.lora_a(&linear, &at("down"));
            if xa[DOWN].is_some() {
                self.push(Op::Linear(Linear { linear, x: h, y: None, xa: xa[DOWN] }));
            }
        }
        if offloads {
            self.push(Op::Transferred(Transferred { device: input }));
        }
        let acts = LayerActs { input, input_rstd, q, k, v, o, lse, middle, middle_rstd, gate, up, xa, swiglu };
        (acts, down)
    }

    fn attend(&mut self, l: usize, q: TensorId, k: TensorId, v: TensorId) -> (TensorId, TensorId) {
        let heads = self.heads;
        let out = self.act(&format!("layer {l} attention heads"), Stage::Activations, heads.q * heads.dim);
        let cu_seqlens = self.ids.cu_seqlens;
        if let Some(&(k_cache, v_cache)) = self.caches.get(l) {
            let positions = self.ids.positions;
            self.push(Op::CachedAttention(CachedAttention { q, k, v, out, k_cache, v_cache, positions, heads }));
            return (out, out);
        }
        let lse = self.stat(&format!("layer {l} lse"), heads.q);
        self.push(Op::Attention(Attention { q, k, v, out, lse, cu_seqlens, heads }));
        (out, lse)
    }

    fn swiglu(&mut self, l: usize, gate: TensorId, up: TensorId) -> TensorId {
        let out = self.act(&format!("layer {l} swiglu"), Stage::Activations, self.spec.intermediate_size);
        self.push(Op::Swiglu(Swiglu { gate, up, out }));
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
        let recomputed = self.cfg.checkpointing.recomputed(self.spec.num_hidden_layers);
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
            dx: dres,
            accumulate: false,
            grad,
        }));
        let mut fetched = None;
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
                if self.cfg.keep_dequantized {
                    self.decode(l);
                }
                self.layer(l, next.unwrap_or(acts[l].input), None, false).0
            } else {
                acts[l]
            };
            self.layer_backward(l, &acts, dres);
        }
        if let Some(grad) = self.layout.embedding.grad {
            let tokens = self.ids.tokens;
            self.push(Op::EmbeddingBackward(EmbeddingBackward { tokens, dout: dres, grad }));
        }
        self.ops
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
            layer.linears.iter().enumerate().any(|(m, linear)| linear.lora.is_some() && (i, order(m)) < (l, group))
        })
    }

    /// From the gradient of the layer's output (in `dres`) to that of its input (in `dres` again).
    fn layer_backward(&mut self, l: usize, a: &LayerActs, dres: TensorId) {
        let ids = self.layout.layers[l].clone();
        let [_, _, _, o, gate, up, down] = self.linears(l);
        let mlp_reads_norm = self.learns(&gate) || self.learns(&up);
        // MLP
        let h = match a.swiglu {
            _ if !self.learns(&down) => None,
            Some(h) => Some(h),
            None => Some(self.swiglu(l, a.gate, a.up)),
        };
        let dh = self.grad_act(l, "swiglu", self.spec.intermediate_size, self.trained_before(l, 3));
        self.linear_backward(down, h, a.xa[DOWN], dres, dh, false);
        let Some(dh) = dh else { return };
        self.push(Op::SwigluBackward(SwigluBackward { gate: a.gate, up: a.up, dout: dh }));
        let n2 = self.renorm(l, "mlp", a.middle, a.middle_rstd, ids.post_norm, mlp_reads_norm);
        let dn2 = self.grad_act(l, "mlp normed", self.hidden(), self.trained_before(l, 2));
        self.linear_backward(gate, n2, a.xa[GATE], a.gate, dn2, false);
        self.linear_backward(up, n2, a.xa[UP], a.up, dn2, true);
        let Some(dn2) = dn2 else { return };
        self.norm_backward(dn2, a.middle, a.middle_rstd, ids.post_norm, dres);
        // Attention
        let heads = self.heads;
        let do_ = self.grad_act(l, "attention heads", heads.q * heads.dim, self.trained_before(l, 1));
        let x = self.learns(&o).then_some(a.o);
        self.linear_backward(o, x, a.xa[O], dres, do_, false);
        let Some(dout) = do_ else { return };
        let dq = self.act(&format!("layer {l} q gradient"), Stage::ActivationGradients, heads.q * heads.dim);
        let dk = self.act(&format!("layer {l} k gradient"), Stage::ActivationGradients, heads.kv * heads.dim);
        let dv = self.act(&format!("layer {l} v gradient"), Stage::ActivationGradients, heads.kv * heads.dim);
        let (cu_seqlens, positions, inv_freq) = (self.ids.cu_seqlens, self.ids.positions, self.layout.inv_freq);
        let LayerActs { q, k, v, o: out, lse, .. } = *a;
        self.push(Op::AttentionBackward(AttentionBackward { q, k, v, out, lse, cu_seqlens, dout, dq, dk, dv, heads }));
        self.push(Op::Rotary(Rotary { q: dq, k: dk, positions, inv_freq, inverse: true, heads }));
        self.qkv_backward(l, a, [dq, dk, dv], dres);
    }

    fn qkv_backward(&mut self, l: usize, a: &LayerActs, dy: [TensorId; 3], dres: TensorId) {
        let ids = self.layout.layers[l].clone();
        let linears = self.linears(l);
        let learns = linears[..3].iter().any(|m| self.learns(m));
        let n1 = self.renorm(l, "attention", a.input, a.input_rstd, ids.input_norm, learns);
        let dn1 = self.grad_act(l, "attention normed", self.hidden(), self.trained_before(l, 0));
        for m in [Q, K, V] {
            self.linear_backward(linears[m], n1, a.xa[m], dy[m], dn1, m != Q);
        }
        if let Some(dn1) = dn1 {
            self.norm_backward(dn1, a.input, a.input_rstd, ids.input_norm, dres);
        }
    }

    /// Whether the module's gradients need its input.
    fn learns(&self, linear: &LinearIds) -> bool {
        linear.grad.is_some() || linear.lora.is_some()
    }

    fn grad_act(&mut self, l: usize, what: &str, width: usize, wanted: bool) -> Option<TensorId> {
        wanted.then(|| self.act(&format!("layer {l} {what} gradient"), Stage::ActivationGradients, width))
    }

    fn renorm(
        &mut self,
        l: usize,
        at: &str,
        x: TensorId,
        rstd: TensorId,
        norm: NormIds,
        wanted: bool,
    ) -> Option<TensorId> {
        wanted.then(|| {
            let out = self.act(&format!("layer {l} {at} normed again"), Stage::Activations, self.hidden());
            self.push(Op::Rescale(Rescale { x, rstd, weight: norm.weight, out }));
            out
        })
    }

    fn norm_backward(&mut self, dout: TensorId, x: TensorId, rstd: TensorId, norm: NormIds, dx: TensorId) {
        let NormIds { weight, grad } = norm;
        self.push(Op::RmsnormBackward(RmsnormBackward { dout, x, rstd, weight, dx, accumulate: true, grad }));
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
        self.push(Op::LmHeadCe(LmHeadCe { x, weight, labels, dx, grad, loss, chunk }));
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
        let shape = [context, self.heads.kv, self.heads.dim];
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
        self.push(Op::LmHeadLogits(LmHeadLogits { x, weight, logits, chunk, last_only }));
    }
}
