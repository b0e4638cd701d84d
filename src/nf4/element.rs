//! The three number formats that weights come in, read as f32 one element at a time.

use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
pub(super) use super::simd::Lanes;
#[cfg(not(target_arch = "x86_64"))]
pub(super) use Element as Lanes;

/// f32, bf16 or f16.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    fn read(self) -> f32;
    fn write(v: f32) -> Self;
    /// `n` zeros, from pages that the system has zeroed: nothing is written.
    fn zeros(n: usize) -> Vec<Self>;
}

impl Element for f32 {
    fn read(self) -> f32 {
        self
    }
    fn write(v: f32) -> Self {
        v
    }
    fn zeros(n: usize) -> Vec<Self> {
        huge_pages(vec![0.0; n])
    }
}

impl Element for bf16 {
    fn read(self) -> f32 {
        f32::from(self)
    }
    fn write(v: f32) -> Self {
        bf16::from_f32(v)
    }
    fn zeros(n: usize) -> Vec<Self> {
        huge_pages(vec![0u16; n]).reinterpret_into()
    }
}

impl Element for f16 {
    fn read(self) -> f32 {
        f32::from(self)
    }
    fn write(v: f32) -> Self {
        f16::from_f32(v)
    }
    fn zeros(n: usize) -> Vec<Self> {
        huge_pages(vec![0u16; n]).reinterpret_into()
    }
}

/// Denormals count as zero (of the same sign), as on the GPU.
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}

/// Asks for large pages before a large vector is first written: faulting in small ones costs more than filling them.
fn huge_pages<T>(mut v: Vec<T>) -> Vec<T> {
    #[cfg(target_os = "linux")]
    if size_of_val(v.as_slice()) >= 8 << 20 {
        const PAGE: usize = 4096;
        let start = v.as_mut_ptr() as usize;
        let (first, end) = (start.next_multiple_of(PAGE), start + size_of_val(v.as_slice()));
        // SAFETY: whole pages inside the vector's own memory. Advice only: failure changes nothing.
        unsafe { libc::madvise(first as *mut libc::c_void, (end - first) / PAGE * PAGE, libc::MADV_HUGEPAGE) };
    }
    v
}
