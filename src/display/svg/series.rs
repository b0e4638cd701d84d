//! Lines, areas and histograms over an axis.

use super::{Context, Drawn, Frame, SCALE, TEXT, ink, label};
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

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
pub(super) fn beside(name: &str, near_end: bool) -> (HPos, String) {
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
            let bar =
                Rectangle::new([(left, frame.y.start), (left + 0.9 * width, count)], ink(colour).mix(0.75).filled());
            chart.draw_series([bar]).ok()?;
        }
        for &level in levels {
            let ends = vec![(level, frame.y.start), (level, frame.y.end)];
            chart
                .draw_series([PathElement::new(ends, ink(level_colour).mix(0.85).stroke_width(3 * SCALE / 2))])
                .ok()?;
        }
        Some(())
    })
}
