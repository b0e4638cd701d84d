//! The HTML twin: one escape function, one style sheet, tables.
//!
//! No script and no external resource, so that it may be shown in any notebook. Colours are CSS variables, set for
//! light and dark by JupyterLab's own attribute and else by the reader's preference; text takes the page's colour.

use super::card::{Align, Block, Card, Cell, Table, Tone};
use std::fmt::Write;

/// The palette in light and in dark: distinguishable with every common colour blindness, in this order.
pub(super) const PALETTE: [(&str, &str); 12] = [
    ("#3b76af", "#6ca6dc"), // blue
    ("#e08a1e", "#f0a850"), // orange
    ("#1b9e77", "#4cc3a0"), // green
    ("#c8502d", "#ea7a58"), // vermillion
    ("#6bb3e0", "#94cdf0"), // sky
    ("#a4649b", "#cb93c4"), // purple
    ("#c9b037", "#e6d266"), // yellow
    ("#8a8f98", "#a9aeb7"), // grey
    ("#2f6f6a", "#5fa39d"), // teal
    ("#d98ca0", "#efb0c0"), // pink
    ("#8c6d46", "#b8966b"), // brown
    ("#bfc4cb", "#5d636d"), // pale
];

/// Width of a full bar in a table, in pixels.
const BAR: f64 = 120.0;

/// Text for the inside of an element or of an attribute in double quotes.
///
/// Every text that reaches a display passes through here: names come from files that nobody checked.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// The colour of the palette with that number, as a CSS value; beyond the palette it starts again.
pub(super) fn colour(i: usize) -> String {
    let i = i % PALETTE.len();
    format!("var(--tb-{i},{})", PALETTE[i].0)
}

pub(super) fn card(card: &Card) -> String {
    let mut body = String::new();
    if !card.title.is_empty() {
        write!(body, "<div class=\"tb-title\">{}</div>", escape(&card.title)).ok();
    }
    if let Some(subtitle) = &card.subtitle {
        write!(body, "<div class=\"tb-sub\">{}</div>", escape(subtitle)).ok();
    }
    for block in &card.blocks {
        body.push_str(&self::block(block));
    }
    format!("<div class=\"tb\">{}{body}</div>", style(&body))
}

fn block(block: &Block) -> String {
    match block {
        Block::Facts(facts) => self::facts(facts),
        Block::Table(t) => table(t),
        Block::Figure { svg, caption, .. } => {
            format!("<figure class=\"tb-fig\">{svg}<figcaption>{}</figcaption></figure>", escape(caption))
        }
        Block::Note(note) => format!("<p class=\"tb-note\">{}</p>", escape(note)),
        Block::Html { html, .. } => html.clone(),
    }
}

fn facts(facts: &[(String, String)]) -> String {
    let pair = |(k, v): &(String, String)| format!("<dt>{}</dt><dd>{}</dd>", escape(k), escape(v));
    format!("<dl class=\"tb-facts\">{}</dl>", facts.iter().map(pair).collect::<String>())
}

fn table(t: &Table) -> String {
    let mut out = String::from("<table class=\"tb-t\">");
    if !t.caption.is_empty() {
        write!(out, "<caption>{}</caption>", escape(&t.caption)).ok();
    }
    if t.columns.iter().any(|c| !c.heading().is_empty()) {
        out.push_str("<thead><tr>");
        for c in &t.columns {
            let unit = if c.unit.is_empty() { String::new() } else { format!(" <span>{}</span>", escape(&c.unit)) };
            write!(out, "<th{}>{}{unit}</th>", class(c.align, Tone::Plain), escape(&c.name)).ok();
        }
        out.push_str("</tr></thead>");
    }
    out.push_str("<tbody>");
    for row in &t.rows {
        out.push_str(if row.total { "<tr class=\"tb-total\">" } else { "<tr>" });
        for (cell, column) in row.cells.iter().zip(&t.columns) {
            write!(out, "<td{}>{}</td>", class(column.align, cell.tone), self::cell(cell)).ok();
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table>");
    out
}

fn class(align: Align, tone: Tone) -> String {
    let align = if align == Align::Right { "tb-r" } else { "" };
    let tone = match tone {
        Tone::Plain => "",
        Tone::Muted => "tb-muted",
        Tone::Strong => "tb-strong",
        Tone::Good => "tb-good",
        Tone::Bad => "tb-bad",
    };
    match (align, tone) {
        ("", "") => String::new(),
        (a, t) => format!(" class=\"{}\"", format!("{a} {t}").trim()),
    }
}

fn cell(cell: &Cell) -> String {
    if let Some((share, colour)) = cell.bar {
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        if share == 0.0 {
            return String::new();
        }
        let width = BAR * share;
        return format!("<i class=\"tb-bar\" style=\"width:{width:.1}px;background:{}\"></i>", self::colour(colour));
    }
    let swatch = cell
        .swatch
        .map_or_else(String::new, |c| format!("<i class=\"tb-key\" style=\"background:{}\"></i>", colour(c)));
    let text = escape(&cell.text);
    if cell.code { format!("{swatch}<code>{text}</code>") } else { format!("{swatch}{text}") }
}

/// The style sheet, repeated in each output, because a notebook shows, moves and deletes each output on its own; only the
/// rules and colours that `body` uses, because it is saved with each.
fn style(body: &str) -> String {
    let used = |class: &str| ['"', ' '].iter().any(|end| body.contains(&format!("{class}{end}")));
    let rules: String =
        STYLE.lines().filter(|rule| classes(rule).is_empty() || classes(rule).iter().any(|c| used(c))).collect();
    let palette = |dark: bool| -> String {
        let used = |i: &usize| [body, &rules].iter().any(|text| text.contains(&format!("var(--tb-{i}")));
        let value = |i: usize| format!("--tb-{i}:{};", if dark { PALETTE[i].1 } else { PALETTE[i].0 });
        (0..PALETTE.len()).filter(used).map(value).collect()
    };
    let light = format!("{}--tb-on:#fff;--tb-good:#14795b;--tb-bad:#b3401f", palette(false));
    let dark = format!("{}--tb-on:#14171c;--tb-good:#4cc3a0;--tb-bad:#f08a68", palette(true));
    format!(
        "<style>.tb{{{light}}}\
         @media (prefers-color-scheme:dark){{.tb{{{dark}}}}}\
         [data-jp-theme-light=\"true\"] .tb,.vscode-light .tb{{{light}}}\
         [data-jp-theme-light=\"false\"] .tb,.vscode-dark .tb{{{dark}}}{rules}</style>"
    )
}

/// The classes of a rule's selector, beside `tb` itself.
fn classes(rule: &str) -> Vec<&str> {
    let selector = rule.split('{').next().unwrap_or_default();
    selector.split(|c: char| !c.is_ascii_lowercase() && c != '-').filter(|name| name.starts_with("tb-")).collect()
}

const STYLE: &str = include_str!("style.css");
