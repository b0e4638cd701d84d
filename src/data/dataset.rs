//! [`Dataset`]: tokenized examples, immutable and cheap to clone.

use std::fmt;
use std::fmt::Write as _;
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use crate::data::{DataReport, IGNORE_INDEX};
use crate::{Error, Result};

/// One tokenized training example.
///
/// `labels[t]` belongs to token `t` itself (Hugging Face's convention, **not** shifted): the token's own id where it is
/// trained on, [`IGNORE_INDEX`] where it is not. Both have the same length T.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids, `[T]`.
    pub input_ids: Vec<u32>,
    /// Labels, `[T]`, not shifted.
    pub labels: Vec<i32>,
}

impl Example {
    /// An example of which every token is trained on.
    pub fn all_trained(input_ids: Vec<u32>) -> Self {
        let labels = input_ids.iter().map(|&id| id as i32).collect();
        Example { input_ids, labels }
    }

    /// An example of which the first `prompt` tokens are not trained on.
    pub fn completion_only(input_ids: Vec<u32>, prompt: usize) -> Self {
        let mut example = Example::all_trained(input_ids);
        example.labels.iter_mut().take(prompt).for_each(|label| *label = IGNORE_INDEX);
        example
    }

    /// Number of tokens that have a loss: labelled ones, without the first token, which nothing predicts.
    pub fn trained_tokens(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label != IGNORE_INDEX).count()
    }
}

/// Tokenized examples in a fixed order. Cloning shares them.
///
/// Of a [packed](Dataset::packed) data set, an example is a sequence of whole examples, whose lengths are in
/// [`segments`](Dataset::segments).
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
#[derive(Clone)]
pub struct Dataset {
    examples: Arc<Vec<Example>>,
    /// Of a packed data set: the lengths of the examples in each sequence.
    segments: Option<Arc<Vec<Vec<u32>>>>,
    fingerprint: Arc<OnceLock<String>>,
    report: Option<Arc<DataReport>>,
}

