//! [`BatchView`]: one batch in words, to be looked at.

use std::fmt;

use crate::Result;
use crate::data::{Batch, Dataset, Example, IGNORE_INDEX, TextStream, Tokenizer};

/// One token of a [`BatchView`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenView {
    /// Its piece of text, spaces included. A token that is only part of a character is written as the vocabulary does
    /// (`<0xE2>`); the last part has the whole character.
    pub text: String,
    /// Token id.
    pub id: u32,
    /// Position within its example, from 0.
    pub position: u32,
    /// Which example of the batch it belongs to, from 0.
    pub example: usize,
    /// Whether the model is trained to write this token: it is the target of the position before it.
    pub trained: bool,
}

/// The tokens of one batch with their texts, and which of them are trained on.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
#[derive(Clone, PartialEq, Eq)]
pub struct BatchView {
    /// Every token in order, N of them.
    pub tokens: Vec<TokenView>,
    /// Index in the data set of each example, B of them.
    pub examples: Vec<usize>,
}

impl BatchView {
    /// A look at `batch` through the tokenizer that made it.
    ///
    /// # Errors
    /// Ids that the tokenizer cannot decode.
    pub fn new(batch: &Batch, tokenizer: &Tokenizer) -> Result<Self> {
        let mut tokens = Vec::with_capacity(batch.tokens());
        let mut stream = TextStream::new(tokenizer, &[], true);
        let mut example = 0;
        for (t, (&id, &position)) in batch.input_ids.iter().zip(&batch.positions).enumerate() {
            if position == 0 {
                stream = TextStream::new(tokenizer, &[], true);
                example = batch.cu_seqlens.partition_point(|&start| start as usize <= t).saturating_sub(1);
            }
            let text = match stream.push(id)? {
                text if text.is_empty() => tokenizer.token(id).unwrap_or_default(),
                text => text,
            };
            let target = t.checked_sub(1).and_then(|before| batch.labels.get(before));
            let trained = position > 0 && target.is_some_and(|&label| label != IGNORE_INDEX);
            tokens.push(TokenView { text, id, position, example, trained });
        }
        Ok(BatchView { tokens, examples: batch.examples.clone() })
    }

    /// A look at one example by itself.
    ///
    /// # Errors
    /// An empty or malformed example, and ids that the tokenizer cannot decode.
    pub fn of_example(example: &Example, tokenizer: &Tokenizer) -> Result<Self> {
        let ds = Dataset::new(vec![example.clone()])?;
        BatchView::new(&Batch::new(&ds, &[0]), tokenizer)
    }

    /// Number of tokens that are trained on.
    pub fn trained(&self) -> usize {
        self.tokens.iter().filter(|t| t.trained).count()
    }
}

impl fmt::Debug for BatchView {
    /// Plain text: runs of trained tokens stand between `⟦` and `⟧`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Batch: {} examples, {} tokens, {} trained on ⟦so⟧",
            self.examples.len(),
            self.tokens.len(),
            self.trained()
        )?;
        let mut open = false;
        for token in &self.tokens {
            if open && (!token.trained || token.position == 0) {
                f.write_str("⟧")?;
                open = false;
            }
            if token.position == 0 {
                write!(f, "\n[{}] ", self.examples.get(token.example).copied().unwrap_or(token.example))?;
            }
            if token.trained && !open {
                f.write_str("⟦")?;
                open = true;
            }
            f.write_str(&token.text)?;
        }
        if open { f.write_str("⟧") } else { Ok(()) }
    }
}
