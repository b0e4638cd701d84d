//! kernels/cuda/*.cu to machine code for the card at hand, by NVRTC, kept on disk.

use std::ffi::{CStr, CString};
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use crate::{Error, Result, files};

/// Changes what a kernel file is compiled into, beside its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Compute capability, e.g. (9, 0).
    pub capability: (u32, u32),
    /// `elem` is float instead of bf16.
    pub f32: bool,
    /// Of the driver, as CUDA counts.
    pub driver: i32,
}

/// What kernel files include.
const INCLUDES: [(&str, &str); 6] = [
    ("common.cuh", include_str!("../../../kernels/cuda/common.cuh")),
    ("attention.cuh", include_str!("../../../kernels/cuda/attention.cuh")),
    ("mma.cuh", include_str!("../../../kernels/cuda/mma.cuh")),
    ("dynamic_map.cuh", include_str!("../../../kernels/cuda/dynamic_map.cuh")),
    ("low_rank.cuh", include_str!("../../../kernels/cuda/low_rank.cuh")),
    ("hopper.cuh", include_str!("../../../kernels/cuda/hopper.cuh")),
];

/// A kernel file with what it includes; the compiler's log counts the lines of each file.
fn whole(file: &str, source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    for (i, line) in source.lines().enumerate() {
        let wanted = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match INCLUDES.iter().find(|(name, _)| Some(*name) == wanted) {
            Some((name, text)) => out += &format!("#line 1 \"{name}\"\n{text}\n#line {} \"{file}\"\n", i + 2),
            None => out += &format!("{line}\n"),
        }
    }
    out
}

/// Machine code of a kernel file: from the cache, or compiled and put there.
///
/// # Errors
/// The compiler's log.
pub(super) fn compile(name: &str, source: &str, target: Target) -> Result<Vec<u8>> {
    let file = format!("kernels/cuda/{name}.cu");
    let source = whole(&file, source);
    let options = options(target);
    let version = nvrtc_version();
    let key = format!("{:?} {version:?} {options:?} {}\0{source}", target.driver, env!("CARGO_PKG_VERSION"));
    let hash: String = Sha256::digest(key.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
    let cached = cache_dir().map(|dir| dir.join(format!("{name}-{}.cubin", &hash[..32])));
    if let Some(code) = cached.as_ref().and_then(|path| std::fs::read(path).ok())
        && !code.is_empty()
    {
        return Ok(code);
    }
    let code = nvrtc(&file, &source, &options)?;
    if let Some(path) = cached
        && let Some(dir) = path.parent()
        && files::create_dir_all(dir).is_ok()
    {
        // A cache that cannot be written costs time alone.
        let _ = files::write_atomic_bytes(&path, &code);
    }
    Ok(code)
}

/// Machine code of text that is no file of ours; not kept.
///
/// # Errors
/// The compiler's log.
pub(super) fn compile_text(name: &str, source: &str, target: Target) -> Result<Vec<u8>> {
    nvrtc(name, &whole(name, source), &options(target))
}

fn options(target: Target) -> Vec<String> {
    let (major, minor) = target.capability;
    // Hopper's own instructions are in no later card's set: a target of their own, with an a.
    let own = if target.capability == (9, 0) { "a" } else { "" };
    let mut options = vec![format!("--gpu-architecture=sm_{major}{minor}{own}"), "--std=c++17".into()];
    if target.f32 {
        options.push("--define-macro=ELEM_F32".into());
    }
    options
}

/// `$TUNEBOOK_KERNEL_CACHE`, else `$XDG_CACHE_HOME/tunebook/kernels`, else `~/.cache/tunebook/kernels`.
fn cache_dir() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("TUNEBOOK_KERNEL_CACHE").or_else(|| {
        let base = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")))?;
        Some(base.join("tunebook/kernels"))
    })
}

