//! How one run under every method shows itself: ours exact, theirs estimated.

use super::estimate::part_colour;
use super::plan::stage_colour;
use super::svg::{Bar, Segment, stacked_bars};
use super::units::{ByteUnit, short_count};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::plan::{Estimate, Gpu, MemoryPlan, MethodTable, Part, Stage};

impl Show for MethodTable {
    fn card(&self) -> Card {
        let both = |r: &crate::plan::MethodRow| [r.plan.arena_bytes(), r.estimate.total];
        let largest = self.rows.iter().flat_map(both).max().unwrap_or(0);
        let unit = ByteUnit::of(largest);
        let bars: Vec<Bar> = self
            .rows
            .iter()
            .flat_map(|r| {
                [ours(&r.plan, unit, format!("{}: here", r.name)), theirs(&r.estimate, unit, "elsewhere".into())]
            })
            .collect();
        Card::new(format!("Every method on {}", self.model))
            .subtitle(format!("{} x {} tokens", self.micro_batch_size, self.seq))
            .figure(
                stacked_bars(&bars, &[], unit.decimal, "memory by method, here and elsewhere"),
                "Blue weights, orange adapter, red gradients, purple optimizer, sky master weights or logits; then activations and temporaries.",
                "",
            )
            .table(table(self, unit, largest))
            .note(
                "here: what this library allocates, exact to the byte. elsewhere: an estimate of the peak of PyTorch's allocator \
                 under transformers + PEFT + bitsandbytes. The CUDA context comes on top of both.",
            )
    }
}

fn ours(plan: &MemoryPlan, unit: ByteUnit, name: String) -> Bar {
    let segment = |row: &crate::plan::StageBytes| Segment {
        name: row.stage.map_or("", Stage::label).to_owned(),
        value: unit.value(row.device),
        colour: row.stage.map_or(11, stage_colour),
    };
    Bar { name, segments: plan.table().iter().map(segment).collect() }
}

fn theirs(estimate: &Estimate, unit: ByteUnit, name: String) -> Bar {
    let part = |part: Part| Segment {
        name: part.name().to_owned(),
        value: unit.value(estimate.at_peak(part)),
        colour: part_colour(part),
    };
    Bar { name, segments: Part::ALL.map(part).to_vec() }
}

fn table(methods: &MethodTable, unit: ByteUnit, largest: u64) -> Table {
    let mut t = Table::new()
        .words("method")
        .numbers("here", unit.decimal)
        .words("")
        .numbers("elsewhere", unit.decimal)
        .numbers("ratio", "")
        .numbers("trained", "")
        .words("smallest card");
    for row in &methods.rows {
        let (here, elsewhere) = (row.plan.arena_bytes(), row.estimate.total);
        let card = Gpu::presets().into_iter().find(|g| g.has_bf16() && g.usable_bytes() >= here);
        let card = card.map_or_else(|| "none known".to_owned(), |g| g.name);
        let trained = row.plan.trainable_params();
        t.row([
            Cell::new(&row.name),
            Cell::new(unit.decimal(here)).tone(Tone::Strong),
            Cell::bar(here as f64 / largest.max(1) as f64, 0),
            Cell::new(unit.decimal(elsewhere)).tone(Tone::Muted),
            Cell::new(format!("{:.2}", elsewhere as f64 / here.max(1) as f64)).tone(Tone::Muted),
            Cell::new(if trained > 0 { short_count(trained) } else { "-".to_owned() }),
            Cell::new(card).tone(Tone::Muted),
        ]);
    }
    t
}

shown!(MethodTable { model, micro_batch_size, seq, rows });
