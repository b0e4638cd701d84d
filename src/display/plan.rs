//! How a memory plan shows itself: the table by stage, the bar of the peak, and what is alive along one step.

use super::svg::{Bar, Frame, Layer, Segment, stacked_area, stacked_bars};
use super::units::{ByteUnit, bytes, count, percent, short_bytes};
use super::{Card, Cell, Show, Table, Tone, shown, text};
use crate::plan::{Gpu, MemoryPlan, Phase, Stage, TimelinePoint};

/// Columns of the timeline: more operations than these are gathered, the fullest of each group shown.
const COLUMNS: usize = 360;

/// The colour of a stage; the same as that of the same part of an estimate.
pub(super) fn stage_colour(stage: Stage) -> usize {
    match stage {
        Stage::Weights => 0,
        Stage::Adapters => 1,
        Stage::Checkpoints => 2,
        Stage::Gradients => 3,
        Stage::MasterWeights => 4,
        Stage::OptimizerState | Stage::Window => 5,
        Stage::Activations => 6,
        Stage::Batch => 7,
        Stage::KvCache => 8,
        Stage::ActivationGradients => 9,
        Stage::Scratch => 10,
    }
}

/// The colour of what the placement leaves unused.
pub(super) const UNUSED: usize = 11;

impl Show for MemoryPlan {
    fn card(&self) -> Card {
        let unit = ByteUnit::of(self.arena_bytes());
        let timeline = self.timeline(Phase::MicroStep);
        let mut card = Card::new(format!("Memory plan: {} of {}", self.config().method.label(), self.spec().name))
            .subtitle(asked(self))
            .figure(peak_bar(self, unit), peak_caption(self), "")
            .table(stages(self, unit));
        if let Some(phase) = shown_phase(self, &timeline) {
            let points = self.timeline(phase);
            card = card.figure(area(&points), timeline_caption(phase, &points), sparkline(&points));
        }
        card.facts(facts(self))
    }
}

/// What the plan was asked for, in one line.
fn asked(plan: &MemoryPlan) -> String {
    let c = plan.config();
    let mut parts = vec![format!("{} x {} tokens", c.micro_batch_size, c.max_seq_length)];
    if let Some(lora) = &c.lora {
        parts.push(format!("r {} on {}", lora.r, lora.target_modules));
    }
    if let Some(q) = &c.quantization {
        let nested = if q.double_quant { " with nested absmax" } else { "" };
        parts.push(format!("{}{nested}", q.quant_type.as_str().to_uppercase()));
    }
    if c.method != crate::plan::Method::Inference {
        parts.push(c.optim.name().to_owned());
        parts.push(format!("recomputes {}", c.checkpointing));
    }
    parts.push(format!("{} compute", c.compute_dtype.as_str()));
    parts.join(", ")
}

fn peak_bar(plan: &MemoryPlan, unit: ByteUnit) -> String {
    let segment = |row: &crate::plan::StageBytes| Segment {
        name: row.stage.map_or("unused", Stage::label).to_owned(),
        value: unit.value(row.device),
        colour: row.stage.map_or(UNUSED, stage_colour),
    };
    let bar = Bar { name: String::new(), segments: plan.table().iter().map(segment).collect() };
    stacked_bars(&[bar], &cards(plan.arena_bytes(), unit), unit.decimal, "the arena by stage, where most is alive")
}

/// The smallest card that it fits, as a mark.
fn cards(arena: u64, unit: ByteUnit) -> Vec<(f64, String)> {
    let fits = Gpu::presets().into_iter().find(|g| g.has_bf16() && g.usable_bytes() >= arena);
    let mark = |g: Gpu| (unit.value(g.usable_bytes()), g.name);
    // Far beyond the bar a mark would only shrink it.
    fits.filter(|g| g.usable_bytes() < 2 * arena).map(mark).into_iter().collect()
}

fn peak_caption(plan: &MemoryPlan) -> String {
    let Some(peak) = plan.peak() else { return String::new() };
    let all = plan.program(peak.phase).len();
    let at = format!(
        "{}, operation {} of {} ({})",
        peak.phase.label(),
        count(peak.index as u64 + 1),
        count(all as u64),
        peak.op
    );
    format!("The arena where most is alive: {at}. Allocated once, exact to the byte.")
}

fn stages(plan: &MemoryPlan, unit: ByteUnit) -> Table {
    let rows = plan.table();
    let (arena, host) = (plan.arena_bytes(), plan.host_bytes());
    let mut t = Table::new()
        .words("stage")
        .numbers("arena", unit.decimal)
        .numbers("arena", unit.binary)
        .numbers("share", "")
        .words("");
    if host > 0 {
        t = t.numbers("host", unit.decimal);
    }
    t = t.numbers("regions", "");
    for row in &rows {
        let (name, colour) = row.stage.map_or(("unused by the placement", UNUSED), |s| (s.label(), stage_colour(s)));
        let share = row.device as f64 / arena.max(1) as f64;
        let mut cells =
            vec![Cell::new(name).swatch(colour), unit.decimal(row.device).into(), unit.binary(row.device).into()];
        cells.extend([percent(share).into(), Cell::bar(share, colour)]);
        if host > 0 {
            cells.push(if row.host > 0 { unit.decimal(row.host).into() } else { Cell::new("-").tone(Tone::Muted) });
        }
        let regions = if row.regions > 0 { count(row.regions as u64) } else { "-".to_owned() };
        cells.push(Cell::new(regions).tone(Tone::Muted));
        t.row(cells);
    }
    let mut cells: Vec<Cell> =
        vec!["arena".into(), unit.decimal(arena).into(), unit.binary(arena).into(), "100.0 %".into(), "".into()];
    if host > 0 {
        cells.push(unit.decimal(host).into());
    }
    cells.push("".into());
    t.total(cells);
    t
}

