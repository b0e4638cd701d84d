//! The tensors of a model under a method: weights, adapters, gradients, optimizer state.

use std::collections::{BTreeMap, HashSet};

use candle_core::DType;

use super::ops::{Bias, Dequantize, LinearIds, Lora, Magnitude, Moments, NestedAbsmax, TensorId, Weight};
use super::optimizer::MIN_8BIT_SIZE;
use crate::model::{LinearModule, ModelSpec};
use crate::nf4;
use crate::plan::{DeviceKind, Lifetime, Method, Phase, PlanConfig, Region, Space, Stage};

/// A paged optimizer keeps tensors of at least this many elements on the host (bitsandbytes `optimizer.py`).
pub const MIN_PAGED_SIZE: usize = 100_000;

/// Bytes that cuBLASLt gets for its workspace on a GPU: what NVIDIA recommends for Hopper.
pub(crate) const MATMUL_WORKSPACE: usize = 32 << 20;

/// One tensor that the optimizer updates.
#[derive(Clone, Debug)]
pub struct Trainable {
    /// The name in a checkpoint of the run: `<module>.lora_A.weight` or the weight's own name.
    pub name: String,
    /// The f32 parameter (the master copy where there is one).
    pub param: TensorId,
    /// The copy in the compute dtype, where the parameter is a master copy.
    pub copy: Option<TensorId>,
    /// Accumulated gradient.
    pub grad: TensorId,
    /// Optimizer state: in the arena, or on the host when paged.
    pub moments: Moments,
    /// The state lives on the host.
    pub paged: bool,
    /// Weight decay applies.
    pub decay: bool,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

/// Where the base weight of a checkpoint tensor goes.
#[derive(Clone, Debug)]
pub struct WeightSlot {
    /// Key in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Dense or 4-bit regions.
    pub weight: Weight,
    /// The f32 master copy, when there is one.
    pub master: Option<TensorId>,
}

/// A norm's weight and its gradient.
#[derive(Clone, Copy, Debug)]
pub struct NormIds {
    /// `[C]`.
    pub weight: TensorId,
    /// f32 `[C]` in full fine-tuning.
    pub grad: Option<TensorId>,
}

/// The tensors of one decoder layer.
#[derive(Clone, Debug)]
pub struct LayerIds {
    /// Before attention.
    pub input_norm: NormIds,
    /// Of attention's output, before it is added to the stream (Gemma 2).
    pub attention_out_norm: Option<NormIds>,
    /// Before the MLP.
    pub post_norm: NormIds,
    /// Of the MLP's output, before it is added to the stream (Gemma 2).
    pub mlp_out_norm: Option<NormIds>,
    /// Of each head of q and of k (Qwen3), `[D]`.
    pub qk_norm: Option<[NormIds; 2]>,
    /// q, k, v, o, gate, up, down. A module that computes several side by side stands in the place of the first, and the
    /// others' are empty.
    pub linears: [Option<LinearIds>; 7],
    /// The same as training computes with them, where their weights are held dequantized beside the 4-bit ones.
    pub dequantized: Option<[Option<LinearIds>; 7]>,
}

/// The places of [`LayerIds::linears`] that a layer's modules have, in the order of [`ModelSpec::linears`].
pub(super) fn places(spec: &ModelSpec) -> &'static [usize] {
    if spec.family.is_fused() { &[0, 3, 4, 6] } else { &[0, 1, 2, 3, 4, 5, 6] }
}

/// Every tensor that outlives a phase, and how to find it.
#[derive(Clone, Debug)]
pub struct Layout {
    /// All regions; a [`TensorId`] is an index.
    pub regions: Vec<Region>,
    /// Embedding table `[V, C]` and its gradient.
    pub embedding: NormIds,
    /// Decoder layers.
    pub layers: Vec<LayerIds>,
    /// The last norm.
    pub norm: NormIds,
    /// `lm_head` `[V, C]` (the embedding table when tied) and its gradient.
    pub lm_head: NormIds,
    /// f32 `[D / 2]`, or `[2, D / 2]`: the second row for texts beyond [`ModelSpec::rope_switch`].
    pub inv_freq: TensorId,
    /// What the optimizer updates, in the order of the network.
    pub trainables: Vec<Trainable>,
    /// Where the base weights go, in the order of the network.
    pub weights: Vec<WeightSlot>,
    /// To be executed once the weights are there: fills those that are held dequantized.
    pub dequantize: Vec<Dequantize>,
    /// The adapter's matrices by module name.
    pub adapters: BTreeMap<String, Lora>,
    /// u8: cuBLASLt's workspace, and what a load streams through; on a GPU.
    pub workspace: Option<TensorId>,
    /// f64 `[2]`: gradient norm and clip factor.
    pub grad_norm: TensorId,
    /// f64 `[2]`: sum of token losses and number of tokens of the last micro-batch.
    pub loss: TensorId,
}

