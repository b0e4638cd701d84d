//! Charts as SVG text, by plotters, recoloured to follow the page's theme.
//!
//! plotters draws at twice the size, because it rounds to whole pixels, and in marker colours, which are then replaced
//! by CSS variables and `currentColor`.

mod bars;
mod compact;
mod field;
mod series;

pub use bars::{Bar, Segment, stacked_bars};
pub use field::heat;
pub use series::{Layer, Line, histogram, lines, stacked_area};

use super::html::{PALETTE, colour, escape};
use super::units::number;
use plotters::coord::types::RangedCoordf64;
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
    /// Whether x counts something: between whole numbers there is no tick's text.
    pub whole_x: bool,
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
            whole_x: false,
            alt: String::new(),
        }
    }

    /// Names of the axes, with units.
    pub fn labels(mut self, x: &str, y: &str) -> Frame {
        (self.x_label, self.y_label) = (x.to_owned(), y.to_owned());
        self
    }

    /// x counts steps, layers, tokens.
    pub fn counted(mut self) -> Frame {
        self.whole_x = true;
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
            .x_label_formatter(&|v| if self.whole_x && (v - v.round()).abs() > 1e-6 { String::new() } else { tick(*v) })
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
    if low > high || !r.start.is_finite() || !r.end.is_finite() {
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
        &format!(
            "<svg role=\"img\" aria-label=\"{}\" width=\"{}\" height=\"{}\"",
            escape(&frame.alt),
            frame.size.0,
            frame.size.1
        ),
        1,
    );
    for i in 0..PALETTE.len() {
        out = out.replace(&format!("#01{i:02X}EE"), &colour(i));
    }
    let out =
        out.replace("#0200EE", "currentColor").replace("#0300EE", "var(--tb-on,#fff)").replace("#0400EE", "#14171c");
    compact::compact(&out)
}

/// Text in a chart, anchored.
fn label<'a, C>(text: &str, at: C, h: HPos, v: VPos, colour: RGBAColor) -> Text<'a, C, String> {
    let style = ("sans-serif", FONT).into_font().color(&colour).pos(Pos::new(h, v));
    Text::new(text.to_owned(), at, style)
}
