//! A field of cells.

use super::{Drawn, Frame, SCALE, ink, recolour};
use plotters::prelude::*;

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
