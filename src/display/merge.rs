//! How a merge shows what each choice of base costs.

use super::units::{bytes, count, number, percent, seconds};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::lora::{LayerMerge, MergeBase, MergeCost, MergeReport};

/// Layers that the table shows; the rest is counted.
const LAYERS: usize = 80;

impl Show for MergeReport {
    fn card(&self) -> Card {
        let trained = if self.trained_on_quantized { "quantized" } else { "original" };
        let mut facts = vec![("merged weights", count(self.modules.len() as u64)), ("stored as", self.dtype.clone())];
        if let Some(dir) = &self.dir {
            facts.push(("written", format!("{}, {} in {}", dir.display(), bytes(self.bytes), seconds(self.seconds))));
        }
        let mut card = Card::new(format!("Merge of {}", self.model))
            .subtitle(format!("onto {}", self.onto))
            .table(choices(self))
            .note(format!(
                "kept: the share of ΔW that arrives. error: what rounding or quantizing did to ΔW, and distance: how far the \
                 result is from the function that was trained beside the {trained} weights, both as multiples of ‖ΔW‖."
            ))
            .table(layers(self))
            .facts(facts);
        for note in &self.notes {
            card = card.note(note);
        }
        card
    }
}

/// Which of the three choices was made.
fn chosen(report: &MergeReport) -> usize {
    match report.onto {
        MergeBase::Original => 0,
        MergeBase::Dequantized(_) => 1,
        MergeBase::Quantized(_) => 2,
    }
}

fn choices(report: &MergeReport) -> Table {
    let total = report.total();
    let kind = report.quantization.quant_type.as_str().to_uppercase();
    let names = ["original weights".to_owned(), format!("dequantized from {kind}"), format!("{kind}, quantized again")];
    let mut t = Table::new()
        .caption("What each base would cost, all weights together")
        .words("merged onto")
        .words("")
        .numbers("kept", "")
        .words("")
        .numbers("error", "‖ΔW‖")
        .numbers("distance", "‖ΔW‖");
    for (i, (name, cost)) in names.into_iter().zip(costs(&total)).enumerate() {
        let tone = if i == chosen(report) { Tone::Strong } else { Tone::Plain };
        let mark = if i == chosen(report) { "◀ chosen" } else { "" };
        let [kept, error, distance] = values(cost);
        let bar = Cell::bar(cost.map_or(0.0, |c| c.kept), i);
        t.row([Cell::new(name).tone(tone), mark.into(), kept.tone(tone), bar, error.tone(tone), distance.tone(tone)]);
    }
    t
}

fn costs(layer: &LayerMerge) -> [Option<MergeCost>; 3] {
    [layer.original, layer.dequantized, layer.quantized]
}

fn values(cost: Option<MergeCost>) -> [Cell; 3] {
    let Some(c) = cost else { return [(); 3].map(|()| Cell::new("-").tone(Tone::Muted)) };
    [percent(c.kept), format!("{:.3}", c.error), format!("{:.3}", c.distance)].map(Cell::new)
}

fn layers(report: &MergeReport) -> Table {
    let mut t = Table::new()
        .caption("By layer: kept and distance onto each base")
        .numbers("layer", "")
        .numbers("‖W‖", "")
        .numbers("‖ΔW‖", "")
        .numbers("‖ΔW‖/‖W‖", "");
    for base in ["original", "dequantized", "quantized"] {
        t = t.numbers(base, "").numbers("dist.", "");
    }
    let all = report.layers();
    for layer in all.iter().take(LAYERS) {
        let name = report.layer_name(layer.layer);
        t.row(layer_cells(name, layer, chosen(report)));
    }
    if all.len() > LAYERS {
        let mut cells = vec![Cell::new(format!("… {} more", all.len() - LAYERS))];
        cells.resize(10, Cell::new(""));
        t.row(cells);
    }
    t.total(layer_cells("together".into(), &report.total(), chosen(report)));
    t
}

fn layer_cells(name: String, layer: &LayerMerge, chosen: usize) -> Vec<Cell> {
    let ratio = layer.norm_delta / layer.norm_w;
    let ratio = if ratio.is_finite() { format!("{:.2} %", 100.0 * ratio) } else { "-".to_owned() };
    let mut cells: Vec<Cell> =
        vec![name.into(), number(layer.norm_w, 4).into(), number(layer.norm_delta, 4).into(), ratio.into()];
    for (i, cost) in costs(layer).into_iter().enumerate() {
        let [kept, _, distance] = values(cost);
        let tone = if i == chosen { Tone::Plain } else { Tone::Muted };
        cells.extend([kept.tone(tone), distance.tone(tone)]);
    }
    cells
}

shown!(MergeReport);
