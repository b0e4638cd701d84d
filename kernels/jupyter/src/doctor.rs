//! What is there, what is missing, and the command that fixes it.

use std::ffi::CString;
use std::process::Command;

use crate::install;
use crate::template::{Layout, Template};
use crate::toolchain::Toolchain;

enum Found {
    Yes(String),
    /// Can be done without.
    Missing(String, &'static str),
    /// Nothing works without.
    Needed(String, &'static str),
}

/// Prints the report; whether the kernel can work.
pub fn run(layout: &Layout) -> bool {
    let checks: [(&str, Found); 8] = [
        ("Rust", rust(layout)),
        ("linker", linker()),
        ("standard library source", rust_source(layout)),
        ("library for cells", library(layout)),
        ("JupyterLab", jupyter(layout)),
        ("kernel spec", spec(layout)),
        ("GPU", gpu()),
        ("CUDA libraries", cuda()),
    ];
    let mut works = true;
    for (name, found) in checks {
        let (sign, what, fix) = match &found {
            Found::Yes(what) => ("ok     ", what, None),
            Found::Missing(what, fix) => ("missing", what, Some(fix)),
            Found::Needed(what, fix) => ("MISSING", what, Some(fix)),
        };
        works &= !matches!(found, Found::Needed(..));
        println!("{sign}  {name}: {what}");
        if let Some(fix) = fix {
            println!("         fix: {fix}");
        }
    }
    works
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|o| o.status.success())?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

fn rust(layout: &Layout) -> Found {
    const FIX: &str = "rustup update, or install Rust from https://rustup.rs";
    const WANTED: (u32, u32) = (1, 95);
    let version =
        Toolchain::find(&layout.repository).ok().and_then(|(rustc, _, _)| first_line(Command::new(rustc).arg("-V")));
    let Some(version) = version else { return Found::Needed("no rustc".into(), FIX) };
    let mut parts = version.split_whitespace().nth(1).unwrap_or_default().split('.').map(|p| p.parse().unwrap_or(0));
    let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if found < WANTED { Found::Needed(format!("{version}, 1.95 or newer is needed"), FIX) } else { Found::Yes(version) }
}

fn linker() -> Found {
    if install::on_path("cc") {
        Found::Yes("cc".into())
    } else {
        Found::Needed("no cc".into(), "apt install build-essential")
    }
}

fn rust_source(layout: &Layout) -> Found {
    match Toolchain::find(&layout.repository) {
        Ok((_, _, sysroot)) if sysroot.join("lib/rustlib/src/rust/library/core").is_dir() => {
            Found::Yes("rust-src".into())
        }
        _ => Found::Needed("no types of variables without it".into(), "rustup component add rust-src"),
    }
}

fn library(layout: &Layout) -> Found {
    match Template::find(layout) {
        Ok(Ok(template)) => Found::Yes(template.dir.display().to_string()),
        Ok(Err(_)) => Found::Missing(
            "not compiled, or its sources have changed; the next kernel compiles it".into(),
            "cargo run --release -p tunebook-kernel -- install",
        ),
        Err(why) => Found::Needed(why, "cargo run --release -p tunebook-kernel -- install"),
    }
}

fn jupyter(layout: &Layout) -> Found {
    let jupyter = install::environment(layout).join("bin/jupyter-lab");
    match first_line(Command::new(jupyter).arg("--version")) {
        Some(version) => Found::Yes(format!("{version} in {}", install::environment(layout).display())),
        None => Found::Missing("not installed".into(), "cargo run --release -p tunebook-kernel -- lab"),
    }
}

fn spec(layout: &Layout) -> Found {
    const FIX: &str = "cargo run --release -p tunebook-kernel -- install";
    let file = install::environment(layout).join("share/jupyter/kernels/rust/kernel.json");
    let Ok(text) = std::fs::read_to_string(&file) else { return Found::Missing("not installed".into(), FIX) };
    let spec: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    match spec["argv"][0].as_str() {
        Some(program) if std::path::Path::new(program).is_file() => Found::Yes(program.to_owned()),
        _ => Found::Missing(format!("{}: the program that it starts is gone", file.display()), FIX),
    }
}

fn gpu() -> Found {
    let query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"];
    match first_line(Command::new("nvidia-smi").args(query)) {
        Some(line) => Found::Yes(line),
        None => Found::Missing(
            "no NVIDIA GPU is visible; the CPU backend runs everything".into(),
            "install the NVIDIA driver",
        ),
    }
}

fn cuda() -> Found {
    let loads = |names: &[&str]| {
        names.iter().any(|name| {
            let name = CString::new(*name).expect("no NUL");
            // SAFETY: loading a library of the system; it stays loaded.
            !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) }.is_null()
        })
    };
    let wanted: [(&str, &[&str]); 3] = [
        ("driver (libcuda)", &["libcuda.so.1"]),
        ("NVRTC", &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]),
        ("cuBLASLt", &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"]),
    ];
    let missing: Vec<&str> = wanted.iter().filter(|(_, names)| !loads(names)).map(|(what, _)| *what).collect();
    if missing.is_empty() {
        Found::Yes("driver, NVRTC, cuBLASLt".into())
    } else {
        Found::Missing(
            missing.join(", "),
            "pip install nvidia-cuda-nvrtc nvidia-cublas, and put their lib directories on LD_LIBRARY_PATH; the driver is the system's",
        )
    }
}
