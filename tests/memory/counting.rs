//! `malloc` and its kin, counting the bytes that are live and the most that ever were.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

unsafe extern "C" {
    fn __libc_malloc(n: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, n: usize) -> *mut c_void;
    fn __libc_realloc(p: *mut c_void, n: usize) -> *mut c_void;
    fn __libc_memalign(alignment: usize, n: usize) -> *mut c_void;
    fn __libc_free(p: *mut c_void);
    fn malloc_usable_size(p: *mut c_void) -> usize;
}

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static BLOCKS: AtomicUsize = AtomicUsize::new(0);

/// Requests of at least this many bytes are written down while [`RECORDING`].
pub const LARGE: usize = 64 << 10;
static RECORDING: AtomicBool = AtomicBool::new(false);
static RECORDED: AtomicUsize = AtomicUsize::new(0);
static SIZES: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];

/// The heap: bytes, as the C library rounds them up, and blocks.
#[derive(Clone, Copy, Debug)]
pub struct Heap {
    pub live: usize,
    pub peak: usize,
    pub blocks: usize,
}

pub fn heap() -> Heap {
    Heap { live: LIVE.load(SeqCst), peak: PEAK.load(SeqCst), blocks: BLOCKS.load(SeqCst) }
}

/// The peak from here on.
pub fn reset_peak() {
    PEAK.store(LIVE.load(SeqCst), SeqCst);
}

/// The sizes of all large requests during `f`.
pub fn large_allocations<T>(f: impl FnOnce() -> T) -> (T, Vec<usize>) {
    RECORDED.store(0, SeqCst);
    RECORDING.store(true, SeqCst);
    let out = f();
    RECORDING.store(false, SeqCst);
    let n = RECORDED.load(SeqCst).min(SIZES.len());
    (out, SIZES[..n].iter().map(|s| s.load(SeqCst)).collect())
}

/// Counts a block that was just given, of `asked` bytes.
fn given(p: *mut c_void, asked: usize) -> *mut c_void {
    if p.is_null() {
        return p;
    }
    // SAFETY: a block of the C library.
    let n = unsafe { malloc_usable_size(p) };
    BLOCKS.fetch_add(1, SeqCst);
    PEAK.fetch_max(LIVE.fetch_add(n, SeqCst) + n, SeqCst);
    if asked >= LARGE && RECORDING.load(SeqCst) {
        let i = RECORDED.fetch_add(1, SeqCst);
        if let Some(slot) = SIZES.get(i) {
            slot.store(asked, SeqCst);
        }
    }
    p
}

fn taken(p: *mut c_void) {
    if !p.is_null() {
        // SAFETY: a live block of the C library.
        LIVE.fetch_sub(unsafe { malloc_usable_size(p) }, SeqCst);
        BLOCKS.fetch_sub(1, SeqCst);
    }
}

// SAFETY (all below): each passes its arguments on to the C library's own function, under its contract.

#[unsafe(no_mangle)]
unsafe extern "C" fn malloc(n: usize) -> *mut c_void {
    given(unsafe { __libc_malloc(n) }, n)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn calloc(count: usize, n: usize) -> *mut c_void {
    given(unsafe { __libc_calloc(count, n) }, count.saturating_mul(n))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(p: *mut c_void, n: usize) -> *mut c_void {
    // The old block is counted until the new one is: both may be live at once.
    let before = if p.is_null() { 0 } else { unsafe { malloc_usable_size(p) } };
    let new = given(unsafe { __libc_realloc(p, n) }, n);
    if !p.is_null() && (!new.is_null() || n == 0) {
        LIVE.fetch_sub(before, SeqCst);
        BLOCKS.fetch_sub(1, SeqCst);
    }
    new
}

#[unsafe(no_mangle)]
unsafe extern "C" fn free(p: *mut c_void) {
    taken(p);
    unsafe { __libc_free(p) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memalign(alignment: usize, n: usize) -> *mut c_void {
    given(unsafe { __libc_memalign(alignment, n) }, n)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aligned_alloc(alignment: usize, n: usize) -> *mut c_void {
    given(unsafe { __libc_memalign(alignment, n) }, n)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, alignment: usize, n: usize) -> c_int {
    const ENOMEM: c_int = 12;
    let p = given(unsafe { __libc_memalign(alignment, n) }, n);
    if p.is_null() {
        return ENOMEM;
    }
    unsafe { *out = p };
    0
}
