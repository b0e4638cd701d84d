//! Linear modules for one token of a text that is being written: kernels that only read the weights, kernels/cuda/linear_one.cu.
//!
//! Modules that read the same input wait for each other and share a launch.

use super::CudaOps;
use super::gpu::{Arg, Launch};
use super::nf4::quant_type_code;
use crate::Result;
use crate::engine::ops::{LinearIds, Lora, Weight};
use crate::nf4::Nf4Config;

/// Dynamic shared memory that the kernels take for their input, at most.
const SHARED: usize = 40 << 10;

/// Modules and adapters of a launch, at most: MODULES of the kernel file.
const MODULES: usize = 3;

/// Warps of a block, each of which has two rows.
const WARPS: usize = 8;

/// Blocks that a multiprocessor holds at once.
const RESIDENT: usize = 4;

/// A module that waits for its launch. Addresses are device addresses.
pub(super) struct One {
    x: u64,
    in_features: usize,
    out_features: usize,
    /// None: dense.
    quantized: Option<Nf4Config>,
    /// Weight, absmax, nested absmax, offset, bias, y, B, `A x`; 0: none.
    addresses: [u64; 8],
    r: usize,
    scaling: f32,
}

/// The blocks for `pairs` of rows: as many as keep all multiprocessors equally busy.
fn balanced_blocks(pairs: usize, multiprocessors: usize) -> usize {
    let all = pairs.div_ceil(WARPS).max(1);
    // Pairs of a warp, from as few as fit at once. What counts is the multiprocessor with the most work.
    let fewest = all.div_ceil(multiprocessors * RESIDENT);
    let work = |rounds: usize| all.div_ceil(rounds).div_ceil(multiprocessors) * rounds;
    let rounds = (fewest..=2 * fewest).min_by_key(|&rounds| work(rounds)).unwrap_or(1);
    all.div_ceil(rounds)
}

impl CudaOps {
    /// Whether the batch is one token of a decoded text, and the module one that has a kernel for that.
    pub(super) fn has_one_kernel(&self, m: &LinearIds) -> bool {
        let shared = m.in_features * self.dtype.size_in_bytes();
        let whole = match m.weight {
            // A decoded one may have columns beside it.
            Weight::Dense { w } => self.width(w) == m.in_features,
            Weight::Nf4 { config, .. } => config.blocksize >= 32,
        };
        // DoRA's lengths need the whole weight.
        self.dora(m).is_none()
            && self.tokens == 1
            && !self.state.training
            && whole
            && m.in_features.is_multiple_of(32)
            && shared <= SHARED
    }

    /// `xa = A x` for one token: each adapter with the address of its xa.
    pub(super) fn low_rank_one(&mut self, k: usize, x: u64, adapters: &[(&Lora, u64)]) -> Result<()> {
        self.launch_ones()?;
        for some in adapters.chunks(MODULES) {
            let mut table = Vec::with_capacity(MODULES * 24);
            let mut rows = 0;
            for i in 0..MODULES {
                let words = match some.get(i) {
                    Some((lora, xa)) => [self.ptr(lora.a), *xa, rows as u64],
                    None => [0, 0, u64::from(u32::MAX)],
                };
                words.iter().for_each(|w| table.extend_from_slice(&w.to_ne_bytes()));
                rows += some.get(i).map_or(0, |(lora, _)| lora.r);
            }
            let how = Launch { grid: [rows as u32, 1, 1], block: 256, shared: 0 };
            self.gpu.launch_with("linear_one", "lora_one", how, &table, &[Arg::Ptr(x), Arg::U32(k as u32)])?;
        }
        Ok(())
    }

