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

/// Updates of one launch, at most: their table has to fit into a kernel's arguments (4 KiB).
const MANY_UPDATES: usize = 48;

/// Arrays of one launch, at most.
const MANY_ARRAYS: usize = 128;

/// AdamW steps of many parameters, in few launches; `grad_scale` is not read, the clip factor takes its place. The
/// hyper-parameters may differ in `weight_decay` alone.
pub(super) fn adamw(gpu: &Gpu, updates: &[(Update, AdamWHyper)]) -> Result<()> {
    let mut rest = updates;
    while let Some((u, h)) = rest.first() {
        let kernel = kernel(u)?;
        let mut same = 0;
        while same < rest.len().min(MANY_UPDATES)
            && self::kernel(&rest[same].0)? == kernel
            && rest[same].0.norm == u.norm
        {
            same += 1;
        }
        let (now, later) = rest.split_at(same);
        rest = later;
        let torch = matches!(u.state, State::Full { bitsandbytes: false, .. });
        let eight_bit = matches!(u.state, State::Blockwise8bit { .. });
        // Elements of a unit of work: four a thread, or a warp per block of state.
        let unit = if eight_bit { STATE_BLOCKSIZE * 8 } else { 256 * 4 };
        let mut units = 0;
        let mut first = Vec::with_capacity(now.len());
        let mut table = Vec::with_capacity(4096);
        for (u, h) in now {
            let decay = if torch { TorchCoefficients::new(h).decay } else { BnbCoefficients::new(h).decay };
            let [s1, s2, absmax1, absmax2] = match u.state {
                State::Full { exp_avg, exp_avg_sq, .. } => [exp_avg.ptr, exp_avg_sq.ptr, 0, 0],
                State::Blockwise8bit { state1, absmax1, state2, absmax2 } => [state1, state2, absmax1, absmax2],
            };
            let words = [u.param.ptr, u.copy.unwrap_or(0), u.grad.ptr, s1, s2, absmax1, absmax2, u.n as u64];
            words.iter().for_each(|w| table.extend_from_slice(&w.to_ne_bytes()));
            table.extend_from_slice(&decay.to_ne_bytes());
            table.extend_from_slice(&0u32.to_ne_bytes());
            first.push(units as u32);
            units += u.n.div_ceil(unit);
        }
        table.resize(MANY_UPDATES * 72, 0);
        push_index(&mut table, &first, MANY_UPDATES, units);
        let scalars = if torch { torch_scalars(h) } else { bnb_scalars(h) };
        let args = [&[Arg::Ptr(u.norm)], &scalars[..]].concat();
        gpu.launch_with("optimizer", kernel, strided(gpu, units), &table, &args)?;
    }
    Ok(())
}

/// The end of a table: where each item's units start, how many items, how many units.
fn push_index(table: &mut Vec<u8>, first: &[u32], many: usize, units: usize) {
    let all = first.iter().copied().chain(std::iter::repeat(u32::MAX)).take(many);
    for x in all.chain([first.len() as u32, units as u32]) {
        table.extend_from_slice(&x.to_ne_bytes());
    }
}

/// The table of arrays that `sum_of_squares` and `zero` take: address, length, number of units of work.
fn arrays_table(arrays: &[(u64, usize, usize)]) -> (Vec<u8>, usize) {
    let mut table = Vec::with_capacity(4096);
    let mut column = |values: &mut dyn Iterator<Item = u64>| {
        for x in values.chain(std::iter::repeat(0)).take(MANY_ARRAYS) {
            table.extend_from_slice(&x.to_ne_bytes());
        }
    };
    column(&mut arrays.iter().map(|a| a.0));
    column(&mut arrays.iter().map(|a| a.1 as u64));
    let mut units = 0;
    let mut first = Vec::with_capacity(arrays.len());
    for a in arrays {
        first.push(units as u32);
        units += a.2;
    }
    push_index(&mut table, &first, MANY_ARRAYS, units);
    (table, units)
}