/// Collects regions.
pub(super) struct Regions {
    pub list: Vec<Region>,
}

impl Regions {
    pub fn persistent(&mut self, name: &str, stage: Stage, dtype: DType, shape: &[usize]) -> TensorId {
        self.push(name, stage, dtype, shape, Space::Device, Lifetime::Persistent)
    }

    pub fn host(&mut self, name: &str, stage: Stage, dtype: DType, shape: &[usize]) -> TensorId {
        self.push(name, stage, dtype, shape, Space::Host, Lifetime::Persistent)
    }

    /// A region whose lifetime the phase's program will tell.
    pub fn within(&mut self, phase: Phase, name: &str, stage: Stage, dtype: DType, shape: &[usize]) -> TensorId {
        let lifetime = Lifetime::Within { phase, first: u32::MAX, last: 0 };
        self.push(name, stage, dtype, shape, Space::Device, lifetime)
    }

    fn push(
        &mut self,
        name: &str,
        stage: Stage,
        dtype: DType,
        shape: &[usize],
        space: Space,
        lifetime: Lifetime,
    ) -> TensorId {
        let id = TensorId(self.list.len() as u32);
        self.list.push(Region { name: name.into(), stage, dtype, shape: shape.into(), space, lifetime, offset: 0 });
        id
    }
}

/// Builds the layout piece by piece.
struct Builder<'a> {
    cfg: &'a PlanConfig,
    targets: &'a HashSet<String>,
    regions: Regions,
    trainables: Vec<Trainable>,
    weights: Vec<WeightSlot>,
    adapters: BTreeMap<String, Lora>,
}

/// The persistent tensors of `spec` under `cfg`; `targets` are the modules that get an adapter.
pub(crate) fn layout(spec: &ModelSpec, cfg: &PlanConfig, targets: &HashSet<String>) -> Layout {
    let mut b = Builder {
        cfg,
        targets,
        regions: Regions { list: Vec::new() },
        trainables: Vec::new(),
        weights: Vec::new(),
        adapters: BTreeMap::new(),
    };
    let (v, c) = (spec.vocab_size, spec.hidden_size);
    let embedding = if cfg.host_embeddings {
        b.on_host("model.embed_tokens.weight", &[v, c])
    } else {
        b.dense("model.embed_tokens.weight", &[v, c], true)
    };
    let linears = spec.linears();
    let mut layers = Vec::with_capacity(spec.num_hidden_layers);
    let places = places(spec);
    for (l, modules) in linears.chunks_exact(places.len()).enumerate() {
        let norms: Vec<NormIds> =
            spec.norms().iter().map(|norm| b.dense(&format!("model.layers.{l}.{norm}.weight"), &[c], false)).collect();
        let (input_norm, attention_out_norm, post_norm, mlp_out_norm) = match norms[..] {
            [input, attention_out, mlp, mlp_out] => (input, Some(attention_out), mlp, Some(mlp_out)),
            _ => (norms[0], None, norms[1], None),
        };
        let mut linears = [None; 7];
        for (&place, m) in places.iter().zip(modules) {
            linears[place] = Some(b.linear(m, (l * 7 + place) as u32));
        }
        let qk_norm = spec.has_qk_norm().then(|| {
            ["q_norm", "k_norm"]
                .map(|n| b.dense(&format!("model.layers.{l}.self_attn.{n}.weight"), &[spec.head_dim], false))
        });
        let dequantized = None;
        layers.push(LayerIds {
            input_norm,
            attention_out_norm,
            post_norm,
            mlp_out_norm,
            qk_norm,
            linears,
            dequantized,
        });
    }
    let norm = b.dense("model.norm.weight", &[c], false);
    let workspace = (cfg.device == DeviceKind::Cuda)
        .then(|| b.regions.persistent("matrix-product workspace", Stage::Scratch, DType::U8, &[MATMUL_WORKSPACE]));
    let lm_head = if spec.tie_word_embeddings { embedding } else { b.dense("lm_head.weight", &[v, c], true) };
    let r = &mut b.regions;
    let rows = if spec.rope_switch().is_some() { 2 } else { 1 };
    let inv_freq = r.persistent("rotary frequencies", Stage::Batch, DType::F32, &[rows, spec.head_dim / 2]);
    let grad_norm = r.persistent("gradient norm", Stage::Batch, DType::F64, &[2]);
    let loss = r.persistent("loss", Stage::Batch, DType::F64, &[2]);
    Layout {
        regions: b.regions.list,
        embedding,
        layers,
        norm,
        lm_head,
        inv_freq,
        workspace,
        trainables: b.trainables,
        weights: b.weights,
        dequantize: Vec::new(),
        adapters: b.adapters,
        grad_norm,
        loss,
    }
}