    /// `y = W x + scaling * B xa + bias` for one token, launched with its siblings. `adapter`: the pair, and where `xa = A x` is.
    pub(super) fn linear_one(&mut self, m: &LinearIds, x: u64, y: u64, adapter: Option<(&Lora, u64)>) -> Result<()> {
        let bias = m.bias.map_or(0, |bias| self.ptr(bias.b));
        let (b, xa, r, scaling) =
            adapter.map_or((0, 0, 0, 0.0), |(lora, xa)| (self.ptr(lora.b), xa, lora.r, lora.scaling));
        let (quantized, weight) = match m.weight {
            Weight::Dense { w } => (None, [self.ptr(w), 0, 0, 0]),
            Weight::Nf4 { packed, absmax, nested, config } => {
                let (scales, offset) = nested.map_or((0, 0), |n| (self.ptr(n.absmax), self.ptr(n.offset)));
                (Some(config), [self.ptr(packed), self.ptr(absmax), scales, offset])
            }
        };
        let [w, absmax, scales, offset] = weight;
        let one = One {
            x,
            in_features: m.in_features,
            out_features: m.out_features,
            quantized,
            addresses: [w, absmax, scales, offset, bias, y, b, xa],
            r,
            scaling,
        };
        let joins =
            |first: &One| (first.x, first.in_features, first.quantized) == (one.x, one.in_features, one.quantized);
        if self.ones.len() == MODULES || !self.ones.first().is_none_or(joins) {
            self.launch_ones()?;
        }
        self.ones.push(one);
        Ok(())
    }

    /// Launches the modules that wait.
    pub(super) fn launch_ones(&mut self) -> Result<()> {
        let ones = std::mem::take(&mut self.ones);
        let Some(first) = ones.first() else { return Ok(()) };
        let mut table = Vec::with_capacity(MODULES * 80);
        let mut pairs = 0;
        for i in 0..MODULES {
            let Some(one) = ones.get(i) else {
                // No pair is its.
                table.extend_from_slice(&[0; 64]);
                table.extend_from_slice(&u32::MAX.to_ne_bytes());
                table.extend_from_slice(&[0; 12]);
                continue;
            };
            one.addresses.iter().for_each(|a| table.extend_from_slice(&a.to_ne_bytes()));
            for x in [pairs, one.out_features, one.r] {
                table.extend_from_slice(&(x as u32).to_ne_bytes());
            }
            table.extend_from_slice(&one.scaling.to_ne_bytes());
            pairs += one.out_features.div_ceil(2);
        }
        let blocks = balanced_blocks(pairs, self.gpu.sm_count as usize);
        let shared = (first.in_features * self.dtype.size_in_bytes()) as u32;
        let how = Launch { grid: [blocks as u32, 1, 1], block: (WARPS * 32) as u32, shared };
        let args = [Arg::Ptr(first.x), Arg::U32(pairs as u32), Arg::U32(first.in_features as u32)];
        let Some(config) = first.quantized else {
            return self.gpu.launch_with("linear_one", "dense_one", how, &table, &args);
        };
        let blocks = [
            Arg::U32(config.blocksize.trailing_zeros()),
            Arg::U32(config.nested_blocksize.trailing_zeros()),
            Arg::U32(quant_type_code(config.quant_type)),
        ];
        self.gpu.launch_with("linear_one", "nf4_one", how, &table, &[args, blocks].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_a_warp_and_every_multiprocessor_its_share() {
        for pairs in [1, 7, 8, 512, 2048, 3072, 7168, 14336, 100_000] {
            let blocks = balanced_blocks(pairs, 132);
            let all = pairs.div_ceil(WARPS);
            let rounds = all.div_ceil(blocks);
            assert!((1..=all.min(132 * RESIDENT)).contains(&blocks), "{pairs} pairs, {blocks} blocks");
            // The busiest multiprocessor has at most a tenth more than its share where there is enough for all.
            if all >= 512 {
                let busiest = blocks.div_ceil(132) * rounds;
                assert!(busiest as f64 <= 1.1 * all as f64 / 132.0 + 1.0, "{pairs} pairs, {blocks} blocks");
            }
        }
    }
}
