//! The one allocation.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::plan::ALIGNMENT;
use crate::{Error, Result};

/// Zeroed memory of a fixed size, aligned as the plan's offsets are.
pub struct Arena {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the arena owns its memory; access goes through its owner's borrows.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Allocates `bytes`, zeroed.
    ///
    /// # Errors
    /// The system does not give that much.
    pub fn new(bytes: u64) -> Result<Self> {
        let refused = || {
            Error::new("the arena could not be allocated")
                .expected(format!("{bytes} bytes of memory"))
                .next("make the plan smaller: a smaller batch, shorter sequences or more recomputed layers")
        };
        let size = usize::try_from(bytes).map_err(|_| refused())?.max(ALIGNMENT as usize);
        let layout = Layout::from_size_align(size, ALIGNMENT as usize).map_err(|_| refused())?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        Ok(Arena { start, layout })
    }

    /// `bytes` from `offset` on.
    ///
    /// # Safety
    /// No other reference to these bytes is alive.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, offset: u64, bytes: u64) -> &mut [u8] {
        let (offset, bytes) = (offset as usize, bytes as usize);
        assert!(offset + bytes <= self.layout.size(), "the plan points outside its arena");
        // SAFETY: inside the allocation, initialised by alloc_zeroed; uniqueness is the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), bytes) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
