//! How rows, data sets and batches show themselves.

use super::html::escape;
use super::units::{count, percent};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::data::{Batch, BatchView, DataReport, Dataset, LengthBin, Rows, TokenView};
use std::fmt::Write;

/// Rows that a table of rows shows.
const ROWS: usize = 5;
/// Characters of a value that it shows.
const LETTERS: usize = 72;
/// Examples and tokens of an example that a batch shows.
const EXAMPLES: usize = 8;
const TOKENS: usize = 512;

impl Show for Rows {
    fn card(&self) -> Card {
        let mut t = Table::new().numbers("row", "");
        for column in self.columns() {
            t = t.words(column);
        }
        for i in 0..self.len().min(ROWS) {
            let place = self.place(i);
            let line = place.rsplit(':').next().unwrap_or_default();
            let mut cells = vec![Cell::new(line).tone(Tone::Muted)];
            cells.extend(self.columns().iter().map(|c| Cell::new(short(&value(self, i, c), letters(self)))));
            t.row(cells);
        }
        let card = Card::new(format!("{} rows", count(self.len() as u64))).subtitle(self.source()).table(t);
        if self.len() > ROWS { card.note(format!("… {} more", count((self.len() - ROWS) as u64))) } else { card }
    }
}

/// Fewer letters where there are more columns.
fn letters(rows: &Rows) -> usize {
    (2 * LETTERS / rows.columns().len().max(1)).clamp(16, LETTERS)
}