fn nvrtc_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers; the library is there.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// `file` is what the log and errors call the source.
fn nvrtc(file: &str, source: &str, options: &[String]) -> Result<Vec<u8>> {
    let fail = |found: String| {
        Error::new("a kernel does not compile").at(file.to_owned()).expected(options.join(" ")).found(found).next(
            "correct the line; a source that compiled elsewhere needs NVRTC of CUDA 12.0 or later that knows this card",
        )
    };
    let text = CString::new(source).map_err(|_| fail("a NUL byte in the source".into()))?;
    let named = CString::new(file).map_err(|_| fail("a NUL byte in the name".into()))?;
    let program = result::create_program(&text, Some(&named)).map_err(|e| fail(e.to_string()))?;
    // SAFETY: the program lives until it is destroyed below; buffers have the sizes that the library said.
    let out = unsafe {
        match result::compile_program(program, options) {
            Err(e) => {
                let log = result::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
                let log = CStr::from_bytes_until_nul(&log).map(|c| c.to_string_lossy().into_owned());
                Err(fail(format!("{e}\n{}", log.unwrap_or_default())))
            }
            Ok(()) => {
                let mut size = 0;
                let mut code = Vec::new();
                let mut read = || {
                    sys::nvrtcGetCUBINSize(program, &mut size).result()?;
                    code = vec![0u8; size];
                    sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()
                };
                read().map_err(|e| fail(e.to_string())).map(|()| code)
            }
        }
    };
    // SAFETY: created above.
    let _ = unsafe { result::destroy_program(program) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVRTC needs no GPU: where the library is, every kernel compiles for every card that we name.
    #[test]
    fn every_kernel_compiles() {
        // SAFETY: looks for a file.
        if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
            println!("skipped: no NVRTC on this machine");
            return;
        }
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0)] {
            for f32 in [false, true] {
                let target = Target { capability, f32, driver: 0 };
                for (name, source) in super::super::gpu::KERNELS {
                    let code = nvrtc(name, &whole(name, source), &options(target)).unwrap();
                    assert!(code.starts_with(b"\x7fELF"), "{name}");
                }
            }
        }
    }

    #[test]
    fn the_dynamic_map_is_that_of_the_cpu() {
        let mut numbers = String::new();
        for row in crate::nf4::dynamic8::signed_map().chunks(8) {
            let row: Vec<String> = row.iter().map(|v| format!("{:#010x}", v.to_bits())).collect();
            numbers += &format!("    {},\n", row.join(", "));
        }
        let (_, file) = INCLUDES.iter().find(|(name, _)| *name == "dynamic_map.cuh").unwrap();
        assert!(file.contains(&format!("{{\n{numbers}}}")), "kernels/cuda/dynamic_map.cuh should have\n{numbers}");
    }

    /// A kernel is launched before the one before it is done, and has to wait for it: common.cuh.
    #[test]
    fn every_kernel_waits_for_the_one_before_it() {
        let mut kernels = 0;
        for (name, source) in super::super::gpu::KERNELS {
            for kernel in source.split("__global__ void").skip(1) {
                let signature = kernel.split_once('{').expect("a body").0.trim();
                // What stands before the call: constants, addresses, requests to the cache.
                let body = kernel.split_once('{').map_or("", |(_, body)| body);
                let before = body.split("after_previous();").next().unwrap_or_default();
                assert!(before.len() < body.len(), "{name}: {signature}");
                let first = before.trim_matches(|c: char| c.is_whitespace() || c == '\\').is_empty();
                assert!(first || *name == "linear_one", "{name}: {signature} does something before it waits");
                assert!(!before.contains("__global__") && !before.contains("\n}"), "{name}: {signature}");
                kernels += 1;
            }
        }
        assert!(kernels > 50, "{kernels}");
    }

    #[test]
    fn a_kernel_that_does_not_compile_shows_the_log() {
        // SAFETY: looks for a file.
        if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
            println!("skipped: no NVRTC on this machine");
            return;
        }
        let target = Target { capability: (8, 0), f32: false, driver: 0 };
        let source = "#include \"common.cuh\"\n\nextern \"C\" __global__ void k() { nothing; }";
        let e = compile_text("broken.cu", source, target).unwrap_err();
        assert!(e.to_string().contains("broken.cu(3)") && e.to_string().contains("nothing"), "{e}");
    }
}
