//! The order in which an epoch visits the examples: a pure function of seed and epoch, so that a resumed run knows
//! where it was.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::data::Dataset;
use crate::{Error, Result};

/// The order of the examples in one epoch: a permutation of `0..ds.len()`.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
///
/// Each (seed, epoch) pair has its own stream of ChaCha8, so epoch 7 needs no epoch 6. With `group_by_length`, micro-batches
/// hold examples of similar length (see [`length_grouped`]).
///
/// - `batch_size`: examples per micro-batch; 0 counts as 1. Used only with `group_by_length`.
pub fn epoch_order(ds: &Dataset, seed: u64, epoch: u64, batch_size: usize, group_by_length: bool) -> Vec<usize> {
    let perm = permutation(ds.len(), seed, epoch);
    if group_by_length { grouped(&ds.lengths(), batch_size.max(1), &perm, None) } else { perm }
}

/// Hugging Face's `LengthGroupedSampler` on a given random permutation.
///
/// The permutation is cut into mega-batches of `mega_batch_mult * batch_size` examples, each sorted by length,
/// longest first, equals in the order in which they came; then the longest example of all changes places with the very
/// first, so that running out of memory would happen at once.
/// (transformers 5.23, `trainer_pt_utils.py`, `get_length_grouped_indices`.)
///
/// - `lengths`: tokens of each example.
/// - `mega_batch_mult`: `None` for the default, `min(n / (4 * batch_size), 50)` but at least 1.
///
/// # Errors
/// When `perm` is not a permutation of `0..lengths.len()`, or `batch_size` or `mega_batch_mult` is 0.
pub fn length_grouped(
    lengths: &[usize],
    batch_size: usize,
    perm: &[usize],
    mega_batch_mult: Option<usize>,
) -> Result<Vec<usize>> {
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..lengths.len()) {
        return Err(Error::new("the order of the examples is not a permutation of them")
            .at("length_grouped")
            .expected(format!("each of 0..{} once", lengths.len()))
            .found(format!("{} numbers", perm.len())));
    }
    if batch_size == 0 || mega_batch_mult == Some(0) {
        return Err(Error::new("a batch needs at least one example")
            .at("length_grouped")
            .expected("batch_size and mega_batch_mult of at least 1")
            .found(format!("batch_size {batch_size}, mega_batch_mult {mega_batch_mult:?}")));
    }
    Ok(grouped(lengths, batch_size, perm, mega_batch_mult))
}

/// [`length_grouped`] on input that is known to be sound.
fn grouped(lengths: &[usize], batch_size: usize, perm: &[usize], mega_batch_mult: Option<usize>) -> Vec<usize> {
    let default = || (lengths.len() / batch_size.saturating_mul(4)).clamp(1, 50);
    let mega_batch = mega_batch_mult.unwrap_or_else(default).saturating_mul(batch_size);
    let mut order = perm.to_vec();
    for mega in order.chunks_mut(mega_batch) {
        mega.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    }
    // `max_by_key` gives the last of equals; the reference takes the first.
    let longest = (0..order.len()).step_by(mega_batch).rev().max_by_key(|&at| lengths[order[at]]);
    if let Some(at) = longest {
        order.swap(0, at);
    }
    order
}

/// A permutation of `0..n` from the ChaCha8 stream of (seed, epoch).
fn permutation(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..n).collect();
    shuffle(&mut rng, &mut order);
    order
}

/// Fisher-Yates. Written out, so that no other crate's version can change an order.
pub(super) fn shuffle(rng: &mut ChaCha8Rng, order: &mut [usize]) {
    for i in (1..order.len()).rev() {
        order.swap(i, below(rng, i as u64 + 1) as usize);
    }
}

/// A uniform number below `bound` (> 0), without bias: draws in the incomplete last interval are drawn again.
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let x = rng.next_u64();
        if x < limit {
            return x % bound;
        }
    }
}
