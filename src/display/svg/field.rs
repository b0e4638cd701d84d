//! A field of cells.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::html::{colour as css, escape};

/// Shown width in pixels.
const WIDTH: usize = 640;
/// Degrees of fullness: one path for each, so that a field of many cells is a short text.
const DEGREES: usize = 16;

/// Values as a field of cells, `columns` in a row, from faint (the least) to full colour (the largest).
pub fn heat(values: &[f64], columns: usize, colour: usize, alt: &str) -> String {
    let columns = columns.max(1);
    let rows = values.len().div_ceil(columns);
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
    let wide = (WIDTH / columns).max(1);
    let tall = wide.clamp(4, 24);
    let mut paths: BTreeMap<usize, String> = BTreeMap::new();
    for (i, &v) in values.iter().enumerate() {
        let share = if high > low { (v - low) / (high - low) } else { 0.5 };
        // What is not finite is the worst there is.
        let share = if v.is_finite() { share } else { 1.0 };
        let degree = (share * (DEGREES - 1) as f64).round() as usize;
        let (x, y) = (i % columns * wide, i / columns * tall);
        write!(paths.entry(degree).or_default(), "M{x} {y}h{wide}v{tall}h-{wide}z").ok();
    }
    let (alt, ink, height) = (escape(alt), css(colour), rows * tall);
    let mut out = format!(
        "<svg role=\"img\" aria-label=\"{alt}\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         xmlns=\"http://www.w3.org/2000/svg\"><g fill=\"{ink}\">"
    );
    for (degree, path) in paths {
        let opacity = 0.06 + 0.94 * degree as f64 / (DEGREES - 1) as f64;
        write!(out, "<path opacity=\"{opacity:.2}\" d=\"{path}\"/>").ok();
    }
    out.push_str("</g></svg>");
    out
}
