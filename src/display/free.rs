//! Displays that a cell makes itself: [`table()`], [`chart()`] and [`matrices()`].

use std::fmt::Write;

use candle_core::{DType, Tensor};

use super::html::{colour, escape};
use super::svg::{Frame, Line, lines};
use super::units::number;
use super::{Card, Cell, Show, Table, shown, text};
use crate::{Error, Result};

/// A table from rows of text; columns in which every cell begins with a digit or a sign stand to the right.
///
/// ```
/// use tunebook::display::table;
/// let rows = [512, 1024].map(|seq| [seq.to_string(), format!("{:.1}", seq as f64 / 100.0)]);
/// println!("{}", table("Memory by length", ["tokens", "GB"], rows).to_text());
/// ```
///
/// `notebooks/04_lora_by_hand.ipynb` explains it.
pub fn table<const N: usize>(title: &str, columns: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Card {
    let rows: Vec<[String; N]> = rows.into_iter().collect();
    let numeric =
        |text: &String| text.is_empty() || text.starts_with(|c: char| c.is_ascii_digit() || "+-−".contains(c));
    let mut t = Table::new();
    for (i, name) in columns.into_iter().enumerate() {
        t = if rows.iter().all(|r| numeric(&r[i])) { t.numbers(name, "") } else { t.words(name) };
    }
    for row in rows {
        t.row(row.map(Cell::new));
    }
    Card::new(title).table(t)
}

impl Show for Card {
    fn card(&self) -> Card {
        self.clone()
    }
}

shown!(Card);

/// Lines over two axes; made by [`chart()`].
#[derive(Clone, Debug, Default)]
pub struct Chart {
    title: String,
    axes: (String, String),
    lines: Vec<(String, Vec<(f64, f64)>)>,
    marks: Vec<(f64, String)>,
    note: String,
}

/// An empty chart with the names of its axes, units included.
///
/// ```
/// use tunebook::display::{bundle, chart};
/// let c = chart("Squares", "x", "x squared").line("x^2", (0..10).map(|x| (x as f64, (x * x) as f64)));
/// assert!(bundle(&c).html.contains("<svg"));
/// ```
///
/// `notebooks/04_lora_by_hand.ipynb` explains it.
pub fn chart(title: &str, x: &str, y: &str) -> Chart {
    Chart { title: title.to_owned(), axes: (x.to_owned(), y.to_owned()), ..Chart::default() }
}

impl Chart {
    /// Adds a line; a colour is given to each in turn.
    pub fn line(mut self, name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Chart {
        self.lines.push((name.to_owned(), points.into_iter().collect()));
        self
    }

    /// Adds a named vertical mark.
    pub fn mark(mut self, x: f64, name: &str) -> Chart {
        self.marks.push((x, name.to_owned()));
        self
    }

    /// Says what to see.
    pub fn note(mut self, note: &str) -> Chart {
        note.clone_into(&mut self.note);
        self
    }
}

impl Show for Chart {
    fn card(&self) -> Card {
        let points = || self.lines.iter().flat_map(|(_, p)| p.iter().copied());
        let names: Vec<&str> = self.lines.iter().map(|(n, _)| n.as_str()).collect();
        let frame = Frame::around(points().map(|p| p.0), points().map(|p| p.1))
            .labels(&self.axes.0, &self.axes.1)
            .alt(format!("{}: {}", self.title, names.join(", ")));
        let drawn: Vec<Line> = self.lines.iter().enumerate().map(|(i, (_, p))| Line::new(p.clone(), i)).collect();
        let mut key = String::from("<div class=\"tb-legend\">");
        for (i, name) in names.iter().enumerate() {
            write!(key, "<span><i class=\"tb-key\" style=\"background:{}\"></i>{}</span>", colour(i), escape(name))
                .ok();
        }
        key.push_str("</div>");
        let spark = |(name, p): &(String, Vec<(f64, f64)>)| {
            let y: Vec<f64> = p.iter().map(|p| p.1).collect();
            format!("{}  {name}", text::sparkline(&y, 48))
        };
        let twin = self.lines.iter().map(spark).collect::<Vec<_>>().join("\n");
        Card::new(&self.title).html(key, String::new()).figure(lines(&frame, &drawn, &self.marks), &self.note, twin)
    }
}

shown!(Chart);

/// The most rows and columns of a matrix that are shown.
const SIDE: usize = 12;

/// Small matrices beside each other, their values in colour; made by [`matrices()`].
#[derive(Clone, Debug, PartialEq)]
pub struct Matrices(Vec<Matrix>);

#[derive(Clone, Debug, PartialEq)]
struct Matrix {
    name: String,
    shape: [usize; 2],
    /// What is shown of it.
    rows: Vec<Vec<f32>>,
}

/// Shows small matrices or vectors beside each other: blue above zero, orange below, fuller for larger magnitudes. The
/// name of each is written above it, so that a row reads as an equation.
///
/// `notebooks/04_lora_by_hand.ipynb` explains it.
///
/// # Errors
/// A tensor with more than two dimensions.
pub fn matrices<'a>(named: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<Matrices> {
    let matrix = |(name, t): (&str, &Tensor)| -> Result<Matrix> {
        let shape = match *t.dims() {
            [] => [1, 1],
            [n] => [1, n],
            [m, n] => [m, n],
            _ => {
                return Err(Error::new("not a matrix")
                    .at(name)
                    .expected("at most two dimensions")
                    .found(format!("{:?}", t.dims())));
            }
        };
        let all = t.to_dtype(DType::F32)?.reshape((shape[0], shape[1]))?.to_vec2::<f32>()?;
        let rows = all.into_iter().take(SIDE).map(|r| r.into_iter().take(SIDE).collect()).collect();
        Ok(Matrix { name: name.to_owned(), shape, rows })
    };
    Ok(Matrices(named.into_iter().map(matrix).collect::<Result<_>>()?))
}

impl Show for Matrices {
    fn card(&self) -> Card {
        let html: String = self.0.iter().map(Matrix::html).collect();
        let plain = self.0.iter().map(Matrix::text).collect::<Vec<_>>().join("\n\n");
        Card { blocks: Vec::new(), ..Card::default() }.html(format!("<div class=\"tb-mats\">{html}</div>"), plain)
    }
}

impl Matrix {
    fn heading(&self) -> String {
        format!("{} [{}, {}]", self.name, self.shape[0], self.shape[1])
    }

    fn cut(&self) -> bool {
        self.shape[0] > SIDE || self.shape[1] > SIDE
    }

    fn html(&self) -> String {
        let most = self.rows.iter().flatten().fold(0.0_f32, |m, v| m.max(v.abs())).max(f32::MIN_POSITIVE);
        let (name, [m, n]) = (escape(&self.name), self.shape);
        let mut out = format!("<table class=\"tb-t tb-mat\"><caption>{name} <span>[{m}, {n}]</span></caption><tbody>");
        for row in &self.rows {
            out.push_str("<tr>");
            for &v in row {
                let share = if v.is_finite() { 58.0 * v.abs() / most } else { 100.0 };
                let ink = colour(usize::from(v < 0.0));
                let text = value(v);
                write!(
                    out,
                    "<td class=\"tb-r\" style=\"background:color-mix(in srgb,{ink} {share:.0}%,transparent)\">{text}</td>"
                )
                .ok();
            }
            out.push_str(if self.shape[1] > SIDE { "<td>…</td></tr>" } else { "</tr>" });
        }
        out.push_str(if self.shape[0] > SIDE { "<tr><td>…</td></tr></tbody></table>" } else { "</tbody></table>" });
        out
    }

    fn text(&self) -> String {
        let mut out = self.heading();
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|&v| format!("{:>7}", value(v))).collect();
            write!(out, "\n{}", cells.join(" ")).ok();
        }
        if self.cut() {
            out.push_str("\n…");
        }
        out
    }
}

/// A value in a few letters; a zero without sign.
fn value(v: f32) -> String {
    if v == 0.0 {
        return "0".to_owned();
    }
    let digits = if v.abs() >= 0.01 && v.abs() < 100.0 { format!("{v:.2}") } else { number(f64::from(v), 2) };
    if v.fract() == 0.0 && v.abs() < 1000.0 { format!("{v:.0}") } else { digits }
}

shown!(Matrices);
