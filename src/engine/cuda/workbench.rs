//! Kernels from text, buffers and timing: what it takes to write a CUDA kernel in a notebook's cell.
//!
//! `notebooks/11_inside_the_kernels.ipynb` explains it. The engine itself uses none of this: its kernels are compiled when a
//! [`Gpu`] is opened, and its memory is one arena.

use std::ffi::CString;

use bytemuck::Pod;
use cudarc::driver::{result, sys};

use super::gpu::{Arg, Context, Gpu, KERNELS, Launch, Parameters};
use super::libraries::failed;
use crate::{Error, Result};

/// Kernels that were compiled from text.
pub struct Module {
    name: String,
    handle: sys::CUmodule,
    context: Context,
}

// SAFETY: the handle may be used from any thread that has made the context current, which every use does.
unsafe impl Send for Module {}

/// Device memory; freed when it is dropped.
pub struct Buffer {
    /// Its device address, for [`Arg::Ptr`].
    pub ptr: u64,
    bytes: usize,
    context: Context,
}

/// The text of a file of `kernels/cuda`, by its name without `.cu`.
///
/// # Errors
/// No such file, with the names that there are.
pub fn kernel_source(name: &str) -> Result<&'static str> {
    KERNELS.iter().find(|(file, _)| *file == name).map(|(_, text)| *text).ok_or_else(|| {
        Error::new("no such kernel file")
            .at(format!("kernels/cuda/{name}.cu"))
            .expected(KERNELS.iter().map(|(file, _)| *file).collect::<Vec<_>>().join(", "))
    })
}

impl Gpu {
    /// Compiles CUDA source for this card. `elem` is bf16, or float where the card was opened for f32; `#include "common.cuh"`
    /// is understood, toolkit headers are not there. `name` is what errors call it.
    ///
    /// # Errors
    /// The compiler's log, with the line.
    pub fn compile(&self, name: &str, source: &str) -> Result<Module> {
        self.bind()?;
        let context = Context::retain(self)?;
        let code = super::compile::compile_text(name, source, self.target())?;
        // SAFETY: the code is a whole image; the driver copies it.
        let handle = unsafe { result::module::load_data(code.as_ptr().cast()) }
            .map_err(|e| failed("cuModuleLoadData", e).at(name.to_owned()))?;
        Ok(Module { name: name.to_owned(), handle, context })
    }

    /// Copies values to new device memory.
    ///
    /// # Errors
    /// Not enough memory on the card.
    pub fn buffer<T: Pod>(&self, values: &[T]) -> Result<Buffer> {
        let buffer = self.zeros(size_of_val(values))?;
        self.upload(buffer.ptr, bytemuck::cast_slice(values))?;
        self.wait()?;
        Ok(buffer)
    }

    /// New device memory, zeroed.
    ///
    /// # Errors
    /// Not enough memory on the card.
    pub fn zeros(&self, bytes: usize) -> Result<Buffer> {
        self.bind()?;
        let context = Context::retain(self)?;
        Ok(Buffer { ptr: self.allocate(bytes as u64)?, bytes, context })
    }

    /// Seconds that the card takes for `work`, by its own clock: the shortest of `repeats` runs, after one that is not counted.
    ///
    /// # Errors
    /// What `work` says.
    pub fn seconds(&self, repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        self.bind()?;
        work()?;
        let event =
            || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|e| failed("cuEventCreate", e));
        let (begin, end) = (event()?, event()?);
        let mut best = f64::INFINITY;
        let mut run = || -> Result<()> {
            for _ in 0..repeats.max(1) {
                // SAFETY: events and stream live until below.
                unsafe {
                    result::event::record(begin, self.stream).map_err(|e| failed("cuEventRecord", e))?;
                    work()?;
                    result::event::record(end, self.stream).map_err(|e| failed("cuEventRecord", e))?;
                    self.wait()?;
                    let ms = result::event::elapsed(begin, end).map_err(|e| failed("cuEventElapsedTime", e))?;
                    best = best.min(f64::from(ms) / 1e3);
                }
            }
            Ok(())
        };
        let done = run();
        for event in [begin, end] {
            // SAFETY: made above, not used again.
            let _ = unsafe { result::event::destroy(event) };
        }
        done.map(|()| best)
    }
}

impl Module {
    /// Puts a kernel into the card's stream. The arguments must be those of its signature, in order; their number and sizes are
    /// checked (by drivers from CUDA 12.4 on), what they point to is not.
    ///
    /// # Errors
    /// A kernel that the text does not have, arguments that do not fit it, a launch that the driver refuses.
    pub fn launch(&self, gpu: &Gpu, kernel: &str, how: Launch, args: &[Arg]) -> Result<()> {
        gpu.bind()?;
        let name = CString::new(kernel).map_err(|_| Error::new("a kernel's name has a NUL byte"))?;
        // SAFETY: the module is loaded while `self` lives.
        let function = unsafe { result::module::get_function(self.handle, name) }.map_err(|e| {
            failed("cuModuleGetFunction", e)
                .at(format!("{}: {kernel}", self.name))
                .expected("a function declared extern \"C\" __global__")
        })?;
        Parameters::of(function, gpu.target().driver).check(kernel, &[], args).map_err(|e| e.at(self.name.clone()))?;
        gpu.launch_function(function, how, &[], args, false)
            .map_err(|e| failed(&format!("{}: {kernel} {how:?}", self.name), e))
    }
}

impl Buffer {
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Waits for the card and copies the contents to the host.
    ///
    /// # Errors
    /// A size that is no whole number of `T`; what a kernel before did wrong.
    pub fn read<T: Pod>(&self, gpu: &Gpu) -> Result<Vec<T>> {
        if !self.bytes.is_multiple_of(size_of::<T>()) {
            return Err(Error::new("a buffer does not hold a whole number of these values")
                .expected(format!("a multiple of {} bytes", size_of::<T>()))
                .found(format!("{} bytes", self.bytes)));
        }
        let mut out = vec![T::zeroed(); self.bytes / size_of::<T>()];
        gpu.read(self.ptr, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded by this value, not used again; the driver waits for running kernels.
            let _ = unsafe { result::module::unload(self.handle) };
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated by this value, not used again.
            let _ = unsafe { result::free_sync(self.ptr) };
        }
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Module({})", self.name)
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes at {:#x})", self.bytes, self.ptr)
    }
}
