//! Whether the driver and the two libraries are there: asked first, because loading a missing one panics.

use cudarc::{cublaslt, driver, nvrtc};

use crate::{Error, Result};

/// The oldest driver: CUDA 12.0 (525.60 on Linux).
const MIN_DRIVER: i32 = 12_000;

/// `Ok` when a GPU can be used from this process.
///
/// # Errors
/// The file that was looked for and the package that has it.
pub fn check() -> Result<()> {
    const CPU: &str = "or compute on the CPU: add `.cpu()` to the plan's builder";
    // SAFETY: these look for a file and open it.
    let (has_driver, has_nvrtc, has_cublaslt) =
        unsafe { (driver::sys::is_culib_present(), nvrtc::sys::is_culib_present(), cublaslt::sys::is_culib_present()) };
    if !has_driver {
        return Err(Error::new("no NVIDIA driver on this machine")
            .at("libcuda.so.1")
            .expected("a driver of version 525.60 or later, which has this file")
            .found("no such library")
            .next(format!("install the driver (Debian: nvidia-driver; Ubuntu: nvidia-driver-580), {CPU}")));
    }
    driver::result::init().map_err(|e| {
        Error::new("the NVIDIA driver does not start")
            .at("cuInit")
            .found(describe(&e))
            .next(format!("`nvidia-smi` says more; {CPU}"))
    })?;
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { driver::sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| failed("cuDriverGetVersion", e))?;
    if version < MIN_DRIVER {
        return Err(Error::new("the NVIDIA driver is too old")
            .at("libcuda.so.1")
            .expected("525.60 or later (CUDA 12.0)")
            .found(format!("a driver for CUDA {}.{}", version / 1000, version % 1000 / 10))
            .next(format!("update the driver, {CPU}")));
    }
    let missing = |file: &str, pip: &str, apt: &str| {
        Error::new("a CUDA library is missing")
            .at(file.to_string())
            .expected("the library on the dynamic linker's path (LD_LIBRARY_PATH)")
            .found("no such library")
            .next(format!(
                "`apt install {apt}`, or `pip install {pip}` and put its lib folder on LD_LIBRARY_PATH; {CPU}"
            ))
    };
    if !has_nvrtc {
        return Err(missing("libnvrtc.so.13 (or .12)", "nvidia-cuda-nvrtc", "cuda-nvrtc-13-0"));
    }
    if !has_cublaslt {
        return Err(missing("libcublasLt.so.13 (or .12)", "nvidia-cublas", "libcublas-13-0"));
    }
    Ok(())
}

/// The driver's own words for an error.
pub(super) fn describe(e: &driver::DriverError) -> String {
    let text = |r: std::result::Result<&std::ffi::CStr, _>| r.map(|s| s.to_string_lossy().into_owned()).ok();
    let (name, words) = (text(e.error_name()), text(e.error_string()));
    match (name, words) {
        (Some(name), Some(words)) => format!("{name}: {words}"),
        _ => format!("{:?}", e.0),
    }
}

/// A call to the driver that failed.
pub(super) fn failed(call: &str, e: driver::DriverError) -> Error {
    Error::new("the GPU reported an error")
        .at(call.to_string())
        .found(describe(&e))
        .next("the process cannot use the GPU any further: restart it, then resume the run from its last checkpoint")
}
