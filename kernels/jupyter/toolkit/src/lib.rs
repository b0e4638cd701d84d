//! The library as one shared object, and what a cell needs to live in the kernel.
//!
//! Every cell is linked against this object alone, so statics exist once in a session and linking is fast. The kernel
//! adds to each cell's source a use of [`cell`], and replaces evcxr's runtime module by it.

pub mod cell;
mod process;

pub use tunebook;
