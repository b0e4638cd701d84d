//! Charts as SVG text, by plotters, recoloured to follow the page's theme.
//!
//! plotters draws at twice the size, because it rounds to whole pixels, and in marker colours, which are then replaced
//! by CSS variables and `currentColor`.

use super::html::{PALETTE, colour, escape};
use super::units::number;
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

type Context<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn = Option<()>;

/// Drawn size / shown size.
const SCALE: u32 = 2;
/// plotters divides font sizes by 1.24 for SVG.
const FONT: f64 = 11.0 * 1.24 * SCALE as f64;
/// The marker for the page's text colour, and for what is written on a coloured area.
const TEXT: RGBColor = RGBColor(2, 0, 238);
const ON: RGBColor = RGBColor(3, 0, 238);
const ON_BRIGHT: RGBColor = RGBColor(4, 0, 238);

/// The marker for a colour of the palette.
fn ink(colour: usize) -> RGBColor {
    RGBColor(1, (colour % PALETTE.len()) as u8, 238)
}

/// The marker for text on a colour of the palette.
fn ink_on(colour: usize) -> RGBColor {
    match colour % PALETTE.len() {
        1 | 4 | 6 | 9 => ON_BRIGHT,
        11 => TEXT,
        _ => ON,
    }
}

/// Axes and size of a chart.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Shown width in pixels; the height is `size.1`.
    pub size: (u32, u32),
    /// Values along x.
    pub x: Range<f64>,
    /// Values along y.
    pub y: Range<f64>,
    /// Name and unit of x; empty: none.
    pub x_label: String,
    /// Name and unit of y; empty: no y axis.
    pub y_label: String,
    /// Read out by screen readers.
    pub alt: String,
}

impl Frame {
    /// A frame around some points; values that are not finite are left out.
    pub fn around(x: impl IntoIterator<Item = f64>, y: impl IntoIterator<Item = f64>) -> Frame {
        let (x, y) = (range(x), range(y));
        let margin = 0.05 * (y.end - y.start);
        Frame {
            size: (640, 220),
            x,
            y: y.start - margin..y.end + margin,
            x_label: String::new(),
            y_label: String::new(),
            alt: String::new(),
        }
    }

    /// Names of the axes, with units.
    pub fn labels(mut self, x: &str, y: &str) -> Frame {
        (self.x_label, self.y_label) = (x.to_owned(), y.to_owned());
        self
    }

    /// Shown size in pixels.
    pub fn size(mut self, width: u32, height: u32) -> Frame {
        self.size = (width, height);
        self
    }

    /// What a screen reader says.
    pub fn alt(mut self, alt: impl Into<String>) -> Frame {
        self.alt = alt.into();
        self
    }

    /// Starts the y axis at zero.
    pub fn from_zero(mut self) -> Frame {
        self.y.start = 0.0;
        self.y = sane(self.y);
        self
    }

    /// Draws axes, then `f`. An empty text if plotters refuses.
    fn draw(&self, f: impl FnOnce(&mut Context<'_, '_>) -> Drawn) -> String {
        let mut svg = String::new();
        let size = (self.size.0 * SCALE, self.size.1 * SCALE);
        let drawn = {
            let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            self.draw_on(&root, f).and_then(|()| root.present().ok())
        };
        if drawn.is_some() { recolour(&svg, self) } else { String::new() }
    }

    fn draw_on<'b>(
        &self,
        root: &DrawingArea<SVGBackend<'b>, plotters::coord::Shift>,
        f: impl FnOnce(&mut Context<'_, 'b>) -> Drawn,
    ) -> Drawn {
        let area = |n: u32, used: bool| if used { n * SCALE } else { 0 };
        let mut chart = ChartBuilder::on(root)
            .margin(6 * SCALE)
            .margin_right(14 * SCALE)
            .x_label_area_size(area(if self.x_label.is_empty() { 18 } else { 36 }, true))
            .y_label_area_size(area(54, !self.y_label.is_empty()))
            .build_cartesian_2d(sane(self.x.clone()), sane(self.y.clone()))
            .ok()?;
        let grid = if self.y_label.is_empty() { 0.0 } else { 0.12 };
        let text = |alpha: f64| ("sans-serif", FONT).into_font().color(&TEXT.mix(alpha));
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(TEXT.mix(grid).stroke_width(SCALE))
            .axis_style(TEXT.mix(0.3).stroke_width(SCALE))
            .label_style(text(0.7))
            .axis_desc_style(text(0.85))
            .x_desc(&self.x_label)
            .y_desc(&self.y_label)
            .x_labels(8)
            .y_labels(5)
            .x_label_formatter(&|v| tick(*v))
            .y_label_formatter(&|v| tick(*v))
            .draw()
            .ok()?;
        f(&mut chart)
    }
}

