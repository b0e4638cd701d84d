//! The three number formats that weights come in, read as f32 one element at a time.

use half::{bf16, f16};

/// f32, bf16 or f16.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    fn read(self) -> f32;
    fn write(v: f32) -> Self;
}

impl Element for f32 {
    fn read(self) -> f32 {
        self
    }
    fn write(v: f32) -> Self {
        v
    }
}

impl Element for bf16 {
    fn read(self) -> f32 {
        f32::from(self)
    }
    fn write(v: f32) -> Self {
        bf16::from_f32(v)
    }
}

impl Element for f16 {
    fn read(self) -> f32 {
        f32::from(self)
    }
    fn write(v: f32) -> Self {
        f16::from_f32(v)
    }
}

/// Denormals count as zero (of the same sign), as on the GPU.
pub(super) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}
