//! Batches of random tokens.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunebook::data::{Batch, Dataset, Example};
use tunebook::{Error, Result};

/// How long the sequences of a batch are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lengths {
    /// All as long as the plan allows.
    Full,
    /// The first as long as the plan allows, the others anywhere from an eighth of that to all of it.
    Mixed,
}

impl Lengths {
    /// From the words that the option takes.
    ///
    /// # Errors
    /// Any other word.
    pub fn named(word: &str) -> Result<Lengths> {
        match word {
            "full" => Ok(Lengths::Full),
            "mixed" => Ok(Lengths::Mixed),
            _ => Err(Error::new("unknown lengths").expected("full, mixed").found(format!("`{word}`"))),
        }
    }
}

/// `count` batches of `batch` sequences of at most `seq` tokens below `vocab`; the same for the same seed.
///
/// Every token but the first of a sequence has a loss.
///
/// # Errors
/// What [`Dataset::new`] refuses.
pub fn random(count: usize, batch: usize, seq: usize, lengths: Lengths, vocab: usize, seed: u64) -> Result<Vec<Batch>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut examples = Vec::with_capacity(count * batch);
    for i in 0..count * batch {
        let n = match lengths {
            Lengths::Mixed if i % batch > 0 => rng.random_range((seq / 8).max(1)..=seq),
            _ => seq,
        };
        examples.push(Example::all_trained((0..n).map(|_| rng.random_range(0..vocab as u32)).collect()));
    }
    let data = Dataset::new(examples)?;
    let indices: Vec<usize> = (0..count * batch).collect();
    Ok(indices.chunks(batch).map(|c| Batch::new(&data, c)).collect())
}
