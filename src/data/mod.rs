//! From rows to flat batches of tokens.
//!
//! [`Rows`] hold a file as it is, and [`RowFile`] looks at one first; [`detect`] tells the form of rows. [`encode`] makes a
//! [`Dataset`] of them: an [`InstructionTemplate`] or a [`ChatTemplate`] gives the text, a [`Tokenizer`] the tokens, and the
//! part that is trained on gives the labels. [`epoch_order`] says in which order the examples are visited, [`Batch`] is what the
//! engine gets, [`BatchView`] is for looking at it.

mod batch;
mod chat;
mod conversation;
mod csv;
mod dataset;
mod detect;
mod encode;
#[cfg(feature = "polars")]
mod frame;
mod packing;
#[cfg(feature = "polars")]
mod parquet;
mod report;
mod row_file;
mod rows;
mod sampler;
mod stream;
mod template;
mod tokenizer;
mod view;

pub use batch::Batch;
pub use chat::{ChatOptions, ChatTemplate, RenderedChat, message};
pub use dataset::{Dataset, Example};
pub use detect::{Detected, detect};
pub use encode::{DataConfig, Format, TrainOn, encode};
pub use report::{DataReport, DroppedRow, LengthBin};
pub use row_file::{RowFile, RowFormat};
pub use rows::Rows;
pub use sampler::{epoch_order, length_grouped};
pub use stream::TextStream;
pub use template::InstructionTemplate;
pub use tokenizer::{Encoding, Padding, Tokenizer};
pub use view::{BatchView, TokenView};

/// The label of a token that is not trained on.
pub const IGNORE_INDEX: i32 = -100;