/// A tick's text: few digits, no trailing zeros.
fn tick(v: f64) -> String {
    if v.abs() < 1e-12 {
        return "0".to_owned();
    }
    let text = number(v, 4);
    if text.contains('.') && !text.contains('e') {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    text
}

/// The range of the finite values.
fn range(values: impl IntoIterator<Item = f64>) -> Range<f64> {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for v in values.into_iter().filter(|v| v.is_finite()) {
        (low, high) = (low.min(v), high.max(v));
    }
    sane(low..high)
}

/// plotters needs finite bounds some distance apart.
fn sane(r: Range<f64>) -> Range<f64> {
    let (low, high) = (r.start.clamp(-1e30, 1e30), r.end.clamp(-1e30, 1e30));
    if !(low <= high) || !r.start.is_finite() || !r.end.is_finite() {
        return 0.0..1.0;
    }
    let least = 1e-6 * low.abs().max(high.abs()).max(1e-12);
    if high - low >= least { low..high } else { low - 500.0 * least..high + 500.0 * least }
}

/// Marker colours to theme colours, the doubled size to the shown one.
fn recolour(svg: &str, frame: &Frame) -> String {
    let (w, h) = (frame.size.0 * SCALE, frame.size.1 * SCALE);
    let mut out = svg.replacen(
        &format!("<svg width=\"{w}\" height=\"{h}\""),
        &format!("<svg role=\"img\" aria-label=\"{}\" width=\"{}\" height=\"{}\"", escape(&frame.alt), frame.size.0, frame.size.1),
        1,
    );
    for i in 0..PALETTE.len() {
        out = out.replace(&format!("#01{i:02X}EE"), &colour(i));
    }
    out.replace("#0200EE", "currentColor").replace("#0300EE", "var(--tb-on,#fff)").replace("#0400EE", "#14171c")
}

/// Text in a chart, anchored.
fn label<'a, C>(text: &str, at: C, h: HPos, v: VPos, colour: RGBAColor) -> Text<'a, C, String> {
    let style = ("sans-serif", FONT).into_font().color(&colour).pos(Pos::new(h, v));
    Text::new(text.to_owned(), at, style)
}

/// One part of a bar.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Written on it where it is wide enough.
    pub name: String,
    /// Length in the axis' unit.
    pub value: f64,
    /// Colour of the palette.
    pub colour: usize,
}

/// One horizontal bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Written before it.
    pub name: String,
    /// From left to right.
    pub segments: Vec<Segment>,
}

/// Horizontal stacked bars over one axis, with vertical marks such as a card's memory.
pub fn stacked_bars(bars: &[Bar], marks: &[(f64, String)], x_label: &str, alt: &str) -> String {
    let length = |b: &Bar| b.segments.iter().map(|s| s.value).sum::<f64>();
    let longest = bars.iter().map(length).chain(marks.iter().map(|m| m.0)).fold(0.0, f64::max);
    let rows = bars.len() as f64;
    let top = if marks.is_empty() { 0.0 } else { 0.45 };
    let height = (rows * 34.0 + top * 34.0) as u32 + 48;
    let frame = Frame {
        size: (720, height),
        x: 0.0..longest.max(1e-9) * 1.02,
        y: 0.0..rows + top,
        x_label: x_label.to_owned(),
        y_label: String::new(),
        alt: alt.to_owned(),
    };
    bars_on(&frame, bars, marks)
}

