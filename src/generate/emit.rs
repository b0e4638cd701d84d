//! Text on its way out: whole characters only, and nothing that may turn out to be a stop string.

use crate::Result;
use crate::data::{TextStream, Tokenizer};

/// Collects the text of tokens and hands on what is certain.
pub struct Emitter {
    stream: TextStream,
    stop_strings: Vec<String>,
    text: String,
    /// Bytes of `text` that were handed on.
    emitted: usize,
}

impl Emitter {
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32], stop_strings: &[String]) -> Self {
        let stop_strings = stop_strings.iter().filter(|s| !s.is_empty()).cloned().collect();
        Emitter { stream: TextStream::new(tokenizer, prompt, false), stop_strings, text: String::new(), emitted: 0 }
    }

    /// Adds a token; the stop string that the text now contains, which is cut off.
    pub fn push(&mut self, id: u32, on_text: &mut dyn FnMut(&str)) -> Result<Option<String>> {
        let piece = self.stream.push(id)?;
        Ok(self.add(&piece, on_text))
    }

    /// The whole text, after what was held back is handed on too.
    pub fn finish(mut self, stopped: bool, on_text: &mut dyn FnMut(&str)) -> Result<String> {
        if !stopped {
            let piece = self.stream.finish()?;
            self.add(&piece, on_text);
        }
        self.emit(self.text.len(), on_text);
        Ok(self.text)
    }

    fn add(&mut self, piece: &str, on_text: &mut dyn FnMut(&str)) -> Option<String> {
        self.text.push_str(piece);
        let found = self.stop_strings.iter().filter_map(|s| self.text.find(s.as_str()).map(|at| (at, s.clone()))).min();
        if let Some((at, stop)) = found {
            self.text.truncate(at);
            self.emit(at, on_text);
            return Some(stop);
        }
        self.emit(self.text.len() - self.held_back(), on_text);
        None
    }

    /// Bytes at the end of the text that may be the beginning of a stop string.
    fn held_back(&self) -> usize {
        let longest = self.stop_strings.iter().map(String::len).max().unwrap_or(0);
        let tails =
            self.text.char_indices().rev().map(|(i, _)| &self.text[i..]).take_while(|tail| tail.len() < longest);
        tails.filter(|tail| self.stop_strings.iter().any(|s| s.starts_with(tail))).map(str::len).max().unwrap_or(0)
    }

    fn emit(&mut self, upto: usize, on_text: &mut dyn FnMut(&str)) {
        if upto > self.emitted {
            on_text(&self.text[self.emitted..upto]);
            self.emitted = upto;
        }
    }
}
