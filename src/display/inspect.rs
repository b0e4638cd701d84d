//! How a look inside a quantized tensor shows itself: levels over the weights, scales, error by block, schemes compared.

use super::svg::{Frame, Line, heat, histogram, lines};
use super::units::{bytes, count, number, percent};
use super::{Card, Cell, Show, Table, Tone, shown, text};
use crate::nf4::{BlockError, Comparison, ErrorReport, Histogram, Inspection, SchemeReport};

/// Cells of the field of blocks: more blocks than these are gathered, the worst of each group shown.
const CELLS: usize = 640;
/// Cells in a row of it.
const COLUMNS: usize = 64;
/// Blocks that the table of the worst shows.
const WORST: usize = 5;

impl Show for Inspection {
    fn card(&self) -> Card {
        let n: u64 = self.usage.iter().sum();
        let title = format!("4-bit tensor of {} elements", count(n));
        let mut card = Card::new(title)
            .subtitle(format!("{} bits per weight, everything counted", number(self.bits_per_weight, 5)))
            .facts(summary(self));
        if let Some(e) = &self.error {
            let caption = "Weights divided by their block's absmax, and the 16 values that they are rounded to.";
            card = card.figure(levels_chart(e, &self.code), caption, histogram_text(&e.scaled));
        }
        card = card.table(usage(self)).figure(
            absmax_chart(&self.absmax),
            "The scales: absmax of each block.",
            histogram_text(&self.absmax),
        );
        if let Some(e) = &self.error {
            let (svg, caption, text) = blocks(e);
            card = card.figure(svg, caption, text).table(worst(e));
        }
        card.table(sizes(self))
    }
}

fn summary(i: &Inspection) -> Vec<(&'static str, String)> {
    let mut out = vec![("entropy of the codes", format!("{:.3} of 4 bits", i.entropy))];
    let Some(e) = &i.error else { return out };
    out.push(("error / weight (norms)", percent(e.relative)));
    out.push(("signal to noise (SQNR)", format!("{:.2} dB", e.sqnr_db)));
    out.push(("mean squared error", number(e.mse, 4)));
    out.push(("largest error", number(e.max_abs, 4)));
    out.push(("mean error (bias)", number(e.bias, 3)));
    if let Some(share) = e.nested_share {
        out.push(("of the error, due to nesting", format!("{:.2} %", 100.0 * share)));
    }
    out
}

fn levels_chart(e: &ErrorReport, code: &[f32; 16]) -> String {
    let counts: Vec<f64> = e.scaled.counts.iter().map(|&c| c as f64).collect();
    // The ends hold the absmax of every block and would flatten the rest.
    let inner = counts.get(1..counts.len().saturating_sub(1)).unwrap_or_default();
    let most = inner.iter().copied().fold(1.0, f64::max);
    let frame = Frame::around([e.scaled.min, e.scaled.max], [0.0, 1.12 * most])
        .from_zero()
        .labels("weight / absmax", "weights per bin")
        .size(720, 220)
        .alt("histogram of the scaled weights with the 16 levels");
    let clipped: Vec<f64> = counts.iter().map(|c| c.min(frame.y.end)).collect();
    let levels: Vec<f64> = code.iter().map(|&l| f64::from(l)).collect();
    histogram(&frame, &clipped, 0, &levels, 1)
}

fn absmax_chart(h: &Histogram) -> String {
    let counts: Vec<f64> = h.counts.iter().map(|&c| c as f64).collect();
    let most = counts.iter().copied().fold(1.0, f64::max);
    let frame = Frame::around([h.min, h.max], [0.0, 1.12 * most])
        .from_zero()
        .labels("absmax", "blocks per bin")
        .size(720, 160)
        .alt("histogram of the scales");
    histogram(&frame, &counts, 5, &[], 1)
}

