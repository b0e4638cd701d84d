//! AdamW with blockwise 8-bit state, in the order of bitsandbytes' CUDA kernel.

use rayon::prelude::*;

use super::{AdamWHyper, BnbCoefficients, CHUNK};
use crate::nf4::dynamic8::{Map, Tables};
use crate::nf4::widest;

/// Elements of 8-bit state that share an absmax.
pub const STATE_BLOCKSIZE: usize = 256;

/// One step of bitsandbytes' `adamw_8bit` (and `paged_adamw_8bit`, the same arithmetic).
///
/// `p`, `g`, `s1`, `s2`: `[n]`; `absmax1`, `absmax2`: `[ceil(n / 256)]`. `s1` holds codes of the signed and `s2` of the
/// unsigned [dynamic map](crate::nf4::dynamic8); a moment is `map[code] * absmax` of its block. A new state is all
/// zeros: zero absmax makes every code stand for zero. Per block:
///
/// ```text
/// m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2;   absmax1 = max |m|;   absmax2 = max |v|
/// p -= lr sqrt(1 - beta2^t) / (1 - beta1^t)  m / (sqrt(v) + sqrt(1 - beta2^t) eps)
/// p *= 1 - lr weight_decay
/// s1 = code of m / absmax1, moved by one if its sign is not m's;   s2 = code of v / absmax2
/// ```
///
/// Where the gradient is not finite the parameter stays and both moments become zero.
///
/// # Panics
/// If the lengths do not fit together.
pub fn adamw_8bit(
    p: &mut [f32],
    g: &[f32],
    s1: &mut [u8],
    absmax1: &mut [f32],
    s2: &mut [u8],
    absmax2: &mut [f32],
    h: &AdamWHyper,
) {
    let (n, blocks) = (p.len(), p.len().div_ceil(STATE_BLOCKSIZE));
    assert!(
        g.len() == n && s1.len() == n && s2.len() == n,
        "lengths: p {n}, g {}, s {} {}",
        g.len(),
        s1.len(),
        s2.len()
    );
    assert!(
        absmax1.len() == blocks && absmax2.len() == blocks,
        "absmax: {} {} of {blocks}",
        absmax1.len(),
        absmax2.len()
    );
    let c = BnbCoefficients::new(h);
    let maps = (Map::Signed.tables(), Map::Unsigned.tables());
    const BLOCKS: usize = CHUNK / STATE_BLOCKSIZE;
    let pieces = p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
    let pieces = pieces.zip(s1.par_chunks_mut(CHUNK)).zip(absmax1.par_chunks_mut(BLOCKS));
    let pieces = pieces.zip(s2.par_chunks_mut(CHUNK)).zip(absmax2.par_chunks_mut(BLOCKS));
    pieces.for_each(|(((((p, g), s1), a1), s2), a2)| {
        let blocks = p.chunks_mut(STATE_BLOCKSIZE).zip(g.chunks(STATE_BLOCKSIZE));
        let blocks = blocks.zip(s1.chunks_mut(STATE_BLOCKSIZE)).zip(s2.chunks_mut(STATE_BLOCKSIZE)).zip(a1).zip(a2);
        for (((((p, g), s1), s2), a1), a2) in blocks {
            block(p, g, (s1, a1), (s2, a2), maps, &c);
        }
    });
}

/// The codes of one block's moment, and its absmax.
type Moment<'a> = (&'a mut [u8], &'a mut f32);

widest! {
    fn block(p: &mut [f32], g: &[f32], m: Moment<'_>, v: Moment<'_>, maps: (&Tables, &Tables), c: &BnbCoefficients) = block_body
}

#[inline(always)]
fn block_body(p: &mut [f32], g: &[f32], m: Moment<'_>, v: Moment<'_>, maps: (&Tables, &Tables), c: &BnbCoefficients) {
    let ((s1, absmax1), (s2, absmax2)) = (m, v);
    let (mut m, mut v) = ([0f32; STATE_BLOCKSIZE], [0f32; STATE_BLOCKSIZE]);
    for i in 0..p.len() {
        m[i] = maps.0.values[usize::from(s1[i])] * *absmax1;
        v[i] = maps.1.values[usize::from(s2[i])] * *absmax2;
    }
    (*absmax1, *absmax2) = (0.0, 0.0);
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(&mut m).zip(&mut v) {
        let g = g * c.grad_scale;
        *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
        *m = *m * c.beta1 + c.one_minus_beta1 * g;
        let new = (*p + c.step_size * (*m / (v.sqrt() + c.eps))) * c.decay;
        (*p, *m, *v) = if g.is_finite() { (new, *m, *v) } else { (*p, 0.0, 0.0) };
    }
    for (m, v) in m.iter().zip(&v) {
        *absmax1 = absmax1.max(m.abs());
        *absmax2 = absmax2.max(v.abs());
    }
    let (mut scaled1, mut scaled2) = ([0f32; STATE_BLOCKSIZE], [0f32; STATE_BLOCKSIZE]);
    for i in 0..STATE_BLOCKSIZE {
        (scaled1[i], scaled2[i]) = (m[i] / *absmax1, v[i] / *absmax2);
    }
    maps.0.encode_all(&scaled1[..p.len()], s1);
    maps.1.encode_all(&scaled2[..p.len()], s2);
    // A code never has the other sign than its moment: that would turn the update around.
    for (code, m) in s1.iter_mut().zip(&m) {
        let towards = if *m > 0.0 { 1 } else { u8::MAX };
        let other_sign = (*code < ZERO) != m.is_sign_negative();
        *code = code.wrapping_add(if other_sign { towards } else { 0 });
    }
}

/// The signed code of zero: smaller ones are negative.
const ZERO: u8 = 127;
