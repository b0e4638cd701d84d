//! The operations of a training step, each as a value, and the trait that a device implements.
//!
//! A phase of the schedule (micro-step, optimizer, evaluate, generate) is a list of [`Op`]s built once from the model and
//! the method. The plan reads that list to learn when each tensor is first and last used; a backend executes the very
//! same list. So the plan and the engine cannot disagree.
//!
//! Shape letters: T tokens of the micro-batch (flat, without padding), C hidden size, H query heads, K key/value heads,
//! D head size, F intermediate size, V vocabulary, R rank, S cached positions. Matrices are row-major.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::model::Activation;
use crate::nf4::Nf4Config;

/// A tensor of the plan: an index into its regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TensorId(pub u32);

impl TensorId {
    /// The position in the list of regions.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// How the weight of a linear module is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weight {
    /// `[out, in]` in the compute dtype.
    Dense {
        /// The matrix.
        w: TensorId,
    },
    /// 4-bit blocks.
    Nf4 {
        /// u8 `[ceil(out * in / 2)]`, the first element in the high nibble.
        packed: TensorId,
        /// One scale per block: f32, or u8 codes when nested.
        absmax: TensorId,
        /// The second level of scales.
        nested: Option<NestedAbsmax>,
        /// Block sizes and kind.
        config: Nf4Config,
    },
}

/// The second level of nested quantization.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NestedAbsmax {
    /// f32, one per `nested_blocksize` codes.
    pub absmax: TensorId,
    /// f32 `[1]`: the mean that was subtracted.
    pub offset: TensorId,
}

/// The LoRA pair of a linear module: `y += scaling * B (A dropout(x))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// f32 `[R, in]`.
    pub a: TensorId,
    /// f32 `[out, R]`.
    pub b: TensorId,
    /// Accumulated gradients of `a` and `b`, f32; `None` when nothing is trained.
    pub grads: Option<(TensorId, TensorId)>,
    /// R.
    pub r: usize,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.
    pub scaling: f32,
    /// Probability that an input element is dropped in training.
    pub dropout: f32,
    /// A number of its own for each module: the dropout masks differ.
    pub module: u32,
    /// DoRA: the rows of `W + scaling * B A` get these lengths.
    pub magnitude: Option<Magnitude>,
}

/// DoRA's learnt lengths of the rows of a weight (arXiv 2402.09353): the module computes
/// `y = m / n * (x W^T + scaling * (x A^T) B^T) + b` with `n` the lengths of the rows of `W + scaling * B A`, through which
/// no gradient goes (section 4.3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Magnitude {
    /// f32 `[out]`.
    pub m: TensorId,
    /// Accumulated gradient, f32; `None` when nothing is trained.
    pub grad: Option<TensorId>,
}

/// What a linear module adds to its product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bias {
    /// `[out]`.
    pub b: TensorId,
    /// Accumulated gradient, f32 or the compute dtype (full fine-tuning).
    pub grad: Option<TensorId>,
}

/// A linear module: `y = x W^T + b`, plus LoRA.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearIds {
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// The base weight.
    pub weight: Weight,
    /// Accumulated gradient of the weight, f32 or the compute dtype (full fine-tuning).
    pub grad: Option<TensorId>,
    /// The bias, which stays dense.
    pub bias: Option<Bias>,
    /// The adapter.
    pub lora: Option<Lora>,
}

/// Sizes of the attention heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// H: query heads.
    pub q: usize,
    /// K: key and value heads.
    pub kv: usize,
    /// D: head size.
    pub dim: usize,
    /// Tokens that a token can see, itself included; `None`: all before it.
    pub window: Option<usize>,
}

/// From the products of queries and keys to the scores of the softmax: `scale * q k^T`, and with a soft cap
/// `cap * tanh(scale * q k^T / cap)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Factor of the products.
    pub scale: f32,
    /// The soft cap.
    pub softcap: Option<f32>,
}

impl Score {
    /// `1 / sqrt(D)` and no cap.
    pub fn of(dim: usize) -> Self {
        Score { scale: 1.0 / (dim as f32).sqrt(), softcap: None }
    }

    /// Whether it is [`Score::of`] this head size: what the fastest kernels compute.
    pub fn is_plain(&self, dim: usize) -> bool {
        *self == Score::of(dim)
    }
}

