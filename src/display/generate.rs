//! How a generated text shows itself: what was given muted, what the model wrote marked.

use super::html::escape;
use super::units::{count, number, seconds};
use super::{Card, Show, shown};
use crate::generate::Generation;

impl Show for Generation {
    fn card(&self) -> Card {
        let html = format!(
            "<div class=\"tb-text\"><span class=\"tb-off\">{}</span><mark class=\"tb-tok tb-on\">{}</mark></div>",
            escape(&self.prompt),
            escape(&self.text)
        );
        let speed = format!(
            "{} + {} tokens, {} to the first, then {} tokens/s; ended by {}",
            count(self.prompt_tokens as u64),
            count(self.tokens.len() as u64),
            seconds(self.seconds_prefill),
            number(self.tokens_per_second, 3),
            self.stop_reason
        );
        Card::new("Generation").subtitle(speed).html(html, format!("{}⟦{}⟧", self.prompt, self.text))
    }
}

shown!(+ Display Generation);