fn value(rows: &Rows, i: usize, column: &str) -> String {
    let value = rows.get(i).and_then(|row| row.get(column));
    if let Some(turns) = value.and_then(|v| v.as_array()).filter(|turns| turns.iter().all(|t| t["content"].is_string()))
    {
        // The end of a turn says most: what is asked, what is answered.
        let turn = |t: &serde_json::Value| {
            let line = t["content"].as_str().unwrap_or_default().lines().last().unwrap_or_default();
            format!("{}: {line}", t["role"].as_str().unwrap_or("?"))
        };
        return turns.iter().map(turn).collect::<Vec<_>>().join(" ▸ ");
    }
    value.map_or_else(String::new, |v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
}

/// One line of at most `letters` characters.
pub(super) fn short(text: &str, letters: usize) -> String {
    let line = text.replace('\n', "⏎").replace(['\r', '\t'], " ");
    if line.chars().count() <= letters {
        return line;
    }
    line.chars().take(letters - 1).chain(['…']).collect()
}

impl Show for DataReport {
    fn card(&self) -> Card {
        let title = format!("{} of {} rows became examples", count(self.kept as u64), count(self.rows as u64));
        let mut facts = vec![
            ("tokens", count(self.tokens as u64)),
            ("trained on", share(self.trained_tokens, self.tokens)),
            ("longest", format!("{} tokens", count(self.max_len as u64))),
            ("cut to max_length", cut(self)),
        ];
        if self.merged_boundaries > 0 {
            facts.push((
                "prompt and completion share a token",
                format!("{} rows", count(self.merged_boundaries as u64)),
            ));
        }
        if self.unk_tokens > 0 {
            facts.push(("unknown tokens", count(self.unk_tokens as u64)));
        }
        let mut card = Card::new(title).facts(facts).table(lengths(&self.lengths));
        if !self.dropped.is_empty() {
            card = card.table(dropped(self));
        }
        card
    }
}

fn cut(report: &DataReport) -> String {
    let n = report.truncated.len();
    match report.truncated.first() {
        Some(first) => {
            format!("{} rows, {} tokens lost (first: {first})", count(n as u64), count(report.truncated_tokens as u64))
        }
        None => "no row".into(),
    }
}

fn share(part: usize, whole: usize) -> String {
    format!("{} ({})", count(part as u64), percent(part as f64 / whole.max(1) as f64))
}

fn lengths(bins: &[LengthBin]) -> Table {
    let most = bins.iter().map(|b| b.count).max().unwrap_or(0).max(1);
    let mut t = Table::new().caption("Lengths").numbers("tokens", "").numbers("examples", "").words("");
    for bin in bins {
        let last = bin.to.saturating_sub(1);
        let range = if last > bin.from { format!("{}-{last}", bin.from) } else { bin.from.to_string() };
        t.row([range.into(), count(bin.count as u64).into(), Cell::bar(bin.count as f64 / most as f64, 0)]);
    }
    t
}

fn dropped(report: &DataReport) -> Table {
    let mut t = Table::new().caption("Dropped rows").numbers("rows", "").words("why").words("first");
    for (reason, n) in report.drop_reasons() {
        let first = report.dropped.iter().find(|d| d.reason == reason).map_or("", |d| d.place.as_str());
        t.row([count(n as u64).into(), reason.clone().into(), Cell::new(first).tone(Tone::Muted)]);
    }
    t
}

impl Show for Dataset {
    fn card(&self) -> Card {
        let title = match self.segments() {
            Some(segments) => {
                let examples: usize = segments.iter().map(Vec::len).sum();
                let full = self.total_tokens() as f64 / (self.len() * self.max_len()).max(1) as f64;
                format!(
                    "Data set of {} examples, packed into {} sequences, {} full",
                    count(examples as u64),
                    count(self.len() as u64),
                    percent(full)
                )
            }
            None => format!("Data set of {} examples", count(self.len() as u64)),
        };
        let mut card = Card::new(title).facts([
            ("tokens", count(self.total_tokens() as u64)),
            ("trained on", share(self.trained_tokens(), self.total_tokens())),
            ("longest", format!("{} tokens", count(self.max_len() as u64))),
            ("fingerprint", self.fingerprint().chars().take(16).collect()),
        ]);
        if let Some(report) = self.report() {
            card = card.table(lengths(&report.lengths));
            if !report.dropped.is_empty() {
                card = card.table(dropped(report));
            }
        }
        card
    }
}

impl Show for Batch {
    fn card(&self) -> Card {
        let card = Card::new(format!("Batch of {} examples", count(self.len() as u64))).facts([
            ("tokens", count(self.tokens() as u64)),
            ("tokens with a loss", share(self.num_items(), self.tokens())),
            ("longest example", format!("{} tokens", count(self.max_len() as u64))),
        ]);
        let lengths: Vec<String> = self.cu_seqlens.iter().map(u32::to_string).collect();
        card.facts([("cu_seqlens", short(&lengths.join(" "), LETTERS))])
            .note("BatchView::new(&batch, &tokenizer) shows its text.")
    }
}

impl Show for BatchView {
    fn card(&self) -> Card {
        let (tokens, trained) = (self.tokens.len(), self.trained());
        Card::new(format!("Batch: {} examples, {} tokens", count(self.examples.len() as u64), count(tokens as u64)))
            .subtitle(format!("{} are trained on", share(trained, tokens)))
            .html(view_html(self), view_text(self))
    }
}

/// The tokens of each example.
fn by_example(view: &BatchView) -> Vec<&[TokenView]> {
    view.tokens.chunk_by(|a, b| a.example == b.example).collect()
}

fn view_html(view: &BatchView) -> String {
    let mut out = String::from(
        "<div class=\"tb-legend\"><span><span class=\"tb-tok tb-on\">&nbsp;trained on&nbsp;</span></span>\
         <span class=\"tb-off\">read only: no loss</span></div>",
    );
    let examples = by_example(view);
    for tokens in examples.iter().take(EXAMPLES) {
        write!(
            out,
            "<div class=\"tb-sub tb-next\">{}</div><div class=\"tb-text\">",
            escape(&example_title(view, tokens))
        )
        .ok();
        for t in tokens.iter().take(TOKENS) {
            // `mark` still marks where a page shows the HTML without its style.
            let (tag, class) = if t.trained { ("mark", "tb-on") } else { ("span", "tb-off") };
            // The line break is shown, and still breaks the line.
            let text = escape(&t.text).replace('\n', "⏎\n");
            write!(
                out,
                "<{tag} class=\"tb-tok {class}\" title=\"id {}, position {}\">{text}</{tag}>",
                t.id, t.position
            )
            .ok();
        }
        if tokens.len() > TOKENS {
            write!(out, " … {} more tokens", tokens.len() - TOKENS).ok();
        }
        out.push_str("</div>");
    }
    if examples.len() > EXAMPLES {
        write!(out, "<p class=\"tb-note\">… {} more examples</p>", examples.len() - EXAMPLES).ok();
    }
    out
}

fn example_title(view: &BatchView, tokens: &[TokenView]) -> String {
    let index =
        tokens.first().and_then(|t| view.examples.get(t.example)).map_or_else(|| "?".to_owned(), usize::to_string);
    let trained = tokens.iter().filter(|t| t.trained).count();
    format!("example {index}: {} tokens, {trained} trained on", tokens.len())
}

/// Runs of trained tokens stand between `⟦` and `⟧`.
fn view_text(view: &BatchView) -> String {
    let mut out = String::from("trained on: ⟦so⟧");
    let examples = by_example(view);
    for tokens in examples.iter().take(EXAMPLES) {
        write!(out, "\n\n{}\n", example_title(view, tokens)).ok();
        for run in tokens[..tokens.len().min(TOKENS)].chunk_by(|a, b| a.trained == b.trained) {
            let text: String = run.iter().map(|t| t.text.as_str()).collect();
            if run[0].trained {
                write!(out, "⟦{text}⟧").ok()
            } else {
                write!(out, "{text}").ok()
            };
        }
        if tokens.len() > TOKENS {
            write!(out, " … {} more tokens", tokens.len() - TOKENS).ok();
        }
    }
    if examples.len() > EXAMPLES {
        write!(out, "\n\n… {} more examples", examples.len() - EXAMPLES).ok();
    }
    out
}

shown!(+ Display Rows, DataReport, Dataset, Batch, BatchView);
