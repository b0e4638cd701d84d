//! One weight of a merge: its blocks of rows, in up to three passes, with the sums for the report.

use std::sync::{Mutex, PoisonError};

use candle_core::DType;
use rayon::prelude::*;

use super::adapter::LoraPair;
use super::delta::{Sums, compare, delta_rows, round_to, squares, to_bytes};
use super::merge_report::{MergeBase, MergeCost, ModuleMerge};
use crate::model::bnb_write::{QuantParts, quantize_streamed, quantize_window};
use crate::model::{Checkpoint, LinearModule};
use crate::nf4::{self, AbsmaxRef, Nf4Config, Nf4Tensor};
use crate::{Error, Result, interrupt};

/// Elements of a block, about: 1 MiB of f32 for each of a thread's buffers.
const BLOCK: usize = 1 << 18;
/// Blocks that are computed before their results are written.
const WINDOW: usize = 16;

/// Where the base's weight comes from.
pub(super) enum Source {
    /// The checkpoint and the tensor's name.
    Dense(Checkpoint, String),
    /// A 4-bit weight in memory.
    Nf4(Nf4Tensor),
}

/// Takes the bytes of a merged weight, in order.
pub(super) type WriteBytes<'a> = &'a mut dyn FnMut(Vec<u8>) -> Result<()>;

/// Where the merged weight goes.
pub(super) enum Sink<'a> {
    /// Nowhere: only the report is wanted.
    Nothing,
    /// Bytes of this dtype.
    Dense(WriteBytes<'a>, DType),
    /// Quantized again and returned.
    Quantized,
}

/// The merge of one weight.
pub(super) struct Job<'a> {
    pub module: &'a LinearModule,
    pub pair: &'a LoraPair,
    pub source: &'a Source,
    pub cfg: Nf4Config,
    pub onto: MergeBase,
    /// Measure all choices, not only the norms.
    pub compare: bool,
    pub trained_on_quantized: bool,
    pub spaces: &'a Spaces,
}

/// Buffers that threads hand on from block to block and from weight to weight: fresh ones would be cleared, and their pages found, again and again.
#[derive(Default)]
pub(super) struct Spaces(Mutex<Vec<Scratch>>);

impl Spaces {
    fn with<R>(&self, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let spare = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = spare().pop().unwrap_or_default();
        let out = f(&mut space);
        spare().push(space);
        out
    }
}

/// Rows `first..first + rows` of the weight.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    rows: usize,
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    w: Vec<f32>,
    d: Vec<f32>,
    delta: Vec<f32>,
    result: Vec<f32>,
    /// With DoRA: the change of the original and of the decoded weight, which are not the same.
    change_w: Vec<f32>,
    change_d: Vec<f32>,
}

/// What a block of the main pass gives.
#[derive(Default)]
struct BlockOut {
    w2: f64,
    delta2: f64,
    original: Sums,
    /// Of the original choice against the trained function.
    original_distance: f64,
    dequantized: Sums,
    dequantized_distance: f64,
    bytes: Vec<u8>,
    quantized: Option<(Vec<u8>, Vec<f32>)>,
}

/// The quantized weight with its absmax decoded: blocks of rows can be decoded on their own.
struct Decoded {
    q: Nf4Tensor,
    absmax: Vec<f32>,
}

impl Decoded {
    fn new(q: Nf4Tensor) -> Result<Self> {
        q.validate()?;
        let absmax = q.absmax.to_f32()?;
        Ok(Decoded { q, absmax })
    }

    /// Elements `start..start + out.len()`; `start` is a multiple of the blocksize.
    fn read(&self, start: usize, out: &mut [f32]) {
        let (n, b) = (out.len(), self.q.blocksize);
        let packed = &self.q.packed[start / 2..(start + n).div_ceil(2)];
        let absmax = &self.absmax[start / b..(start + n).div_ceil(b)];
        nf4::dequantize_into(packed, AbsmaxRef::F32(absmax), self.q.quant_type, b, out);
    }
}

