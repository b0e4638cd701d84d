//! Stacked bars.

use super::series::beside;
use super::{Context, Drawn, FONT, Frame, SCALE, TEXT, ink, ink_on, label, recolour, tick};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

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
        whole_x: false,
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
            root.draw(&label(&bar.name, (left - 8 * SCALE as i32, middle), HPos::Right, VPos::Center, TEXT.mix(0.9)))
                .ok()?;
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
            chart
                .draw_series([label(
                    &s.name,
                    (x + s.value / 2.0, y),
                    HPos::Center,
                    VPos::Center,
                    ink_on(s.colour).mix(1.0),
                )])
                .ok()?;
        }
        x += s.value;
    }
    Some(())
}
