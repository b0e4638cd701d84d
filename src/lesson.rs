//! What the lessons in `notebooks/` use beside the library: checks that show *yours / expected*, tensors from a seed, and
//! small tables, charts and matrices.
//!
//! A lesson begins with `use tunebook::prelude::*; use tunebook::lesson::*;`.

mod check;
pub mod synthetic;

pub use candle_core::{DType, Device, Tensor};
pub use candle_nn;
pub use candle_nn::{Linear, Module};
pub use serde_json;
pub use serde_json::json;

pub use crate::display::units::{count, short_bytes};
pub use crate::display::{Chart, Matrices, chart, matrices, table};
pub use crate::nf4::BlockView;
pub use crate::plan::{Attention, PlanBuilder, SideBySide, Stage, side_by_side};
pub use crate::survey::{Survey, survey};
pub use check::{Check, attempt, attempt_close, check, check_close};