/// Where the optimizer keeps the state of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moments {
    /// f32 `exp_avg` and `exp_avg_sq`, as `torch.optim.AdamW`.
    F32 {
        /// First moment.
        exp_avg: TensorId,
        /// Second moment.
        exp_avg_sq: TensorId,
        /// The update in bitsandbytes' order (decay after the step) instead of torch's.
        bitsandbytes: bool,
    },
    /// Blockwise 8-bit states of bitsandbytes, 256 elements per scale.
    Blockwise8bit {
        /// u8 codes of the first moment (signed dynamic map).
        state1: TensorId,
        /// f32 scales of the first moment.
        absmax1: TensorId,
        /// u8 codes of the second moment (unsigned dynamic map).
        state2: TensorId,
        /// f32 scales of the second moment.
        absmax2: TensorId,
    },
}

/// The host's batch arrives: `tokens`, `positions`, `labels` i32 `[T]`, `cu_seqlens` u32 `[B + 1]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadBatch {
    /// Token ids, u32 `[T]`.
    pub tokens: TensorId,
    /// Positions inside each example, u32 `[T]`.
    pub positions: TensorId,
    /// Targets, i32 `[T]`, -100 where there is none; absent in generation.
    pub labels: Option<TensorId>,
    /// Where each example starts, u32 `[B + 1]`.
    pub cu_seqlens: TensorId,
}

/// `out[t] = scale * table[tokens[t]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// `[V, C]`.
    pub table: TensorId,
    /// u32 `[T]`.
    pub tokens: TensorId,
    /// `[T, C]`.
    pub out: TensorId,
    /// 1 but in Gemma.
    pub scale: f32,
}

/// `grad[tokens[t]] += scale * dout[t]`, in the order of t for each row.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingBackward {
    /// u32 `[T]`.
    pub tokens: TensorId,
    /// `[T, C]`.
    pub dout: TensorId,
    /// f32 `[V, C]`.
    pub grad: TensorId,
    /// That of the forward pass.
    pub scale: f32,
}

/// `sum = residual + delta`; `out = sum * rstd * (weight + offset)`, `rstd = 1 / sqrt(mean(sum^2) + eps)`.
///
/// The width of a norm is that of its weight: activations `[T, H D]` under a weight `[D]` are normed head by head.
#[derive(Clone, Debug, PartialEq)]
pub struct AddRmsnorm {
    /// `[T, C]`.
    pub residual: TensorId,
    /// `[T, C]`; nothing is added when absent.
    pub delta: Option<TensorId>,
    /// Where the sum goes, `[T, C]`; absent when nothing is added.
    pub sum: Option<TensorId>,
    /// `[C]`.
    pub weight: TensorId,
    /// Added to the weight: 1 in Gemma, else 0.
    pub offset: f32,
    /// `[T, C]`.
    pub out: TensorId,
    /// f32 `[T]`.
    pub rstd: TensorId,
}

/// `out = x * rstd * (weight + offset)` again, from what was kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Rescale {
    /// `[T, C]`.
    pub x: TensorId,
    /// f32 `[T]`.
    pub rstd: TensorId,
    /// `[C]`.
    pub weight: TensorId,
    /// Added to the weight.
    pub offset: f32,
    /// `[T, C]`.
    pub out: TensorId,
}

/// The gradient through RMSNorm: `dx += ...` (or `dx = ...`), `grad += ...`.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsnormBackward {
    /// `[T, C]`: gradient of the normed output.
    pub dout: TensorId,
    /// `[T, C]`: what was normed.
    pub x: TensorId,
    /// f32 `[T]`.
    pub rstd: TensorId,
    /// `[C]`.
    pub weight: TensorId,
    /// Added to the weight.
    pub offset: f32,
    /// `[T, C]`.
    pub dx: TensorId,
    /// Add to `dx` instead of overwriting it.
    pub accumulate: bool,
    /// f32 `[C]`, when the norm is trained.
    pub grad: Option<TensorId>,
}

