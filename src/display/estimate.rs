//! How an [`Estimate`] shows itself: each component at each moment, and the peak.

use super::svg::{Bar, Segment, stacked_bars};
use super::units::{ByteUnit, bytes, count, short_bytes};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::plan::{Estimate, Gpu, Part};

/// The colour of a part; the same as that of the same stage of a memory plan.
pub(super) fn part_colour(part: Part) -> usize {
    match part {
        Part::Weights => 0,
        Part::Adapter => 1,
        Part::Activations => 2,
        Part::Gradients => 3,
        Part::Logits => 4,
        Part::Optimizer => 5,
        Part::Workspace => 7,
    }
}

impl Show for Estimate {
    fn card(&self) -> Card {
        let c = &self.config;
        let tokens = format!("{} x {} tokens", c.micro_batch_size, c.seq);
        let mut what = vec![c.method.name().to_owned(), tokens];
        if c.method.has_adapter() {
            what.push(format!("r {}", c.r));
        }
        if c.method.trains() {
            what.push(c.optim.name().to_owned());
            what.push(if c.gradient_checkpointing { "checkpointing" } else { "no checkpointing" }.to_owned());
        }
        let mut card = Card::new(format!("Estimate for transformers + PEFT + bitsandbytes: {}", self.model))
            .subtitle(what.join(", "))
            .figure(moments_chart(self), "What is live at each moment; the longest bar is the peak.", "")
            .table(components(self));
        let mut facts = vec![("peak of the allocator", bytes(self.total))];
        if self.trainable_params > 0 {
            facts.push(("trained parameters", count(self.trainable_params)));
        }
        if self.paged_bytes > 0 {
            facts.push((
                "paged optimizer state",
                format!("{}, unified memory that the allocator does not see", bytes(self.paged_bytes)),
            ));
        }
        card = card.facts(facts);
        card.note(
            "An estimate: the CUDA context and what PyTorch's allocator reserves beyond what it uses come on top.",
        )
    }
}

fn moments_chart(e: &Estimate) -> String {
    let unit = ByteUnit::of(e.total);
    let bar = |(i, moment): (usize, &crate::plan::Moment)| {
        let part = |part: Part| {
            let bytes: u64 = e.components.iter().filter(|c| c.part == part).filter_map(|c| c.live.get(i)).sum();
            Segment { name: part.name().to_owned(), value: unit.value(bytes), colour: part_colour(part) }
        };
        Bar { name: moment.name.clone(), segments: Part::ALL.into_iter().map(part).collect() }
    };
    let bars: Vec<Bar> = e.moments.iter().enumerate().map(bar).collect();
    stacked_bars(&bars, &[], unit.decimal, "memory by part at each moment of a step")
}

fn components(e: &Estimate) -> Table {
    let unit = ByteUnit::of(e.total);
    let peak = e.peak();
    let tokens = self::count(e.config.micro_batch_size as u64 * e.config.seq as u64);
    let during = if e.config.method.trains() { "Live in the backward pass of" } else { "Live during" };
    let mut t = Table::new().caption(format!("{during} (T = {tokens} tokens)")).words("component");
    for moment in &e.moments {
        t = t.numbers(moment.name.trim_start_matches("backward of "), unit.decimal);
    }
    t = t.words("how");
    for part in Part::ALL {
        for c in e.components.iter().filter(|c| c.part == part) {
            let mut cells = vec![Cell::new(&c.name).swatch(part_colour(part))];
            cells.extend(c.live.iter().enumerate().map(|(i, &b)| live(unit, b, i == peak)));
            cells.push(Cell::new(&c.formula).tone(Tone::Muted));
            t.row(cells);
        }
    }
    let mut cells = vec![Cell::new("total")];
    cells.extend(e.moments.iter().enumerate().map(|(i, m)| live(unit, m.bytes, i == peak)));
    cells.push(Cell::new(format!("peak {}", short_bytes(e.total))).tone(Tone::Muted));
    t.total(cells);
    t
}

fn live(unit: ByteUnit, bytes: u64, peak: bool) -> Cell {
    let text = if bytes == 0 { "-".to_owned() } else { unit.decimal(bytes) };
    Cell::new(text).tone(if peak { Tone::Plain } else { Tone::Muted })
}

shown!(Estimate { model, config, components, moments, total, paged_bytes, layer, trainable_params });

impl Show for Gpu {
    fn card(&self) -> Card {
        let (major, minor) = self.compute_capability;
        Card::new(&self.name).facts([
            ("memory", bytes(self.total_bytes)),
            (context_label(self), bytes(self.context_bytes)),
            ("left for a run", bytes(self.usable_bytes())),
            ("compute capability", format!("{major}.{minor}, {}", if self.has_bf16() { "bf16" } else { "no bf16" })),
        ])
    }
}

shown!(Gpu { name, total_bytes, context_bytes, context_measured, compute_capability });

/// The row of what a card holds beside the arena.
pub(super) fn context_label(gpu: &Gpu) -> &'static str {
    if gpu.context_measured { "CUDA context and kernels (measured)" } else { "CUDA context and kernels (estimate)" }
}