fn bars_on(frame: &Frame, bars: &[Bar], marks: &[(f64, String)]) -> String {
    let mut svg = String::new();
    let (w, h) = (frame.size.0 * SCALE, frame.size.1 * SCALE);
    // About 6.4 pixels a letter.
    let letters = bars.iter().map(|b| b.name.chars().count()).max().unwrap_or(0);
    let names = (6.4 * letters as f64).ceil() as u32 + if letters > 0 { 8 } else { 0 };
    let drawn = (|| -> Drawn {
        let root = SVGBackend::with_string(&mut svg, (w, h)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(4 * SCALE)
            .margin_right(14 * SCALE)
            .x_label_area_size(36 * SCALE)
            .y_label_area_size(names.min(frame.size.0 / 2) * SCALE)
            .build_cartesian_2d(frame.x.clone(), frame.y.clone())
            .ok()?;
        let style = |alpha: f64| ("sans-serif", FONT).into_font().color(&TEXT.mix(alpha));
        chart
            .configure_mesh()
            .disable_mesh()
            .disable_y_axis()
            .axis_style(TEXT.mix(0.3).stroke_width(SCALE))
            .label_style(style(0.7))
            .axis_desc_style(style(0.85))
            .x_desc(&frame.x_label)
            .x_labels(8)
            .x_label_formatter(&|v| tick(*v))
            .draw()
            .ok()?;
        for (i, bar) in bars.iter().enumerate() {
            let y = bars.len() as f64 - 0.5 - i as f64;
            draw_bar(&mut chart, frame, bar, y, frame.size.0.saturating_sub(names + 22))?;
            let (left, middle) = chart.backend_coord(&(0.0, y));
            root.draw(&label(&bar.name, (left - 8 * SCALE as i32, middle), HPos::Right, VPos::Center, TEXT.mix(0.9))).ok()?;
        }
        for (at, name) in marks {
            let line = TEXT.mix(0.75).stroke_width(SCALE);
            chart.draw_series([PathElement::new(vec![(*at, 0.0), (*at, frame.y.end)], line)]).ok()?;
            let (side, name) = beside(name, *at > 0.6 * frame.x.end);
            chart.draw_series([label(&name, (*at, frame.y.end), side, VPos::Top, TEXT.mix(0.85))]).ok()?;
        }
        drop(chart);
        root.present().ok()
    })();
    if drawn.is_some() { recolour(&svg, frame) } else { String::new() }
}

fn draw_bar(chart: &mut Context<'_, '_>, frame: &Frame, bar: &Bar, y: f64, width: u32) -> Drawn {
    let pixels = f64::from(width) / (frame.x.end - frame.x.start);
    let mut x = 0.0;
    for s in bar.segments.iter().filter(|s| s.value > 0.0 && s.value.is_finite()) {
        let style = ink(s.colour).filled();
        chart.draw_series([Rectangle::new([(x, y - 0.34), (x + s.value, y + 0.34)], style)]).ok()?;
        // About 6.2 pixels a letter.
        if s.value * pixels > 6.2 * s.name.chars().count() as f64 + 10.0 {
            chart.draw_series([label(&s.name, (x + s.value / 2.0, y), HPos::Center, VPos::Center, ink_on(s.colour).mix(1.0))]).ok()?;
        }
        x += s.value;
    }
    Some(())
}

/// One line of a chart.
#[derive(Clone, Debug)]
pub struct Line {
    /// x and y; points that are not finite break the line.
    pub points: Vec<(f64, f64)>,
    /// Colour of the palette.
    pub colour: usize,
    /// Width in shown pixels, tenths.
    pub width: u32,
    /// 0 to 1.
    pub opacity: f64,
    /// A dot at each point.
    pub dots: bool,
}

impl Line {
    /// A line of usual width.
    pub fn new(points: Vec<(f64, f64)>, colour: usize) -> Line {
        Line { points, colour, width: 15, opacity: 1.0, dots: false }
    }
}

/// Lines, with named vertical marks (a resume, an epoch).
pub fn lines(frame: &Frame, lines: &[Line], marks: &[(f64, String)]) -> String {
    frame.draw(|chart| {
        draw_marks(chart, frame, marks)?;
        for line in lines {
            let style = ink(line.colour).mix(line.opacity).stroke_width(line.width * SCALE / 10);
            for run in finite_runs(&line.points) {
                if let [_, _, ..] = run {
                    chart.draw_series([PathElement::new(run.to_vec(), style)]).ok()?;
                }
                if line.dots || run.len() == 1 {
                    let dot = |at: &(f64, f64)| Circle::new(*at, 5 * SCALE / 2, ink(line.colour).filled());
                    chart.draw_series(run.iter().map(dot)).ok()?;
                }
            }
        }
        Some(())
    })
}

fn draw_marks(chart: &mut Context<'_, '_>, frame: &Frame, marks: &[(f64, String)]) -> Drawn {
    for (at, name) in marks.iter().filter(|(at, _)| at.is_finite()) {
        let ends = vec![(*at, frame.y.start), (*at, frame.y.end)];
        let dash = DashedPathElement::new(ends, 4 * SCALE, 3 * SCALE, TEXT.mix(0.55).stroke_width(SCALE));
        chart.draw_series([dash]).ok()?;
        let near_end = *at > frame.x.start + 0.8 * (frame.x.end - frame.x.start);
        let (side, name) = beside(name, near_end);
        chart.draw_series([label(&name, (*at, frame.y.end), side, VPos::Top, TEXT.mix(0.8))]).ok()?;
    }
    Some(())
}

/// A mark's name to the right of its line, or to the left near the right end.
fn beside(name: &str, near_end: bool) -> (HPos, String) {
    if near_end { (HPos::Right, format!("{name}\u{a0}")) } else { (HPos::Left, format!("\u{a0}{name}")) }
}

/// The longest stretches of finite points.
fn finite_runs(points: &[(f64, f64)]) -> impl Iterator<Item = &[(f64, f64)]> {
    points.split(|(x, y)| !x.is_finite() || !y.is_finite()).filter(|run| !run.is_empty())
}

/// One layer of a stacked area: a value for each step along x.
#[derive(Clone, Debug)]
pub struct Layer {
    /// One per step; as long as every other layer.
    pub values: Vec<f64>,
    /// Colour of the palette.
    pub colour: usize,
}

/// Areas stacked on one another over the whole of `frame.x`, in equal steps.
pub fn stacked_area(frame: &Frame, layers: &[Layer], marks: &[(f64, String)]) -> String {
    let steps = layers.iter().map(|l| l.values.len()).min().unwrap_or(0);
    let width = (frame.x.end - frame.x.start) / steps.max(1) as f64;
    frame.draw(|chart| {
        let mut base = vec![0.0; steps];
        for layer in layers {
            let top: Vec<f64> = base.iter().zip(&layer.values).map(|(b, v)| b + v.max(0.0)).collect();
            if layer.values.iter().any(|v| *v > 0.0) {
                let mut outline = staircase(&top, frame.x.start, width);
                outline.extend(staircase(&base, frame.x.start, width).into_iter().rev());
                chart.draw_series([Polygon::new(outline, ink(layer.colour).filled())]).ok()?;
            }
            base = top;
        }
        draw_marks(chart, frame, marks)
    })
}

/// Corners of the steps, left to right; flat stretches keep their ends only.
fn staircase(values: &[f64], left: f64, width: f64) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    let mut i = 0;
    while i < values.len() {
        let start = i;
        while i < values.len() && values[i] == values[start] {
            i += 1;
        }
        out.extend([start, i].map(|x| (left + x as f64 * width, values[start])));
    }
    out
}