/// `y = x W^T + b + scaling * (dropout(x) A^T) B^T`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// The module.
    pub linear: LinearIds,
    /// `[T, in]`.
    pub x: TensorId,
    /// `[T, out]`; absent when only `xa` is wanted (recomputation of a module whose output nobody reads).
    pub y: Option<TensorId>,
    /// `dropout(x) A^T`, `[T, R]`, kept for the backward pass.
    pub xa: Option<TensorId>,
    /// `dropout(x) A^T` is there already: columns of `x` from this one on, written by [`Op::LoraA`]. `xa` is absent.
    pub beside: Option<usize>,
}

/// Columns that `x A^T` of rank `r` takes beside `x`: whole vectors of 16 bytes in bf16. What is beyond R is zero.
pub fn low_rank_columns(r: usize) -> usize {
    r.next_multiple_of(8)
}

/// A LoRA pair whose low-rank product lies in columns of its module's input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beside {
    /// The pair.
    pub lora: Lora,
    /// Its first column: `in` or more, a multiple of 8.
    pub first: usize,
}

impl Beside {
    /// One past its last column.
    pub fn end(&self) -> usize {
        self.first + low_rank_columns(self.lora.r)
    }

    /// Elements from row to row of a matrix that ends with these columns: whole cache lines in bf16.
    pub fn row(&self) -> usize {
        self.end().next_multiple_of(64)
    }
}

impl Linear {
    /// The module's pair with its place beside `x`, if it lies there.
    pub fn low_rank(&self) -> Option<Beside> {
        self.linear.lora.zip(self.beside).map(|(lora, first)| Beside { lora, first })
    }
}

/// `x[:, first..] = dropout(x[:, ..in]) A^T` for modules that read the same `x`: one product for all of them. The base product of a
/// 4-bit weight takes these columns along, `[x | x A^T] [W | scaling B]^T`, so that LoRA costs no product of its own there.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraA {
    /// `[T, row]`, `row` at least `in` and all low-rank columns.
    pub x: TensorId,
    /// in.
    pub in_features: usize,
    /// The pairs; their columns do not overlap.
    pub adapters: Vec<Beside>,
    /// Where each pair's dropped input is kept for [`LoraBackward`], if the backend keeps it; empty where nothing is kept.
    pub dropped: Vec<Dropped>,
    /// `[T, low-rank columns of all]`: where these columns are written as well, for a [`LoraBackward`] that finds `x` made again
    /// without them.
    pub kept: Option<TensorId>,
}

/// An input with a module's dropout applied, and which of its elements were kept. Written and read in training alone; `in` is a multiple
/// of 8.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropped {
    /// `[T, in]`.
    pub input: TensorId,
    /// u8 `[T, in / 8]`: bit `i % 8` of byte `i / 8` of a row stands for its element `i`.
    pub mask: TensorId,
}

/// A module in [`LoraBackward`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptedModule {
    /// The module, with its LoRA pair.
    pub linear: LinearIds,
    /// Where its low-rank columns begin in `x`.
    pub first: usize,
    /// `[T, out]`.
    pub dy: TensorId,
    /// Its dropped input, where [`LoraA`] kept it; otherwise it is made again, to the same numbers.
    pub dropped: Option<Dropped>,
}

/// The adapters' gradients of modules that read the same `x`, and their part of `dx`:
/// `dxa = scaling dy B`, `grad B += scaling dy^T (x A^T)`, `grad A += dxa^T dropout(x)`, `dx = sum of dropout'(dxa A)`.
/// The base weights' part is [`LinearBackward`]'s, which adds to `dx`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraBackward {
    /// `[T, row]`, with the low-rank columns of [`LoraA`] unless `xa` has them.
    pub x: TensorId,
    /// in.
    pub in_features: usize,
    /// `[T, low-rank columns of all]`: what [`LoraA`] kept of the same modules, in their order.
    pub xa: Option<TensorId>,
    /// The modules.
    pub modules: Vec<AdaptedModule>,
    /// `[T, in]`; absent where nothing before it is trained.
    pub dx: Option<TensorId>,
}

