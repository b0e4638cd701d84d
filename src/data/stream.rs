//! [`TextStream`]: tokens to text one at a time.

use crate::Result;
use crate::data::Tokenizer;

/// A character has at most four bytes, hence at most four byte tokens; more than that will not become one.
const MAX_PENDING: usize = 4;

/// Turns tokens into pieces of text that add up to the text of all of them.
///
/// A token alone has no text: a leading space may belong to it or not, and a character may be spread over several
/// byte tokens. So each piece is the difference between the texts with and without the new token, with some tokens
/// before it for context, and a piece is held back until its last character is whole.
#[derive(Clone, Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    special_tokens: bool,
    ids: Vec<u32>,
    /// `ids[start..read]` is context, whose text is known; `ids[read..]` is held back.
    start: usize,
    read: usize,
}

impl TextStream {
    /// A stream that continues after `context`, such as the prompt, whose own text is not repeated.
    ///
    /// - `special_tokens`: whether special tokens are written out or left out.
    pub fn new(tokenizer: &Tokenizer, context: &[u32], special_tokens: bool) -> Self {
        // Enough to hold a whole word and its leading space.
        let start = context.len().saturating_sub(16);
        let ids = context[start..].to_vec();
        TextStream { tokenizer: tokenizer.clone(), special_tokens, start: 0, read: ids.len(), ids }
    }

    /// Adds a token; the text that became whole with it, empty when there is none yet.
    ///
    /// # Errors
    /// An id that the tokenizer cannot decode.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let hold = self.ids.len() - self.read <= MAX_PENDING;
        self.take(hold)
    }

    /// The text that was still held back: a character that never became whole, as U+FFFD.
    ///
    /// # Errors
    /// An id that the tokenizer cannot decode.
    pub fn finish(&mut self) -> Result<String> {
        self.take(false)
    }

    fn take(&mut self, hold_incomplete: bool) -> Result<String> {
        let before = self.text(&self.ids[self.start..self.read])?;
        let after = self.text(&self.ids[self.start..])?;
        // The replacement character at the end stands for bytes whose followers are still to come.
        if hold_incomplete && after.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        if after.len() <= before.len() {
            // A token without text of its own, such as a special one.
            self.read = self.ids.len();
            return Ok(String::new());
        }
        let common =
            before.char_indices().zip(after.chars()).find(|((_, a), b)| a != b).map_or(before.len(), |((i, _), _)| i);
        let piece = after.get(common..).unwrap_or_default().to_string();
        self.start = self.read;
        self.read = self.ids.len();
        Ok(piece)
    }

    fn text(&self, ids: &[u32]) -> Result<String> {
        if self.special_tokens { self.tokenizer.decode_with_special_tokens(ids) } else { self.tokenizer.decode(ids) }
    }
}