/// Counts in equal bins over `frame.x`, with lines at `levels` (e.g. the 16 NF4 values).
pub fn histogram(frame: &Frame, counts: &[f64], colour: usize, levels: &[f64], level_colour: usize) -> String {
    let width = (frame.x.end - frame.x.start) / counts.len().max(1) as f64;
    frame.draw(|chart| {
        for (i, &count) in counts.iter().enumerate().filter(|(_, c)| **c > 0.0 && c.is_finite()) {
            let left = frame.x.start + i as f64 * width;
            let bar = Rectangle::new([(left, frame.y.start), (left + 0.9 * width, count)], ink(colour).mix(0.75).filled());
            chart.draw_series([bar]).ok()?;
        }
        for &level in levels {
            let ends = vec![(level, frame.y.start), (level, frame.y.end)];
            chart.draw_series([PathElement::new(ends, ink(level_colour).mix(0.85).stroke_width(3 * SCALE / 2))]).ok()?;
        }
        Some(())
    })
}

/// Values as a field of cells, `columns` in a row, from faint (the least) to full colour (the largest).
pub fn heat(values: &[f64], columns: usize, colour: usize, alt: &str) -> String {
    let columns = columns.max(1);
    let rows = values.len().div_ceil(columns);
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
    let (cell, width) = (640 * SCALE as usize / columns, 640 * SCALE as usize);
    let tall = cell.clamp(8, 24 * SCALE as usize);
    let size = (640, (rows * tall) as u32 / SCALE + 2);
    let mut svg = String::new();
    let drawn = (|| -> Drawn {
        let root = SVGBackend::with_string(&mut svg, (width as u32, size.1 * SCALE)).into_drawing_area();
        for (i, &v) in values.iter().enumerate() {
            let share = if high > low { (v - low) / (high - low) } else { 0.5 };
            // What is not finite is the worst there is.
            let share = if v.is_finite() { share } else { 1.0 };
            let (x, y) = ((i % columns * cell) as i32, (i / columns * tall) as i32);
            let corners = [(x, y), (x + cell as i32, y + tall as i32)];
            root.draw(&Rectangle::new(corners, ink(colour).mix(0.06 + 0.94 * share).filled())).ok()?;
        }
        root.present().ok()
    })();
    let frame = Frame { size, ..Frame::around([], []) }.alt(alt);
    if drawn.is_some() { recolour(&svg, &frame) } else { String::new() }
}
