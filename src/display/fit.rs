//! How a plan against a card shows itself, and against all known cards.

use super::estimate::context_label;
use super::svg::{Bar, Segment, stacked_bars};
use super::units::{ByteUnit, bytes, percent, short_bytes};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::plan::{Fit, FitTable, Fitted};

impl Show for Fit {
    fn card(&self) -> Card {
        let (sign, verdict) = if self.fits() { ("✓", "fits") } else { ("✗", "does not fit") };
        let margin = self.margin_bytes();
        let left = if margin >= 0 { "left" } else { "missing" };
        let mut card = Card::new(format!("{sign} {verdict} on {}", self.gpu.name))
            .subtitle(format!("{} {left}", bytes(margin.unsigned_abs())))
            .figure(bar(self), "The arena and what the card's runtime holds beside it, against the card's memory.", "")
            .facts([
                ("arena", bytes(self.arena_bytes)),
                (context_label(&self.gpu), bytes(self.gpu.context_bytes)),
                ("needed", bytes(self.needed_bytes)),
                ("memory of the card", bytes(self.gpu.total_bytes)),
            ]);
        if !self.changes.is_empty() {
            card = card.table(changes(self));
        }
        if let Some(smallest) = self.smallest_bytes {
            card = card.note(format!(
                "No change makes it fit: with one sequence, every layer recomputed and paged 8-bit state it still needs {}.",
                bytes(smallest)
            ));
        }
        card
    }
}

fn bar(fit: &Fit) -> String {
    let unit = ByteUnit::of(fit.needed_bytes.max(fit.gpu.total_bytes));
    let part = |name: &str, bytes, colour| Segment { name: name.to_owned(), value: unit.value(bytes), colour };
    let segments = vec![part("arena", fit.arena_bytes, 0), part("context", fit.gpu.context_bytes, 7)];
    let mark = (unit.value(fit.gpu.total_bytes), fit.gpu.name.clone());
    stacked_bars(&[Bar { name: String::new(), segments }], &[mark], unit.decimal, "needed against the card's memory")
}

fn changes(fit: &Fit) -> Table {
    let mut t = Table::new()
        .caption("The cheapest changes that make it fit")
        .words("change")
        .numbers("then needs", "")
        .words("cost");
    for c in &fit.changes {
        t.row([Cell::new(&c.what).code(), short_bytes(c.needed_bytes).into(), Cell::new(&c.cost).tone(Tone::Muted)]);
    }
    t
}

impl Show for FitTable {
    fn card(&self) -> Card {
        let largest = self.fits.iter().map(|f| f.needed_bytes.max(f.gpu.total_bytes)).max().unwrap_or(0);
        let unit = ByteUnit::of(largest);
        let mut t = Table::new()
            .words("card")
            .numbers("memory", unit.binary)
            .numbers("needed", unit.binary)
            .numbers("left", unit.binary)
            .words("")
            .numbers("used", "")
            .words("");
        for fit in &self.fits {
            t.row(row(fit, unit));
        }
        let smallest = self.fits.iter().find(|f| f.fits());
        let subtitle = match smallest {
            Some(f) => format!("the smallest card that it fits is {} with {}", f.gpu.name, bytes(f.gpu.total_bytes)),
            None => "it fits none of them".to_owned(),
        };
        Card::new(format!("{} on known cards", self.plan)).subtitle(subtitle).table(t)
    }
}

fn row(fit: &Fit, unit: ByteUnit) -> [Cell; 7] {
    let margin = fit.margin_bytes();
    let sign = if margin < 0 { "-" } else { "" };
    let share = fit.needed_bytes as f64 / fit.gpu.total_bytes.max(1) as f64;
    let (text, tone) = match (fit.fits(), fit.gpu.has_bf16()) {
        (true, true) => ("✓ fits", Tone::Good),
        (true, false) => ("✓ fits, but no bf16", Tone::Muted),
        (false, _) => ("✗ too small", Tone::Bad),
    };
    [
        Cell::new(&fit.gpu.name),
        unit.binary(fit.gpu.total_bytes).into(),
        Cell::new(unit.binary(fit.needed_bytes)).tone(Tone::Muted),
        format!("{sign}{}", unit.binary(margin.unsigned_abs())).into(),
        Cell::new(text).tone(tone),
        percent(share).into(),
        Cell::bar(share, if fit.fits() { 2 } else { 3 }),
    ]
}

impl Show for Fitted {
    fn card(&self) -> Card {
        let mut card = self.plan.card();
        card.title = format!("Chosen for {}: {}", self.gpu.name, card.title);
        let mut t = Table::new().caption("What was chosen, and why").words("");
        for reason in &self.reasons {
            t.row([Cell::new(reason)]);
        }
        card.blocks.insert(0, super::Block::Table(t));
        card
    }
}

shown!(Fit { gpu, arena_bytes, needed_bytes, changes, smallest_bytes });
shown!(FitTable { plan, fits });
shown!(Fitted { plan, gpu, reasons });
