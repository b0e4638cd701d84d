//! [`Batch`]: a micro-batch as one flat list of tokens. Padding does not exist in it.

use crate::data::{Dataset, IGNORE_INDEX};
use crate::{Error, Result};

/// A micro-batch: the tokens of B examples one after another, N tokens in all.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
///
/// `labels` are **shifted**: `labels[t]` is the token that position `t` has to predict, [`IGNORE_INDEX`] where there is no
/// loss, which includes the last token of each example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[N]`.
    pub input_ids: Vec<u32>,
    /// Position of each token within its example, from 0, `[N]`.
    pub positions: Vec<u32>,
    /// Example `b` owns tokens `cu_seqlens[b]..cu_seqlens[b + 1]`; `[B + 1]`, from 0 to N.
    pub cu_seqlens: Vec<u32>,
    /// Targets, `[N]`, shifted.
    pub labels: Vec<i32>,
    /// Index in the data set of each example, `[B]`: of its sequence, where the data set is packed; a row's number for a
    /// batch that comes from no data set.
    pub examples: Vec<usize>,
}

impl Batch {
    /// The examples of `ds` at `indices`, in that order.
    ///
    /// # Panics
    /// When an index is not below `ds.len()`, as indexing a slice does.
    pub fn new(ds: &Dataset, indices: &[usize]) -> Self {
        let mut batch = Batch::empty();
        for &i in indices {
            let example = ds.get(i);
            let whole = [example.input_ids.len() as u32];
            let mut at = 0;
            for &n in ds.segments().map_or(&whole[..], |segments| &segments[i]) {
                let part = at..at + n as usize;
                batch.push(&example.input_ids[part.clone()], &example.labels[part.clone()], i);
                at = part.end;
            }
        }
        batch
    }

    /// A batch from the padded rectangles of other tools, each `[B][T]`: ids, mask (1 = token, 0 = padding), labels not
    /// shifted.
    ///
    /// Padding is removed by the mask, that is by position: an end-of-sequence token that serves as padding
    /// elsewhere keeps its label where it is a token. Padding may be on the left or on the right.
    ///
    /// # Errors
    /// Rectangles of different shapes; a row that is all padding, or with padding between its tokens.
    pub fn from_padded(input_ids: &[Vec<u32>], attention_mask: &[Vec<u8>], labels: &[Vec<i32>]) -> Result<Self> {
        let rows = input_ids.len();
        if rows == 0 || attention_mask.len() != rows || labels.len() != rows {
            return Err(Error::new("a padded batch has parts of different shapes")
                .expected("input_ids, attention_mask and labels with the same number of rows, at least one")
                .found(format!("{rows}, {} and {} rows", attention_mask.len(), labels.len())));
        }
        let mut batch = Batch::empty();
        for (row, ((ids, mask), labels)) in input_ids.iter().zip(attention_mask).zip(labels).enumerate() {
            if mask.len() != ids.len() || labels.len() != ids.len() {
                return Err(Error::new("a padded batch has parts of different shapes")
                    .at(format!("row {row}"))
                    .expected(format!("{} columns, as input_ids has", ids.len()))
                    .found(format!("attention_mask {}, labels {}", mask.len(), labels.len())));
            }
            let kept = mask_range(mask).ok_or_else(|| {
                Error::new("a padded batch has a mask that is not one run of tokens")
                    .at(format!("row {row}"))
                    .expected("0s, then at least one 1, then 0s")
                    .found(format!("{mask:?}"))
            })?;
            batch.push(&ids[kept.clone()], &labels[kept], row);
        }
        Ok(batch)
    }

    /// N: number of tokens.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// B: number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// True when there is no example in it.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// Number of positions that have a loss: labels other than -100.
    pub fn num_items(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE_INDEX).count()
    }

    /// Tokens of the longest example.
    pub fn max_len(&self) -> usize {
        self.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0)
    }

    fn empty() -> Self {
        Batch { input_ids: vec![], positions: vec![], cu_seqlens: vec![0], labels: vec![], examples: vec![] }
    }

    fn push(&mut self, ids: &[u32], labels: &[i32], index: usize) {
        self.input_ids.extend_from_slice(ids);
        self.positions.extend(0..ids.len() as u32);
        self.labels.extend(labels.iter().skip(1));
        self.labels.push(IGNORE_INDEX);
        self.cu_seqlens.push(self.input_ids.len() as u32);
        self.examples.push(index);
    }
}

/// The range of the ones, when they are one run.
fn mask_range(mask: &[u8]) -> Option<std::ops::Range<usize>> {
    let start = mask.iter().position(|&m| m == 1)?;
    let end = mask.iter().rposition(|&m| m == 1)? + 1;
    let outside = mask.iter().take(start).chain(mask.iter().skip(end));
    (mask[start..end].iter().all(|&m| m == 1) && outside.into_iter().all(|&m| m == 0)).then_some(start..end)
}