impl Dataset {
    /// A data set of these examples, in this order.
    ///
    /// # Errors
    /// No example at all; an example without tokens; ids and labels of different lengths; a label that is negative but
    /// not -100.
    pub fn new(examples: Vec<Example>) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::new("the data set is empty")
                .expected("at least one example")
                .next("look at the rows, and at the report of why rows were dropped"));
        }
        for (i, example) in examples.iter().enumerate() {
            let (ids, labels) = (example.input_ids.len(), example.labels.len());
            if ids == 0 || ids != labels {
                return Err(Error::new("an example is malformed")
                    .at(format!("example {i}"))
                    .expected("at least one token, and one label per token")
                    .found(format!("{ids} tokens, {labels} labels")));
            }
            if let Some(label) = example.labels.iter().find(|&&l| l < 0 && l != IGNORE_INDEX) {
                return Err(Error::new("an example has a label that is no token id")
                    .at(format!("example {i}"))
                    .expected(format!("a token id, or {IGNORE_INDEX} for a token that is not trained on"))
                    .found(label.to_string()));
            }
        }
        Ok(Dataset { examples: Arc::new(examples), segments: None, fingerprint: Arc::default(), report: None })
    }

    /// A packed data set: `segments[i]` are the lengths of the examples that example `i` is made of.
    ///
    /// # Errors
    /// As [`new`](Self::new), and lengths that do not add up to the tokens, or are 0.
    pub fn with_segments(mut examples: Vec<Example>, segments: Vec<Vec<u32>>) -> Result<Self> {
        if segments.len() != examples.len() {
            return Err(Error::new("a packed data set needs the lengths of the examples in each sequence")
                .expected(format!("{} lists of lengths", examples.len()))
                .found(segments.len().to_string()));
        }
        for (i, (example, lengths)) in examples.iter_mut().zip(&segments).enumerate() {
            let total: u64 = lengths.iter().map(|&n| u64::from(n)).sum();
            if lengths.contains(&0) || total != example.input_ids.len() as u64 {
                return Err(Error::new("the lengths of packed examples do not fit their sequence")
                    .at(format!("example {i}"))
                    .expected(format!("lengths above 0 that add up to {} tokens", example.input_ids.len()))
                    .found(format!("{lengths:?}")));
            }
            // Nothing predicts the first token of an example.
            let mut at = 0;
            for &n in lengths {
                if let Some(label) = example.labels.get_mut(at) {
                    *label = IGNORE_INDEX;
                }
                at += n as usize;
            }
        }
        Ok(Dataset { segments: Some(Arc::new(segments)), ..Dataset::new(examples)? })
    }

    /// The same examples, joined into sequences of at most `max_length` tokens, so that micro-batches of a fixed number of
    /// sequences are full.
    ///
    /// Attention and positions stay inside each example, so the loss of every token is what it was. Best fit, longest first
    /// (each example goes where it leaves the least room); within a sequence examples keep their order, and sequences
    /// are in the order of their first examples. No example is cut, none is left out.
    ///
    /// # Errors
    /// An example longer than `max_length`; a data set that is packed already.
    pub fn packed(&self, max_length: usize) -> Result<Dataset> {
        if self.segments.is_some() {
            return Err(Error::new("this data set is packed already").next("pack the one that it was made from"));
        }
        let lengths = self.lengths();
        if let Some((i, n)) = lengths.iter().enumerate().find(|(_, n)| **n > max_length) {
            return Err(Error::new("an example is longer than the sequences to pack into")
                .at(format!("example {i}"))
                .expected(format!("at most {max_length} tokens"))
                .found(n.to_string())
                .next("encode with max_length, or pack into longer sequences"));
        }
        let (mut examples, mut segments) = (vec![], vec![]);
        for pack in super::packing::best_fit(&lengths, max_length) {
            let mut joined = Example { input_ids: vec![], labels: vec![] };
            for &i in &pack {
                joined.input_ids.extend_from_slice(&self.examples[i].input_ids);
                joined.labels.extend_from_slice(&self.examples[i].labels);
            }
            examples.push(joined);
            segments.push(pack.iter().map(|&i| lengths[i] as u32).collect());
        }
        Ok(Dataset { report: self.report.clone(), ..Dataset::with_segments(examples, segments)? })
    }

    /// Of a packed data set: the lengths of the examples in each sequence; `None` for one that is not packed.
    pub fn segments(&self) -> Option<&[Vec<u32>]> {
        self.segments.as_deref().map(Vec::as_slice)
    }

    pub(crate) fn with_report(mut self, report: DataReport) -> Self {
        self.report = Some(Arc::new(report));
        self
    }

    /// What became of the rows that it was made from; `None` when it was made from examples.
    pub fn report(&self) -> Option<&DataReport> {
        self.report.as_deref()
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Always false: an empty data set cannot be made.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// Example `i`, counted from 0.
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len), as indexing a slice does.
    pub fn get(&self, i: usize) -> &Example {
        &self.examples[i]
    }

    /// All examples in order.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Tokens of each example, in order.
    pub fn lengths(&self) -> Vec<usize> {
        self.examples.iter().map(|e| e.input_ids.len()).collect()
    }

    /// Tokens of the longest example.
    pub fn max_len(&self) -> usize {
        self.examples.iter().map(|e| e.input_ids.len()).max().unwrap_or(0)
    }

    /// The largest token id in ids or labels: a model needs a vocabulary above it.
    pub fn max_token_id(&self) -> u32 {
        let largest = |e: &Example| {
            let ids = e.input_ids.iter().copied();
            ids.chain(e.labels.iter().filter_map(|&l| u32::try_from(l).ok())).max()
        };
        self.examples.iter().filter_map(largest).max().unwrap_or(0)
    }

    /// Tokens of all examples.
    pub fn total_tokens(&self) -> usize {
        self.examples.iter().map(|e| e.input_ids.len()).sum()
    }

    /// Tokens that have a loss, of all examples.
    pub fn trained_tokens(&self) -> usize {
        self.examples.iter().map(Example::trained_tokens).sum()
    }

    /// The first `n` examples as one data set, the rest as another: training and evaluation.
    ///
    /// # Errors
    /// When one of the two would be empty.
    pub fn split_at(&self, n: usize) -> Result<(Dataset, Dataset)> {
        if n == 0 || n >= self.len() {
            return Err(Error::new("a split leaves one side empty")
                .at("split_at")
                .expected(format!("1 to {}", self.len() - 1))
                .found(n.to_string()));
        }
        let part = |range: std::ops::Range<usize>| {
            let examples = self.examples[range.clone()].to_vec();
            match &self.segments {
                Some(segments) => Dataset::with_segments(examples, segments[range].to_vec()),
                None => Dataset::new(examples),
            }
        };
        Ok((part(0..n)?, part(n..self.len())?))
    }

    /// SHA-256 (64 hex digits) over lengths, ids and labels, and how they are packed: a resumed run asks whether its data is the same.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.get_or_init(|| fingerprint(&self.examples, self.segments())).clone()
    }
}

fn fingerprint(examples: &[Example], segments: Option<&[Vec<u32>]>) -> String {
    let mut hash = Sha256::new();
    hash.update(b"tunebook dataset 1\n");
    for example in examples {
        hash.update((example.input_ids.len() as u64).to_le_bytes());
        hash.update(bytemuck::cast_slice::<u32, u8>(&example.input_ids));
        hash.update(bytemuck::cast_slice::<i32, u8>(&example.labels));
    }
    if let Some(segments) = segments {
        hash.update(b"packed\n");
        for lengths in segments {
            hash.update((lengths.len() as u64).to_le_bytes());
            hash.update(bytemuck::cast_slice::<u32, u8>(lengths));
        }
    }
    let mut hex = String::with_capacity(64);
    for byte in hash.finalize() {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Dataset: {} {}, {} tokens ({} trained on), longest {}",
            self.len(),
            if self.segments.is_some() { "packed sequences" } else { "examples" },
            self.total_tokens(),
            self.trained_tokens(),
            self.max_len()
        )
    }
}