impl Builder<'_> {
    /// A dense weight, trained in full fine-tuning.
    fn dense(&mut self, name: &str, shape: &[usize], decay: bool) -> NormIds {
        let dtype = self.cfg.compute_dtype;
        let weight = self.regions.persistent(name, Stage::Weights, dtype, shape);
        let mut slot =
            WeightSlot { name: name.into(), shape: shape.into(), weight: Weight::Dense { w: weight }, master: None };
        let mut grad = None;
        if self.cfg.method.is_full() {
            let pure = self.cfg.method == Method::FullPureBf16;
            if dtype != DType::F32 && !pure {
                slot.master = Some(self.regions.persistent(name, Stage::MasterWeights, DType::F32, shape));
            }
            let param = slot.master.unwrap_or(weight);
            grad = Some(self.trainable(name, param, slot.master.map(|_| weight), shape, decay));
        }
        self.weights.push(slot);
        NormIds { weight, grad }
    }

    /// A frozen dense weight in host memory.
    fn on_host(&mut self, name: &str, shape: &[usize]) -> NormIds {
        let weight = self.regions.host(name, Stage::Weights, self.cfg.compute_dtype, shape);
        let slot =
            WeightSlot { name: name.into(), shape: shape.into(), weight: Weight::Dense { w: weight }, master: None };
        self.weights.push(slot);
        NormIds { weight, grad: None }
    }

    /// A linear module of a decoder layer, with its adapter if it is a target.
    fn linear(&mut self, m: &LinearModule, index: u32) -> LinearIds {
        let name = format!("{}.weight", m.name);
        let shape = [m.out_features, m.in_features];
        let (weight, grad) = match self.cfg.quantization {
            None => {
                let ids = self.dense(&name, &shape, true);
                (Weight::Dense { w: ids.weight }, ids.grad)
            }
            Some(q) => (self.quantized(&name, &shape, q), None),
        };
        let bias = m.bias.then(|| {
            let NormIds { weight: b, grad } = self.dense(&format!("{}.bias", m.name), &[m.out_features], false);
            Bias { b, grad }
        });
        let lora = self.targets.contains(&m.name).then(|| self.lora(m, index));
        LinearIds { out_features: m.out_features, in_features: m.in_features, weight, grad, bias, lora }
    }

    fn quantized(&mut self, name: &str, shape: &[usize], config: nf4::Nf4Config) -> Weight {
        let n = shape[0] * shape[1];
        let bytes = nf4::storage(n, config);
        let r = &mut self.regions;
        let packed = r.persistent(name, Stage::Weights, DType::U8, &[bytes.packed as usize]);
        let blocks = n.div_ceil(config.blocksize);
        let absmax_dtype = if config.double_quant { DType::U8 } else { DType::F32 };
        let absmax = r.persistent(&format!("{name}.absmax"), Stage::Weights, absmax_dtype, &[blocks]);
        let nested = config.double_quant.then(|| {
            let groups = blocks.div_ceil(config.nested_blocksize);
            NestedAbsmax {
                absmax: r.persistent(&format!("{name}.nested_absmax"), Stage::Weights, DType::F32, &[groups]),
                offset: r.persistent(&format!("{name}.nested_offset"), Stage::Weights, DType::F32, &[1]),
            }
        });
        let weight = Weight::Nf4 { packed, absmax, nested, config };
        self.weights.push(WeightSlot { name: name.into(), shape: shape.into(), weight, master: None });
        weight
    }

    fn lora(&mut self, m: &LinearModule, module: u32) -> Lora {
        let cfg = self.cfg.lora.as_ref().expect("targets exist only with an adapter");
        let cfg = cfg.of(&m.name).expect("the patterns were checked with the configuration");
        let (a_name, b_name) = (format!("{}.lora_A.weight", m.name), format!("{}.lora_B.weight", m.name));
        let (a_shape, b_shape) = ([cfg.r, m.in_features], [m.out_features, cfg.r]);
        let a = self.regions.persistent(&a_name, Stage::Adapters, DType::F32, &a_shape);
        let b = self.regions.persistent(&b_name, Stage::Adapters, DType::F32, &b_shape);
        let grads = (self.cfg.method != Method::Inference).then(|| {
            (self.trainable(&a_name, a, None, &a_shape, true), self.trainable(&b_name, b, None, &b_shape, true))
        });
        let magnitude = cfg.use_dora.then(|| {
            let (name, shape) = (format!("{}.lora_magnitude_vector", m.name), [m.out_features]);
            let id = self.regions.persistent(&name, Stage::Adapters, DType::F32, &shape);
            let grad = grads.map(|_| self.trainable(&name, id, None, &shape, true));
            Magnitude { m: id, grad }
        });
        let (scaling, dropout) = (cfg.scaling() as f32, cfg.lora_dropout as f32);
        let lora = Lora { a, b, grads, r: cfg.r, scaling, dropout, module, magnitude };
        self.adapters.insert(m.name.clone(), lora);
        lora
    }

    /// Declares gradient and optimizer state of a parameter; the gradient's id.
    fn trainable(
        &mut self,
        name: &str,
        param: TensorId,
        copy: Option<TensorId>,
        shape: &[usize],
        decay: bool,
    ) -> TensorId {
        let n: usize = shape.iter().product();
        let pure = self.cfg.method == Method::FullPureBf16;
        let dtype = if pure { DType::BF16 } else { DType::F32 };
        let grad = self.regions.persistent(name, Stage::Gradients, dtype, shape);
        let optim = self.cfg.optim;
        let paged = optim.is_paged() && !self.cfg.resident_state && n >= MIN_PAGED_SIZE;
        let r = &mut self.regions;
        let mut state = |part: &str, dtype: DType, shape: &[usize]| {
            let name = format!("{name} {part}");
            if paged {
                r.host(&name, Stage::OptimizerState, dtype, shape)
            } else {
                r.persistent(&name, Stage::OptimizerState, dtype, shape)
            }
        };
        let moments = if optim.is_8bit() && n >= MIN_8BIT_SIZE {
            let (state1, state2) = (state("state1", DType::U8, shape), state("state2", DType::U8, shape));
            // bitsandbytes pages the codes alone: the scales are small and stay on the device.
            let blocks = [n.div_ceil(256)];
            Moments::Blockwise8bit {
                state1,
                absmax1: r.persistent(&format!("{name} absmax1"), Stage::OptimizerState, DType::F32, &blocks),
                state2,
                absmax2: r.persistent(&format!("{name} absmax2"), Stage::OptimizerState, DType::F32, &blocks),
            }
        } else {
            Moments::F32 {
                exp_avg: state("exp_avg", dtype, shape),
                exp_avg_sq: state("exp_avg_sq", dtype, shape),
                bitsandbytes: optim.is_8bit() || optim.is_paged(),
            }
        };
        self.trainables.push(Trainable {
            name: name.into(),
            param,
            copy,
            grad,
            moments,
            paged,
            decay,
            shape: shape.into(),
        });
        grad
    }
}
