//! How values show themselves in a notebook and in a terminal.
//!
//! Every stage's value has an inherent `evcxr_display`, which a notebook calls on the last expression of a cell, and a
//! `Display` with the same content as aligned text. Both are made from one [`Card`], so they cannot disagree. Displays
//! go through one replaceable [`Sink`]. The maths knows nothing of this module.

mod card;
mod data;
#[cfg(feature = "hub")]
mod download;
mod environment;
mod estimate;
mod fit;
mod free;
mod generate;
pub mod html;
mod inspect;
mod lesson;
mod lora;
mod merge;
mod methods;
mod model;
mod nf4;
mod plan;
mod progress;
mod sink;
pub mod svg;
pub mod text;
mod train;
pub mod units;

pub use card::{Align, Block, Card, Cell, Column, Row, Table, Tone};
pub use free::{Chart, Matrices, chart, matrices, table};
pub(crate) use progress::RunProgress;
pub use sink::{MimeBundle, Sink, reset_sink, set_sink};

/// A value that shows itself as a [`Card`].
pub trait Show {
    /// What is shown.
    fn card(&self) -> Card;
}

/// Both forms of what a value shows, e.g. to save the HTML to a file.
pub fn bundle(value: &dyn Show) -> MimeBundle {
    let card = value.card();
    MimeBundle { html: card.to_html(), text: card.to_text() }
}

/// Shows a value through the sink.
pub fn show(value: &dyn Show) {
    let bundle = bundle(value);
    sink::with_sink(|s| s.show(&bundle));
}

/// Shows what is made already.
pub fn show_bundle(bundle: &MimeBundle) {
    sink::with_sink(|s| s.show(bundle));
}

/// Shows a value in place of the last one with the same id, if the sink [is live](Sink::is_live).
pub fn update(id: &str, value: &dyn Show) {
    if is_live() {
        let bundle = bundle(value);
        sink::with_sink(|s| s.update(id, &bundle));
    }
}

/// Removes the display with that id, where that is possible.
pub fn clear(id: &str) {
    sink::with_sink(|s| s.clear(id));
}

/// Removes all that the cell has shown so far, where that is possible; with `wait` when something new is shown, so that it
/// does not flicker.
pub fn clear_output(wait: bool) {
    sink::with_sink(|s| s.clear_output(wait));
}

/// Shows one line of text.
pub fn line(text: &str) {
    sink::with_sink(|s| s.text(text));
}

/// Whether displays can be updated in place.
pub fn is_live() -> bool {
    sink::with_sink(|s| s.is_live())
}

/// Gives types the inherent `evcxr_display` from their [`Show`]. With `+ Display`, also a `Display`
/// of the same text; with fields, also a `Debug` that prints it, and the fields for `{:#?}`.
macro_rules! shown {
    ($($type:ty),+ $(,)?) => {$(
        impl $type {
            /// Shows this value: HTML in a notebook, aligned text in a terminal.
            pub fn evcxr_display(&self) {
                $crate::display::show(self);
            }
        }
    )+};
    (+ Display $($type:ty),+ $(,)?) => {$(
        $crate::display::shown!($type);

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&$crate::display::Show::card(self).to_text())
            }
        }
    )+};
    ($type:ident { $($field:ident),+ $(,)? }) => {
        $crate::display::shown!(+ Display $type);

        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                if f.alternate() {
                    f.debug_struct(stringify!($type))$(.field(stringify!($field), &self.$field))+.finish()
                } else {
                    std::fmt::Display::fmt(self, f)
                }
            }
        }
    };
}
pub(crate) use shown;
