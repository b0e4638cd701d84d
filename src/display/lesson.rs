//! How checks, blocks, surveys and plans side by side show themselves.

use super::plan::stage_colour;
use super::svg::{Bar, Frame, Line, Segment, lines, stacked_bars};
use super::units::{ByteUnit, bytes, count, number, percent};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::lesson::Check;
use crate::nf4::BlockView;
use crate::plan::{SideBySide, Stage};
use crate::survey::{Survey, SurveyRow};

impl Show for Check {
    fn card(&self) -> Card {
        let (sign, not, tone) = if self.passed { ("✓", "", Tone::Good) } else { ("✗", "not yet ", Tone::Bad) };
        let mut t = Table::new().words("").words("");
        t.row([Cell::new("yours").tone(Tone::Muted), Cell::new(&self.yours).tone(Tone::Strong)]);
        t.row([Cell::new("expected").tone(Tone::Muted), Cell::new(&self.expected)]);
        t.row([Cell::new(""), Cell::new(format!("{sign} {not}{}", self.rule)).tone(tone)]);
        Card::new(format!("Check: {}", self.what)).table(t)
    }
}

shown!(Check { what, yours, expected, rule, passed });

/// Elements that the table of a block shows.
const ELEMENTS: usize = 16;

impl Show for BlockView {
    fn card(&self) -> Card {
        let mut t = Table::new()
            .numbers("element", "")
            .numbers("value", "")
            .numbers("/ absmax", "")
            .numbers("code", "")
            .words("bits")
            .numbers("level", "")
            .numbers("decoded", "")
            .numbers("error", "");
        for e in self.elements.iter().take(ELEMENTS) {
            t.row([
                Cell::new(count(e.index as u64)).tone(Tone::Muted),
                fixed(e.value).into(),
                fixed(e.scaled).into(),
                Cell::new(e.code.to_string()).tone(Tone::Strong),
                Cell::new(format!("{:04b}", e.code)).code(),
                fixed(e.level).into(),
                fixed(e.decoded).into(),
                Cell::new(fixed(e.decoded - e.value)).tone(Tone::Muted),
            ]);
        }
        let packed = self.packed.iter().take(ELEMENTS / 2).map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
        let more = if self.packed.len() > ELEMENTS / 2 { " …" } else { "" };
        let mut absmax = number(f64::from(self.absmax), 6);
        if self.absmax != self.exact_absmax {
            absmax = format!("{absmax} (exact: {})", number(f64::from(self.exact_absmax), 6));
        }
        let mut card = Card::new(format!("Block {} in {}", self.block, self.quant_type.as_str().to_uppercase()))
            .subtitle(format!(
                "{} elements, error {} of their norm",
                self.elements.len(),
                percent(self.relative_error())
            ))
            .figure(
                number_line(self),
                "The levels (orange ticks), and where each value of the block falls (blue dots).",
                "",
            )
            .table(t);
        if self.elements.len() > ELEMENTS {
            card = card.note(format!("… {} more elements", self.elements.len() - ELEMENTS));
        }
        card.facts([("absmax", absmax), ("packed bytes", format!("{packed}{more}"))])
    }
}

fn fixed(x: f32) -> String {
    let text = format!("{x:.4}");
    if text == "-0.0000" { "0.0000".to_owned() } else { text }
}

fn number_line(view: &BlockView) -> String {
    let mut all = Vec::new();
    for level in view.quant_type.code().map(f64::from) {
        all.push(Line { width: 25, ..Line::new(vec![(level, 0.1), (level, 0.9)], 1) });
    }
    for e in &view.elements {
        all.push(Line { dots: true, ..Line::new(vec![(f64::from(e.scaled), 1.35)], 0) });
    }
    let mut frame = Frame::around([-1.08, 1.08], [])
        .labels("value / absmax", "")
        .size(640, 92)
        .alt("values of the block over the 16 levels, each divided by the block's absmax");
    frame.y = 0.0..1.7;
    lines(&frame, &all, &[])
}

shown!(BlockView { block, quant_type, absmax, exact_absmax, elements, packed });

impl Show for SideBySide {
    fn card(&self) -> Card {
        let largest = self.plans.iter().map(|(_, p)| p.arena_bytes()).max().unwrap_or(0);
        let unit = ByteUnit::of(largest);
        let segment = |row: &crate::plan::StageBytes| Segment {
            name: row.stage.map_or("unused", Stage::label).to_owned(),
            value: unit.value(row.device),
            colour: row.stage.map_or(super::plan::UNUSED, stage_colour),
        };
        let bars: Vec<Bar> = self
            .plans
            .iter()
            .map(|(name, plan)| Bar { name: name.clone(), segments: plan.table().iter().map(segment).collect() })
            .collect();
        Card::new("Memory plans side by side")
            .figure(stacked_bars(&bars, &[], unit.decimal, "arena of each plan by stage"), legend(self), "")
            .table(by_stage(self, unit))
    }
}

fn legend(plans: &SideBySide) -> String {
    let models: Vec<&str> = plans.plans.iter().map(|(_, p)| p.spec().name.as_str()).collect();
    let same = models.windows(2).all(|w| w[0] == w[1]);
    let of = models.first().filter(|_| same).map_or_else(String::new, |m| format!(" of {m}"));
    format!("The arenas{of}, each where most is alive, on one scale; the table has the keys.")
}