fn facts(plan: &MemoryPlan) -> Vec<(String, String)> {
    let share = plan.trainable_params() as f64 / plan.total_params().max(1) as f64;
    let mut out = vec![("arena, one allocation".to_owned(), bytes(plan.arena_bytes()))];
    if plan.host_bytes() > 0 {
        out.push(("on the host".to_owned(), bytes(plan.host_bytes())));
    }
    if plan.transient_bytes() > 0 {
        out.push(("beside it, during one operation".to_owned(), format!("at most {}", bytes(plan.transient_bytes()))));
    }
    out.push(("always alive".to_owned(), bytes(plan.persistent_bytes())));
    for phase in [Phase::MicroStep, Phase::Optimizer, Phase::Evaluate, Phase::Generate] {
        if plan.phase_bytes(phase) > 0 {
            out.push((format!("reused by {}", phase.label()), bytes(plan.phase_bytes(phase))));
        }
    }
    if plan.trainable_params() > 0 {
        out.push((
            "trained parameters".to_owned(),
            format!("{} ({:.4} %)", count(plan.trainable_params()), 100.0 * share),
        ));
    }
    out.push(("KV cache".to_owned(), format!("{} tokens", count(plan.max_context() as u64))));
    out
}

/// The micro-step where there is one, else the phase that needs most.
fn shown_phase(plan: &MemoryPlan, micro_step: &[TimelinePoint]) -> Option<Phase> {
    if micro_step.is_empty() { plan.largest_phase() } else { Some(Phase::MicroStep) }
}

/// The fullest point of each group of neighbours.
fn gathered(points: &[TimelinePoint]) -> Vec<&TimelinePoint> {
    let columns = points.len().min(COLUMNS);
    let group = |i: usize| &points[i * points.len() / columns..(i + 1) * points.len() / columns];
    (0..columns).filter_map(|i| group(i).iter().max_by_key(|p| p.total())).collect()
}

/// What each stage always holds during these operations.
fn always(points: &[TimelinePoint]) -> [u64; Stage::ALL.len()] {
    let mut least = points.first().map_or([0; Stage::ALL.len()], |p| p.bytes);
    for p in points {
        for (l, b) in least.iter_mut().zip(&p.bytes) {
            *l = (*l).min(*b);
        }
    }
    least
}

/// Above what is always alive: weights would flatten everything else.
fn area(points: &[TimelinePoint]) -> String {
    let (shown, always) = (gathered(points), always(points));
    let base: u64 = always.iter().sum();
    let most = points.iter().map(TimelinePoint::total).max().unwrap_or(0).saturating_sub(base);
    let unit = ByteUnit::of(most);
    let layer = |(i, stage): (usize, Stage)| Layer {
        values: shown.iter().map(|p| unit.value(p.bytes[i] - always[i])).collect(),
        colour: stage_colour(stage),
    };
    let layers: Vec<Layer> = Stage::ALL.into_iter().enumerate().map(layer).collect();
    let turn = points.iter().position(|p| p.op == "lm_head_ce");
    let marks: Vec<(f64, String)> = turn.map(|i| (i as f64 + 0.5, "loss".to_owned())).into_iter().collect();
    let frame = Frame::around([0.0, points.len() as f64], [0.0, 1.12 * unit.value(most)])
        .from_zero()
        .labels("operation", &format!("comes and goes ({})", unit.decimal))
        .size(720, 240)
        .alt("memory alive at each operation, by stage");
    stacked_area(&frame, &layers, &marks)
}

fn timeline_caption(phase: Phase, points: &[TimelinePoint]) -> String {
    let base: u64 = always(points).iter().sum();
    let way = if phase == Phase::MicroStep { ": forward to the loss, then backward" } else { "" };
    format!(
        "The {} operations of one {}{way}. {} are alive all the time; this is what comes and goes beyond that.",
        count(points.len() as u64),
        phase.label(),
        short_bytes(base)
    )
}

fn sparkline(points: &[TimelinePoint]) -> String {
    let totals: Vec<f64> = gathered(points).iter().map(|p| p.total() as f64).collect();
    let (low, high) = points.iter().map(TimelinePoint::total).fold((u64::MAX, 0), |(l, h), v| (l.min(v), h.max(v)));
    format!("{}  {} to {}", text::sparkline(&totals, 72), short_bytes(low), short_bytes(high))
}

impl std::fmt::Debug for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !f.alternate() {
            return std::fmt::Display::fmt(self, f);
        }
        f.debug_struct("MemoryPlan")
            .field("spec", self.spec())
            .field("config", self.config())
            .field("arena_bytes", &self.arena_bytes())
            .field("host_bytes", &self.host_bytes())
            .field("regions", &self.regions())
            .finish()
    }
}

shown!(+ Display MemoryPlan);