/// `dx (+)= dy W + scaling * dropout'((dy B) A)`; gradients of A, B or of W and b are added to.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearBackward {
    /// The module.
    pub linear: LinearIds,
    /// `[T, in]`; absent when nothing of the module is trained.
    pub x: Option<TensorId>,
    /// `[T, R]`.
    pub xa: Option<TensorId>,
    /// `[T, out]`.
    pub dy: TensorId,
    /// `[T, in]`; absent where nothing before it is trained.
    pub dx: Option<TensorId>,
    /// Add to `dx` instead of overwriting it.
    pub accumulate: bool,
}

/// The columns of `whole` side by side as tensors of their own: q, k and v of one product.
#[derive(Clone, Debug, PartialEq)]
pub struct SplitColumns {
    /// `[T, sum of widths]`.
    pub whole: TensorId,
    /// `[T, width]` each.
    pub parts: Vec<TensorId>,
}

/// The way back: `whole` from its `parts`.
#[derive(Clone, Debug, PartialEq)]
pub struct JoinColumns {
    /// `[T, width]` each.
    pub parts: Vec<TensorId>,
    /// `[T, sum of widths]`.
    pub whole: TensorId,
}

/// Rotates `q` and `k` in place by their positions (half-split form), backwards when `inverse`, and multiplies them by
/// `scale`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// `[T, H, D]`.
    pub q: TensorId,
    /// `[T, K, D]`.
    pub k: TensorId,
    /// u32 `[T]`.
    pub positions: TensorId,
    /// f32 `[D / 2]`, or `[2, D / 2]` where long texts have frequencies of their own: radians per position.
    pub inv_freq: TensorId,
    /// The gradient: rotate by the negative angle.
    pub inverse: bool,
    /// Factor of cosine and sine: 1 but in YaRN and LongRoPE.
    pub scale: f32,
    /// Head sizes.
    pub heads: Heads,
}

/// Causal attention inside each example of `cu_seqlens`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// `[T, H, D]`.
    pub q: TensorId,
    /// `[T, K, D]`.
    pub k: TensorId,
    /// `[T, K, D]`.
    pub v: TensorId,
    /// `[T, H, D]`.
    pub out: TensorId,
    /// f32 `[T, H]`: log of the sum of exponentials, for the backward pass.
    pub lse: TensorId,
    /// u32 `[B + 1]`.
    pub cu_seqlens: TensorId,
    /// Head sizes.
    pub heads: Heads,
    /// How products become scores.
    pub score: Score,
}

/// Gradients of attention from what the forward pass kept.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionBackward {
    /// `[T, H, D]`.
    pub q: TensorId,
    /// `[T, K, D]`.
    pub k: TensorId,
    /// `[T, K, D]`.
    pub v: TensorId,
    /// `[T, H, D]`.
    pub out: TensorId,
    /// f32 `[T, H]`.
    pub lse: TensorId,
    /// u32 `[B + 1]`.
    pub cu_seqlens: TensorId,
    /// `[T, H, D]`.
    pub dout: TensorId,
    /// `[T, H, D]`.
    pub dq: TensorId,
    /// `[T, K, D]`.
    pub dk: TensorId,
    /// `[T, K, D]`.
    pub dv: TensorId,
    /// Head sizes.
    pub heads: Heads,
    /// How products become scores.
    pub score: Score,
}

/// Attention of new tokens over a cache; their keys and values are appended first.
#[derive(Clone, Debug, PartialEq)]
pub struct CachedAttention {
    /// `[T, H, D]`.
    pub q: TensorId,
    /// `[T, K, D]`.
    pub k: TensorId,
    /// `[T, K, D]`.
    pub v: TensorId,
    /// `[T, H, D]`.
    pub out: TensorId,
    /// `[S, K, D]`.
    pub k_cache: TensorId,
    /// `[S, K, D]`.
    pub v_cache: TensorId,
    /// u32 `[T]`.
    pub positions: TensorId,
    /// Head sizes.
    pub heads: Heads,
    /// How products become scores.
    pub score: Score,
}

/// `out = act(gate) * up`.
#[derive(Clone, Debug, PartialEq)]
pub struct Swiglu {
    /// `[T, F]`.
    pub gate: TensorId,
    /// `[T, F]`.
    pub up: TensorId,
    /// `[T, F]`.
    pub out: TensorId,
    /// act.
    pub activation: Activation,
}

