//! [`DataReport`]: what became of the rows.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::data::Example;

/// What became of the rows when they were tokenized. Lengths are in tokens.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// Rows read.
    pub rows: usize,
    /// Rows that became examples.
    pub kept: usize,
    /// Where the rows came from that were cut to `max_length`.
    pub truncated: Vec<String>,
    /// Tokens that were cut off them.
    #[serde(default)]
    pub truncated_tokens: usize,
    /// Rows that did not become examples, and why.
    pub dropped: Vec<DroppedRow>,
    /// Rows in which one token holds the end of the prompt and the beginning of the completion: it is trained on, but in
    /// generation the prompt ends with another token. A space at the end of the prompt is the usual cause.
    pub merged_boundaries: usize,
    /// Tokens that are the tokenizer's unknown token.
    pub unk_tokens: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Tokens that are trained on.
    pub trained_tokens: usize,
    /// Tokens of the longest example.
    pub max_len: usize,
    /// How many examples have which length; the bins are equally wide and cover 0 to `max_len`.
    pub lengths: Vec<LengthBin>,
}

/// One row that did not become an example.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedRow {
    /// `file:line`.
    pub place: String,
    /// Why.
    pub reason: String,
}

/// A bin of the histogram of lengths: `from <= tokens < to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthBin {
    /// Least number of tokens.
    pub from: usize,
    /// Beyond the greatest number of tokens.
    pub to: usize,
    /// Examples in it.
    pub count: usize,
}

impl DataReport {
    /// Fills in what follows from the examples themselves.
    pub(crate) fn count(&mut self, examples: &[Example], unk: Option<u32>) {
        self.kept = examples.len();
        self.tokens = examples.iter().map(|e| e.input_ids.len()).sum();
        self.trained_tokens = examples.iter().map(Example::trained_tokens).sum();
        self.unk_tokens = examples.iter().flat_map(|e| &e.input_ids).filter(|&&id| Some(id) == unk).count();
        self.max_len = examples.iter().map(|e| e.input_ids.len()).max().unwrap_or(0);
        let width = (self.max_len / 16 + 1).next_multiple_of(if self.max_len > 128 { 8 } else { 1 });
        self.lengths =
            (0..=self.max_len / width).map(|b| LengthBin { from: b * width, to: (b + 1) * width, count: 0 }).collect();
        for example in examples {
            if let Some(bin) = self.lengths.get_mut(example.input_ids.len() / width) {
                bin.count += 1;
            }
        }
    }

    /// The reasons for dropping rows with how many rows each took, most frequent first.
    pub fn drop_reasons(&self) -> Vec<(String, usize)> {
        let mut reasons: Vec<(String, usize)> = vec![];
        for row in &self.dropped {
            match reasons.iter_mut().find(|(reason, _)| *reason == row.reason) {
                Some((_, n)) => *n += 1,
                None => reasons.push((row.reason.clone(), 1)),
            }
        }
        reasons.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        reasons
    }
}

impl fmt::Debug for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = 100.0 * self.trained_tokens as f64 / self.tokens.max(1) as f64;
        write!(f, "{} of {} rows kept, {} truncated", self.kept, self.rows, self.truncated.len())?;
        if let Some(first) = self.truncated.first() {
            write!(f, " by {} tokens (first: {first})", self.truncated_tokens)?;
        }
        write!(
            f,
            "\n{} tokens, {} trained on ({share:.1} %), longest {}",
            self.tokens, self.trained_tokens, self.max_len
        )?;
        for (reason, n) in self.drop_reasons() {
            let first = self.dropped.iter().find(|row| row.reason == reason).map_or("", |row| row.place.as_str());
            write!(f, "\ndropped {n}: {reason} (first: {first})")?;
        }
        if self.merged_boundaries > 0 {
            write!(f, "\nin {} rows a token crosses from the prompt into the completion", self.merged_boundaries)?;
        }
        if self.unk_tokens > 0 { write!(f, "\n{} unknown tokens", self.unk_tokens) } else { Ok(()) }
    }
}