fn histogram_text(h: &Histogram) -> String {
    let counts: Vec<f64> = h.counts.iter().map(|&c| c as f64).collect();
    format!("{}  {} to {}", text::sparkline(&counts, 64), number(h.min, 3), number(h.max, 3))
}

fn usage(i: &Inspection) -> Table {
    let n = i.usage.iter().sum::<u64>().max(1) as f64;
    let most = i.usage.iter().max().copied().unwrap_or(0).max(1) as f64;
    let mut t = Table::new()
        .caption("Use of the sixteen values")
        .numbers("code", "")
        .numbers("value", "")
        .numbers("elements", "")
        .numbers("share", "")
        .words("");
    for (code, (value, used)) in i.code.iter().zip(i.usage).enumerate() {
        t.row([
            Cell::new(code.to_string()).tone(Tone::Muted),
            format!("{value:.4}").into(),
            count(used).into(),
            percent(used as f64 / n).into(),
            Cell::bar(used as f64 / most, 1),
        ]);
    }
    t
}

/// The mean squared error of each block as a field, row by row.
fn blocks(e: &ErrorReport) -> (String, String, String) {
    let group = e.blocks.len().div_ceil(CELLS).max(1);
    let worst = |b: &[BlockError]| b.iter().map(|b| f64::from(b.mse)).fold(0.0, f64::max);
    let values: Vec<f64> = e.blocks.chunks(group).map(worst).collect();
    let of = if group > 1 { format!("the worst of {group} blocks") } else { "one block".to_owned() };
    let caption =
        format!("Mean squared error by block, from faint (least) to full. A cell is {of}; left to right, then down.");
    let svg = heat(&values, COLUMNS.min(values.len().max(1)), 3, "mean squared error by block");
    (svg, caption, text::sparkline(&values, COLUMNS))
}

fn worst(e: &ErrorReport) -> Table {
    let mut t = Table::new()
        .caption("The worst blocks")
        .numbers("block", "")
        .numbers("absmax", "")
        .numbers("mean squared error", "")
        .numbers("of the average", "")
        .numbers("largest error", "")
        .numbers("error / weight", "");
    for b in e.worst(WORST) {
        t.row([
            Cell::new(count(b.block as u64)),
            number(f64::from(b.absmax), 4).into(),
            number(f64::from(b.mse), 4).into(),
            format!("x {:.1}", f64::from(b.mse) / e.mse.max(f64::MIN_POSITIVE)).into(),
            number(f64::from(b.max_abs), 4).into(),
            percent(f64::from(b.relative)).into(),
        ]);
    }
    t
}

fn sizes(i: &Inspection) -> Table {
    let (b, n) = (&i.bytes, i.usage.iter().sum::<u64>().max(1) as f64);
    let mut t = Table::new()
        .caption("Bytes in a file")
        .words("part")
        .numbers("bytes", "")
        .numbers("bits per weight", "")
        .words("");
    let rows = [
        ("packed codes", b.packed, "two elements per byte"),
        ("absmax", b.absmax, if b.nested_absmax > 0 { "one byte per block" } else { "one f32 per block" }),
        ("nested_absmax", b.nested_absmax, "one f32 per nested block"),
        ("quant_map", b.quant_map, "16 f32"),
        ("nested_quant_map", b.nested_quant_map, "256 f32"),
        ("quant_state", b.quant_state, "JSON"),
    ];
    for (name, bytes, what) in rows.into_iter().filter(|(_, bytes, _)| *bytes > 0) {
        let bits = format!("{:.5}", 8.0 * bytes as f64 / n);
        t.row([name.into(), count(bytes).into(), bits.into(), Cell::new(what).tone(Tone::Muted)]);
    }
    t.total([
        "together".into(),
        count(b.total()).into(),
        format!("{:.5}", i.bits_per_weight).into(),
        bytes(b.total()).into(),
    ]);
    t
}