/// In place: `gate` becomes its gradient, `up` becomes its gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct SwigluBackward {
    /// `[T, F]`.
    pub gate: TensorId,
    /// `[T, F]`.
    pub up: TensorId,
    /// `[T, F]`.
    pub dout: TensorId,
    /// act.
    pub activation: Activation,
}

/// Cross-entropy of `x W^T` against the labels, chunk by chunk, never holding all logits; rows without a label cost
/// nothing. Writes `loss` and, in training, writes `dx` and adds to `grad`, both scaled by 1 / num_items.
#[derive(Clone, Debug, PartialEq)]
pub struct LmHeadCe {
    /// `[T, C]`.
    pub x: TensorId,
    /// `[V, C]`.
    pub weight: TensorId,
    /// i32 `[T]`.
    pub labels: TensorId,
    /// `[T, C]`, in training.
    pub dx: Option<TensorId>,
    /// f32 `[V, C]`, when `lm_head` is trained.
    pub grad: Option<TensorId>,
    /// f64 `[2]`: sum of the token losses, number of tokens.
    pub loss: TensorId,
    /// Rows of logits held at a time.
    pub chunk: usize,
    /// Logits become `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

/// Logits of the last token, or (chunk by chunk, to the host) of all tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct LmHeadLogits {
    /// `[T, C]`.
    pub x: TensorId,
    /// `[V, C]`.
    pub weight: TensorId,
    /// f32 `[rows, V]`.
    pub logits: TensorId,
    /// Rows of logits held at a time.
    pub chunk: usize,
    /// Only the last token's.
    pub last_only: bool,
    /// Logits become `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

/// `norm[0]` = the global L2 norm of the gradients, `norm[1]` = the factor that clips it to `max_grad_norm`.
#[derive(Clone, Debug, PartialEq)]
pub struct GradNorm {
    /// The gradients, f32.
    pub grads: Vec<TensorId>,
    /// f64 `[2]`.
    pub norm: TensorId,
}

/// One AdamW update of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// The parameter, f32 (the master copy where there is one).
    pub param: TensorId,
    /// The same parameter in the compute dtype, where that is another tensor.
    pub copy: Option<TensorId>,
    /// The accumulated gradient.
    pub grad: TensorId,
    /// f64 `[2]` of [`Op::GradNorm`].
    pub norm: TensorId,
    /// The state.
    pub moments: Moments,
    /// Weight decay applies (norms and biases are exempt).
    pub decay: bool,
}

/// Copies optimizer state from the host into a window of the arena.
#[derive(Clone, Debug, PartialEq)]
pub struct PageIn {
    /// On the host.
    pub host: TensorId,
    /// In the arena.
    pub window: TensorId,
}

/// Copies it back.
#[derive(Clone, Debug, PartialEq)]
pub struct PageOut {
    /// In the arena.
    pub window: TensorId,
    /// On the host.
    pub host: TensorId,
}

/// Starts to copy a tensor to the host, beside what follows; it stays as it is until [`Transferred`].
#[derive(Clone, Debug, PartialEq)]
pub struct Offload {
    /// In the arena.
    pub device: TensorId,
    /// On the host, of the same shape.
    pub host: TensorId,
}

/// Starts to copy it back, beside what follows; it is there after [`Transferred`].
#[derive(Clone, Debug, PartialEq)]
pub struct Fetch {
    /// On the host.
    pub host: TensorId,
    /// In the arena.
    pub device: TensorId,
}

/// What follows waits for the copy of a tensor that [`Offload`] or [`Fetch`] started.
#[derive(Clone, Debug, PartialEq)]
pub struct Transferred {
    /// In the arena.
    pub device: TensorId,
}

/// A 4-bit weight in the compute dtype, for several products.
#[derive(Clone, Debug, PartialEq)]
pub struct Dequantize {
    /// In 4 bits.
    pub weight: Weight,
    /// in.
    pub in_features: usize,
    /// `[out, row]`: `row` is `in`, or long enough for the columns of `lora`.
    pub out: TensorId,
    /// Beside the weight, `scaling B`: zeros up to `first`, then B's columns.
    pub lora: Option<Beside>,
}