impl Job<'_> {
    /// Merges; gives the report's line and, for [`Sink::Quantized`], the weight.
    pub(super) fn run(&self, mut sink: Sink<'_>) -> Result<(ModuleMerge, Option<Nf4Tensor>)> {
        // lm_head is never quantized: all choices are the same there.
        let in_layer = self.module.layer.is_some();
        let needs_decoded = in_layer && (self.compare || !matches!(self.onto, MergeBase::Original));
        let decoded = match self.source {
            Source::Nf4(q) => Some(Decoded::new(q.clone())?),
            Source::Dense(c, name) if needs_decoded => Some(Decoded::new(quantize_streamed(c, name, self.cfg)?)?),
            Source::Dense(..) => None,
        };
        let keep_quantized = decoded.is_some() && (self.compare || matches!(sink, Sink::Quantized));
        let n = self.module.out_features * self.module.in_features;
        let mut parts = keep_quantized.then(|| QuantParts::new(n, self.cfg));
        let dtype = match sink {
            Sink::Dense(_, dtype) => dtype,
            _ => self.dtype()?,
        };
        let mut total = BlockOut::default();
        let blocks = self.blocks();
        for window in blocks.chunks(WINDOW) {
            interrupt::check(|| "merging".into())?;
            let emit = matches!(sink, Sink::Dense(..));
            let outs: Vec<BlockOut> = window
                .par_iter()
                .map(|b| self.spaces.with(|s| self.block(*b, decoded.as_ref(), s, dtype, emit, keep_quantized)))
                .collect::<Result<_>>()?;
            for out in outs {
                total.add(&out);
                if let Sink::Dense(write, _) = &mut sink {
                    write(out.bytes)?;
                }
                if let (Some(parts), Some(q)) = (&mut parts, out.quantized) {
                    parts.append(q);
                }
            }
        }
        let shape = [self.module.out_features, self.module.in_features];
        let again = parts.map(|p| p.finish(&shape, dtype));
        let requantized = match (&decoded, &again) {
            (Some(before), Some(after)) if self.compare => Some(self.requantized(before, after, &blocks)?),
            _ => None,
        };
        let line = self.line(&total, decoded.is_some(), requantized);
        let quantized = if matches!(sink, Sink::Quantized) { again } else { None };
        Ok((line, quantized))
    }

    fn dtype(&self) -> Result<DType> {
        match self.source {
            Source::Nf4(q) => Ok(q.dtype),
            Source::Dense(c, name) => Ok(c.info(name)?.dtype),
        }
    }

    /// Blocks of whole rows that start at a multiple of the blocksize in the flat weight.
    fn blocks(&self) -> Vec<Block> {
        let (rows, n) = (self.module.out_features, self.module.in_features);
        // The blocksize is a power of two.
        let shared = 1usize << n.trailing_zeros().min(self.cfg.blocksize.trailing_zeros());
        let step = self.cfg.blocksize / shared;
        let per = (BLOCK / n.max(1)).next_multiple_of(step).max(step);
        (0..rows).step_by(per).map(|first| Block { first, rows: per.min(rows - first) }).collect()
    }

    /// The main pass over one block.
    fn block(
        &self,
        b: Block,
        decoded: Option<&Decoded>,
        s: &mut Scratch,
        dtype: DType,
        emit: bool,
        quantize: bool,
    ) -> Result<BlockOut> {
        let (start, n) = (b.first * self.module.in_features, b.rows * self.module.in_features);
        let Scratch { w, d, delta, result, change_w, change_d } = s;
        for buffer in [&mut *w, &mut *d, &mut *delta, &mut *result] {
            buffer.resize(n, 0.0);
        }
        delta_rows(self.pair, b.first, b.rows, delta);
        if let Some(decoded) = decoded {
            decoded.read(start, d);
        }
        let dense = match self.source {
            Source::Dense(c, name) => c.read_f32_at(name, start, w).map(|()| true)?,
            Source::Nf4(_) => {
                w.copy_from_slice(d);
                false
            }
        };
        let of_quantized = decoded.is_some() && self.trained_on_quantized;
        let delta_w: &[f32] = self.change(b.first, w, delta, change_w);
        let delta_d: &[f32] = self.change(b.first, d, delta, change_d);
        let delta: &[f32] = if of_quantized { delta_d } else { delta_w };
        let mut out = BlockOut { w2: squares(w), delta2: squares(delta), ..BlockOut::default() };
        if !out.delta2.is_finite() {
            return Err(not_finite("B A of the adapter", f32::INFINITY));
        }
        let trained: &[f32] = if of_quantized { d } else { w };
        let onto_original = matches!(self.onto, MergeBase::Original) || decoded.is_none();
        if dense && (self.compare || onto_original) {
            add_rounded(w, delta_w, dtype, result);
            if self.compare {
                out.original = compare(result, w, delta_w);
                out.original_distance =
                    if of_quantized { compare(result, trained, delta).diff } else { out.original.diff };
            }
            if emit && onto_original {
                out.bytes = checked_bytes(dtype, result)?;
            }
        }
        if decoded.is_some() {
            if quantize {
                sum(d, delta_d, result);
                out.quantized = Some(quantize_window(result, self.cfg)?);
            }
            let emit = emit && !onto_original;
            if self.compare || emit {
                add_rounded(d, delta_d, dtype, result);
            }
            if self.compare {
                out.dequantized = compare(result, d, delta_d);
                out.dequantized_distance =
                    if of_quantized { out.dequantized.diff } else { compare(result, trained, delta).diff };
            }
            if emit {
                out.bytes = checked_bytes(dtype, result)?;
            }
        }
        Ok(out)
    }

    /// The change of `base`, rows from `first` on, that the adapter means: `delta` itself, with DoRA
    /// `magnitude / |base + delta| (base + delta) - base` in `space` (arXiv 2402.09353).
    fn change<'s>(&self, first: usize, base: &[f32], delta: &'s [f32], space: &'s mut Vec<f32>) -> &'s [f32] {
        let Some(magnitude) = &self.pair.magnitude else { return delta };
        let n = self.module.in_features;
        space.clear();
        for (i, (base, delta)) in base.chunks_exact(n).zip(delta.chunks_exact(n)).enumerate() {
            let square = |(b, d): (&f32, &f32)| f64::from(b + d).powi(2);
            let length = base.iter().zip(delta).map(square).sum::<f64>().sqrt();
            let factor = (f64::from(magnitude[first + i]) / length) as f32;
            space.extend(base.iter().zip(delta).map(|(b, d)| factor * (b + d) - b));
        }
        space
    }

    /// The last pass: what is left of ΔW after quantizing again, and the distance from the trained function.
    fn requantized(&self, before: &Decoded, after: &Nf4Tensor, blocks: &[Block]) -> Result<(Sums, f64)> {
        let after = Decoded::new(after.clone())?;
        let mut total = (Sums::default(), 0.0);
        let one = |s: &mut Scratch, b: &Block| -> Result<(Sums, f64)> {
            let (start, n) = (b.first * self.module.in_features, b.rows * self.module.in_features);
            let Scratch { w, d, delta, result, change_w, change_d } = s;
            for buffer in [&mut *w, &mut *d, &mut *delta, &mut *result] {
                buffer.resize(n, 0.0);
            }
            delta_rows(self.pair, b.first, b.rows, delta);
            before.read(start, d);
            after.read(start, result);
            let delta_d = self.change(b.first, d, delta, change_d);
            let sums = compare(result, d, delta_d);
            Ok(match self.source {
                Source::Dense(c, name) if !self.trained_on_quantized => {
                    c.read_f32_at(name, start, w)?;
                    (sums, compare(result, w, self.change(b.first, w, delta, change_w)).diff)
                }
                _ => (sums, sums.diff),
            })
        };
        for window in blocks.chunks(WINDOW) {
            let outs: Vec<(Sums, f64)> =
                window.par_iter().map(|b| self.spaces.with(|s| one(s, b))).collect::<Result<_>>()?;
            for (sums, distance) in outs {
                total.0 += sums;
                total.1 += distance;
            }
        }
        Ok(total)
    }

    fn line(&self, t: &BlockOut, decoded: bool, requantized: Option<(Sums, f64)>) -> ModuleMerge {
        let cost = |s: Sums, distance: f64| {
            (t.delta2 > 0.0).then(|| MergeCost {
                kept: s.dot / t.delta2,
                error: (s.diff / t.delta2).sqrt(),
                distance: (distance / t.delta2).sqrt(),
            })
        };
        let original = match self.source {
            Source::Dense(..) => cost(t.original, t.original_distance).filter(|_| self.compare),
            Source::Nf4(_) => None,
        };
        let (dequantized, quantized) = if decoded {
            let dequantized = cost(t.dequantized, t.dequantized_distance);
            (dequantized.filter(|_| self.compare), requantized.and_then(|(s, distance)| cost(s, distance)))
        } else {
            // lm_head: nothing is quantized, whatever is chosen.
            match self.module.layer {
                None => (original, original),
                Some(_) => (None, None),
            }
        };
        ModuleMerge {
            module: self.module.name.clone(),
            layer: self.module.layer,
            out_features: self.module.out_features,
            in_features: self.module.in_features,
            r: self.pair.r,
            norm_w: t.w2.sqrt(),
            norm_delta: t.delta2.sqrt(),
            original,
            dequantized,
            quantized,
        }
    }
}

