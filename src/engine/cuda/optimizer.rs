//! Gradient norm and updates. Twin of `cpu/optimizer.rs`: f32 parameters get the same bits from the same norm.

use candle_core::DType;

use super::CudaOps;
use super::gpu::{Arg, Gpu, Launch};
use super::nf4::strided;
use super::scratch::NORM_BLOCKS;
use crate::engine::ops::{AdamW, GradNorm, Moments, Scratch, TensorId};
use crate::engine::optimizer::{AdamWHyper, BnbCoefficients, STATE_BLOCKSIZE, TorchCoefficients};
use crate::{Error, Result};

/// An address and the dtype of what lies there: f32 or bf16.
#[derive(Clone, Copy, Debug)]
pub(super) struct Array {
    pub ptr: u64,
    pub dtype: DType,
}

/// The state of a parameter: see [`Moments`].
#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    /// Both of one dtype.
    Full { exp_avg: Array, exp_avg_sq: Array, bitsandbytes: bool },
    /// Addresses.
    Blockwise8bit { state1: u64, absmax1: u64, state2: u64, absmax2: u64 },
}

/// What an update touches: `n` parameters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    pub param: Array,
    /// bf16 copy of the parameters.
    pub copy: Option<u64>,
    pub grad: Array,
    pub state: State,
    pub n: usize,
    /// f64 `[2]`: the second is the clip factor.
    pub norm: u64,
}

/// One AdamW step; `h.grad_scale` is not read, the clip factor takes its place.
pub(super) fn adamw(gpu: &Gpu, u: &Update, h: &AdamWHyper) -> Result<()> {
    let dtypes = (u.param.dtype, u.grad.dtype);
    let ptr = Arg::Ptr;
    let front = [ptr(u.param.ptr), ptr(u.copy.unwrap_or(0)), ptr(u.grad.ptr)];
    let back = [Arg::U64(u.n as u64), ptr(u.norm)];
    let unknown = || {
        Error::new("no update kernel for these dtypes")
            .expected("f32 parameters, or bf16 parameters, gradients and state")
            .found(format!("{u:?}"))
    };
    match u.state {
        State::Full { exp_avg, exp_avg_sq, bitsandbytes } => {
            let kernel = match (dtypes, exp_avg.dtype, bitsandbytes) {
                ((DType::F32, DType::F32), DType::F32, false) => "adamw",
                ((DType::F32, DType::F32), DType::F32, true) => "adamw_32bit_bnb",
                ((DType::F32, DType::BF16), DType::F32, false) => "adamw_f32_bf16_f32",
                ((DType::F32, DType::BF16), DType::F32, true) => "adamw_32bit_bnb_f32_bf16_f32",
                ((DType::BF16, DType::BF16), DType::BF16, false) => "adamw_bf16_bf16_bf16",
                ((DType::BF16, DType::BF16), DType::BF16, true) => "adamw_32bit_bnb_bf16_bf16_bf16",
                _ => return Err(unknown()),
            };
            let scalars = if bitsandbytes { bnb(h) } else { torch(h) };
            let moments = [ptr(exp_avg.ptr), ptr(exp_avg_sq.ptr)];
            let args = [&front[..], &moments, &back, &scalars].concat();
            // Four elements a thread.
            gpu.launch("optimizer", kernel, strided(gpu, u.n.div_ceil(256 * 4)), &args)
        }
        State::Blockwise8bit { state1, absmax1, state2, absmax2 } => {
            let kernel = match dtypes {
                (DType::F32, DType::F32) => "adamw_8bit",
                (DType::F32, DType::BF16) => "adamw_8bit_f32_bf16",
                (DType::BF16, DType::BF16) => "adamw_8bit_bf16_bf16",
                _ => return Err(unknown()),
            };
            let moments = [state1, absmax1, state2, absmax2].map(ptr);
            let args = [&front[..], &moments, &back, &bnb(h)].concat();
            // A warp per block of state, eight warps.
            gpu.launch("optimizer", kernel, strided(gpu, u.n.div_ceil(STATE_BLOCKSIZE * 8)), &args)
        }
    }
}

