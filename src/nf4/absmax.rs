//! The scale of each block: plain f32, or nested.

use std::fmt;

use super::dynamic8;
use crate::{Error, Result};

/// The largest magnitude of each block, in f32 or quantized to 8 bits.
#[derive(Clone, PartialEq)]
pub enum Absmax {
    /// One f32 per block: `[blocks]`.
    F32(Vec<f32>),
    /// Nested ("double") quantization: `absmax[b] = map[codes[b]] * absmax[b / blocksize] + offset`, where `map` is
    /// [`dynamic8::signed_map`].
    Nested {
        /// One 8-bit code per block: `[blocks]`.
        codes: Vec<u8>,
        /// The largest magnitude of each block of codes: `[ceil(blocks / blocksize)]`. In files: `nested_absmax`.
        absmax: Vec<f32>,
        /// The mean of all absmax values, taken away before they were quantized. In files: `nested_offset`.
        offset: f32,
        /// Codes per nested block, 256.
        blocksize: usize,
    },
}

/// [`Absmax`] borrowed, for data that lives elsewhere, such as in the engine's arena.
#[derive(Clone, Copy, Debug)]
pub enum AbsmaxRef<'a> {
    /// One f32 per block.
    F32(&'a [f32]),
    /// Nested quantization; the fields are those of [`Absmax::Nested`].
    Nested {
        /// One 8-bit code per block.
        codes: &'a [u8],
        /// The largest magnitude of each block of codes.
        absmax: &'a [f32],
        /// The mean of all absmax values.
        offset: f32,
        /// Codes per nested block.
        blocksize: usize,
    },
}

impl AbsmaxRef<'_> {
    /// The number of blocks.
    pub fn len(&self) -> usize {
        match self {
            AbsmaxRef::F32(v) => v.len(),
            AbsmaxRef::Nested { codes, .. } => codes.len(),
        }
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether every block has the scale that it needs.
    pub(super) fn is_whole(&self) -> bool {
        match *self {
            AbsmaxRef::F32(_) => true,
            AbsmaxRef::Nested { codes, absmax, blocksize, .. } => {
                blocksize > 0 && absmax.len() == codes.len().div_ceil(blocksize)
            }
        }
    }

    /// The absmax of block `b`, which must exist.
    pub(super) fn get(&self, b: usize) -> f32 {
        match *self {
            AbsmaxRef::F32(v) => v[b],
            AbsmaxRef::Nested { codes, absmax, offset, blocksize } => {
                dynamic8::signed_map()[usize::from(codes[b])] * absmax[b / blocksize] + offset
            }
        }
    }
}

impl Absmax {
    /// The same without owning it.
    pub fn borrow(&self) -> AbsmaxRef<'_> {
        match self {
            Absmax::F32(v) => AbsmaxRef::F32(v),
            Absmax::Nested { codes, absmax, offset, blocksize } => {
                AbsmaxRef::Nested { codes, absmax, offset: *offset, blocksize: *blocksize }
            }
        }
    }

    /// The number of blocks.
    pub fn len(&self) -> usize {
        self.borrow().len()
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the values are themselves quantized.
    pub fn is_nested(&self) -> bool {
        matches!(self, Absmax::Nested { .. })
    }

    /// One f32 per block, decoded if nested: `[blocks]`.
    ///
    /// # Errors
    /// Nested parts that do not fit together.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let a = self.borrow();
        if !a.is_whole() {
            return Err(nested_mismatch(&a));
        }
        Ok((0..a.len()).map(|b| a.get(b)).collect())
    }
}

pub(super) fn nested_mismatch(a: &AbsmaxRef<'_>) -> Error {
    let e = Error::new("nested absmax does not fit the blocks").at("nested_absmax");
    match a {
        AbsmaxRef::Nested { codes, absmax, blocksize, .. } => e
            .expected(format!("one scale for each {blocksize} of {} codes", codes.len()))
            .found(format!("{} scales", absmax.len())),
        AbsmaxRef::F32(_) => e,
    }
}

impl fmt::Debug for Absmax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Absmax::F32(v) => write!(f, "F32[{}]", v.len()),
            Absmax::Nested { codes, absmax, offset, blocksize } => {
                write!(
                    f,
                    "Nested(codes u8[{}], absmax f32[{}] per {blocksize}, offset {offset})",
                    codes.len(),
                    absmax.len()
                )
            }
        }
    }
}