/// B beside a weight that is held dequantized: `out[:, in..end] = [0 | scaling B]`, zeros up to `first`, as [`Dequantize`] writes it. The
/// weight stays, B changes with every step: f32 `[out, R]`, scaled and rounded to the compute dtype.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraB {
    /// The pair, with its first column.
    pub lora: Beside,
    /// in.
    pub in_features: usize,
    /// `[out, row]` in the compute dtype: the weight, and room for `lora`'s columns.
    pub out: TensorId,
}

/// Sets accumulated gradients to zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Zero {
    /// The tensors.
    pub tensors: Vec<TensorId>,
}

/// One operation: what it reads and writes. The method of [`Ops`] with the same name executes it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Op {
    LoadBatch(LoadBatch),
    Embedding(Embedding),
    EmbeddingBackward(EmbeddingBackward),
    AddRmsnorm(AddRmsnorm),
    Rescale(Rescale),
    RmsnormBackward(RmsnormBackward),
    Linear(Linear),
    LinearBackward(LinearBackward),
    LoraA(LoraA),
    LoraBackward(LoraBackward),
    SplitColumns(SplitColumns),
    JoinColumns(JoinColumns),
    Rotary(Rotary),
    Attention(Attention),
    AttentionBackward(AttentionBackward),
    CachedAttention(CachedAttention),
    Swiglu(Swiglu),
    SwigluBackward(SwigluBackward),
    LmHeadCe(LmHeadCe),
    LmHeadLogits(LmHeadLogits),
    GradNorm(GradNorm),
    AdamW(AdamW),
    PageIn(PageIn),
    PageOut(PageOut),
    Offload(Offload),
    Fetch(Fetch),
    Transferred(Transferred),
    Dequantize(Dequantize),
    LoraB(LoraB),
    Zero(Zero),
}

/// What a device implements: one method per operation. Shapes and meaning are at the struct of the same name.
///
/// `scratch` is the space inside the arena that the backend's scratch function asked for.
#[allow(missing_docs)]
pub trait Ops {
    fn load_batch(&mut self, op: &LoadBatch) -> Result<()>;
    fn embedding(&mut self, op: &Embedding) -> Result<()>;
    fn embedding_backward(&mut self, op: &EmbeddingBackward) -> Result<()>;
    fn add_rmsnorm(&mut self, op: &AddRmsnorm) -> Result<()>;
    fn rescale(&mut self, op: &Rescale) -> Result<()>;
    fn rmsnorm_backward(&mut self, op: &RmsnormBackward, scratch: Scratch) -> Result<()>;
    fn linear(&mut self, op: &Linear, scratch: Scratch) -> Result<()>;
    fn linear_backward(&mut self, op: &LinearBackward, scratch: Scratch) -> Result<()>;
    fn lora_a(&mut self, op: &LoraA, scratch: Scratch) -> Result<()>;
    fn lora_backward(&mut self, op: &LoraBackward, scratch: Scratch) -> Result<()>;
    fn split_columns(&mut self, op: &SplitColumns) -> Result<()>;
    fn join_columns(&mut self, op: &JoinColumns) -> Result<()>;
    fn rotary(&mut self, op: &Rotary) -> Result<()>;
    fn attention(&mut self, op: &Attention) -> Result<()>;
    fn attention_backward(&mut self, op: &AttentionBackward, scratch: Scratch) -> Result<()>;
    fn cached_attention(&mut self, op: &CachedAttention) -> Result<()>;
    fn swiglu(&mut self, op: &Swiglu) -> Result<()>;
    fn swiglu_backward(&mut self, op: &SwigluBackward) -> Result<()>;
    fn lm_head_ce(&mut self, op: &LmHeadCe, scratch: Scratch) -> Result<()>;
    fn lm_head_logits(&mut self, op: &LmHeadLogits) -> Result<()>;
    fn grad_norm(&mut self, op: &GradNorm, scratch: Scratch) -> Result<()>;
    fn adamw(&mut self, op: &AdamW) -> Result<()>;
    fn page_in(&mut self, op: &PageIn) -> Result<()>;
    fn page_out(&mut self, op: &PageOut) -> Result<()>;
    fn offload(&mut self, op: &Offload) -> Result<()>;
    fn fetch(&mut self, op: &Fetch) -> Result<()>;
    fn transferred(&mut self, op: &Transferred) -> Result<()>;
    fn dequantize(&mut self, op: &Dequantize) -> Result<()>;
    fn lora_b(&mut self, op: &LoraB) -> Result<()>;
    fn zero(&mut self, op: &Zero) -> Result<()>;

