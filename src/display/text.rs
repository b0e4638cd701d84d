//! Aligned plain text: the twin of every HTML display, for the terminal and for `{:?}`.

use super::card::{Align, Block, Card, Table};

const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
/// Cells of a bar.
const BAR: usize = 24;

/// The whole card, without a newline at its end.
pub fn card(card: &Card) -> String {
    let mut parts = vec![head(card)];
    parts.extend(card.blocks.iter().map(block));
    let text: Vec<String> = parts.into_iter().filter(|p| !p.is_empty()).collect();
    text.join("\n\n")
}

fn head(card: &Card) -> String {
    match &card.subtitle {
        Some(subtitle) => format!("{}\n{subtitle}", card.title),
        None => card.title.clone(),
    }
}

fn block(block: &Block) -> String {
    match block {
        Block::Facts(facts) => self::facts(facts),
        Block::Table(t) => table(t),
        Block::Figure { caption, text, .. } => match (caption.is_empty(), text.is_empty()) {
            (_, true) => String::new(),
            (true, false) => text.clone(),
            (false, false) => format!("{}\n{text}", wrap(caption)),
        },
        Block::Note(note) => wrap(note),
        Block::Html { text, .. } => text.clone(),
    }
}

/// Lines of at most 100 characters, broken at spaces.
fn wrap(text: &str) -> String {
    let mut out = String::new();
    let mut width = 0;
    for word in text.split(' ') {
        let letters = word.chars().count();
        if width > 0 && width + 1 + letters > 100 {
            out.push('\n');
            width = 0;
        } else if width > 0 {
            out.push(' ');
            width += 1;
        }
        out.push_str(word);
        width += letters;
    }
    out
}

fn facts(facts: &[(String, String)]) -> String {
    let width = facts.iter().map(|(k, _)| k.chars().count()).max().unwrap_or(0);
    let line = |(k, v): &(String, String)| format!("{}  {v}", pad(k, width, Align::Left));
    facts.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Columns two spaces apart, numbers to the right, a rule under the header and above a total.
pub fn table(t: &Table) -> String {
    let header: Vec<String> = t.columns.iter().map(|c| c.heading()).collect();
    let body: Vec<Vec<String>> = t.rows.iter().map(|r| r.cells.iter().map(|c| c.plain(BAR)).collect()).collect();
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in &body {
        for (w, cell) in widths.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| -> String {
        let padded: Vec<String> =
            cells.iter().zip(&t.columns).zip(&widths).map(|((c, col), w)| pad(c, *w, col.align)).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let rule = "─".repeat(widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1));
    let mut out = Vec::new();
    if !t.caption.is_empty() {
        out.push(t.caption.clone());
    }
    if header.iter().any(|h| !h.is_empty()) {
        out.extend([line(&header), rule.clone()]);
    }
    for (row, cells) in t.rows.iter().zip(&body) {
        if row.total {
            out.push(rule.clone());
        }
        out.push(line(cells));
    }
    out.join("\n")
}

fn pad(text: &str, width: usize, align: Align) -> String {
    let space = " ".repeat(width.saturating_sub(text.chars().count()));
    match align {
        Align::Left => format!("{text}{space}"),
        Align::Right => format!("{space}{text}"),
    }
}

/// A bar of `share` (0 to 1) of `width` characters, in eighths.
pub fn bar(share: f64, width: usize) -> String {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let eighths = (share * (width * 8) as f64).round() as usize;
    let mut out = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        out.push(EIGHTHS[eighths % 8]);
    }
    // Something is never shown as nothing.
    if out.is_empty() && share > 0.0 { EIGHTHS[1].to_string() } else { out }
}

/// One character per value, its height the value's share of the largest: `▁▃█▅`.
///
/// More values than `width` are averaged in groups.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let values = resample(values, width);
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
    let height = |v: f64| if high > low { ((v - low) / (high - low) * 7.0).round() as usize } else { 3 };
    values.iter().map(|&v| if v.is_finite() { STEPS[height(v).min(7)] } else { '!' }).collect()
}

/// At most `width` values: means of equal groups; a group with a value that is not finite is not finite.
pub fn resample(values: &[f64], width: usize) -> Vec<f64> {
    if values.len() <= width || width == 0 {
        return values.to_vec();
    }
    let mean = |i: usize| {
        let group = &values[i * values.len() / width..(i + 1) * values.len() / width];
        group.iter().sum::<f64>() / group.len() as f64
    };
    (0..width).map(mean).collect()
}