impl Show for ErrorReport {
    fn card(&self) -> Card {
        let (svg, caption, text) = blocks(self);
        let mut facts = vec![
            ("error / weight (norms)", percent(self.relative)),
            ("signal to noise (SQNR)", format!("{:.2} dB", self.sqnr_db)),
            ("mean squared error", number(self.mse, 4)),
            ("largest error", number(self.max_abs, 4)),
        ];
        if let Some(share) = self.nested_share {
            facts.push(("of the error, due to nesting", format!("{:.2} %", 100.0 * share)));
        }
        Card::new(format!("Error over {} blocks", count(self.blocks.len() as u64)))
            .facts(facts)
            .figure(svg, caption, text)
            .table(worst(self))
    }
}

impl Show for Comparison {
    fn card(&self) -> Card {
        let mut t = Table::new()
            .words("scheme")
            .numbers("error / weight", "")
            .words("")
            .numbers("SQNR", "dB")
            .numbers("MSE", "")
            .numbers("largest", "")
            .numbers("entropy", "bits")
            .numbers("bits/weight", "");
        let relative = |s: &SchemeReport| s.inspection.error.as_ref().map_or(0.0, |e| e.relative);
        let (least, most) =
            self.schemes.iter().map(relative).fold((f64::INFINITY, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
        for (i, s) in self.schemes.iter().enumerate() {
            t.row(scheme(s, i / 2, most, relative(s) == least));
        }
        Card::new(format!("4-bit schemes on a tensor {:?}", self.shape))
            .subtitle(format!("blocks of {} elements", self.blocksize))
            .table(t)
            .figure(
                level_rows(&self.schemes),
                format!("The levels that were used, from the top: {}.", names(&self.schemes)),
                "",
            )
    }
}

fn scheme(s: &SchemeReport, colour: usize, most: f64, best: bool) -> Vec<Cell> {
    let tone = if best { Tone::Strong } else { Tone::Plain };
    let i = &s.inspection;
    let mut cells = vec![Cell::new(&s.name).swatch(colour).tone(tone)];
    match &i.error {
        Some(e) => cells.extend([
            Cell::new(percent(e.relative)).tone(tone),
            Cell::bar(e.relative / most.max(f64::MIN_POSITIVE), colour),
            format!("{:.2}", e.sqnr_db).into(),
            number(e.mse, 4).into(),
            number(e.max_abs, 4).into(),
        ]),
        None => cells.extend([(); 5].map(|()| Cell::new("-"))),
    }
    cells.extend([format!("{:.3}", i.entropy).into(), format!("{:.4}", i.bits_per_weight).into()]);
    cells
}

/// The schemes without their nested twins, which have the same levels.
fn plain(schemes: &[SchemeReport]) -> Vec<&SchemeReport> {
    schemes.iter().filter(|s| !s.name.contains("nested")).collect()
}

fn names(schemes: &[SchemeReport]) -> String {
    plain(schemes).iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn level_rows(schemes: &[SchemeReport]) -> String {
    let plain = plain(schemes);
    let mut all = Vec::new();
    for (row, s) in plain.iter().enumerate() {
        let y = (plain.len() - row) as f64 - 0.5;
        // int4 has one number that is never used.
        for (&level, _) in s.inspection.code.iter().zip(s.inspection.usage).filter(|(_, used)| *used > 0) {
            let x = f64::from(level);
            all.push(Line { width: 25, ..Line::new(vec![(x, y - 0.3), (x, y + 0.3)], row) });
        }
    }
    let mut frame = Frame::around([-1.2, 1.05], [])
        .labels("level", "")
        .size(720, 44 + 26 * plain.len() as u32)
        .alt("the levels of each scheme");
    frame.y = 0.0..plain.len() as f64;
    lines(&frame, &all, &[])
}

shown!(+ Display ErrorReport);
shown!(Inspection { code, usage, entropy, absmax, bytes, bits_per_weight, error });
shown!(Comparison { shape, blocksize, schemes });