/// The kernel for an update's dtypes.
fn kernel(u: &Update) -> Result<&'static str> {
    let dtypes = (u.param.dtype, u.grad.dtype);
    let name = match u.state {
        State::Full { exp_avg, bitsandbytes, .. } => match (dtypes, exp_avg.dtype, bitsandbytes) {
            ((DType::F32, DType::F32), DType::F32, false) => "adamw",
            ((DType::F32, DType::F32), DType::F32, true) => "adamw_32bit_bnb",
            ((DType::F32, DType::BF16), DType::F32, false) => "adamw_f32_bf16_f32",
            ((DType::F32, DType::BF16), DType::F32, true) => "adamw_32bit_bnb_f32_bf16_f32",
            ((DType::BF16, DType::BF16), DType::BF16, false) => "adamw_bf16_bf16_bf16",
            ((DType::BF16, DType::BF16), DType::BF16, true) => "adamw_32bit_bnb_bf16_bf16_bf16",
            _ => "",
        },
        State::Blockwise8bit { .. } => match dtypes {
            (DType::F32, DType::F32) => "adamw_8bit",
            (DType::F32, DType::BF16) => "adamw_8bit_f32_bf16",
            (DType::BF16, DType::BF16) => "adamw_8bit_bf16_bf16",
            _ => "",
        },
    };
    if name.is_empty() {
        return Err(Error::new("no update kernel for these dtypes")
            .expected("f32 parameters, or bf16 parameters, gradients and state")
            .found(format!("{u:?}")));
    }
    Ok(name)
}

/// In the order of the kernels' arguments.
fn torch_scalars(h: &AdamWHyper) -> [Arg; 6] {
    let c = TorchCoefficients::new(h);
    [c.one_minus_beta1, c.beta2, c.one_minus_beta2, c.step_size, c.root_correction2, c.eps].map(Arg::F32)
}

fn bnb_scalars(h: &AdamWHyper) -> [Arg; 6] {
    let c = BnbCoefficients::new(h);
    [c.beta1, c.one_minus_beta1, c.beta2, c.one_minus_beta2, c.step_size, c.eps].map(Arg::F32)
}

/// Sets arrays (address, bytes) to zero.
pub(super) fn zero(gpu: &Gpu, arrays: &[(u64, usize)]) -> Result<()> {
    for some in arrays.chunks(MANY_ARRAYS) {
        let some: Vec<_> = some.iter().map(|&(start, bytes)| (start, bytes, bytes.div_ceil(1 << 14))).collect();
        let (table, units) = arrays_table(&some);
        if units > 0 {
            gpu.launch_with("optimizer", "zero", strided(gpu, units), &table, &[])?;
        }
    }
    Ok(())
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
    let grads: Vec<(Array, usize)> = grads.collect();
    for same in grads.chunk_by(|a, b| a.0.dtype == b.0.dtype) {
        let kernel = if same[0].0.dtype == DType::BF16 { "sum_of_squares_bf16" } else { "sum_of_squares_f32" };
        for some in same.chunks(MANY_ARRAYS) {
            let (table, blocks) =
                arrays_table(&some.iter().map(|(g, n)| (g.ptr, *n, norm_blocks(*n))).collect::<Vec<_>>());
            let args = [Arg::Ptr(partials + (count * size_of::<f64>()) as u64)];
            let how = Launch { grid: [blocks as u32, 1, 1], block: 1024, shared: 0 };
            gpu.launch_with("optimizer", kernel, how, &table, &args)?;
            count += blocks;
        }
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

    /// Keeps the update for [`CudaOps::launch_updates`]: many parameters share a launch.
    pub(super) fn update(&mut self, op: &AdamW) {
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
        self.updates.push((update, h));
    }

    /// Launches what [`CudaOps::update`] kept.
    pub(super) fn launch_updates(&mut self) -> Result<()> {
        let updates = std::mem::take(&mut self.updates);
        adamw(&self.gpu, &updates)
    }
}