/// In the order of the kernels' arguments.
fn torch(h: &AdamWHyper) -> [Arg; 7] {
    let c = TorchCoefficients::new(h);
    [c.decay, c.one_minus_beta1, c.beta2, c.one_minus_beta2, c.step_size, c.root_correction2, c.eps].map(Arg::F32)
}

fn bnb(h: &AdamWHyper) -> [Arg; 7] {
    let c = BnbCoefficients::new(h);
    [c.beta1, c.one_minus_beta1, c.beta2, c.one_minus_beta2, c.step_size, c.eps, c.decay].map(Arg::F32)
}

/// Thread blocks, and so partial sums, for a gradient of `n` elements: by its size alone, so that the bits are the same
/// on every card.
fn norm_blocks(n: usize) -> usize {
    n.div_ceil(1 << 14).clamp(1, NORM_BLOCKS)
}

/// `norm[0]` = the L2 norm of the gradients, `norm[1]` = the clip factor; both are read back, and wait for the stream.
/// `partials`: f64, [`NORM_BLOCKS`] for each gradient.
pub(super) fn grad_norm(
    gpu: &Gpu,
    grads: impl Iterator<Item = (Array, usize)>,
    partials: u64,
    limit: f64,
    norm: u64,
) -> Result<[f64; 2]> {
    let mut count = 0;
    for (g, n) in grads {
        let kernel = if g.dtype == DType::BF16 { "sum_of_squares_bf16" } else { "sum_of_squares_f32" };
        let blocks = norm_blocks(n);
        let args = [Arg::Ptr(g.ptr), Arg::U64(n as u64), Arg::Ptr(partials + (count * size_of::<f64>()) as u64)];
        gpu.launch("optimizer", kernel, Launch { grid: [blocks as u32, 1, 1], block: 1024, shared: 0 }, &args)?;
        count += blocks;
    }
    let args = [Arg::Ptr(partials), Arg::U32(count as u32), Arg::F64(limit), Arg::Ptr(norm)];
    gpu.launch("optimizer", "grad_norm_finish", Launch { grid: [1, 1, 1], block: 1024, shared: 0 }, &args)?;
    let mut found = [0f64; 2];
    gpu.read(norm, bytemuck::cast_slice_mut(&mut found))?;
    Ok(found)
}

impl CudaOps {
    fn array(&self, id: TensorId) -> Array {
        Array { ptr: self.ptr(id), dtype: self.region(id).dtype }
    }

    pub(super) fn global_norm(&self, op: &GradNorm, scratch: Scratch) -> Result<()> {
        let grads = op.grads.iter().map(|&g| (self.array(g), self.region(g).numel()));
        let [norm, _] = grad_norm(&self.gpu, grads, self.at(scratch), self.state.max_grad_norm, self.ptr(op.norm))?;
        if norm.is_finite() {
            return Ok(());
        }
        // Before anything is updated: the parameters are whole.
        Err(Error::new("the gradient norm is not finite")
            .expected("a finite number")
            .found(norm.to_string())
            .next("lower the learning rate, then Run::resume"))
    }

    pub(super) fn update(&self, op: &AdamW) -> Result<()> {
        let mut h: AdamWHyper = self.state.adamw;
        if !op.decay {
            h.weight_decay = 0.0;
        }
        let state = match op.moments {
            Moments::F32 { exp_avg, exp_avg_sq, bitsandbytes } => {
                State::Full { exp_avg: self.array(exp_avg), exp_avg_sq: self.array(exp_avg_sq), bitsandbytes }
            }
            Moments::Blockwise8bit { state1, absmax1, state2, absmax2 } => {
                let [state1, absmax1, state2, absmax2] = [state1, absmax1, state2, absmax2].map(|id| self.ptr(id));
                State::Blockwise8bit { state1, absmax1, state2, absmax2 }
            }
        };
        let update = Update {
            param: self.array(op.param),
            copy: op.copy.map(|id| self.ptr(id)),
            grad: self.array(op.grad),
            state,
            n: self.region(op.param).numel(),
            norm: self.ptr(op.norm),
        };
        adamw(&self.gpu, &update, &h)
    }
}