    /// Called before each operation: whatever waits may be started.
    ///
    /// # Errors
    /// What the device reports.
    fn before(&mut self, _: &Op) -> Result<()> {
        Ok(())
    }

    /// Executes one operation.
    ///
    /// # Errors
    /// What the device reports.
    fn run(&mut self, op: &Op, scratch: Scratch) -> Result<()> {
        self.before(op)?;
        match op {
            Op::LoadBatch(op) => self.load_batch(op),
            Op::Embedding(op) => self.embedding(op),
            Op::EmbeddingBackward(op) => self.embedding_backward(op),
            Op::AddRmsnorm(op) => self.add_rmsnorm(op),
            Op::Rescale(op) => self.rescale(op),
            Op::RmsnormBackward(op) => self.rmsnorm_backward(op, scratch),
            Op::Linear(op) => self.linear(op, scratch),
            Op::LinearBackward(op) => self.linear_backward(op, scratch),
            Op::LoraA(op) => self.lora_a(op, scratch),
            Op::LoraBackward(op) => self.lora_backward(op, scratch),
            Op::SplitColumns(op) => self.split_columns(op),
            Op::JoinColumns(op) => self.join_columns(op),
            Op::Rotary(op) => self.rotary(op),
            Op::Attention(op) => self.attention(op),
            Op::AttentionBackward(op) => self.attention_backward(op, scratch),
            Op::CachedAttention(op) => self.cached_attention(op),
            Op::Swiglu(op) => self.swiglu(op),
            Op::SwigluBackward(op) => self.swiglu_backward(op),
            Op::LmHeadCe(op) => self.lm_head_ce(op, scratch),
            Op::LmHeadLogits(op) => self.lm_head_logits(op),
            Op::GradNorm(op) => self.grad_norm(op, scratch),
            Op::AdamW(op) => self.adamw(op),
            Op::PageIn(op) => self.page_in(op),
            Op::PageOut(op) => self.page_out(op),
            Op::Offload(op) => self.offload(op),
            Op::Fetch(op) => self.fetch(op),
            Op::Transferred(op) => self.transferred(op),
            Op::Dequantize(op) => self.dequantize(op),
            Op::LoraB(op) => self.lora_b(op),
            Op::Zero(op) => self.zero(op),
        }
    }
}

/// Space for one operation's temporaries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    /// Offset in the arena, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Op {
    /// The operation's name, as the field and the profile call it.
    pub fn name(&self) -> &'static str {
        match self {
            Op::LoadBatch(_) => "load_batch",
            Op::Embedding(_) => "embedding",
            Op::EmbeddingBackward(_) => "embedding_backward",
            Op::AddRmsnorm(_) => "add_rmsnorm",
            Op::Rescale(_) => "rescale",
            Op::RmsnormBackward(_) => "rmsnorm_backward",
            Op::Linear(_) => "linear",
            Op::LinearBackward(_) => "linear_backward",
            Op::LoraA(_) => "lora_a",
            Op::LoraBackward(_) => "lora_backward",
            Op::SplitColumns(_) => "split_columns",
            Op::JoinColumns(_) => "join_columns",
            Op::Rotary(_) => "rotary",
            Op::Attention(_) => "attention",
            Op::AttentionBackward(_) => "attention_backward",
            Op::CachedAttention(_) => "cached_attention",
            Op::Swiglu(_) => "swiglu",
            Op::SwigluBackward(_) => "swiglu_backward",
            Op::LmHeadCe(_) => "lm_head_ce",
            Op::LmHeadLogits(_) => "lm_head_logits",
            Op::GradNorm(_) => "grad_norm",
            Op::AdamW(_) => "adamw",
            Op::PageIn(_) => "page_in",
            Op::PageOut(_) => "page_out",
            Op::Offload(_) => "offload",
            Op::Fetch(_) => "fetch",
            Op::Transferred(_) => "transferred",
            Op::Dequantize(_) => "dequantize",
            Op::LoraB(_) => "lora_b",
            Op::Zero(_) => "zero",
        }
    }
}