impl BlockOut {
    fn add(&mut self, o: &BlockOut) {
        self.w2 += o.w2;
        self.delta2 += o.delta2;
        self.original += o.original;
        self.original_distance += o.original_distance;
        self.dequantized += o.dequantized;
        self.dequantized_distance += o.dequantized_distance;
    }
}

fn sum(base: &[f32], delta: &[f32], out: &mut [f32]) {
    for ((o, b), d) in out.iter_mut().zip(base).zip(delta) {
        *o = b + d;
    }
}

fn add_rounded(base: &[f32], delta: &[f32], dtype: DType, out: &mut [f32]) {
    sum(base, delta, out);
    round_to(dtype, out);
}

fn checked_bytes(dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
    // All at once: a search would look at them one by one.
    let finite = values.iter().fold(true, |all, v| all & v.is_finite());
    if let Some(bad) = values.iter().find(|v| !finite && !v.is_finite()) {
        return Err(not_finite(&format!("the merged weight in {}", dtype.as_str()), *bad));
    }
    Ok(to_bytes(dtype, values))
}

fn not_finite(what: &str, found: f32) -> Error {
    Error::new(format!("{what} is not finite"))
        .expected("finite numbers")
        .found(found.to_string())
        .next("the adapter diverged in training, or its scaling is wrong: use an earlier checkpoint")
}
