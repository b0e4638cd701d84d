//! How target discovery and adapters show themselves.

use super::units::{bytes, count, number, plain};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::lora::{Adapter, Discovery, TargetGroup, TargetStatus};
use std::collections::BTreeMap;

/// Ranks whose cost is shown before one is chosen.
const RANKS: [usize; 4] = [8, 16, 64, 256];

impl Show for Discovery {
    fn card(&self) -> Card {
        let all = self.matched.len() + self.unmatched.len() + self.excluded.len();
        let subtitle = format!(
            "{} matches {} of {} linear modules",
            self.targets,
            count(self.matched.len() as u64),
            count(all as u64)
        );
        Card::new(format!("LoRA targets in {}", self.model)).subtitle(subtitle).table(groups(self)).table(ranks(self))
    }
}

fn groups(d: &Discovery) -> Table {
    let mut t = Table::new()
        .words("module")
        .numbers("count", "")
        .words("[out, in]")
        .words("")
        .numbers("parameters per rank", "")
        .words("");
    let groups = d.groups();
    let most = groups.iter().map(|g| g.params(1)).max().unwrap_or(0).max(1);
    for g in &groups {
        t.row(group(g, most));
    }
    t.total([
        "together".into(),
        count(d.matched.len() as u64).into(),
        "".into(),
        "".into(),
        count(d.params(1)).into(),
        "".into(),
    ]);
    t
}

fn group(g: &TargetGroup, most: u64) -> [Cell; 6] {
    let (status, tone) = match g.status {
        TargetStatus::Matched => ("✓ matched", Tone::Good),
        TargetStatus::Unmatched => ("· not matched", Tone::Muted),
        TargetStatus::Excluded => ("✗ excluded", Tone::Bad),
    };
    let text = if g.status == TargetStatus::Matched { Tone::Plain } else { Tone::Muted };
    let params = g.params(1);
    [
        Cell::new(&g.leaf).code().tone(text),
        Cell::new(count(g.count as u64)).tone(text),
        Cell::new(format!("[{}, {}]", g.out_features, g.in_features)).tone(text),
        Cell::new(status).tone(tone),
        Cell::new(if params > 0 { count(params) } else { "-".into() }).tone(text),
        Cell::bar(params as f64 / most as f64, 1),
    ]
}

fn ranks(d: &Discovery) -> Table {
    let mut t = Table::new()
        .caption("What a rank costs")
        .numbers("r", "")
        .numbers("trained parameters", "")
        .numbers("of all", "")
        .numbers("adapter file (f32)", "");
    for r in RANKS {
        let params = d.params(r);
        let share = params as f64 / (params + d.base_params).max(1) as f64;
        t.row([
            r.to_string().into(),
            count(params).into(),
            format!("{:.4} %", 100.0 * share).into(),
            bytes(4 * params).into(),
        ]);
    }
    t
}

impl Show for Adapter {
    fn card(&self) -> Card {
        let lora = &self.config.lora;
        let base = self.config.base_model_name_or_path.as_deref().unwrap_or("-");
        let mut kinds: BTreeMap<&str, (usize, u64, f64, f64)> = BTreeMap::new();
        for (name, p) in &self.tensors {
            let kind = kinds.entry(name.rsplit('.').next().unwrap_or(name)).or_default();
            kind.0 += 1;
            kind.1 += (p.a.len() + p.b.len()) as u64;
            kind.2 += square(&p.a);
            kind.3 += square(&p.b);
        }
        let mut t = Table::new()
            .words("module")
            .numbers("count", "")
            .numbers("parameters", "")
            .numbers("‖A‖", "")
            .numbers("‖B‖", "");
        for (leaf, (n, params, a, b)) in kinds {
            let norm = |x: f64| Cell::new(number(x.sqrt(), 4));
            t.row([Cell::new(leaf).code(), count(n as u64).into(), count(params).into(), norm(a), norm(b)]);
        }
        Card::new(format!("LoRA adapter of {} parameters", count(self.params())))
            .subtitle(format!("trained on {base}"))
            .facts([
                ("r", lora.r.to_string()),
                ("lora_alpha", plain(lora.lora_alpha)),
                ("scaling of B A", plain(lora.scaling())),
                ("lora_dropout", plain(lora.lora_dropout)),
                ("target_modules", lora.target_modules.to_string()),
            ])
            .table(t)
            .note("‖B‖ is 0 before the first step: a fresh adapter changes nothing.")
    }
}

fn square(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v) * f64::from(v)).sum()
}

shown!(Discovery);
shown!(+ Display Adapter);
