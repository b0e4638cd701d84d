//! How a generated text shows itself: what was given muted, what the model wrote marked.

use super::data::short;
use super::html::escape;
use super::units::{count, number, percent, seconds};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::generate::{ExactMatch, Generation};

/// Questions that a table of answers shows.
const ANSWERS: usize = 6;

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

impl Show for ExactMatch {
    fn card(&self) -> Card {
        let title = format!("{} of {} answers exact: {}", self.exact(), self.answers.len(), percent(self.share()));
        let mut t = Table::new().words("question").words("wanted").words("written").words("");
        for a in self.answers.iter().take(ANSWERS) {
            let question = a.question.lines().last().unwrap_or_default();
            let (mark, tone) = if a.is_exact() { ("exact", Tone::Good) } else { ("", Tone::Muted) };
            let wrote = if a.wrote.is_empty() { "(nothing)".into() } else { short(&a.wrote, 56) };
            t.row([short(question, 40).into(), short(&a.wanted, 40).into(), wrote.into(), Cell::new(mark).tone(tone)]);
        }
        let card = Card::new(title).table(t);
        let more = self.answers.len().saturating_sub(ANSWERS);
        if more > 0 { card.note(format!("… {more} more")) } else { card }
    }
}

shown!(+ Display Generation);
shown!(ExactMatch { answers });