/// One row per stage, one column per plan, and each plan's difference from the first.
fn by_stage(plans: &SideBySide, unit: ByteUnit) -> Table {
    let mut t = Table::new().caption(format!("{} by stage", unit.decimal)).words("stage");
    for (name, _) in &plans.plans {
        t = t.numbers(name, "");
    }
    let tables: Vec<_> = plans.plans.iter().map(|(_, p)| p.table()).collect();
    let stages = Stage::ALL.into_iter().map(Some).chain([None]);
    for stage in stages.filter(|s| tables.iter().flatten().any(|row| row.stage == *s)) {
        let (name, colour) = stage.map_or(("unused", super::plan::UNUSED), |s| (s.label(), stage_colour(s)));
        let mut cells = vec![Cell::new(name).swatch(colour)];
        for table in &tables {
            let row = table.iter().find(|row| row.stage == stage);
            cells.push(row.map_or_else(|| Cell::new("-").tone(Tone::Muted), |r| unit.decimal(r.device).into()));
        }
        t.row(cells);
    }
    let arena = |p: &crate::plan::MemoryPlan| p.arena_bytes();
    let mut cells = vec![Cell::new("arena")];
    cells.extend(plans.plans.iter().map(|(_, p)| Cell::new(unit.decimal(arena(p)))));
    t.total(cells);
    let first = plans.plans.first().map_or(0, |(_, p)| arena(p));
    let mut cells = vec![Cell::new("against the first").tone(Tone::Muted)];
    cells.extend(plans.plans.iter().enumerate().map(|(i, (_, p))| {
        let sign = if arena(p) < first { "-" } else { "+" };
        let text = if i == 0 { String::new() } else { format!("{sign}{}", unit.decimal(arena(p).abs_diff(first))) };
        Cell::new(text).tone(Tone::Muted)
    }));
    t.row(cells);
    t
}

shown!(SideBySide { plans });

impl Show for Survey {
    fn card(&self) -> Card {
        let (rows, total) = (&self.rows, self.spec.total_params());
        Card::new(format!("{} in {}", self.spec.name, self.config.quant_type.as_str().to_uppercase()))
            .subtitle(format!("{} linear layers, each compared with its original", count(rows.len() as u64)))
            .html(field(rows), field_text(rows))
            .table(worst(self))
            .facts([
                (
                    "quantized layers",
                    format!(
                        "{:.4} bits per weight, {}",
                        self.bits_per_quantized_weight(),
                        bytes(self.quantized_bytes())
                    ),
                ),
                (
                    "the whole model",
                    format!("{:.4} bits per weight, {}", self.bits_per_weight(), bytes(self.model_bytes())),
                ),
                (
                    "in 16 bits it is",
                    format!(
                        "{}, {:.2} times as much",
                        bytes(2 * total),
                        2.0 * total as f64 / self.model_bytes().max(1) as f64
                    ),
                ),
            ])
    }
}

/// Kinds of modules in the order of the network.
fn leaves(rows: &[SurveyRow]) -> Vec<&str> {
    let mut out: Vec<&str> = Vec::new();
    for r in rows {
        if !out.contains(&r.leaf.as_str()) {
            out.push(&r.leaf);
        }
    }
    out
}

fn layers(rows: &[SurveyRow]) -> Vec<usize> {
    let mut out: Vec<usize> = rows.iter().map(|r| r.layer).collect();
    out.sort_unstable();
    out.dedup();
    out
}

fn at<'a>(rows: &'a [SurveyRow], layer: usize, leaf: &str) -> Option<&'a SurveyRow> {
    rows.iter().find(|r| r.layer == layer && r.leaf == leaf)
}

/// Layers down, kinds of modules across, the relative error in each cell; fuller where it is larger.
fn field(rows: &[SurveyRow]) -> String {
    use super::html::escape;
    let (low, high) = rows.iter().fold((f64::MAX, 0.0_f64), |(l, h), r| (l.min(r.relative), h.max(r.relative)));
    let share = |v: f64| if high > low { 6.0 + 64.0 * (v - low) / (high - low) } else { 20.0 };
    let mut out = String::from(
        "<table class=\"tb-t tb-field\"><caption>Error / weight (norms), by layer and kind</caption><thead><tr><th>layer</th>",
    );
    for leaf in leaves(rows) {
        out.push_str(&format!("<th class=\"tb-r\">{}</th>", escape(leaf)));
    }
    out.push_str("</tr></thead><tbody>");
    for layer in layers(rows) {
        out.push_str(&format!("<tr><td>{layer}</td>"));
        for leaf in leaves(rows) {
            match at(rows, layer, leaf) {
                Some(r) => out.push_str(&format!(
                    "<td class=\"tb-r\" style=\"background:color-mix(in srgb,{} {:.0}%,transparent)\">{}</td>",
                    super::html::colour(3),
                    share(r.relative),
                    percent2(r.relative)
                )),
                None => out.push_str("<td></td>"),
            }
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table>");
    out
}

fn field_text(rows: &[SurveyRow]) -> String {
    let mut t = Table::new().caption("Error / weight (norms), by layer and kind").words("layer");
    for leaf in leaves(rows) {
        t = t.numbers(leaf, "");
    }
    for layer in layers(rows) {
        let mut cells = vec![Cell::new(layer.to_string())];
        cells.extend(
            leaves(rows).iter().map(|l| Cell::new(at(rows, layer, l).map_or("-".into(), |r| percent2(r.relative)))),
        );
        t.row(cells);
    }
    super::text::table(&t)
}

fn percent2(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

fn worst(s: &Survey) -> Table {
    let mut t = Table::new()
        .caption("The layers that lose most")
        .words("module")
        .numbers("error", "")
        .numbers("kurtosis", "")
        .numbers("largest", "rms")
        .numbers("worst block", "mse");
    for r in s.worst(5) {
        t.row([
            Cell::new(r.module.trim_start_matches("model.")).code(),
            percent2(r.relative).into(),
            format!("{:.2}", r.kurtosis).into(),
            format!("{:.1}", r.largest).into(),
            format!("x {:.1}", r.worst_block).into(),
        ]);
    }
    t
}

shown!(+ Display Survey);
